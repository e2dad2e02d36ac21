"""Crops of utterances for training.

With :mod:`.sampler` and :mod:`.loader` three properties hold, and are tested:

* What an item is depends on seed, epoch and utterance only: crop positions and augmentation come from a generator keyed
  by these (:func:`.keyed.random_for`), so the number of workers, of processes and the order of reading change nothing.
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
>>> from s3prl_speaker_upstreams.data.loader import Loader
>>> from s3prl_speaker_upstreams.data.sampler import BatchSampler
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

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from s3prl_speaker_upstreams.data.augment import Augmenter
from s3prl_speaker_upstreams.data.keyed import random_for
from s3prl_speaker_upstreams.data.manifest import Manifest
from s3prl_speaker_upstreams.data.positives import Positives
from s3prl_speaker_upstreams.data.utterances import Fault, Utterances, fault_of, place
from s3prl_speaker_upstreams.errors import BadWaveform, ConfigError

__all__ = ["CropDataset", "LabelledCrop", "LabelledCropDataset", "MultiCrop", "MultiCropDataset"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MultiCrop:
    """Crops of one utterance: (n_global, samples) and (n_local, samples), or (n, frames, n_mels) of cached features.

    index : the utterance they are of. partner : that of every second global crop, see :mod:`.positives`.
    """

    global_crops: np.ndarray
    local_crops: np.ndarray
    index: int
    partner: int
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class LabelledCrop:
    """One crop (samples,) and its class."""

    wav: np.ndarray
    label: int
    index: int
    faults: tuple[Fault, ...] = ()


class CropDataset:
    """What the datasets share: recordings, a seed, and ``dataset[(epoch, index[, repeat])]``."""

    source: Utterances
    seed: int
    positives: Positives | None = None

    def __len__(self) -> int:
        return len(self.source.manifest)

    def __getitem__(self, key: tuple[int, ...]) -> MultiCrop | LabelledCrop:
        raise NotImplementedError

    @property
    def manifest(self) -> Manifest:
        """The utterances, by their numbers."""
        return self.source.manifest

    @property
    def sample_rate(self) -> int:
        """Hz of the waveforms."""
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

    def with_partner(
        self,
        epoch: int,
        index: int,
        purpose: str,
        crops: Callable[[int, Sequence[int]], list[np.ndarray]],
        n_global: int,
    ) -> tuple[list[np.ndarray], int, list[Fault]]:
        """Crops of an utterance, every second global one of its partner: crops, the partner, faults of it.

        ``crops(utterance, numbers)`` makes crops of one utterance. An unusable partner is replaced by the utterance
        itself.
        """
        total = self.n_crops
        partner = index if self.positives is None else self.positives.partner(epoch, index, purpose)
        theirs = list(range(1, n_global, 2)) if partner != index else []
        faults: list[Fault] = []
        made: dict[int, np.ndarray] = {}
        try:
            made.update(zip(theirs, crops(partner, theirs) if theirs else [], strict=True))
        except (BadWaveform, OSError) as problem:
            faults.append(fault_of(problem, self.manifest[partner].path))
            partner, theirs = index, []
        mine = [number for number in range(total) if number not in theirs]
        made.update(zip(mine, crops(index, mine), strict=True))
        return [made[number] for number in range(total)], partner, faults

    n_crops: int = 1


def split_key(key: tuple[int, ...]) -> tuple[int, int, str]:
    """(epoch, index[, repeat]) -> epoch, index, suffix of the purpose of random numbers."""
    epoch, index, *repeat = key
    return int(epoch), int(index), f"#{repeat[0]}" if repeat else ""


class MultiCropDataset(CropDataset):
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
    trim_db : float, optional
        Crops come from the speech only: from the first to the last frame less than this many dB (35, say) under the
        loudest. DINO takes crops for views of one speaker; where half a recording is silence, most have nothing in
        common.
    speeds : sequence of float
        Each utterance is played at one of these, drawn with equal chance, all its crops alike: speed changes the voice.
    positives : Positives, optional
        Every second global crop is of another utterance, see :mod:`.positives`.

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
        trim_db: float | None = None,
        speeds: Sequence[float] = (1.0,),
        positives: Positives | None = None,
    ):
        self.source = Utterances(manifest, sample_rate, cache_mb, silence_db, trim_db)
        self.sizes = crop_sizes(n_global, n_local, global_seconds, local_seconds, sample_rate)
        self.n_global = n_global
        self.n_crops = len(self.sizes)
        self.augment = [augment] * n_global + [augment_local or augment] * n_local
        self.seed = int(seed)
        self.speeds = checked_speeds(speeds)
        if positives is not None and n_global < 2:
            raise ConfigError("positives from other recordings need at least 2 global crops: every second is of those")
        self.positives = positives

    def __getitem__(self, key: tuple[int, ...]) -> MultiCrop:
        epoch, index, repeat = split_key(key)

        def crops(candidate: int, tag: str) -> tuple[list[np.ndarray], int, list[Fault]]:
            anchor = self.manifest[candidate].id
            speed = 1.0
            if len(self.speeds) > 1:
                rng = random_for(self.seed, epoch, anchor, f"speed{repeat}{tag}")
                speed = self.speeds[int(rng.integers(len(self.speeds)))]

            def of(utterance: int, numbers: Sequence[int]) -> list[np.ndarray]:
                total = self.source.length(utterance, speed)
                # A generator per crop: changing the number of local crops leaves the global ones as they are.
                rngs = [random_for(self.seed, epoch, anchor, f"crop {number}{repeat}{tag}") for number in numbers]
                sizes = [self.sizes[number] for number in numbers]
                starts = [place(rng, total, size) for rng, size in zip(rngs, sizes, strict=True)]
                wavs = self.source.pieces(utterance, starts, sizes, speed)
                ways = [self.augment[number] for number in numbers]
                return [
                    wav if augment is None else augment(wav, rng)
                    for wav, augment, rng in zip(wavs, ways, rngs, strict=True)
                ]

            return self.with_partner(epoch, candidate, f"{repeat}{tag}", of, self.n_global)

        (wavs, partner, partners_faults), used, faults = self.source.first_usable(index, crops)
        return MultiCrop(*stacked(wavs, self.n_global), used, partner, (*faults, *partners_faults))


def checked_speeds(speeds: Sequence[float]) -> tuple[float, ...]:
    """``speeds`` as a tuple; ConfigError unless they are different positive numbers of which the first is 1."""
    if not speeds or speeds[0] != 1.0 or min(speeds) <= 0 or len(set(speeds)) != len(speeds):
        raise ConfigError(f"speeds: got {tuple(speeds)}, expected different positive numbers of which the first is 1")
    return tuple(float(speed) for speed in speeds)


def crop_sizes(n_global: int, n_local: int, global_s: float, local_s: float, rate: float) -> list[int]:
    """Samples of every crop, global ones first."""
    if n_global < 1 or n_local < 0 or global_s <= 0 or (n_local and local_s <= 0):
        raise ConfigError(
            f"got {n_global} global crops of {global_s} s and {n_local} local crops of {local_s} s; expected at least "
            "one global crop and lengths above 0"
        )
    return [int(round(global_s * rate))] * n_global + [int(round(local_s * rate))] * n_local


def stacked(crops: list[np.ndarray], n_global: int) -> tuple[np.ndarray, np.ndarray]:
    """Global crops and local crops, each as one array."""
    local = np.stack(crops[n_global:]) if len(crops) > n_global else np.empty((0, *crops[0].shape), crops[0].dtype)
    return np.stack(crops[:n_global]), local


class LabelledCropDataset(CropDataset):
    """One crop and its class (for AAM-softmax); speech played faster or slower counts as other speakers.

    The class of speaker ``s`` at ``speeds[k]`` is ``s + k * n_speakers``, with ``speeds[0]`` = 1 the real speakers.

    Parameters
    ----------
    manifest : Manifest
        Every utterance needs a speaker.
    seconds : float
    speeds : sequence of float
        Drawn with equal chance; pitch changes with speed, which is why these are new speakers.
    augment, seed, sample_rate, cache_mb, silence_db, trim_db
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
        trim_db: float | None = None,
    ):
        if not manifest.labelled or len(manifest.speakers) < 2:
            unlabelled = int((manifest.labels < 0).sum())
            raise ConfigError(
                f"got {unlabelled} of {len(manifest)} utterances without a speaker and {len(manifest.speakers)} "
                "speakers, expected a speaker for each and at least 2; use folders <speaker>/<file>, or a list with "
                "'speaker path' lines"
            )
        self.source = Utterances(manifest, sample_rate, cache_mb, silence_db, trim_db)
        self.samples = crop_sizes(1, 0, seconds, 0, sample_rate)[0]
        self.speeds = checked_speeds(speeds)
        self.augment = augment
        self.seed = int(seed)

    @property
    def n_classes(self) -> int:
        """Speakers times speeds."""
        return len(self.manifest.speakers) * len(self.speeds)

    def __getitem__(self, key: tuple[int, ...]) -> LabelledCrop:
        epoch, index, repeat = split_key(key)

        def crop(candidate: int, tag: str) -> tuple[np.ndarray, int]:
            rng = random_for(self.seed, epoch, self.manifest[candidate].id, f"labelled{repeat}{tag}")
            kind = int(rng.integers(len(self.speeds)))
            speed = self.speeds[kind]
            start = place(rng, self.source.length(candidate, speed), self.samples)
            (wav,) = self.source.pieces(candidate, [start], [self.samples], speed)
            if self.augment is not None:
                wav = self.augment(wav, rng)
            return wav, int(self.manifest.labels[candidate]) + kind * len(self.manifest.speakers)

        (wav, label), used, faults = self.source.first_usable(index, crop)
        return LabelledCrop(wav, label, used, faults)
