"""Utterances of different lengths one behind the other, without padding.

Work on padding is wasted and, wherever a convolution or a mean reads it, wrong. Everything here therefore keeps a
batch as one matrix of real frames (:class:`Ragged`); :class:`Gaps` says where a convolution's own padding goes between
two utterances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Gaps", "Ragged", "patches", "reflect_index"]


class Ragged(NamedTuple):
    """A batch of sequences: ``data`` : (sum of lengths, features), ``lengths`` : frames of each utterance.

    >>> batch = Ragged(torch.arange(6.0).view(3, 2), [1, 2])
    >>> batch.pad()
    tensor([[[0., 1.],
             [0., 0.]],
    <BLANKLINE>
            [[2., 3.],
             [4., 5.]]])
    >>> [tuple(x.shape) for x in batch.split()]
    [(1, 2), (2, 2)]
    """

    data: Tensor
    lengths: list[int]

    def split(self) -> list[Tensor]:
        """Each utterance's own frames: views of (length, features)."""
        return list(self.data.split(self.lengths))

    def pad(self, value: float = 0.0) -> Tensor:
        """(batch, longest, features), frames behind an utterance's end set to ``value``."""
        batch, longest = len(self.lengths), max(self.lengths)
        if batch * longest == len(self.data):
            return self.data.reshape(batch, longest, -1)
        return torch.nn.utils.rnn.pad_sequence(self.split(), batch_first=True, padding_value=value)

    @classmethod
    def unpad(cls, padded: Tensor, lengths: Sequence[int]) -> Ragged:
        """The inverse of :meth:`pad`: real frames of ``padded`` : (batch, longest, features)."""
        lengths = [int(n) for n in lengths]
        if all(n == padded.shape[1] for n in lengths):
            return cls(padded.reshape(-1, padded.shape[-1]), lengths)
        return cls(torch.cat([x[:n] for x, n in zip(padded, lengths, strict=True)]), lengths)

    def extend(self, lengths: Sequence[int]) -> Ragged:
        """Repeat each utterance's last frame until it has at least ``lengths`` frames; none is cut.

        >>> Ragged(torch.tensor([[1.0], [2.0], [3.0]]), [1, 2]).extend([2, 1]).data.flatten().tolist()
        [1.0, 1.0, 2.0, 3.0]
        """
        new = [max(n, int(m)) for n, m in zip(self.lengths, lengths, strict=True)]
        if new == list(self.lengths):
            return self
        parts = [torch.cat([x, x[-1:].expand(m - len(x), -1)]) for x, m in zip(self.split(), new, strict=True)]
        return Ragged(torch.cat(parts), new)

    def grids(self) -> Iterator[Tensor]:
        """Views (utterances, frames, features) that together cover the batch: neighbours of equal length share one.

        What is computed per utterance (means, softmax) runs on these: one operation for a batch of equal crops, one per
        utterance otherwise, and the same arithmetic alone as in company.
        """
        start = 0
        for length, run in groupby(self.lengths):
            count = len(list(run))
            yield self.data[start : start + count * length].view(count, length, -1)
            start += count * length


def reflect_index(positions: np.ndarray, length: int) -> np.ndarray:
    """Positions beyond the ends of a sequence, mirrored back into it as often as needed (``np.pad`` mode "reflect").

    >>> reflect_index(np.arange(-4, 5), 3).tolist()
    [0, 1, 2, 1, 0, 1, 2, 1, 0]
    >>> reflect_index(np.arange(-2, 3), 1).tolist()
    [0, 0, 0, 0, 0]
    """
    if length == 1:
        return np.zeros_like(positions)
    period = 2 * (length - 1)
    folded = np.mod(positions, period)
    return np.minimum(folded, period - folded)


class Gaps(NamedTuple):
    """Where ``width`` frames before and behind each utterance lie when a batch is laid out for one convolution.

    Rows of the laid-out sequence, all (n,) long tensors: ``source`` the real frame that every row shows (in the gaps:
    the utterance's reflection), ``real`` the rows of the real frames, ``gap`` the rows of the gaps, ``gap_source`` the
    rows that they mirror.

    >>> Gaps.of([3, 2], 1, torch.device("cpu")).source.tolist()
    [1, 0, 1, 2, 1, 4, 3, 4, 3]
    """

    source: Tensor
    real: Tensor
    gap: Tensor
    gap_source: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], width: int, device: torch.device) -> Gaps:
        """Layout of a batch; recent ones are remembered."""
        return _remembered(_gaps)(tuple(lengths), width, device)


def _remembered(function: Any) -> Callable:
    # The compiler sees through the function, not through its memory.
    return function.__wrapped__ if torch.compiler.is_compiling() else function


@lru_cache(maxsize=64)
def _gaps(lengths: tuple[int, ...], width: int, device: torch.device) -> Gaps:
    source, real, gap, gap_source = [], [], [], []
    frames = rows = 0
    for length in lengths:
        own = reflect_index(np.arange(-width, length + width), length)
        outside = np.concatenate([np.arange(width), np.arange(width + length, 2 * width + length)])
        source.append(own + frames)
        real.append(np.arange(width, width + length) + rows)
        gap.append(outside + rows)
        gap_source.append(own[outside] + width + rows)
        frames += length
        rows += length + 2 * width
    parts = (np.concatenate(x) for x in (source, real, gap, gap_source))
    return Gaps(*(torch.from_numpy(x.astype(np.int64)).to(device) for x in parts))


def patches(x: Ragged, kernel_size: int, stride: int, padding: str) -> tuple[Tensor, list[int]]:
    """What a convolution sees at each of its outputs, within each utterance.

    Returns (outputs, kernel_size * features), the taps one behind the other, and the number of outputs of each
    utterance,
    ceil(length / stride). ``padding`` : "reflect" or "zeros" beyond an utterance's ends.

    >>> patches(Ragged(torch.tensor([[1.0], [2.0], [3.0], [9.0]]), [3, 1]), 3, 2, "zeros")
    (tensor([[0., 1., 2.],
            [2., 3., 0.],
            [0., 9., 0.]]), [2, 1])
    """
    index, lengths = _remembered(_patches)(tuple(x.lengths), kernel_size, stride, padding, x.data.device)
    # Row 0 is what lies outside under zero padding. Embedding rather than indexing: its backward pass is fast.
    table = F.pad(x.data, (0, 0, 1, 0))
    return F.embedding(index, table).flatten(1), list(lengths)


@lru_cache(maxsize=16)
def _patches(
    lengths: tuple[int, ...], kernel_size: int, stride: int, padding: str, device: torch.device
) -> tuple[Tensor, tuple[int, ...]]:
    offsets = np.arange(kernel_size) - kernel_size // 2
    index, start = [], 0
    for length in lengths:
        taps = np.arange(0, length, stride)[:, None] + offsets
        if padding == "reflect":
            index.append(reflect_index(taps, length) + start + 1)
        else:
            index.append(np.where((taps >= 0) & (taps < length), taps + start + 1, 0))
        start += length
    return torch.from_numpy(np.concatenate(index)).to(device), tuple(-(-n // stride) for n in lengths)
