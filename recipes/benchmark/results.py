"""The one form of every measured result, and the page made of them.

    python recipes/benchmark/results.py            # write RESULTS.md from results/*.json
    python recipes/benchmark/results.py --check    # exit status 1 where the page is not what the files say

A benchmark script calls :func:`write_result`, which writes ``results/NAME.json`` with the date, commit, machine and
command beside the figures. Only those files are edited or replaced; RESULTS.md is never written by hand.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "ROOT", "add_output", "measured_here", "page", "section", "table", "write_result"]

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("s3prl_speaker_upstreams") is None:  # a checkout that is not installed
    sys.path.insert(0, str(ROOT))

from s3prl_speaker_upstreams import __version__  # noqa: E402
from s3prl_speaker_upstreams.common.files import write_json, write_text  # noqa: E402
from s3prl_speaker_upstreams.common.provenance import git_revision  # noqa: E402

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
    # of the code alone: a series of benchmarks writes one result after another, which does not make the tree dirty
    revision = git_revision(ROOT / "s3prl_speaker_upstreams") or f"release {__version__}"
    commit = revision.removesuffix("-dirty")
    commit = commit[:7] if len(commit) == 40 else commit
    facts: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": f"{commit} and changes" if revision.endswith("-dirty") else commit,
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


def add_output(parser: argparse.ArgumentParser, name: str) -> None:
    """Add ``--out``, where the result goes; ``name`` without a suffix is that of the file in results/."""
    shown = (FOLDER / f"{name}.json").relative_to(ROOT)
    parser.add_argument("--out", type=Path, default=ROOT / shown, metavar="JSON", help=f"the result (default {shown})")


def write_result(
    path: Path | str,
    *,
    title: str,
    about: str,
    tables: Sequence[Mapping[str, Any]],
    summary: Sequence[Row] = (),
    data: object = None,
    measured: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Write a result as JSON, whole or not at all, print it as it will stand on the page, and return it.

    path : below results/ the part of its name before the first dot says where on the page it stands
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
    write_json(path, result)
    sys.stdout.write(section(result))
    return result


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
    write_text(PAGE, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
