"""Fixtures of the SUPERB tests: runs on small corpora, and a stand-in for the stock runner."""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from s3prl_speaker_upstreams.demo import corpora
from s3prl_speaker_upstreams.superb import saved, stock
from s3prl_speaker_upstreams.superb.errors import RunFailed
from s3prl_speaker_upstreams.superb.run import Run
from s3prl_speaker_upstreams.superb.tasks import TASKS


def _save(path: Path, step: int, score: float, args: dict | None = None, config: dict | None = None) -> None:
    import torch

    state = {
        "Step": step,
        "Args": argparse.Namespace(mode="train", **(args or {})),
        "Config": config or {"runner": {}},
        "Featurizer": {"weights": torch.zeros(3)},
        "Downstream": {"best_score": torch.ones(1) * score},
    }
    torch.save(state, path)


class FakeRunner:
    """Writes what the stock runner writes; `dev` gives the dev score of an experiment folder."""

    save = staticmethod(_save)

    def __init__(self, monkeypatch, dev=lambda expdir: 0.5, test=lambda checkpoint: 0.25, layers=1):
        self.calls: list[list[str]] = []
        self.dev, self.test, self.layers = dev, test, layers
        self.fail_at: int | None = None
        self.state, self.probed = "weights", 0
        monkeypatch.setattr(stock, "run_stock", self)

    def __call__(self, run, arguments, log, *, module="s3prl.run_downstream", nproc=1):
        arguments = list(arguments)
        if module.endswith("probe"):
            self.probed += 1
            if arguments[0] == "hubertt":
                return json.dumps({"error": "unknown", "known": ["fbank", "hubert", *(f"x{n}" for n in range(200))]})
            if "nosuch" in arguments:
                return json.dumps({"error": "feature", "known": ["hidden_states"]})
            behaviour = [[0.0, 1.0]] * self.layers
            facts = {"layers": self.layers, "dim": 4, "rate": 160, "state": self.state, "behaviour": behaviour}
            return "noise\n" + json.dumps(facts)
        self.calls.append(arguments)
        option = dict(zip(arguments, arguments[1:], strict=False))
        if option["-m"] == "train":
            return self._train(run, arguments, option)
        return self._evaluate(run, option, log)

    def _train(self, run, arguments, option):
        expdir = Path(option["-p"]) if "-p" in option else Path(option["-e"]).parent
        before = saved.read(Path(option["-e"])) if "-e" in option else None
        args, config = (vars(before["Args"]), before["Config"]) if before else _as_s3prl_records(arguments, option)
        overrides = dict(part.split("=") for part in option.get("-o", "").split(",,") if part)
        if "args.seed" in overrides:
            args["seed"] = int(overrides["args.seed"])
        total = int(overrides.get("config.runner.total_steps", config["runner"]["total_steps"]))
        config["runner"]["total_steps"] = total
        for step in range((before["Step"] if before else 0) + 2, total + 1, 2):
            if self.fail_at == step:
                raise RunFailed("killed")
            for old in expdir.glob("states-*.ckpt"):
                if run.task.name != "ASV":
                    old.unlink()
            for name in (f"states-{step}.ckpt", run.task.best):
                if name:
                    _save(expdir / name, step, self.dev(expdir), {k: v for k, v in args.items() if k != "mode"}, config)
        return ""

    def _evaluate(self, run, option, log):
        expdir = Path(option["-p"]) if "-p" in option else Path(option["-e"]).parent
        checkpoint = Path(option["-e"]) if "-e" in option else expdir
        value = self.test(checkpoint)
        log.parent.mkdir(parents=True, exist_ok=True)
        if run.task.name == "ASV":
            (expdir / "test_predict.txt").write_text(f"{checkpoint.name}\n")
            return f"noise\nsv-voxceleb1/test-EER: {value}\n"
        if run.task.name == "QbE":
            _stdlist(run, expdir, option, value)
            return ""
        text = "".join(f"{run.task.test_split} {metric.key}: {value}\n" for metric in run.task.metrics)
        log.write_text(f"$ command\n{text}")
        for source, _ in run.task.predictions:
            (expdir / Path(source).name).write_text("prediction\n")
        return text


def _as_s3prl_records(arguments: list[str], option: dict) -> tuple[dict, dict]:
    """Args and Config as the runner saves them."""
    import yaml

    args = {
        "upstream": option["-u"],
        "downstream": option["-d"],
        "upstream_ckpt": option.get("-k"),
        "upstream_model_config": option.get("-g"),
        "upstream_feature_selection": option["-s"],
        "upstream_feature_normalize": "--upstream_feature_normalize" in arguments,
        "upstream_layer_selection": None,
        "upstream_trainable": False,
        "seed": int(option["--seed"]),
    }
    return args, yaml.safe_load(Path(option["-c"]).read_text())


def _stdlist(run, expdir: Path, option: dict, layer_is_right) -> None:
    """Scores that are right on the layer `layer_is_right(layer)` says, else reversed."""
    part = "dev" if option["-t"] == "dev" else "eval"
    rttm = (run.corpus / "scoring" / f"groundtruth_quesst14_{part}" / f"quesst14_{part}.rttm").read_text()
    truth = {(line.split()[5], line.split()[1]) for line in rttm.splitlines()}
    sign = 1 if layer_is_right else -1
    lists = []
    for query in sorted({q for q, _ in truth}):
        terms = "".join(
            f'<term file="{file.stem}" score="{sign * ((query, file.stem) in truth)}"/>'
            for file in sorted((run.corpus / "Audio").glob("quesst14_0*.wav"))
        )
        lists.append(f'<detected_termlist termid="{query}">{terms}</detected_termlist>')
    (expdir / "benchmark.stdlist.xml").write_text(f"<stdlist>{''.join(lists)}</stdlist>")


@pytest.fixture()
def fake_runner(monkeypatch):
    """Puts a :class:`FakeRunner` in the place of s3prl's; takes its keywords."""
    return functools.partial(FakeRunner, monkeypatch)


@pytest.fixture(scope="session")
def _stock_server():
    """s3prl's runner, each command in a fresh child of one process that has imported it (see stock_server.py)."""
    command = [sys.executable, str(Path(__file__).with_name("stock_server.py"))]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )

    def run(run, arguments, log, *, module="s3prl.run_downstream", nproc=1):
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"module": module, "argv": [*arguments]}) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            file.write(f"$ {' '.join(arguments)}\n{answer['output']}")
        if answer["code"]:
            raise RunFailed(answer["output"][-2000:])
        return answer["output"]

    yield run
    process.communicate()


@pytest.fixture()
def server(_stock_server, monkeypatch):
    """Stages start the real runner, but seconds faster."""
    monkeypatch.setattr(stock, "run_stock", _stock_server)


@pytest.fixture(scope="session")
def generated(tmp_path_factory):
    """Task -> a generated corpus that is in order; shared, so copy before breaking it."""
    made: dict[str, Path] = {}

    def get(task: str) -> Path:
        if task not in made:
            made[task] = corpora.generate(task, tmp_path_factory.mktemp(task) / "data", scale=2)
        return made[task]

    return get


@pytest.fixture()
def make(tmp_path, generated):
    """Makes a smoke run of one task below tmp_path; takes fields of Run."""

    def run(task: str, **options) -> Run:
        settings = {"task": TASKS[task], "upstream": "fbank", "exp": tmp_path / "exp", "smoke": True, "device": "cpu"}
        if "data" not in options:
            options["data"] = generated(task)
        return Run(**{**settings, **options})

    return run
