"""One run at work: its identity, its finished stages, and the stock commands that its task asks for."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from s3prl_speaker_upstreams.common.digests import file_sha256, json_sha256
from s3prl_speaker_upstreams.common.files import locked, write_json
from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.superb import configuration, identity, saved, stock, upstream
from s3prl_speaker_upstreams.superb.checks import layout_of
from s3prl_speaker_upstreams.superb.errors import RunFailed
from s3prl_speaker_upstreams.superb.layouts import Layout
from s3prl_speaker_upstreams.superb.run import Experiment, Run
from s3prl_speaker_upstreams.superb.saved import Saved

__all__ = ["Work", "plain"]

logger = logging.getLogger(__name__)


def plain(value: Any) -> Any:
    """Plain data as JSON can hold it: numbers that are not finite become None.

    >>> plain({"threshold": float("inf"), "MTWV": 0.5})
    {'threshold': None, 'MTWV': 0.5}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


class Work:
    """What the stages of one run share.

    Parameters
    ----------
    run : what to do
    stages : those that were asked for; with ``force``, training among them may replace work of another identity
    """

    def __init__(self, run: Run, stages: Sequence[str] = ()) -> None:
        self.run = run
        self.anew = run.force and ("train" if run.task.trained else "choose") in stages
        self._facts: dict[str, Any] | None = None
        self._probed = self._begun = False
        self._computed: set[Path] = set()

    # -------------------------------------------------------------------------------------------- what it is made of

    @functools.cached_property
    def layout(self) -> Layout:
        """What the task reads of the corpus."""
        return layout_of(self.run.task, self.run.corpus)

    @functools.cached_property
    def static(self) -> dict[str, Any]:
        """Identity as far as it is known without loading the upstream."""
        return identity.static(self.run, identity.corpus_digest(self.layout, self.run.corpus))

    def facts(self) -> dict[str, Any]:
        """What the probe says of the upstream: of this process, or as the check stage recorded it."""
        if self._facts is None:
            record = self.record("check")
            known = record.get("inputs") == json_sha256(self.static)
            self._facts = record["upstream"] if known else self.probe()
        return self._facts

    def layers(self) -> int:
        """How many layers the upstream gives."""
        return int(self.facts()["layers"])

    def identity(self) -> dict[str, Any]:
        """All fields of the run's identity; "prepared" is None before the corpus is prepared."""
        facts = self.facts()
        prepared = identity.prepared_digest(self.run.prepared, self.run.corpus)
        return {**self.static, "state": facts.get("state"), "behaviour": facts.get("behaviour"), "prepared": prepared}

    def begin(self) -> None:
        """Before any work on probes: the device is there, the upstream is the one that was checked, so is the run."""
        if self._begun:
            return
        self.needs(self.run.prepared / ".whole", "prepare")
        upstream.check_device(self.run.device, self.run.nproc)
        if not self._probed:
            checked = self.record("check").get("upstream", {})
            if checked and checked.get("state") != self.probe().get("state"):
                self.marker("check").unlink(missing_ok=True)  # it was of other weights
        self.claim()
        self._begun = True

    def probe(self) -> dict[str, Any]:
        """Load the upstream now, whatever was recorded."""
        self._facts, self._probed = upstream.probe(self.run), True
        return self._facts

    def claim(self) -> None:
        """Record what the run is made of, or compare with the record.

        Raises IdentityMismatch if the folder holds work that was made of something else.
        """
        file = self.run.folder / "identity.json"
        now = self.identity()
        with locked(self.run.folder / ".locks" / "identity", str(file), timeout=-1):
            if file.is_file():
                record = json.loads(file.read_text())
                found = identity.differences(record["identity"], now, self.run.accept)
                if not found:
                    return
                if not self.anew:
                    raise identity.refuse(self.run.folder, found, self.run)
                self.forget()
            adopted = not file.is_file() and self._adopt()
            write_json(file, {"identity": now, "adopted": adopted, "at": _now()})

    def _adopt(self) -> bool:
        """Whether there are trainings of an earlier version, which kept no identity; their checkpoints must agree."""
        found = False
        for lr, fold, expdir in [] if self.anew else self.experiments():
            if not (expdir / "identity.json").is_file():
                found |= bool(self.same_training(lr, fold, expdir))
        return found

    def compare_early(self) -> None:
        """Refuse work of another identity before the corpus is prepared. Raises IdentityMismatch."""
        file = self.run.folder / "identity.json"
        if file.is_file() and not self.anew:
            now = {**self.identity()}
            now.pop("prepared")
            found = identity.differences(json.loads(file.read_text())["identity"], now, self.run.accept)
            if found:
                raise identity.refuse(self.run.folder, found, self.run)

    def forget(self) -> None:
        """Take away what follows from training: its choice and its numbers are no longer true."""
        for name in ("choice.json", "result.json"):
            (self.run.folder / name).unlink(missing_ok=True)
        for stage in ("choose", "evaluate", "score"):
            self.marker(stage).unlink(missing_ok=True)

    # -------------------------------------------------------------------------------------------- finished stages

    def marker(self, stage: str) -> Path:
        """Where a finished stage is recorded."""
        return self.run.folder / ".done" / f"{stage}.json"

    def record(self, stage: str) -> dict[str, Any]:
        """What was recorded of a finished stage; empty if it is not finished."""
        marker = self.marker(stage)
        return json.loads(marker.read_text()) if marker.is_file() else {}

    def is_done(self, stage: str, inputs: str) -> bool:
        """Whether a stage was finished with these inputs (a digest)."""
        record = self.record(stage)
        if self.run.force or not record:
            return False
        if "inputs" not in record:
            logger.info("%s: was recorded by an earlier version, without what it was made from; looked at again", stage)
            return False
        if record["inputs"] != inputs:
            logger.info("%s: its inputs are no longer those it was made from; again", stage)
            return False
        logger.info("%s: done already (%s); --force repeats it", stage, self.marker(stage))
        return True

    def mark(self, stage: str, inputs: str, **found: Any) -> None:
        """Record a finished stage."""
        write_json(self.marker(stage), {"inputs": inputs, "at": _now(), **plain(found)})

    def chained(self, *stages: str, **more: Any) -> str:
        """Digest of the run's identity and of finished stages: what a later one is made from."""
        markers = [file_sha256(self.marker(stage)) if self.marker(stage).is_file() else None for stage in stages]
        own = {key: value for key, value in self.identity().items() if key not in self.run.accept}
        own.pop("behaviour")  # compared with a tolerance, by claim()
        return json_sha256([own, markers, more])

    @staticmethod
    def needs(path: Path, stage: str) -> None:
        """Raise ConfigError that names the stage to run first if `path` is not there."""
        if not path.exists():
            raise ConfigError(f"{path} is not there; run the {stage} stage first")

    def remembered(
        self, file: Path, key: dict[str, Any], compute: Callable[[], dict[str, Any]], needs: Sequence[Path] = ()
    ) -> dict[str, Any]:
        """`compute()`, once for what the run is made of and `key`; kept in `file`, valid while `needs` are there."""
        digest = json_sha256([self.chained(), key])
        kept = json.loads(file.read_text()) if file.is_file() else {}
        again = self.run.force and file not in self._computed
        if not again and kept.get("key") == digest and all(path.exists() for path in needs):
            return kept["value"]
        self.begin()
        value = plain(compute())
        write_json(file, {"key": json_sha256([self.chained(), key]), "value": value})
        self._computed.add(file)
        return value

    # -------------------------------------------------------------------------------------------- trainings

    def experiments(self) -> list[Experiment]:
        """(learning rate, fold, folder) of everything that the run trains."""
        return [
            (lr, fold, self.run.experiment(lr, fold)) for lr in configuration.rates(self.run) for fold in self.run.folds
        ]

    def own_experiments(self) -> list[Experiment]:
        """Those that this process trains: all, or an element of a job array."""
        run = self.run
        for name, wanted, there in (
            ("lr", run.only_lr, {lr for lr, _, _ in self.experiments()}),
            ("fold", run.only_fold, set(run.folds)),
        ):
            if wanted is not None and run.task.trained and wanted not in there:
                raise ConfigError(f"--only-{name} {wanted}: is none of this run's: {sorted(map(str, there))}")
        return [
            (lr, fold, expdir)
            for lr, fold, expdir in self.experiments()
            if run.only_lr in (None, lr) and run.only_fold in (None, fold)
        ]

    def stage_of(self, expdir: Path) -> str:
        """Name of the stage that trains in `expdir`."""
        return f"train-{expdir.relative_to(self.run.folder).as_posix().replace('/', '-')}"

    @contextlib.contextmanager
    def alone(self, *expdirs: Path) -> Iterator[None]:
        """Hold trainings, or the whole run, against other processes. Raises Busy."""
        with contextlib.ExitStack() as stack:
            names = [self.stage_of(expdir) for expdir in expdirs] or ["run"]
            for name in names:
                what = f"{self.run.folder} ({name})"
                stack.enter_context(locked(self.run.folder / ".locks" / name, what))
            yield

    def made_of(self, lr: float, fold: str | None) -> dict[str, Any]:
        """Identity of one training, without its number of updates."""
        return {**self.identity(), "lr": lr, "fold": fold}

    def same_training(self, lr: float, fold: str | None, expdir: Path) -> list[Saved]:
        """The checkpoints of an experiment folder, after their origin was compared with this run.

        Compares our record of the training, and s3prl's own in each checkpoint (its Args and Config). A folder of an
        earlier version has the second only.

        Raises IdentityMismatch.
        """
        config = configuration.effective(self.run, lr, fold)
        record = expdir / "identity.json"
        found: list[tuple[str, Any, Any]] = []
        if record.is_file():
            then = json.loads(record.read_text())["identity"]
            found = identity.differences(then, self.made_of(lr, fold), self.run.accept)
        whole = saved.checkpoints(expdir)
        seeds = [self.run.seed, *(one["seed"] for one in self.resumes(expdir))]
        for one in whole:
            found += identity.saved_differences(self.run, one, config, seeds, places_known=record.is_file())
        if found:
            raise identity.refuse(expdir, list({name: (name, a, b) for name, a, b in found}.values()), self.run)
        return whole

    @staticmethod
    def resumes(expdir: Path) -> list[dict[str, Any]]:
        """Each time that a training went on: the update, and the seed that it was given for its data."""
        file = expdir / "resumes.json"
        return json.loads(file.read_text()) if file.is_file() else []

    def exclude(self, lr: float, fold: str | None, expdir: Path, why: str) -> dict[str, Any]:
        """A training that choosing leaves out, said aloud."""
        logger.warning("%s: left out of the choice: %s", expdir, why)
        return {"lr": lr, "fold": fold, "experiment": str(expdir), "why": why}

    def excluded(self) -> list[dict[str, Any]]:
        """Trainings that diverged, as the train stage recorded them."""
        return [
            self.exclude(lr, fold, expdir, self.record(self.stage_of(expdir))["diverged"])
            for lr, fold, expdir in self.experiments()
            if self.record(self.stage_of(expdir)).get("diverged")
        ]

    @staticmethod
    def why(excluded: Sequence[dict[str, Any]]) -> str:
        """Why nothing is left to choose from."""
        reasons = "; ".join(f"{one['experiment']}: {one['why']}" for one in excluded)
        return f"all were left out: {reasons}; give other --lr" if reasons else "run the train stage first"

    def choose_on_dev(self) -> dict[str, Any]:
        """The checkpoint that training marked best on dev; among learning rates the one whose dev score is best.

        A learning rate whose training diverged is left out and listed under "excluded".
        """
        task, excluded = self.run.task, self.excluded()
        candidates: list[dict[str, Any]] = []
        out = {one["lr"] for one in excluded}
        for rate in configuration.rates(self.run):
            scores: list[float] = []
            chosen: dict[str, str] = {}
            for lr, fold, expdir in self.experiments():
                if lr != rate or rate in out:
                    continue
                whole = self.same_training(lr, fold, expdir)
                best = [one for one in whole if one.path.name == task.best]
                if not best and whole:
                    # s3prl marks one only where dev got better than its start value, for example accuracy above 0
                    logger.warning("%s: no update got better on dev; taking the last checkpoint", expdir)
                    best = whole[-1:]
                problem = _unfit(best[0]) if best else "training left no whole checkpoint"
                if problem:
                    excluded.append(self.exclude(lr, fold, expdir, problem))
                    out.add(rate)
                    continue
                chosen[fold or ""] = str(best[0].path)
                scores += [] if best[0].best_score is None else [best[0].best_score]
            if rate not in out:
                mean = sum(scores) / len(scores) if len(scores) == len(chosen) else None
                candidates.append({"lr": rate, "dev_score": mean, "checkpoints": chosen})
        if not candidates:
            raise RunFailed(f"{self.run.folder}: no checkpoint to choose from; {self.why(excluded)}")
        rated = [candidate for candidate in candidates if candidate["dev_score"] is not None]
        pick = max if task.best_is_higher else min
        taken = pick(rated, key=lambda candidate: candidate["dev_score"]) if rated else candidates[0]
        rule = f"{task.best}, best dev score over learning rates"
        return {"rule": rule, **taken, "candidates": candidates, "excluded": excluded}

    # -------------------------------------------------------------------------------------------- stock commands

    def _upstream_arguments(self) -> list[str]:
        run = self.run
        arguments = ["-u", run.upstream, "-d", run.task.downstream, "--device", run.device, "--seed", str(run.seed)]
        for flag, value in (("-k", run.place(run.ckpt)), ("-g", run.place(run.model_config)), ("-s", run.feature)):
            arguments += [flag, value] if value else []
        return arguments + (["--upstream_feature_normalize"] if run.normalize else [])

    def _again(self, expdir: Path, one: Saved, seed: int) -> list[str]:
        """Overrides for a command that takes its configuration from a checkpoint: places may have moved since.

        Gives the number of loader workers again, which s3prl's ctc recipe takes out of the configuration it saves.
        """
        run = self.run
        values: dict[str, Any] = {"args.expdir": str(expdir)}
        values |= {f"config.{key}": value for key, value in configuration.places(run).items()}
        workers = f"config.{run.task.workers}"
        if workers not in values and configuration.look_up(one.config, run.task.workers) is None:
            values[workers] = configuration.look_up(configuration.effective(run), run.task.workers)
        for name, value in (("upstream_ckpt", run.ckpt), ("upstream_model_config", run.model_config)):
            if one.args.get(name, run.place(value)) != run.place(value):
                values[f"args.{name}"] = run.place(value)
        if one.args.get("seed", seed) != seed:
            values["args.seed"] = seed
        return configuration.overrides(values)

    def train(self, expdir: Path, latest: Saved | None, config: dict[str, Any]) -> None:
        """Start a training, or go on from a checkpoint with a seed of its own for the data."""
        self.forget()
        arguments = ["-m", "train"]
        total = int(config["runner"]["total_steps"])
        if latest is None:
            file = configuration.write(expdir, config)
            arguments += [*self._upstream_arguments(), "-c", str(file), "-p", str(expdir)]
        else:
            seed = identity.resume_seed(self.run.seed, latest.step)
            entry = {"step": latest.step, "seed": seed, "at": _now()}
            write_json(expdir / "resumes.json", [*self.resumes(expdir), entry])
            logger.info(
                "train: going on from update %d of %d (%s), data drawn with seed %d",
                *(latest.step, total, latest.path, seed),
            )
            more = configuration.overrides({"config.runner.total_steps": total})[1]
            override = ",,".join([self._again(expdir, latest, seed)[1], more])
            arguments += ["-e", str(latest.path), "--device", self.run.device, "-o", override]
        stock.run_stock(self.run, arguments, expdir / "train.log", nproc=self.run.nproc)

    def test(self, checkpoint: Path, split: str, log: Path, *, fresh: bool = False, finite: bool = False) -> str | None:
        """Evaluate a checkpoint; what the runner printed.

        fresh : start the log anew
        finite : None instead of RunFailed where it failed over values that are no numbers
        """
        self.begin()
        content = saved.read(checkpoint)
        if content is None:
            raise RunFailed(f"{checkpoint}: is gone or no longer whole; run the train and choose stages again")
        if fresh:
            log.unlink(missing_ok=True)
        one = saved.summary(checkpoint, content)
        self._own(one)
        arguments = ["-m", "evaluate", "-t", split, "-e", str(checkpoint), "--device", self.run.device]
        arguments += self._again(checkpoint.parent, one, self.run.seed)
        try:
            return stock.run_stock(self.run, arguments, log)
        except RunFailed as error:
            if finite and stock.no_finite_number(error):
                return None
            raise

    def _own(self, one: Saved) -> None:
        """Refuse to evaluate a checkpoint that, by its own record, is not of this run."""
        for lr, fold, expdir in self.experiments():
            if expdir == one.path.parent:
                config = configuration.effective(self.run, lr, fold)
                seeds = [self.run.seed, *(resume["seed"] for resume in self.resumes(expdir))]
                found = identity.saved_differences(self.run, one, config, seeds, places_known=True)
                if found:
                    raise identity.refuse(one.path, found, self.run)

    def evaluate_layer(self, expdir: Path, split: str, layer: int | None) -> None:
        """Evaluate without training (QbE): one layer, or the only one."""
        file = configuration.write(expdir, configuration.effective(self.run))
        arguments = ["-m", "evaluate", "-t", split, *self._upstream_arguments(), "-c", str(file), "-p", str(expdir)]
        arguments += [] if layer is None else ["-l", str(layer)]
        stock.run_stock(self.run, arguments, expdir / f"{split}.log")

    # -------------------------------------------------------------------------------------------- one training

    def train_inputs(self, lr: float, fold: str | None) -> str:
        """Digest of what one training is made from."""
        total = int(configuration.effective(self.run, lr, fold)["runner"]["total_steps"])
        return self.chained(lr=lr, fold=fold, updates=total)

    def train_one(self, lr: float, fold: str | None, expdir: Path) -> None:
        """Train in one experiment folder, or go on there; nothing is done where it is finished."""
        run, stage = self.run, self.stage_of(expdir)
        config = configuration.effective(run, lr, fold)
        total = int(config["runner"]["total_steps"])
        if self.is_done(stage, self.train_inputs(lr, fold)):
            return
        self.begin()
        self.marker(stage).unlink(missing_ok=True)
        if self.anew and expdir.exists():
            shutil.rmtree(expdir)
            self.forget()
        whole = self.same_training(lr, fold, expdir)
        latest = whole[-1] if whole else None
        _not_beyond(expdir, latest, total, config, run)
        expdir.mkdir(parents=True, exist_ok=True)
        if not (expdir / "identity.json").is_file():
            made = {"identity": self.made_of(lr, fold), "adopted": latest is not None, "at": _now()}
            write_json(expdir / "identity.json", made)
        if latest is None or latest.step < total:
            self.train(expdir, latest, config)
        found = {"lr": lr, "fold": fold, "updates": total, "resumes": self.resumes(expdir)}
        self.mark(stage, self.train_inputs(lr, fold), **found)


def _unfit(one: Saved) -> str:
    """Why a checkpoint cannot be chosen, or ""."""
    if not one.finite:
        return f"diverged: {one.path.name} holds values that are no numbers"
    if one.best_score is not None and not math.isfinite(one.best_score):
        return f"diverged: its dev score is {one.best_score}"
    return ""


def _not_beyond(expdir: Path, latest: Saved | None, total: int, config: dict[str, Any], run: Run) -> None:
    """Refuse fewer updates than were made, and more of them where a schedule was laid out for the first number."""
    if latest is None:
        return
    then = int(latest.config.get("runner", {}).get("total_steps", latest.step))
    scheduled = config.get("scheduler") or "schedule" in str(config.get("optimizer", {}).get("name", ""))
    if latest.step > total or (scheduled and then != total):
        made = max(latest.step, then) if not scheduled else then
        raise identity.refuse(expdir, [("runner.total_steps", made, total)], run)


def _now() -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S')}.{time.time_ns() % 10**9:09d}"
