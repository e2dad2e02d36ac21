"""The results page is what the JSON files say, and every file says when, where and from which commit."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "benchmark"


@pytest.fixture(scope="module")
def results():
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("results")
    finally:
        sys.path.remove(str(FOLDER))


def test_the_page_is_what_the_files_say(results):
    assert (FOLDER / "RESULTS.md").read_text(encoding="utf-8") == results.page().rstrip() + "\n", (
        "run python recipes/benchmark/results.py"
    )


@pytest.mark.parametrize("path", sorted((FOLDER / "results").glob("*.json")), ids=lambda path: path.stem)
def test_every_result_names_its_origin(results, path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["measured"]["date"])
    assert re.match(r"[0-9a-f]{7}|release ", result["measured"]["commit"])
    assert result["measured"]["machine"] and result["command"] and result["tables"]
    for table in result["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"]), table["title"]
    assert all(len(row) == 3 for row in result["summary"])
    assert "shared/" not in json.dumps({**result, "data": None})  # a folder that only the authors have


def test_a_result_is_found_again_on_the_page(results, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(FOLDER / "some.py"), "--a", "b c"])
    written = results.write_result(
        tmp_path / "cka.x.json",
        title="Title",
        about="About.",
        tables=[{"title": "T", "columns": ["name", "value"], "rows": [["p|q", 0.12345], ["r", 2e-9]]}],
        summary=[["speed", "1.5x", "1.4x"]],
        measured={"commit": "abcdef0"},
    )
    text = results.page(tmp_path)
    assert "| speed | 1.5x | 1.4x | Title |" in text
    assert "| p\\|q | 0.123 |" in text and "| r | 2.00e-09 |" in text and "commit abcdef0" in text
    assert "recipes/benchmark/some.py --a 'b c'" in text and written["measured"]["date"] in text
    assert capsys.readouterr().out in text
