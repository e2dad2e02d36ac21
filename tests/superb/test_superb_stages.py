"""Stages: resuming, choosing, skipping, failing - with a stand-in for the stock runner (e2e tests run the real one)."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from s3prl_speaker_upstreams.errors import CheckpointUnreadable, ConfigError, MissingPackage
from s3prl_speaker_upstreams.superb import collect, corpora, stages
from s3prl_speaker_upstreams.superb.errors import NoSpaceLeft, RunFailed, ScoringError, UnknownTask
from s3prl_speaker_upstreams.superb.tasks import TASKS, Package

torch = pytest.importorskip("torch")


def _save(path: Path, step: int, score: float) -> None:
    state = {
        "Step": step,
        "Args": argparse.Namespace(mode="train"),
        "Config": {"runner": {}},
        "Featurizer": {"weights": torch.zeros(3)},
        "Downstream": {"best_score": torch.ones(1) * score},
    }
    torch.save(state, path)


class FakeRunner:
    """Writes what the stock runner writes; `dev` gives the dev score of an experiment folder."""

    def __init__(self, monkeypatch, dev=lambda expdir: 0.5, test=lambda checkpoint: 0.25, layers=1):
        self.calls: list[list[str]] = []
        self.dev, self.test, self.layers = dev, test, layers
        self.fail_at: int | None = None
        monkeypatch.setattr(stages, "_stock", self)

    def __call__(self, run, arguments, log, *, module="s3prl.run_downstream", nproc=1):
        arguments = list(arguments)
        if module.endswith("probe"):
            if arguments[0] == "hubertt":
                return json.dumps({"error": "unknown", "known": ["fbank", "hubert"]})
            return "noise\n" + json.dumps({"layers": self.layers, "dim": 4, "rate": 160})
        self.calls.append(arguments)
        option = dict(zip(arguments, arguments[1:], strict=False))
        if option["-m"] == "train":
            return self._train(run, option)
        return self._evaluate(run, option, log)

    def _train(self, run, option):
        expdir = Path(option["-p"]) if "-p" in option else Path(option["-e"]).parent
        start = int(stages._read_checkpoint(Path(option["-e"]))["Step"]) if "-e" in option else 0
        for step in range(start + 2, 5, 2):
            if self.fail_at == step:
                raise RunFailed("killed")
            for old in expdir.glob("states-*.ckpt"):
                if run.task.name != "ASV":
                    old.unlink()
            _save(expdir / f"states-{step}.ckpt", step, self.dev(expdir))
            if run.task.best:
                _save(expdir / run.task.best, step, self.dev(expdir))
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
def make(tmp_path):
    def run(task: str, **options) -> stages.Run:
        data = tmp_path / "data" / task
        if not data.is_dir():
            corpora.generate(task, data, scale=2)
        settings = {"task": TASKS[task], "upstream": "fbank", "exp": tmp_path / "exp", "data": data, "smoke": True}
        return stages.Run(**{**settings, **options})

    return run


def _result(run: stages.Run) -> dict:
    return json.loads((run.folder / "result.json").read_text())


def test_whole_path_of_a_classification_task(make, monkeypatch):
    fake = FakeRunner(monkeypatch)
    run = make("KS")
    stages.run_stages(run)
    result = _result(run)
    assert result["metrics"] == {"KS acc": 25.0}
    assert result["choice"]["checkpoints"][""].endswith("lr1e-04/dev-best.ckpt")
    assert result["stock"] is False and result["versions"]["python"]
    train = fake.calls[0]
    assert train[:2] == ["-m", "train"] and train[train.index("-d") + 1] == "speech_commands"
    config = Path(train[train.index("-c") + 1]).read_text()
    assert str(run.corpus / "train") in config and "total_steps: 4" in config


def test_finished_stages_are_skipped_and_force_repeats_them(make, monkeypatch):
    fake = FakeRunner(monkeypatch)
    run = make("KS")
    stages.run_stages(run)
    before = len(fake.calls)
    stages.run_stages(run)
    assert len(fake.calls) == before
    stages.run_stages(replace(run, force=True), ["evaluate"])
    assert len(fake.calls) == before + 1
    # other options are other work
    stages.run_stages(replace(run, settings={"runner.total_steps": 2}), ["check", "train"])
    assert len(fake.calls) > before


def test_each_stage_says_which_one_is_missing(make, monkeypatch):
    FakeRunner(monkeypatch)
    run = make("KS")
    with pytest.raises(ConfigError, match="run the prepare stage first"):
        stages.run_stages(run, ["train"])
    with pytest.raises(ConfigError, match="run the train stage first"):
        stages.run_stages(run, ["choose"])
    with pytest.raises(ConfigError, match="run the choose stage first"):
        stages.run_stages(run, ["evaluate"])


def test_killed_training_goes_on_from_the_last_whole_checkpoint(make, monkeypatch):
    fake = FakeRunner(monkeypatch)
    run = make("KS")
    fake.fail_at = 4
    with pytest.raises(RunFailed):
        stages.run_stages(run)
    expdir = run.folder / "lr1e-04"
    # the kill came while a checkpoint was being written
    whole = (expdir / "states-2.ckpt").read_bytes()
    (expdir / "states-4.ckpt").write_bytes(whole[: len(whole) // 2])
    fake.fail_at = None
    stages.run_stages(run)
    resumed = fake.calls[1]
    assert resumed[resumed.index("-e") + 1].endswith("states-2.ckpt") and "-c" not in resumed
    assert (expdir / "states-4.ckpt.broken").is_file()
    assert _result(run)["metrics"] == {"KS acc": 25.0}


def test_resuming_gives_paths_and_workers_again(make, monkeypatch):
    """s3prl's ctc recipe saves a configuration without num_workers, and places may have moved."""
    fake = FakeRunner(monkeypatch)
    run = make("PR", workers=3)
    fake.fail_at = 4
    with pytest.raises(RunFailed):
        stages.run_stages(run)
    fake.fail_at = None
    stages.run_stages(run)
    for call in fake.calls[1:]:
        override = call[call.index("-o") + 1]
        assert "config.downstream_expert.corpus.num_workers=3" in override
        assert f"config.downstream_expert.corpus.path='{run.corpus}'" in override


def test_learning_rate_is_chosen_on_dev_not_on_test(make, monkeypatch):
    scores = {"lr1e-02": (0.2, 0.9), "lr1e-03": (0.8, 0.4), "lr1e-04": (0.5, 0.6)}
    FakeRunner(monkeypatch, dev=lambda e: scores[e.name][0], test=lambda c: scores[c.parent.name][1])
    run = make("KS", lrs=(1e-2, 1e-3, 1e-4))
    stages.run_stages(run)
    assert _result(run)["choice"]["lr"] == 1e-3
    assert _result(run)["metrics"]["KS acc"] == pytest.approx(40)


def test_learning_rate_of_an_error_rate_is_the_lowest_on_dev(make, monkeypatch):
    scores = {"lr1e-02": 0.2, "lr1e-03": 0.8}
    FakeRunner(monkeypatch, dev=lambda e: scores[e.name])
    run = make("PR", lrs=(1e-2, 1e-3))
    stages.run_stages(run)
    assert _result(run)["choice"]["lr"] == 1e-2


def test_emotion_is_the_mean_of_five_folds(make, monkeypatch):
    accuracy = {f"fold{n}": n / 10 for n in range(1, 6)}
    fake = FakeRunner(monkeypatch, test=lambda c: accuracy[c.parent.name])
    run = make("ER")
    stages.run_stages(run)
    assert _result(run)["metrics"]["ER acc"] == pytest.approx(30)
    assert sum(call[1] == "train" for call in fake.calls) == 5
    assert "test_fold: fold3" in (run.folder / "lr1e-04" / "fold3" / "config.yaml").read_text()


def test_verification_takes_the_best_of_all_saved_checkpoints(make, monkeypatch):
    eer = {"states-2.ckpt": 0.1, "states-4.ckpt": 0.3}
    fake = FakeRunner(monkeypatch, test=lambda c: eer[c.name])
    run = make("ASV")
    stages.run_stages(run)
    assert _result(run)["metrics"] == {"EER": pytest.approx(10)}
    assert (Path(_result(run)["predictions"]) / "test_predict.txt").read_text() == "states-2.ckpt\n"
    # a tested checkpoint is not tested again
    tested = len(fake.calls)
    (run.folder / ".done" / "choose.json").unlink()
    stages.run_stages(run, ["choose"])
    assert len(fake.calls) == tested


def test_query_by_example_tests_the_layer_that_is_best_on_dev(make, monkeypatch):
    fake = FakeRunner(monkeypatch, test=lambda e: e.name.startswith("layer2"), layers=3)
    run = make("QbE")
    stages.run_stages(run)
    result = _result(run)
    assert result["choice"]["layer"] == 2 and result["metrics"]["MTWV"] == pytest.approx(100)
    splits = [(call[call.index("-l") + 1], call[call.index("-t") + 1]) for call in fake.calls]
    assert splits == [("0", "dev"), ("1", "dev"), ("2", "dev"), ("2", "test")]


def test_training_that_never_got_better_on_dev_takes_the_last_checkpoint(make, monkeypatch, caplog):
    fake = FakeRunner(monkeypatch)
    monkeypatch.setattr(fake, "_train", lambda run, option: _save(Path(option["-p"]) / "states-4.ckpt", 4, 0.0))
    run = make("KS")
    stages.run_stages(run)
    assert _result(run)["choice"]["checkpoints"][""].endswith("states-4.ckpt")
    assert "no update got better on dev" in caplog.text


def test_several_gpus_take_the_place_of_accumulated_batches(make, monkeypatch):
    fake = FakeRunner(monkeypatch)
    run = make("SID", nproc=4, settings={"runner.gradient_accumulate_steps": 4})
    assert stages._config(run)["runner"]["gradient_accumulate_steps"] == 1
    with pytest.raises(ConfigError, match="accumulates 4 batches"):
        stages._config(replace(run, nproc=3))
    with pytest.raises(ConfigError, match="on CUDA only"):
        stages.run_stages(replace(run, device="cpu"))
    assert not fake.calls


def test_torchrun_hands_the_rank_to_the_stock_program(monkeypatch):
    from s3prl_speaker_upstreams.superb import distributed

    started = []
    monkeypatch.setattr(distributed.runpy, "run_module", lambda name, **options: started.append((name, sys.argv[1:])))
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(sys, "argv", ["x", "-m", "train"])
    distributed.main()
    assert started == [("s3prl.run_downstream", ["-m", "train", "--local_rank=3"])]


# ---------------------------------------------------------------------------------------------- what goes wrong


def test_a_training_with_other_hyperparameters_is_not_gone_on_with(make, monkeypatch):
    fake = FakeRunner(monkeypatch)
    run = make("KS")
    fake.fail_at = 4
    with pytest.raises(RunFailed):
        stages.run_stages(run)
    fake.fail_at = None
    bigger = replace(run, settings={"downstream_expert.datarc.batch_size": 8})
    with pytest.raises(ConfigError, match="batch_size=4, this one has 8; give another --tag"):
        stages.run_stages(bigger)
    stages.run_stages(replace(run, workers=2, settings={"runner.total_steps": 4}))  # those may change
    stages.run_stages(replace(bigger, force=True))
    assert "batch_size: 8" in (run.folder / "lr1e-04" / "config.yaml").read_text()


def test_missing_package_names_the_extra_before_any_work(make, monkeypatch):
    fake = FakeRunner(monkeypatch)
    lacking = replace(TASKS["KS"], packages=(Package("no_such_package_at_all", "no-such-package"),))
    run = replace(make("KS"), task=lacking)
    with pytest.raises(MissingPackage, match=r"no-such-package: pip install 's3prl-speaker-upstreams\[ks\]'"):
        stages.run_stages(run)
    assert not fake.calls


def test_unknown_upstream_lists_those_that_exist(make, monkeypatch):
    FakeRunner(monkeypatch)
    with pytest.raises(UnknownTask, match="did you mean hubert.*knows fbank, hubert"):
        stages.run_stages(make("KS", upstream="hubertt"))


def test_too_little_disk_is_told_before_training(make, monkeypatch):
    fake = FakeRunner(monkeypatch)
    monkeypatch.setattr(stages.shutil, "disk_usage", lambda path: argparse.Namespace(free=2**20))
    with pytest.raises(NoSpaceLeft, match="GiB free"):
        stages.run_stages(make("ASR"))
    assert not fake.calls


def test_paths_that_the_override_option_cannot_carry_are_refused(make, monkeypatch, tmp_path):
    FakeRunner(monkeypatch)
    with pytest.raises(ConfigError, match="cannot carry"):
        stages.run_stages(make("KS", exp=tmp_path / "a=b"))


def test_a_run_that_another_process_holds_is_left_alone(make, monkeypatch):
    FakeRunner(monkeypatch)
    run = make("KS")
    with stages._alone(run), pytest.raises(RunFailed, match="another process works on this run"):
        stages.run_stages(run)


def test_a_checkpoint_that_could_run_code_is_not_loaded_nor_moved(tmp_path):
    path = tmp_path / "states-2.ckpt"
    torch.save({"Step": 2, "evil": Path("/etc")}, path)
    with pytest.raises(CheckpointUnreadable, match="was not loaded"):
        stages.checkpoints(tmp_path)
    assert path.is_file()


def test_evaluation_that_printed_no_score_is_an_error(make, monkeypatch):
    fake = FakeRunner(monkeypatch)
    run = make("KS")
    stages.run_stages(run, ["check", "prepare", "train", "choose", "evaluate"])
    (run.folder / "lr1e-04" / "test.log").write_text("Traceback\n")
    with pytest.raises(ScoringError, match="no line 'test acc'"):
        stages.run_stages(run, ["score"])
    assert fake.calls and not (run.folder / "result.json").exists()


def test_a_checkout_must_be_one(make, monkeypatch, tmp_path):
    FakeRunner(monkeypatch)
    with pytest.raises(ConfigError, match="not a checkout of s3prl"):
        stages.run_stages(make("KS", s3prl_root=tmp_path))


def _plain(make) -> stages.Run:
    run = make("KS")
    run.folder.mkdir(parents=True)
    return run


def test_a_failing_command_shows_its_last_lines_and_a_full_disk_is_named(make, tmp_path, monkeypatch):
    run = _plain(make)
    (tmp_path / "boom.py").write_text("raise ValueError('the cause')\n")
    (tmp_path / "full.py").write_text("open('/dev/full', 'w').write('x' * 100000)\n")
    (tmp_path / "full_save.py").write_text("import torch\ntorch.save({'a': torch.zeros(4000)}, '/dev/full')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RunFailed, match="the cause"):
        stages._stock(run, [], tmp_path / "log", module="boom")
    if Path("/dev/full").exists():
        for module in ("full", "full_save"):
            with pytest.raises(NoSpaceLeft, match="goes on from the last whole one"):
                stages._stock(run, [], tmp_path / "log", module=module)
    assert "ValueError" in (tmp_path / "log").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="children end with their parent on Linux only")
def test_a_killed_stage_leaves_no_runner_behind(tmp_path):
    (tmp_path / "child.py").write_text(
        "import os, time\nopen(os.environ['PIDFILE'] + '.new', 'w').write(str(os.getpid()))\n"
        "os.rename(os.environ['PIDFILE'] + '.new', os.environ['PIDFILE'])\ntime.sleep(60)\n"
    )
    code = (
        "import pathlib; from s3prl_speaker_upstreams.superb import stages; "
        "from s3prl_speaker_upstreams.superb.tasks import TASKS; "
        "run = stages.Run(TASKS['KS'], 'fbank', pathlib.Path('exp')); "
        "stages._stock(run, [], pathlib.Path('log'), module='child')"
    )
    pid_file = tmp_path / "pid"
    environment = {**os.environ, "PIDFILE": str(pid_file)}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    deadline = time.time() + 60
    while not pid_file.exists() and time.time() < deadline:
        time.sleep(0.05)
    child = int(pid_file.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while time.time() < deadline:
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the runner outlived its killed parent")


# ---------------------------------------------------------------------------------------------- collecting


@pytest.fixture()
def scored(make, monkeypatch):
    fake = FakeRunner(monkeypatch, test=lambda c: 0.25, layers=3)
    runs = [make("KS"), make("ER"), make("KS", tag="other_upstream")]
    for run in runs:
        stages.run_stages(run)
    fake.layers = 1
    stages.run_stages(make("IC", tag="one_layer"))
    return runs


def test_collect_writes_one_table_with_published_rows_and_sources(scored, tmp_path):
    collect.collect(scored[0].exp, tmp_path / "tables")
    markdown, latex, csv = ((tmp_path / "tables" / f"superb.{s}").read_text() for s in ("md", "tex", "csv"))
    rows = {line.split("|")[1].strip(): line for line in markdown.splitlines() if line.startswith("| ")}
    assert re.search(r"\| 25.00 \|  \| 25.00 \|", rows["fbank"]) and "96.30" in rows["HuBERT Base"]
    assert "website-react@cacb90e" in markdown and "not stock hyperparameters" in markdown
    assert r"other\_upstream" in latex and latex.count(r"\\") == 1 + len(rows) - 1
    assert csv.splitlines()[0] == "upstream,KS acc,IC acc,ER acc,SUPERB score,source"
    without = collect.collect(scored[0].exp, tmp_path / "plain", reference=False)
    assert "HuBERT" not in without[0].read_text()


def test_collect_names_checkpoints_whose_layer_weights_can_be_read(scored, tmp_path):
    collect.collect(scored[0].exp, tmp_path)
    weights = json.loads((tmp_path / "layer_weights.json").read_text())
    assert set(weights) == {"fbank KS", "fbank ER", "other_upstream KS"}  # one_layer has none
    content = stages._read_checkpoint(Path(weights["fbank KS"]))
    assert content["Featurizer"]["weights"].shape == (3,)


def test_pack_has_the_layout_of_the_leaderboard(scored, tmp_path):
    import zipfile

    archive = collect.pack(scored[0].exp, "fbank", tmp_path / "out")
    names = set(zipfile.ZipFile(archive).namelist())
    assert names == {"predict/ks_public/predict.txt", *(f"predict/er_fold{n}_public/predict.txt" for n in range(1, 6))}
    with pytest.raises(ScoringError, match="there are results of fbank, one_layer, other_upstream"):
        collect.pack(scored[0].exp, "nobody", tmp_path / "out")
    (scored[0].folder / "lr1e-04" / "test_predict.txt").unlink()
    with pytest.raises(ScoringError, match="is gone; run the evaluate stage"):
        collect.pack(scored[0].exp, "fbank", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_collect_without_results_says_so(tmp_path):
    with pytest.raises(ScoringError, match="run the score stage"):
        collect.collect(tmp_path, tmp_path)
