"""A checkpoint format: what one project's files look like, as data, and how any format's file is read.

One project's format is a subclass in :mod:`.formats`: its key map, its own names for teacher and student, what shows
that a file is of it, where its training keeps weights and configuration, and what that configuration means.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..ecapa.config import DIALECTS
from ..errors import CheckpointMismatch
from .checkpoint import NORM_LEAVES, Checkpoint
from .files import File, option
from .networks import Network, find_networks
from .porting import front_end_of, port, widths_of
from .sidecars import Settings

__all__ = ["COMMON", "INSIDE", "NAMED", "NOTHING", "SPECIFIC", "STATED", "Evidence", "Format"]

logger = logging.getLogger(__name__)

# How surely a file is of a format whose tensors others have, too: nothing says so; it is the commonest of them; its
# name or a width says so; its neighbours do; its own contents do, and do so for this one format alone.
NOTHING, COMMON, NAMED, STATED, INSIDE, SPECIFIC = range(6)
# Present or absent by design: the file decides, and the configuration follows.
_OPTIONAL = ("mfa.norm", "pool.norm", "embedding_norm")
_MOST_RES2 = 15


class Evidence(NamedTuple):
    """How near a file is to a format.

    share : of the format's tensors, those that the likeliest network of the file has; lacking : the first of the others
    strength : how surely it is of this format among those that have the same tensors (NOTHING to SPECIFIC); why : what
        says so

    >>> Evidence().strength == NOTHING
    True
    """

    share: float = 0.0
    lacking: str = ""
    strength: int = NOTHING
    why: str = ""


class Format:
    """One checkpoint format. Subclasses set the attributes, and say what the project's configuration means.

    The network:

    name : what ``format=`` takes
    title : what people call it
    dialects : front-ends that its files are used with, keys of ``ecapa.DIALECTS``; the first is its authors'
    modules : this package's module names to the original's; ``{b}`` runs over blocks 2 to 4, ``{n}`` is ``b - 1`` and
        ``{j}`` runs over the Res2 convolutions. The leaves (weight, bias, statistics) are the same everywhere
    ignored : regular expressions (matched at the start) of tensors that belong to the training, not to the network
    buffers : front-end tensors that the file carries, ``{"window": key, "mel": key, "preemphasis": key}``
    pairs : the project itself trains a teacher and a student, so that which one is used is its own rule
    teacher_used : what some name in the file must have as a part for the teacher to be the one that is used
    alone : role of a network that is the only one in its file
    teacher_head : beginning of names that the average of a self-supervised training, its teacher alone, keeps

    Its files and folders:

    folder_files : patterns under which the project's folders hold weights, best first
    configuration : name of the file that describes a training or a published model
    levels : how many folders above the weights it may be, by regular expressions of the folder that holds the weights

    What shows, where others have the same tensors, that a file is of this format:

    metadata_format : "format" in a safetensors file's metadata
    within, own_entries : what its training puts before the network (with a "head." beside it), and top-level entries
    told_by : names of neighbouring files and regular expressions of what they hold ("" if being there is enough)
    told_by_folder, told_by_name : regular expressions of the folder's and the file's name
    told_by_width : an embedding so wide that only this format's are
    common : it is the likeliest if nothing shows what a file is

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
    pairs: bool = False
    teacher_used: str = ""
    alone: str = "supervised"
    teacher_head: str = ""

    folder_files: tuple[str, ...] = ()
    configuration: str = ""
    levels: Mapping[str, int] = {}

    metadata_format: str = ""
    within: str = ""
    own_entries: frozenset[str] = frozenset()
    told_by: tuple[tuple[str, str], ...] = ()
    told_by_folder: str = ""
    told_by_name: str = ""
    told_by_width: int = 0
    common: bool = False

    # --- what a project says in its own words -----------------------------------------------------------------------

    def settings(self, path: Path, source: Path | None) -> Settings:
        """What the project's own configuration of a weights file states; `source` is its file, None if there is none.

        Raises CheckpointMismatch if it describes a model or front-end that cannot be had.
        """
        return Settings()

    def find(self, folder: Path, role: str | None = None) -> list[Path]:
        """Weights files of a folder that its project laid out, best first; of numbered ones the latest comes first."""
        found: dict[Path, None] = {}
        for pattern in self.folder_files:
            files = (path for path in folder.glob(pattern) if path.is_file())
            found.update(dict.fromkeys(sorted(files, key=_age, reverse=True)))
        return list(found)

    # --- finding it --------------------------------------------------------------------------------------------------

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

    def networks(self, file: File) -> list[Network]:
        """Every network of this format that a file holds."""
        networks = find_networks(file.tensors, self._every_name)
        averaged = self.teacher_head and any(name.startswith(self.teacher_head) for n in networks for name in n.state)
        alone = "teacher" if averaged else self.alone
        return [dataclasses.replace(n, role=alone) if n.role == "supervised" else n for n in networks]

    def wanted(self, state: Mapping[str, Tensor]) -> dict[str, str]:
        """Our names to theirs of every tensor that a network with these tensors should have."""
        theirs = self.modules["block_{b}.res2.{j}.conv"]
        count = 1  # without Res2 convolutions it is no ECAPA-TDNN: the first of them is then missing
        while f"{theirs.format(b=2, n=1, j=count)}.weight" in state:
            count += 1
        absent = tuple(f"{module}." for module in _OPTIONAL if f"{self.modules.get(module, '')}.weight" not in state)
        return {ours: name for ours, name in self.names(count).items() if not ours.startswith(absent)}

    def evidence(self, file: File) -> Evidence:
        """How near a file is to this format."""
        networks = self.networks(file) if self.modules else []
        best, lacking = 0.0, ""
        for network in networks:
            names = [name for name in self.wanted(network.state).values() if not name.endswith("num_batches_tracked")]
            missing = [name for name in names if name not in network.state]
            if (share := 1 - len(missing) / len(names)) > best:
                best, lacking = share, missing[0] if missing else ""
        return Evidence(best, lacking, *self._claim(file, networks))

    def _claim(self, file: File, networks: list[Network]) -> tuple[int, str]:
        """What says, beyond the tensors' names, that a file is of this format, and how surely."""
        if self.within and any(self._is_within(network, file) for network in networks):
            return (SPECIFIC if self.own_entries & file.entries else INSIDE, f"{self.within} and heads")
        for name, content in self.told_by:
            place = self.beside(file.path, name)
            if place is not None and (not content or re.search(content, _text(place), re.DOTALL)):
                return (STATED, f"{place} beside it is {self.title}'s")
        for folder in (place.parent.name for place in _places(file.path)):
            if self.told_by_folder and re.match(self.told_by_folder, folder):
                return (STATED, f"the folder {folder} is of a {self.title} training")
        if self.told_by_name and re.search(self.told_by_name, file.path.name):
            return (NAMED, f"its name {file.path.name}")
        if self.within and any(network.where.endswith(self.within) for network in networks):
            return (NAMED, f"its tensors' names, {self.within}")
        embeddings = (network.state.get(f"{self.modules['embedding']}.weight") for network in networks)
        if self.told_by_width and any(w is not None and len(w) == self.told_by_width for w in embeddings):
            return (NAMED, f"the width of its embedding, {self.told_by_width}")
        return (COMMON, "being the commonest") if self.common else (NOTHING, "")

    def _is_within(self, network: Network, file: File) -> bool:
        if not network.where.endswith(self.within):
            return False
        head = f"{network.where.removesuffix(self.within)}head."
        return network.where.startswith(("teacher.", "student.")) or any(
            head in f"{path.replace('module.', '')}" for path in file.tensors
        )

    def beside(self, path: Path, name: str) -> Path | None:
        """A neighbour of a weights file: in its folder, or above where its training's folders have it there."""
        for place in _places(path):
            above = next((n for pattern, n in self.levels.items() if re.fullmatch(pattern, place.parent.name)), 0)
            for folder in list(place.parents)[: above + 1]:
                if (folder / name).is_file():
                    return folder / name
        return None

    # --- reading it --------------------------------------------------------------------------------------------------

    def read(self, file: File, *, role: str | None = None, copy: str | None = None) -> Checkpoint:
        """The network of a file that a role and a copy name, in this package's names.

        role : "teacher" or "student", where the file holds both; by default the one that its project uses
        copy : "ema" or "raw", where the file holds an averaged copy beside the trained weights; by default the average

        Raises CheckpointMismatch if a tensor is missing, or there is one that nothing accounts for, naming the first.
        """
        network, others = self._choose(file, role, copy)
        state = port(
            file, network, others, self.wanted(network.state),
            ignored=self.ignored, buffers=self.buffers.values(), what=f"{self.title}, {self.name}",
        )  # fmt: skip
        widths, dialect = widths_of(state), DIALECTS[self.dialects[0]]
        frontend, buffers = front_end_of(network, self.buffers, dialect.frontend, file.path)
        settings = self.settings(file.path, self.beside(file.path, self.configuration) if self.configuration else None)
        for key, value in settings.ecapa.items():
            if key in widths and widths[key] != value:
                raise CheckpointMismatch(
                    f"{file.path}: got {key}={widths[key]} by its tensors, expected {value} as {settings.source} says; "
                    "the two are not of one model: move the file out of the folder to read it alone"
                )
        config = dialect.ecapa_config(**{**widths, **settings.ecapa})
        told = {} if buffers else settings.frontend  # where the file carries the front-end, it is that one
        provenance = {"file": file.path.name, "format": self.name, "bytes": file.path.stat().st_size}
        if network.copy == "ema":
            provenance["copy"] = "ema"
        return Checkpoint(
            config, frontend.replace(**{"n_mels": config.n_mels, **told}), state, self.name, network.role, provenance,
            buffers,
        )  # fmt: skip

    def _choose(self, file: File, role: str | None, copy: str | None) -> tuple[Network, list[Network]]:
        networks = self.networks(file)
        if not networks:
            raise CheckpointMismatch(f"{file.path}: got no tensors of {self.title} ({self.name})")
        roles = list(dict.fromkeys(network.role for network in networks))
        wanted = role or self._used(roles, file)
        if wanted not in roles:
            raise CheckpointMismatch(
                f"{file.path}: got a {self.title} file with {' and '.join(f'the {r} network' for r in roles)}, "
                f"expected the {wanted}; leave role out, or pass role={roles[0]}{self._where_else(wanted)}"
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
                "pass %s", file.path, network.where, option("copy", "raw"),
            )  # fmt: skip
        if len(roles) > 1 and role is None:
            logger.log(
                logging.INFO if self.pairs else logging.WARNING, "%s: reading the %s (%s); for the other pass %s",
                file.path, wanted, network.where, option("role", next(r for r in roles if r != wanted)),
            )  # fmt: skip
        return network, others

    def _used(self, roles: list[str], file: File) -> str:
        """Which of several networks the project uses."""
        if "teacher" in roles and (
            not self.teacher_used or any(self.teacher_used in path.split(".") for path in file.tensors)
        ):
            return "teacher"
        return "student" if "student" in roles else roles[0]

    def _where_else(self, role: str) -> str:
        """Where the project keeps a network that this file does not hold, as an ending of the message."""
        return ""


def _places(path: Path) -> tuple[Path, Path]:
    """A file's path in full, and that of the file which it may link to: a training's neighbours are beside either."""
    return path.absolute(), path.resolve()


def _age(path: Path) -> list[int]:
    """Order of a training's numbered files and folders: all numbers of their names."""
    return [int(digits) for digits in re.findall(r"\d+", f"{path.parent.name}/{path.name}")]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: frozenset[str]) -> bool:
    return all(name in second and torch.equal(first[name], second[name]) for name in first if name in names)
