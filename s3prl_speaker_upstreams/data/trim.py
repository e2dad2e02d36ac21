"""Where the speech of a recording is, by energy."""

from __future__ import annotations

import numpy as np

__all__ = ["speech_span"]

FRAME, MARGIN = 0.025, 0.1
"""Seconds: of a frame whose energy is looked at; of what is kept before and after the speech."""


def speech_span(wav: np.ndarray, rate: int, below: float) -> tuple[int, int]:
    """First and one past the last sample of the speech in ``wav`` (samples,).

    That is from the first to the last 25 ms frame less than ``below`` dB under the loudest one, and 0.1 s more on both
    sides.

    >>> quiet, loud = np.full(16000, 1e-5), np.tile([0.1, -0.1], 8000)
    >>> speech_span(np.concatenate([quiet, loud, quiet]), 16000, 35.0)
    (14400, 33600)
    """
    size = int(FRAME * rate)
    count = len(wav) // size
    if not count:
        return 0, len(wav)
    level = 10 * np.log10(np.square(wav[: count * size], dtype=np.float64).reshape(count, size).mean(1) + 1e-12)
    loud = np.flatnonzero(level > level.max() - below)
    margin = int(MARGIN * rate)
    return max(0, int(loud[0]) * size - margin), min(len(wav), (int(loud[-1]) + 1) * size + margin)
