"""Configuration to running parts: manifest, augmentation, loader, trial list, trainer."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.audio import find_audio
from ..common.digests import json_sha256
from ..data.augment import AugmentConfig, Augmenter
from ..ecapa import Frontend, SpeakerEncoder
from ..errors import ConfigError
from .checkpointing import CheckpointStore
from .config import PretrainConfig
from .objective import model_configs
from .ranks import is_main, rank, world_size
from .start import adopted
from .trainer import Trainer, pick_device, start_distributed

__all__ = ["build_trainer", "make_augmenter", "make_manifest"]

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16000


def make_manifest(config: PretrainConfig) -> Any:
    """One manifest of all ``data.train`` folders and lists; several are put one behind the other."""
    from ..data.manifest import build_manifest, join_manifests

    data = config.data
    if not data.train:
        raise ConfigError("data.train is empty: pass --data FOLDER (wav or flac), or a list file of paths")
    cache = Path(data.manifest_cache) if data.manifest_cache else None
    parts = []
    for source in data.train:
        if not Path(source).exists():
            raise ConfigError(f"data.train: there is no folder or list of speech at {source}")
        part = build_manifest(
            source,
            layout=data.layout,
            min_seconds=data.min_seconds,
            silence_db=data.silence_db,
            cache=cache,
            progress=is_main(),
        )
        logger.info("%s: %s", source, part.report)
        parts.append(part)
    manifest = join_manifests(parts, data.train)
    if is_main():
        logger.info("layout %r: %s", manifest.report.layout, manifest.describe_speakers())
    return manifest


def recordings_digest(source: str | Sequence[str] | None) -> str | None:
    """Identity of a folder, list file or list of recordings by names and sizes, wherever it is; None for none.

    >>> recordings_digest(None) is None
    True
    """
    if source is None:
        return None
    names: list[tuple[str, int]] = []
    for place in [source] if isinstance(source, str) else source:
        root = Path(place)
        files = find_audio(root) if root.is_dir() else [root] if root.exists() else []
        names += [(str(f.relative_to(root)) if f != root else f.name, f.stat().st_size) for f in files]
    return json_sha256(names)


def make_augmenter(config: AugmentConfig) -> Augmenter | None:
    """The augmenter, or None where nothing is switched on."""
    on = config.noise or config.rirs or config.band_limit_hz or config.equaliser_p or config.band_p
    on = on or config.gain_p or config.codec_p
    return Augmenter(config, sample_rate=SAMPLE_RATE) if on else None


def _log_mels(config: PretrainConfig) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    """Front-end before normalisation, NumPy in and out."""
    _, frontend_config = model_configs(config.model)
    frontend = Frontend(frontend_config)

    @torch.no_grad()
    def features(wavs: list[np.ndarray]) -> list[np.ndarray]:
        ragged = frontend.raw([torch.from_numpy(np.ascontiguousarray(w, dtype=np.float32)) for w in wavs])
        return [x.numpy() for x in ragged.split()]

    return features


def make_positives(config: PretrainConfig, manifest: Any) -> Any:
    """Where positives come from other recordings: the selection that ``data.positives`` names; else None."""
    from .. import data as pipeline

    kind = config.data.positives
    if kind == "same_utterance":
        return None
    if kind == "clusters":
        return pipeline.ClusterPositives(manifest, config.data.cluster_nearest, config.run.seed)
    return pipeline.SpeakerPositives(manifest, kind, config.run.seed)


def make_loader(config: PretrainConfig, manifest: Any) -> tuple[Any, int, int]:
    """(loader, batches an epoch, classes) for this process."""
    from .. import data as pipeline

    data, run = config.data, config.run
    augmenter = make_augmenter(data.augment)
    speakers = 0
    dataset: pipeline.LabelledCropDataset | pipeline.CachedFeatureDataset | pipeline.MultiCropDataset
    if config.method == "supervised":
        if not manifest.labelled or len(manifest.speakers) < 2:
            raise ConfigError(
                f"supervised training: got {int((manifest.labels < 0).sum())} of {len(manifest)} utterances without a "
                f"speaker and {len(manifest.speakers)} speakers, expected a speaker for each and at least 2; use "
                "folders <speaker>/<file>, or a list with 'speaker path' lines"
            )
        speakers = len(manifest.speakers)
    if not config.multi_crop:
        dataset = pipeline.LabelledCropDataset(
            manifest,
            seconds=data.seconds,
            speeds=tuple(data.speeds),
            augment=augmenter,
            seed=run.seed,
            sample_rate=SAMPLE_RATE,
            cache_mb=data.cache_mb,
            trim_db=data.trim_db,
        )
        kinds = data.speed_classes or len(data.speeds)
        if kinds < len(data.speeds):
            raise ConfigError(f"data.speed_classes={kinds}: fewer than the {len(data.speeds)} speeds")
        speakers *= kinds
    else:
        crops: dict[str, Any] = {
            "n_global": data.global_crops,
            "n_local": data.local_crops,
            "global_seconds": data.global_seconds,
            "local_seconds": data.local_seconds,
            "augment": augmenter,
            "seed": run.seed,
            "sample_rate": SAMPLE_RATE,
            "trim_db": data.trim_db,
            "positives": make_positives(config, manifest),
        }
        if data.feature_versions:
            dataset = pipeline.CachedFeatureDataset(
                manifest,
                features=_log_mels(config),
                hop=model_configs(config.model)[1].hop_length,
                versions=data.feature_versions,
                **crops,
            )
            dataset.preload(progress=is_main())
        else:
            dataset = pipeline.MultiCropDataset(
                manifest, cache_mb=data.cache_mb, speeds=tuple(data.view_speeds), **crops
            )
    share: dict[str, Any] = {"seed": run.seed, "rank": rank(), "world_size": world_size()}
    sampler: pipeline.BatchSampler
    if data.balance_speakers:
        sampler = pipeline.BalancedBatchSampler(manifest.labels, run.batch * world_size(), **share)
    else:
        sampler = pipeline.BatchSampler(len(manifest), run.batch * world_size(), **share)
    pin = run.device != "cpu" and torch.cuda.is_available()
    loader = pipeline.Loader(dataset, sampler, workers=data.workers, prefetch=data.prefetch, pin_memory=pin)
    return loader, sampler.batches_per_epoch, speakers


def find_trials(config: PretrainConfig) -> tuple[str, str]:
    """Trial list and folder of its recordings, ("", "") without one; ConfigError if recordings are missing."""
    if config.eval.trials is None:
        return "", ""
    from ..verification.evaluate import find_recordings

    root = config.eval.root or str(Path(config.eval.trials).parent)
    find_recordings(config.eval.trials, root)
    return config.eval.trials, root


def make_evaluation(config: PretrainConfig, manifest: Any) -> Callable[[SpeakerEncoder], dict[str, float]] | None:
    """Verification on ``eval.trials``, or None without a trial list; all processes call it, and share the work.

    By cosine, plain (``eer``) and after the mean of 300 recordings of the training speech was subtracted
    (``mean_eer``), on the run's device.
    """
    if config.eval.trials is None:
        return None
    from ..verification.evaluate import choose_cohort, verification
    from ..verification.parallel import Ranks

    trials, root = find_trials(config)
    cohort = manifest.subset(choose_cohort(manifest, 300))
    device = pick_device(config.run.device)

    def evaluate(encoder: SpeakerEncoder) -> dict[str, float]:
        result = verification(encoder, trials, root, cohort=cohort, device=device, ranks=Ranks.current())
        return {k: v for k, v in result.items() if isinstance(v, float) and not k.startswith("asnorm")}

    return evaluate


def build_trainer(config: PretrainConfig, out: str | Path, *, changed_config: bool = False) -> Trainer:
    """Everything of a run, in this process; joins torchrun's group first."""
    if config.missing and not CheckpointStore(Path(out) / "checkpoints").paths():
        raise ConfigError("; ".join(config.missing))
    device = pick_device(config.run.device)
    start_distributed(device)
    find_trials(config)  # a wrong list is found now, not hours later at the first evaluation
    model, start = adopted(config.model, out)
    config = dataclasses.replace(config, model=model)
    manifest = make_manifest(config)
    loader, batches, classes = make_loader(config, manifest)
    data = {
        "sources": [str(Path(s).name) for s in config.data.train],
        "fingerprint": manifest.fingerprint,
        "utterances": len(manifest),
        "hours": round(float(manifest.seconds) / 3600, 4),
        "speakers": len(manifest.speakers) if config.method == "supervised" else 0,
        "speaker_names": json_sha256(list(manifest.speakers)) if config.method == "supervised" else None,
        "noise": recordings_digest(config.data.augment.noise),
        "rirs": recordings_digest(config.data.augment.rirs),
    }
    return Trainer(
        config,
        out,
        loader=loader,
        batches_per_epoch=batches,
        classes=classes,
        speakers=torch.as_tensor(manifest.labels) if config.method == "supervised" else None,
        start=start,
        data=data,
        evaluate=make_evaluation(config, manifest),
        changed_config=changed_config,
    )
