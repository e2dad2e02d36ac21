"""What every checkpoint format has in common: how its network is found in a file, chosen, ported and checked.

One project's format is a subclass in :mod:`.formats`, which says what differs: its key map, its own names for teacher
and student, what its configuration files mean and where its training keeps them.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ecapa import Frontend
from ..ecapa.config import DIALECTS, FrontendConfig
from ..errors import CheckpointMismatch
from .checkpoint import NORM_LEAVES, Checkpoint
from .files import File
from .networks import Network, find_networks, leftovers
from .sidecars import Settings

__all__ = ["COMMON", "INSIDE", "NAMED", "NOTHING", "SPECIFIC", "STATED", "Claim", "Format"]

logger = logging.getLogger(__name__)

# How surely a file is of a format whose tensors others have, too: nothing says so; it is the commonest of them; its name
# or a width says so; its neighbours do; its own contents do, and do so for this one format alone.
NOTHING, COMMON, NAMED, STATED, INSIDE, SPECIFIC = range(6)
# Present or absent by design: the file decides, and the configuration follows.
_OPTIONAL = ("mfa.norm", "pool.norm", "embedding_norm")
_MOST_RES2 = 15


class Claim(NamedTuple):
    """How surely a file is of a format (NOTHING to SPECIFIC), and what says so.

    >>> Claim().strength == NOTHING
    True
    """

    strength: int = NOTHING
    why: str = ""


class Format:
    """One checkpoint format. Subclasses set the attributes and override what their project does otherwise.

    name : what ``format=`` takes
    title : what people call it
    dialects : front-ends that its files are used with, keys of ``ecapa.DIALECTS``; the first is its authors'
    modules : this package's module names to the original's; ``{b}`` runs over blocks 2 to 4, ``{n}`` is ``b - 1`` and
        ``{j}`` runs over the Res2 convolutions. The leaves (weight, bias, statistics) are the same everywhere
    ignored : regular expressions (matched at the start) of tensors that belong to the training, not to the network
    buffers : front-end tensors that the file carries, ``{"window": key, "mel": key, "preemphasis": key}``
    folder_files : patterns under which the project's folders hold weights, best first
    pairs : the project itself trains a teacher and a student, so that which one is used is its own rule

    >>> from s3prl_speaker_upstreams.checkpoints.formats import BY_NAME
    >>> BY_NAME["wespeaker"].names(7)["block_2.res2.0.norm.bias"]
    'layer2.se_res2block.1.bns.0.bias'
    """

    name: str
    title: str
    dialects: tuple[str, ...]
    modules: Mapping[str, str] = {}
    ignored: tuple[str, ...] = ()
    buffers: Mapping[str, str] = {}
    folder_files: tuple[str, ...] = ()
    pairs: bool = False

    # --- what projects do differently -------------------------------------------------------------------------------

    def claim(self, file: File) -> Claim:
        """What says, beyond the tensors' names, that a file is of this format."""
        return Claim()

    def settings(self, path: Path) -> Settings:
        """What the project's own configuration beside a weights file states.

        Raises CheckpointMismatch if it describes a model or front-end that cannot be had.
        """
        return Settings()

    def networks(self, file: File) -> list[Network]:
        """Every network of this format that a file holds."""
        return find_networks(file.tensors, self._every_name)

    def default_role(self, networks: list[Network], file: File) -> str:
        """Which of several networks its project uses."""
        return "teacher" if any(network.role == "teacher" for network in networks) else networks[0].role

    def find(self, folder: Path, role: str | None = None) -> list[Path]:
        """Weights files of a folder that its project laid out, best first; of numbered ones the latest comes first."""
        found: dict[Path, None] = {}
        for pattern in self.folder_files:
            found.update(dict.fromkeys(sorted((p for p in folder.glob(pattern) if p.is_file()), key=_age, reverse=True)))
        return list(found)

    # --- what is the same for all ------------------------------------------------------------------------------------

    def names(self, res2_convs: int) -> dict[str, str]:
        """This package's tensor names to the original's, for so many Res2 convolutions a block."""
        names = {}
        for ours, theirs in self.modules.items():
            for b in (2, 3, 4) if "{b}" in ours else (1,):
                for j in range(res2_convs) if "{j}" in ours else (0,):
                    module, original = (text.format(b=b, n=b - 1, j=j) for text in (ours, theirs))
                    for leaf in NORM_LEAVES if module.endswith("norm") else NORM_LEAVES[:2]:
                        names[f"{module}.{leaf}"] = f"{original}.{leaf}"
        return names

    @functools.cached_property
    def _every_name(self) -> frozenset[str]:
        return frozenset(self.names(_MOST_RES2).values())

    def wanted(self, state: Mapping[str, Tensor]) -> dict[str, str]:
        """Our names to theirs of every tensor that a network with these tensors should have."""
        theirs = self.modules["block_{b}.res2.{j}.conv"]
        count = 1  # without Res2 convolutions it is no ECAPA-TDNN: the first of them is then missing
        while f"{theirs.format(b=2, n=1, j=count)}.weight" in state:
            count += 1
        absent = tuple(
            f"{module}." for module in _OPTIONAL if f"{self.modules.get(module, '')}.weight" not in state
        )
        return {ours: name for ours, name in self.names(count).items() if not ours.startswith(absent)}

    def likeness(self, file: File) -> tuple[float, str]:
        """The share of this format's tensors that the likeliest network of a file has, and the first that it lacks."""
        best, lacking = 0.0, ""
        for network in self.networks(file):
            names = [name for name in self.wanted(network.state).values() if not name.endswith("num_batches_tracked")]
            missing = [name for name in names if name not in network.state]
            if (share := 1 - len(missing) / len(names)) > best:
                best, lacking = share, missing[0] if missing else ""
        return best, lacking

    def read(self, file: File, *, role: str | None = None, copy: str | None = None) -> Checkpoint:
        """The network of a file that a role and a copy name, in this package's names.

        role : "teacher" or "student", where the file holds both; by default the one that its project uses
        copy : "ema" or "raw", where the file holds an averaged copy beside the trained weights; by default the average

        Raises CheckpointMismatch if a tensor is missing, or there is one that nothing accounts for, naming the first.
        """
        network, others = self._choose(file, role, copy)
        state = self._ported(file, network, others)
        widths, settings = _widths(state), self.settings(file.path)
        for key, value in settings.ecapa.items():
            if key in widths and widths[key] != value:
                raise CheckpointMismatch(
                    f"{file.path}: got {key}={widths[key]} by its tensors, expected {value} as {settings.source} says; "
                    "the two are not of one model: move the file out of the folder to read it alone"
                )
        dialect = DIALECTS[self.dialects[0]]
        config = dialect.ecapa_config(**{**widths, **settings.ecapa})
        frontend = dialect.frontend.replace(n_mels=config.n_mels, **settings.frontend)
        frontend, buffers = self._front_end(file, network, frontend)
        provenance = {"file": file.path.name, "format": self.name, "bytes": file.path.stat().st_size}
        if network.copy == "ema":
            provenance["copy"] = "ema"
        return Checkpoint(config, frontend, state, self.name, network.role, provenance, buffers)

    def _choose(self, file: File, role: str | None, copy: str | None) -> tuple[Network, list[Network]]:
        networks = self.networks(file)
        if not networks:
            raise CheckpointMismatch(f"{file.path}: got no tensors of {self.title} ({self.name})")
        roles = list(dict.fromkeys(network.role for network in networks))
        wanted = role or self.default_role(networks, file)
        if wanted not in roles:
            raise CheckpointMismatch(
                f"{file.path}: got a {self.title} file with {' and '.join(f'the {r} network' for r in roles)}, expected "
                f"the {wanted}; leave role out, or pass role={roles[0]}{self._where_else(wanted)}"
            )
        found = [network for network in networks if network.role == wanted]
        copies = list(dict.fromkeys(network.copy for network in found))
        if copy is not None and copy not in copies:
            raise CheckpointMismatch(
                f"{file.path}: got only the {copies[0]} copy of the {wanted} network, expected the {copy} one; leave "
                "copy out"
            )
        chosen = copy or ("ema" if "ema" in copies else "raw")
        found = [network for network in found if network.copy == chosen]
        for other in found[1:]:
            if not _equal(found[0].state, other.state, self._every_name):
                raise CheckpointMismatch(
                    f"{file.path}: holds {len(found)} different {self.title} networks ("
                    + ", ".join(repr(network.where or "(top level)") for network in found)
                    + "), and nothing says which to take; save the state dict of the one that you mean"
                )
        network = found[0]
        others = [other for other in networks if other is not network]
        if len(copies) > 1 and copy is None:
            logger.warning(
                "%s: holds the trained weights and an averaged copy of them; reading the average (%s); for the other "
                "pass copy=raw (command line: --copy raw)", file.path, network.where,
            )  # fmt: skip
        if len(roles) > 1 and role is None:
            logger.log(
                logging.INFO if self.pairs else logging.WARNING, "%s: reading the %s (%s); for the other pass role=",
                file.path, wanted, network.where,
            )  # fmt: skip
        return network, others

    def _where_else(self, role: str) -> str:
        """Where the project keeps a network that this file does not hold, as an ending of the message."""
        return ""

    def _ported(self, file: File, network: Network, others: list[Network]) -> dict[str, Tensor]:
        """Our names for a network's tensors; every tensor of the file must be used or known to be of the training."""
        wanted = self.wanted(network.state)
        missing = [
            name for name in wanted.values() if name not in network.state and not name.endswith("num_batches_tracked")
        ]
        used = {*wanted.values(), *self.buffers.values()}
        unused, averaged = leftovers(file.tensors, network, others, used, self.ignored)
        if missing or unused:
            parts = []
            if missing:
                parts.append(
                    f"{len(missing)} of {len(wanted)} expected keys are not there, first "
                    f"'{network.where}{missing[0]}'"
                )
            if unused:
                parts.append(f"{len(unused)} of {len(file.tensors)} keys unmatched, first {unused[0]!r}")
            raise CheckpointMismatch(
                f"{file.path}: {'; '.join(parts)} (read as {self.title}, {self.name}): it is near that format but not "
                "it, a changed model; the tensors must be those of the project's own ECAPA-TDNN, heads and losses apart"
            )
        if averaged:
            logger.warning(
                "%s: also holds averaged weights under names that are not the network's (first %r): not used, reading "
                "the trained ones (%s)", file.path, averaged[0], network.where or "top level",
            )  # fmt: skip
        return {
            ours: _converted(ours, network.state[theirs], f"{network.where}{theirs}", file.path)
            if theirs in network.state
            else torch.zeros((), dtype=torch.int64)  # batches are counted for training only
            for ours, theirs in wanted.items()
        }

    def _front_end(
        self, file: File, network: Network, config: FrontendConfig
    ) -> tuple[FrontendConfig, dict[str, Tensor]]:
        """The front-end with the sizes, window and filters that the file's own buffers show."""
        found = {name: network.state[key] for name, key in self.buffers.items() if key in network.state}
        coefficient = found.pop("preemphasis", None)
        if coefficient is not None:
            values = coefficient.double().flatten()
            published = torch.tensor([-0.97, 1.0], dtype=torch.float64)
            if values.shape != published.shape or not torch.allclose(values, published, atol=_precision(coefficient)):
                raise CheckpointMismatch(
                    f"{file.path}: got the pre-emphasis filter {values.tolist()}, expected [-0.97, 1.0]"
                )
        if "mel" in found:
            bins, mels = found["mel"].shape
            config = config.replace(n_fft=2 * (bins - 1), n_mels=mels)
        if "window" in found:
            config = _named_window(config, found["window"], file.path)
        if any(_precision(tensor) > 1e-6 for tensor in found.values()):
            # Rounded with the weights: where the configuration makes the same, what it makes is exact.
            found = {name: tensor for name, tensor in found.items() if not _is_made(name, tensor, config)}
        return config, {name: tensor.detach().to(torch.float32, copy=True).contiguous() for name, tensor in found.items()}


def _age(path: Path) -> list[int]:
    """Order of a training's numbered files and folders: all numbers of their names."""
    return [int(digits) for digits in re.findall(r"\d+", f"{path.parent.name}/{path.name}")]


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: frozenset[str]) -> bool:
    return all(name in second and torch.equal(first[name], second[name]) for name in first if name in names)


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


def _widths(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Every field of EcapaConfig that the tensors' shapes tell."""

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
