"""Recordings: which files are some, what their headers say, and reading them as mono float32 at 16 kHz.

The same rule as `s3prl_speaker_upstreams.common.audio`, kept here so that this package works alone; a test holds both
alike. A recording that cannot be decoded, that is shorter than its header promises, or whose header claims a sample
rate outside 4 to 192 kHz is unusable: it is named and counted, never used.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch

from cka_addon.errors import AudioError
from cka_addon.listing import Listed, read_list

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16000
EXTENSIONS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64", ".caf", ".sph")
LOWEST_RATE, HIGHEST_RATE = 4000, 192000

# What libsndfile notes where a chunk is larger than the rest of the file. Programs that write to a pipe cannot know
# the length and put a placeholder of about 2 or 4 GiB there: such a file is whole.
_SHORT = re.compile(r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE)
_PLACEHOLDER = 0x7FFF0000


@dataclass(frozen=True)
class Recording:
    """One recording.

    id : unique name, path : file, seconds : length by its header (None where it cannot be used), problem : why not
    speaker : who speaks, where a list says so
    """

    id: str
    path: Path
    seconds: float | None = None
    problem: str | None = None
    speaker: str | None = None


class About(TypedDict):
    """What was read: seconds at 16 kHz, the file's rate and channels, and the start of the samples' SHA-256."""

    seconds: float
    sample_rate: int
    channels: int
    resampled: bool
    samples_sha256: str


def find_recordings(source: str | Path | Sequence, *, limit: int | None = None) -> list[Recording]:
    """Recordings of a folder, a list file or a Python list, sorted by id, with lengths read from the headers.

    source : a folder (searched through, ids are paths below it without the ending); a list file (see `listing`); or a
        list of paths
    limit : keep only the first so many
    Raises AudioError where nothing is found, a listed file is missing or two recordings share an id.
    """
    return [_probe(item) for item in list_recordings(source)[:limit]]


def list_paths(source: str | Path | Sequence) -> list[tuple[str, Path]]:
    """(id, path) of the recordings of `find_recordings`, sorted by id, without opening them."""
    return [(item.id, item.path) for item in list_recordings(source)]


def list_recordings(source: str | Path | Sequence) -> list[Listed]:
    """What `find_recordings` finds, sorted by id, without opening the files."""
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.is_dir():
            found = [Listed(p.relative_to(path).with_suffix("").as_posix(), p) for p in find_audio(path)]
            if not found:
                raise AudioError(f"{path}: no recording found; expected files ending in {', '.join(EXTENSIONS)}")
        elif is_audio_name(path.name) and path.is_file():
            found = [Listed(path.stem, path)]
        elif path.is_file():
            found = read_list(path, EXTENSIONS)
        else:
            raise AudioError(f"{path}: does not exist; expected a folder of recordings or a list of paths")
    else:
        found = [Listed(Path(p).with_suffix("").as_posix(), Path(p)) for p in source]
        if not found:
            raise AudioError("got an empty list of recordings; expected at least one path")
    seen: dict[str, Path] = {}
    for item in found:
        if item.id in seen:
            raise AudioError(
                f"two recordings are called '{item.id}': {seen[item.id]} and {item.path}; "
                "give ids in a list file (id <tab> path)"
            )
        seen[item.id] = item.path
    return sorted(found, key=lambda item: item.id)


def is_audio_name(name: str) -> bool:
    """Whether a file of this name is a recording by its ending; hidden files (macOS's ``._a.wav``) are not.

    >>> [is_audio_name(n) for n in ("a.WAV", "._a.wav", "a.txt")]
    [True, False, False]
    """
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def find_audio(root: str | Path) -> list[Path]:
    """All recordings below `root`, sorted; links to folders are followed once, hidden files and folders left out."""
    return sorted(_walk(Path(root), set()))


def _walk(folder: Path, seen: set[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in seen:  # a link that leads back up
        return
    seen.add(real)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        logger.warning("%s: folder is left out: %s", folder, error)
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(folder / entry.name, seen)
        elif is_audio_name(entry.name):
            yield folder / entry.name


def _probe(item: Listed) -> Recording:
    import soundfile

    try:
        with soundfile.SoundFile(str(item.path)) as file:
            problem = _problem(file, item.path)
            seconds = file.frames / file.samplerate if problem is None else None
    except (RuntimeError, OSError) as error:
        problem, seconds = f"{type(error).__name__}: {error}", None
    return Recording(item.id, item.path, seconds, problem, item.speaker)


def _problem(file, path: Path) -> str | None:
    """What an open soundfile.SoundFile's header tells against it."""
    if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
        return f"got a sample rate of {file.samplerate} Hz, expected {LOWEST_RATE} to {HIGHEST_RATE}: a wrong header"
    for declared, there in _SHORT.findall(file.extra_info):
        if int(there) < int(declared) < _PLACEHOLDER:
            return f"got {there} bytes of samples, expected {declared}: the file was cut off"
    if file.format == "NIST":
        with open(path, "rb") as stream:
            promised = re.search(rb"sample_count -i (\d+)", stream.read(1024))
        if promised and file.frames < int(promised.group(1)):
            return f"got {file.frames} samples, expected {int(promised.group(1))}: the file was cut off"
    return "the file holds no samples" if file.frames <= 0 else None


def load(recording: Recording) -> tuple[torch.Tensor, About]:
    """Samples of one recording and what was done to them.

    Returns (samples,) float32 at 16 kHz in +-1, and `About`. Other rates are resampled by soxr (HQ), channels are
    averaged. Raises AudioError where the file cannot be read, is cut off or is empty.
    """
    import soundfile

    path = recording.path
    if recording.problem:
        raise AudioError(f"{path}: {recording.problem}")
    try:
        with soundfile.SoundFile(str(path)) as file:
            if problem := _problem(file, path):
                raise AudioError(f"{path}: {problem}")
            samples = file.read(dtype="float32", always_2d=True)
            rate, expected, kind = int(file.samplerate), file.frames, file.format
    except (RuntimeError, OSError) as error:
        raise AudioError(f"{path}: cannot be read ({error}); expected an audio file soundfile can open") from error
    # The header of an mp3 without a table is an estimate; everywhere else it is a promise.
    if len(samples) < expected and (kind != "MP3" or len(samples) < 0.9 * expected):
        raise AudioError(f"{path}: got {len(samples)} samples, expected {expected}: the file was cut off")
    channels = samples.shape[1]
    mono = samples[:, 0] if channels == 1 else samples.mean(axis=1)
    if not np.isfinite(mono.sum(dtype=np.float64)):
        raise AudioError(f"{path}: holds NaN or infinite samples; expected finite ones")
    digest = hashlib.sha256(np.ascontiguousarray(samples).data).hexdigest()[:16]
    if rate != SAMPLE_RATE:
        import soxr

        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    about: About = {
        "seconds": mono.size / SAMPLE_RATE,
        "sample_rate": rate,
        "channels": channels,
        "resampled": rate != SAMPLE_RATE,
        "samples_sha256": digest,
    }
    return torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32)), about
