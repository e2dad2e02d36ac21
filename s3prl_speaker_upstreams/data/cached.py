"""Crops of features that were computed beforehand: for small corpora on few cores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from s3prl_speaker_upstreams.data.augment import Augmenter
from s3prl_speaker_upstreams.data.datasets import CropDataset, MultiCrop, crop_sizes, split_key, stacked
from s3prl_speaker_upstreams.data.keyed import random_for
from s3prl_speaker_upstreams.data.manifest import Manifest
from s3prl_speaker_upstreams.data.positives import Positives
from s3prl_speaker_upstreams.data.utterances import Fault, Utterances, place
from s3prl_speaker_upstreams.errors import BadWaveform, ConfigError

__all__ = ["CachedFeatureDataset"]

log = logging.getLogger(__name__)


class CachedFeatureDataset(CropDataset):
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
    n_global, n_local, global_seconds, local_seconds, augment, seed, sample_rate, silence_db, trim_db, positives
        As of :class:`.datasets.MultiCropDataset`.
    max_mb : float
        More memory than this is refused, with advice, before anything is computed.

    A version is computed when it is first needed; :meth:`preload` computes all now. ``dataset[(epoch, index)]`` is a
    :class:`.datasets.MultiCrop` of float32 arrays (n, frames, n_mels); kept are 16-bit floats.

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
        features: Callable[[list[np.ndarray]], list[np.ndarray]],
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
        trim_db: float | None = None,
        positives: Positives | None = None,
        max_mb: float = 4096.0,
    ):
        if versions < 1 or hop < 1:
            raise ConfigError(f"got versions={versions}, hop={hop}; expected at least 1 of both")
        self.source = Utterances(manifest, sample_rate, 0.0, silence_db, trim_db)
        crop_sizes(n_global, n_local, global_seconds, local_seconds, sample_rate)
        self.frames = [int(global_seconds * sample_rate // hop)] * n_global
        self.frames += [int(local_seconds * sample_rate // hop)] * n_local
        self.n_global, self.n_crops = n_global, n_global + n_local
        self.positives = positives
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
        epoch, index, repeat = split_key(key)

        def crops(candidate: int, tag: str) -> tuple[list[np.ndarray], int, list[Fault]]:
            def of(utterance: int, numbers: Sequence[int]) -> list[np.ndarray]:
                purpose = f"frames{repeat}{tag}" + ("" if utterance == candidate else " of its partner")
                rng = random_for(self.seed, epoch, self.manifest[candidate].id, purpose)
                order = np.resize(rng.permutation(self.versions), self.n_crops)
                out = []
                for number in numbers:
                    whole, size = self.version(utterance, int(order[number])), self.frames[number]
                    start = place(rng, len(whole), size)
                    if start + size <= len(whole):
                        piece = whole[start : start + size]
                    else:
                        piece = np.take(whole, np.arange(start, start + size) % len(whole), axis=0)
                    out.append(piece.astype(np.float32))
                return out

            return self.with_partner(epoch, candidate, f"{repeat}{tag}", of, self.n_global)

        (features, partner, partners_faults), used, faults = self.source.first_usable(index, crops)
        return MultiCrop(*stacked(features, self.n_global), used, partner, (*faults, *partners_faults))
