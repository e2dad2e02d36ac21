"""The wheel alone, installed elsewhere, does what the documentation says; wheel and sdist are fit to be published."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import s3prl_speaker_upstreams

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("packaging")]


def succeed(*line: object, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must end with 0; nothing of the checkout is on its path."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in line], cwd=cwd, env={**env, **environment}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, f"{' '.join(map(str, line))}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the wheel and the sdist, made from a copy of the files that git knows."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: which files belong to it cannot be told")
    for name in listed.stdout.split("\0"):
        if name and (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta as b; b.build_sdist(r'{0}'); b.build_wheel(r'{0}')"
    succeed(sys.executable, "-c", build.format(out), cwd=source)
    return out


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """``bin`` of an environment that holds the wheel; what it needs is that of this interpreter."""
    venv = tmp_path_factory.mktemp("elsewhere") / "venv"
    succeed(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    python = venv / "bin" / "python"
    line = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    succeed(*line, cwd=venv.parent)
    (packages,) = venv.glob("lib/python*/site-packages")
    # named in a .pth, a folder is searched, but its own .pth files (such as that of an editable install) are not run
    needed = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "zz_needed.pth").write_text("".join(f"{path}\n" for path in needed))
    return venv / "bin"


def test_twine_finds_nothing(built, tmp_path):
    pytest.importorskip("twine", reason="pip install twine")
    assert (
        succeed(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), cwd=tmp_path).count("PASSED") == 2
    )


def test_metadata_and_contents(built, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    for line in (
        "License-Expression: Apache-2.0|License: Apache-2.0",
        "Author: .+",
        "Project-URL: .+",
        "Classifier: .+",
    ):
        assert re.search(f"^({line})$", metadata, re.MULTILINE), line
    assert f"\nVersion: {s3prl_speaker_upstreams.__version__}\n" in metadata
    assert "# s3prl_speaker_upstreams" in metadata  # README is the long description
    wanted = ["s3prl_speaker_upstreams/py.typed", "cka_addon/py.typed", "s3prl_speaker_upstreams.pth"]
    wanted += [f"s3prl_speaker_upstreams/superb/conf/{task}.yaml" for task in ("KS", "SID", "ASV", "QbE")]
    assert not [name for name in wanted if name not in names]
    assert any(name.endswith("LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "recipes/"))]
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "setup.cfg", "setup.py", "pyproject.toml", *wanted[:2]} <= inside


def test_one_version_everywhere():
    citation = (ROOT / ".github" / "CITATION.cff").read_text()
    assert f"version: {s3prl_speaker_upstreams.__version__}\n" in citation
    assert "version = attr: s3prl_speaker_upstreams.__version__" in (ROOT / "setup.cfg").read_text()


HELPS = [
    "superb", "superb run", "superb collect", "superb pack", "pretrain", "evaluate", "weights", "weights list",
    "weights info", "weights fetch", "checkpoint", "checkpoint info", "checkpoint convert", "checkpoint init",
    "checkpoint export", "checkpoint average", "compat", "doctor", "demo", "demo corpus", "demo speech", "list", "info",
    "fetch", "convert", "init", "export", "average",
]  # fmt: skip


def test_help_of_every_command(installed, tmp_path):
    """All in one process each package: what counts here is that nothing is missing from the wheel."""
    script = """
import sys
from {module} import main
for line in {lines}:
    try:
        assert not main([*line.split(), "--help"]), line
    except SystemExit as error:
        assert not error.code, line
"""
    for module, lines in (
        ("s3prl_speaker_upstreams.cli", HELPS),
        ("cka_addon.cli", ["", "dump", "compute", "merge", "plot", "layer-weights", "report", "info", "verify"]),
    ):
        told = succeed(installed / "python", "-c", script.format(module=module, lines=lines), cwd=tmp_path)
        assert told.count("usage:") >= len(lines) - 1  # that of compat is its own text
    assert "s3prl-speaker" in succeed(installed / "s3prl-speaker", "--help", cwd=tmp_path)
    assert "cka-addon" in succeed(installed / "cka-addon", "--help", cwd=tmp_path)


def test_s3prl_finds_the_entries_of_the_installed_package(installed, tmp_path):
    script = (
        "import s3prl.hub, s3prl_speaker_upstreams as package\n"
        "assert hasattr(s3prl.hub, 'ecapa_dino_small')\nprint(package.__file__)"
    )
    assert succeed(installed / "python", "-c", script, cwd=tmp_path).strip().startswith(str(installed.parent))


def test_shipped_weights_and_provenance(installed, tmp_path):
    told = succeed(installed / "s3prl-speaker", "info", "ecapa_dino_small", cwd=tmp_path)
    assert str(installed.parent) in told and "provenance:" in told


def test_superb_has_its_settings(installed, tmp_path):
    """A whole task from a folder that is no checkout, by the old form of the command."""
    line = "-m s3prl_speaker_upstreams.superb run KS fbank --smoke --device cpu --exp exp".split()
    succeed(installed / "python", *line, cwd=tmp_path, OMP_NUM_THREADS="1")
    succeed(installed / "s3prl-speaker", "superb", "collect", "--exp", "exp", cwd=tmp_path)
    assert "fbank" in (tmp_path / "exp" / "tables" / "superb.md").read_text()


def test_cka_addon_has_its_page(installed, tmp_path):
    succeed(installed / "s3prl-speaker", "demo", "corpus", "--task", "KS", "--out", "ks", "--scale", "2", cwd=tmp_path)
    line = "-q compute -m fbank -m ecapa_dino_small -a ks --limit 4 --mode full -o c.json".split()
    succeed(installed / "cka-addon", *line, cwd=tmp_path, OMP_NUM_THREADS="1")
    succeed(installed / "cka-addon", "-q", "report", "c.json", "-o", "c.html", cwd=tmp_path)
    assert "<html" in (tmp_path / "c.html").read_text().lower()
