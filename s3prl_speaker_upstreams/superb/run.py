"""One run as the command line describes it, and where its files lie.

Folders, below ``--exp`` (default ``exp/superb``)::

    prepared/TASK-KEY/            files beside the corpus, one folder for each corpus
    smoke-data/TASK/              the generated corpus of --smoke
    TAG/TASK/                     the run with s3prl's default seed; other seeds in TAG/TASK/seedN
    TAG/TASK/identity.json        what the run is made of, by content; work of another identity is refused here
    TAG/TASK/lr1e-04/             one stock experiment folder for each learning rate (ER: with fold1 .. fold5 in it)
    TAG/TASK/layer3-dev/          QbE: one for each layer
    TAG/TASK/choice.json          which learning rate, checkpoint or layer, and why
    TAG/TASK/result.json          the task's numbers, with all that made them
    TAG/TASK/.done/STAGE.json     finished stages and what they were made from
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.superb.task import Task

__all__ = ["DEFAULT_SEED", "Experiment", "Run", "rate_name"]

DEFAULT_SEED = 1337
"""Seed of s3prl's runner where none is given."""

Experiment = tuple[float, str | None, Path]
"""Learning rate, fold (or None), folder of one training."""


def rate_name(lr: float) -> str:
    """Folder of a learning rate: the fewest digits that give it back, so that no two rates share one.

    Examples
    --------
    >>> rate_name(1e-4), rate_name(1.5e-3), rate_name(2e-3)
    ('lr1e-04', 'lr1.5e-03', 'lr2e-03')
    """
    return next(f"lr{text}" for digits in range(18) if float(text := f"{lr:.{digits}e}") == lr)


@dataclass(frozen=True)
class Run:
    """One task with one upstream, as the command line gives it.

    data : root of the corpus; None only with `smoke`, which generates one
    conf : folder of the yaml files; None takes the package's own
    lrs : learning rates to try; empty takes the yaml's
    only_lr, only_fold : train these only (an element of a job array); choosing joins all
    nproc : GPUs for training through torchrun; 1 trains in one process
    settings : dotted config keys set last; anything here (or `smoke`) makes the run non-stock, which its result says
    accept : identity fields that may differ from recorded work, for example ("stack",); the result names them
    """

    task: Task
    upstream: str
    exp: Path
    data: Path | None = None
    conf: Path | None = None
    ckpt: str | None = None
    model_config: str | None = None
    feature: str = "hidden_states"
    normalize: bool = False
    tag: str | None = None
    device: str = "cuda"
    seed: int = DEFAULT_SEED
    workers: int | None = None
    lrs: tuple[float, ...] = ()
    only_lr: float | None = None
    only_fold: str | None = None
    s3prl_root: Path | None = None
    smoke: bool = False
    nproc: int = 1
    force: bool = False
    verbose: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    accept: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Name of the upstream in folders and tables."""
        return self.tag or self.upstream

    @property
    def folder(self) -> Path:
        """EXP/TAG/TASK, or its sub-folder for a seed that is not s3prl's default."""
        base = self.exp.absolute() / self.label / self.task.name
        if self.seed == DEFAULT_SEED or _seed_of(base) == self.seed:  # the second: made before seeds had folders
            return base
        return base / f"seed{self.seed}"

    @property
    def corpus(self) -> Path:
        """Root of the corpus, generated or given."""
        if self.data is not None:
            return self.data.absolute()
        if self.smoke:
            return self.exp.absolute() / "smoke-data" / self.task.name
        raise ConfigError(
            f"{self.task.name}: no corpus; give --data, or --smoke for a generated one. "
            f"{self.task.name} needs {self.task.corpus}"
        )

    @property
    def prepared(self) -> Path:
        """EXP/prepared/TASK-KEY, where KEY tells corpora (and checkouts) apart."""
        key = hashlib.sha256(f"{self.corpus.resolve()}\0{self.s3prl_root}".encode()).hexdigest()[:10]
        return self.exp.absolute() / "prepared" / f"{self.task.name}-{key}"

    @property
    def read_from(self) -> Path:
        """The corpus as s3prl is given it: itself, or a tree of links where s3prl's own walk would go wrong."""
        links = self.prepared / "corpus"
        return links if links.is_dir() else self.corpus

    @property
    def folds(self) -> Sequence[str | None]:
        """Folds of the task, or (None,)."""
        return self.task.folds or (None,)

    def experiment(self, lr: float, fold: str | None) -> Path:
        """Folder of one training."""
        folder = self.folder / rate_name(lr)
        return folder / fold if fold else folder

    @staticmethod
    def place(value: str | None) -> str | None:
        """A path of this machine absolute, so that it holds from any folder; names, URLs and ids as they are."""
        return os.path.abspath(value) if value is not None and os.path.exists(value) else value


def _seed_of(base: Path) -> int | None:
    """The seed that a run's folder was made with, by our record or by s3prl's own; None if there is neither."""
    record = base / "identity.json"
    if record.is_file():
        return json.loads(record.read_text())["identity"].get("seed")
    for file in sorted(base.glob("lr*/args_*.yaml")):  # s3prl's, of the first start
        found = re.search(r"^seed: (\d+)$", file.read_text(), re.MULTILINE)
        return int(found.group(1)) if found else None
    return None
