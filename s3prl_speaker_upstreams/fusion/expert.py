"""The s3prl upstream that runs several upstreams and lays their layers side by side, on one clock."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from s3prl.upstream.interfaces import UpstreamBase
from torch import Tensor, nn

from cka_addon.align import Clock, frames_at
from cka_addon.errors import CkaError
from cka_addon.models import Model
from s3prl_speaker_upstreams.common.audio import SAMPLE_RATE
from s3prl_speaker_upstreams.common.hints import did_you_mean
from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.expert import Outputs, check_wavs, tie
from s3prl_speaker_upstreams.fusion.config import FusionConfig, Member, parse

__all__ = ["FusedMember", "UpstreamExpert"]

logger = logging.getLogger(__name__)

SHORTEST = 800
"""Samples to which shorter recordings are lengthened with zeros for members that refuse them, as s3prl.nn does."""

_RULES = {"mean": "pool", "nearest": "nearest"}


def _check_entries(config: FusionConfig, hub: Any) -> None:
    """Raise ConfigError for a member that s3prl does not have, or layers that one of ours does not have."""
    known = [name for name in dir(hub) if not name.startswith("_") and callable(getattr(hub, name))]
    for member in config.members:
        if member.upstream not in known:
            raise ConfigError(
                f"fusion: s3prl has no upstream {member.upstream!r}; {did_you_mean(member.upstream, known)}"
            )
        if member.upstream == "fusion":
            raise ConfigError("fusion: got fusion as its own member, expected other upstreams")
        names = getattr(getattr(hub, member.upstream), "layer_names", None)
        if names and member.layers is not None and member.key == "hidden_states":
            _positions(member, names)


def _positions(member: Member, names: Sequence[str]) -> list[int]:
    """Which of a member's layers are taken."""
    if member.layers is None:
        return list(range(len(names)))
    chosen = []
    for layer in member.layers:
        if isinstance(layer, str) and layer in names:
            chosen.append(names.index(layer))
        elif isinstance(layer, int) and -len(names) <= layer < len(names):
            chosen.append(layer % len(names))
        else:
            raise ConfigError(
                f"fusion: {member.name}: got layer {layer!r}, expected 0 .. {len(names) - 1} or {', '.join(names)}"
            )
    return chosen


class FusedMember(nn.Module):
    """One upstream of a fusion: which of its layers are taken, and when their frames are.

    config : what was asked for;  upstream : s3prl's module;  clock : its frames' centres
    names, widths : of the layers that are taken, ``MEMBER:LAYER``
    exact : each utterance's values in a batch are those that it has alone
    """

    def __init__(self, config: Member, upstream: nn.Module, rms_error: float = 1e-4) -> None:
        super().__init__()
        self.config = config
        self.upstream = upstream.eval()
        self.any_length = bool(getattr(upstream, "exact_in_batch", False))
        try:
            info = Model(self._told(), config.name, keys=(config.key,)).info
        except CkaError as error:
            raise ConfigError(f"fusion: {config.name}: its frames cannot be placed in time: {error}") from error
        if not info.clock.shift:
            raise ConfigError(
                f"fusion: {config.name}: gives one vector per utterance and so has no rate in common with the others; "
                "expected frames"
            )
        self.clock: Clock = info.clock
        self.rate = round(info.clock.shift * SAMPLE_RATE)
        self.positions = _positions(config, info.layers)
        self.names = tuple(f"{config.name}:{info.layers[i]}" for i in self.positions)
        self.widths = tuple(info.dims[i] for i in self.positions)
        self.batch_error = 0.0 if self.any_length else self._batch_error()
        self.exact = self.batch_error <= rms_error

    def _told(self) -> Callable[[list[Tensor]], Mapping]:
        """The upstream as a plain function with what it says of its clock, for :class:`cka_addon.models.Model`."""

        def forward(wavs: list[Tensor]) -> Mapping:
            # outside inference mode: what a module keeps of a first call must be fit for training
            with torch.inference_mode(False), torch.no_grad():
                return cast(Mapping, self.upstream([wav.clone() for wav in wavs]))

        for name in ("frame_shift", "first_center", "layer_names", "get_downsample_rates"):
            if hasattr(self.upstream, name):
                setattr(forward, name, getattr(self.upstream, name))
        return forward

    @torch.no_grad()
    def _batch_error(self) -> float:
        """How far an utterance's values beside a longer one are from those alone, relative to their size."""
        generator = torch.Generator().manual_seed(0)
        short, long = (0.1 * torch.randn(n, generator=generator) for n in (12000, 24000))
        frames = self.frames(len(short))
        alone = [x[0, :frames] for x in self._layers([short])]
        beside = [x[1, :frames] for x in self._layers([long, short])]
        norm = sum(float(a.double().square().sum()) for a in alone)
        error = sum(float((a - b).double().square().sum()) for a, b in zip(alone, beside, strict=True))
        return math.sqrt(error / max(norm, 1e-30))

    def frames(self, samples: int) -> int:
        """Frames that an utterance of so many samples has alone."""
        window = round(2 * self.clock.first_center * SAMPLE_RATE)
        return 1 + max(0, samples - window) // self.rate

    def _layers(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """The taken layers of a batch: (batch, frames, width) each."""
        found = self.upstream(list(wavs))[self.config.key]
        layers = list(found.values()) if isinstance(found, Mapping) else found
        if isinstance(layers, Tensor):
            layers = list(layers) if layers.dim() == 4 else [layers]
        return [layers[i] for i in self.positions]

    def forward(self, wavs: Sequence[Tensor], one_by_one: bool) -> tuple[list[Tensor], list[int]]:
        """Layers of a batch, (batch, frames, width) each, and how many frames of each utterance count."""
        if not self.any_length:
            wavs = [F.pad(wav, (0, max(0, SHORTEST - len(wav)))) for wav in wavs]
        if one_by_one and not self.exact and len(wavs) > 1:
            each = [[layer[0] for layer in self._layers([wav])] for wav in wavs]
            layers = [nn.utils.rnn.pad_sequence(list(rows), batch_first=True) for rows in zip(*each, strict=True)]
        else:
            layers = self._layers(wavs)
        return layers, [min(layers[0].shape[1], self.frames(len(wav))) for wav in wavs]


class UpstreamExpert(UpstreamBase):
    """Several upstreams as one.

    ckpt : ``NAME+NAME`` or a yaml file (``-k``);  model_config : a yaml file (``-g``);  options : fields of
    :class:`~s3prl_speaker_upstreams.fusion.FusionConfig`

    ``hidden_states`` is the list of all members' layers, in the order of the members, on one clock and of one width
    (``layout``); ``-s MEMBER`` gives the layers of one member on the same clock, in its own width. ``layer_names`` are
    ``MEMBER:LAYER``, ``slots`` the columns of each member.

    A frame of the result is centred where the frames of the coarsest (finest) member are. Of every other member it
    takes the frames whose centres lie within half a frame of it (their mean), or the nearest: by the rule of
    :mod:`cka_addon.align`, which compares models by the same frames. Where a member's frames end, its last one is
    repeated. Recordings of fewer than 800 samples reach s3prl's own members lengthened to that with zeros.

    Raises ConfigError before anything is loaded for an unknown member, option or layer of ours; for layers of others
    once they are loaded.

    >>> expert = UpstreamExpert("fbank+ecapa_dino_small")  # doctest: +SKIP
    >>> expert.layer_names  # doctest: +SKIP
    ('fbank:layer_0', 'ecapa_dino_small:block_1', ..., 'ecapa_dino_small:block_4')
    """

    def __init__(
        self,
        ckpt: str | os.PathLike[str] | None = None,
        model_config: str | os.PathLike[str] | None = None,
        refresh: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        from s3prl import hub

        self.config = parse(ckpt, model_config, **options)
        _check_entries(self.config, hub)
        self.members = nn.ModuleList(FusedMember(member, _load(hub, member, refresh)) for member in self.config.members)
        self.normalize = self.config.normalize
        members = self._members()
        trained = self.config.trainable
        for member in members:
            if trained is not None and member.config.name not in trained:
                member.requires_grad_(False)
        self.rate, self.clock = self._choose_clock()
        self.frame_shift, self.first_center = self.clock.shift, self.clock.first_center
        self.layer_names = tuple(name for member in members for name in member.names)
        self.slots: dict[str, slice] = {}
        start = 0
        for member in members:
            width = self._width(member)
            self.slots[member.config.name] = slice(start, start + width)
            start += width if self.config.layout == "slots" else 0
        self.width = start if self.config.layout == "slots" else max(slot.stop for slot in self.slots.values())
        self._say_what_it_is()

    def _members(self) -> list[FusedMember]:
        return cast("list[FusedMember]", list(self.members))

    def _width(self, member: FusedMember) -> int:
        if len(set(member.widths)) != 1 and self.config.layout == "slots":
            raise ConfigError(
                f"fusion: {member.config.name}: its layers have the widths {sorted(set(member.widths))}, expected one; "
                "choose layers of one width, or layout=pad"
            )
        return max(member.widths)

    def _choose_clock(self) -> tuple[int, Clock]:
        """Samples per frame of the result, and when its frames are."""
        members = self._members()
        wanted = self.config.rate
        if wanted == "coarsest":
            chosen = max(members, key=lambda member: member.rate)
        elif wanted == "finest":
            chosen = min(members, key=lambda member: member.rate)
        else:
            rate = int(wanted)
            same = [member for member in members if member.rate == rate]
            if same:
                return rate, same[0].clock
            longest = max(member.rate for member in members)
            if rate > 4 * longest:
                raise ConfigError(
                    f"fusion: got rate={rate}, expected at most {4 * longest}: the members give a frame every "
                    f"{', '.join(str(member.rate) for member in members)} samples"
                )
            return rate, Clock(rate / SAMPLE_RATE, rate / 2 / SAMPLE_RATE)
        return chosen.rate, chosen.clock

    def _say_what_it_is(self) -> None:
        members = self._members()
        for member in members:
            batch = "exact in any batch" if member.exact else (
                f"NOT the same in a batch (differs by {member.batch_error:.1%} beside a longer utterance)"
                + ("; run one by one" if self.config.one_by_one else "; one_by_one: true makes it so")
            )  # fmt: skip
            logger.info(
                "fusion: %s: %d layers of %s, every %d samples from %.1f ms on, %s",
                *(member.config.name, len(member.names), "/".join(map(str, sorted(set(member.widths))))),
                *(member.rate, member.clock.first_center * 1000, batch),
            )
        layers, per_second = len(self.layer_names), SAMPLE_RATE / self.rate * 4 / 2**20
        alone = sum(sum(member.widths) for member in members)
        logger.info(
            "fusion: %d hidden states of width %d every %d samples: %.1f MiB per second of speech (%.1f without slots)",
            *(layers, self.width, self.rate, layers * self.width * per_second, alone * per_second),
        )

    def normalize_in_slots(self) -> None:
        """Normalise every layer over its member's own width from now on; ``--upstream_feature_normalize`` asks for it.

        s3prl itself would normalise over the whole width, the zeros of the other members included.
        """
        logger.warning(
            "fusion: s3prl's normalisation would run over the zeros of the other members' slots; each layer is "
            "normalised over its own width instead (normalize: layer_norm)"
        )
        self.normalize = "layer_norm"

    def train(self, mode: bool = True) -> UpstreamExpert:
        """Train mode for the members that ``trainable`` names (all by default); the others stay in eval mode."""
        super().train(mode)
        for member in self._members():
            if self.config.trainable is not None and member.config.name not in self.config.trainable:
                member.eval()
        return self

    def get_downsample_rates(self, key: str) -> int:
        """Samples per frame."""
        return self.rate

    def frames(self, samples: int) -> int:
        """Frames of the result for an utterance: as many as s3prl keeps."""
        return max(1, math.ceil(samples / self.rate))

    def forward(self, wavs: Sequence[Tensor]) -> Outputs:
        check_wavs(wavs)
        samples = [wav.numel() for wav in wavs]
        names = [member.config.name for member in self._members()]
        tied = tie(self)
        aligned = {
            member.config.name: [tied(self._normalized(x)) for x in self._aligned(member, wavs, samples)]
            for member in self._members()
        }
        hidden_states = [
            F.pad(x, (self.slots[name].start, self.width - self.slots[name].start - x.shape[-1]))
            for name in names
            for x in aligned[name]
        ]

        def compute(key: str) -> Any:
            if key == "last_hidden_state":
                return hidden_states[-1]
            if key in numbered:
                return hidden_states[numbered.index(key)]
            return aligned[key]

        numbered = [f"hidden_state_{i}" for i in range(len(hidden_states))]
        keys = ("hidden_states", "last_hidden_state", *names)
        return Outputs({"hidden_states": hidden_states}, keys, compute, numbered)

    def _normalized(self, x: Tensor) -> Tensor:
        if self.normalize == "layer_norm":
            return F.layer_norm(x, x.shape[-1:])
        if self.normalize == "rms":
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        return x

    def _aligned(self, member: FusedMember, wavs: Sequence[Tensor], samples: Sequence[int]) -> list[Tensor]:
        """A member's layers on the clock of the result: (batch, frames, width), zero behind each utterance's end."""
        layers, own = member(wavs, self.config.one_by_one)
        kept = [self.frames(n) for n in samples]
        moments = self.clock.times(max(kept))
        first, last = frames_at(moments, self.clock.shift, member.clock, rule=_RULES[self.config.align])
        ends = np.asarray(own)[:, None]
        low = np.clip(first[None], 0, ends - 1)
        high = np.clip(last[None], low + 1, ends)
        inside = np.arange(max(kept))[None] < np.asarray(kept)[:, None]
        longest = int((high - low).max())
        device, rows = layers[0].device, torch.arange(len(wavs), device=layers[0].device)[:, None]
        start, count = (torch.from_numpy(x).to(device) for x in (low, high - low))
        weight = torch.from_numpy(inside).to(device, torch.float32) / count

        def take(x: Tensor) -> Tensor:
            total = x[rows, start]
            for step in range(1, longest):
                more = (count > step)[..., None]
                total = total + torch.where(more, x[rows, (start + step).clamp(max=x.shape[1] - 1)], 0)
            return total * weight.to(x.dtype)[..., None]

        return [take(x) for x in layers]


def _load(hub: Any, member: Member, refresh: bool) -> nn.Module:
    """The member's upstream, made by its entry of ``s3prl.hub``."""
    options = dict(member.options)
    if member.ckpt is not None:
        options["ckpt"] = member.ckpt
    upstream = getattr(hub, member.upstream)(refresh=refresh, **options)
    if not isinstance(upstream, nn.Module):
        raise ConfigError(f"fusion: {member.upstream} gave a {type(upstream).__name__}, expected an upstream")
    return upstream
