"""Two models on different clocks: when a frame is, which frames are the same moment, and which frames are examples.

The centre of frame i is `first_center + i * shift` seconds: 12.5 ms + 20 ms i for a wav2vec 2.0-style CNN, 10 ms i for
a centred STFT, 12.5 ms + 10 ms i for an uncentred 25 ms window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cka_addon.errors import SpecError

ALIGNMENTS = ("nearest", "pool")
GRID = 0.02  # seconds between the instants that sampled frames are drawn from
GRID_START = 0.0125  # the first of them: the first frame centre of a wav2vec 2.0-style CNN


@dataclass(frozen=True)
class Clock:
    """Frame i is centred at first_center + i * shift.

    shift : seconds between frames, 0 for a model with one vector per utterance
    first_center : seconds;  source : how it is known

    >>> Clock(0.02, 0.0125).times(3)
    array([0.0125, 0.0325, 0.0525])
    """

    shift: float
    first_center: float
    source: str = "given"

    def times(self, frames: int) -> np.ndarray:
        """Centres of the first `frames` frames, (frames,) seconds."""
        return self.first_center + self.shift * np.arange(frames)

    def nearest(self, times: np.ndarray) -> np.ndarray:
        """Index of the frame nearest to each instant (the earlier one of two as near); may lie outside a recording."""
        if not self.shift:
            return np.zeros(len(times), np.int64)
        # The tolerance keeps ties stable against rounding.
        return np.ceil((times - self.first_center) / self.shift - 0.5 - 1e-6).astype(np.int64)


def reference_clock(clocks: Sequence[Clock]) -> int:
    """Index of the slowest clock (the first of equals): the one the others are brought to."""
    if not clocks:
        raise SpecError("no model was given; expected at least one")
    return max(range(len(clocks)), key=lambda i: (round(clocks[i].shift, 9), -i))


def align(frames: Sequence[int], clocks: Sequence[Clock], *, rule: str = "nearest") -> list[list[np.ndarray]]:
    """Frames of every model at the moments of the slowest model's frames.

    frames : number of frames of each model in this utterance
    Returns, per model, [first, last + 1] index arrays, both (moments,): the frames to take (their mean, where more than
    one). Moments for which a model has no frame are left out, so lengths that differ by a frame are no matter.

    >>> first, last = align([3, 7], [Clock(0.02, 0.0125), Clock(0.01, 0.0)])[1]
    >>> first.tolist(), last.tolist()
    ([1, 3, 5], [2, 4, 6])
    """
    if rule not in ALIGNMENTS:
        raise SpecError(f"got align={rule!r}; expected one of {', '.join(ALIGNMENTS)}")
    if any(not clock.shift for clock in clocks):
        raise SpecError("a model gives one vector per utterance; expected frames: compare utterance means instead")
    chosen = reference_clock(clocks)
    moments = clocks[chosen].times(frames[chosen])
    valid = np.ones(len(moments), bool)
    ranges = []
    for index, (count, clock) in enumerate(zip(frames, clocks, strict=True)):
        if index == chosen:
            first = np.arange(len(moments))
            last = first + 1
        else:
            first, last = frames_at(moments, clocks[chosen].shift, clock, rule=rule)
            valid &= (last > 0) & (first < count) & ((rule != "nearest") | (first >= 0))
            if rule != "nearest":
                first, last = np.clip(first, 0, None), np.clip(last, None, count)
        ranges.append([first, last])
    return [[first[valid], last[valid]] for first, last in ranges]


def frames_at(
    moments: np.ndarray, spacing: float, clock: Clock, *, rule: str = "nearest"
) -> tuple[np.ndarray, np.ndarray]:
    """First and last + 1 of the frames that belong to each of `moments`, which may lie outside a recording.

    moments : seconds, `spacing` seconds apart. "nearest": the frame nearest to the moment; "pool": all whose centres
        are within half a spacing of it, or the nearest where there is none

    >>> [x.tolist() for x in frames_at(np.array([0.0125, 0.0325]), 0.02, Clock(0.01, 0.0), rule="pool")]
    [[1, 3], [3, 5]]
    """
    near = clock.nearest(moments)
    if rule == "nearest":
        return near, near + 1
    first = np.ceil((moments - spacing / 2 - clock.first_center) / clock.shift - 1e-6).astype(np.int64)
    last = np.ceil((moments + spacing / 2 - clock.first_center) / clock.shift - 1e-6).astype(np.int64)
    # Slightly different clocks of one speed can leave a window empty: its nearest frame then.
    empty = last <= first
    return np.where(empty, near, first), np.where(empty, near + 1, last)


def take(x: Tensor, first: np.ndarray, last: np.ndarray) -> Tensor:
    """Mean of frames first..last - 1 for every moment. x : (frames, width) -> (moments, width)."""
    start = torch.from_numpy(first).to(x.device)
    longest = int((last - first).max()) if len(first) else 1
    if longest <= 1:
        if len(first) == len(x):
            return x
        return x[start]
    size = torch.from_numpy(last - first).to(x.device)
    total = x[start].clone()
    for step in range(1, longest):
        more = (size > step).nonzero().squeeze(1)
        total[more] += x[start[more] + step]
    return total / size.to(x.dtype)[:, None]


def describe(clocks: Sequence[Clock], rule: str) -> dict[str, object]:
    """The rule in words and numbers, for the provenance; the misfit is the most that a frame is off its moment."""
    chosen = reference_clock(clocks)
    reference = clocks[chosen]
    moments = reference.times(1000)
    misfit: list[float | None] = []
    for clock in clocks:
        if not clock.shift:
            misfit.append(None)
            continue
        index = np.maximum(clock.nearest(moments), 0)
        misfit.append(round(float(np.abs(clock.first_center + clock.shift * index - moments).max() * 1000), 4))
    return {
        "rule": f"{rule} frame by time"
        if rule == "nearest"
        else "mean of the frames within one reference shift, by time",
        "reference": chosen,
        "reference_shift_ms": reference.shift * 1000,
        "reference_first_center_ms": reference.first_center * 1000,
        "largest_misfit_ms": misfit,
    }


def sample_instants(utterance: str, seconds: float, count: int, seed: int) -> np.ndarray:
    """`count` random instants of an utterance, sorted, in seconds; the same for every model and every process.

    They are drawn without replacement from 12.5 ms + 20 ms j up to 12.5 ms before the end, so two stores of models with
    different clocks that were sampled with one seed hold the same moments. Shorter utterances give fewer.
    """
    # Plain frames of models with a 20 ms shift: (seconds - 25 ms) / 20 ms + 1 of them.
    available = max(1, int(np.floor((seconds - 2 * GRID_START) / GRID + 1e-6)) + 1)
    digest = hashlib.sha256(f"{seed}|{utterance}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    chosen = np.sort(rng.permutation(available)[:count])
    return GRID_START + GRID * chosen
