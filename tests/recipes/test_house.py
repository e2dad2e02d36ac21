"""No import circles, and the counters that say so count right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def house():
    sys.path.insert(0, str(ROOT / "recipes" / "benchmark"))
    try:
        import house
    finally:
        sys.path.pop(0)
    return house


def test_no_circles_when_modules_are_imported(house):
    graph = house.imports(ROOT)
    assert len(graph) > 50
    assert house.circles({module: found["top"] for module, found in graph.items()}) == []


def test_no_circles_through_imports_inside_functions(house):
    graph = house.imports(ROOT)
    assert house.circles({module: found["any"] for module, found in graph.items()}) == []


def test_imports_of_all_spellings_are_seen(house, tmp_path):
    package = tmp_path / "cka_addon"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "sub" / "__init__.py").write_text("from .. import a\n")
    (package / "a.py").write_text("def f():\n    from .sub.b import g\n")
    (package / "sub" / "b.py").write_text(
        "import cka_addon.a\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..c import x\n"
    )
    (package / "c.py").write_text("from . import a, sub\n")
    (tmp_path / "s3prl_speaker_upstreams").mkdir()
    graph = house.imports(tmp_path)
    assert graph["cka_addon.sub"]["top"] == {"cka_addon.a"}
    assert graph["cka_addon.a"] == {"top": set(), "any": {"cka_addon.sub.b"}}
    assert graph["cka_addon.sub.b"]["any"] == {"cka_addon.a"}
    assert graph["cka_addon.c"]["top"] == {"cka_addon.a", "cka_addon.sub"}
    found = house.circles({module: names["any"] for module, names in graph.items()})
    assert found == [["cka_addon.a", "cka_addon.sub.b"]]


def test_repetitions_are_counted_once_each_and_in_full(house, tmp_path):
    passage = "".join(f"x{i} = {i}\n" for i in range(8))
    (tmp_path / "a.py").write_text("import os\n" + passage + "y = 1\n")
    (tmp_path / "b.py").write_text('"""Doc."""\n\n# why\n' + passage.replace("x3", "  # said\nx3") + "z = 1\n")
    (tmp_path / "c.py").write_text("".join(f"x{i} = {i}\n" for i in range(5)))  # one line short
    found = house.repetitions(sorted(tmp_path.glob("*.py")), tmp_path)
    assert found == [{"lines": 8, "places": ["a.py:2", "b.py:4"]}]
