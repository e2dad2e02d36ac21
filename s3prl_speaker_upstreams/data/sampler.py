"""The order in which utterances come: a function of seed and epoch, whatever the number of processes and workers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from s3prl_speaker_upstreams.data.keyed import random_for
from s3prl_speaker_upstreams.errors import ConfigError

__all__ = ["BalancedBatchSampler", "BatchSampler"]


class BatchSampler:
    """Which utterances are in batch ``b`` of epoch ``e``: a function of these two, of seed and sizes alone.

    Every epoch is a new permutation; what does not fill a batch waits for another epoch. With fewer utterances than one
    batch, they come several times in it, each time with other crops.

    Parameters
    ----------
    n : int
        Number of utterances.
    batch_size : int
        Utterances in one batch of all processes together.
    seed : int
    rank, world_size : int
        This process, and how many there are: process ``r`` takes the ``r``-th of ``world_size`` equal slices, so that
        the slices one behind the other are the batch of a single process.

    >>> one, two = BatchSampler(10, 4), [BatchSampler(10, 4, rank=rank, world_size=2) for rank in (0, 1)]
    >>> one.batch(3, 1) == two[0].batch(3, 1) + two[1].batch(3, 1)
    True
    >>> one.batches_per_epoch, one.locate(5)
    (2, (2, 1))
    """

    def __init__(self, n: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1):
        if n < 1 or batch_size < 1:
            raise ConfigError(f"got {n} utterances and batch_size={batch_size}, expected at least 1 of both")
        if not 0 <= rank < world_size:
            raise ConfigError(f"got rank {rank} of world_size {world_size}")
        if batch_size % world_size:
            raise ConfigError(
                f"batch_size={batch_size} (of all processes together) is not divisible by {world_size} processes"
            )
        self.n, self.batch_size, self.seed = int(n), int(batch_size), int(seed)
        self.rank, self.world_size = int(rank), int(world_size)
        self.repeats = -(-batch_size // n)
        self.batches_per_epoch = n * self.repeats // batch_size
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None

    def order(self, epoch: int) -> np.ndarray:
        """Utterances of ``epoch`` in their order, (n * repeats,) int64."""
        return self._drawn(epoch)[0]

    def _drawn(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, *self.draw(epoch)
        return self._order[1:]

    def draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Utterances of ``epoch`` in their order, and how often each came before in it: two of (n * repeats,) int64."""
        rng = random_for(self.seed, epoch, "", "order")
        order = np.concatenate([rng.permutation(self.n) for _ in range(self.repeats)])
        return order, np.repeat(np.arange(self.repeats), self.n)

    def batch(self, epoch: int, number: int) -> list[tuple[int, ...]]:
        """Keys for the dataset of this process's part of batch ``number`` of ``epoch``."""
        if not 0 <= number < self.batches_per_epoch:
            raise IndexError(f"batch {number} of {self.batches_per_epoch} in an epoch")
        share = self.batch_size // self.world_size
        first = number * self.batch_size + self.rank * share
        order, repeats = self._drawn(epoch)
        part = slice(first, first + share)
        return [
            (epoch, index, repeat) if repeat else (epoch, index)
            for index, repeat in zip(order[part].tolist(), repeats[part].tolist(), strict=True)
        ]

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, batch in it) of the batch number ``step`` counted over all epochs."""
        return divmod(int(step), self.batches_per_epoch)

    def after(self, epoch: int, number: int) -> Iterator[tuple[int, int]]:
        """Endless (epoch, batch) pairs from there on."""
        while True:
            while number < self.batches_per_epoch:
                yield epoch, number
                number += 1
            epoch, number = epoch + 1, 0


class BalancedBatchSampler(BatchSampler):
    """Every speaker equally often: rounds of all speakers in a new order, each with the next of its utterances.

    An epoch has as many utterances as there are; those of talkative speakers wait for another epoch, those of others
    come several times, each time with other crops. With no more utterances in a batch than there are speakers, hardly
    two of one speaker meet in it.

    Parameters
    ----------
    labels : (n,) int
        Speaker of every utterance, from 0 on; -1 (unknown) is refused.
    batch_size, seed, rank, world_size
        As of :class:`BatchSampler`.

    >>> labels = np.array([0] * 8 + [1] * 2)
    >>> sampler = BalancedBatchSampler(labels, 5)
    >>> np.bincount(labels[sampler.order(0)]).tolist()
    [5, 5]
    """

    def __init__(self, labels: np.ndarray, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1):
        super().__init__(len(labels), batch_size, seed=seed, rank=rank, world_size=world_size)
        labels = np.asarray(labels)
        if labels.min() < 0:
            raise ConfigError(
                f"got {int((labels < 0).sum())} of {len(labels)} utterances without a speaker; batches balanced over "
                "speakers need one for each"
            )
        order = np.argsort(labels, kind="stable")
        self.members = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)

    def draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """As of :class:`BatchSampler`."""
        total = self.n * self.repeats
        rounds = -(-total // len(self.members))
        rng = random_for(self.seed, epoch, "", "balanced order")
        chosen = np.empty((rounds, len(self.members)), dtype=np.int64)
        before = np.empty_like(chosen)
        for number, members in enumerate(self.members):
            before[:, number], place = np.divmod(np.arange(rounds), len(members))
            chosen[:, number] = rng.permutation(members)[place]
        for line in range(rounds):
            order = rng.permutation(len(self.members))
            chosen[line], before[line] = chosen[line, order], before[line, order]
        return chosen.reshape(-1)[:total], before.reshape(-1)[:total]
