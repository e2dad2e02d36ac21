"""The command ``s3prl-speaker`` and its doctor."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.compat


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    line = [sys.executable, "-m", "s3prl_speaker_upstreams", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=env, timeout=300)


def test_doctor_finds_a_healthy_environment_healthy():
    done = command("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("s3prl ", "torchaudio", "start-up hook", "active", "ecapa_dino_local", "No problems found"):
        assert expected in done.stdout


def test_doctor_says_what_to_do_when_the_hook_is_off():
    done = command("doctor", S3PRL_SPEAKER_UPSTREAMS="0")
    assert done.returncode == 1
    assert "PROBLEM  the start-up hook is switched off" in done.stdout
    assert "unset S3PRL_SPEAKER_UPSTREAMS" in done.stdout
    # on the legacy stack s3prl imports without us, on the current one it does not
    assert "s3prl.hub has none of our entries" in done.stdout or "need the stand-ins" in done.stdout


def test_help_names_every_command():
    done = command("--help")
    assert done.returncode == 0
    for verb in ("doctor", "list", "info", "fetch", "convert", "init", "pretrain", "evaluate", "export", "average"):
        assert f"\n    {verb} " in done.stdout, verb


def test_wrong_usage_and_errors_have_their_exit_status(tmp_path):
    assert command("no_such_command").returncode == 2
    failed = command("info", str(tmp_path / "nowhere.pt"))
    assert failed.returncode == 1 and "Traceback" not in failed.stderr and "nowhere.pt" in failed.stderr


def test_untrained_checkpoint_says_so(tmp_path):
    made = command("init", str(tmp_path / "u.safetensors"), "--channels", "16", "--seed", "5")
    assert made.returncode == 0 and "UNTRAINED" in made.stderr
    told = command("info", str(tmp_path / "u.safetensors"))
    assert "role: untrained" in told.stdout and "random weights, seed 5" in told.stdout
