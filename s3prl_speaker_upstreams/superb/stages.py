"""The stages of one SUPERB run: check, prepare, train, choose, evaluate, score.

Each stage starts alone, says what it does, skips what is done (a small JSON file in ``.done`` records a finished stage
and what it was made from) and leaves finished work as it is when it fails. The training and the evaluations are stock:
``python -m s3prl.run_downstream`` in processes of their own; nothing here takes part in them.

Folders, below ``--exp`` (default ``exp/superb``)::

    prepared/TASK-KEY/            files beside the corpus, one folder for each corpus
    UPSTREAM/TASK/lr1e-04/        one stock experiment folder for each learning rate (ER: with fold1 .. fold5 in it)
    UPSTREAM/TASK/layer3-dev/     QbE: one for each layer
    UPSTREAM/TASK/choice.json     which learning rate, checkpoint or layer, and why
    UPSTREAM/TASK/result.json     the task's numbers, with the configuration and versions that made them
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import hashlib
import importlib.util
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from s3prl_speaker_upstreams.errors import CheckpointUnreadable, ConfigError, MissingPackage
from s3prl_speaker_upstreams.superb.audio import write_text
from s3prl_speaker_upstreams.superb.checks import check_corpus
from s3prl_speaker_upstreams.superb.corpora import generate
from s3prl_speaker_upstreams.superb.errors import NoSpaceLeft, RunFailed, ScoringError, UnknownTask
from s3prl_speaker_upstreams.superb.prepare import prepare
from s3prl_speaker_upstreams.superb.scoring import score_diarization, score_quesst
from s3prl_speaker_upstreams.superb.tasks import TASKS, Task

__all__ = ["CONF", "STAGES", "Checkpoint", "Run", "checkpoints", "run_stages"]

logger = logging.getLogger(__name__)

CONF = Path(__file__).resolve().parents[2] / "recipes" / "superb" / "conf"
"""The yaml files of the recipe in a source checkout; ``--conf`` gives others."""

_TAIL = 25  # lines of the stock runner's output that an error shows
_ASV_EVERY = 20000  # ASV tests the checkpoints of every so many updates (s3prl, sv_voxceleb1/test_expdir.sh)
_SMOKE_SEED = 0


@dataclass(frozen=True)
class Run:
    """One task with one upstream, as the command line gives it.

    data : root of the corpus; None only with `smoke`, which generates one
    lrs : learning rates to try; empty takes the yaml's
    nproc : GPUs for training through torchrun; 1 trains in one process
    settings : dotted config keys set last; anything here (or `smoke`) makes the run non-stock, which its result says
    """

    task: Task
    upstream: str
    exp: Path
    data: Path | None = None
    conf: Path = CONF
    ckpt: str | None = None
    model_config: str | None = None
    feature: str = "hidden_states"
    normalize: bool = False
    tag: str | None = None
    device: str = "cuda"
    seed: int = 1337
    workers: int | None = None
    lrs: tuple[float, ...] = ()
    s3prl_root: Path | None = None
    smoke: bool = False
    nproc: int = 1
    force: bool = False
    verbose: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """EXP/UPSTREAM/TASK."""
        return self.exp.absolute() / (self.tag or self.upstream) / self.task.name

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


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of s3prl's runner: its update, and the dev score that its downstream model remembers (or None)."""

    path: Path
    step: int
    best_score: float | None


# ------------------------------------------------------------------------------------------------ finished work


def _fingerprint(run: Run, stage: str) -> str:
    parts = {
        "stage": stage,
        "corpus": str(run.corpus),
        "ckpt": run.ckpt,
        "model_config": run.model_config,
        "feature": run.feature,
        "normalize": run.normalize,
        "seed": run.seed,
        "lrs": list(run.lrs),
        "smoke": run.smoke,
        "settings": {key: str(value) for key, value in sorted(run.settings.items())},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _marker(run: Run, stage: str) -> Path:
    return run.folder / ".done" / f"{stage}.json"


def _is_done(run: Run, stage: str) -> bool:
    marker = _marker(run, stage)
    if run.force or not marker.is_file():
        return False
    if json.loads(marker.read_text()).get("fingerprint") != _fingerprint(run, stage):
        logger.info("%s: made from other options; again", stage)
        return False
    logger.info("%s: done already (%s); --force repeats it", stage, marker)
    return True


def _mark(run: Run, stage: str, **facts: Any) -> None:
    record = {"fingerprint": _fingerprint(run, stage), "at": time.strftime("%Y-%m-%dT%H:%M:%S"), **facts}
    write_text(_marker(run, stage), json.dumps(record, indent=1) + "\n")


@contextlib.contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Hold the run's folder: two elements of a job array must not write into one experiment."""
    from filelock import FileLock, Timeout

    run.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(run.folder / ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunFailed(
            f"{run.folder}: another process works on this run; wait for it, or give another --tag"
        ) from error
    try:
        yield
    finally:
        lock.release()


# ------------------------------------------------------------------------------------------------ the stock runner


def _die_with_parent() -> None:
    """In the child: end when the parent is killed, so that no orphan goes on writing checkpoints (Linux only)."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)


def _environment(run: Run) -> dict[str, str]:
    environment = dict(os.environ)
    if run.s3prl_root is not None:
        parts = [str(run.s3prl_root.absolute()), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(part for part in parts if part)
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def _stock(
    run: Run, arguments: Sequence[str], log: Path, *, module: str = "s3prl.run_downstream", nproc: int = 1
) -> str:
    """Run one stock command and return what it printed; its output also goes to `log`, command first."""
    launcher = [sys.executable, "-m"]
    if nproc > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}", "-m"]
        module = "s3prl_speaker_upstreams.superb.distributed"
    command = [*launcher, module, *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    logger.info("$ %s\n  (output: %s)", " ".join(command), log)
    printed = bytearray()
    with open(log, "ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(run),
            preexec_fn=_die_with_parent if platform.system() == "Linux" else None,
        )
        assert process.stdout is not None
        try:
            while chunk := process.stdout.read1(65536):
                printed += chunk
                with contextlib.suppress(OSError):  # a full disk: the run's own error is the one to show
                    file.write(chunk)
                    file.flush()
                if run.verbose:
                    sys.stderr.buffer.write(chunk)
                    sys.stderr.flush()
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    text = printed.decode(errors="replace")
    if code != 0:
        raise _failure(run, command, code, text, log)
    return text


# what Python, and torch.save (whose C++ writer gives no reason), say when a file system takes no more
_FULL = re.compile(
    r"No space left on device|Errno 28\b|Disk quota exceeded|Errno 122\b|PytorchStreamWriter failed writing|"
    r"basic_ios::clear: iostream error|enforce fail at inline_container\.cc:\d+\] \. unexpected pos"
)


def _failure(run: Run, command: Sequence[str], code: int, text: str, log: Path) -> Exception:
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    tail = "\n".join(lines[-_TAIL:])
    if _FULL.search(text):
        return NoSpaceLeft(
            f"s3prl could not save: the disk of {run.folder} is full, or a quota is reached. Checkpoints saved before "
            "are kept; make room and start the stage again, it goes on from the last whole one. Last lines of "
            f"{log}:\n{tail}"
        )
    return RunFailed(
        f"{' '.join(command)} ended with code {code}. Finished work is kept; after the cause is removed, start the "
        f"stage again. Last lines of {log}:\n{tail}"
    )


def _literal(value: Any) -> str:
    text = repr(value)
    if "=" in text or ",," in text:
        raise ConfigError(f"{text}: s3prl's override option cannot carry '=' or ',,'; rename the folder or link to it")
    return text


def _overrides(values: dict[str, Any]) -> list[str]:
    return ["-o", ",,".join(f"{key}={_literal(value)}" for key, value in values.items())] if values else []


def _upstream_arguments(run: Run) -> list[str]:
    arguments = ["-u", run.upstream, "-d", run.task.downstream, "--device", run.device, "--seed", str(run.seed)]
    for flag, value in (("-k", run.ckpt), ("-g", run.model_config), ("-s", run.feature)):
        arguments += [flag, value] if value else []
    return arguments + (["--upstream_feature_normalize"] if run.normalize else [])


# ------------------------------------------------------------------------------------------------ configuration


def _assign(config: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
    config[last] = value


def _look_up(config: dict[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        config = (config or {}).get(part)
    return config


def _paths_and_workers(run: Run) -> dict[str, Any]:
    values = run.task.settings(run.corpus, run.prepared)
    workers = 0 if run.smoke and run.workers is None else run.workers
    if workers is not None:
        values[run.task.workers] = workers
    return values


def _config(run: Run, lr: float | None = None, fold: str | None = None) -> dict[str, Any]:
    """The stock yaml with this run's paths, learning rate and fold."""
    file = run.conf / f"{run.task.name}.yaml"
    if not file.is_file():
        raise ConfigError(
            f"{file}: no such file; --conf must name a folder with {run.task.name}.yaml in it, such as "
            "recipes/superb/conf of the source"
        )
    config = yaml.safe_load(file.read_text())
    values = {**(run.task.smoke if run.smoke else {}), **_paths_and_workers(run), **run.settings}
    if lr is not None:
        values["optimizer.lr"] = lr
    if fold is not None:
        values["downstream_expert.datarc.test_fold"] = fold
    for dotted, value in values.items():
        _assign(config, dotted, value)
    if run.nproc > 1 and run.task.trained:
        _share_updates(run, config)
    return config


def _share_updates(run: Run, config: dict[str, Any]) -> None:
    """Several GPUs take the place of accumulated batches: an update sees as many utterances as in the benchmark."""
    batches = int(config["runner"]["gradient_accumulate_steps"])
    if batches % run.nproc:
        raise ConfigError(
            f"--nproc {run.nproc}: {run.task.name} accumulates {batches} batches an update, which must be a multiple "
            "of the number of GPUs for the benchmark's batch size to hold; give another --nproc, or set "
            "runner.gradient_accumulate_steps and the batch size with --set"
        )
    config["runner"]["gradient_accumulate_steps"] = batches // run.nproc


def _flat(config: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        flat.update(_flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value})
    return flat


def _same_training(run: Run, expdir: Path, config: dict[str, Any]) -> None:
    """Refuse to go on with a training that was started with other hyperparameters; places and workers may differ."""
    file = expdir / "config.yaml"
    if not file.is_file():
        return
    free = {*_paths_and_workers(run), run.task.workers, "runner.total_steps"}
    then, now = _flat(yaml.safe_load(file.read_text())), _flat(config)
    different = sorted(key for key in then.keys() | now.keys() if key not in free and then.get(key) != now.get(key))
    if different:
        key = different[0]
        raise ConfigError(
            f"{expdir}: holds a training with {key}={then.get(key)!r}, this one has {now.get(key)!r}; give another "
            "--tag or --exp, or --force to train anew"
        )


def _write_config(folder: Path, config: dict[str, Any]) -> Path:
    return write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))


def _rates(run: Run) -> tuple[float, ...]:
    if not run.task.trained:
        return ()
    return run.lrs or (float(_look_up(_config(run), "optimizer.lr")),)


def _experiments(run: Run) -> list[tuple[float, str | None, Path]]:
    """(learning rate, fold, experiment folder) of everything that is trained."""
    folds: Sequence[str | None] = run.task.folds or (None,)
    return [
        (lr, fold, run.folder / f"lr{lr:.0e}" / fold if fold else run.folder / f"lr{lr:.0e}")
        for lr in _rates(run)
        for fold in folds
    ]


def _again(run: Run, expdir: Path) -> dict[str, Any]:
    """Overrides for a command that takes its configuration from a checkpoint: places may have moved since.

    Gives the number of loader workers again, which s3prl's ctc recipe takes out of the configuration it saves.
    """
    values = {f"config.{key}": value for key, value in _paths_and_workers(run).items()}
    if run.task.workers.startswith("downstream_expert.corpus") and f"config.{run.task.workers}" not in values:
        values[f"config.{run.task.workers}"] = _look_up(_config(run), run.task.workers)
    return {"args.expdir": str(expdir), **values}


# ------------------------------------------------------------------------------------------------ checkpoints


def _read_checkpoint(path: Path) -> dict[str, Any] | None:
    """What s3prl saved, or None if the file is not whole; only tensors, plain values and the Namespace are let in."""
    if not zipfile.is_zipfile(path):
        return None
    import argparse
    import pickle

    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointUnreadable(
            f"{path}: holds objects other than tensors, plain values and s3prl's options ({error}); it was not loaded, "
            "for loading such a file can run code. Is it a checkpoint of s3prl's runner?"
        ) from error
    except (RuntimeError, OSError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s: not a whole checkpoint (%s)", path, error)
        return None


def checkpoints(expdir: Path) -> list[Checkpoint]:
    """Whole checkpoints of an experiment folder, oldest update first; cut ones are moved to ``*.broken``."""
    found = []
    names = [*expdir.glob("states-*.ckpt"), *expdir.glob("*best*.ckpt")]
    for path in sorted(names):
        if not path.is_file():  # a folder, a device, a link to nowhere: nothing that s3prl saved
            continue
        content = _read_checkpoint(path)
        if content is None:
            logger.warning(
                "%s: not whole (a kill or a full disk while it was saved?); moved to %s.broken", path, path.name
            )
            path.rename(path.with_name(f"{path.name}.broken"))
            continue
        score = content.get("Downstream", {}).get("best_score")
        found.append(Checkpoint(path, int(content["Step"]), None if score is None else float(score.reshape(-1)[0])))
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.path.name))


# ------------------------------------------------------------------------------------------------ stages


def _check(run: Run) -> None:
    missing = [package for package in run.task.packages if importlib.util.find_spec(package.module) is None]
    if missing:
        raise MissingPackage(
            f"{run.task.name} needs {', '.join(package.pip for package in missing)}: "
            f"pip install 's3prl-speaker-upstreams[{run.task.extra}]' (or [superb] for every task)"
        )
    if run.s3prl_root is not None and not (run.s3prl_root / "s3prl" / "run_downstream.py").is_file():
        raise ConfigError(f"{run.s3prl_root}: not a checkout of s3prl; expected s3prl/run_downstream.py in it")
    if run.nproc > 1 and not run.device.startswith("cuda"):
        raise ConfigError(
            f"--nproc {run.nproc} with --device {run.device}: s3prl trains in several processes on CUDA only"
        )
    config = _config(run)
    _enough_space(run, config)
    if run.smoke and run.data is None and not (run.corpus / ".whole").is_file():
        shutil.rmtree(run.corpus, ignore_errors=True)
        generate(run.task.name, run.corpus, seed=_SMOKE_SEED)
        write_text(run.corpus / ".whole", "")
    if _is_done(run, "check"):
        return
    report = check_corpus(run.task, run.corpus)
    answer = _probe(run)
    logger.info(
        "%s: %d layers of %d, a frame each %d samples", run.upstream, answer["layers"], answer["dim"], answer["rate"]
    )
    _mark(run, "check", counts=report.counts, hours=report.seconds / 3600, remarks=report.remarks, upstream=answer)


def _enough_space(run: Run, config: dict[str, Any]) -> None:
    """A run that would fill the disk must not start."""
    if not run.task.trained:
        return
    keep = int(config["runner"].get("max_keep", 1)) + 2  # states, best on dev, and the one being written
    each = 5 if run.smoke else run.task.checkpoint_mb
    need = keep * each * 2**20 * len(_experiments(run))
    run.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(run.folder).free
    if free < need:
        raise NoSpaceLeft(
            f"{run.folder}: {free / 2**30:.1f} GiB free, but {run.task.name}'s checkpoints may take "
            f"{need / 2**30:.1f} GiB; make room or give another --exp"
        )


def _probe(run: Run) -> dict[str, Any]:
    arguments = [run.upstream, "--feature", run.feature, "--device", run.device]
    arguments += ["--ckpt", run.ckpt] if run.ckpt else []
    arguments += ["--model-config", run.model_config] if run.model_config else []
    text = _stock(run, arguments, run.folder / "check.log", module="s3prl_speaker_upstreams.superb.probe")
    answer = json.loads(text.strip().splitlines()[-1])
    if "error" in answer:
        known = answer["known"]
        near = difflib.get_close_matches(run.upstream, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UnknownTask(f"s3prl knows no upstream {run.upstream!r}{hint} It knows {', '.join(known)}")
    return answer


def _upstream_facts(run: Run) -> dict[str, Any]:
    marker = _marker(run, "check")
    if marker.is_file() and json.loads(marker.read_text())["fingerprint"] == _fingerprint(run, "check"):
        return json.loads(marker.read_text())["upstream"]
    return _probe(run)


def _prepare(run: Run) -> None:
    marker = run.prepared / ".whole"
    if marker.is_file() and not run.force:
        logger.info("prepare: done already (%s); --force repeats it", run.prepared)
        return
    run.prepared.parent.mkdir(parents=True, exist_ok=True)
    prepare(run.task, run.corpus, run.prepared, run.s3prl_root)
    write_text(marker, "")
    logger.info("prepare: wrote %s", run.prepared)


def _train(run: Run) -> None:
    if not run.task.trained:
        logger.info("train: nothing to train in %s", run.task.name)
        return
    _needs(run.prepared / ".whole", "prepare")
    for lr, fold, expdir in _experiments(run):
        stage = f"train-{expdir.relative_to(run.folder).as_posix().replace('/', '-')}"
        if _is_done(run, stage):
            continue
        config = _config(run, lr, fold)
        total = int(config["runner"]["total_steps"])
        if run.force and expdir.exists():
            shutil.rmtree(expdir)
        _same_training(run, expdir, config)
        expdir.mkdir(parents=True, exist_ok=True)
        whole = checkpoints(expdir)
        latest = whole[-1] if whole else None
        if latest is None or latest.step < total:
            arguments = ["-m", "train"]
            if latest is None:
                file = _write_config(expdir, config)
                arguments += [*_upstream_arguments(run), "-c", str(file), "-p", str(expdir)]
            else:
                logger.info("train: going on from update %d of %d (%s)", latest.step, total, latest.path)
                values = {**_again(run, expdir), "config.runner.total_steps": total}
                arguments += ["-e", str(latest.path), "--device", run.device, *_overrides(values)]
            _stock(run, arguments, expdir / "train.log", nproc=run.nproc)
        _mark(run, stage, lr=lr, fold=fold, updates=total)


def _needs(path: Path, stage: str) -> None:
    if not path.exists():
        raise ConfigError(f"{path} is not there; run the {stage} stage first")


def _choose(run: Run) -> None:
    if _is_done(run, "choose"):
        return
    for _, _, expdir in _experiments(run):
        _needs(_marker(run, f"train-{expdir.relative_to(run.folder).as_posix().replace('/', '-')}"), "train")
    chooser = {"QbE": _choose_layer, "ASV": _choose_verification}.get(run.task.name, _choose_on_dev)
    choice = chooser(run)
    write_text(run.folder / "choice.json", json.dumps(choice, indent=1) + "\n")
    _mark(run, "choose", **choice)
    logger.info("choose: %s", json.dumps(choice))


def _choose_on_dev(run: Run) -> dict[str, Any]:
    """The checkpoint that training marked best on dev; among learning rates the one whose dev score is best."""
    candidates = []
    for lr in _rates(run):
        scores, chosen = [], {}
        for rate, fold, expdir in _experiments(run):
            if rate != lr:
                continue
            whole = checkpoints(expdir)
            best = [checkpoint for checkpoint in whole if checkpoint.path.name == run.task.best]
            if not best:
                if not whole:
                    raise RunFailed(f"{expdir}: training left no whole checkpoint; repeat it with --force")
                # s3prl marks a checkpoint only where dev got better than its start value, for example accuracy above 0
                logger.warning("%s: no update got better on dev; taking the last checkpoint", expdir)
                best = whole[-1:]
            chosen[fold or ""] = str(best[0].path)
            scores.append(best[0].best_score)
        mean = None if any(score is None for score in scores) else sum(scores) / len(scores)
        candidates.append({"lr": lr, "dev_score": mean, "checkpoints": chosen})
    rated = [candidate for candidate in candidates if candidate["dev_score"] is not None]
    pick = max if run.task.best_is_higher else min
    best = pick(rated, key=lambda candidate: candidate["dev_score"]) if rated else candidates[0]
    return {"rule": f"{run.task.best}, best dev score over learning rates", **best, "candidates": candidates}


def _choose_verification(run: Run) -> dict[str, Any]:
    """VoxCeleb1 has no validation part: saved checkpoints are tested, the best EER counts (s3prl's docs/superb.md)."""
    tried = []
    for lr, _, expdir in _experiments(run):
        saved = [c for c in checkpoints(expdir) if c.path.name.startswith("states-")]
        for checkpoint in [c for c in saved if c.step % _ASV_EVERY == 0] or saved:
            kept = expdir / f"states-{checkpoint.step}"
            if not (kept / "test_predict.txt").is_file():
                text = _evaluate_one(run, checkpoint.path, expdir, "test", kept / "test.log")
                kept.mkdir(exist_ok=True)
                write_text(kept / "EER.txt", f"{_printed(text, 'sv-voxceleb1/test-EER', kept / 'test.log')}\n")
                os.replace(expdir / "test_predict.txt", kept / "test_predict.txt")
            tried.append(
                {
                    "lr": lr,
                    "step": checkpoint.step,
                    "EER": float((kept / "EER.txt").read_text()),
                    "checkpoint": str(checkpoint.path),
                }
            )
    if not tried:
        raise RunFailed(f"{run.folder}: no checkpoint to test; run the train stage first")
    best = min(tried, key=lambda one: one["EER"])
    return {
        "rule": "lowest test EER over saved checkpoints",
        "lr": best["lr"],
        "dev_score": None,
        "checkpoints": {"": best["checkpoint"]},
        "step": best["step"],
        "candidates": tried,
    }


def _layers(run: Run) -> list[int | None]:
    count = int(_upstream_facts(run)["layers"])
    return [None] if count == 1 else list(range(count))


def _layer_name(layer: int | None) -> str:
    return "layer0" if layer is None else f"layer{layer}"


def _query_layer(run: Run, layer: int | None, split: str) -> dict[str, float]:
    """Evaluate one layer on QbE's dev or test queries, once, and score it."""
    expdir = run.folder / f"{_layer_name(layer)}-{split}"
    score = expdir / "score.json"
    if run.force or not score.is_file():
        file = _write_config(expdir, _config(run))
        arguments = ["-m", "evaluate", "-t", split, *_upstream_arguments(run), "-c", str(file), "-p", str(expdir)]
        arguments += [] if layer is None else ["-l", str(layer)]
        _stock(run, arguments, expdir / f"{split}.log")
        truth = run.corpus / "scoring" / f"groundtruth_quesst14_{'dev' if split == 'dev' else 'eval'}"
        write_text(score, json.dumps(score_quesst(expdir / "benchmark.stdlist.xml", truth)) + "\n")
    return json.loads(score.read_text())


def _choose_layer(run: Run) -> dict[str, Any]:
    """QbE runs over single layers; the one with the best MTWV on dev is tested."""
    tried = [{"layer": layer, **_query_layer(run, layer, "dev")} for layer in _layers(run)]
    best = max(tried, key=lambda one: one["MTWV"])
    return {
        "rule": "best MTWV on dev over layers",
        "layer": best["layer"],
        "dev_score": best["MTWV"],
        "checkpoints": {},
        "candidates": tried,
    }


def _choice(run: Run) -> dict[str, Any]:
    _needs(run.folder / "choice.json", "choose")
    return json.loads((run.folder / "choice.json").read_text())


def _evaluate_one(run: Run, checkpoint: Path, expdir: Path, split: str, log: Path) -> str:
    arguments = ["-m", "evaluate", "-t", split, "-e", str(checkpoint), "--device", run.device]
    return _stock(run, [*arguments, *_overrides(_again(run, expdir))], log)


def _evaluate(run: Run) -> None:
    if _is_done(run, "evaluate"):
        return
    choice = _choice(run)
    if run.task.name == "QbE":
        _query_layer(run, choice["layer"], "test")
    elif run.task.name != "ASV":  # whose checkpoints were tested in order to choose
        for path in choice["checkpoints"].values():
            checkpoint = Path(path)
            log = checkpoint.parent / "test.log"
            log.unlink(missing_ok=True)
            _evaluate_one(run, checkpoint, checkpoint.parent, run.task.test_split, log)
    _mark(run, "evaluate")


def _printed(text: str, key: str, source: Path) -> float:
    """The last ``key: number`` that the runner printed."""
    found = re.findall(rf"^{re.escape(key)}: (\S+)\s*$", text, re.MULTILINE)
    if not found:
        raise ScoringError(f"{source}: no line {key!r}; the evaluation did not reach its end, run the evaluate stage")
    return float(found[-1])


def _metrics_file(expdir: Path, key: str) -> float:
    file = expdir / "test_metrics.txt"
    _needs(file, "evaluate")
    values = dict(line.split(maxsplit=1) for line in file.read_text().splitlines() if line.strip())
    if key not in values:
        raise ScoringError(f"{file}: no line {key!r}; run the evaluate stage again")
    return float(values[key])


def _one_score(run: Run, expdir: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics of one evaluated experiment folder, in the table's units, and details."""
    task = run.task
    if task.name in ("SE", "SS"):
        return {metric.name: metric.scale * _metrics_file(expdir, metric.key) for metric in task.metrics}, {}
    if task.name == "SD":
        detail = score_diarization(expdir, run.corpus / "test" / "rttm")
        return {"DER": 100.0 * detail["DER"]}, detail
    _needs(expdir / "test.log", "evaluate")
    text = (expdir / "test.log").read_text(errors="replace")
    return {
        metric.name: metric.scale * _printed(text, f"{task.test_split} {metric.key}", expdir / "test.log")
        for metric in task.metrics
    }, {}


def _score(run: Run) -> None:
    if _is_done(run, "score"):
        return
    choice, task = _choice(run), run.task
    details: dict[str, Any] = {}
    if task.name == "QbE":
        expdir = run.folder / f"{_layer_name(choice['layer'])}-test"
        _needs(expdir / "score.json", "evaluate")
        details = json.loads((expdir / "score.json").read_text())
        metrics, home = {"MTWV": 100.0 * details["MTWV"]}, expdir
    elif task.name == "ASV":
        best = Path(choice["checkpoints"][""])
        home = best.parent / best.stem
        metrics = {"EER": 100.0 * float((home / "EER.txt").read_text())}
    else:
        each = {}
        for fold, path in choice["checkpoints"].items():
            each[fold], details[fold or "detail"] = _one_score(run, Path(path).parent)
        metrics = {metric.name: sum(one[metric.name] for one in each.values()) / len(each) for metric in task.metrics}
        first = Path(next(iter(choice["checkpoints"].values()))).parent
        home = first.parent if task.folds else first
        if task.folds:
            details = {"folds": each}
    result = {
        "task": task.name,
        "upstream": run.tag or run.upstream,
        "metrics": metrics,
        "stock": not (run.smoke or run.settings),
        "layers": _recorded_layers(run),
        "choice": {key: value for key, value in choice.items() if key != "candidates"},
        "details": details,
        "predictions": str(home),
        "checkpoints": list(choice["checkpoints"].values()),
        "corpus": str(run.corpus),
        "seed": run.seed,
        "versions": _versions(),
    }
    write_text(run.folder / "result.json", json.dumps(result, indent=1) + "\n")
    _mark(run, "score")
    logger.info(
        "%s %s: %s",
        run.tag or run.upstream,
        task.name,
        ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()),
    )


def _recorded_layers(run: Run) -> int | None:
    marker = _marker(run, "check")
    return json.loads(marker.read_text())["upstream"]["layers"] if marker.is_file() else None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("s3prl", "torch", "torchaudio", "s3prl-speaker-upstreams"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


STAGES: dict[str, Callable[[Run], None]] = {
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
    SpeakerUpstreamError of the kind that tells what to do: CorpusError, UnknownTask, MissingPackage, NoSpaceLeft,
    RunFailed, ScoringError or ConfigError. Work finished before it stays.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise ConfigError(f"unknown stage {unknown[0]!r}; the stages are {', '.join(STAGES)}, collect")
    if run.task.name not in TASKS:
        raise UnknownTask(f"unknown task {run.task.name!r}; the tasks are {', '.join(TASKS)}")
    with _alone(run):
        for stage in stages:
            logger.info("== %s %s: %s", run.task.name, run.tag or run.upstream, stage)
            STAGES[stage](run)
