"""The command line end to end: killed with -9 and resumed, evaluated, exported, averaged, read back."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch

from s3prl_speaker_upstreams.checkpoints import load_encoder, read_checkpoint
from s3prl_speaker_upstreams.pretrain.checkpointing import CheckpointStore

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for speaker in range(8):
        (folder / f"s{speaker}").mkdir()
        filter_ = rng.normal(0, 1, 24) / 8
        for number in range(4):
            wav = np.convolve(rng.normal(0, 0.3, 18000), filter_, "same")
            soundfile.write(folder / f"s{speaker}" / f"{number}.wav", np.clip(wav, -1, 1), 16000)
    lines = [
        f"{int(a == b)} s{a}/{i}.wav s{b}/{j}.wav" for a in range(8) for b in range(8) for i, j in ((0, 1), (2, 3))
    ]
    (folder / "trials.txt").write_text("\n".join(lines) + "\n")
    return folder


ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments):
    return [sys.executable, "-m", "s3prl_speaker_upstreams.cli", *map(str, arguments)]


def run(*arguments, code=0):
    done = subprocess.run(command(*arguments), env=ENV, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def training(data, out, *settings):
    settings = ["run.threads=1", "data.workers=1", "run.steps=24", "run.save_every=3 steps", *settings]
    return ["pretrain", "--preset", "smoke", "--data", data, "--out", out, "--set", *settings]


def numbers(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("step_seconds", "waiting")} for r in rows]


def test_killed_again_and_again_the_numbers_are_those_of_an_uninterrupted_run(data, tmp_path):
    run(*training(data, tmp_path / "whole"))
    out = tmp_path / "killed"
    for after in (4, 11, 17):
        process = subprocess.Popen(
            command(*training(data, out)),
            env=ENV,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            log = out / "metrics.jsonl"
            if log.exists() and log.read_text().count("\n") >= after:
                break
            time.sleep(0.005)
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        steps = [CheckpointStore.step_of(p) for p in CheckpointStore(out / "checkpoints").paths()]
        assert steps and after - 4 <= steps[-1] < 24
    assert "continuing from" in run(*training(data, out)).stderr
    assert numbers(out) == numbers(tmp_path / "whole")  # bit for bit: losses, entropies, gradient norms of every step
    a, b = (CheckpointStore.load(tmp_path / n / "checkpoints" / "step_00000024.pt") for n in ("whole", "killed"))
    assert all(torch.equal(a["task"][k], b["task"][k]) for k in a["task"])
    for index, moments in a["optimizer"]["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(b["optimizer"]["state"][index][k]))
            for k, v in moments.items()
        )


def test_sigterm_stops_with_a_checkpoint(data, tmp_path):
    process = subprocess.Popen(
        command(*training(data, tmp_path, "run.save_every=1000 steps", "run.steps=2000")),
        env=ENV,
        stderr=subprocess.PIPE,
    )
    while not ((tmp_path / "metrics.jsonl").exists() and (tmp_path / "metrics.jsonl").read_text().count("\n") >= 3):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 143 and "asked to stop by SIGTERM" in text
    assert not (tmp_path / "model.safetensors").exists()
    assert CheckpointStore(tmp_path / "checkpoints").load_newest()[0]["step"] >= 3


def test_train_evaluate_export_average_and_load(data, tmp_path):
    out = tmp_path / "run"
    trained = run(*training(data, out, "eval.every=8 steps"), "--trials", data / "trials.txt", "--trials-root", data)
    assert "effective learning rate 0.001" in trained.stderr and "-u ecapa_dino_local -k" in trained.stderr
    eers = [r["eer"] for r in numbers(out) if "eer" in r]
    assert len(eers) == 3 and all(0 <= e <= 0.6 for e in eers)

    result = json.loads(run("evaluate", out, data / "trials.txt", "--out", tmp_path / "result.json").stdout)
    assert result["eer"] == pytest.approx(eers[-1], abs=1e-6)
    assert json.loads((tmp_path / "result.json").read_text())["eer"] == result["eer"]

    teacher = tmp_path / "teacher.safetensors"
    run("export", out, teacher)
    checkpoint = read_checkpoint(teacher)
    p = checkpoint.provenance
    assert checkpoint.role == "teacher" and p["step"] == 24 and p["configuration"]["dino"]["prototypes"] == 64
    assert p["training_data"]["utterances"] == 32 and p["metrics"]["eer"] == eers[-1] and p["git_revision"]
    exported = json.loads(run("evaluate", teacher, data / "trials.txt", "--root", data).stdout)
    assert exported["eer"] == pytest.approx(result["eer"], abs=1e-6)

    state = CheckpointStore.load(out / "checkpoints" / "step_00000024.pt")["task"]
    run("export", out, tmp_path / "student.safetensors", "--role", "student", "--which", "24")
    encoder = load_encoder(tmp_path / "student.safetensors")
    for key, value in encoder.ecapa.state_dict().items():
        assert torch.equal(value, state["student.encoder.ecapa." + key])

    run("export", out, tmp_path / "new.safetensors", "--calibrate-on", data, "--calibrate-batches", "2", "--fp16")
    new = read_checkpoint(tmp_path / "new.safetensors")
    assert "recalibrated on 2 batches" in new.provenance["norm_statistics"]
    assert not torch.allclose(new.state["block_1.norm.running_mean"], checkpoint.state["block_1.norm.running_mean"])

    run("average", out, tmp_path / "average.safetensors", "--last", "2")
    averaged, key = read_checkpoint(tmp_path / "average.safetensors"), "block_3.tdnn1.conv.weight"
    files = CheckpointStore(out / "checkpoints").paths()[-2:]
    parts = [CheckpointStore.load(f)["task"]["teacher.encoder.ecapa." + key] for f in files]
    torch.testing.assert_close(averaged.state[key], sum(parts) / 2)
    assert averaged.provenance["averaged"] == [f.name for f in files]


def test_errors_are_one_line_with_a_remedy(data, tmp_path):
    for arguments, words in (
        (["pretrain", "--preset", "smoke", "--out", tmp_path / "a"], "--data"),
        (["pretrain", "--preset", "smoke", "--data", data], "--out"),
        (["pretrain", "--preset", "smoke", "--data", tmp_path / "nowhere", "--out", tmp_path / "a"], "nowhere"),
        (["pretrain", "--preset", "smoke", "--set", "optim.learning=1", "--show"], "optim.learning"),
        (["export", tmp_path, tmp_path / "x.safetensors"], "checkpoints"),
    ):
        error = run(*arguments, code=1).stderr
        assert words in error and "Traceback" not in error


def test_show_prints_a_configuration_that_can_be_used(tmp_path):
    text = run("pretrain", "--preset", "voxceleb2_dino", "--set", "run.batch=32", "--show").stdout
    (tmp_path / "mine.yaml").write_text(text)
    again = run("pretrain", "--config", tmp_path / "mine.yaml", "--show").stdout
    assert again == text and "prototypes: 65536" in text and "batch: 32" in text
