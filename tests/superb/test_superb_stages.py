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

from s3prl_speaker_upstreams.errors import Busy, CheckpointUnreadable, ConfigError, MissingPackage
from s3prl_speaker_upstreams.superb import collect, configuration, saved, stages, stock
from s3prl_speaker_upstreams.superb.errors import (
    IdentityMismatch,
    NoSpaceLeft,
    RunFailed,
    ScoringError,
    UnknownTask,
    UnknownUpstream,
)
from s3prl_speaker_upstreams.superb.tasks import TASKS, Package
from s3prl_speaker_upstreams.superb.work import Work

torch = pytest.importorskip("torch")


def _result(run: stages.Run) -> dict:
    return json.loads((run.folder / "result.json").read_text())


def test_whole_path_of_a_classification_task(make, fake_runner):
    fake = fake_runner()
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


def test_finished_stages_are_skipped_and_force_repeats_them(make, fake_runner):
    fake = fake_runner()
    run = make("KS")
    stages.run_stages(run)
    before = len(fake.calls)
    stages.run_stages(run)
    assert len(fake.calls) == before
    stages.run_stages(replace(run, force=True), ["evaluate"])
    assert len(fake.calls) == before + 1
    # more updates go on from where it ended
    stages.run_stages(replace(run, settings={"runner.total_steps": 6}))
    assert "-e" in fake.calls[-2] and _result(run)["choice"]["checkpoints"][""].endswith("dev-best.ckpt")
    assert saved.read(run.folder / "lr1e-04" / "dev-best.ckpt")["Step"] == 6


def test_each_stage_says_which_one_is_missing(make, fake_runner):
    fake_runner()
    run = make("KS")
    with pytest.raises(ConfigError, match="run the prepare stage first"):
        stages.run_stages(run, ["train"])
    with pytest.raises(ConfigError, match="run the train stage first"):
        stages.run_stages(run, ["choose"])
    with pytest.raises(ConfigError, match="run the choose stage first"):
        stages.run_stages(run, ["evaluate"])


def test_killed_training_goes_on_from_the_last_whole_checkpoint(make, fake_runner):
    fake = fake_runner()
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


def test_resuming_gives_paths_and_workers_again(make, fake_runner):
    """s3prl's ctc recipe saves a configuration without num_workers, and places may have moved."""
    fake = fake_runner()
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


def test_learning_rate_is_chosen_on_dev_not_on_test(make, fake_runner):
    scores = {"lr1e-02": (0.2, 0.9), "lr1e-03": (0.8, 0.4), "lr1e-04": (0.5, 0.6)}
    fake_runner(dev=lambda e: scores[e.name][0], test=lambda c: scores[c.parent.name][1])
    run = make("KS", lrs=(1e-2, 1e-3, 1e-4))
    stages.run_stages(run)
    assert _result(run)["choice"]["lr"] == 1e-3
    assert _result(run)["metrics"]["KS acc"] == pytest.approx(40)


def test_learning_rate_of_an_error_rate_is_the_lowest_on_dev(make, fake_runner):
    scores = {"lr1e-02": 0.2, "lr1e-03": 0.8}
    fake_runner(dev=lambda e: scores[e.name])
    run = make("PR", lrs=(1e-2, 1e-3))
    stages.run_stages(run)
    assert _result(run)["choice"]["lr"] == 1e-2


def test_emotion_is_the_mean_of_five_folds(make, fake_runner):
    accuracy = {f"fold{n}": n / 10 for n in range(1, 6)}
    fake = fake_runner(test=lambda c: accuracy[c.parent.name])
    run = make("ER")
    stages.run_stages(run)
    assert _result(run)["metrics"]["ER acc"] == pytest.approx(30)
    assert sum(call[1] == "train" for call in fake.calls) == 5
    assert "test_fold: fold3" in (run.folder / "lr1e-04" / "fold3" / "config.yaml").read_text()


def test_verification_takes_the_best_of_all_saved_checkpoints(make, fake_runner):
    eer = {"states-2.ckpt": 0.1, "states-4.ckpt": 0.3}
    fake = fake_runner(test=lambda c: eer[c.name])
    run = make("ASV")
    stages.run_stages(run)
    assert _result(run)["metrics"] == {"EER": pytest.approx(10)}
    assert (Path(_result(run)["predictions"]) / "test_predict.txt").read_text() == "states-2.ckpt\n"
    # a tested checkpoint is not tested again
    tested = len(fake.calls)
    (run.folder / ".done" / "choose.json").unlink()
    stages.run_stages(run, ["choose"])
    assert len(fake.calls) == tested
    # but one that has other content, under the same name, is
    content = torch.load(run.folder / "lr1e-04" / "states-4.ckpt", weights_only=False)
    torch.save({**content, "Featurizer": {"weights": torch.ones(3)}}, run.folder / "lr1e-04" / "states-4.ckpt")
    (run.folder / ".done" / "choose.json").unlink()
    stages.run_stages(run, ["choose"])
    assert [call[call.index("-e") + 1][-13:] for call in fake.calls[tested:]] == ["states-4.ckpt"]


def test_query_by_example_tests_the_layer_that_is_best_on_dev(make, fake_runner):
    fake = fake_runner(test=lambda e: e.name.startswith("layer2"), layers=3)
    run = make("QbE")
    stages.run_stages(run)
    result = _result(run)
    assert result["choice"]["layer"] == 2 and result["metrics"]["MTWV"] == pytest.approx(100)
    splits = [(call[call.index("-l") + 1], call[call.index("-t") + 1]) for call in fake.calls]
    assert splits == [("0", "dev"), ("1", "dev"), ("2", "dev"), ("2", "test")]


def test_training_that_never_got_better_on_dev_takes_the_last_checkpoint(make, monkeypatch, caplog, fake_runner):
    fake = fake_runner()
    monkeypatch.setattr(fake, "_train", lambda run, _, option: fake.save(Path(option["-p"]) / "states-4.ckpt", 4, 0.0))
    run = make("KS")
    stages.run_stages(run)
    assert _result(run)["choice"]["checkpoints"][""].endswith("states-4.ckpt")
    assert "no update got better on dev" in caplog.text


def test_several_gpus_take_the_place_of_accumulated_batches(make, fake_runner):
    fake = fake_runner()
    run = make("SID", nproc=4, settings={"runner.gradient_accumulate_steps": 4})
    assert configuration.effective(run)["runner"]["gradient_accumulate_steps"] == 1
    with pytest.raises(ConfigError, match="4 batches of 4 utterances, which 3 GPUs cannot share evenly"):
        configuration.effective(replace(run, nproc=3))
    with pytest.raises(ConfigError, match="on CUDA only"):
        stages.run_stages(replace(run, device="cpu"))
    assert not fake.calls


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.trained])
@pytest.mark.parametrize("nproc", [2, 4, 8])
def test_an_update_sees_as_many_utterances_on_any_number_of_gpus(task, nproc, tmp_path):
    """Also where one batch is an update (KS, ASR, IC, SF): then the batch itself is shared."""
    spec = TASKS[task]
    one = stages.Run(spec, "fbank", tmp_path, data=tmp_path)
    shared = replace(one, nproc=nproc)
    if not spec.distributed:
        with pytest.raises(ConfigError, match="in one process only"):
            configuration.effective(shared)
        return

    def utterances(run):
        config = configuration.effective(run)
        batch = configuration.look_up(config, spec.batch)
        return run.nproc * config["runner"]["gradient_accumulate_steps"] * batch

    if utterances(one) % nproc:
        with pytest.raises(ConfigError, match="cannot share evenly"):
            configuration.effective(shared)
    else:
        assert utterances(shared) == utterances(one)
        assert not configuration.not_stock(shared)


def test_torchrun_hands_the_rank_to_the_stock_program(monkeypatch):
    from s3prl_speaker_upstreams.superb import distributed

    started = []
    monkeypatch.setattr(distributed.runpy, "run_module", lambda name, **options: started.append((name, sys.argv[1:])))
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(sys, "argv", ["x", "-m", "train"])
    distributed.main()
    assert started == [("s3prl.run_downstream", ["-m", "train", "--local_rank=3"])]


# ---------------------------------------------------------------------------------------------- what goes wrong


def test_a_training_with_other_hyperparameters_is_not_gone_on_with(make, fake_runner):
    fake = fake_runner()
    run = make("KS")
    fake.fail_at = 4
    with pytest.raises(RunFailed):
        stages.run_stages(run)
    fake.fail_at = None
    bigger = replace(run, settings={"downstream_expert.datarc.batch_size": 8})
    with pytest.raises(IdentityMismatch, match="batch_size 4, this run has 8. To keep both, give another --tag"):
        stages.run_stages(bigger)
    stages.run_stages(replace(run, workers=2, settings={"runner.total_steps": 4}))  # those may change
    stages.run_stages(replace(bigger, force=True))
    assert "batch_size: 8" in (run.folder / "lr1e-04" / "config.yaml").read_text()
    with pytest.raises(IdentityMismatch, match="total_steps 4, this run has 2"):
        stages.run_stages(replace(bigger, settings={**bigger.settings, "runner.total_steps": 2}))


def test_missing_package_names_the_extra_before_any_work(make, fake_runner):
    fake = fake_runner()
    lacking = replace(TASKS["KS"], packages=(Package("no_such_package_at_all", "no-such-package"),))
    run = replace(make("KS"), task=lacking)
    with pytest.raises(MissingPackage, match=r"no-such-package: pip install no-such-package"):
        stages.run_stages(run)
    assert not fake.calls


def test_unknown_upstream_gets_the_nearest_and_not_the_whole_hub(make, fake_runner):
    fake_runner()
    with pytest.raises(UnknownUpstream, match="among its 202; did you mean hubert") as error:
        stages.run_stages(make("KS", upstream="hubertt"))
    assert "x17" not in str(error.value) and isinstance(error.value, UnknownTask)


def test_unknown_feature_is_refused_for_s3prl_would_take_another(make, fake_runner):
    fake = fake_runner()
    with pytest.raises(
        UnknownUpstream, match="--feature nosuch: fbank gives no such feature .* it gives hidden_states"
    ):
        stages.run_stages(make("KS", feature="nosuch"))
    assert not fake.calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_told_in_one_line_before_anything(make, capsys, fake_runner):
    from s3prl_speaker_upstreams.superb.__main__ import main

    fake = fake_runner()
    run = make("KS")
    assert main(["run", "KS", "fbank", "--data", str(run.corpus), "--exp", str(run.exp)]) == 1
    message = capsys.readouterr().err
    assert "give --device cpu" in message and message.count("\n") == 1
    assert not fake.calls and not fake.probed
    assert main(["run", "KS", "fbank", "--data", str(run.corpus), "--exp", str(run.exp), "--device", "gpu"]) == 1
    assert "torch knows no such device" in capsys.readouterr().err


def test_too_little_disk_is_told_before_training(make, monkeypatch, fake_runner):
    fake = fake_runner()
    monkeypatch.setattr(stages.shutil, "disk_usage", lambda path: argparse.Namespace(free=2**20))
    with pytest.raises(NoSpaceLeft, match="GiB free"):
        stages.run_stages(make("ASR"))
    assert not fake.calls


def test_paths_that_the_override_option_cannot_carry_are_refused(make, tmp_path, fake_runner):
    fake_runner()
    with pytest.raises(ConfigError, match="cannot carry"):
        stages.run_stages(make("KS", exp=tmp_path / "a=b"))


def test_a_run_that_another_process_holds_is_left_alone(make, fake_runner):
    fake_runner()
    run = make("KS")
    with Work(run).alone(run.folder / "lr1e-04"), pytest.raises(Busy, match="in use by another process"):
        stages.run_stages(run)
    stages.run_stages(run)


def test_a_checkpoint_that_could_run_code_is_not_loaded_nor_moved(tmp_path):
    path = tmp_path / "states-2.ckpt"
    torch.save({"Step": 2, "evil": Path("/etc")}, path)
    with pytest.raises(CheckpointUnreadable, match="was not loaded"):
        saved.checkpoints(tmp_path)
    assert path.is_file()


def test_evaluation_that_printed_no_score_is_an_error(make, fake_runner):
    fake = fake_runner()
    run = make("KS")
    stages.run_stages(run, ["check", "prepare", "train", "choose", "evaluate"])
    (run.folder / "lr1e-04" / "test.log").write_text("Traceback\n")
    with pytest.raises(ScoringError, match="no line 'test acc'"):
        stages.run_stages(run, ["score"])
    assert fake.calls and not (run.folder / "result.json").exists()


def test_a_checkout_must_be_one(make, tmp_path, fake_runner):
    fake_runner()
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
        stock.run_stock(run, [], tmp_path / "log", module="boom")
    if Path("/dev/full").exists():
        for module in ("full", "full_save"):
            with pytest.raises(NoSpaceLeft, match="goes on from the last whole one"):
                stock.run_stock(run, [], tmp_path / "log", module=module)
    assert "ValueError" in (tmp_path / "log").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="children end with their parent on Linux only")
def test_a_killed_stage_leaves_no_runner_behind(tmp_path):
    (tmp_path / "child.py").write_text(
        "import os, time\nopen(os.environ['PIDFILE'] + '.new', 'w').write(str(os.getpid()))\n"
        "os.rename(os.environ['PIDFILE'] + '.new', os.environ['PIDFILE'])\ntime.sleep(60)\n"
    )
    code = (
        "import pathlib; from s3prl_speaker_upstreams.superb import stages, stock; "
        "from s3prl_speaker_upstreams.superb.tasks import TASKS; "
        "run = stages.Run(TASKS['KS'], 'fbank', pathlib.Path('exp')); "
        "stock.run_stock(run, [], pathlib.Path('log'), module='child')"
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
def scored(make, fake_runner):
    fake = fake_runner(test=lambda c: 0.25, layers=3)
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
    assert re.search(r"\| 25.00\* \|  \| 25.00\* \|", rows["fbank"]) and "96.30" in rows["HuBERT Base"]
    assert "website-react@cacb90e" in markdown and "not stock hyperparameters" in markdown
    assert r"other\_upstream" in latex and latex.count(r"\\") == 2 + len(rows) - 1
    head = csv.splitlines()[0]
    assert head.startswith("upstream,KS acc,IC acc,ER acc,SUPERB score,weights,feature,normalize,seeds,not stock,")
    without = collect.collect(scored[0].exp, tmp_path / "plain", reference=False)
    assert "HuBERT" not in without[0].read_text()


def test_collect_names_checkpoints_whose_layer_weights_can_be_read(scored, tmp_path):
    collect.collect(scored[0].exp, tmp_path)
    weights = json.loads((tmp_path / "layer_weights.json").read_text())
    assert set(weights) == {"fbank KS", "fbank ER", "other_upstream KS"}  # one_layer has none
    content = saved.read(Path(weights["fbank KS"]))
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
