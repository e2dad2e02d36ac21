"""The stages of one SUPERB run: check, prepare, train, choose, evaluate, score.

Each stage starts alone, says what it does, skips what is done and leaves finished work as it is when it fails. A stage
is done if a record in ``.done`` says so *and* was made from the same: the run's identity (:mod:`.identity`) and the
stages before it. The training and the evaluations are stock, ``python -m s3prl.run_downstream`` in processes of their
own; nothing here takes part in them, and nothing here knows a task by its name (see :mod:`.tasks`).
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from s3prl_speaker_upstreams.common import provenance
from s3prl_speaker_upstreams.common.digests import json_sha256
from s3prl_speaker_upstreams.common.files import locked, write_json
from s3prl_speaker_upstreams.errors import ConfigError, MissingPackage
from s3prl_speaker_upstreams.superb import configuration, stock
from s3prl_speaker_upstreams.superb.checks import CorpusReport, check_corpus, need_root, remarks
from s3prl_speaker_upstreams.superb.errors import NoSpaceLeft, RunFailed, UnknownTask
from s3prl_speaker_upstreams.superb.prepare import prepare
from s3prl_speaker_upstreams.superb.run import Run
from s3prl_speaker_upstreams.superb.tasks import SWEEP, TASKS
from s3prl_speaker_upstreams.superb.upstream import check_device
from s3prl_speaker_upstreams.superb.work import Work, plain

__all__ = ["STAGES", "Run", "run_stages"]

logger = logging.getLogger(__name__)

_SMOKE_SEED = 0


def _check(work: Work) -> None:
    run, task = work.run, work.run.task
    missing = [package.pip for package in task.packages if importlib.util.find_spec(package.module) is None]
    if missing:
        raise MissingPackage(
            f"{task.name} needs {', '.join(missing)}: pip install {' '.join(missing)} "
            "(or 's3prl-speaker-upstreams[superb]' for every task)"
        )
    if run.s3prl_root is not None and not (run.s3prl_root / "s3prl" / "run_downstream.py").is_file():
        raise ConfigError(f"{run.s3prl_root}: not a checkout of s3prl; expected s3prl/run_downstream.py in it")
    if run.data is not None:
        need_root(task, run.corpus)
    check_device(run.device, run.nproc)
    _enough_space(work, configuration.effective(run))
    if run.smoke and run.data is None:
        _smoke_corpus(run)
    inputs = json_sha256(work.static)
    if not work.is_done("check", inputs):
        report = _checked_corpus(work)
        answer = work.probe()
        logger.info(
            "%s: %d layers of %d, a frame each %d samples",
            run.upstream,
            answer["layers"],
            answer["dim"],
            answer["rate"],
        )
        found = {"counts": report.counts, "hours": report.seconds / 3600, "remarks": report.remarks}
        work.mark("check", inputs, **found, upstream=answer)
    work.compare_early()


def _checked_corpus(work: Work) -> CorpusReport:
    """The report on the corpus, which one process makes and all runs on the same corpus share."""
    run = work.run
    file = run.prepared.with_name(f"{run.prepared.name}.checked.json")
    with locked(file.with_name(f".{file.name}.lock"), str(file), timeout=-1):
        kept = json.loads(file.read_text()) if file.is_file() else {}
        if not run.force and kept.get("corpus") == work.static["corpus"]:
            known = {**kept["report"], "root": Path(kept["report"]["root"])}
            return CorpusReport(**{**known, "remarks": tuple(known["remarks"])})
        report = check_corpus(run.task, run.corpus)
        write_json(file, {"corpus": work.static["corpus"], "report": asdict(report)})
        return report


def _smoke_corpus(run: Run) -> None:
    """Generate the small corpus of --smoke, once, whichever processes ask for it."""
    from s3prl_speaker_upstreams.demo.corpora import once

    once(run.corpus, lambda out: run.task.demo(out, _SMOKE_SEED))


def _enough_space(work: Work, config: dict[str, Any]) -> None:
    """A run that would fill the disk must not start."""
    run = work.run
    if not run.task.trained:
        return
    runner = config["runner"]
    saved = int(runner["total_steps"]) // int(runner["save_step"])
    keep = min(int(runner.get("max_keep", 1)), saved) + 2  # states, best on dev, and the one being written
    each = 5 if run.smoke else run.task.checkpoint_mb
    need = keep * each * 2**20 * len(work.own_experiments())
    run.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(run.folder).free
    if free < need:
        raise NoSpaceLeft(
            f"{run.folder}: {free / 2**30:.1f} GiB free, but {run.task.name}'s checkpoints may take "
            f"{need / 2**30:.1f} GiB; make room or give another --exp"
        )


def _prepare(work: Work) -> None:
    run = work.run
    prepare(run.task, run.corpus, run.prepared, run.s3prl_root, corpus=work.static["corpus"], force=run.force)


def _train(work: Work) -> None:
    run = work.run
    if not run.task.trained:
        logger.info("train: nothing to train in %s", run.task.name)
        return
    work.needs(run.prepared / ".whole", "prepare")
    failed: list[str] = []
    several = len(configuration.rates(run)) > 1
    for lr, fold, expdir in work.own_experiments():
        with work.alone(expdir):
            try:
                work.train_one(lr, fold, expdir)
            except RunFailed as error:
                if not several:
                    raise
                if stock.no_finite_number(error):  # as too high a learning rate does: the others decide
                    why = f"diverged: {str(error).rstrip().rsplit(chr(10), 1)[-1]}"
                    logger.warning("%s: %s; choosing will leave it out", expdir, why)
                    work.mark(work.stage_of(expdir), work.train_inputs(lr, fold), lr=lr, fold=fold, diverged=why)
                else:
                    logger.error("%s: %s", expdir, error)
                    failed.append(f"{expdir} ({str(error).rstrip().rsplit(chr(10), 1)[-1]})")
    if failed:
        raise RunFailed(
            f"{len(failed)} of {len(work.own_experiments())} trainings failed, the others are finished: "
            f"{'; '.join(failed)}. Start again: what is finished is kept"
        )


def _choose(work: Work) -> None:
    run = work.run
    trained = [work.stage_of(expdir) for _, _, expdir in work.experiments()]
    inputs = work.chained(*trained, rates=list(configuration.rates(run)))
    if work.is_done("choose", inputs) and (run.folder / "choice.json").is_file():
        return
    for lr, fold, expdir in work.experiments():
        work.needs(work.marker(work.stage_of(expdir)), "train")
        if work.record(work.stage_of(expdir)).get("inputs") != work.train_inputs(lr, fold):
            work.claim()  # names the field that differs, where it is one of the run
            raise ConfigError(f"{expdir}: was trained for other settings than these; run the train stage first")
    work.claim()
    choice = plain(run.task.choose(work))
    write_json(run.folder / "choice.json", choice)
    work.mark("choose", inputs, **choice)
    logger.info("choose: %s", json.dumps({key: value for key, value in choice.items() if key != "candidates"}))


def _choice(work: Work) -> dict[str, Any]:
    work.needs(work.run.folder / "choice.json", "choose")
    work.claim()
    return json.loads((work.run.folder / "choice.json").read_text())


def _evaluate(work: Work) -> None:
    inputs = work.chained("choose")
    if work.is_done("evaluate", inputs):
        return
    work.run.task.evaluate(work, _choice(work))
    work.mark("evaluate", inputs)


def _score(work: Work) -> None:
    run, task = work.run, work.run.task
    inputs = work.chained("choose", "evaluate")
    if work.is_done("score", inputs) and (run.folder / "result.json").is_file():
        return
    choice = _choice(work)
    found = task.score(work, choice)
    made = work.identity()
    reasons = _not_stock(work, choice)
    folder = json.loads((run.folder / "identity.json").read_text())
    checkpoints = list(choice["checkpoints"].values())
    result = {
        "task": task.name,
        "label": run.label,
        "upstream": run.upstream,
        "metrics": found.metrics,
        "stock": not reasons,
        "not_stock": reasons,
        "weights": {"ckpt": run.ckpt, "file": made["ckpt"], "state": made["state"]},
        "model_config": {"path": run.model_config, "content": made["model_config"]},
        "feature": run.feature,
        "normalize": run.normalize,
        "layers": work.layers(),
        "lr": choice.get("lr"),
        "seed": run.seed,
        "settings": {key: str(value) for key, value in sorted(run.settings.items())},
        "config": configuration.flat(configuration.effective(run, choice.get("lr"))),
        "choice": {key: value for key, value in choice.items() if key != "candidates"},
        "details": found.details,
        "predictions": str(found.home),
        "checkpoints": checkpoints,
        "resumes": {path: list(work.resumes(Path(path).parent)) for path in checkpoints},
        "corpus": str(run.corpus),
        "corpus_sha256": made["corpus"],
        "counts": {split: len(paths) for split, paths in work.layout.splits.items()},
        "prepared_sha256": made["prepared"],
        "s3prl": made["s3prl"],
        "versions": provenance.versions(),
        "adopted": folder["adopted"],
        "accepted": list(run.accept),
        "device": run.device,
        "nproc": run.nproc,
        "git_revision": provenance.git_revision(),
        "command": " ".join(sys.argv),
    }
    write_json(run.folder / "result.json", plain(result))
    work.mark("score", inputs)
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in found.metrics.items())
    logger.info("%s %s: %s", run.label, task.name, numbers)


def _not_stock(work: Work, choice: dict[str, Any]) -> list[str]:
    """Why a result may not stand beside published ones unmarked; empty where everything is the benchmark's."""
    run = work.run
    reasons = configuration.not_stock(run)
    counts = {split: len(paths) for split, paths in work.layout.splits.items()}
    reasons += remarks(run.task, counts)
    lr = choice.get("lr")
    if lr is not None and not run.smoke and lr not in (*SWEEP, *configuration.rates(Run(**{**vars(run), "lrs": ()}))):
        reasons.append(f"learning rate {lr:g} (the benchmark's are its own and powers of ten)")
    return reasons + [f"--accept {name}" for name in run.accept]


STAGES: dict[str, Callable[[Work], None]] = {
    "check": _check,
    "prepare": _prepare,
    "train": _train,
    "choose": _choose,
    "evaluate": _evaluate,
    "score": _score,
}
"""Stage -> what it does, in order; collecting works on all runs at once (:mod:`.collect`)."""


def run_stages(run: Run, stages: Sequence[str] = tuple(STAGES)) -> None:
    """Run stages of one task with one upstream, in the given order.

    Raises
    ------
    SpeakerUpstreamError of the kind that tells what to do: CorpusError, IdentityMismatch, UnknownTask, MissingPackage,
    NoSpaceLeft, RunFailed, ScoringError, Busy or ConfigError. Work finished before it stays.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise ConfigError(f"unknown stage {unknown[0]!r}; the stages are {', '.join(STAGES)}, collect")
    if run.task.name not in TASKS:
        raise UnknownTask(f"unknown task {run.task.name!r}; the tasks are {', '.join(TASKS)}")
    configuration.effective(run)  # settings are judged before anything is done
    work = Work(run, stages)
    for stage in stages:
        logger.info("== %s %s: %s", run.task.name, run.label, stage)
        with _held(work, stage):
            STAGES[stage](work)


def _held(work: Work, stage: str) -> AbstractContextManager[None]:
    """Locks of a stage: one process chooses and scores, none while another trains; the others lock for themselves."""
    if stage in ("check", "prepare", "train"):
        return nullcontext()
    return work.alone(*(expdir for _, _, expdir in work.experiments()))
