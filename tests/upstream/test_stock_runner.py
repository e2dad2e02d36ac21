"""The stock ``python -m s3prl.run_downstream`` end to end: train, evaluate, resume, for SID and KS."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.compat]

CONF = Path(__file__).resolve().parents[2] / "recipes" / "superb" / "conf"


def stock(*arguments: str, cwd: Path) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "s3prl.run_downstream", *arguments, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three speakers, tones with noise, laid out as VoxCeleb1."""
    import numpy as np

    from s3prl_speaker_upstreams.demo.voxceleb import lay_out_voxceleb1

    draw = np.random.default_rng(0)
    time = np.arange(16000) / 16000

    def utterance(pitch: float) -> np.ndarray:
        tone = sum(np.sin(2 * np.pi * pitch * k * time + draw.uniform(0, 6)) / k for k in range(1, 9))
        return (0.1 * tone + 0.01 * draw.standard_normal(16000)).astype(np.float32)

    speech = {name: [utterance(pitch) for _ in range(10)] for name, pitch in (("a", 110), ("b", 170), ("c", 240))}
    return lay_out_voxceleb1(speech, tmp_path_factory.mktemp("corpus"))


def overrides(corpus, steps: int) -> str:
    return ",,".join(
        (
            f"config.downstream_expert.datarc.file_path='{corpus.root}'",
            f"config.downstream_expert.datarc.meta_data='{corpus.identification_list}'",
            "config.downstream_expert.datarc.num_workers=1",
            f"config.runner.total_steps={steps}",
            "config.runner.gradient_accumulate_steps=1",
            "config.runner.log_step=2",
            "config.runner.eval_step=2",
            "config.runner.save_step=2",
            "config.runner.max_keep=3",
        )
    )


def test_sid_trains_evaluates_and_resumes(untrained, corpus, tmp_path):
    sid = ["-u", "ecapa_tdnn_local", "-k", str(untrained), "-d", "voxceleb1", "-c", str(CONF / "SID.yaml")]
    stock("-m", "train", *sid, "-p", str(tmp_path / "exp"), "-o", overrides(corpus, 2), cwd=tmp_path)
    assert (tmp_path / "exp" / "states-2.ckpt").is_file()
    # the same command asks for more steps: resumed from the checkpoint, which holds upstream, data and settings
    stock("-m", "train", "-e", str(tmp_path / "exp"), "-o", "config.runner.total_steps=4", cwd=tmp_path)
    assert (tmp_path / "exp" / "states-4.ckpt").is_file()
    first = stock("-m", "evaluate", "-t", "test", "-e", str(tmp_path / "exp" / "states-4.ckpt"), cwd=tmp_path)
    again = stock("-m", "evaluate", "-t", "test", "-e", str(tmp_path / "exp" / "states-4.ckpt"), cwd=tmp_path)
    accuracy = re.findall(r"^test acc: ([0-9.]+)$", first, re.MULTILINE)
    assert accuracy and accuracy == re.findall(r"^test acc: ([0-9.]+)$", again, re.MULTILINE)
    predicted, true = (
        (tmp_path / "exp" / f"test_{which}.txt").read_text().split("\n") for which in ("predict", "truth")
    )
    assert len(true) == corpus.counts["test"] + 1  # and the line end of the last
    right = sum(a == b for a, b in zip(predicted, true, strict=True)) - 1
    assert float(accuracy[0]) == pytest.approx(right / corpus.counts["test"], abs=1e-3)


def test_sid_fine_tunes(untrained, corpus, tmp_path):
    sid = ["-u", "ecapa_dino_local", "-k", str(untrained), "-d", "voxceleb1", "-c", str(CONF / "SID.yaml"), "-f"]
    stock("-m", "train", *sid, "-p", str(tmp_path / "exp"), "-o", overrides(corpus, 2), cwd=tmp_path)
    assert (tmp_path / "exp" / "states-2.ckpt").stat().st_size > untrained.stat().st_size


def test_second_corpus_is_not_answered_from_the_first(untrained, corpus, tmp_path):
    """s3prl caches SID's path lists inside its package, keyed by split alone."""
    import numpy as np

    from s3prl_speaker_upstreams.demo.voxceleb import lay_out_voxceleb1

    noise = np.random.default_rng(1).uniform(-0.1, 0.1, (2, 4, 16000)).astype(np.float32)
    other = lay_out_voxceleb1({"x": list(noise[0]), "y": list(noise[1])}, tmp_path / "other")
    found = []
    for name, this in (("first", corpus), ("second", other)):
        out = stock(
            *("-m", "train", "-u", "fbank", "-d", "voxceleb1", "-c", str(CONF / "SID.yaml")),
            *("-p", str(tmp_path / name), "-o", overrides(this, 2)),
            cwd=tmp_path,
        )
        found.append(re.findall(r"there are (\d+) files found", out))
    assert found[0] == [str(corpus.counts[part]) for part in ("train", "dev", "test")]
    assert found[1] == [str(other.counts[part]) for part in ("train", "dev", "test")]
