"""Speech to train on: lists and folders, manifests, crops, augmentation and the loader.

The names that most users need can be imported from here; each is loaded from its module when it is first asked for.

>>> from s3prl_speaker_upstreams import data
>>> data.BatchSampler.__module__
's3prl_speaker_upstreams.data.sampler'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s3prl_speaker_upstreams.data.augment import AugmentConfig, Augmenter
    from s3prl_speaker_upstreams.data.cached import CachedFeatureDataset
    from s3prl_speaker_upstreams.data.datasets import LabelledCropDataset, MultiCropDataset
    from s3prl_speaker_upstreams.data.lists import read_listing
    from s3prl_speaker_upstreams.data.loader import Loader
    from s3prl_speaker_upstreams.data.manifest import Manifest, build_manifest
    from s3prl_speaker_upstreams.data.positives import ClusterPositives, SpeakerPositives
    from s3prl_speaker_upstreams.data.sampler import BalancedBatchSampler, BatchSampler

_MODULES = {
    "AugmentConfig": "augment",
    "Augmenter": "augment",
    "BalancedBatchSampler": "sampler",
    "BatchSampler": "sampler",
    "CachedFeatureDataset": "cached",
    "ClusterPositives": "positives",
    "LabelledCropDataset": "datasets",
    "Loader": "loader",
    "Manifest": "manifest",
    "MultiCropDataset": "datasets",
    "SpeakerPositives": "positives",
    "build_manifest": "manifest",
    "read_listing": "lists",
}

__all__ = [
    "AugmentConfig",
    "Augmenter",
    "BalancedBatchSampler",
    "BatchSampler",
    "CachedFeatureDataset",
    "ClusterPositives",
    "LabelledCropDataset",
    "Loader",
    "Manifest",
    "MultiCropDataset",
    "SpeakerPositives",
    "build_manifest",
    "read_listing",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
