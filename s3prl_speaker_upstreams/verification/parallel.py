"""Several processes that share the embedding of files, and meet often enough that no collective times out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Ranks"]


@dataclass(frozen=True)
class Ranks:
    """This process among others.

    rank, size : which of how many
    gather : a value of this process -> the values of all, in their order; every process calls it equally often
    sync_seconds : the longest time, but for one batch, between two such calls; far below the group's time-out

    >>> Ranks().gather("alone")
    ['alone']
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    sync_seconds: float = 20.0

    @classmethod
    def current(cls, sync_seconds: float = 20.0) -> Ranks:
        """Those of :mod:`torch.distributed`, or one process where it was not started."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        size = dist.get_world_size()

        def gather(value: Any) -> list[Any]:
            values: list[Any] = [None] * size
            dist.all_gather_object(values, value)
            return values

        return cls(dist.get_rank(), size, gather, sync_seconds)
