"""Reading and writing the recordings of small corpora: mono, 16 kHz, whole files or none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import soundfile
import soxr

from s3prl_speaker_upstreams.superb.errors import CorpusError

__all__ = ["SAMPLE_RATE", "read_audio", "write_audio", "write_text"]

SAMPLE_RATE = 16000


def read_audio(path: str | os.PathLike[str], sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """One recording as mono samples, resampled to `sample_rate` where it has another one.

    Parameters
    ----------
    path : any file that soundfile reads (wav, flac, ogg, ...)
    sample_rate : Hz of the result

    Returns
    -------
    (samples,) float32 in +-1; several channels are averaged

    Raises
    ------
    CorpusError if the file is missing, damaged or empty.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> _ = write_audio(folder + "/a.wav", np.zeros(800), sample_rate=8000)
    >>> read_audio(folder + "/a.wav").shape
    (1600,)
    """
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (RuntimeError, OSError) as error:  # soundfile.LibsndfileError is a RuntimeError
        raise CorpusError(f"{path}: cannot be read as audio ({error}); copy or extract the file again") from error
    mono = samples.mean(axis=1)
    if not len(mono):
        raise CorpusError(f"{path}: holds no samples; copy or extract the file again")
    if rate != sample_rate:
        mono = soxr.resample(mono, rate, sample_rate, quality="HQ")
    return np.ascontiguousarray(mono, dtype=np.float32)


def write_audio(path: str | os.PathLike[str], samples: np.ndarray, sample_rate: int = SAMPLE_RATE) -> Path:
    """Write (samples,) in +-1 as 16-bit mono; the format follows the suffix (.wav or .flac).

    The file is written beside and renamed, so a killed process leaves no half a recording.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    soundfile.write(str(beside), np.clip(samples, -1.0, 1.0), sample_rate, subtype="PCM_16")
    os.replace(beside, path)
    return path


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
    return path
