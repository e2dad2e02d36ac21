"""The one rule by which recordings are found, looked at and read: mono float32 in +-1, channels averaged.

A recording that cannot be decoded, that is shorter than its header promises (a copy that broke off), or whose header
claims a sample rate outside 4 to 192 kHz is unusable: :class:`~s3prl_speaker_upstreams.errors.BadAudio`, or its kind
:class:`~s3prl_speaker_upstreams.errors.DamagedAudio` where the file could be opened.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from s3prl_speaker_upstreams.common.files import write_whole
from s3prl_speaker_upstreams.errors import BadAudio, DamagedAudio

if TYPE_CHECKING:
    import soundfile

__all__ = [
    "AUDIO_SUFFIXES",
    "OTHER_SUFFIXES",
    "SAMPLE_RATE",
    "AudioInfo",
    "find_audio",
    "find_names",
    "is_audio_name",
    "probe",
    "read_audio",
    "resample",
    "write_audio",
]

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16000
"""Hz; what every model here hears."""

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64", ".caf", ".sph")
"""Endings of the files that libsndfile reads, in lower case; others (m4a, aac, wma) need converting first."""

OTHER_SUFFIXES = (".m4a", ".aac", ".mp4", ".wma", ".amr", ".webm", ".mka", ".ape", ".wv", ".shn")
"""Endings of recordings that libsndfile does not read: counted and named where they are met, never skipped silently."""

_LOWEST_RATE, _HIGHEST_RATE = 4000, 192000

# What libsndfile notes where a chunk is larger than the rest of the file. Programs that write to a pipe cannot know
# the length and put a placeholder of about 2 or 4 GiB there: such a file is whole.
_SHORT = re.compile(r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE)
_PLACEHOLDER = 0x7FFF0000


@dataclass(frozen=True)
class AudioInfo:
    """What a header says. frames : samples of one channel at ``sample_rate`` Hz."""

    frames: int
    sample_rate: int
    channels: int

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.frames / self.sample_rate


def is_audio_name(name: str) -> bool:
    """Whether a file of this name is a recording by its ending; hidden files (macOS's ``._a.wav``) are not.

    >>> [is_audio_name(n) for n in ("a.WAV", "._a.wav", "a.txt")]
    [True, False, False]
    """
    name = os.path.basename(name)
    return not name.startswith(".") and name.lower().endswith(AUDIO_SUFFIXES)


def find_audio(root: str | os.PathLike[str]) -> list[Path]:
    """All recordings below ``root``, sorted; links to folders are followed once, hidden files and folders left out.

    Folders that cannot be entered are left out with a warning. Raises NotADirectoryError if ``root`` is no folder.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("b.flac", "a.wav", "._a.wav", "a.txt"):
    ...     (folder / name).touch()
    >>> [p.name for p in find_audio(folder)]
    ['a.wav', 'b.flac']
    """
    return sorted(Path(root) / name for name in find_names(root))


def find_names(root: str | os.PathLike[str], suffixes: tuple[str, ...] = AUDIO_SUFFIXES) -> list[str]:
    """As :func:`find_audio`, but the names below ``root``, with ``/`` on every system and sorted as text.

    suffixes : endings in lower case, for instance ``AUDIO_SUFFIXES + OTHER_SUFFIXES``

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "ann").mkdir()
    >>> for name in ("ann/1.wav", "ann/2.m4a"):
    ...     (folder / name).touch()
    >>> find_names(folder), find_names(folder, OTHER_SUFFIXES)
    (['ann/1.wav'], ['ann/2.m4a'])
    """
    if not Path(root).is_dir():
        raise NotADirectoryError(f"{root}: got no folder, expected one with recordings in it")
    names, stack, seen = [], [""], set()
    while stack:
        below = stack.pop()
        folder = os.path.join(root, below) if below else os.fspath(root)
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            logger.warning("%s: folder is left out: %s", folder, error)
            continue
        folders = []
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(name)
            elif entry.name.lower().endswith(suffixes):
                names.append(name)
        stack.extend(reversed(folders))  # of two links to one folder, the first by name is kept
    return sorted(names)


def probe(path: str | os.PathLike[str]) -> AudioInfo:
    """Length, rate and channels by the header, without decoding.

    Raises BadAudio if the file cannot be opened, is cut off (where the header tells), is empty, or claims a rate
    outside 4 to 192 kHz.

    >>> import tempfile
    >>> probe(write_audio(Path(tempfile.mkdtemp()) / "a.wav", np.zeros(8000)))
    AudioInfo(frames=8000, sample_rate=16000, channels=1)
    """
    with _opened(path) as file:
        return AudioInfo(file.frames, file.samplerate, file.channels)


def read_audio(
    path: str | os.PathLike[str], start: int = 0, samples: int | None = None, *, sample_rate: int | None = SAMPLE_RATE
) -> tuple[np.ndarray, int]:
    """Samples of one recording: several channels are averaged, other rates resampled by soxr (HQ).

    Parameters
    ----------
    path : any file that libsndfile reads
    start, samples : the piece to decode, counted at the file's own rate; None: to the end
    sample_rate : Hz of the result; None keeps the file's

    Returns
    -------
    wav : (samples,) float32, and its sample rate in Hz

    Raises
    ------
    BadAudio
        As :func:`probe` does; also if the file ends before the piece does, or holds values that are not finite.

    >>> import tempfile
    >>> path = write_audio(Path(tempfile.mkdtemp()) / "a.wav", np.arange(8) / 8)
    >>> read_audio(path, 4, 2)
    (array([0.5  , 0.625], dtype=float32), 16000)
    """
    with _opened(path) as file:
        expected = file.frames - start if samples is None else samples
        if expected < 0 or start + expected > file.frames:
            raise DamagedAudio(
                f"{path}: got {file.frames} samples, expected at least {start + max(expected, 0)}; the file was cut "
                "off or the piece lies behind its end"
            )
        try:
            if start:
                file.seek(start)
            wav = file.read(-1 if samples is None else samples, dtype="float32", always_2d=True)
        except (RuntimeError, OSError) as error:  # soundfile's own errors are RuntimeErrors
            raise BadAudio(f"{path}: cannot be decoded ({_reason(error)}); copy or extract the file again") from error
        rate = int(file.samplerate)
        # The header of an mp3 without a table is an estimate; everywhere else it is a promise.
        if len(wav) < expected and (samples is not None or file.format != "MP3" or len(wav) < 0.9 * expected):
            raise DamagedAudio(
                f"{path}: got {len(wav)} samples from {start} on, expected {expected}; the file was cut off, copy or "
                "extract it again"
            )
    mono = wav[:, 0] if wav.shape[1] == 1 else wav.mean(axis=1)
    # One sum instead of an array of flags: any inf or nan survives it.
    if not np.isfinite(mono.sum(dtype=np.float64)):
        raise DamagedAudio(f"{path}: got values that are not finite, expected samples in +-1; export the file again")
    if sample_rate is not None:
        mono, rate = resample(mono, rate, sample_rate), sample_rate
    return np.ascontiguousarray(mono, dtype=np.float32), rate


def resample(wav: np.ndarray, rate: float, new_rate: float) -> np.ndarray:
    """Change the sample rate of ``wav`` (samples,) from ``rate`` to ``new_rate``, with soxr.

    >>> resample(np.zeros(800, dtype=np.float32), 8000, 16000).shape
    (1600,)
    """
    if rate == new_rate:
        return wav
    import soxr

    return soxr.resample(wav, rate, new_rate, "HQ").astype(np.float32, copy=False)


def write_audio(path: str | os.PathLike[str], wav: np.ndarray, sample_rate: int = SAMPLE_RATE) -> Path:
    """Write (samples,) in +-1 as 16-bit mono, whole or not at all; the format follows the ending (.wav, .flac)."""
    import soundfile

    clipped = np.clip(wav, -1.0, 1.0)
    return write_whole(path, lambda beside: soundfile.write(str(beside), clipped, sample_rate, subtype="PCM_16"))


def _opened(path: str | os.PathLike[str]) -> soundfile.SoundFile:
    """The open file, after all that its header can tell was checked."""
    import soundfile

    try:
        file = soundfile.SoundFile(os.fspath(path))
    except (RuntimeError, OSError) as error:
        raise BadAudio(f"{path}: cannot be read as audio ({_reason(error)}); expected {_kinds()}") from error
    problem = _problem(file, path)
    if problem:
        file.close()
        raise problem
    return file


def _problem(file: soundfile.SoundFile, path: str | os.PathLike[str]) -> BadAudio | None:
    if not _LOWEST_RATE <= file.samplerate <= _HIGHEST_RATE:
        return BadAudio(
            f"{path}: got a sample rate of {file.samplerate} Hz, expected {_LOWEST_RATE} to {_HIGHEST_RATE}; the "
            "header is wrong, export the file again"
        )
    for declared, there in _SHORT.findall(file.extra_info):
        if int(there) < int(declared) < _PLACEHOLDER:
            return DamagedAudio(
                f"{path}: got {there} bytes of samples, expected {declared}; the file was cut off, copy it again"
            )
    if file.format == "NIST" and (promised := _nist_samples(path)) is not None and file.frames < promised:
        return DamagedAudio(
            f"{path}: got {file.frames} samples, expected {promised}; the file was cut off, copy it again"
        )
    if file.frames <= 0:
        return DamagedAudio(f"{path}: holds no samples; copy or extract the file again")
    return None


def _nist_samples(path: str | os.PathLike[str]) -> int | None:
    with open(path, "rb") as stream:
        found = re.search(rb"sample_count -i (\d+)", stream.read(1024))
    return int(found.group(1)) if found else None


def _reason(error: BaseException) -> str:
    return str(error).rstrip(".") or type(error).__name__


def _kinds() -> str:
    return f"a whole file of a kind that libsndfile knows ({', '.join(AUDIO_SUFFIXES)})"
