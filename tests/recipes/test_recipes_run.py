"""Recipes are run on toy data, with the commands that they really call.

Those of pre-training are run by ``tests/pretrain``, the quickstart by ``tests/demo``, the CKA recipe by ``tests/cka``,
each task of ``superb/run.sh`` by ``tests/superb``, the commands of README and the pages by ``test_pages.py``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import soundfile

ROOT = Path(__file__).resolve().parents[2]

SCRIPTS = [path for path in sorted((ROOT / "recipes").rglob("*.sh")) if os.access(path, os.X_OK)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_help_needs_nothing(script, tmp_path):
    """What a recipe reads and writes can be asked without an environment, from any folder."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    told = subprocess.run([script, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0 and len(told.stdout.splitlines()) >= 4, told.stderr
    assert not told.stderr and "#!" not in told.stdout and "set -euo" not in told.stdout
    assert not list(tmp_path.iterdir())


def test_yaml_files_of_the_recipes_are_those_of_the_package():
    names = {path.name for path in (ROOT / "recipes" / "superb" / "conf").glob("*.yaml")}
    assert len(names) == 12 and names == {p.name for p in (ROOT / "s3prl_speaker_upstreams/superb/conf").glob("*.yaml")}


def test_voxceleb_from_the_archives_to_the_trial_lists(recipe, voxceleb):
    """All default stages, with archives as they are given out; decoding by soundfile in place of ffmpeg."""
    for tool in ("unzip", "curl", "tar"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    assert "16 of 16 converted; 0 failed" in recipe("pretrain/voxceleb_data.sh", **voxceleb)
    data = Path(voxceleb["DATA"])
    flac = sorted((data / "vox2_dev").rglob("*.flac"))
    assert [path.relative_to(data / "vox2_dev").parts[0] for path in flac[::4]] == [f"id0000{i}" for i in range(4)]
    assert soundfile.info(flac[0]).frames == 52800
    for line in (data / "trials" / "veri_test2.txt").read_text().splitlines():
        assert all((data / "voxceleb1" / "wav" / name).is_file() for name in line.split()[1:])
    assert (data / "musan" / "noise" / "a" / "noise.wav").is_file()
    assert len(list((data / "RIRS_NOISES").rglob("*.wav"))) == 2
    again = recipe("pretrain/voxceleb_data.sh", **voxceleb)
    assert "unpacking" not in again and "downloading" not in again


@pytest.mark.e2e
def test_accuracy_on_real_speech(recipe, toy_speech, tmp_path):
    settings = {"SPEECH": toy_speech, "EXP": tmp_path / "exp", "UPDATES": 4, "RATES": "1e-2", "LIMIT": 12}
    recipe("superb/accuracy.sh", "fbank", **settings)
    table = (tmp_path / "exp" / "tables" / "superb.md").read_text()
    assert "fbank" in table and "SID" in table and "KS" in table


@pytest.mark.e2e
def test_all_tasks_of_a_list_and_one_element_of_an_array(recipe, tmp_path):
    settings = {"TASKS": "KS SID", "EXP": tmp_path / "exp"}
    assert recipe("superb/all.sh", "fbank", "--", "--smoke", **settings, COUNT=1).split()[-1] == "2"
    recipe("superb/all.sh", "fbank", "--", "--smoke", "--device", "cpu", **settings, ELEMENT=1)
    assert "SID" in (tmp_path / "exp" / "tables" / "superb.md").read_text()
