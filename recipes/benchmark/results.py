"""The one form of every measured result, and the page made of them.

    python recipes/benchmark/results.py            # write RESULTS.md from results/*.json
    python recipes/benchmark/results.py --check    # exit status 1 where the page is not what the files say

A benchmark script calls :func:`write_result`, which writes ``results/NAME.json`` with the date, commit, machine and
command beside the figures. Only those files are edited or replaced; RESULTS.md is never written by hand.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "ROOT", "measured_here", "page", "section", "table", "write_result"]

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # a script run from a checkout that is not installed
    sys.path.insert(0, str(ROOT))
FOLDER = Path(__file__).resolve().parent / "results"
PAGE = Path(__file__).resolve().parent / "RESULTS.md"
Row = Sequence[object]

# Sections of the page in this order, by the part of a name before the first dot; others follow by name.
ORDER = ("start", "encoder", "checkpoints", "compat", "superb", "cka", "data", "dino", "small_dino", "gpu", "house")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def measured_here() -> dict[str, object]:
    """Date, commit, machine and versions of this process; torch's facts only if it was imported anyway.

    >>> sorted(measured_here())[:3]
    ['commit', 'cores', 'date']
    """
    from s3prl_speaker_upstreams import __version__

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    # Results themselves do not make a tree dirty: a series of benchmarks writes one after the other.
    dirty = git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", f":!{FOLDER.relative_to(ROOT)}", f":!{PAGE}"
    )
    facts: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": (git("rev-parse", "--short", "HEAD") or f"release {__version__}") + (" and changes" if dirty else ""),
        "machine": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["torch"] = torch.__version__
        facts["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            facts["gpu"] = torch.cuda.get_device_name()
    return facts


def write_result(
    name: str,
    *,
    title: str,
    about: str,
    tables: Sequence[Mapping[str, Any]],
    summary: Sequence[Row] = (),
    data: object = None,
    measured: Mapping[str, object] | None = None,
    folder: Path | str = FOLDER,
) -> Path:
    """Write ``folder/name.json``, whole or not at all; returns its path.

    name : its section of the page is the part before the first dot
    about : what is measured and what the columns mean, in words without figures
    tables : {"title", "columns", "rows"} each; cells are written as they are, floats with three digits
    summary : (what, figure, aim or "") rows for the table at the top of the page
    data : everything that was measured, for machines
    measured : facts that differ from :func:`measured_here`, such as the commit that was measured
    """
    result = {
        "title": title,
        "about": about,
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *map(shlex.quote, sys.argv[1:])]),
        "measured": {**measured_here(), **(measured or {})},
        "summary": [list(row) for row in summary],
        "tables": [dict(table) for table in tables],
        "data": data,
    }
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(result, indent=1, default=str, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)
    return path


def cell(value: object) -> str:
    """
    >>> [cell(x) for x in (None, True, 3, 0.123456, 1234.5, 2e-9, "a|b")]
    ['', 'yes', '3', '0.123', '1234', '2.00e-09', 'a\\\\|b']
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
            return f"{value:.2e}"
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|")


def table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """
    >>> print(table(["a", "b"], [["x", 0.5]]))
    | a | b |
    |---|---|
    | x | 0.5 |
    """
    lines = [columns, ["---"] * len(columns)]
    text = ["| " + " | ".join(lines[0]) + " |", "|" + "|".join(lines[1]) + "|"]
    text += ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return "\n".join(text)


def _where(measured: Mapping[str, object]) -> str:
    """Date, commit and machine in one line."""
    parts = [f"{measured.get('date')}", f"commit {measured.get('commit')}", f"{measured.get('machine')}"]
    for key, text in (("cores", "{} cores"), ("gpu", "{}"), ("threads", "{} thread(s)"), ("load", "load {}")):
        if measured.get(key) is not None:
            parts.append(text.format(measured[key]))
    if measured.get("torch"):
        parts.append(f"torch {measured['torch']}")
    return ", ".join(parts)


def section(result: Mapping[str, Any], level: int = 3) -> str:
    """One result as Markdown."""
    lines = ["#" * level + f" {result['title']}", "", result["about"], "", f"`{result['command']}`  "]
    lines += [_where(result["measured"]), ""]
    for part in result["tables"]:
        if part.get("title"):
            lines += [f"**{part['title']}**", ""]
        lines += [table(part["columns"], part["rows"]), ""]
    for picture in result.get("pictures", []):
        lines += [f"![{picture['title']}]({picture['path']})", ""]
    return "\n".join(lines)


def _order(path: Path) -> tuple[int, str]:
    group = path.name.partition(".")[0]
    return (ORDER.index(group) if group in ORDER else len(ORDER), path.name)


def page(folder: Path = FOLDER) -> str:
    """The whole of RESULTS.md."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"), key=_order)]
    summary = [[*row, result["title"]] for result in results for row in result["summary"]]
    lines = [
        "# Measured results",
        "",
        "Made by `python recipes/benchmark/results.py` from `recipes/benchmark/results/*.json`, which the benchmark "
        "scripts write: edit nothing here. Ratios against peers come from one interleaved run on one machine; absolute "
        "times are for orientation. Under each heading: the command, then date, commit and machine.",
        "",
        "## Summary",
        "",
        table(["what", "figure", "aim", "section"], summary),
        "",
        "## Sections",
        "",
    ]
    return "\n".join(lines) + "\n" + "\n".join(section(result) for result in results)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit status 1 where the page is stale")
    args = parser.parse_args(argv)
    text = page().rstrip() + "\n"
    if args.check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            sys.stderr.write(f"{PAGE} is stale; run python recipes/benchmark/results.py\n")
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
