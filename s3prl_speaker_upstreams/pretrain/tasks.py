"""What is learned: DINO or AAM-softmax around one encoder, behind one interface that the trainer drives.

A task turns a loader's batch into inputs, inputs into this process's loss, and knows its own schedules and metrics.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ecapa import Ecapa, EcapaConfig, Frontend, FrontendConfig, Ragged, SpeakerEncoder
from ..ecapa.config import DIALECTS
from ..errors import ConfigError
from .aam import AamSoftmax, margin_at
from .config import ModelConfig, PretrainConfig, duration_steps
from .dino import Dino

__all__ = ["CropEncoder", "DinoTask", "Features", "SupervisedTask", "cosine", "model_configs"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def model_configs(model: ModelConfig) -> tuple[EcapaConfig, FrontendConfig]:
    """The network's and the front-end's configuration of a ``model`` section.

    Raises ConfigError if the dialect or a field is unknown.
    """
    if model.dialect not in DIALECTS:
        raise ConfigError(f"model.dialect {model.dialect!r} is unknown; valid: {', '.join(DIALECTS)}")
    dialect = DIALECTS[model.dialect]
    return dialect.ecapa_config(**model.ecapa), dialect.frontend.replace(**model.frontend)


def cosine(step: int, total: int, start: float, end: float) -> float:
    """``start`` at step 0 falling (or rising) along half a cosine to ``end`` at ``total``.

    >>> [round(cosine(s, 10, 1.0, 0.0), 3) for s in (0, 5, 10)]
    [1.0, 0.5, 0.0]
    """
    part = min(max(step / max(total, 1), 0.0), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * part))


class Features(nn.Module):
    """Equally long crops to normalised log-mel features, without gradient and in float32.

    Waveform crops ``(rows, samples)`` go through the front-end; cached log-mel crops ``(rows, frames, n_mels)``, which
    were computed before normalisation, are normalised as the front-end would.
    """

    def __init__(self, config: FrontendConfig) -> None:
        super().__init__()
        self.config, self.frontend = config, Frontend(config)

    @torch.no_grad()
    def forward(self, crops: Tensor) -> Tensor:
        """-> (rows, frames, n_mels)"""
        if crops.dim() == 2:
            ragged = self.frontend(list(crops.float().unbind(0)))
            return ragged.data.view(crops.shape[0], -1, ragged.data.shape[1])
        x = crops.float()
        if self.config.normalisation != "none":
            x = x - x.mean(1, keepdim=True)
        if self.config.normalisation == "mean_var":
            x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.config.norm_eps)
        return x


class CropEncoder(nn.Module):
    """ECAPA-TDNN on equally long crops, in float32, bfloat16 or float16 (parameters stay float32)."""

    def __init__(self, ecapa: Ecapa, precision: str = "fp32") -> None:
        super().__init__()
        self.ecapa, self.precision = ecapa, precision

    def forward(self, features: Tensor) -> Tensor:
        """features : (rows, frames, n_mels) -> embeddings (rows, dim) float32"""
        rows, frames, n_mels = features.shape
        ragged = Ragged(features.reshape(-1, n_mels), [frames] * rows)
        low = self.precision != "fp32"
        with torch.autocast(features.device.type, dtype=_DTYPES.get(self.precision), enabled=low):
            return self.ecapa(ragged, outputs=("embedding",))["embedding"].float()


class DinoTask(nn.Module):
    """Self-distillation on multi-crop batches."""

    role = "teacher"

    def __init__(self, config: PretrainConfig, total_steps: int, steps_per_epoch: int) -> None:
        super().__init__()
        self.config = config
        self.ecapa_config, self.frontend_config = model_configs(config.model)
        self.features = Features(self.frontend_config)
        self.core = Dino(
            CropEncoder(Ecapa(self.ecapa_config), config.run.precision), self.ecapa_config.embedding_dim, config.dino
        )
        self.total_steps = total_steps

        def steps(text: str) -> int:
            return duration_steps(text, steps_per_epoch, total_steps)

        dino = config.dino
        self._temp_steps = steps(dino.teacher_temp_warmup)
        self._freeze_steps = steps(dino.freeze_last_layer)
        self._regularisation_steps = steps(dino.regularisation_warmup)
        self._momentum = dino.momentum
        balanced = "Sinkhorn-Knopp" if dino.targets == "sinkhorn" else "the centre"
        self.batch_statistics = f"BatchNorm, {balanced}{' and KoLeo' if dino.koleo else ''}"

    def inputs(self, batch: Any, device: torch.device) -> tuple[list[Tensor], tuple[int, int]]:
        """A loader's batch as (features per crop length, (global crops, local crops)); rows crop by crop."""
        groups = [torch.cat(list(batch.global_crops))]
        if len(batch.local_crops):
            groups.append(torch.cat(list(batch.local_crops)))
        features = [self.features(g.to(device, non_blocking=True)) for g in groups]
        return features, (len(batch.global_crops), len(batch.local_crops))

    def forward(self, inputs: tuple[list[Tensor], tuple[int, int]]) -> Tensor:
        """This process's loss."""
        return self.core(*inputs)

    def set_step(self, step: int) -> dict[str, float]:
        """Set temperature, momentum and weights for the optimizer step ``step`` (0-based); returns what to log."""
        dino = self.config.dino
        warm = min(step / self._temp_steps, 1.0) if self._temp_steps else 1.0
        self.core.teacher_temp = dino.warmup_teacher_temp + (dino.teacher_temp - dino.warmup_teacher_temp) * warm
        self._momentum = cosine(step, self.total_steps, dino.momentum, dino.momentum_end)
        warm = min(step / self._regularisation_steps, 1.0) if self._regularisation_steps else 1.0
        self.core.regularisation = (
            dino.regularisation_start + (dino.regularisation_weight - dino.regularisation_start) * warm
        )
        self._step = step
        return {"momentum": self._momentum, "teacher_temp": self.core.teacher_temp}

    def after_backward(self) -> None:
        """Drop the last layer's gradient while it is frozen: moving prototypes too early is unstable."""
        if self._step < self._freeze_steps:
            self.core.student.head.last_layer.weight.grad = None

    def after_step(self) -> None:
        """Move the teacher."""
        self.core.update_teacher(self._momentum)

    def metrics(self) -> dict[str, float]:
        """See :meth:`.dino.Dino.metrics`."""
        return self.core.metrics()

    def encoder(self, role: str = "teacher") -> SpeakerEncoder:
        """A copy of the teacher (or ``role="student"``) with its front-end, in eval mode on CPU."""
        branch = self.core.student if role == "student" else self.core.teacher
        return _speaker_encoder(branch.encoder.ecapa, self.ecapa_config, self.frontend_config)

    def load_encoder_state(self, state: dict[str, Tensor]) -> None:
        """Start student and teacher from an encoder's weights."""
        self.core.student.encoder.ecapa.load_state_dict(state)
        self.core.teacher.encoder.ecapa.load_state_dict(state)


class SupervisedTask(nn.Module):
    """Speaker classification by AAM-softmax."""

    role = "supervised"

    def __init__(self, config: PretrainConfig, total_steps: int, steps_per_epoch: int, classes: int) -> None:
        super().__init__()
        self.config = config
        self.ecapa_config, self.frontend_config = model_configs(config.model)
        self.features = Features(self.frontend_config)
        self.encoder_ = CropEncoder(Ecapa(self.ecapa_config), config.run.precision)
        aam = config.aam
        self.head = AamSoftmax(
            self.ecapa_config.embedding_dim, classes, scale=aam.scale, margin=aam.margin, sub_centres=aam.sub_centres
        )
        self._margin_steps = (
            duration_steps(aam.margin_start, steps_per_epoch, total_steps),
            duration_steps(aam.margin_end, steps_per_epoch, total_steps),
        )
        self._accuracy = torch.zeros(())
        self.batch_statistics = "BatchNorm's statistics"

    def inputs(self, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """A loader's batch as (features, labels)."""
        return self.features(batch.wavs.to(device, non_blocking=True)), batch.labels.to(device)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """This process's loss."""
        features, labels = inputs
        loss, self._accuracy = self.head(self.encoder_(features), labels)
        return loss

    def set_step(self, step: int) -> dict[str, float]:
        """Set the margin for the optimizer step ``step``."""
        aam = self.config.aam
        start, end = self._margin_steps
        self.head.margin = margin_at(
            step, start=start, end=end, initial=aam.initial_margin, final=aam.margin, shape=aam.margin_shape
        )
        return {"margin": self.head.margin}

    def after_backward(self) -> None:
        """Nothing to do."""

    def after_step(self) -> None:
        """Nothing to do."""

    def metrics(self) -> dict[str, float]:
        """Accuracy of the last batch."""
        return {"accuracy": float(self._accuracy)}

    def encoder(self, role: str = "supervised") -> SpeakerEncoder:
        """A copy of the network with its front-end, in eval mode on CPU."""
        return _speaker_encoder(self.encoder_.ecapa, self.ecapa_config, self.frontend_config)

    def load_encoder_state(self, state: dict[str, Tensor]) -> None:
        """Start from an encoder's weights."""
        self.encoder_.ecapa.load_state_dict(state)


def _speaker_encoder(ecapa: nn.Module, config: EcapaConfig, frontend: FrontendConfig) -> SpeakerEncoder:
    encoder = SpeakerEncoder(config, frontend)
    encoder.ecapa.load_state_dict({k: v.detach().cpu() for k, v in ecapa.state_dict().items()})
    return encoder.eval()
