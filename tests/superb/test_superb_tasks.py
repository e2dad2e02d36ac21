"""The task table, the yaml files and the command line agree with each other and with the published values."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from s3prl_speaker_upstreams.superb import tasks as tasks_package
from s3prl_speaker_upstreams.superb.__main__ import main
from s3prl_speaker_upstreams.superb.configuration import CONF
from s3prl_speaker_upstreams.superb.errors import UnknownTask
from s3prl_speaker_upstreams.superb.reference import POINTS
from s3prl_speaker_upstreams.superb.tasks import SWEEP, TASKS, find_task

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "superb"

# (updates, accumulation, learning rate) of SUPERB's downstream configurations, s3prl 0.4.18
STOCK = {
    "PR": (100000, 2, 1e-2),
    "ASR": (200000, 1, 1e-4),
    "KS": (200000, 1, 1e-4),
    "SID": (200000, 4, 1e-4),
    "ASV": (200000, 5, 1e-4),
    "SD": (30000, 4, 1e-4),
    "IC": (200000, 1, 1e-4),
    "SF": (200000, 1, 1e-4),
    "ER": (30000, 8, 1e-4),
    "SE": (150000, 1, 1e-4),
    "SS": (150000, 1, 1e-4),
}
CHECKOUT = {
    "PR": "ctc/libriphone.yaml",
    "ASR": "asr/config.yaml",
    "KS": "speech_commands/config.yaml",
    "QbE": "quesst14_dtw/config.yaml",
    "SID": "voxceleb1/config.yaml",
    "ASV": "sv_voxceleb1/config.yaml",
    "SD": "diarization/config.yaml",
    "IC": "fluent_commands/config.yaml",
    "SF": "ctc/snips.yaml",
    "ER": "emotion/config.yaml",
    "SE": "enhancement_stft/configs/cfg_voicebank.yaml",
    "SS": "separation_stft/configs/cfg.yaml",
}


def _flat(config: dict, above: str = "") -> dict:
    out = {}
    for key, value in config.items():
        out.update(_flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value})
    return out


def _yaml(task: str) -> dict:
    return yaml.safe_load((CONF / f"{task}.yaml").read_text())


@pytest.mark.parametrize("task", STOCK)
def test_yaml_has_the_stock_hyperparameters(task):
    config = _yaml(task)
    runner = config["runner"]
    values = (runner["total_steps"], runner["gradient_accumulate_steps"], float(config["optimizer"]["lr"]))
    assert values == STOCK[task]
    assert runner["total_steps"] % runner["save_step"] == 0  # or the last updates would not be saved


@pytest.mark.parametrize("task", CHECKOUT)
def test_yaml_equals_that_of_a_checkout_but_for_paths(task):
    root = os.environ.get("S3PRL_ROOT")
    if not root:
        pytest.skip("S3PRL_ROOT names no checkout of s3prl to compare with")
    theirs = _flat(yaml.safe_load((Path(root) / "s3prl" / "downstream" / CHECKOUT[task]).read_text()))
    ours = _flat(_yaml(task))
    assert set(ours) == set(theirs)
    different = {key for key in ours if ours[key] != theirs[key]}
    assert all("/" in str(ours[key]) for key in different), different


@pytest.mark.parametrize("task", TASKS)
def test_every_key_that_a_run_sets_is_one_of_the_yaml(task, tmp_path):
    known = set(_flat(_yaml(task))) | {"downstream_expert.max_workers"}
    spec = TASKS[task]
    (tmp_path / "lexicon").mkdir()
    keys = {*spec.settings(tmp_path, tmp_path), *spec.smoke, spec.workers}
    assert keys <= known
    if spec.folds:
        assert "downstream_expert.datarc.test_fold" in known


def test_tables_are_complete():
    assert len(TASKS) == 12
    assert {m.leaderboard for t in TASKS.values() for m in t.metrics} == set(POINTS)
    assert len({m.name for t in TASKS.values() for m in t.metrics}) == len(POINTS)
    assert all(t.predictions and t.packages for t in TASKS.values())
    assert list(SWEEP) == sorted(SWEEP, reverse=True)


TOY = """
from pathlib import Path
from s3prl_speaker_upstreams.superb.layouts import Layout, audio
from s3prl_speaker_upstreams.superb.task import Metric, Task


class _Toy(Task):
    def layout(self, root):
        return Layout({"train": audio(root, ".wav")})

    def settings(self, data, prepared):
        return {"downstream_expert.datarc.root": str(data)}

    def prepare(self, data, out, s3prl_root):
        (out / "list.txt").write_text("a list")

    def demo(self, out, seed):
        from s3prl_speaker_upstreams.demo.corpora import generate

        generate("IC", out, scale=2, seed=seed)


TASK = _Toy(
    name="TOY", title="a task in one file", order=999, downstream="toy", corpus="anything with wav files", packages=(),
    metrics=(Metric("TOY acc", "acc", 100.0, True, "TOY_acc_public", (0.0, 100.0), {"FBANK": 10.0}),),
    predictions=(("test_predict.txt", "toy_public/predict.txt"),), smoke={"runner.total_steps": 4}, paper=False,
)
"""


def test_a_task_is_added_by_one_file(tmp_path, monkeypatch, fake_runner):
    """Found by listing the folder; checked, prepared, trained, chosen, scored and tabled without another line."""
    import importlib

    from s3prl_speaker_upstreams.superb import collect, configuration, reference, stages, tasks

    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(folder)])
    found = tasks.load_tasks()
    assert list(found)[:-1] == list(TASKS) and list(found)[-1] == "TOY"
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "TASKS", found)
        for module in (reference, collect, stages):
            importlib.reload(module)
        (tmp_path / "conf").mkdir()
        text = (configuration.CONF / "IC.yaml").read_text().replace("file_path: data/IC", "root: data/TOY")
        (tmp_path / "conf" / "TOY.yaml").write_text(text)
        fake_runner()
        run = stages.Run(found["TOY"], "fbank", tmp_path / "exp", conf=tmp_path / "conf", device="cpu", smoke=True)
        stages.run_stages(run)
        assert (run.prepared / "list.txt").is_file()
        collect.collect(tmp_path / "exp", tmp_path)
        table = (tmp_path / "superb.md").read_text()
        assert "| fbank | 25.00* |" in table and "| FBANK | 10.00 |" in table
        assert collect.pack(tmp_path / "exp", "fbank", tmp_path / "packed").is_file()
    for module in (reference, collect, stages):
        importlib.reload(module)


def test_stages_know_no_task_by_name():
    import ast

    package = Path(tasks_package.__file__).resolve().parents[1]
    names = set(TASKS)
    for file in package.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare | ast.Dict | ast.Subscript):
                used = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)}
                assert not names & {value for value in used if isinstance(value, str)}, f"{file}:{node.lineno}"


def test_a_module_that_is_no_task_is_named(tmp_path, monkeypatch):
    from s3prl_speaker_upstreams.superb import tasks

    (tmp_path / "nothing_at_all.py").write_text("X = 1\n")
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    with pytest.raises(TypeError, match="nothing_at_all: has no TASK"):
        tasks.load_tasks()


def test_task_names_ignore_case_and_wrong_ones_list_the_right(capsys):
    assert find_task("qBe").name == "QbE"
    with pytest.raises(UnknownTask, match=r"did you mean SID\? The tasks are PR, ASR"):
        find_task("SIDD")
    assert main(["run", "SLU", "fbank", "--smoke"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("UnknownTask") and "SF" in message and "Traceback" not in message


def test_missing_corpus_is_told_with_what_to_download(capsys, tmp_path):
    assert main(["run", "ER", "fbank", "--exp", str(tmp_path)]) == 1
    assert "IEMOCAP" in capsys.readouterr().err
    assert main(["run", "ER", "fbank", "--exp", str(tmp_path), "--data", str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_unknown_stage_and_bad_setting_are_refused(capsys, tmp_path):
    assert main(["run", "KS", "fbank", "--exp", str(tmp_path), "--smoke", "--stages", "sing"]) == 1
    assert "check, prepare, train, choose, evaluate, score" in capsys.readouterr().err
    assert main(["run", "KS", "fbank", "--exp", str(tmp_path), "--smoke", "--set", "runner.total_steps"]) == 1
    assert "KEY=VALUE" in capsys.readouterr().err


def test_scripts_explain_themselves_and_count_elements():
    for script in ("run.sh", "all.sh"):
        done = subprocess.run([RECIPE / script], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "recipes/superb/" in done.stderr
    env = {**os.environ, "COUNT": "1", "TASKS": "KS SID ER", "PYTHON": sys.executable}
    done = subprocess.run([RECIPE / "all.sh", "a", "b"], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "6"
    fine = {**env, "PART": "train", "SEEDS": "1 2"}
    done = subprocess.run(
        [RECIPE / "all.sh", "a", "b", "--", "--lr", "1e-3,1e-4"], capture_output=True, text=True, check=True, env=fine
    )
    assert done.stdout.strip() == str(2 * 2 * 2 * (1 + 1 + 5))  # upstreams, seeds, rates, folds of each task
    for wrong, message in (("6", "0 to 5"), ("-1", "expected a number from 0 on"), ("abc", "expected a number")):
        env = {**env, "COUNT": "", "ELEMENT": wrong}
        done = subprocess.run([RECIPE / "all.sh", "a", "b"], capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_superb_modules_start_without_torch_or_s3prl():
    code = (
        "import sys; import s3prl_speaker_upstreams.superb.__main__; "
        "sys.exit(bool({'torch', 's3prl', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "module",
    [
        *("demo.voxceleb", "demo.voices", "demo.corpora", "superb.tasks", "superb.checks", "superb.scoring"),
        *("superb.reference", "superb.elements", "superb.run", "superb.identity", "superb.configuration"),
        *("superb.task", "superb.work"),
    ],
)
def test_examples_of_docstrings_run(module):
    import doctest
    import importlib

    done = doctest.testmod(importlib.import_module(f"s3prl_speaker_upstreams.{module}"))
    assert done.attempted > 0 and done.failed == 0


@pytest.mark.parametrize("task", TASKS)
def test_the_extra_that_an_error_names_installs_what_the_task_needs(task):
    import configparser
    import re
    from importlib import metadata

    setup = RECIPE.parents[1] / "setup.cfg"
    if not setup.is_file():
        pytest.skip("not a source checkout")
    config = configparser.ConfigParser()
    config.read(setup)
    extras, spec = config["options.extras_require"], TASKS[task]
    for extra in (task.lower(), "superb"):
        lines = (extras[extra] + config["options"]["install_requires"]).split()
        try:
            lines += [line for line in metadata.requires("s3prl") or [] if "extra ==" not in line]
        except metadata.PackageNotFoundError:
            pytest.skip("s3prl is not installed")
        names = {re.split(r"[<>=!~;\[ ]", line, maxsplit=1)[0].lower().replace("_", "-") for line in lines}
        assert {package.pip.lower() for package in spec.packages} <= names
