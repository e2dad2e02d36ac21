"""SpecAugment: spans of frames and bands of features set to zero, which is their mean (arXiv 1904.08779)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from s3prl_speaker_upstreams.data.augment import AugmentConfig
from s3prl_speaker_upstreams.data.keyed import random_for

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["mask_features"]


def mask_features(
    features: Tensor, config: AugmentConfig, *, ids: Sequence[str], epoch: int, seed: int, purpose: str = ""
) -> Tensor:
    """``features`` (rows, frames, n_mels), normalised, with ``config``'s masks: a copy.

    ids : the utterance of every row; it, ``epoch``, ``seed`` and ``purpose`` (which crop) decide the masks, so that
        processes, batches and restarts change nothing.

    >>> import torch
    >>> config = AugmentConfig(mask_p=1.0, time_masks=1, time_frames=5, mel_masks=1, mel_bands=3)
    >>> masked = mask_features(torch.ones(2, 20, 10), config, ids=["a", "b"], epoch=0, seed=0)
    >>> bool((masked == 0).any()), masked.shape
    (True, torch.Size([2, 20, 10]))
    """
    import torch

    rows, frames, mels = features.shape
    keep = np.ones((rows, frames, 1), dtype=bool), np.ones((rows, 1, mels), dtype=bool)
    for row, name in enumerate(ids):
        rng = random_for(seed, epoch, name, f"mask {purpose}")
        if rng.random() >= config.mask_p:
            continue
        for flags, count, widest in (
            (keep[0][row, :, 0], config.time_masks, config.time_frames),
            (keep[1][row, 0], config.mel_masks, config.mel_bands),
        ):
            for _ in range(count):
                width = int(rng.integers(min(widest, len(flags)) + 1))
                start = int(rng.integers(len(flags) - width + 1))
                flags[start : start + width] = False
    both = [torch.from_numpy(flags).to(features.device) for flags in keep]
    return features * both[0] * both[1]
