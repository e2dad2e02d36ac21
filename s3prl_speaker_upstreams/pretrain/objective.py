"""What a run learns: the interface that the trainer drives, and the parts that all objectives share.

An objective maps features of crops to a loss. :func:`.objectives.build_objective` makes the one that ``method``
names; each stands in a module of its own: :mod:`.dino` (DINO, RDINO, SDPN), :mod:`.supervised` (AAM-softmax, softmax),
:mod:`.pairs` (SimCLR, VICReg).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..data.augment import AugmentConfig
from ..data.masking import mask_features
from ..ecapa import Ecapa, EcapaConfig, Frontend, FrontendConfig, Ragged, SpeakerEncoder
from ..ecapa.config import DIALECTS
from ..ecapa.wave import GaborBank
from ..errors import ConfigError
from .config import ModelConfig

__all__ = [
    "ENCODERS",
    "CropEncoder",
    "CropFeatures",
    "Crops",
    "Objective",
    "model_configs",
    "parameter_groups",
    "roles_of",
    "speaker_encoder",
]

logger = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Where the encoder of each role is in an objective's state; the first one is what is exported unless told otherwise.
ENCODERS: dict[str, dict[str, str]] = {
    "dino": {"teacher": "teacher.encoder.ecapa.", "student": "student.encoder.ecapa."},
    "supervised": {"supervised": "encoder.ecapa."},
    "simclr": {"student": "encoder.ecapa."},
    "vicreg": {"student": "encoder.ecapa."},
}


def roles_of(method: str) -> tuple[str, ...]:
    """Roles of the networks that a run of ``method`` trains, the default first.

    >>> roles_of("dino"), roles_of("supervised")
    (('teacher', 'student'), ('supervised',))
    """
    return tuple(ENCODERS[method])


def model_configs(model: ModelConfig) -> tuple[EcapaConfig, FrontendConfig]:
    """The network's and the front-end's configuration of a ``model`` section.

    Raises ConfigError if the dialect or a field is unknown.
    """
    if model.dialect not in DIALECTS:
        raise ConfigError(f"model.dialect {model.dialect!r} is unknown; valid: {', '.join(DIALECTS)}")
    dialect = DIALECTS[model.dialect]
    frontend = dialect.frontend.replace(**model.frontend)
    # the network's first convolution takes what the front-end gives
    return dialect.ecapa_config(**{"n_mels": frontend.width, **model.ecapa}), frontend


class Crops(NamedTuple):
    """Features of a batch: ``features`` one tensor (rows, frames, n_mels) per crop length, the long ones first, rows
    ordered crop by crop (all utterances' first crop, then all their second, ...); ``views`` = (long, short) crops of
    each utterance; ``labels`` (utterances,) int64 or None."""

    features: list[Tensor]
    views: tuple[int, int]
    labels: Tensor | None = None


class CropFeatures(nn.Module):
    """A loader's batch to normalised log-mel features, without gradient and in float32.

    Waveform crops ``(rows, samples)`` go through the front-end; cached log-mel crops ``(rows, frames, n_mels)``, which
    were computed before normalisation, are normalised as the front-end would. Of ``kind: wave`` the crops stay
    waveforms: the filters belong to the network that is trained.
    """

    def __init__(
        self,
        config: FrontendConfig,
        speakers: Tensor | None = None,
        masks: AugmentConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.frontend, self.speakers, self.seed = config, Frontend(config), speakers, seed
        self.masks = masks if masks is not None and masks.mask_p > 0 else None
        if config.kind == "wave" and self.masks is not None:
            raise ConfigError("data.augment.mask_p hides parts of fixed features; expected 0 with kind=wave")

    @torch.no_grad()
    def forward(self, crops: Tensor) -> Tensor:
        """-> (rows, frames, n_mels), of ``kind: wave`` (rows, samples)"""
        if self.config.kind == "wave":
            if crops.dim() != 2:
                raise ConfigError("the features of kind=wave change while they are learnt: switch their cache off")
            return crops.float()
        if crops.dim() == 2:
            ragged = self.frontend(list(crops.float().unbind(0)))
            return ragged.data.view(crops.shape[0], -1, ragged.data.shape[1])
        x = crops.float()
        if self.config.normalisation != "none":
            x = x - x.mean(1, keepdim=True)
        if self.config.normalisation == "mean_var":
            x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.config.norm_eps)
        return x

    def of(self, batch: Any, device: torch.device) -> Crops:
        """A batch of the loader (several crops of each utterance, or one with its class) on ``device``."""
        labels = getattr(batch, "labels", None)
        if labels is not None:
            features = self._masked(self(batch.wavs.to(device, non_blocking=True)), batch, "one")
            return Crops([features], (1, 0), labels.to(device))
        groups = [torch.cat(list(batch.global_crops))]
        if len(batch.local_crops):
            groups.append(torch.cat(list(batch.local_crops)))
        if self.speakers is not None:
            labels = self.speakers[batch.indices].to(device)
        several = [self(g.to(device, non_blocking=True)) for g in groups]
        several = [self._masked(x, batch, kind) for x, kind in zip(several, ("global", "local"), strict=False)]
        return Crops(several, (len(batch.global_crops), len(batch.local_crops)), labels)

    def _masked(self, features: Tensor, batch: Any, kind: str) -> Tensor:
        """SpecAugment, if it is on, each crop by itself."""
        if self.masks is None:
            return features
        parts = features.split(len(batch.ids))
        known: dict[str, Any] = {"ids": batch.ids, "epoch": batch.epoch, "seed": self.seed}
        return torch.cat(
            [mask_features(x, self.masks, purpose=f"{kind} {number}", **known) for number, x in enumerate(parts)]
        )


def build_network(ecapa: EcapaConfig, frontend: FrontendConfig) -> Ecapa:
    """The network to train; with ``kind: wave`` the filters are part of it, as ``bank``.

    So they are trained, averaged into a teacher and saved with the network.
    """
    network = Ecapa(ecapa)
    if frontend.kind == "wave":
        network.bank = GaborBank(frontend)
    return network


def network_state(encoder: SpeakerEncoder) -> dict[str, Tensor]:
    """An encoder's weights by the names of :func:`build_network`."""
    filters = encoder.frontend.own_tensors() if encoder.frontend.cfg.kind == "wave" else {}
    return {**encoder.ecapa.state_dict(), **{f"bank.{name}": tensor for name, tensor in filters.items()}}


def encoder_from(state: Mapping[str, Tensor], ecapa: EcapaConfig, frontend: FrontendConfig) -> SpeakerEncoder:
    """The inverse of :func:`network_state`: an encoder in eval mode on the CPU."""
    cpu = {name: tensor.detach().cpu() for name, tensor in state.items()}
    filters = {name.removeprefix("bank."): tensor for name, tensor in cpu.items() if name.startswith("bank.")}
    encoder = SpeakerEncoder(ecapa, frontend, "float32", **filters)
    encoder.ecapa.load_state_dict({name: tensor for name, tensor in cpu.items() if not name.startswith("bank.")})
    return encoder.eval()


class CropEncoder(nn.Module):
    """ECAPA-TDNN on equally long crops, in float32, bfloat16 or float16 (parameters stay float32).

    frontend : where the network has filters of its own (``kind: wave``), what makes features of waveforms by them
    compiled : run it through ``torch.compile``; each new shape is compiled when it is first met, and the log says for
    how long.
    """

    def __init__(
        self, ecapa: Ecapa, precision: str = "fp32", compiled: bool = False, frontend: FrontendConfig | None = None
    ) -> None:
        super().__init__()
        self.ecapa, self.precision, self.compiled = ecapa, precision, compiled
        self._frontend: tuple[Frontend, ...] = ()
        if hasattr(ecapa, "bank"):
            if frontend is None:
                raise ConfigError("a network with filters of its own needs the front-end's configuration")
            made = Frontend(frontend)
            made.bank = cast(GaborBank, ecapa.bank)  # the network's own, which the optimizer sees there
            self._frontend = (made,)
        self._shapes: dict[tuple[Any, ...], Callable[[Tensor], Tensor]] = {}

    def forward(self, features: Tensor) -> Tensor:
        """features : (rows, frames, n_mels), or waveforms (rows, samples) -> embeddings (rows, dim) float32"""
        if features.dim() == 2:
            ragged = self._frontend[0](list(features.unbind(0)))
            features = ragged.data.view(len(features), -1, ragged.data.shape[1])
        low = self.precision != "fp32"
        with torch.autocast(features.device.type, dtype=_DTYPES.get(self.precision), enabled=low):
            return (self._compiled(features) if self.compiled else self._embed(features)).float()

    def _embed(self, features: Tensor) -> Tensor:
        rows, frames, n_mels = features.shape
        ragged = Ragged(features.reshape(-1, n_mels), [frames] * rows)
        return self.ecapa(ragged, outputs=("embedding",))["embedding"]

    def _compiled(self, features: Tensor) -> Tensor:
        key = (*features.shape, torch.is_grad_enabled(), self.training)
        if key in self._shapes:
            return self._shapes[key](features)
        begin = time.perf_counter()
        self._shapes[key] = torch.compile(self._embed, dynamic=False)
        out = self._shapes[key](features)
        logger.info(
            "torch.compile: %.1f s for %d crops of %d frames%s", time.perf_counter() - begin, *features.shape[:2],
            "" if torch.is_grad_enabled() else " without gradient",
        )  # fmt: skip
        return out


class Objective(nn.Module):
    """Features of crops to a loss, and what happens around it in a step.

    A step of the trainer is: ``set_step``, ``forward`` and backward for each micro-batch, ``after_backward``, the
    optimizer, ``after_step``; ``metrics`` of the last step when it is logged.
    """

    batch_statistics = "BatchNorm's statistics"  # what sees the micro-batch alone when gradients are accumulated

    def plan(self, steps: Callable[[str], int], total: int) -> None:
        """Durations of the configuration in optimizer steps, before training; ``total`` : steps of the whole run."""

    def set_step(self, step: int) -> dict[str, float]:
        """Set what follows a schedule for the optimizer step ``step`` (0-based); returns what to log."""
        return {}

    def forward(self, features: Sequence[Tensor], views: tuple[int, int], labels: Tensor | None = None) -> Tensor:
        """Loss of this process's crops; arguments as in :class:`Crops`."""
        raise NotImplementedError

    def after_backward(self) -> None:
        """Between the gradients and the optimizer."""

    def after_step(self) -> None:
        """After the optimizer."""

    def metrics(self) -> dict[str, float]:
        """Numbers of the last step."""
        raise NotImplementedError

    def networks(self) -> dict[str, Ecapa]:
        """The ECAPA-TDNNs by role, the one to export first."""
        raise NotImplementedError


def speaker_encoder(ecapa: Ecapa, frontend: FrontendConfig) -> SpeakerEncoder:
    """A copy of a network in training, with its front-end, in eval mode on the CPU."""
    return encoder_from(ecapa.state_dict(), ecapa.cfg, frontend)


def parameter_groups(module: nn.Module, decay_norm_and_bias: bool = False) -> list[dict[str, Any]]:
    """Optimizer groups: weights with weight decay, biases and norm parameters without (unless asked)."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim == 1 and not decay_norm_and_bias else decay).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decay, "decay": True}, {"params": plain, "decay": False}]
    return [g for g in groups if g["params"]]
