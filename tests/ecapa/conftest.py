"""Encoders of every dialect with random weights, small enough for tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from s3prl_speaker_upstreams.ecapa import DIALECTS, SpeakerEncoder


def _build(dialect: str, seed: int = 0, dtype: str = "float32", **changes) -> SpeakerEncoder:
    torch.manual_seed(seed)
    widths = {"channels": 32, "mfa_channels": 48, "embedding_dim": 12, "se_channels": 8, "attention_channels": 8}
    encoder = SpeakerEncoder(DIALECTS[dialect].ecapa_config(**{**widths, **changes}), DIALECTS[dialect].frontend, dtype)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            # Scales of both signs and one of zero: what folding must survive.
            module.weight.data.normal_(0.5, 1.0)
            module.weight.data[1] = 0.0
            module.bias.data.normal_(0, 0.5)
            module.running_mean.normal_(0.3, 0.3)
            module.running_var.uniform_(0.2, 1.0)
    return encoder.eval()


@pytest.fixture
def build() -> Callable[..., SpeakerEncoder]:
    """``build(dialect, seed=, dtype=, **config fields)`` -> SpeakerEncoder in eval mode."""
    return _build


@pytest.fixture
def speechlike() -> Callable[..., torch.Tensor]:
    """``speechlike(samples, seed)`` -> a waveform whose level and colour change, with digital silence in it."""

    def make(samples: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(samples + 8, generator=generator).unfold(0, 9, 1).mean(1)
        level = torch.rand(samples // 800 + 1, generator=generator).repeat_interleave(800)[:samples]
        wav = 0.3 * noise * level
        wav[samples // 3 : samples // 3 + samples // 10] = 0
        return wav

    return make
