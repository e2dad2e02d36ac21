"""``catalyst.data.sampler`` for the one name that keyword spotting imports: ``DistributedSamplerWrapper``.

catalyst 22.4 is unmaintained and pulls packages of its time; s3prl's speech_commands needs 20 lines of it, and those
only under torchrun.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from torch.utils.data import DistributedSampler, Sampler

from s3prl_speaker_upstreams.compat._errors import RemovedApi

__all__ = ["DistributedSamplerWrapper"]


class DistributedSamplerWrapper(DistributedSampler):
    """Shares what any sampler draws between the processes of a distributed run.

    sampler : drawn from anew in every epoch; must draw the same in every process (s3prl seeds all alike)
    num_replicas, rank, shuffle : as for ``torch.utils.data.DistributedSampler``

    >>> from torch.utils.data import SequentialSampler
    >>> everything = SequentialSampler("abcd")
    >>> [list(DistributedSamplerWrapper(everything, num_replicas=2, rank=rank, shuffle=False)) for rank in (0, 1)]
    [[0, 2], [1, 3]]
    """

    def __init__(
        self, sampler: Sampler, num_replicas: int | None = None, rank: int | None = None, shuffle: bool = True
    ) -> None:
        positions: Any = range(len(sampler))  # type: ignore[arg-type]
        super().__init__(positions, num_replicas=num_replicas, rank=rank, shuffle=shuffle)
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        drawn = list(self.sampler)
        positions: Any = range(len(drawn))
        self.dataset = positions  # what torch's sampler shuffles and shares are positions in this draw
        return iter([drawn[position] for position in super().__iter__()])


def __getattr__(name: str) -> NoReturn:
    if name.startswith("__"):
        raise AttributeError(name)
    raise RemovedApi(
        f"catalyst.data.sampler.{name}: catalyst is not installed and only DistributedSamplerWrapper is supplied in "
        "its place; pip install --no-deps catalyst==22.4"
    )
