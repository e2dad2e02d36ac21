"""Identity by content: no probe is reported as another's, and the same run goes on wherever its files have moved to."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.superb import collect, configuration, identity, stages, stock
from s3prl_speaker_upstreams.superb.__main__ import main
from s3prl_speaker_upstreams.superb.errors import IdentityMismatch, RunFailed
from s3prl_speaker_upstreams.superb.run import Run, rate_name
from s3prl_speaker_upstreams.superb.tasks import TASKS

torch = pytest.importorskip("torch")


def _result(run: Run) -> dict:
    return json.loads((run.folder / "result.json").read_text())


def _trained(fake) -> int:
    return sum(call[1] == "train" for call in fake.calls)


@pytest.fixture()
def files(tmp_path):
    """Two checkpoints, two configurations, a folder with a yaml of its own."""
    for name in ("a.pt", "b.pt", "a.yaml", "b.yaml"):
        (tmp_path / name).write_text(f"content of {name}")
    (tmp_path / "conf").mkdir()
    config = yaml.safe_load((configuration.CONF / "KS.yaml").read_text())
    config["downstream_expert"]["modelrc"]["projector_dim"] = 128
    (tmp_path / "conf" / "KS.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


OTHERS = {
    "ckpt": ("ckpt", lambda f: {"ckpt": str(f / "b.pt")}),
    "-g": ("model_config", lambda f: {"model_config": str(f / "b.yaml")}),
    "upstream under one tag": ("upstream", lambda f: {"upstream": "mfcc"}),
    "feature": ("feature", lambda f: {"feature": "block_4"}),
    "normalize": ("normalize", lambda f: {"normalize": True}),
    "yaml": ("projector_dim", lambda f: {"conf": f / "conf"}),
    "setting": ("clipping", lambda f: {"settings": {"runner.gradient_clipping": 2.0}}),
}


@pytest.mark.parametrize("change", OTHERS)
def test_another_model_under_the_same_tag_is_refused_and_forced_only_by_training(change, make, fake_runner, files):
    fake = fake_runner()
    first = make("KS", tag="t", ckpt=str(files / "a.pt"), model_config=str(files / "a.yaml"))
    stages.run_stages(first)
    before, kept = len(fake.calls), _result(first)
    field, options = OTHERS[change]
    other = replace(first, **options(files))
    for wanted in (list(stages.STAGES), ["train"], ["choose"], ["evaluate"], ["score"]):
        with pytest.raises(IdentityMismatch, match=rf"{field}.*--tag .*--force"):
            stages.run_stages(other, wanted)
    with pytest.raises(IdentityMismatch):  # repeating an evaluation does not make the probe another's
        stages.run_stages(replace(other, force=True), ["evaluate", "score"])
    assert len(fake.calls) == before and _result(first) == kept
    stages.run_stages(replace(other, force=True))
    assert _trained(fake) == 2 and len(fake.calls) == before + 2
    with pytest.raises(IdentityMismatch):
        stages.run_stages(first)


@pytest.mark.parametrize("name", ["a.pt", "a.yaml"])
def test_other_content_at_the_same_path_is_noticed(name, make, fake_runner, files):
    fake_runner()
    run = make("KS", ckpt=str(files / "a.pt"), model_config=str(files / "a.yaml"))
    stages.run_stages(run)
    (files / name).write_text("others of same length")
    with pytest.raises(IdentityMismatch, match="was made with (ckpt|model_config)"):
        stages.run_stages(run)


def test_other_weights_of_an_upstream_that_names_no_file_are_noticed_before_work(make, fake_runner):
    fake = fake_runner()
    run = make("KS")
    stages.run_stages(run, ["check", "prepare", "train"])
    fake.state = "downloaded anew, differently"
    with pytest.raises(IdentityMismatch, match="state"):
        stages.run_stages(run)
    assert not [call for call in fake.calls if call[1] == "evaluate"]


def test_another_corpus_is_noticed_and_the_same_one_may_move(make, fake_runner, generated, tmp_path):
    fake = fake_runner()
    moved = shutil.copytree(generated("KS"), tmp_path / "moved")
    run = make("KS")
    stages.run_stages(run)
    calls = len(fake.calls)
    stages.run_stages(replace(run, data=moved))
    assert len(fake.calls) == calls, "the same corpus elsewhere is the same corpus"
    next((moved / "test" / "yes").glob("*.wav")).unlink()
    shutil.copy(next((moved / "test" / "no").glob("*.wav")), moved / "test" / "yes" / "another.wav")
    with pytest.raises(IdentityMismatch, match="corpus"):
        stages.run_stages(replace(run, data=moved))


def test_a_list_of_other_content_is_another_corpus_and_is_prepared_anew(make, fake_runner, generated, tmp_path):
    fake_runner()
    data = shutil.copytree(generated("ASV"), tmp_path / "asv")
    run = make("ASV", data=data)
    stages.run_stages(run)
    trials = data / "voxceleb1_test_v2.txt"
    lines = trials.read_text().splitlines(True)
    trials.write_text("".join(lines[:-2]))
    other = replace(run, tag="fewer-trials")
    stages.run_stages(other)
    assert len((other.prepared / "voxceleb1_test_v2.txt").read_text().splitlines()) == len(lines) - 2
    with pytest.raises(IdentityMismatch, match="corpus"):
        stages.run_stages(run)


def test_seeds_have_folders_of_their_own_and_the_table_their_mean_and_deviation(make, fake_runner, tmp_path):
    value = {1337: 0.25, 1: 0.5, 2: 0.75}
    fake = fake_runner(test=lambda checkpoint: value[_seed_of(checkpoint)])
    runs = [make("KS", seed=seed) for seed in value]
    for run in runs:
        stages.run_stages(run)
    assert _trained(fake) == 3 and len({run.folder for run in runs}) == 3
    assert [_result(run)["metrics"]["KS acc"] for run in runs] == [25, 50, 75]
    collect.collect(runs[0].exp, tmp_path)
    assert "| fbank | 50.00 ± 25.00* |" in (tmp_path / "superb.md").read_text()
    assert "KS acc deviation" in (tmp_path / "superb.csv").read_text().splitlines()[0]
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 4


def _seed_of(checkpoint: Path) -> int:
    from s3prl_speaker_upstreams.superb.saved import read

    return vars(read(checkpoint)["Args"])["seed"]


def test_seeds_made_in_different_ways_are_not_averaged(make, fake_runner, tmp_path):
    fake_runner()
    stages.run_stages(make("KS"))
    stages.run_stages(make("KS", seed=1, settings={"runner.gradient_clipping": 2.0}))
    collect.collect(tmp_path / "exp", tmp_path, reference=False)
    rows = [line for line in (tmp_path / "superb.csv").read_text().splitlines()[1:]]
    assert len(rows) == 2 and "deviation" not in (tmp_path / "superb.csv").read_text()


def test_two_models_under_one_label_never_share_a_row(make, fake_runner, files):
    fake_runner()
    stages.run_stages(make("KS", tag="t", ckpt=str(files / "a.pt")))
    stages.run_stages(make("IC", tag="t", ckpt=str(files / "b.pt")))
    collect.collect(files / "exp", files, reference=False)
    rows = (files / "superb.csv").read_text().splitlines()[1:]
    assert len(rows) == 2 and all(row.startswith("t (") for row in rows)


@pytest.mark.parametrize("stage", ["train", "choose", "evaluate"])
def test_forcing_a_stage_repeats_those_after_it(stage, make, fake_runner):
    fake = fake_runner()
    run = make("KS")
    stages.run_stages(run)
    first = {name: (run.folder / ".done" / f"{name}.json").read_text() for name in ("choose", "evaluate", "score")}
    stages.run_stages(replace(run, force=True), [stage])
    before = len(fake.calls)
    stages.run_stages(run)
    after = {name: (run.folder / ".done" / f"{name}.json").read_text() for name in first}
    later = list(stages.STAGES)[list(stages.STAGES).index(stage) + 1 :]
    assert {name for name in first if first[name] != after[name]} >= set(later)
    assert len(fake.calls) - before == (1 if stage != "evaluate" else 0)  # the evaluation is repeated, once


def test_forced_training_takes_the_old_result_away_at_once(make, fake_runner):
    fake_runner()
    run = make("KS")
    stages.run_stages(run)
    stages.run_stages(replace(run, force=True), ["train"])
    assert not (run.folder / "result.json").exists()


@pytest.mark.parametrize(("first", "second"), [(1.5e-3, 2e-3), (1e-3, 1.0000001e-3), (0.1, 0.11)])
def test_learning_rates_never_share_a_folder(first, second, make, fake_runner):
    assert rate_name(first) != rate_name(second)
    assert rate_name(1e-4) == "lr1e-04" and rate_name(2e-3) == "lr2e-03"  # as folders made before are called
    fake = fake_runner()
    stages.run_stages(make("KS", lrs=(first, second)), ["check", "prepare", "train"])
    assert _trained(fake) == 2


def test_fewer_updates_than_were_made_are_refused_and_more_go_on(make, fake_runner):
    fake = fake_runner()
    run = make("KS")
    stages.run_stages(run)
    with pytest.raises(IdentityMismatch, match="total_steps 4, this run has 2"):
        stages.run_stages(replace(run, settings={"runner.total_steps": 2}))
    longer = replace(run, settings={"runner.total_steps": 8})
    stages.run_stages(longer)
    assert _result(longer)["config"]["runner.total_steps"] == 8 and _trained(fake) == 2
    scheduled = replace(longer, settings={"runner.total_steps": 10, "scheduler.name": "linear_schedule_with_warmup"})
    with pytest.raises(IdentityMismatch):  # its rates were laid out for another number
        stages.run_stages(scheduled)


def test_each_resume_draws_data_with_a_seed_of_its_own_and_says_so(make, fake_runner):
    fake = fake_runner()
    run = make("KS", settings={"runner.total_steps": 8})
    for step in (4, 6):
        fake.fail_at = step
        with pytest.raises(RunFailed):
            stages.run_stages(run)
    fake.fail_at = None
    stages.run_stages(run)
    seeds = [identity.resume_seed(run.seed, step) for step in (2, 4)]
    assert len({run.seed, *seeds}) == 3
    given = [call[call.index("-o") + 1] for call in fake.calls if call[1] == "train" and "-o" in call]
    assert [f"args.seed={seed}" in override for seed, override in zip(seeds, given, strict=True)] == [True, True]
    (resumes,) = _result(run)["resumes"].values()
    assert [(one["step"], one["seed"]) for one in resumes] == [(2, seeds[0]), (4, seeds[1])]
    # the evaluation is that of the run's own seed, and starting again finds everything done
    assert f"args.seed={run.seed}" in fake.calls[-1][fake.calls[-1].index("-o") + 1]
    before = len(fake.calls)
    stages.run_stages(run)
    assert len(fake.calls) == before


def test_slots_shorter_than_an_epoch_see_more_than_its_beginning():
    """Four starts that each end after a quarter of an epoch, with the loaders that s3prl's recipes make."""
    data = list(range(64))

    def slot(seed: int) -> set[int]:
        torch.manual_seed(seed)
        loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
        return {int(one) for batch, _ in zip(loader, range(4), strict=False) for one in batch}

    replayed = set.union(*(slot(1337) for _ in range(4)))
    resumed = set.union(slot(1337), *(slot(identity.resume_seed(1337, step)) for step in (4, 8, 12)))
    assert len(replayed) == 16  # a quarter, however often it is started
    assert len(resumed) > 36  # 44 are expected of four independent quarters


def test_a_checkpoint_of_another_run_put_into_the_folder_is_refused(make, fake_runner):
    """Its own Args and Config are looked at, whatever our records say."""
    fake_runner()
    run, other = make("KS"), make("KS", tag="other", feature="block_1")
    stages.run_stages(run, ["check", "prepare", "train"])
    stages.run_stages(other, ["check", "prepare", "train"])
    for file in (other.folder / "lr1e-04").glob("*.ckpt"):
        shutil.copy(file, run.folder / "lr1e-04")
    with pytest.raises(IdentityMismatch, match="upstream_feature_selection"):  # though training is recorded as done
        stages.run_stages(run)
    (run.folder / ".done" / "train-lr1e-04.json").unlink()
    with pytest.raises(IdentityMismatch, match="upstream_feature_selection"):
        stages.run_stages(run)


def test_a_foreign_checkpoint_put_in_after_choosing_is_not_evaluated(make, fake_runner):
    fake = fake_runner()
    run, other = make("KS"), make("KS", tag="other", normalize=True)
    for one in (run, other):
        stages.run_stages(one, ["check", "prepare", "train", "choose"])
    shutil.copy(other.folder / "lr1e-04" / "dev-best.ckpt", run.folder / "lr1e-04")
    with pytest.raises(IdentityMismatch, match="upstream_feature_normalize true, this run has false"):
        stages.run_stages(run)
    assert not [call for call in fake.calls if call[1] == "evaluate"]


def _as_round_one(run: Run) -> None:
    """Leave a run's folder as the first version of this package would have: no identities, other markers."""
    for name in ("identity.json", "resumes.json"):
        for file in run.folder.rglob(name):
            file.unlink()
    for marker in (run.folder / ".done").glob("*.json"):
        marker.write_text(json.dumps({"fingerprint": "0123456789abcdef", "at": "2026-10-01T00:00:00"}))


def test_folders_of_the_first_version_go_on_where_their_own_record_agrees(make, fake_runner, files):
    fake = fake_runner()
    run = make("KS", tag="t", ckpt=str(files / "a.pt"))
    stages.run_stages(run)
    _as_round_one(run)
    trained = _trained(fake)
    for options in ({"ckpt": str(files / "b.pt")}, {"feature": "x"}, {"normalize": True}, {"upstream": "mfcc"}):
        with pytest.raises(IdentityMismatch):
            stages.run_stages(replace(run, **options))
    stages.run_stages(run)
    assert _trained(fake) == trained and _result(run)["adopted"] is True
    calls = len(fake.calls)
    stages.run_stages(run)
    assert len(fake.calls) == calls


def test_results_of_the_first_version_are_tabled_with_a_mark(make, fake_runner, tmp_path):
    fake_runner()
    run = make("KS")
    stages.run_stages(run)
    kept = ("task", "metrics", "layers", "choice", "details", "predictions", "checkpoints", "seed", "versions")
    old = {**{key: _result(run)[key] for key in kept}, "upstream": "fbank", "stock": True}
    (run.folder / "result.json").write_text(json.dumps(old))
    collect.collect(run.exp, tmp_path)
    table = (tmp_path / "superb.md").read_text()
    assert "| fbank | 25.00* |" in table and "kept no settings" in table


def test_a_folder_of_the_first_version_with_another_seed_keeps_it(make, fake_runner):
    fake = fake_runner()
    run = make("KS", seed=5)
    stages.run_stages(run)
    old = run.folder.parent
    for path in run.folder.iterdir():
        shutil.move(str(path), old / path.name)
    run.folder.rmdir() if run.folder.is_dir() and run.folder != old else None
    (old / "lr1e-04" / "args_2026-10-01-00-00-00.yaml").write_text("mode: train\nseed: 5\n")
    _as_round_one(run)
    assert run.folder == old
    stages.run_stages(run)
    assert _trained(fake) == 1 and _result(run)["seed"] == 5
    with pytest.raises(IdentityMismatch, match="seed 5, this run has 1337"):
        stages.run_stages(make("KS"))


def test_other_package_versions_are_refused_unless_accepted_and_then_named(make, fake_runner, monkeypatch):
    fake_runner()
    run = make("KS")
    stages.run_stages(run)
    then = identity.stack(run)
    monkeypatch.setattr(identity, "stack", lambda run: {**then, "torch": "9.9"})
    with pytest.raises(IdentityMismatch, match=r"stack.torch .*\"9.9\".*--accept stack"):
        stages.run_stages(run)
    accepted = replace(run, accept=("stack",))
    stages.run_stages(accepted)
    assert "--accept stack" in _result(accepted)["not_stock"]


def test_a_changed_checkout_of_s3prl_is_another_one(make, tmp_path):
    package = tmp_path / "checkout" / "s3prl"
    package.mkdir(parents=True)
    (package / "version.txt").write_text("0.4.17\n")
    (package / "run_downstream.py").write_text("a = 1\n")
    run = make("KS", s3prl_root=tmp_path / "checkout")
    then = identity.s3prl_version(run)
    assert then["version"] == "0.4.17" and then["revision"].startswith("copy+")
    assert identity.s3prl_version(run) == then
    (package / "run_downstream.py").write_text("a = 2\n")
    assert identity.differences({"s3prl": then}, {"s3prl": identity.s3prl_version(run)})[0][0] == "s3prl.revision"


# ---------------------------------------------------------------------------------------------- what is stock


def test_only_the_benchmarks_own_configuration_is_stock(make, files, tmp_path):
    stock_run = make("KS", smoke=False)
    assert configuration.not_stock(stock_run) == []
    assert configuration.not_stock(replace(stock_run, conf=configuration.CONF, lrs=(1e-2,), seed=3, workers=1)) == []
    ten_steps = {**yaml.safe_load((configuration.CONF / "KS.yaml").read_text())}
    ten_steps["runner"]["total_steps"] = 10
    (files / "conf" / "KS.yaml").write_text(yaml.safe_dump(ten_steps))
    assert configuration.not_stock(replace(stock_run, conf=files / "conf")) == ["runner.total_steps=10 (stock 200000)"]
    for options, reason in (
        ({"smoke": True}, "--smoke"),
        ({"settings": {"downstream_expert.datarc.batch_size": 16}}, "batch_size=16"),
        ({"normalize": True}, "--normalize"),
        ({"feature": "block_4"}, "-s block_4"),
    ):
        assert any(reason in text for text in configuration.not_stock(replace(stock_run, **options))), reason


def test_a_small_corpus_or_an_odd_rate_is_not_stock_and_is_marked(make, fake_runner, tmp_path):
    fake = fake_runner()
    run = make("KS", smoke=False, settings={"runner.total_steps": 4, "runner.save_step": 2}, lrs=(3e-4,))
    stages.run_stages(run)
    result = _result(run)
    assert result["stock"] is False
    reasons = "; ".join(result["not_stock"])
    assert "test: 12 utterances, the full corpus has 3081" in reasons and "learning rate 0.0003" in reasons
    assert "runner.total_steps=4 (stock 200000)" in reasons and fake.calls
    collect.collect(run.exp, tmp_path)
    table = (tmp_path / "superb.md").read_text()
    assert "25.00*" in table and "not stock hyperparameters: KS: runner.save_step=2" in table
    assert r"25.00*" in (tmp_path / "superb.tex").read_text()


def test_result_and_table_hold_what_made_the_number(make, fake_runner, files):
    fake_runner()
    run = make("KS", tag="t", ckpt=str(files / "a.pt"), model_config=str(files / "a.yaml"), feature="block_2")
    stages.run_stages(run)
    result = _result(run)
    assert result["upstream"] == "fbank" and result["label"] == "t"
    assert result["weights"] == {"ckpt": run.ckpt, "file": identity.content(run.ckpt), "state": "weights"}
    assert result["model_config"]["content"] == identity.content(run.model_config)
    assert (result["feature"], result["normalize"], result["seed"], result["lr"]) == ("block_2", False, 1337, 1e-4)
    assert result["config"]["runner.total_steps"] == 4 and result["s3prl"]["version"]
    collect.collect(run.exp, files)
    line = (files / "runs.csv").read_text().splitlines()[1]
    for part in (result["weights"]["file"], "block_2", "1337", result["corpus_sha256"], result["s3prl"]["version"]):
        assert part in line
    markdown = (files / "superb.md").read_text()
    assert f"weights {result['weights']['file'][7:19]}, -s block_2, seed 1337" in markdown


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("runner.total_step=5", "no such setting; did you mean 'runner.total_steps'"),
        ("runer.total_steps=5", "did you mean 'runner.total_steps'"),
        ("runner=5", "is a section"),
        ("runner.total_steps=many", "got 'many', expected a value like 200000"),
        ("runner.eval_dataloaders=dev", r"expected a value like \['dev', 'test'\]"),
        ("runner.total_steps=[", "no yaml value"),
    ],
)
def test_settings_that_s3prl_would_not_read_are_refused(setting, message, tmp_path, capsys):
    arguments = ["run", "KS", "fbank", "--smoke", "--device", "cpu", "--exp", str(tmp_path), "--set", setting]
    assert main(arguments) == 1
    import re

    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "fbank").exists()


def test_settings_take_the_type_that_the_yaml_has(make):
    run = make("KS", settings={"optimizer.lr": "1e-3", "runner.total_steps": 6.0, "optimizer.weight_decay": 0.1})
    config = configuration.effective(run)
    assert config["optimizer"]["lr"] == 1e-3 and isinstance(config["runner"]["total_steps"], int)
    assert config["optimizer"]["weight_decay"] == 0.1
    with pytest.raises(ConfigError, match="learning_rate"):
        configuration.effective(make("KS", settings={"runner.learning_rate": 1}))


@pytest.mark.parametrize("text", ["abc", "1e-3,x", "0", "-1", "nan", ""])
def test_learning_rates_that_are_none_are_told(text, capsys):
    with pytest.raises(SystemExit):
        main(["run", "KS", "fbank", f"--lr={text}"])
    assert "expected numbers above 0 such as 1e-3" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- sweeps and arrays


def test_a_diverged_learning_rate_is_left_out_and_the_sweep_goes_on(make, fake_runner, monkeypatch, caplog):
    fake = fake_runner(dev=lambda e: {"lr1e-01": float("nan"), "lr1e-02": 0.4, "lr1e-03": 0.6}[e.name])
    original = fake._train

    def train(run, arguments, option):
        if "lr1e+00" in (option.get("-p") or option["-e"]):
            raise RunFailed("Last lines of train.log:\nValueError: Input contains NaN.")
        return original(run, arguments, option)

    monkeypatch.setattr(fake, "_train", train)
    run = make("KS", lrs=(1.0, 1e-1, 1e-2, 1e-3))
    stages.run_stages(run)
    choice = _result(run)["choice"]
    assert choice["lr"] == 1e-3
    assert {one["lr"]: one["why"] for one in choice["excluded"]} == {
        1.0: "diverged: ValueError: Input contains NaN.",
        0.1: "diverged: its dev score is nan",
    }
    assert "left out of the choice" in caplog.text
    stages.run_stages(run)  # and stays done


def test_a_sweep_that_fails_for_another_reason_finishes_the_rest_and_says_so(make, fake_runner, monkeypatch):
    fake = fake_runner()
    original = fake._train

    def train(run, arguments, option):
        if "lr1e-01" in option.get("-p", ""):
            raise RunFailed("Last lines of train.log:\nOSError: the network is down, no /data/nan.wav")
        return original(run, arguments, option)

    monkeypatch.setattr(fake, "_train", train)
    run = make("KS", lrs=(1e-1, 1e-2))
    with pytest.raises(RunFailed, match="1 of 2 trainings failed.*the network is down"):
        stages.run_stages(run)
    assert (run.folder / "lr1e-02" / "states-4.ckpt").is_file()
    monkeypatch.setattr(fake, "_train", original)
    stages.run_stages(run)
    assert _result(run)["choice"]["excluded"] == []


def test_weights_that_are_no_numbers_are_never_chosen(make, fake_runner):
    from s3prl_speaker_upstreams.superb.saved import read

    fake_runner(dev=lambda e: 0.9 if e.name == "lr1e-01" else 0.5)
    run = make("KS", lrs=(1e-1, 1e-2))
    stages.run_stages(run, ["check", "prepare", "train"])
    path = run.folder / "lr1e-01" / "dev-best.ckpt"
    content = read(path)
    content["Featurizer"]["weights"] = torch.tensor([0.0, float("nan"), 0.0])
    torch.save(content, path)
    stages.run_stages(run, ["choose"])
    choice = json.loads((run.folder / "choice.json").read_text())
    assert choice["lr"] == 1e-2 and "no numbers" in choice["excluded"][0]["why"]


def test_verification_leaves_out_what_gives_no_finite_scores(make, fake_runner, monkeypatch):
    fake = fake_runner()
    original = fake._evaluate

    def evaluate(run, option, log):
        if option["-e"].endswith("states-4.ckpt"):
            raise RunFailed("Last lines of test.log:\nValueError: Input contains NaN.")
        return original(run, option, log)

    monkeypatch.setattr(fake, "_evaluate", evaluate)
    run = make("ASV")
    stages.run_stages(run)
    assert _result(run)["choice"]["step"] == 2 and "update 4" in _result(run)["choice"]["excluded"][0]["why"]


def test_array_elements_train_apart_and_choosing_joins_them(make, fake_runner):
    from s3prl_speaker_upstreams.superb import elements

    fake = fake_runner(dev=lambda e: 0.8 if "lr1e-02" in str(e) else 0.5)
    run = make("ER", lrs=(1e-1, 1e-2))
    parts = elements.elements("train", [TASKS["ER"]], ["fbank"], lrs=run.lrs)
    assert len(parts) == 10
    options = [dict(zip(part, part[1:], strict=False)) for part in parts]
    for index, one in enumerate(options):
        with_rest = replace(run, only_lr=float(one["--only-lr"]), only_fold=one["--only-fold"])
        stages.run_stages(with_rest, one["--stages"].split(","))
        assert _trained(fake) == index + 1
        if index < 9:
            with pytest.raises(ConfigError, match="run the train stage first"):
                stages.run_stages(run, ["choose"])
    (join,) = elements.elements("join", [TASKS["ER"]], ["fbank"], lrs=run.lrs)
    stages.run_stages(run, join[-1].split(","))
    assert _trained(fake) == 10 and _result(run)["choice"]["lr"] == 1e-2
    with pytest.raises(ConfigError, match="--only-fold fold9: is none of this run's"):
        stages.run_stages(replace(run, only_fold="fold9"), ["train"])


def _prepare(exp: str, task: str, barrier, answers) -> None:
    run = Run(TASKS[task], "fbank", Path(exp), smoke=True, device="cpu")
    stock.run_stock = lambda *args, **options: json.dumps({"layers": 1, "dim": 4, "rate": 160})  # type: ignore[assignment]
    barrier.wait()
    try:
        stages.run_stages(run, ["check", "prepare"])
        answers.put((sorted(p.name for p in run.prepared.rglob("*.txt")), run.task.layout(run.corpus).recordings))
    except BaseException as error:
        answers.put(repr(error))


@pytest.mark.parametrize("task", ["SID", "SE"])
def test_array_elements_may_prepare_at_once(task, tmp_path):
    """Generated corpus and prepared files are made by one process; the others wait and find them whole."""
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(3), context.Queue()
    started = [context.Process(target=_prepare, args=(str(tmp_path), task, barrier, answers)) for _ in range(3)]
    for process in started:
        process.start()
    found = [answers.get(timeout=120) for _ in started]
    for process in started:
        process.join()
    assert all(isinstance(one, tuple) for one in found), found
    assert found[0] == found[1] == found[2] and len(found[0][1]) > 4
    assert not list((tmp_path / "prepared").glob("*.partial"))
