"""Every example in a docstring of the two packages, and of the recipes' scripts, does what it says."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("s3prl_speaker_upstreams", "cka_addon")
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def _modules() -> list[str]:
    """Dotted names of the packages' modules, and paths of the recipes' scripts."""
    names = []
    for path in sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names + sorted(str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.py"))


def _import(name: str):
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = ROOT / name
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # as for a script, whose neighbours can be imported
    try:
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _with_examples() -> list[str]:
    found = []
    for name in _modules():
        path = ROOT / name if name.endswith(".py") else ROOT / Path(*name.split("."))
        source = path if path.suffix == ".py" else path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if ">>>" in source.read_text(encoding="utf-8"):
            found.append(name)
    return found


@pytest.mark.parametrize("name", _with_examples())
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(_import(name), optionflags=FLAGS)
    assert not failed, f"{failed} examples of {name} failed; their output stands above"
