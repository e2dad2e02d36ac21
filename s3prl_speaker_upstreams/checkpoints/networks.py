"""Finding the networks in whatever a training program saved, under whatever names it put before them.

A network is known by the names of its own tensors; what stands before them in the file ("state_dict.model.",
"teacher.module.backbone.", "ema.") is the trainer's business and only tells which of several copies it is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["COPIES", "Network", "find_networks", "leftovers"]

COPIES = ("ema", "raw")

# What wrappers put into names, anywhere: DistributedDataParallel, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_TEACHERS = frozenset(
    "teacher t_model teacher_model teacher_encoder encoder_momentum momentum_encoder encoder_k encoder_ema".split()
)
_STUDENTS = frozenset("student s_model student_model student_encoder encoder_q".split())
_AVERAGED = re.compile(r"(?:\w+_)?(?:ema|swa|averaged)(?:_\w+)?")
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
    r"|center|n_averaged|num_updates|decay)(?:_momentum|_ema)?|(?:train|val|valid|test)_\w+"
)


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


def _plain(path: str) -> str:
    """A name without what wrappers put into it."""
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
    plain = {_plain(path): tensor for path, tensor in tensors.items()}
    votes: Counter[str] = Counter()
    for path in plain:
        parts = path.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in names:
                votes["".join(f"{part}." for part in parts[:i])] += 1
    places = [where for where in dict.fromkeys(votes) if votes[where] >= max(1, max(votes.values()) // 2)]
    kinds = {where: _kind(where, plain) for where in places}
    paired = {role for role, _ in kinds.values()} & {"teacher", "student"}
    networks = []
    for where, (role, copy) in kinds.items():
        state = {path[len(where) :]: tensor for path, tensor in plain.items() if path.startswith(where)}
        # Beside a teacher, what is not called anything is the student (sslsv's "encoder", "encoder_momentum").
        role = role or ("student" if "teacher" in paired else "supervised")
        networks.append(Network(where, state, role, copy))
    return networks


def _kind(where: str, plain: Mapping[str, Tensor]) -> tuple[str | None, str]:
    parts = where.split(".")[:-1]
    role = "teacher" if _TEACHERS & set(parts) else "student" if _STUDENTS & set(parts) else None
    # torch's AveragedModel counts beside its copy how often it was updated.
    averaged = f"{where}n_averaged" in plain or any(_AVERAGED.fullmatch(part) for part in parts)
    return role, "ema" if averaged and role != "teacher" else "raw"


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
        path = _plain(raw)
        inside = path.startswith(network.where)
        name = path[len(network.where) :] if inside else _without_holders(path)
        if inside and name in used or path.startswith(places):
            continue
        parts = name.split(".")
        if _TRAINER.fullmatch(path.split(".")[0]) or _TRAINER.fullmatch(parts[0]) or _HEADS.fullmatch(parts[0]):
            continue
        if any(pattern.match(name) for pattern in patterns) or _is_behind(path, network.where):
            continue
        if any(_AVERAGED.fullmatch(part) for part in path.removesuffix(name).split(".") + parts[:-1] if part):
            averaged.append(raw)
            continue
        unknown.append(raw)
    return unknown, averaged


def _without_holders(path: str) -> str:
    parts = path.split(".")
    while len(parts) > 1 and (parts[0] in _HOLDERS | _TEACHERS | _STUDENTS or _AVERAGED.fullmatch(parts[0])):
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
