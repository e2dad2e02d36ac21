"""Positives from clusters while training: embed all recordings from time to time, cluster, hand over to the loader.

The embedding is that of one crop of every recording by the network that is exported (DINO's teacher), in inference
mode: it depends on seed and step alone, so that a resumed run finds the clusters of the uninterrupted one, and costs
one forward pass over as many crops as there are recordings.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.datasets import CropDataset, MultiCrop
from ..data.loader import Loader
from ..data.positives import ClusterPositives, kmeans
from ..data.utterances import Fault
from ..errors import ConfigError
from ..verification.parallel import Ranks
from .config import DataConfig

__all__ = ["ClusterSelection"]

logger = logging.getLogger(__name__)

_BATCH = 64


class _OneCrop:
    """The first global crop of an utterance, without positives from elsewhere; for a DataLoader."""

    def __init__(self, dataset: CropDataset, epoch: int, indices: list[int]) -> None:
        self.dataset, self.epoch, self.indices = copy.copy(dataset), epoch, indices
        self.dataset.positives = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[np.ndarray, tuple[Fault, ...]]:
        item = self.dataset[(self.epoch, self.indices[place])]
        if not isinstance(item, MultiCrop):
            raise ConfigError("positives=clusters is for training on several crops")
        return item.global_crops[0], item.faults


def _stacked(items: list[tuple[np.ndarray, tuple[Fault, ...]]]) -> Tensor:
    return torch.from_numpy(np.stack([crop for crop, _ in items]))


class ClusterSelection:
    """Gives the loader's positives new clusters at the steps that the configuration names.

    loader : with positives of the kind "clusters"
    steps : a duration of the configuration -> optimizer steps
    """

    def __init__(self, loader: Loader, data: DataConfig, steps: Callable[[str], int], seed: int) -> None:
        positives = loader.dataset.positives
        if not isinstance(positives, ClusterPositives):
            raise ConfigError("data.positives=clusters: the loader was made without")
        if not 1 < data.clusters <= len(loader.dataset):
            raise ConfigError(
                f"data.clusters: got {data.clusters}, expected 2 to {len(loader.dataset)} (the recordings); SSPS's "
                "published DINO configuration takes 6000 for VoxCeleb2's 1.1 million"
            )
        self.loader, self.positives, self.clusters, self.seed = loader, positives, data.clusters, seed
        self.start, self.every = steps(data.cluster_start), max(steps(data.cluster_every), 1)

    def due(self, step: int) -> bool:
        """Whether clusters are made anew before the optimizer step ``step`` (0-based)."""
        return step >= self.start and (step - self.start) % self.every == 0

    def refresh(
        self, step: int, network: nn.Module, features: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        """Embed, cluster, and let the loader go on with positives from there; all processes call it.

        network : embeds features (rows, frames, n_mels); features : crops to these
        """
        begin, ranks = time.perf_counter(), Ranks.current()
        table = self._embeddings(step, network, features, device, ranks)
        # One process decides: sums on a GPU may differ in the last bit.
        found = kmeans(table.to(device), self.clusters, seed=self.seed) if ranks.rank == 0 else None
        assignments, centroids = ranks.gather(found)[0]
        self.positives.update(assignments, centroids)
        self.loader.restart()
        if ranks.rank == 0:
            used = len(np.unique(assignments))
            logger.info(
                "step %d: %d recordings in %d clusters, %.0f s", step, len(table), used, time.perf_counter() - begin
            )

    @torch.inference_mode()
    def _embeddings(
        self, step: int, network: nn.Module, features: Callable[[Tensor], Tensor], device: torch.device, ranks: Ranks
    ) -> Tensor:
        """(recordings, dim) float32 on the CPU, in every process."""
        count = len(self.loader.dataset)
        mine = list(range(ranks.rank, count, ranks.size))
        crops = self._crops(step, mine)
        network = copy.deepcopy(network).eval()
        table: Tensor | None = None
        place, batches = 0, math.ceil(math.ceil(count / ranks.size) / _BATCH)  # as many in every process
        rows: list[Tensor] = []
        for number in range(batches):
            crop = next(crops, None)
            if crop is not None:
                rows.append(network(features(crop.to(device))).float().cpu())
            if number % 16 == 15 or number == batches - 1:  # they meet often, far from any time-out
                for rank, part in enumerate(ranks.gather(torch.cat(rows).numpy() if rows else None)):
                    if part is None:
                        continue
                    if table is None:
                        table = torch.zeros(count, part.shape[1])
                    where = np.arange(place, place + len(part)) * ranks.size + rank
                    table[torch.from_numpy(where)] = torch.from_numpy(part)
                place, rows = place + 16 * _BATCH, []
        if table is None:
            raise ConfigError("got no recordings to cluster")
        return table

    def _crops(self, step: int, indices: list[int]) -> Iterator[Tensor]:
        data: Any = _OneCrop(self.loader.dataset, step, indices)
        return iter(
            torch.utils.data.DataLoader(
                data,
                batch_size=_BATCH,
                collate_fn=_stacked,
                num_workers=self.loader.workers,
                generator=torch.Generator(),
            )
        )
