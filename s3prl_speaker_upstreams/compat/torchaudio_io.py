"""What torchaudio 2.9 took from its top level: ``load``, ``save``, ``info``, ``set_audio_backend``, through soundfile.

Same arguments, same tensors as torchaudio 2.5 gave: of a path, those of its sox backend (floating-point samples are
clipped to +-1, mp3 keeps the encoder's delay, ``normalize=False`` gives every format's own integers); of a file object,
those of its soundfile backend, which does none of that. Every other name is
torchaudio's own, so that this module can stand for ``torchaudio`` as a whole where a joblib child process gets its
functions by reference (``s3prl.util.audio_info``).

>>> import torch, tempfile, os
>>> path = os.path.join(tempfile.mkdtemp(), "a.wav")
>>> save(path, torch.zeros(1, 160), 16000)
>>> wav, rate = load(path)
>>> tuple(wav.shape), rate, info(path).num_frames
((1, 160), 16000, 160)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch

from s3prl_speaker_upstreams.compat import sox_program
from s3prl_speaker_upstreams.compat._errors import AudioUnreadable, UnsupportedAudioOption
from s3prl_speaker_upstreams.errors import MissingPackage

__all__ = ["AudioMetaData", "info", "load", "save", "set_audio_backend"]

Source = str | os.PathLike | BinaryIO

_BACKENDS = (None, "sox", "sox_io", "soundfile", "ffmpeg")

# soundfile's subtype -> (torchaudio's name of the encoding, bits per sample)
_ENCODINGS = {
    "PCM_S8": ("PCM_S", 8),
    "PCM_U8": ("PCM_U", 8),
    "PCM_16": ("PCM_S", 16),
    "PCM_24": ("PCM_S", 24),
    "PCM_32": ("PCM_S", 32),
    "FLOAT": ("PCM_F", 32),
    "DOUBLE": ("PCM_F", 64),
    "ULAW": ("ULAW", 8),
    "ALAW": ("ALAW", 8),
    "VORBIS": ("VORBIS", 0),
    "OPUS": ("OPUS", 0),
    "MPEG_LAYER_III": ("MP3", 0),
}
# what normalize=False gives for a WAV file object; everything else was and is float32
_NATIVE_DTYPES = {"PCM_16": "int16", "PCM_32": "int32", "FLOAT": "float32", "DOUBLE": "float64"}
# what it gives for a path, of whatever format but FLAC
_SOX_DTYPES = {"PCM_U8": "uint8", "PCM_16": "int16", "PCM_24": "int32", "PCM_32": "int32"}


def _soundfile() -> Any:
    try:
        import soundfile
    except ImportError as error:
        raise MissingPackage(
            "reading audio: got no soundfile package; this torchaudio has no reader of its own; pip install soundfile"
        ) from error
    return soundfile


def _is_path(source: Source) -> bool:
    return isinstance(source, str) or hasattr(source, "__fspath__")


def _open(source: Source) -> Any:
    soundfile = _soundfile()
    try:
        return soundfile.SoundFile(source, "r")
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        name: Any = source if _is_path(source) else type(source).__name__
        if _is_path(source):
            if not os.path.exists(name):
                raise AudioUnreadable(f"{name}: no such file; check the corpus root in the configuration") from error
            raise AudioUnreadable(
                f"{name}: got {os.path.getsize(name)} bytes that are not audio which soundfile can read ({error}); "
                "expected wav, flac, ogg or mp3; fetch the file again"
            ) from error
        raise AudioUnreadable(f"{name}: not audio that soundfile can read ({error})") from error


def set_audio_backend(backend: str | None = None) -> None:
    """Accept the names that torchaudio knew; there is one reader now, so nothing changes.

    Raises UnsupportedAudioOption for a name that torchaudio never had.
    """
    if backend not in _BACKENDS:
        raise UnsupportedAudioOption(f"set_audio_backend: got {backend!r}; expected one of {_BACKENDS}")


def load(
    uri: Source,
    frame_offset: int = 0,
    num_frames: int = -1,
    normalize: bool = True,
    channels_first: bool = True,
    format: str | None = None,
    buffer_size: int = 4096,
    backend: str | None = None,
) -> tuple[torch.Tensor, int]:
    """Read audio.

    frame_offset, num_frames : samples to skip, samples to read (-1: all that are left)
    normalize : float32 in +-1; if False, integers keep their type (uint8, int16, int32; 24 bits in the upper part of
        int32), of a file object only those of WAV
    format, buffer_size : accepted; the format is told from the content
    backend : "soundfile" reads a path as that backend of torchaudio did; all others as its sox backend did
    Returns ``(channels, samples)`` (or ``(samples, channels)``), samples per second.
    Raises AudioUnreadable, UnsupportedAudioOption.
    """
    if backend not in _BACKENDS:
        raise UnsupportedAudioOption(f"torchaudio.load: got backend={backend!r}; expected one of {_BACKENDS}")
    if frame_offset < 0 or num_frames < -1:
        raise UnsupportedAudioOption(
            f"torchaudio.load: got frame_offset={frame_offset}, num_frames={num_frames}; "
            "expected an offset of 0 or more, and -1 (all) or a positive number of frames"
        )
    is_path = backend != "soundfile" and _is_path(uri)
    with _open(uri) as file:
        rate = file.samplerate
        through_sox = is_path and _is_mp3(file)
        dtype = "float32" if normalize else _dtype(uri, file, is_path)
        if not through_sox:
            samples = _read(uri, file, frame_offset, num_frames, "int16" if dtype == "uint8" else dtype)
            if is_path and file.subtype in ("FLOAT", "DOUBLE"):
                np.clip(samples, -1, 1, out=samples)
    if dtype == "uint8":  # soundfile reads no unsigned samples: theirs are in the upper half
        samples = ((samples >> 8) + 128).astype(np.uint8)
    if through_sox:
        stop = None if num_frames < 0 else frame_offset + num_frames
        samples = _mp3(uri)[frame_offset:stop]
    wav = torch.from_numpy(samples)
    return (wav.t() if channels_first else wav), rate


def _dtype(uri: Source, file: Any, is_path: bool) -> str:
    """What ``normalize=False`` gives."""
    if is_path:
        return "float32" if file.format == "FLAC" else _SOX_DTYPES.get(file.subtype, "float32")
    if file.format not in ("WAV", "WAVEX"):
        return "float32"
    if file.subtype not in _NATIVE_DTYPES:
        raise UnsupportedAudioOption(
            f"torchaudio.load({uri!r}, normalize=False): got {file.subtype}; expected one of {sorted(_NATIVE_DTYPES)}; "
            "use normalize=True"
        )
    return _NATIVE_DTYPES[file.subtype]


def _read(uri: Source, file: Any, offset: int, count: int, dtype: str) -> np.ndarray:
    """(frames, channels)"""
    if offset >= file.frames:
        return np.zeros((0, file.channels), dtype=dtype)
    try:
        file.seek(offset)
        return file.read(frames=count, dtype=dtype, always_2d=True)
    except _soundfile().LibsndfileError as error:
        raise AudioUnreadable(f"{uri}: damaged or truncated audio ({error}); fetch the file again") from error


def _is_mp3(file: Any) -> bool:
    """Whether sox is to read it: soundfile takes the encoder's delay away, libsox did not."""
    return file.subtype.startswith("MPEG") and sox_program.find() is not None


def _mp3(path: Any) -> np.ndarray:
    """(frames, channels) of an mp3 file, as libsox reads it; as soundfile does where sox was built without mp3."""
    program = sox_program.find()
    assert program is not None
    done = sox_program.call(program, ["--no-glob", os.path.abspath(path)])
    if done.returncode != 0 and b"no handler for" in done.stderr:
        with _open(path) as file:
            return _read(path, file, 0, -1, "float32")
    return sox_program.result(done, str(path))[0]


@dataclass
class AudioMetaData:
    """The five fields of torchaudio's own class, in its order."""

    sample_rate: int
    num_frames: int
    num_channels: int
    bits_per_sample: int
    encoding: str


def info(uri: Source, format: str | None = None, buffer_size: int = 4096, backend: str | None = None) -> AudioMetaData:
    """Sample rate, frames, channels, bits and encoding of an audio file, without decoding it (mp3 by path is decoded).

    Raises AudioUnreadable.
    """
    if backend not in _BACKENDS:
        raise UnsupportedAudioOption(f"torchaudio.info: got backend={backend!r}; expected one of {_BACKENDS}")
    with _open(uri) as file:
        encoding, bits = _ENCODINGS.get(file.subtype, ("UNKNOWN", 0))
        if file.format == "FLAC":
            encoding = "FLAC"
        frames = file.frames
        if backend != "soundfile" and _is_path(uri) and _is_mp3(file):
            frames = len(_mp3(uri))
        return AudioMetaData(file.samplerate, frames, file.channels, bits, encoding)


_SUBTYPES = {
    ("PCM_S", 16): "PCM_16",
    ("PCM_S", 24): "PCM_24",
    ("PCM_S", 32): "PCM_32",
    ("PCM_U", 8): "PCM_U8",
    ("PCM_F", 32): "FLOAT",
    ("PCM_F", 64): "DOUBLE",
    ("ULAW", 8): "ULAW",
    ("ALAW", 8): "ALAW",
}
_DTYPE_SUBTYPES = {
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
    torch.int16: "PCM_16",
    torch.int32: "PCM_32",
    torch.uint8: "PCM_U8",
}


def save(
    uri: Source,
    src: torch.Tensor,
    sample_rate: int,
    channels_first: bool = True,
    format: str | None = None,
    encoding: str | None = None,
    bits_per_sample: int | None = None,
    buffer_size: int = 4096,
    backend: str | None = None,
    compression: float | int | None = None,
) -> None:
    """Write WAV or FLAC.

    src : (channels, samples), or (samples, channels) with ``channels_first=False``
    WAV keeps the tensor's type unless encoding (PCM_S, PCM_U, PCM_F, ULAW, ALAW) and bits are given; FLAC has 16 or 24.
    Raises UnsupportedAudioOption for other formats and for ``compression``.
    """
    kind = (format or os.path.splitext(str(uri))[1].lstrip(".")).lower()
    if kind not in ("wav", "flac") or compression is not None:
        raise UnsupportedAudioOption(
            f"torchaudio.save({uri!r}): got format {kind!r}, compression {compression}; expected wav or flac without"
        )
    if src.ndim != 2:
        raise UnsupportedAudioOption(f"torchaudio.save({uri!r}): got a {src.ndim}-D tensor; expected two dimensions")
    if kind == "flac":
        subtype = {None: "PCM_24", 16: "PCM_16", 24: "PCM_24"}.get(bits_per_sample) if encoding is None else None
    elif encoding is None and bits_per_sample is None:
        subtype = _DTYPE_SUBTYPES.get(src.dtype)
    else:
        encoding = encoding or ("PCM_U" if bits_per_sample == 8 else "PCM_S")
        bits = bits_per_sample or {"PCM_S": 16, "PCM_U": 8, "PCM_F": 32, "ULAW": 8, "ALAW": 8}.get(encoding, 0)
        subtype = _SUBTYPES.get((encoding, bits))
    if subtype is None:
        raise UnsupportedAudioOption(
            f"torchaudio.save({uri!r}): got {src.dtype}, encoding={encoding!r}, bits_per_sample={bits_per_sample}; "
            f"expected for wav one of {sorted(_SUBTYPES)}, for flac 16 or 24 bits"
        )
    samples = (src.t() if channels_first else src).detach().cpu().numpy()
    if samples.dtype == np.uint8:  # soundfile takes no unsigned samples; 8 bits in the upper half are the same
        samples = ((samples.astype(np.int16) - 128) << 8).astype(np.int16)
    _soundfile().write(uri, samples, int(sample_rate), subtype=subtype, format=kind.upper())


def __getattr__(name: str) -> Any:
    import torchaudio

    return getattr(torchaudio, name)
