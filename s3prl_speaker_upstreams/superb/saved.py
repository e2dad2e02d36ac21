"""Checkpoints of s3prl's runner: read safely, in order, with what they say about how they were made."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s3prl_speaker_upstreams.common.experiments import read_experiment
from s3prl_speaker_upstreams.errors import CheckpointUnreadable

__all__ = ["Saved", "checkpoints", "read", "summary"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """One checkpoint.

    step : update after which it was saved
    best_score : the dev score that its downstream model remembers, or None
    finite : whether every trained value is a number
    args, config : s3prl's own record of the command and the yaml
    """

    path: Path
    step: int
    best_score: float | None
    finite: bool = True
    args: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def read(path: Path) -> dict[str, Any] | None:
    """What s3prl saved, or None if the file is not whole; only tensors, plain values and the Namespace are let in.

    Raises CheckpointUnreadable for a file that holds other objects: loading it could run code.
    """
    try:
        return read_experiment(path)
    except CheckpointUnreadable as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        logger.warning("%s", error)
        return None


def checkpoints(expdir: Path) -> list[Saved]:
    """Whole checkpoints of an experiment folder, oldest update first; cut ones are moved to ``*.broken``."""
    found = []
    for path in sorted([*expdir.glob("states-*.ckpt"), *expdir.glob("*best*.ckpt")]):
        if not path.is_file():  # a folder, a device, a link to nowhere: nothing that s3prl saved
            continue
        content = read(path)
        if content is None:
            logger.warning(
                "%s: not whole (a kill or a full disk while it was saved?); moved to %s.broken", path, path.name
            )
            path.rename(path.with_name(f"{path.name}.broken"))
            continue
        found.append(summary(path, content))
    return sorted(found, key=lambda one: (one.step, one.path.name))


def summary(path: Path, content: Mapping[str, Any]) -> Saved:
    """What matters of a checkpoint's content (as :func:`read` gives it)."""
    trained = {**content.get("Downstream", {}), **content.get("Featurizer", {})}
    score = trained.get("best_score")
    values = [value for name, value in trained.items() if name != "best_score" and value.is_floating_point()]
    return Saved(
        path,
        int(content["Step"]),
        None if score is None else float(score.reshape(-1)[0]),
        all(bool(value.isfinite().all()) for value in values),
        vars(content["Args"]) if "Args" in content else {},
        content.get("Config", {}),
    )
