"""Reading pieces of sound files, changing their rate, and a cache with a limit in bytes.

Waveforms are one-dimensional float32 arrays in +-1; of several channels the first one is taken.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Hashable

import numpy as np

from s3prl_speaker_upstreams.errors import BadWaveform

__all__ = ["ByteCache", "read_piece", "read_wav", "resample"]


def read_piece(path: str | os.PathLike, start: int = 0, samples: int | None = None) -> tuple[np.ndarray, int]:
    """Decode ``samples`` samples from ``start`` on, seeking instead of reading what comes before.

    Parameters
    ----------
    path : path of a wav, flac or ogg file
    start : int
        First sample, counted at the file's own rate.
    samples : int, optional
        How many; None: to the end.

    Returns
    -------
    wav : (samples,) float32, and the file's sample rate in Hz

    Raises
    ------
    OSError
        If the file cannot be opened or decoded.
    BadWaveform
        If the file ends early or holds non-finite values.

    >>> import soundfile, tempfile
    >>> name = tempfile.mkstemp(suffix=".wav")[1]
    >>> soundfile.write(name, np.arange(8) / 8, 16000)
    >>> read_piece(name, 4, 2)
    (array([0.5  , 0.625], dtype=float32), 16000)
    """
    import soundfile

    try:
        with soundfile.SoundFile(os.fspath(path)) as file:
            if samples is not None and start + samples > file.frames:
                raise BadWaveform(
                    f"{path}: got {file.frames} samples, expected at least {start + samples}; the file was cut off"
                )
            if start:
                file.seek(start)
            wav = file.read(-1 if samples is None else samples, dtype="float32", always_2d=True)[:, 0]
            rate = int(file.samplerate)
    except (RuntimeError, OSError) as problem:  # soundfile's own errors are RuntimeErrors
        raise OSError(f"{path}: cannot be read: {problem}") from problem
    if samples is not None and len(wav) < samples:  # the header promised more than there is
        raise BadWaveform(f"{path}: got {len(wav)} samples from {start} on, expected {samples}; the file was cut off")
    # One sum instead of an array of flags: any inf or nan survives it.
    if not np.isfinite(wav.sum(dtype=np.float64)):
        raise BadWaveform(f"{path}: holds values that are not finite")
    return np.ascontiguousarray(wav), rate


def resample(wav: np.ndarray, rate: float, new_rate: float) -> np.ndarray:
    """Change the sample rate of ``wav`` (samples,) from ``rate`` to ``new_rate``, with soxr.

    >>> resample(np.zeros(800, dtype=np.float32), 8000, 16000).shape
    (1600,)
    """
    if rate == new_rate:
        return wav
    import soxr

    return soxr.resample(wav, rate, new_rate, "HQ").astype(np.float32, copy=False)


def read_wav(path: str | os.PathLike, sample_rate: int = 16000) -> np.ndarray:
    """Whole recording at ``sample_rate``: (samples,) float32. Raises as :func:`read_piece` does.

    >>> import soundfile, tempfile
    >>> name = tempfile.mkstemp(suffix=".wav")[1]
    >>> soundfile.write(name, np.zeros(4000), 8000)
    >>> read_wav(name).shape
    (8000,)
    """
    wav, rate = read_piece(path)
    return resample(wav, rate, sample_rate)


class ByteCache:
    """Arrays by key, the least recently used dropped once they exceed ``max_bytes``.

    >>> cache = ByteCache(100)
    >>> cache.put("a", np.zeros(20, dtype=np.float32)); cache.put("b", np.zeros(10, dtype=np.float32))
    >>> cache.get("a") is None, cache.get("b").shape
    (True, (10,))
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = int(max_bytes)
        self.bytes = 0
        self._items: OrderedDict[Hashable, np.ndarray] = OrderedDict()

    def get(self, key: Hashable) -> np.ndarray | None:
        """The array of ``key``, or None."""
        item = self._items.get(key)
        if item is not None:
            self._items.move_to_end(key)
        return item

    def put(self, key: Hashable, item: np.ndarray) -> None:
        """Keep ``item``; one larger than the whole cache is not kept."""
        if item.nbytes > self.max_bytes:
            return
        old = self._items.pop(key, None)
        self.bytes += item.nbytes - (0 if old is None else old.nbytes)
        self._items[key] = item
        while self.bytes > self.max_bytes:
            _, dropped = self._items.popitem(last=False)
            self.bytes -= dropped.nbytes

    def __len__(self) -> int:
        return len(self._items)
