"""Every command and every example of README and of the pages by topic is run, in a folder with what they name.

A block marked ``bash`` is run line by line, one marked ``python`` as a whole; blocks without a mark are not commands,
and one that begins with a file's name in a comment is that file.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.e2e]
PARTS = ("recipes", "s3prl_speaker_upstreams", "cka_addon")
PAGES = ("README.md", *sorted(str(p.relative_to(ROOT)) for part in PARTS for p in (ROOT / part).rglob("README.md")))

# Lines that are not run here, and who runs them.
ELSEWHERE = {
    r"pip install|apt-get": "the packaging test installs the wheel",
    r"env/setup\.sh": "continuous integration begins with it",
    r"quickstart\.sh": "tests/demo runs it to its end",
    r"recipes/test\.sh|\.ci/run": "runs this test",
    r"/corpora|SLURM|--speech FOLDER": "tests/superb and test_recipes_run.py run the same command on toy corpora",
    r"run_downstream\.py": "tests/upstream and tests/superb run s3prl's runner with each kind of entry",
}
# The same command, shorter.
SHORTER = {"--preset small_dino": "--preset smoke"}


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of a page's marked blocks, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```(bash|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def lines(block: str) -> list[str]:
    """Commands of a block: continued lines joined, comments left out."""
    joined = re.sub(r"\\\n\s*", " ", block)
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in joined.splitlines()) if line]


@pytest.fixture
def world(tmp_path, toy) -> Path:
    """Recordings, noise, trials, an untrained checkpoint, the recipes, and the two commands of this interpreter."""
    for speaker in range(6):
        for take in range(3):
            toy.write(tmp_path / "speech" / f"speaker{speaker}" / f"{take}.wav", toy.voice(speaker, take, 1.5))
            toy.write(tmp_path / "cohort" / f"other{speaker}" / f"{take}.wav", toy.voice(10 + speaker, take, 1.5))
        toy.write(tmp_path / "wavs" / f"{speaker}.wav", toy.voice(20 + speaker, 0, 1.5))
    for i in range(2):
        toy.write(tmp_path / "noise" / f"{i}.wav", toy.noise(i, 4))
        toy.write(tmp_path / "rirs" / f"{i}.wav", toy.room(i))
    names = [f"speaker{speaker}/{take}.wav" for speaker in range(3) for take in range(2)]
    trials = [f"{int(a[:8] == b[:8])} {a} {b}\n" for i, a in enumerate(names) for b in names[i + 1 :]]
    (tmp_path / "trials.txt").write_text("".join(trials))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for command, module in (
        ("s3prl-speaker", "-m s3prl_speaker_upstreams"),
        ("cka-addon", "-m cka_addon"),
        ("python", ""),
    ):
        (bin_ / command).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (bin_ / command).chmod(stat.S_IRWXU)
    run(tmp_path, "s3prl-speaker checkpoint init untrained.safetensors --channels 16")
    (tmp_path / "model").mkdir()  # a checkpoint of another project
    shutil.copy(ROOT / "tests/checkpoints/data/speechbrain.ckpt", tmp_path / "model" / "embedding_model.ckpt")
    shutil.copy(tmp_path / "untrained.safetensors", tmp_path / "converted.safetensors")
    return tmp_path


def run(world: Path, command: str, script: str | None = None) -> str:
    env = {
        **os.environ,
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{world / 'bin'}:{os.environ['PATH']}",
    }
    line = ["bash", "-euo", "pipefail", "-c", command]
    done = subprocess.run(line, cwd=world, env=env, input=script, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_examples_of_a_page(page, world):
    for language, block in blocks(page):
        if language == "python" and re.match(r"# [\w/]+\.py\n", block):
            continue
        if language == "python":
            shown = run(world, "python -", block)
            for wanted in re.findall(r"^# (\[.*)$", block, re.MULTILINE):  # the output that the page shows
                assert wanted in shown
            continue
        for line in lines(block):
            script = re.search(r"\brecipes/[\w./-]+\.(sh|py)\b", line)
            assert not script or (ROOT / script[0]).is_file(), f"{page}: no {script[0]}"
            if any(re.search(pattern, line) for pattern in ELSEWHERE):
                continue
            for long, short in SHORTER.items():
                line = line.replace(long, short)
            run(world, line)


def test_no_page_names_a_folder_or_host_that_only_its_authors_have():
    for page in [*map(ROOT.joinpath, PAGES), *ROOT.glob(".github/*.md")]:
        assert "shared/" not in page.read_text(encoding="utf-8"), page
    for script in sorted((ROOT / "recipes").rglob("*.sh")):
        assert "../shared" not in script.read_text(encoding="utf-8"), script


def test_readme_is_short_and_its_links_lead_somewhere():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    for page in map(ROOT.joinpath, PAGES):
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page}: {target}"
