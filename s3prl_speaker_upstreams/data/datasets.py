"""Crops of utterances for training, the order they come in, and the loader that brings them.

Three properties hold, and are tested:

* What an item is depends on seed, epoch and utterance only: crop positions and augmentation come from a generator keyed
  by these (:func:`random_for`), so the number of workers, of processes and the order of reading change nothing.
* The order depends on seed and epoch only, and a process takes its slice of the global batch: 1 process or 8, the
  same utterances are in the same step.
* The position is a pair (epoch, batch), known for what was *delivered* rather than prefetched: a resumed run goes on
  with the very next batch.

An utterance that turns out unreadable, cut off or silent is counted, logged once, and replaced by the next one.

>>> import soundfile, tempfile
>>> from pathlib import Path
>>> from s3prl_speaker_upstreams.data.manifest import build_manifest
>>> folder = Path(tempfile.mkdtemp())
>>> for name in "abcd":
...     soundfile.write(folder / f"{name}.wav", np.random.default_rng(ord(name)).normal(0, 0.1, 64000), 16000)
>>> manifest = build_manifest(folder, cache=False, progress=False)
>>> dataset = MultiCropDataset(manifest, global_seconds=2.0, local_seconds=1.0)
>>> loader = Loader(dataset, BatchSampler(len(dataset), 2))
>>> batch = next(loader)
>>> [tuple(crop.shape) for crop in batch.global_crops + batch.local_crops]
[(2, 32000), (2, 32000), (2, 16000), (2, 16000), (2, 16000), (2, 16000)]
>>> loader.state_dict()["batch"]
1
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from s3prl_speaker_upstreams.common.audio import read_audio, resample
from s3prl_speaker_upstreams.data.augment import Augmenter
from s3prl_speaker_upstreams.data.manifest import Manifest, Utterance
from s3prl_speaker_upstreams.errors import BadAudio, BadWaveform, ConfigError, DamagedAudio, SpeakerUpstreamError

if TYPE_CHECKING:
    import torch

__all__ = [
    "Batch",
    "BatchSampler",
    "CachedFeatureDataset",
    "DataError",
    "Fault",
    "LabelledBatch",
    "LabelledCrop",
    "LabelledCropDataset",
    "Loader",
    "MultiCrop",
    "MultiCropDataset",
    "measure_loader",
    "random_for",
]

log = logging.getLogger(__name__)

# Crops of one utterance are read in one go where less than this lies between them: a seek costs more than the reading.
_BRIDGE_SECONDS = 1.0
_TRIES = 50


class DataError(SpeakerUpstreamError, OSError):
    """Many utterances in a row cannot be used: the disk is gone, or the manifest is that of another folder."""


class Fault(NamedTuple):
    """An utterance that could not be used: ``kind`` is ``unreadable``, ``damaged`` (cut off, not finite) or
    ``silent``."""

    kind: str
    path: str
    why: str


class MultiCrop(NamedTuple):
    """Crops of one utterance: (n_global, samples) and (n_local, samples), or (n, frames, n_mels) of cached features."""

    global_crops: np.ndarray
    local_crops: np.ndarray
    index: int
    faults: tuple[Fault, ...]


class LabelledCrop(NamedTuple):
    """One crop (samples,) and its class."""

    wav: np.ndarray
    label: int
    index: int
    faults: tuple[Fault, ...]


def random_for(seed: int, epoch: int, utterance: str, purpose: str = "") -> np.random.Generator:
    """Generator that depends on these four alone; the same on every machine.

    >>> int(random_for(0, 3, "id1/a.wav").integers(1000)) == int(random_for(0, 3, "id1/a.wav").integers(1000))
    True
    """
    text = f"{seed}\0{epoch}\0{utterance}\0{purpose}"
    key = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


# ---------------------------------------------------------------------------------------------- reading
class _Source:
    """Pieces of utterances at one sample rate; optionally keeps decoded recordings up to a number of bytes."""

    def __init__(self, manifest: Manifest, sample_rate: int, cache_mb: float, silence_db: float):
        if not len(manifest):
            raise ConfigError("got an empty manifest, expected at least one utterance")
        self.manifest = manifest
        self.sample_rate = int(sample_rate)
        self.quietest = 10 ** (silence_db / 20)
        self.decoded: dict[int, np.ndarray] = {}
        # Which recordings are kept must not depend on the order they are met in: resampling a whole recording or a
        # piece of it differs in the last bits. So it is as many as fit from the first on.
        seconds = np.cumsum(manifest.durations)
        self.kept = int(np.searchsorted(seconds * 2 * self.sample_rate, cache_mb * 2**20, side="right"))

    def length(self, index: int, speed: float = 1.0) -> int:
        """Samples that utterance ``index`` has at our rate, played ``speed`` times as fast."""
        manifest = self.manifest
        return max(1, int(manifest.samples[index] * self.sample_rate / (manifest.sample_rates[index] * speed)))

    def pieces(self, index: int, starts: Sequence[int], lengths: Sequence[int], speed: float = 1.0) -> list[np.ndarray]:
        """Pieces [start, start + length) at our rate; where the utterance ends before, it begins again.

        Raises OSError or BadWaveform if they cannot be read or all of them are silent.
        """
        item = self.manifest[index]
        total = self.length(index, speed)
        ends = [start + size for start, size in zip(starts, lengths, strict=True)]
        spans = [(0, total) if end > total else (start, end) for start, end in zip(starts, ends, strict=True)]
        merged: list[list[int]] = []
        for low, high in sorted(spans):
            if merged and low - merged[-1][1] <= _BRIDGE_SECONDS * self.sample_rate:
                merged[-1][1] = max(merged[-1][1], high)
            else:
                merged.append([low, high])
        read = [self._read(item, index, low, high, total, speed) for low, high in merged]
        if max(float(np.abs(part).max(initial=0)) for part in read) < self.quietest:
            raise _Silent(f"{item.path}: silence")
        out = []
        for start, size, (low, _) in zip(starts, lengths, spans, strict=True):
            number = next(k for k, (first, last) in enumerate(merged) if first <= low < last)
            first = merged[number][0]
            if start + size <= total:
                out.append(read[number][start - first : start - first + size])
            else:
                out.append(np.take(read[number], np.arange(start, start + size) % total))
        return out

    def _read(self, item: Utterance, index: int, low: int, high: int, total: int, speed: float) -> np.ndarray:
        whole = self.whole(index) if index < self.kept else None
        own_rate = item.sample_rate if whole is None else self.sample_rate
        available = item.samples if whole is None else len(whole)
        rate = own_rate * speed / self.sample_rate  # samples there per sample here
        # Some context on both sides, so that the filter of the resampler has settled where the piece begins.
        margin = 0 if rate == 1 else min(int(low * rate), 256)
        first = int(low * rate) - margin
        last = available if high == total else min(available, first + margin + int(np.ceil((high - low) * rate)) + 256)
        if rate == 1:
            last = min(high, available)
        wav = (
            read_audio(item.path, first, last - first, sample_rate=None)[0]
            if whole is None
            else _float(whole[first:last])
        )
        return _fit(resample(wav, own_rate * speed, self.sample_rate)[int(round(margin / rate)) :], high - low)

    def whole(self, index: int) -> np.ndarray:
        """The whole recording at our rate, (samples,) int16, kept for the next time."""
        whole = self.decoded.get(index)
        if whole is None:
            item = self.manifest[index]
            wav = read_audio(item.path, 0, item.samples, sample_rate=self.sample_rate)[0]
            whole = np.clip(np.rint(wav * 32768), -32768, 32767).astype(np.int16)
            self.decoded[index] = whole
        return whole

    def first_usable(self, index: int, work: Callable[[int, str], object]) -> tuple[object, int, tuple[Fault, ...]]:
        """``work(i, tag)`` for the first utterance from ``index`` on for which it does not fail; what failed before.

        The tag goes into the random numbers: an utterance that stands in for another must not give the crops that it
        gives for itself, perhaps in the same batch.
        """
        faults = []
        for step in range(min(_TRIES, len(self.manifest))):
            candidate = (index + step) % len(self.manifest)
            try:
                tag = f" instead of {self.manifest[index].id}" if step else ""
                return work(candidate, tag), candidate, tuple(faults)
            except _Silent as problem:
                kind, why = "silent", str(problem)
            except BadAudio as problem:
                kind, why = "damaged" if isinstance(problem, DamagedAudio) else "unreadable", str(problem)
            except BadWaveform as problem:
                kind, why = "damaged", str(problem)
            except OSError as problem:
                kind, why = "unreadable", str(problem)
            faults.append(Fault(kind, self.manifest[candidate].path, why))
        shown = "\n  ".join(fault.why for fault in faults[:5])
        raise DataError(
            f"{len(faults)} utterances in a row cannot be used, from {self.manifest[index].path} on; is the disk "
            f"there, and is the manifest of this folder?\n  {shown}"
        )


class _Silent(BadWaveform):
    pass


def _float(wav: np.ndarray) -> np.ndarray:
    return wav.astype(np.float32) * np.float32(1 / 32768)


def _fit(wav: np.ndarray, samples: int) -> np.ndarray:
    """Cut to ``samples``, or repeat the last few: resamplers round lengths."""
    return wav[:samples] if len(wav) >= samples else np.pad(wav, (0, samples - len(wav)), mode="edge")


def _start(rng: np.random.Generator, total: int, size: int) -> int:
    """Where a crop of ``size`` of ``total`` samples begins; in a shorter utterance anywhere, since it goes round."""
    return int(rng.integers(total - size + 1)) if total >= size else int(rng.integers(total))


class _Dataset:
    """What the three datasets share."""

    source: _Source
    seed: int

    def __len__(self) -> int:
        return len(self.source.manifest)

    @property
    def manifest(self) -> Manifest:
        return self.source.manifest

    @property
    def sample_rate(self) -> int:
        return self.source.sample_rate

    def preload(self, progress: bool = True) -> None:
        """Decode now what the cache has room for, so that worker processes share it; the numbers stay the same."""
        from tqdm import tqdm

        todo = [index for index in range(self.source.kept) if index not in self.source.decoded]
        for index in tqdm(todo, desc="decoding", unit="file", disable=not progress or not todo, delay=2):
            try:
                self.source.whole(index)
            except (OSError, BadWaveform) as problem:
                log.debug("left for the run to report: %s", problem)


def _key(key: tuple[int, ...]) -> tuple[int, int, str]:
    """(epoch, index[, repeat]) -> epoch, index, suffix of the purpose of random numbers."""
    epoch, index, *repeat = key
    return int(epoch), int(index), f"#{repeat[0]}" if repeat else ""


class MultiCropDataset(_Dataset):
    """Global and local crops of one utterance, each augmented by itself (for DINO).

    Parameters
    ----------
    manifest : Manifest
    n_global, n_local : int
        Crops per utterance.
    global_seconds, local_seconds : float
        Their lengths. A shorter utterance goes round.
    augment : Augmenter, optional
        Applied to every crop with random numbers of its own.
    augment_local : Augmenter, optional
        Another one for local crops; None: the same.
    seed : int
    sample_rate : int
        Rate of the crops in Hz; files of another rate are resampled.
    cache_mb : float
        Keep recordings decoded (16-bit) up to this many MB; for small corpora. The crops are then those of 16-bit
        samples, which is what wav and flac files hold anyway.
    silence_db : float
        An utterance whose crops all stay below this peak (dB of full scale) is replaced by the next.

    ``dataset[(epoch, index)]`` is a :class:`MultiCrop`.

    >>> import soundfile, tempfile
    >>> name = tempfile.mkstemp(suffix=".wav")[1]
    >>> soundfile.write(name, np.random.default_rng(0).normal(0, 0.1, 48000), 16000)
    >>> one = Manifest(["a"], [48000], [16000], paths=[name])
    >>> dataset = MultiCropDataset(one, global_seconds=2.0, local_seconds=1.0)
    >>> crops = dataset[(0, 0)]
    >>> crops.global_crops.shape, crops.local_crops.shape
    ((2, 32000), (4, 16000))
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        n_global: int = 2,
        n_local: int = 4,
        global_seconds: float = 3.0,
        local_seconds: float = 2.0,
        augment: Augmenter | None = None,
        augment_local: Augmenter | None = None,
        seed: int = 0,
        sample_rate: int = 16000,
        cache_mb: float = 0.0,
        silence_db: float = -70.0,
    ):
        self.source = _Source(manifest, sample_rate, cache_mb, silence_db)
        self.sizes = _sizes(n_global, n_local, global_seconds, local_seconds, sample_rate)
        self.n_global = n_global
        self.augment = [augment] * n_global + [augment_local or augment] * n_local
        self.seed = int(seed)

    def __getitem__(self, key: tuple[int, ...]) -> MultiCrop:
        epoch, index, repeat = _key(key)

        def crops(candidate: int, tag: str) -> list[np.ndarray]:
            name = self.manifest[candidate].id
            total = self.source.length(candidate)
            # A generator per crop: changing the number of local crops leaves the global ones as they are.
            purposes = [f"crop {number}{repeat}{tag}" for number in range(len(self.sizes))]
            rngs = [random_for(self.seed, epoch, name, purpose) for purpose in purposes]
            starts = [_start(rng, total, size) for rng, size in zip(rngs, self.sizes, strict=True)]
            wavs = self.source.pieces(candidate, starts, self.sizes)
            return [
                wav if augment is None else augment(wav, rng)
                for wav, augment, rng in zip(wavs, self.augment, rngs, strict=True)
            ]

        wavs, used, faults = self.source.first_usable(index, crops)
        return MultiCrop(*_stacked(wavs, self.n_global), used, faults)


def _sizes(n_global: int, n_local: int, global_s: float, local_s: float, rate: float) -> list[int]:
    if n_global < 1 or n_local < 0 or global_s <= 0 or (n_local and local_s <= 0):
        raise ConfigError(
            f"got {n_global} global crops of {global_s} s and {n_local} local crops of {local_s} s; expected at least "
            "one global crop and lengths above 0"
        )
    return [int(round(global_s * rate))] * n_global + [int(round(local_s * rate))] * n_local


def _stacked(crops: list[np.ndarray], n_global: int) -> tuple[np.ndarray, np.ndarray]:
    local = np.stack(crops[n_global:]) if len(crops) > n_global else np.empty((0, *crops[0].shape), crops[0].dtype)
    return np.stack(crops[:n_global]), local


class LabelledCropDataset(_Dataset):
    """One crop and its class (for AAM-softmax); speech played faster or slower counts as other speakers.

    The class of speaker ``s`` at ``speeds[k]`` is ``s + k * n_speakers``, with ``speeds[0]`` = 1 the real speakers.

    Parameters
    ----------
    manifest : Manifest
        Every utterance needs a speaker.
    seconds : float
    speeds : sequence of float
        Drawn with equal chance; pitch changes with speed, which is why these are new speakers.
    augment, seed, sample_rate, cache_mb, silence_db
        As of :class:`MultiCropDataset`.

    Raises ConfigError if utterances have no speaker, or there is only one.

    >>> import soundfile, tempfile
    >>> name = tempfile.mkstemp(suffix=".wav")[1]
    >>> soundfile.write(name, np.random.default_rng(0).normal(0, 0.1, 48000), 16000)
    >>> two = Manifest(["a", "b"], [48000, 48000], [16000, 16000], ["ann", "bob"], paths=[name, name])
    >>> dataset = LabelledCropDataset(two, seconds=2.0)
    >>> dataset.n_classes, dataset[(0, 1)].wav.shape
    (6, (32000,))
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        seconds: float = 3.0,
        speeds: Sequence[float] = (1.0, 0.9, 1.1),
        augment: Augmenter | None = None,
        seed: int = 0,
        sample_rate: int = 16000,
        cache_mb: float = 0.0,
        silence_db: float = -70.0,
    ):
        if not manifest.labelled or len(manifest.speakers) < 2:
            unlabelled = int((manifest.labels < 0).sum())
            raise ConfigError(
                f"got {unlabelled} of {len(manifest)} utterances without a speaker and {len(manifest.speakers)} "
                "speakers, expected a speaker for each and at least 2; use folders <speaker>/<file>, or a list with "
                "'speaker path' lines"
            )
        if not speeds or speeds[0] != 1.0 or min(speeds) <= 0 or len(set(speeds)) != len(speeds):
            raise ConfigError(
                f"speeds: got {tuple(speeds)}, expected different positive numbers of which the first is 1"
            )
        self.source = _Source(manifest, sample_rate, cache_mb, silence_db)
        self.samples = _sizes(1, 0, seconds, 0, sample_rate)[0]
        self.speeds = tuple(float(speed) for speed in speeds)
        self.augment = augment
        self.seed = int(seed)

    @property
    def n_classes(self) -> int:
        """Speakers times speeds."""
        return len(self.manifest.speakers) * len(self.speeds)

    def __getitem__(self, key: tuple[int, ...]) -> LabelledCrop:
        epoch, index, repeat = _key(key)

        def crop(candidate: int, tag: str) -> tuple[np.ndarray, int]:
            rng = random_for(self.seed, epoch, self.manifest[candidate].id, f"labelled{repeat}{tag}")
            kind = int(rng.integers(len(self.speeds)))
            speed = self.speeds[kind]
            start = _start(rng, self.source.length(candidate, speed), self.samples)
            (wav,) = self.source.pieces(candidate, [start], [self.samples], speed)
            if self.augment is not None:
                wav = self.augment(wav, rng)
            return wav, int(self.manifest.labels[candidate]) + kind * len(self.manifest.speakers)

        (wav, label), used, faults = self.source.first_usable(index, crop)
        return LabelledCrop(wav, label, used, faults)


class CachedFeatureDataset(_Dataset):
    """Crops cut from features that were computed beforehand, of several augmented versions of every utterance.

    For corpora of hours rather than thousands of hours on few cores: noise, rooms, band limit and the front-end are
    paid once per version instead of once per crop. The versions of an utterance that its crops come from are drawn
    without repetition as long as there are enough.

    Parameters
    ----------
    manifest : Manifest
    features : callable, list of (samples,) float32 -> list of (frames, n_mels)
        For instance the front-end without mean normalisation; the crops are not normalised here.
    hop : int
        Samples per frame: a crop of ``seconds`` has ``int(seconds * sample_rate // hop)`` frames.
    versions : int
        Augmented versions of every utterance; version ``v`` of an utterance depends on ``seed``, it and ``v`` only.
    n_global, n_local, global_seconds, local_seconds, augment, seed, sample_rate, silence_db
        As of :class:`MultiCropDataset`.
    max_mb : float
        More memory than this is refused, with advice, before anything is computed.

    A version is computed when it is first needed; :meth:`preload` computes all now. ``dataset[(epoch, index)]`` is a
    :class:`MultiCrop` of float32 arrays (n, frames, n_mels); kept are 16-bit floats.

    >>> import soundfile, tempfile
    >>> name = tempfile.mkstemp(suffix=".wav")[1]
    >>> soundfile.write(name, np.random.default_rng(0).normal(0, 0.1, 48000), 16000)
    >>> def energies(wavs):
    ...     return [np.log(np.square(wav.reshape(-1, 160)).mean(1, keepdims=True)) for wav in wavs]
    >>> one = Manifest(["a"], [48000], [16000], paths=[name])
    >>> dataset = CachedFeatureDataset(one, features=energies, hop=160, global_seconds=2.0, local_seconds=1.0)
    >>> dataset[(0, 0)].global_crops.shape
    (2, 200, 1)
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        features: Callable[[list[np.ndarray]], list],
        hop: int,
        versions: int = 8,
        n_global: int = 2,
        n_local: int = 4,
        global_seconds: float = 3.0,
        local_seconds: float = 2.0,
        augment: Augmenter | None = None,
        seed: int = 0,
        sample_rate: int = 16000,
        silence_db: float = -70.0,
        max_mb: float = 4096.0,
    ):
        if versions < 1 or hop < 1:
            raise ConfigError(f"got versions={versions}, hop={hop}; expected at least 1 of both")
        self.source = _Source(manifest, sample_rate, 0.0, silence_db)
        _sizes(n_global, n_local, global_seconds, local_seconds, sample_rate)
        self.frames = [int(global_seconds * sample_rate // hop)] * n_global
        self.frames += [int(local_seconds * sample_rate // hop)] * n_local
        self.n_global = n_global
        self.features = features
        self.hop = int(hop)
        self.versions = int(versions)
        self.augment = augment
        self.seed = int(seed)
        self.max_mb = float(max_mb)
        self._kept: dict[tuple[int, int], np.ndarray] = {}
        self._checked = False

    def version(self, index: int, number: int) -> np.ndarray:
        """Features of version ``number`` of utterance ``index``: (frames, n_mels) float16."""
        kept = self._kept.get((index, number))
        if kept is None:
            item = self.manifest[index]
            (wav,) = self.source.pieces(index, [0], [self.source.length(index)])
            if self.augment is not None:
                wav = self.augment(wav, random_for(self.seed, 0, item.id, f"version {number}"))
            (out,) = self.features([wav])
            out = np.asarray(out)
            if out.ndim != 2 or not len(out):
                raise ConfigError(f"features: got shape {out.shape} for {item.path}, expected (frames, n_mels)")
            self._check_memory(out.shape[1])
            kept = self._kept[(index, number)] = out.astype(np.float16)
            if not np.isfinite(kept).all():
                raise ConfigError(f"features of {item.path} are not finite as 16-bit floats; give logarithms")
        return kept

    def _check_memory(self, n_mels: int) -> None:
        if self._checked:
            return
        needed = self.manifest.seconds * self.sample_rate / self.hop * n_mels * 2 * self.versions / 2**20
        if needed > self.max_mb:
            raise ConfigError(
                f"{self.versions} versions of {self.manifest.seconds / 3600:.1f} h of speech need {needed:.0f} MB, "
                f"allowed are max_mb={self.max_mb:.0f}; take fewer versions, or MultiCropDataset, which keeps nothing"
            )
        self._checked = True

    def preload(self, progress: bool = True) -> None:
        """Compute all versions of all utterances now; the numbers are the same as when computed on demand."""
        from tqdm import tqdm

        todo = [(index, number) for index in range(len(self)) for number in range(self.versions)]
        todo = [key for key in todo if key not in self._kept]
        for index, number in tqdm(todo, desc="computing features", unit="version", disable=not progress, delay=2):
            try:
                self.version(index, number)
            except (OSError, BadWaveform) as problem:
                log.debug("left for the run to report: %s", problem)

    def __getitem__(self, key: tuple[int, ...]) -> MultiCrop:
        epoch, index, repeat = _key(key)

        def crops(candidate: int, tag: str) -> list[np.ndarray]:
            rng = random_for(self.seed, epoch, self.manifest[candidate].id, f"frames{repeat}{tag}")
            order = np.resize(rng.permutation(self.versions), len(self.frames))
            out = []
            for number, size in zip(order, self.frames, strict=True):
                whole = self.version(candidate, int(number))
                start = _start(rng, len(whole), size)
                if start + size <= len(whole):
                    piece = whole[start : start + size]
                else:
                    piece = np.take(whole, np.arange(start, start + size) % len(whole), axis=0)
                out.append(piece.astype(np.float32))
            return out

        crops_of_it, used, faults = self.source.first_usable(index, crops)
        return MultiCrop(*_stacked(crops_of_it, self.n_global), used, faults)


# ---------------------------------------------------------------------------------------------- order
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
        self._order: tuple[int, np.ndarray] | None = None

    def order(self, epoch: int) -> np.ndarray:
        """Utterances of ``epoch`` in their order, (n,) int64 (several permutations where there are repeats)."""
        if self._order is None or self._order[0] != epoch:
            rng = random_for(self.seed, epoch, "", "order")
            self._order = epoch, np.concatenate([rng.permutation(self.n) for _ in range(self.repeats)])
        return self._order[1]

    def batch(self, epoch: int, number: int) -> list[tuple[int, ...]]:
        """Keys for the dataset of this process's part of batch ``number`` of ``epoch``."""
        if not 0 <= number < self.batches_per_epoch:
            raise IndexError(f"batch {number} of {self.batches_per_epoch} in an epoch")
        share = self.batch_size // self.world_size
        first = number * self.batch_size + self.rank * share
        order = self.order(epoch)
        keys: list[tuple[int, ...]] = []
        for position in range(first, first + share):
            repeat = position // self.n
            keys.append((epoch, int(order[position]), repeat) if repeat else (epoch, int(order[position])))
        return keys

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
    """

    global_crops: list[torch.Tensor]
    local_crops: list[torch.Tensor]
    epoch: int
    batch: int
    indices: torch.Tensor
    ids: list[str]


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
    arrays: list
    indices: list[int]
    faults: list[Fault] = field(default_factory=list)

    def pin_memory(self) -> _Collated:
        """Called by DataLoader, which knows nothing of this class."""
        return _Collated([array.pin_memory() for array in self.arrays], self.indices, self.faults)


def _collate(items: list) -> _Collated:
    """Runs in the worker: only a few large tensors go through shared memory."""
    import torch

    faults = [fault for item in items for fault in item.faults]
    if isinstance(items[0], LabelledCrop):
        arrays = [
            torch.from_numpy(np.stack([item.wav for item in items])),
            torch.tensor([item.label for item in items], dtype=torch.int64),
        ]
    else:
        arrays = [
            torch.from_numpy(np.ascontiguousarray(np.stack([getattr(item, name) for item in items], axis=1)))
            for name in ("global_crops", "local_crops")
        ]
    return _Collated(arrays, [item.index for item in items], faults)


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

    >>> import soundfile, tempfile
    >>> name = tempfile.mkstemp(suffix=".wav")[1]
    >>> soundfile.write(name, np.random.default_rng(0).normal(0, 0.1, 48000), 16000)
    >>> two = Manifest(["a", "b"], [48000, 48000], [16000, 16000], ["ann", "bob"], paths=[name, name])
    >>> loader = Loader(LabelledCropDataset(two, seconds=2.0), BatchSampler(2, 2))
    >>> tuple(next(loader).wavs.shape), next(loader).epoch
    ((2, 32000), 1)
    """

    def __init__(
        self,
        dataset: MultiCropDataset | LabelledCropDataset | CachedFeatureDataset,
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
        self.faults: Counter = Counter()
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

    def _begin(self) -> Iterator[_Collated]:
        import torch
        from torch.utils.data import DataLoader

        if self.workers:
            self.dataset.preload()  # before the workers are forked, so that they share it
        return iter(
            DataLoader(
                self.dataset,
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
            out = Batch(list(first), list(second), epoch, number, indices, ids)
        self.waited_seconds += time.perf_counter() - begin
        return out

    def _note(self, faults: Sequence[Fault]) -> None:
        for fault in faults:
            if fault.path in self._reported:
                continue
            self._reported.add(fault.path)
            self.faults[fault.kind] += 1
            log.warning("utterance replaced by the next one (%s): %s", fault.kind, fault.why)

    def state_dict(self) -> dict:
        """Position of the first batch that was not delivered yet, and what it is a position in."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "seed": self.sampler.seed,
            "batch_size": self.sampler.batch_size,
            "data_seed": self.dataset.seed,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping) -> None:
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
        self.seek(int(state["epoch"]), int(state["batch"]))

    def close(self) -> None:
        """End the workers; the position stays."""
        self._batches = None  # the iterator ends its workers when it is let go of


def measure_loader(
    loader: Loader, batches: int = 20, *, step: Callable[[object], object] | float = 0.0, warm_up: int = 2
) -> dict:
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
    >>> name = tempfile.mkstemp(suffix=".wav")[1]
    >>> soundfile.write(name, np.random.default_rng(0).normal(0, 0.1, 48000), 16000)
    >>> one = Manifest(["a"], [48000], [16000], paths=[name])
    >>> result = measure_loader(Loader(MultiCropDataset(one), BatchSampler(1, 1)), 3)
    >>> 0 < result["waiting_fraction"] <= 1
    True
    """
    if batches < 1:
        raise ConfigError(f"batches: got {batches}, expected at least 1")
    work = step if callable(step) else lambda batch: time.sleep(step)
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
