"""The recipes of pre-training: on a made archive with a stand-in for ffmpeg, and every line of them on toy speech."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "pretrain"

# Writes what it was given; fails for one file, and notes every call.
FFMPEG = """#!/usr/bin/env bash
while [ $# -gt 1 ]; do [ "$1" = -i ] && source=$2; shift; done
echo "$source" >>"$CALLS"
case $source in *broken*) exit 1 ;; esac
cat "$source" >"$1"
"""


@pytest.fixture
def machine(tmp_path):
    if shutil.which("unzip") is None:
        pytest.skip("unzip is not installed")
    bin_, data = tmp_path / "bin", tmp_path / "data"
    bin_.mkdir()
    (data / "downloads").mkdir(parents=True)
    (bin_ / "ffmpeg").write_text(FFMPEG)
    (bin_ / "ffmpeg").chmod(stat.S_IRWXU)
    env = {
        **os.environ,
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "DATA": str(data),
        "CALLS": str(tmp_path / "calls"),
        "JOBS": "3",
    }
    return data, env


def run(env, *stages, code=0):
    done = subprocess.run([RECIPES / "voxceleb_data.sh", *stages], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    return done.stderr


def archive(path, names):
    with zipfile.ZipFile(path, "w") as out:
        for name in names:
            out.writestr(name, f"audio of {name}")


NAMES = [f"dev/aac/id0001{s}/vid {v}/0000{u}.m4a" for s in range(3) for v in range(2) for u in range(4)]


def test_missing_archives_are_all_named(machine):
    text = run(machine[1], "check", code=1)
    assert all(name in text for name in ("vox2_dev_aac.zip", "vox1_dev_wav.zip", "musan.tar.gz", "rirs_noises.zip"))


def test_conversion_in_parallel_goes_on_where_it_was_stopped(machine):
    data, env = machine
    archive(data / "vox.zip", [*NAMES, "dev/aac/id00019/v/broken.m4a"])
    whole = (data / "vox.zip").read_bytes()
    for part, piece in (("a", whole[:400]), ("b", whole[400:])):  # the archive is given out in pieces
        (data / "downloads" / f"vox2_dev_aac_parta{part}").write_bytes(piece)
    archive(data / "downloads" / "vox1_dev_wav.zip", ["wav/id1/v/1.wav"])
    archive(data / "downloads" / "vox1_test_wav.zip", ["wav/id2/v/1.wav"])
    (data / "musan").mkdir()
    (data / "RIRS_NOISES").mkdir()
    run(env, "check", "unpack")
    assert (data / "voxceleb1" / "wav" / "id2" / "v" / "1.wav").exists()

    done = data / "vox2_dev" / "id00010" / "vid 0" / "00000.flac"  # converted before the stop
    done.parent.mkdir(parents=True)
    done.write_text("already there")
    text = run(env, "convert")
    assert "24 of 25 converted; 1 failed" in text and "broken.m4a" in (data / "vox2_failed.txt").read_text()
    assert done.read_text() == "already there"
    assert (
        data / "vox2_dev" / "id00012" / "vid 1" / "00003.flac"
    ).read_text() == "audio of dev/aac/id00012/vid 1/00003.m4a"
    assert not list((data / "vox2_dev").rglob("*.part"))
    calls = Path(env["CALLS"]).read_text().splitlines()
    assert len(calls) == len(set(calls)) == 24  # all but the one that was there

    run(env, "convert")
    assert len(Path(env["CALLS"]).read_text().splitlines()) == 25  # again only the broken one
    assert "unpacking" not in run(env, "unpack")


@pytest.mark.parametrize("name", ["voxceleb_data.sh", "voxceleb2_dino.sh", "voxceleb2_supervised.sh", "small.sh"])
def test_scripts_are_valid_and_refuse_unknown_stages(name, tmp_path):
    subprocess.run(["bash", "-n", RECIPES / name], check=True)
    done = subprocess.run([RECIPES / name, "trian"], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "unknown stage 'trian'" in done.stderr


# ---------------------------------------------------------------------------------------------- every line is run
def speech(path: Path, speaker: int, clip: int, seconds: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1000 * speaker + clip)
    time = np.arange(int(seconds * 16000)) / 16000
    tone = sum(np.sin(2 * np.pi * (150 + 90 * speaker) * k * time + rng.uniform(0, 6)) / k for k in (1, 2, 3))
    soundfile.write(path, 0.1 * tone + rng.normal(0, 0.02, len(time)), 16000)


@pytest.fixture(scope="module")
def voxceleb(tmp_path_factory) -> Path:
    """What voxceleb_data.sh leaves behind, of 4 + 3 speakers."""
    root = tmp_path_factory.mktemp("voxceleb")
    for speaker in range(4):
        for clip in range(3):
            speech(root / "vox2_dev" / f"id0001{speaker}" / "video" / f"0000{clip}.flac", speaker, clip)
    names = []
    for speaker in range(3):
        for clip in range(3):
            name = f"id1000{speaker}/video/0000{clip}.wav"
            speech(root / "voxceleb1" / "wav" / name, speaker + 4, clip)
            names.append(name)
    lines = [f"{int(a[:7] == b[:7])} {a} {b}" for k, a in enumerate(names) for b in names[k + 1 :]]
    for name in ("veri_test2", "list_test_all2", "list_test_hard2"):
        (root / "trials").mkdir(exist_ok=True)
        (root / "trials" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    for kind in ("noise", "music", "speech"):
        speech(root / "musan" / kind / "source" / "1.wav", 8, 0, 2.0)
    response = np.zeros(4000)
    response[[10, 900, 2000]] = [1, 0.4, 0.2]
    (root / "RIRS_NOISES" / "simulated_rirs").mkdir(parents=True)
    soundfile.write(root / "RIRS_NOISES" / "simulated_rirs" / "1.wav", response, 16000)
    return root


SMALL = (
    "model.ecapa.channels=16 model.ecapa.mfa_channels=24 model.ecapa.embedding_dim=8 model.ecapa.se_channels=4 "
    "model.ecapa.attention_channels=4 data.workers=0 data.min_seconds=0.5 run.threads=1 run.log_every=1 "
    "run.tensorboard=false"
)
DINO = (
    f"{SMALL} run.steps=4 run.batch=4 data.local_crops=1 data.global_seconds=0.6 data.local_seconds=0.4 "
    "dino.prototypes=32 dino.head_hidden=16 dino.bottleneck=8 dino.head_norm=false dino.collapse.action=warn"
)
AAM = f"{SMALL} run.steps=4 run.batch=4 data.seconds=0.6"


def recipe(name: str, stages: list[str], environment: dict[str, str], code: int = 0) -> str:
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([RECIPES / name, *stages], env=env, capture_output=True, text=True, timeout=540)
    assert done.returncode == code, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.e2e
@pytest.mark.parametrize("gpus", ["1", "2"])
def test_the_dino_recipe_runs_and_skips_what_is_made_from_the_same(voxceleb, tmp_path, gpus):
    out = tmp_path / "exp"
    env = {"DATA": str(voxceleb), "OUT": str(out), "GPUS": gpus, "EXTRA": DINO, "NUM_AVERAGE": "2", "DEVICE": "cpu"}
    env["EXTRA"] += " run.save_every=2steps"
    text = recipe("voxceleb2_dino.sh", ["train", "average", "evaluate", "export"], env)
    assert "4 speakers, most recordings: id00010 3" in text and "use it:" in text
    for name in "OEH":
        result = json.loads((out / f"vox1_{name}.json").read_text())
        assert result["n_trials"] == 36 and result["interval_by"] == "speakers, by name" and "asnorm_eer" in result
        assert result["trials"].endswith(".txt")
    assert (out / "last.safetensors").exists()
    if gpus == "2":
        return
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    recipe("voxceleb2_dino.sh", ["average", "evaluate"], env)  # nothing has changed
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items() if path.name == "average.safetensors")
    newest = sorted((out / "checkpoints").glob("step_*.pt"))[-1]
    newest.rename(newest.with_name("kept"))  # another set of checkpoints: another average
    recipe("voxceleb2_dino.sh", ["average"], {**env, "NUM_AVERAGE": "1"})
    assert (out / "average.safetensors").stat().st_mtime_ns != before[out / "average.safetensors"]


@pytest.mark.e2e
def test_the_supervised_recipe_runs(voxceleb, tmp_path):
    out = tmp_path / "exp"
    env = {"DATA": str(voxceleb), "OUT": str(out), "GPUS": "1", "EXTRA": AAM, "NUM_AVERAGE": "1", "DEVICE": "cpu"}
    stages = ["train", "average", "evaluate", "large_margin", "evaluate_large_margin", "export"]
    recipe("voxceleb2_supervised.sh", stages, env)
    fine = tmp_path / "exp-large-margin"
    assert json.loads((fine / "vox1_O.json").read_text())["n_trials"] == 36
    assert (fine / "last.safetensors").exists() and (fine / "average.safetensors").exists()
    recipe("voxceleb2_supervised.sh", ["trian"], env, code=1)


@pytest.mark.e2e
def test_the_small_recipe_runs_up_to_the_shipped_file(tmp_path):
    data = tmp_path / "speech"
    for clip in range(8):
        speech(data / "commands" / f"{clip}.wav", clip % 4, clip, 1.6)
    for number in range(2):
        speech(data / "noise" / f"{number}.wav", 9, number, 2.0)
        speech(data / "rirs" / f"{number}.wav", 9, number, 0.3)
    for speaker in range(2):
        for clip in range(100):
            speech(data / "digits" / f"s{speaker}" / f"{clip}.wav", speaker, clip, 1.0)
    changed = "run.steps=2 run.batch=2 data.feature_versions=1 data.global_seconds=1 data.local_seconds=0.5 "
    changed += "data.min_seconds=0.5 model.ecapa.channels=16 model.ecapa.mfa_channels=24 dino.prototypes=32"
    env = {"SPEECH": str(data), "OUT": str(tmp_path / "out"), "SEEDS": "3", "SET": changed}
    env["SHIP"] = str(tmp_path / "shipped.safetensors")
    text = recipe("small.sh", ["trim", "train", "evaluate", "ship"], env)
    assert "trained,clean,cosine" in text and "untrained,channel,wccn" in text
    results, model = tmp_path / "out" / "results", tmp_path / "out" / "seed3" / "model.safetensors"
    assert (tmp_path / "shipped.safetensors").exists() and (results / "curves.png").exists()
    made = [path.stat().st_mtime_ns for path in (model, results / "digits_summary.csv")]
    recipe("small.sh", ["train", "evaluate"], env)  # from the same speech and settings: skipped
    assert [path.stat().st_mtime_ns for path in (model, results / "digits_summary.csv")] == made
    text = recipe("small.sh", ["train"], {**env, "SET": changed + " optim.lr=0.5"}, code=1)
    assert "optim.lr: 0.001 before, 0.5 now" in text
