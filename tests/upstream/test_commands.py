"""The command ``s3prl-speaker`` and its doctor."""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys

import pytest

from s3prl_speaker_upstreams import cli

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


def test_help_names_every_command_and_imports_nothing_heavy():
    """Help at once: below half a second, of which the interpreter's start is most."""
    script = (
        "import sys\nfrom s3prl_speaker_upstreams.cli import main\n"
        "try:\n    main(['--help'])\n"
        "finally:\n    print(sorted({'torch', 'numpy', 'scipy', 'yaml'} & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    assert done.returncode == 0 and done.stdout.rstrip().endswith("[]"), done.stdout + done.stderr
    for name in ("superb", "pretrain", "evaluate", "weights", "checkpoint", "compat", "doctor", "demo"):
        assert re.search(rf"^    {name}\b", done.stdout, re.MULTILINE), name


VERBS = {
    "weights": ("list", "info", "fetch"),
    "checkpoint": ("info", "convert", "init", "export", "average"),
    "superb": ("run", "collect", "pack", "tasks"),
    "demo": ("corpus", "speech", "summary"),
}


@pytest.mark.parametrize(("group", "verbs"), VERBS.items())
def test_groups_have_their_verbs(group, verbs):
    told = command(group, "--help")
    assert told.returncode == 0 and all(verb in told.stdout for verb in verbs)


def parsed(*arguments: str) -> argparse.Namespace:
    return cli._parser(arguments[0]).parse_args(arguments)


@pytest.mark.parametrize(
    ("new", "old"),
    [
        (["weights", "fetch", "ecapa_dino", "--refresh"], ["fetch", "ecapa_dino", "--refresh"]),
        (["weights", "list", "--json"], ["list", "--json"]),
        (["checkpoint", "info", "x.pt"], ["info", "x.pt"]),
        (["weights", "info", "x.pt"], ["info", "x.pt"]),
        (["checkpoint", "convert", "a", "b", "--fp16"], ["convert", "a", "b", "--fp16"]),
        (["checkpoint", "init", "b", "--seed", "3"], ["init", "b", "--seed", "3"]),
        (["checkpoint", "export", "run", "b"], ["export", "run", "b"]),
        (["checkpoint", "average", "r1", "r2", "b"], ["average", "r1", "r2", "b"]),
    ],
)
def test_verbs_that_stood_alone_are_the_same_in_their_group(new, old):
    one, other = vars(parsed(*new)), vars(parsed(*old))
    assert one.pop("command") == new[0] and one.pop("verb") == new[1] and other.pop("command") == old[0]
    assert one == other and callable(one["func"])


def test_commands_with_options_of_their_own_get_all_that_follows(capsys):
    assert cli.main(["superb", "tasks"]) == 0
    assert "SID" in capsys.readouterr().out.split()
    assert cli.main(["-q", "compat"]) == 0
    assert "torchaudio" in capsys.readouterr().out


def test_wrong_usage_and_errors_have_their_exit_status(tmp_path):
    assert command("no_such_command").returncode == 2
    failed = command("info", str(tmp_path / "nowhere.pt"))
    assert failed.returncode == 1 and "Traceback" not in failed.stderr and "nowhere.pt" in failed.stderr


def test_untrained_checkpoint_says_so(tmp_path):
    made = command("init", str(tmp_path / "u.safetensors"), "--channels", "16", "--seed", "5")
    assert made.returncode == 0 and "UNTRAINED" in made.stderr
    told = command("info", str(tmp_path / "u.safetensors"))
    assert "role: untrained" in told.stdout and "random weights, seed 5" in told.stdout
