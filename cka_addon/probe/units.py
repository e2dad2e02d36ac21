"""From labels with times to examples: which frames belong to which value, by the centres of the frames.

A frame belongs to the segment [start, end) that holds its centre. A segment too short to hold one takes the frame whose
centre is nearest to its middle, if that is less than a frame shift away; else it is left out and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cka_addon.align import Clock
from cka_addon.probe.labels import Segment

BEYOND = 0.05  # seconds that a segment may end behind the recording before it counts as beyond it


@dataclass
class Counts:
    """What was left out or mended on the way from labels to examples, over all utterances."""

    found: Counter[str] = field(default_factory=Counter)

    def add(self, what: str, number: int = 1) -> None:
        """Count `number` more of `what`."""
        if number:
            self.found[what] += number

    def merge(self, other: Counts) -> None:
        """Add the counts of other utterances."""
        self.found.update(other.found)


def usable_segments(rows: Sequence[Segment], seconds: float, counts: Counts) -> list[Segment]:
    """Segments within the recording that overlap no other one, in the order of time.

    seconds : length of the recording. Segments that begin behind its end are left out, those that end more than 50 ms
    behind it are cut, both counted; segments of which a part is claimed by two are left out and counted.

    >>> counts = Counts()
    >>> rows = [Segment(0, 1, "a"), Segment(0.9, 2, "b"), Segment(2, 3, "c"), Segment(9, 10, "d")]
    >>> [s.value for s in usable_segments(rows, 3.0, counts)], dict(counts.found)
    (['c'], {'segments beyond the audio': 1, 'segments that overlap another': 2})
    """
    kept: list[Segment] = []
    overlapping: set[int] = set()
    reach, last = -1.0, -1
    for row in sorted(rows, key=lambda s: (s.start, s.end)):
        if row.start >= seconds:
            counts.add("segments beyond the audio")
            continue
        if row.end > seconds:
            if row.end > seconds + BEYOND:
                counts.add("segments cut at the end of the audio")
            row = Segment(row.start, seconds, row.value)
        if row.end <= row.start:
            counts.add("segments without length")
            continue
        if row.start < reach - 1e-6:
            overlapping |= {last, len(kept)}
        if row.end > reach:
            reach, last = row.end, len(kept)
        kept.append(row)
    counts.add("segments that overlap another", len(overlapping))
    return [row for i, row in enumerate(kept) if i not in overlapping]


def frames_of(clock: Clock, frames: int, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[first, last) frames of every segment, both (segments,); last == first where a segment has none.

    starts, ends : (segments,) seconds

    >>> first, last = frames_of(Clock(0.02, 0.0125), 50, np.array([0.0, 0.1, 0.104]), np.array([0.1, 0.104, 0.14]))
    >>> first.tolist(), last.tolist()
    ([0, 4, 5], [5, 5, 7])
    """
    if not clock.shift:
        return np.zeros(len(starts), np.int64), np.ones(len(starts), np.int64)
    # The tolerance keeps a centre on a border where the decimal times put it.
    first = np.ceil((starts - clock.first_center) / clock.shift - 1e-6).astype(np.int64)
    last = np.ceil((ends - clock.first_center) / clock.shift - 1e-6).astype(np.int64)
    first, last = np.clip(first, 0, frames), np.clip(last, 0, frames)
    empty = last <= first
    middle = (starts + ends) / 2
    near = np.clip(clock.nearest(middle), 0, max(frames - 1, 0))
    close = np.abs(clock.first_center + clock.shift * near - middle) < clock.shift
    first = np.where(empty, near, first)
    last = np.where(empty, near + (close & (frames > 0)), last)
    return first, last


def means(x: Tensor, first: np.ndarray, last: np.ndarray) -> Tensor:
    """Mean over the frames of every segment. x : (frames, width) -> (segments, width); every segment needs a frame.

    >>> means(torch.tensor([[0.0], [2.0], [4.0]]), np.array([0, 2]), np.array([2, 3])).tolist()
    [[1.0], [4.0]]
    """
    length = last - first
    owner = np.repeat(np.arange(len(first)), length)
    ends = np.cumsum(length)
    frame = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - length, length) + np.repeat(first, length)
    total = torch.zeros(len(first), x.shape[1], dtype=x.dtype, device=x.device)
    total.index_add_(0, torch.from_numpy(owner).to(x.device), x[torch.from_numpy(frame).to(x.device)])
    return total / torch.from_numpy(length).to(x.device, x.dtype)[:, None]


def at_times(rows: Sequence[Segment], times: np.ndarray) -> np.ndarray:
    """Index of the segment that holds each instant, (times,), -1 where none does. Segments must not overlap.

    >>> at_times([Segment(0, 1, "a"), Segment(2, 3, "b")], np.array([0.5, 1.0, 2.0])).tolist()
    [0, -1, 1]
    """
    if not rows:
        return np.full(len(times), -1)
    starts = np.array([r.start for r in rows])
    ends = np.array([r.end for r in rows])
    index = np.searchsorted(starts, times + 1e-9, side="right") - 1
    inside = (index >= 0) & (times < ends[np.maximum(index, 0)] - 1e-9)
    return np.where(inside, index, -1)
