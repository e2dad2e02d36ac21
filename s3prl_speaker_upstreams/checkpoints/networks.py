"""Finding the networks in whatever a training program saved, under whatever names it put before them.

A network is known by the names of its own tensors; what stands before them in the file ("state_dict.model.",
"teacher.module.backbone.", "ema.") is the trainer's business and only tells which of several copies it is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["AVERAGED", "COPIES", "STUDENTS", "TEACHERS", "Network", "find_networks", "plain_name"]

COPIES = ("ema", "raw")

# What wrappers put into names, anywhere: DistributedDataParallel, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
TEACHERS = frozenset(
    "teacher t_model teacher_model teacher_encoder encoder_momentum momentum_encoder encoder_k encoder_ema".split()
)
STUDENTS = frozenset("student s_model student_model student_encoder encoder_q".split())
AVERAGED = re.compile(r"(?:\w+_)?(?:ema|swa|averaged)(?:_\w+)?")
_TRAINED = "online_model"  # the trained weights within an averager (ema_pytorch)


@dataclass(frozen=True)
class Network:
    """One network in a file.

    where : what stands before its names in the file, "" or with a dot at the end
    state : its tensors, under its project's names
    role : "teacher", "student" or "supervised", by what stands before it and what else is in the file
    copy : "ema" for an averaged copy of the trained weights, else "raw"

    >>> Network("teacher.", {}, "teacher", "raw").where
    'teacher.'
    """

    where: str
    state: Mapping[str, Tensor]
    role: str
    copy: str


def plain_name(path: str) -> str:
    """A tensor's path without what wrappers put into it.

    >>> plain_name("encoder.module._orig_mod.blocks.0.weight")
    'encoder.blocks.0.weight'
    """
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def find_networks(tensors: Mapping[str, Tensor], names: Collection[str]) -> list[Network]:
    """Every place in a file where most of a network's tensors are.

    tensors : every tensor of the file by its full path
    names : those of the network

    >>> from torch import zeros
    >>> file = {"student.module.a.weight": zeros(1), "teacher.module.a.weight": zeros(1), "head.weight": zeros(1)}
    >>> [(network.where, network.role) for network in find_networks(file, {"a.weight"})]
    [('student.', 'student'), ('teacher.', 'teacher')]
    """
    plain = {plain_name(path): tensor for path, tensor in tensors.items()}
    votes: Counter[str] = Counter()
    for path in plain:
        parts = path.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in names:
                votes["".join(f"{part}." for part in parts[:i])] += 1
    most = max(votes.values(), default=0)
    found: dict[str, tuple[str, str]] = {}
    for where, count in votes.items():
        if count < max(1, most // 2):
            continue
        named = set(where.split("."))
        role = "teacher" if TEACHERS & named else "student" if STUDENTS & named else ""
        # torch's AveragedModel counts beside its copy how often it was updated.
        averaged = f"{where}n_averaged" in plain or any(map(AVERAGED.fullmatch, named))
        found[where] = role, "ema" if averaged and role != "teacher" and _TRAINED not in named else "raw"
    # Beside a teacher, what is not called anything is the student (sslsv's "encoder", "encoder_momentum").
    unnamed = "student" if ("teacher", "raw") in found.values() else "supervised"
    return [
        Network(
            where, {path[len(where) :]: plain[path] for path in plain if path.startswith(where)}, role or unnamed, copy
        )
        for where, (role, copy) in found.items()
    ]
