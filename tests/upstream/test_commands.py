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


@pytest.fixture
def installed(monkeypatch):
    """Versions that doctor believes to be installed, beside the true ones."""
    from s3prl_speaker_upstreams import doctor

    versions: dict[str, str | None] = {}
    true = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions[name] if name in versions else true(name))
    return versions


def test_doctor_knows_espnets_fork(installed):
    """Both distributions install one module: the files of one are overwritten, which nobody else notices."""
    from s3prl_speaker_upstreams.doctor import Diagnosis, _examine_s3prl

    installed["espnet-s3prl"] = "2026.5.14"
    installed["s3prl"] = "0.4.18"
    both = Diagnosis()
    assert _examine_s3prl(both)
    assert "espnet-s3prl 2026.5.14, are both installed" in both.problems[0][0]
    assert "pip uninstall -y s3prl espnet-s3prl" in both.problems[0][1]
    installed["s3prl"] = None
    fork = Diagnosis()
    assert _examine_s3prl(fork) and not fork.problems
    assert "ESPnet's fork" in dict(fork.facts)["s3prl"]


def test_installing_the_package_does_not_install_s3prl_over_its_fork():
    import configparser
    from pathlib import Path

    config = configparser.ConfigParser()
    config.read(Path(__file__).resolve().parents[2] / "setup.cfg")
    assert "s3prl" not in config["options"]["install_requires"]
    assert config["options.extras_require"]["s3prl"].startswith("s3prl>=")


@pytest.mark.parametrize(
    ("torch", "torchaudio", "problem"),
    [
        ("2.15.0", "2.11.0+cu130", False),
        ("2.5.1", "2.11.0", True),
        ("2.8.0", "2.7.1", True),
        ("2.11.0", "2.11.0", False),
    ],
)
def test_doctor_tells_a_pair_that_works_from_one_that_does_not(installed, torch, torchaudio, problem):
    from s3prl_speaker_upstreams.doctor import Diagnosis, _examine_torch

    installed.update(torch=torch, torchaudio=torchaudio)
    found = Diagnosis()
    _examine_torch(found)
    assert bool(found.problems) == problem
