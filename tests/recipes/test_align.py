"""The recipe that makes phone and word times, on real sentences whose times are known."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "probe" / "align.py"


def times(path):
    found = {}
    for line in path.read_text().splitlines():
        name, _, start, length, label = line.split()
        found.setdefault(name.rsplit("/", 1)[-1], []).append((label, float(start), float(start) + float(length)))
    return found


def test_times_of_real_sentences(speech, tmp_path):
    pytest.importorskip("pocketsphinx")
    readers = speech / "readers"
    command = [sys.executable, str(RECIPE), str(readers), f"{readers}/labels.tsv:transcript", "-o", str(tmp_path)]
    done = subprocess.run([*command, "--limit", "8", "-q"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    mine, theirs = times(tmp_path / "phones.ctm"), times(readers / "phones.ctm")
    assert len(mine) >= 7
    same = [u for u in mine if [p[0] for p in mine[u]] == [p[0] for p in theirs.get(u, ())]]
    assert len(same) >= 5
    away = [abs(a[1] - b[1]) for u in same for a, b in zip(mine[u], theirs[u], strict=True)]
    assert np.median(away) <= 0.02
    for rows in mine.values():
        assert all(b[1] >= a[2] - 1e-9 for a, b in zip(rows, rows[1:], strict=False)) and rows[0][1] >= 0
    before = (tmp_path / "aligned.json").read_bytes()
    again = subprocess.run([*command, "--limit", "8", "-q"], capture_output=True, text=True, timeout=240)
    assert again.returncode == 0 and (tmp_path / "aligned.json").read_bytes() == before


def test_transcripts_of_every_form(tmp_path):
    spec = importlib.util.spec_from_file_location("align_recipe", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1-2.trans.txt").write_text("1-2-0000 HELLO THERE\n1-2-0001 GOOD DAY\n")
    assert recipe.read_transcripts(str(tmp_path / "a")) == {"1-2-0000": "HELLO THERE", "1-2-0001": "GOOD DAY"}
    (tmp_path / "t.tsv").write_text("utterance\ttranscript\nu\tIt's two.\n")
    assert recipe.clean(recipe.read_transcripts(f"{tmp_path}/t.tsv:transcript")["u"]) == "it's two"
