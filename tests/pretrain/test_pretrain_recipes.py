"""The VoxCeleb recipe on a made archive and a stand-in for ffmpeg: parallel, resumable, whole files only."""

import os
import shutil
import stat
import subprocess
import zipfile
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", ["voxceleb2_dino", "voxceleb2_supervised"])
def test_recipes_call_commands_with_arguments_that_exist(name, tmp_path):
    """Every command line is parsed by the real parser: a stand-in for python and s3prl-speaker only parses."""
    import sys

    bin_ = tmp_path / "bin"
    bin_.mkdir()
    parse = (
        f"#!{sys.executable}\nimport sys\nsys.argv[1:3] = [] if sys.argv[1] == '-m' else sys.argv[1:3]\n"
        "from s3prl_speaker_upstreams.cli import _parser\nfrom s3prl_speaker_upstreams.pretrain.config import load\n"
        "args = _parser().parse_args(sys.argv[1:])\n"
        "if args.command == 'pretrain': print(load(args.preset, overrides=args.set).run.epochs)\n"
        f"open({str(tmp_path / 'commands')!r}, 'a').write(args.command + '\\n')\n"
    )
    (bin_ / "python").write_text(parse)
    (bin_ / "python").chmod(stat.S_IRWXU)
    out = tmp_path / "exp"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "step_00000005.pt").touch()
    env = {**os.environ, "PYTHON": str(bin_ / "python"), "GPUS": "1", "OUT": str(out), "DATA": str(tmp_path)}
    stages = ["train", "average", "evaluate"]
    stages += ["large_margin", "evaluate_large_margin", "export"] if name.endswith("supervised") else ["export"]
    done = subprocess.run([RECIPES / f"{name}.sh", *stages], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = (tmp_path / "commands").read_text().split()
    once = ["pretrain", "average", "evaluate", "evaluate", "evaluate"]
    assert seen == (once * 2 if name.endswith("supervised") else once) + ["export"]
