"""From the tensors of one project's network to this package's: every one accounted for, renamed, checked."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ecapa import Frontend
from ..ecapa.config import FrontendConfig
from ..errors import CheckpointMismatch
from .files import File
from .networks import AVERAGED, STUDENTS, TEACHERS, Network, plain_name

__all__ = ["front_end_of", "leftovers", "port", "widths_of"]

logger = logging.getLogger(__name__)

# Entries that hold the network among others; none of them is a part of it.
_HOLDERS = frozenset(
    "state_dict model_state_dict model state net network weights params encoder embedding_model backbone".split()
)
# What trainers keep beside the network in a file.
_TRAINER = re.compile(
    r"(?:\w+_)?(?:optimizer|optim|scheduler|lr_scheduler|scaler|amp|rng|callback|loop|epoch|step|iteration|args|config"
    r"|hparams|hyper_parameters|metric|loss|loss_fn|criterion|prototypes|sampler)s?(?:_states?)?(?:_dicts?)?"
)
# Modules of a training that stand beside or behind the network, never before it: they change no embedding.
_HEADS = re.compile(
    r"(?:\w+_)?(?:classifiers?|clf|heads?|mlp|projections?|projection_head|projectors?|predictors?|prototypes?"
    r"|criterion|loss(?:es)?|loss_(?:fn|func|function|calculator)|aam|aam_softmax|arcface|metric_fc|queue|queue_ptr"
    r"|center|n_averaged|num_updates|decay|initted|step)(?:_momentum|_ema)?|(?:train|val|valid|test)_\w+"
)


def port(
    file: File,
    network: Network,
    others: Iterable[Network],
    wanted: Mapping[str, str],
    *,
    ignored: Iterable[str],
    buffers: Collection[str],
    what: str,
) -> dict[str, Tensor]:
    """Our names for a network's tensors; every tensor of the file must be used or known to be of the training.

    others : the file's other networks
    wanted : our name of every tensor -> the original's
    ignored : regular expressions, matched at the start of a name, of what the format's training keeps
    buffers : names of the front-end's tensors
    what : the format, for messages

    Raises CheckpointMismatch naming the first tensor that is missing or that nothing accounts for.

    >>> file = File.of(Path("x.pt"), {"a.weight": torch.ones(1), "surprise": torch.ones(1)})
    >>> network = Network("", file.tensors, "supervised", "raw")
    >>> port(file, network, (), {"mfa.conv.weight": "a.weight"}, ignored=(), buffers=(), what="a toy")
    Traceback (most recent call last):
    ...
    s3prl_speaker_upstreams.errors.CheckpointMismatch: x.pt: 1 of 2 keys unmatched, first 'surprise' (read as a toy): \
it is near that format but not it, a changed model; expected the tensors of the project's own ECAPA-TDNN, heads and \
losses apart
    """
    missing = [
        name for name in wanted.values() if name not in network.state and not name.endswith("num_batches_tracked")
    ]
    unused, averaged = leftovers(file.tensors, network, others, {*wanted.values(), *buffers}, ignored)
    parts = []
    if missing:
        first = f"{network.where}{missing[0]}"
        parts.append(f"{len(missing)} of {len(wanted)} expected keys are not there, first {first!r}")
    if unused:
        parts.append(f"{len(unused)} of {len(file.tensors)} keys unmatched, first {unused[0]!r}")
    if parts:
        raise CheckpointMismatch(
            f"{file.path}: {'; '.join(parts)} (read as {what}): it is near that format but not it, a changed model; "
            "expected the tensors of the project's own ECAPA-TDNN, heads and losses apart"
        )
    if averaged:
        logger.warning(
            "%s: also holds averaged weights under names that are not the network's (first %r): not used, reading the "
            "trained ones (%s)", file.path, averaged[0], network.where or "top level",
        )  # fmt: skip
    return {
        ours: _converted(ours, network.state[theirs], f"{network.where}{theirs}", file.path)
        if theirs in network.state
        else torch.zeros((), dtype=torch.int64)  # batches are counted for training only
        for ours, theirs in wanted.items()
    }


def leftovers(
    tensors: Mapping[str, Tensor],
    network: Network,
    others: Iterable[Network],
    used: Collection[str],
    ignored: Iterable[str],
) -> tuple[list[str], list[str]]:
    """Tensors of a file that nothing accounts for, and those of an averaged copy that is not one of `others`.

    used : names within `network` that were read
    ignored : regular expressions, matched at the start of a name, of what the format's training keeps

    >>> from torch import zeros
    >>> file = {"model.a": zeros(1), "model.classifier.weight": zeros(1), "model.adapter": zeros(1)}
    >>> leftovers(file, Network("model.", {}, "supervised", "raw"), (), {"a"}, ())
    (['model.adapter'], [])
    """
    places = tuple(other.where for other in others if other.where and not network.where.startswith(other.where))
    patterns = [re.compile(pattern) for pattern in ignored]
    unknown: list[str] = []
    averaged: list[str] = []
    for raw in tensors:
        path = plain_name(raw)
        inside = path.startswith(network.where)
        name = path[len(network.where) :] if inside else _without_holders(path)
        if inside and name in used or path.startswith(places):
            continue
        parts = name.split(".")
        if _TRAINER.fullmatch(path.split(".")[0]) or _TRAINER.fullmatch(parts[0]) or _HEADS.fullmatch(parts[0]):
            continue
        if any(pattern.match(name) for pattern in patterns) or _is_behind(path, network.where):
            continue
        if any(AVERAGED.fullmatch(part) for part in path.removesuffix(name).split(".") + parts[:-1] if part):
            averaged.append(raw)
            continue
        unknown.append(raw)
    return unknown, averaged


def _without_holders(path: str) -> str:
    parts = path.split(".")
    while len(parts) > 1 and (parts[0] in _HOLDERS | TEACHERS | STUDENTS or AVERAGED.fullmatch(parts[0])):
        parts = parts[1:]
    return ".".join(parts)


def _is_behind(path: str, where: str) -> bool:
    """Whether a tensor is of a later member of the Sequential whose member the network is."""
    before, _, member = where[:-1].rpartition(".")
    prefix = f"{before}." if before else ""
    if not member.isdigit() or not path.startswith(prefix):
        return False
    other = path[len(prefix) :].split(".")[0]
    return other.isdigit() and int(other) > int(member)


def _converted(name: str, tensor: Tensor, original: str, path: Path) -> Tensor:
    """A tensor as this package keeps it: float32 and contiguous, 1x1 convolutions and linear layers in one shape."""
    if name.endswith("num_batches_tracked"):
        # Averaged checkpoints hold it as a float.
        return tensor.detach().round().to(torch.int64).reshape(()).clone()
    if not tensor.is_floating_point():
        raise CheckpointMismatch(f"{path}: {original!r} holds {tensor.dtype}, expected floating point")
    tensor = tensor.detach().to(torch.float32, copy=True).contiguous()
    if not torch.isfinite(tensor).all():
        raise CheckpointMismatch(
            f"{path}: {original!r} holds NaN or infinite values; the training diverged: take an earlier epoch"
        )
    if name == "embedding.weight":
        return tensor.squeeze(-1) if tensor.dim() == 3 and tensor.shape[-1] == 1 else tensor
    if name.endswith((".se.conv1.weight", ".se.conv2.weight")) and tensor.dim() == 2:
        return tensor.unsqueeze(-1)
    return tensor


def widths_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Every field of EcapaConfig that the tensors' shapes tell, from a state in this package's names.

    >>> from s3prl_speaker_upstreams.ecapa import Ecapa, EcapaConfig
    >>> widths_of(Ecapa(EcapaConfig(channels=16, mfa_channels=24, res2_scale=4)).state_dict())["res2_scale"]
    4
    """

    def size(name: str, axis: int) -> int:
        # A tensor of too few axes is reported by the shape check that follows, with its name.
        tensor = state[f"{name}.weight"]
        return tensor.shape[axis] if tensor.dim() > axis else 1

    scale = 1
    while f"block_2.res2.{scale - 1}.conv.weight" in state:
        scale += 1
    return {
        "n_mels": size("block_1.conv", 1),
        "channels": size("block_1.conv", 0),
        "kernel_size": size("block_1.conv", 2),
        "res2_scale": scale,
        "se_channels": size("block_2.se.conv1", 0),
        "mfa_channels": size("mfa.conv", 0),
        "mfa_norm": "mfa.norm.weight" in state,
        "attention_channels": size("pool.conv1", 0),
        # With context the attention sees three times the MFA's width.
        "attention_context": size("pool.conv1", 1) != size("mfa.conv", 0),
        "attention_hidden": "relu_norm_tanh" if "pool.norm.weight" in state else "tanh",
        "embedding_dim": size("embedding", 0),
        "embedding_norm": "embedding_norm.weight" in state,
    }


def front_end_of(
    network: Network, buffers: Mapping[str, str], config: FrontendConfig, path: Path
) -> tuple[FrontendConfig, dict[str, Tensor]]:
    """The front-end with the sizes and window that the file's own buffers show, and these buffers.

    buffers : "window", "mel", "preemphasis" -> the original's name
    config : the project's usual front-end

    Raises CheckpointMismatch for another pre-emphasis than 0.97.

    >>> network = Network("", {"fb.window": torch.hann_window(400)}, "supervised", "raw")
    >>> front_end_of(network, {"window": "fb.window"}, FrontendConfig(), Path("x.pt"))[0].window
    'hann'
    """
    found = {name: network.state[key] for name, key in buffers.items() if key in network.state}
    coefficient = found.pop("preemphasis", None)
    if coefficient is not None:
        values = coefficient.double().flatten()
        published = torch.tensor([-0.97, 1.0], dtype=torch.float64)
        if values.shape != published.shape or not torch.allclose(values, published, atol=_precision(coefficient)):
            raise CheckpointMismatch(f"{path}: got the pre-emphasis filter {values.tolist()}, expected [-0.97, 1.0]")
    if "mel" in found:
        bins, mels = found["mel"].shape
        config = config.replace(n_fft=2 * (bins - 1), n_mels=mels)
    if "window" in found:
        config = _named_window(config, found["window"], path)
    if any(_precision(tensor) > 1e-6 for tensor in found.values()):
        # Rounded with the weights: where the configuration makes the same, what it makes is exact.
        found = {name: tensor for name, tensor in found.items() if not _is_made(name, tensor, config)}
    return config, {name: tensor.detach().to(torch.float32, copy=True).contiguous() for name, tensor in found.items()}


def _precision(tensor: Tensor) -> float:
    """Largest rounding error of numbers up to one in a tensor's type."""
    return 1e-6 if tensor.dtype in (torch.float32, torch.float64) else torch.finfo(tensor.dtype).eps


def _named_window(config: FrontendConfig, window: Tensor, path: Path) -> FrontendConfig:
    config = config.replace(win_length=window.numel())
    for kind, make in (("hamming", torch.hamming_window), ("hann", torch.hann_window)):
        made = make(window.numel(), periodic=True)
        if torch.allclose(window.float(), made, atol=max(1e-5, _precision(window))):
            return config.replace(window=kind, window_periodic=True)
    logger.warning("%s: its window is neither hamming nor hann; the file's own is used as it is", path)
    return config


def _is_made(name: str, tensor: Tensor, config: FrontendConfig) -> bool:
    made = getattr(Frontend(config), name)
    return made.shape == tensor.shape and torch.allclose(tensor.float(), made, atol=2 * _precision(tensor))
