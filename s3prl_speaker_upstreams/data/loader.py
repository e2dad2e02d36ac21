"""Batches without end, at a position that is known."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from s3prl_speaker_upstreams.data.datasets import CropDataset, LabelledCrop, LabelledCropDataset, MultiCrop
from s3prl_speaker_upstreams.data.positives import ClusterPositives, count_positives
from s3prl_speaker_upstreams.data.sampler import BatchSampler
from s3prl_speaker_upstreams.data.utterances import Fault
from s3prl_speaker_upstreams.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["Batch", "LabelledBatch", "Loader", "measure_loader"]

log = logging.getLogger(__name__)


@dataclass
class Batch:
    """Crops of several utterances.

    Attributes
    ----------
    global_crops, local_crops : lists of tensors, one (batch, samples) or (batch, frames, n_mels) per crop
    epoch, batch : int
        Position that this batch has.
    indices : (batch,) int64 tensor
        Utterances that the crops are really of.
    ids : list of str
    partners : (batch,) int64 tensor
        Utterances that every second global crop is of; the same as ``indices`` but for other :mod:`.positives`.
    """

    global_crops: list[torch.Tensor]
    local_crops: list[torch.Tensor]
    epoch: int
    batch: int
    indices: torch.Tensor
    ids: list[str]
    partners: torch.Tensor


@dataclass
class LabelledBatch:
    """Crops with classes: ``wavs`` (batch, samples), ``labels`` (batch,) int64; the rest as in :class:`Batch`."""

    wavs: torch.Tensor
    labels: torch.Tensor
    epoch: int
    batch: int
    indices: torch.Tensor
    ids: list[str]


@dataclass
class _Collated:
    arrays: list[torch.Tensor]
    indices: list[int]
    partners: list[int]
    faults: list[Fault] = field(default_factory=list)

    def pin_memory(self) -> _Collated:
        """Called by DataLoader, which knows nothing of this class."""
        return _Collated([array.pin_memory() for array in self.arrays], self.indices, self.partners, self.faults)


def _collate(items: list[MultiCrop] | list[LabelledCrop]) -> _Collated:
    """Runs in the worker: only a few large tensors go through shared memory."""
    import torch

    faults = [fault for item in items for fault in item.faults]
    indices = [item.index for item in items]
    labelled = [item for item in items if isinstance(item, LabelledCrop)]
    if labelled:
        labels = torch.tensor([item.label for item in labelled], dtype=torch.int64)
        return _Collated(
            [torch.from_numpy(np.stack([item.wav for item in labelled])), labels], indices, indices, faults
        )
    several = [item for item in items if isinstance(item, MultiCrop)]
    arrays = [[item.global_crops for item in several], [item.local_crops for item in several]]
    # Crops first, then the batch: crop by crop they are contiguous.
    tensors = [torch.from_numpy(np.ascontiguousarray(np.stack(part, axis=1))) for part in arrays]
    return _Collated(tensors, indices, [item.partner for item in several], faults)


class _Keys:
    """Endless batches of keys; an iterable object rather than a generator, since DataLoader asks for it anew."""

    def __init__(self, sampler: BatchSampler, epoch: int, number: int):
        self.sampler, self.epoch, self.number = sampler, epoch, number

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        for epoch, number in self.sampler.after(self.epoch, self.number):
            yield self.sampler.batch(epoch, number)


class Loader:
    """Endless iterator over batches, through all epochs, that knows its position.

    Parameters
    ----------
    dataset : MultiCropDataset, LabelledCropDataset or CachedFeatureDataset
    sampler : BatchSampler
    workers : int
        Processes that prepare batches; 0: in this one. The batches are the same.
    epoch, batch : int
        Where to begin.
    prefetch : int
        Batches that each worker prepares ahead.
    pin_memory : bool
        For a GPU.

    Attributes
    ----------
    waited_seconds : float
        Time that ``next`` took so far; the difference over a step is what the step waited.
    faults : Counter
        Utterances that were replaced, by kind: each file counts once.
    positives : Counter
        With positives from other recordings: how many ``pairs`` were delivered so far, and how many of them are of the
        ``same_recording``, ``same_session`` and (where known) ``same_speaker``.

    >>> import soundfile, tempfile
    >>> from s3prl_speaker_upstreams.data.manifest import Manifest
    >>> name = tempfile.mkstemp(suffix=".wav")[1]
    >>> soundfile.write(name, np.random.default_rng(0).normal(0, 0.1, 48000), 16000)
    >>> two = Manifest(["a", "b"], [48000, 48000], [16000, 16000], ["ann", "bob"], paths=[name, name])
    >>> loader = Loader(LabelledCropDataset(two, seconds=2.0), BatchSampler(2, 2))
    >>> tuple(next(loader).wavs.shape), next(loader).epoch
    ((2, 32000), 1)
    """

    def __init__(
        self,
        dataset: CropDataset,
        sampler: BatchSampler,
        *,
        workers: int = 0,
        epoch: int = 0,
        batch: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
    ):
        if sampler.n != len(dataset):
            raise ConfigError(f"the sampler is of {sampler.n} utterances, the dataset has {len(dataset)}")
        self.dataset, self.sampler = dataset, sampler
        self.workers, self.prefetch, self.pin_memory = int(workers), int(prefetch), bool(pin_memory)
        self.waited_seconds = 0.0
        self.faults: Counter[str] = Counter()
        self.positives: Counter[str] = Counter()
        self._reported: set[str] = set()
        self._fingerprint = dataset.manifest.fingerprint
        self._batches: Iterator[_Collated] | None = None
        self.seek(epoch, batch)

    def seek(self, epoch: int, batch: int) -> None:
        """Go on from batch ``batch`` of ``epoch``."""
        if epoch < 0 or not 0 <= batch <= self.sampler.batches_per_epoch:
            raise ConfigError(
                f"got epoch {epoch}, batch {batch}; an epoch has {self.sampler.batches_per_epoch} batches"
            )
        self.close()
        if batch == self.sampler.batches_per_epoch:
            epoch, batch = epoch + 1, 0
        self.epoch, self.batch = epoch, batch

    def restart(self) -> None:
        """Make what was prepared ahead anew, after the dataset's positives changed; the position stays."""
        self.close()

    def _begin(self) -> Iterator[_Collated]:
        import torch
        from torch.utils.data import DataLoader

        if self.workers:
            self.dataset.preload()  # before the workers are forked, so that they share it
        return iter(
            DataLoader(
                cast("torch.utils.data.Dataset[Any]", self.dataset),
                batch_sampler=_Keys(self.sampler, self.epoch, self.batch),
                collate_fn=_collate,
                num_workers=self.workers,
                prefetch_factor=self.prefetch if self.workers else None,
                pin_memory=self.pin_memory,
                # DataLoader draws a seed when it starts; from the global generator that would shift the dropout of a
                # resumed run against the uninterrupted one.
                generator=torch.Generator(),
            )
        )

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch | LabelledBatch:
        import torch

        begin = time.perf_counter()
        if self._batches is None:
            self._batches = self._begin()
        made = next(self._batches)
        epoch, number = self.epoch, self.batch
        self._note(made.faults)
        self.batch += 1
        if self.batch == self.sampler.batches_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0
        ids = [self.dataset.manifest[index].id for index in made.indices]
        indices = torch.tensor(made.indices, dtype=torch.int64)
        first, second = made.arrays
        if isinstance(self.dataset, LabelledCropDataset):
            out: Batch | LabelledBatch = LabelledBatch(first, second, epoch, number, indices, ids)
        else:
            partners = torch.tensor(made.partners, dtype=torch.int64)
            out = Batch(list(first), list(second), epoch, number, indices, ids, partners)
            if self.dataset.positives is not None:
                self.positives.update(count_positives(self.dataset.manifest, made.indices, made.partners))
        self.waited_seconds += time.perf_counter() - begin
        return out

    def _note(self, faults: Sequence[Fault]) -> None:
        for fault in faults:
            if fault.path in self._reported:
                continue
            self._reported.add(fault.path)
            self.faults[fault.kind] += 1
            log.warning("utterance replaced by the next one (%s): %s", fault.kind, fault.why)

    def state_dict(self) -> dict[str, Any]:
        """Position of the first batch that was not delivered yet, and what it is a position in."""
        out = {
            "epoch": self.epoch,
            "batch": self.batch,
            "seed": self.sampler.seed,
            "batch_size": self.sampler.batch_size,
            "data_seed": self.dataset.seed,
            "fingerprint": self._fingerprint,
        }
        if isinstance(self.dataset.positives, ClusterPositives):
            out["positives"] = self.dataset.positives.state_dict()
        return out

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Raises ConfigError if data, seed or batch size differ: the position would mean nothing.

        The number of processes and of workers may differ.
        """
        mine = self.state_dict()
        for key in ("fingerprint", "seed", "data_seed", "batch_size"):
            if state[key] != mine[key]:
                raise ConfigError(
                    f"the saved run had {key}={state[key]}, this one has {mine[key]}; resume with the same data and "
                    "settings, or begin a new run from its weights"
                )
        if isinstance(self.dataset.positives, ClusterPositives):
            self.dataset.positives.load_state_dict(state.get("positives", {}))
        self.seek(int(state["epoch"]), int(state["batch"]))

    def close(self) -> None:
        """End the workers; the position stays."""
        self._batches = None  # the iterator ends its workers when it is let go of


def _sleep(seconds: float, batch: object) -> None:
    time.sleep(seconds)


def measure_loader(
    loader: Loader, batches: int = 20, *, step: Callable[[Any], object] | float = 0.0, warm_up: int = 2
) -> dict[str, float]:
    """How fast a loader is, and how long a training step of a given duration waits for it.

    Parameters
    ----------
    loader : Loader
        Advances by ``batches + warm_up``.
    batches : int
    step : callable or float
        The step itself, called with each batch; or its duration in seconds, which is slept (with workers on the same
        cores a real step is the honest measurement).
    warm_up : int
        First batches, which start the workers and fill caches, and are not counted.

    Returns
    -------
    dict
        ``seconds_per_batch`` (all told), ``waited_per_batch``, ``step_seconds``, ``waiting_fraction`` (of the time all
        told), ``utterances_per_second``.

    >>> import soundfile, tempfile
    >>> from s3prl_speaker_upstreams.data.manifest import Manifest
    >>> name = tempfile.mkstemp(suffix=".wav")[1]
    >>> soundfile.write(name, np.random.default_rng(0).normal(0, 0.1, 48000), 16000)
    >>> one = Manifest(["a"], [48000], [16000], paths=[name])
    >>> from s3prl_speaker_upstreams.data.datasets import MultiCropDataset
    >>> result = measure_loader(Loader(MultiCropDataset(one), BatchSampler(1, 1)), 3)
    >>> 0 < result["waiting_fraction"] <= 1
    True
    """
    if batches < 1:
        raise ConfigError(f"batches: got {batches}, expected at least 1")
    work: Callable[[Any], object] = step if callable(step) else partial(_sleep, step)
    for _ in range(warm_up):
        work(next(loader))
    waited, begin, steps = loader.waited_seconds, time.perf_counter(), 0.0
    for _ in range(batches):
        batch = next(loader)
        now = time.perf_counter()
        work(batch)
        steps += time.perf_counter() - now
    total = time.perf_counter() - begin
    waited = loader.waited_seconds - waited
    return {
        "batches": batches,
        "seconds_per_batch": total / batches,
        "waited_per_batch": waited / batches,
        "step_seconds": steps / batches,
        "waiting_fraction": waited / total,
        "utterances_per_second": batches * loader.sampler.batch_size / loader.sampler.world_size / total,
    }
