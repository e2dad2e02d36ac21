"""What a SUPERB task is: its description, and what it does in each stage. One file in :mod:`.tasks` for each.

A task is a :class:`Task` (or a subclass that overrides what differs) called ``TASK`` in a module of the folder
``tasks``; stages, tables and command line find it there and know none by its name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.superb.errors import ScoringError
from s3prl_speaker_upstreams.superb.layouts import Layout

if TYPE_CHECKING:
    from s3prl_speaker_upstreams.superb.work import Work

__all__ = ["Metric", "Package", "Score", "Task", "loader_folders", "metrics_file", "printed", "small_rnn"]

STEPS: dict[str, Any] = {"runner.total_steps": 4, "runner.log_step": 2, "runner.eval_step": 2, "runner.save_step": 2}
"""Settings that let a trained task end after four updates (``--smoke``)."""

STFT_STEPS: dict[str, Any] = {
    **STEPS,
    "downstream_expert.loaderrc.train_batchsize": 2,
    "runner.max_keep": 1,
    "downstream_expert.modelrc.hidden_size": 32,
    "downstream_expert.modelrc.rnn_layers": 1,
    "downstream_expert.modelrc.dropout": 0.0,
}
"""The same for SE and SS, whose masks come from one kind of recurrent network: a small one."""


@dataclass(frozen=True)
class Metric:
    """One number of a task.

    name : column in tables, for example "PER"
    key : what the runner prints before the number in ``test.log`` (after the split's name), or "" if scored by us
    scale : factor from the printed number to the table's unit (100 for shares given as per cent)
    higher : whether more is better
    leaderboard : the column of SUPERB's leaderboard
    points : (value that scores 0, value that scores 1000) in the SUPERB score
    published : row of :data:`.reference.SOURCES` -> value, in the table's unit
    """

    name: str
    key: str
    scale: float
    higher: bool
    leaderboard: str
    points: tuple[float, float]
    published: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Package:
    """An import that a task's s3prl code needs beyond s3prl's own requirements, and how pip calls it."""

    module: str
    pip: str


EDITDISTANCE = Package("editdistance", "editdistance")
H5PY = Package("h5py", "h5py")
LIBROSA = Package("librosa", "librosa")
TENSORBOARD = Package("tensorboardX", "tensorboardX")


@dataclass(frozen=True)
class Score:
    """What scoring found: `metrics` in the table's units, `details`, and the folder that holds the predictions."""

    metrics: dict[str, float]
    details: dict[str, Any]
    home: Path


@dataclass(frozen=True)
class Task:
    """One task; the methods are what its stages do, and suit a task that is trained and chooses on dev.

    Parameters
    ----------
    name, title, order : how it is called, what it is, its place in tables
    downstream : s3prl's ``-d``
    corpus : what to download, and from where, as an error says it
    smoke : dotted configuration keys that make a run take seconds
    workers, batch : dotted keys of the loader processes and of the training batch ("" if it has none)
    distributed : whether s3prl gives each GPU other utterances
    best : the checkpoint that training marks as best on dev; "" if there is none
    best_is_higher : of the dev score in that checkpoint
    free : further keys that s3prl reads and the yaml does not hold
    any_rate : whether s3prl resamples the recordings itself
    walks : whether s3prl walks the corpus itself (and so meets hidden files, and follows no links to folders)
    paper : whether the task counts in the SUPERB score
    predictions : (file or folder in the run, place in the leaderboard's archive)
    counts : utterances of the full corpus by split, where published; another number makes a result "not stock"
    checkpoint_mb : upper estimate of one checkpoint, for the free space that a run needs
    """

    name: str
    title: str
    order: int
    downstream: str
    corpus: str
    packages: tuple[Package, ...]
    metrics: tuple[Metric, ...]
    predictions: tuple[tuple[str, str], ...]
    smoke: dict[str, Any]
    workers: str = "downstream_expert.datarc.num_workers"
    batch: str = ""
    distributed: bool = True
    best: str = "dev-best.ckpt"
    best_is_higher: bool = True
    test_split: str = "test"
    dev_split: str = "dev"
    folds: tuple[str, ...] = ()
    fold_key: str = ""
    free: tuple[str, ...] = ()
    trained: bool = True
    any_rate: bool = False
    walks: bool = False
    paper: bool = True
    counts: dict[str, int] = field(default_factory=dict)
    checkpoint_mb: int = 100

    # ------------------------------------------------------------------------------------------------ the corpus

    def layout(self, root: Path) -> Layout:
        """What the task reads below `root`.

        Raises CorpusError if a part is missing or its lists do not fit its recordings.
        """
        raise NotImplementedError(f"{self.name}: layout")

    def prepare(self, data: Path, out: Path, s3prl_root: Path | None) -> None:
        """Write into `out` what s3prl reads beside the corpus; nothing by default."""

    def settings(self, data: Path, prepared: Path) -> dict[str, Any]:
        """Dotted configuration keys that say where the corpus and the prepared files lie."""
        raise NotImplementedError(f"{self.name}: settings")

    def demo(self, out: Path, seed: int) -> None:
        """Write a small generated corpus for ``--smoke`` (see :mod:`s3prl_speaker_upstreams.demo.corpora`)."""
        from s3prl_speaker_upstreams.demo.corpora import GENERATORS, generate

        if self.name not in GENERATORS:
            raise ConfigError(f"--smoke: there is no generated corpus for {self.name}; give one with --data")
        generate(self.name, out, seed=seed)

    # ------------------------------------------------------------------------------------------------ the stages

    def choose(self, work: Work) -> dict[str, Any]:
        """Which checkpoint is tested, and why; by default the best on dev of the best learning rate."""
        return work.choose_on_dev()

    def evaluate(self, work: Work, choice: dict[str, Any]) -> None:
        """Run s3prl's evaluation of what was chosen."""
        for path in map(Path, choice["checkpoints"].values()):
            work.test(path, self.test_split, path.parent / "test.log", fresh=True)

    def score(self, work: Work, choice: dict[str, Any]) -> Score:
        """Collect the numbers of the evaluation; the mean over folds where the task has them."""
        each: dict[str, dict[str, float]] = {}
        details: dict[str, Any] = {}
        for fold, path in choice["checkpoints"].items():
            each[fold], detail = self.read_score(work, Path(path).parent)
            details = {**details, fold: detail} if fold else detail
        mean = {metric.name: sum(one[metric.name] for one in each.values()) / len(each) for metric in self.metrics}
        first = Path(next(iter(choice["checkpoints"].values()))).parent
        return Score(mean, {"folds": each} if self.folds else details, first.parent if self.folds else first)

    def read_score(self, work: Work, expdir: Path) -> tuple[dict[str, float], dict[str, Any]]:
        """Metrics of one evaluated experiment folder, in the table's units, and details."""
        log = expdir / "test.log"
        work.needs(log, "evaluate")
        text = log.read_text(errors="replace")
        return {m.name: m.scale * printed(text, f"{self.test_split} {m.key}", log) for m in self.metrics}, {}


def printed(text: str, key: str, source: Path) -> float:
    """The last ``key: number`` that the runner printed.

    Examples
    --------
    >>> printed("test acc: 0.25\\ntest acc: 0.5\\n", "test acc", Path("log"))
    0.5
    """
    found = re.findall(rf"^{re.escape(key)}: (\S+)\s*$", text, re.MULTILINE)
    if not found:
        raise ScoringError(f"{source}: no line {key!r}; the evaluation did not reach its end, run the evaluate stage")
    return float(found[-1])


def metrics_file(work: Work, task: Task, expdir: Path) -> dict[str, float]:
    """The metrics of ``test_metrics.txt``, which SE and SS write."""
    file = expdir / "test_metrics.txt"
    work.needs(file, "evaluate")
    values = dict(line.split(maxsplit=1) for line in file.read_text().splitlines() if line.strip())
    absent = [metric.key for metric in task.metrics if metric.key not in values]
    if absent:
        raise ScoringError(f"{file}: no line {absent[0]!r}; run the evaluate stage again")
    return {metric.name: metric.scale * float(values[metric.key]) for metric in task.metrics}


def loader_folders(root: Path) -> dict[str, Any]:
    """Settings of the tasks whose loaders read Kaldi folders ``train``, ``dev`` and ``test``."""
    return {f"downstream_expert.loaderrc.{part}_dir": str(root / part) for part in ("train", "dev", "test")}


def small_rnn(where: str) -> dict[str, Any]:
    """Smoke settings of a recurrent downstream model configured at `where`."""
    layer: dict[str, Sequence[Any]] = {
        "dim": [32],
        "dropout": [0.0],
        "layer_norm": [False],
        "proj": [False],
        "sample_rate": [1],
    }
    return {f"{where}.project_dim": 32, **{f"{where}.RNNs.{key}": value for key, value in layer.items()}}
