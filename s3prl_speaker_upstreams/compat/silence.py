"""The ``silence`` effect of the sox program, sample for sample.

sox decides on a running root mean square over 20 ms, kept as a sum in double precision to which the newest square is
added and from which the oldest is taken. That order of additions decides samples at the threshold, so it is kept here:
numpy's ``cumsum`` over the alternating terms adds them one after the other just as sox does. Channels share one window,
which holds their samples in turn: at each moment every channel's newest square takes the place of the same oldest one.
There is sound where any channel is above the threshold, and silence where not all of them are.

Behaviour: sox manual, section ``silence``; checked against SoX 14.4.2 sample by sample
(tests/compat/test_sox_effects.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Period", "trim_silence"]

_SAMPLE_MAX = 2**31 - 1
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Period:
    """One half of the effect's arguments.

    periods : how many stretches to find (0: this half is off)
    duration : samples that a stretch must last
    threshold, unit : level above which there is sound, "%" of full scale or "d" decibels below it
    """

    periods: int
    duration: int
    threshold: float
    unit: str


class _Levels:
    """The running level from one reset of the window on, (moments, channels), computed block by block as it is asked
    for."""

    def __init__(self, samples: np.ndarray, start: int, window: int, mask: int) -> None:
        self.length, self.channels = len(samples) - start, samples.shape[1]
        self.squares = samples[start:].astype(np.float64).reshape(-1) ** 2  # the channels in turn
        self.window, self.mask = window * self.channels, mask
        self.ratio = np.empty((0, self.channels))  # level as a fraction of full scale, known so far
        self._sum = 0.0

    def upto(self, end: int) -> np.ndarray:
        """Levels of the first ``end`` moments."""
        end = min(end, self.length)
        while len(self.ratio) < end:
            first = len(self.ratio) * self.channels
            last = min(first + _BLOCK * self.channels, len(self.squares))
            leaving = np.zeros(last - first)
            known = max(first, self.window)
            if last > known:
                leaving[known - first :] = self.squares[known - self.window : last - self.window]
            terms = np.empty(2 * (last - first) + 1)
            terms[0] = self._sum
            terms[1::2] = -leaving
            terms[2::2] = self.squares[first:last]
            sums = np.cumsum(terms)[:: 2 * self.channels]  # after all channels of each moment
            rows = leaving.reshape(-1, self.channels)[:, :1]
            newest = sums[:-1, None] - rows + self.squares[first:last].reshape(-1, self.channels)
            self._sum = sums[-1]
            # sox holds the level in a 32-bit sample: rounded towards zero, low bits below the input's precision cut off
            level = np.sqrt(np.maximum(newest, 0.0) / self.window).astype(np.int64) & self.mask
            self.ratio = np.concatenate([self.ratio, level / _SAMPLE_MAX])
        return self.ratio[:end]


def _above(ratio: np.ndarray, half: Period) -> np.ndarray:
    if half.unit == "%":
        return ratio * 100 > half.threshold
    with np.errstate(divide="ignore"):
        return 20 * np.log10(ratio) > half.threshold


def _first_run(flags: np.ndarray, length: int) -> int:
    """Index behind the first `length` consecutive true flags, or -1."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    starts, ends = edges[::2], edges[1::2]
    long = np.flatnonzero(ends - starts >= max(length, 1))
    return int(starts[long[0]]) + max(length, 1) if len(long) else -1


def _search(levels: _Levels, begin: int, half: Period, wanted: bool) -> int:
    """Index behind the first ``half.duration`` samples in a row, from `begin` on, (not) above the threshold."""
    total = levels.length
    reach = begin + half.duration + _BLOCK // 4
    while True:
        above = _above(levels.upto(reach)[begin:], half)
        flags = np.asarray(above.any(axis=1) if wanted else above.all(axis=1))
        found = _first_run(flags if wanted else ~flags, half.duration)
        if found >= 0:
            return begin + found
        if reach >= total:
            return -1
        reach += max(reach - begin, _BLOCK // 4)


def trim_silence(
    samples: np.ndarray, rate: float, start: Period, stop: Period, *, restart: bool, precision: int = 32
) -> np.ndarray:
    """Trim silence as ``sox ... silence`` does.

    samples : (time,) or (time, channels) int32, sox's internal full-scale integers
    start : sound to wait for before anything is kept
    stop : silence that ends keeping; with `restart`, waiting for sound begins again (negative count in sox's arguments)
    precision : significant bits of the samples (what sox's effect chain reports)

    >>> import numpy as np
    >>> quiet, loud = np.zeros(800, np.int32), np.full(800, 2**30, np.int32)
    >>> half = Period(1, 160, 0.1, "%")
    >>> len(trim_silence(np.concatenate([quiet, loud, quiet]), 16000, half, half, restart=True)) < 1400
    True
    """
    samples = np.asarray(samples)
    if samples.ndim == 1:
        return trim_silence(samples[:, None], rate, start, stop, restart=restart, precision=precision)[:, 0]
    window = int(rate / 50)
    mask = -1 << max(0, 32 - precision)
    kept: list[np.ndarray] = []
    reset, total = 0, len(samples)
    while reset < total:
        levels = _Levels(samples, reset, window, mask)
        position = 0  # counted from the reset
        for _ in range(start.periods):
            position = _search(levels, position, start, True)
            if position < 0:
                break
        if position < 0:
            break
        # the sound that was waited for is kept from its first sample
        begin = reset + position - (max(start.duration, 1) if start.periods else 0)
        if not stop.periods:
            kept.append(samples[begin:])
            break
        found = position
        for _ in range(stop.periods):
            found = _search(levels, found, stop, False)
            if found < 0:
                break
        if found < 0:
            kept.append(samples[begin:])
            break
        kept.append(samples[begin : reset + found - max(stop.duration, 1)])
        if not restart:
            break
        reset += found
    return np.concatenate(kept) if kept else samples[:0]
