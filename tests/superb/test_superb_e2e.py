"""All twelve tasks through the stock ``s3prl.run_downstream``: train, evaluate, resume, evaluate again.

Every task is run once by the real command; the whole cycle, and further upstreams, share one process each (importing
s3prl takes seconds). Runs on both package stacks; what a stack lacks comes from ``compat``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from s3prl_speaker_upstreams.demo import corpora
from s3prl_speaker_upstreams.superb import scoring
from s3prl_speaker_upstreams.superb.configuration import CONF
from s3prl_speaker_upstreams.superb.prepare import prepare
from s3prl_speaker_upstreams.superb.task import Task
from s3prl_speaker_upstreams.superb.tasks import TASKS

torch = pytest.importorskip("torch")
pytest.importorskip("s3prl", reason="s3prl is not installed")

pytestmark = [pytest.mark.e2e, pytest.mark.compat]

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "superb"
DRIVER = Path(__file__).with_name("stock_driver.py")
# (upstream, tasks): what the weighted sum, the frame rate and the layer count can break differs between families
MORE = {
    "ecapa_tdnn_local": ("SID", "PR", "SD", "QbE", "SE"),
    "ecapa_dino_local": ("ASV", "ASR", "ER"),
    "wavlm_local": ("KS", "SF", "SS"),
    "fusion": ("SID", "PR", "SD"),
}
if os.environ.get("SUPERB_E2E_ALL"):  # every upstream through every task
    MORE = dict.fromkeys(MORE, tuple(TASKS))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Task -> (root of a generated corpus, its prepared files)."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(task: str) -> tuple[Path, Path]:
        if task not in made:
            folder = tmp_path_factory.mktemp(f"corpus-{task}")
            root = corpora.generate(task, folder / "data", scale=2)
            made[task] = root, prepare(TASKS[task], root, folder / "prepared")
        return made[task]

    return get


def _override(task: Task, paths: tuple[Path, Path], updates: int) -> str:
    values = {**task.smoke, **task.settings(*paths), task.workers: 0}
    if task.trained:
        values |= {f"runner.{key}": 2 for key in ("eval_step", "save_step", "log_step")}
        values["runner.total_steps"] = updates
    return ",,".join(f"config.{key}={value!r}" for key, value in values.items())


def _new(task: Task, upstream: list[str], expdir: Path, override: str) -> list[str]:
    return [
        *("-u", *upstream, "-d", task.downstream, "-c", str(CONF / f"{task.name}.yaml")),
        *("-p", str(expdir), "--device", "cpu", "-o", override),
    ]


def _cycle(name: str, upstream: list[str], expdir: Path, paths: tuple[Path, Path], layers: int = 1) -> list[dict]:
    task = TASKS[name]
    tag = f"{upstream[0]}-{name}"
    if not task.trained:
        chosen = ["-l", str(layers - 1)] if layers > 1 else []
        return [
            {"id": f"{tag}-{split}",
             "argv": ["-m", "evaluate", "-t", split, *chosen,
                      *_new(task, upstream, expdir / split, _override(task, paths, 0))]}
            for split in ("dev", "test")
        ]  # fmt: skip
    workers = f"config.{task.workers}=0"
    keep = f"{_override(task, paths, 2)},,config.runner.max_keep=5"
    evaluate = ["-m", "evaluate", "-t", task.test_split, "--device", "cpu", "-o", workers]
    return [
        {"id": f"{tag}-train", "argv": ["-m", "train", *_new(task, upstream, expdir, keep)]},
        {"id": f"{tag}-evaluate", "argv": [*evaluate, "-e", str(expdir / "states-2.ckpt")]},
        {"id": f"{tag}-resume",
         "argv": ["-m", "train", "-e", str(expdir), "--device", "cpu",
                  "-o", f"{workers},,config.runner.total_steps=4"]},
        {"id": f"{tag}-again", "argv": [*evaluate, "-e", str(expdir / "states-4.ckpt")]},
    ]  # fmt: skip


def _run_plan(plan: list[dict], folder: Path) -> dict[str, dict]:
    (folder / "plan.json").write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(folder / "plan.json"), str(folder / "report.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    if not (folder / "report.json").is_file():
        pytest.fail(f"the stock runner did not start:\n{done.stderr[-3000:]}")
    return json.loads((folder / "report.json").read_text())


def _load(path: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _metric(task: Task, expdir: Path, printed: str, root: Path) -> float:
    """The task's first number, from wherever it is to be had."""
    if task.name == "SD":
        return scoring.score_diarization(expdir, root / "test" / "rttm")["DER"]
    if task.name in ("SE", "SS"):
        return float(dict(row.split() for row in (expdir / "test_metrics.txt").open())[task.metrics[0].key])
    key = "sv-voxceleb1/test-EER" if task.name == "ASV" else f"{task.test_split} {task.metrics[0].key}"
    found = re.findall(rf"^{re.escape(key)}: (\S+)\s*$", printed, re.MULTILINE)
    assert found, f"no {key!r} in:\n{printed[-2000:]}"
    return float(found[-1])


def _check_cycle(name: str, upstream: str, expdir: Path, report: dict[str, dict], root: Path, layers: int) -> None:
    task = TASKS[name]
    for step in ("dev", "test") if not task.trained else ("train", "evaluate", "resume", "again"):
        entry = report.get(f"{upstream}-{name}-{step}", {"ok": False, "output": "was not run"})
        assert entry["ok"], f"{upstream} {name} {step}:\n{entry['output'][-3000:]}"
    if not task.trained:
        for split, part in (("dev", "dev"), ("test", "eval")):
            truth = root / "scoring" / f"groundtruth_quesst14_{part}"
            found = scoring.score_quesst(expdir / split / "benchmark.stdlist.xml", truth)
            # what s3prl does not search is missed: it can only lower the value
            assert 0 <= found["MTWV"] <= found["MTWV_searched"] <= 1
        return
    before, after = _load(expdir / "states-2.ckpt"), _load(expdir / "states-4.ckpt")
    assert (before["Step"], after["Step"]) == (2, 4)
    assert before["Downstream"].keys() == after["Downstream"].keys()
    moved = [
        k for k, v in after["Downstream"].items() if k != "best_score" and not torch.equal(v, before["Downstream"][k])
    ]
    assert moved, "resuming trained nothing"
    assert all(torch.isfinite(value).all() for value in after["Downstream"].values() if value.is_floating_point())
    if layers > 1:
        assert after["Featurizer"]["weights"].shape == (layers,)
        assert after["Featurizer"]["weights"].abs().max() > 0  # the gradient reaches the layer weights
    for step in ("evaluate", "again"):
        assert math.isfinite(_metric(task, expdir, report[f"{upstream}-{name}-{step}"]["output"], root))


# ---------------------------------------------------------------------------------------------- the real command


@pytest.mark.xdist_group("superb-commands")
@pytest.mark.parametrize("name", ["KS", "PR", "QbE", "SS"])  # all twelve: test_superb_two_probes.py
def test_stock_command_runs_with_our_yaml(name, corpus, tmp_path):
    task = TASKS[name]
    mode = ["-m", "train"] if task.trained else ["-m", "evaluate", "-t", "dev"]
    arguments = [*mode, *_new(task, ["fbank"], tmp_path / "exp", _override(task, corpus(name), 2))]
    command = [sys.executable, "-m", "s3prl.run_downstream", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    if task.trained:
        assert _load(tmp_path / "exp" / "states-2.ckpt")["Step"] == 2
    else:
        assert (tmp_path / "exp" / "benchmark.stdlist.xml").stat().st_size > 500


# ---------------------------------------------------------------------------------------------- whole cycles


@pytest.fixture(scope="module")
def fbank(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fbank")
    plan = [step for name in TASKS for step in _cycle(name, ["fbank"], folder / name, corpus(name))]
    return folder, _run_plan(plan, folder)


@pytest.mark.xdist_group("superb-fbank")
@pytest.mark.parametrize("name", TASKS)
def test_fbank_trains_evaluates_resumes_and_evaluates_again(name, fbank, corpus):
    folder, report = fbank
    _check_cycle(name, "fbank", folder / name, report, corpus(name)[0], layers=1)


def small_wavlm(path: Path) -> Path:
    """A two-layer WavLM in the real checkpoint format ({"cfg", "model"}), with random weights."""
    from s3prl.upstream.wavlm.WavLM import WavLM, WavLMConfig

    config = {
        "extractor_mode": "default",
        "encoder_layers": 2,
        "encoder_embed_dim": 128,
        "encoder_ffn_embed_dim": 64,
        "encoder_attention_heads": 4,
        "conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
        "relative_position_embedding": True,
        "num_buckets": 32,
        "max_distance": 80,
        "gru_rel_pos": True,
        "conv_pos": 16,
        "conv_pos_groups": 4,
        "normalize": False,
    }
    torch.manual_seed(0)
    torch.save({"cfg": config, "model": WavLM(WavLMConfig(config)).state_dict()}, path)
    return path


_WAVLM = (
    "import sys, importlib.util as u; from pathlib import Path; s = u.spec_from_file_location('e2e', sys.argv[1]); \
m = u.module_from_spec(s); s.loader.exec_module(m); m.small_wavlm(Path(sys.argv[2]))"
)


@pytest.fixture(scope="module")
def others(corpus, tmp_path_factory):
    from s3prl_speaker_upstreams.checkpoints import save_native, untrained

    folder = tmp_path_factory.mktemp("others")
    # 128 channels, not fewer: ASR's and SF's SpecAug masks up to four bands of 50 features, and would mask them all
    small = {"channels": 128, "mfa_channels": 48, "se_channels": 8, "attention_channels": 8, "embedding_dim": 12}
    checkpoints = {
        "ecapa_tdnn_local": save_native(untrained("speechbrain", **small), folder / "tdnn.safetensors"),
        "ecapa_dino_local": save_native(untrained("rdino", seed=1, **small), folder / "dino.safetensors"),
    }
    # in a process of its own: importing s3prl changes the interpreter
    subprocess.run([sys.executable, "-c", _WAVLM, __file__, str(folder / "wavlm.pt")], check=True, capture_output=True)
    checkpoints["wavlm_local"] = folder / "wavlm.pt"
    checkpoints["fusion"] = folder / "fusion.yaml"
    members = [{"upstream": name, "ckpt": checkpoints[name].name} for name in ("wavlm_local", "ecapa_tdnn_local")]
    checkpoints["fusion"].write_text(json.dumps({"members": members}))
    layers = {"ecapa_tdnn_local": 4, "ecapa_dino_local": 4, "wavlm_local": 3, "fusion": 7}
    plan = [
        step
        for upstream, tasks in MORE.items()
        for name in tasks
        for step in _cycle(
            name,
            [upstream, "-k", str(checkpoints[upstream])],
            folder / upstream / name,
            corpus(name),
            layers[upstream],
        )
    ]
    return folder, _run_plan(plan, folder), layers


@pytest.mark.xdist_group("superb-others")
@pytest.mark.parametrize(("upstream", "name"), [(u, name) for u, tasks in MORE.items() for name in tasks])
def test_other_upstreams_go_through_the_same_cycle(upstream, name, others, corpus):
    folder, report, layers = others
    _check_cycle(name, upstream, folder / upstream / name, report, corpus(name)[0], layers[upstream])


# ---------------------------------------------------------------------------------------------- the recipe


@pytest.mark.xdist_group("superb-recipe")
def test_recipe_runs_from_check_to_table_and_survives_a_full_disk(tmp_path):
    """run.sh --smoke; the first attempt meets a full disk while it saves, the second goes on."""
    environment = {**os.environ, "EXP": str(tmp_path / "exp"), "PYTHON": sys.executable}
    command = [str(RECIPE / "run.sh"), "IC", "fbank", "--smoke", "--device", "cpu", "--set", "runner.max_keep=3"]
    expdir = tmp_path / "exp" / "fbank" / "IC" / "lr1e-04"
    expdir.mkdir(parents=True)
    full = Path("/dev/full").exists()
    if full:
        (expdir / "states-4.ckpt").symlink_to("/dev/full")  # every byte written there: no space left on device
        first = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
        assert first.returncode == 1 and "NoSpaceLeft" in first.stderr, first.stderr[-3000:]
        assert "Traceback" not in first.stderr.split("NoSpaceLeft")[0]
        assert _load(expdir / "states-2.ckpt")["Step"] == 2  # finished work stays
        (expdir / "states-4.ckpt").unlink(missing_ok=True)
    del environment["EXP"]  # the folder as an option is the same folder, for the runs and for the table
    command += ["--exp", str(tmp_path / "exp")]
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert second.returncode == 0, second.stderr[-3000:]
    assert ("going on from update 2 of 4" in second.stderr) == full
    result = json.loads((expdir.parent / "result.json").read_text())
    predicted, true = (next(expdir.rglob(f"test_{which}.csv")).read_text().split() for which in ("predict", "truth"))
    right = sum(a == b for a, b in zip(predicted, true, strict=True))
    assert true and result["metrics"]["IC acc"] == pytest.approx(100 * right / len(true), abs=0.01)
    assert "| fbank |" in (tmp_path / "exp" / "tables" / "superb.md").read_text()
