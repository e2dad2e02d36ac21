"""How the code is laid out, as numbers: sizes, import circles, repeated passages, type errors, files on four journeys.

    python recipes/benchmark/house.py                               # this checkout
    python recipes/benchmark/house.py --commit f3d6852 --journeys   # another commit, and the journeys too

Sizes and repetitions are of the two packages (`lines` are all lines of a file), tests and recipes are counted beside
them. A repetition is a pair of places that agree in six or more consecutive lines of code; blank lines, comments,
docstrings, imports and lines of closing brackets do not count as lines. A journey lists the files in the order in which
a reader who follows each function once, at its first call, enters them.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from results import ROOT, add_output, write_result

PACKAGES = ("s3prl_speaker_upstreams", "cka_addon")
REPEATED_LINES = 6


def sources(root: Path, *folders: str) -> list[Path]:
    """All Python files below ``folders`` of ``root``, sorted.

    >>> any(path.name == "errors.py" for path in sources(ROOT, *PACKAGES))
    True
    """
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def sizes(root: Path) -> dict[str, dict[str, int]]:
    """Files and lines of each folder of the packages, and of tests and recipes as wholes."""
    table: dict[str, dict[str, int]] = {}
    for path in sources(root, *PACKAGES, "tests", "recipes"):
        folder = path.relative_to(root).parent
        name = str(folder) if folder.parts[0] in PACKAGES else folder.parts[0]
        row = table.setdefault(name, {"files": 0, "lines": 0})
        row["files"] += 1
        row["lines"] += count_lines(path)
    return table


def longest(root: Path) -> dict[str, dict[str, object]]:
    """The longest file and the longest function of the packages, with their lines."""
    files, functions = [], []
    for path in sources(root, *PACKAGES):
        name = str(path.relative_to(root))
        files.append((count_lines(path), name))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                functions.append(((node.end_lineno or node.lineno) - node.lineno + 1, f"{name}:{node.name}"))
    return {
        "file": dict(zip(("lines", "name"), max(files), strict=True)),
        "function": dict(zip(("lines", "name"), max(functions), strict=True)),
    }


def imports(root: Path) -> dict[str, dict[str, set[str]]]:
    """module -> {"top": our modules imported when it is imported, "any": also those imported inside functions}.

    Imports under ``if TYPE_CHECKING`` belong to neither, and the top of a package (s3prl_speaker_upstreams,
    cka_addon) has none inside functions: it hands its public names on at first use, and everything may ask its version.
    """
    modules = {}
    for path in sources(root, *PACKAGES):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, dict[str, set[str]]] = {}
    for name, path in modules.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        found: dict[str, set[str]] = {"top": set(), "any": set()}
        for node, inside in _imports_of(ast.parse(path.read_text(encoding="utf-8"))):
            for target in _targets(node, package):
                # `from package import name` names a module or something defined in the package
                module = target if target in modules else target.rpartition(".")[0]
                if module in modules and module != name:
                    if not (inside and name in PACKAGES):
                        found["any"].add(module)
                    if not inside:
                        found["top"].add(module)
        graph[name] = found
    return graph


def _imports_of(tree: ast.AST, inside: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, inside
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        else:
            deeper = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports_of(node, inside or deeper)


def _targets(node: ast.Import | ast.ImportFrom, package: list[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = package[: len(package) - node.level + 1] if node.level else []
    module = ".".join([*base, *([node.module] if node.module else [])])
    yield from (f"{module}.{alias.name}" for alias in node.names)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or around a corner (strongly connected components).

    >>> circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})
    [['a', 'b', 'c']]
    """
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            module = todo.pop()
            if module not in seen:
                seen.add(module)
                todo.extend(graph.get(module, ()))
        reach[start] = seen
    found = {tuple(sorted([a, *(b for b in reach[a] if b != a and a in reach[b])])) for a in graph if a in reach[a]}
    return [list(group) for group in sorted(found) if len(group) > 1]


def counted_lines(path: Path, every: bool) -> list[tuple[int, str]]:
    """(line number, stripped text) of the lines that count for repetitions."""
    text = path.read_text(encoding="utf-8")
    skip: set[int] = set()
    for node in ast.walk(ast.parse(text)) if not every else ():
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            skip.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            skip.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    kept = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line and number not in skip and not line.startswith("#") and (every or re.search(r"\w", line)):
            kept.append((number, line))
    return kept


def repetitions(paths: Iterable[Path], root: Path, every: bool = False) -> list[dict[str, object]]:
    """Pairs of places that agree in REPEATED_LINES or more consecutive lines, longest first."""
    length = REPEATED_LINES
    lines = {str(path.relative_to(root)): counted_lines(path, every) for path in paths}
    windows: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, kept in lines.items():
        for i in range(len(kept) - length + 1):
            windows[tuple(text for _, text in kept[i : i + length])].append((name, i))
    pairs: set[tuple[str, int, str, int]] = set()
    for places in windows.values():
        for k, (a, i) in enumerate(places):
            for b, j in places[k + 1 :]:
                if a != b or j >= i + length:
                    pairs.add((a, i, b, j))
    found = []
    for a, i, b, j in sorted(pairs):
        if (a, i - 1, b, j - 1) in pairs:
            continue  # a later window of the same passage
        size = length
        while (a, i + size - length + 1, b, j + size - length + 1) in pairs:
            size += 1
        found.append({"lines": size, "places": [f"{a}:{lines[a][i][0]}", f"{b}:{lines[b][j][0]}"]})
    return sorted(found, key=lambda pair: -pair["lines"])  # type: ignore[operator]


def type_errors(root: Path) -> dict[str, object] | None:
    """What mypy finds in the packages with its own defaults, or None where it is not installed.

    Without the project's configuration, so that a looser one does not look like better code.
    """
    line = [sys.executable, "-m", "mypy", "--config-file", os.devnull, "--ignore-missing-imports", *PACKAGES]
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run([*line, "--cache-dir", cache], cwd=root, capture_output=True, text=True)
    if "No module named mypy" in done.stderr:
        return None
    errors = re.findall(r"^([^:\n]+):\d+: error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    return {
        "errors": len(errors),
        "files": len({path for path, _ in errors}),
        "by_folder": dict(Counter(str(Path(path).parent) for path, _ in errors).most_common()),
    }


# Each journey prints nothing; the tracer writes what it saw. Written for every commit that has these public names.
JOURNEYS = {
    "waveform to hidden states": """
import torch
from s3prl.nn import S3PRLUpstream
upstream = S3PRLUpstream("ecapa_dino_small").eval()
trace()
with torch.no_grad():
    upstream(torch.randn(1, 16000) * 0.05, torch.tensor([16000]))
""",
    "checkpoint file to encoder": """
import shutil
from s3prl_speaker_upstreams.checkpoints import load_encoder
shutil.copy(f"{root}/tests/checkpoints/data/wespeaker.pt", f"{work}/avg_model.pt")
trace()
load_encoder(f"{work}/avg_model.pt")
""",
    "folder of audio to CKA matrix to report": """
import numpy, soundfile
from cka_addon.cli import main
for i in range(3):
    soundfile.write(f"{work}/{i}.wav", numpy.random.default_rng(i).normal(0, 0.05, 24000), 16000)
open(f"{work}/toy.py", "w").write(
    "def model(wavs): return {'hidden_states': [w[: len(w) // 160 * 160].reshape(1, -1, 160) for w in wavs[:1]] * 2}"
)
sys.path.insert(0, work)
trace()
toy = "toy=py:toy:model shift=0.01 first_center=0.005"
main(["-q", "compute", "-m", toy, "-a", work, "--mode", "full", "-o", f"{work}/c.json"])
main(["-q", "report", f"{work}/c.json", "-o", f"{work}/c.html"])
""",
    "run.sh to s3prl": """
from s3prl_speaker_upstreams.superb.__main__ import main
trace()
main(["run", "KS", "fbank", "--smoke", "--device", "cpu", "--exp", work, "--conf", f"{root}/recipes/superb/conf",
      "--stages", "check,prepare,train"])
""",
}

TRACER = """
import inspect, json, sys
root, work, out = sys.argv[1:4]
seen, files = set(), []
packages = tuple(f"{{root}}/{{name}}/" for name in {packages!r})
def profile(frame, event, argument):
    code = frame.f_code
    function = code.co_flags & inspect.CO_OPTIMIZED  # neither a module's body nor a class's
    if event == "call" and function and code not in seen and code.co_filename.startswith(packages):
        seen.add(code)
        name = code.co_filename[len(root) + 1:]
        if not name.endswith("_startup.py") and (not files or files[-1] != name):
            files.append(name)
def trace():
    sys.setprofile(profile)
try:
    exec(compile(sys.stdin.read(), "journey", "exec"))
finally:
    sys.setprofile(None)
    json.dump(files, open(out, "w"))
"""


def journey(root: Path, script: str) -> dict[str, object]:
    """Files of the packages that a script enters, in order; "returns" counts entries into a file left before."""
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "trace.json"
        environment = {**os.environ, "PYTHONPATH": str(root)}
        line = [sys.executable, "-c", TRACER.format(packages=PACKAGES), str(root), work, str(out)]
        done = subprocess.run(line, input=script, cwd=work, env=environment, capture_output=True, text=True)
        if done.returncode or not out.exists():
            return {"failed": done.stderr[-2000:]}
        files = json.loads(out.read_text())
    return {"files": len(set(files)), "returns": len(files) - len(set(files)), "path": files}


def measure(root: Path, journeys: bool) -> dict[str, object]:
    graph = imports(root)
    repeated = repetitions(sources(root, *PACKAGES), root)
    everywhere = repetitions(sources(root, *PACKAGES, "recipes", "tests"), root, every=True)
    result: dict[str, object] = {
        "sizes": sizes(root),
        "longest": longest(root),
        "import_circles": {kind: circles({m: found[kind] for m, found in graph.items()}) for kind in ("top", "any")},
        "repetitions": {"pairs": len(repeated), "pairs_everywhere": len(everywhere), "places": repeated},
        "mypy": type_errors(root),
    }
    if journeys:
        result["journeys"] = {name: journey(root, script) for name, script in JOURNEYS.items()}
    return result


def tables(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The measurements as tables of the page."""
    circles_, mypy, repeated = result["import_circles"], result["mypy"], result["repetitions"]
    total = {
        key: sum(row[key] for folder, row in result["sizes"].items() if folder.startswith(PACKAGES))
        for key in ("files", "lines")
    }
    rows = [
        ["files of the packages", total["files"]],
        ["lines of the packages", total["lines"]],
        ["import circles, when imported", len(circles_["top"])],
        ["import circles, counting imports inside functions", len(circles_["any"])],
        [f"pairs of places in the packages' code that repeat {REPEATED_LINES} or more lines", repeated["pairs"]],
        ["the same, every line of packages, recipes and tests", repeated["pairs_everywhere"]],
        ["mypy errors (its defaults)", mypy["errors"] if mypy else "not measured"],
        ["longest file", "{lines} lines, {name}".format(**result["longest"]["file"])],
        ["longest function", "{lines} lines, {name}".format(**result["longest"]["function"])],
    ]
    found = [
        {"title": "", "columns": ["what", "figure"], "rows": rows},
        {
            "title": "Sizes",
            "columns": ["folder", "files", "lines"],
            "rows": [[name, row["files"], row["lines"]] for name, row in result["sizes"].items()],
        },
    ]
    if "journeys" in result:
        steps = [
            [
                name,
                way.get("files"),
                way.get("returns"),
                ", ".join(dict.fromkeys(way["path"])) if "path" in way else way["failed"],
            ]
            for name, way in result["journeys"].items()
        ]
        found.append({"title": "Journeys", "columns": ["from, to", "files", "returns", "in this order"], "rows": steps})
    return found


def summary(result: dict[str, Any]) -> list[list[object]]:
    """The rows for the top of the results page."""
    mypy = result["mypy"]
    return [
        ["import circles, counting imports inside functions", len(result["import_circles"]["any"]), "0"],
        ["mypy errors", mypy["errors"] if mypy else "not measured", "0"],
        ["pairs of places in the packages' code that repeat six or more lines", result["repetitions"]["pairs"], "5"],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="measure this commit instead of the working tree")
    parser.add_argument("--journeys", action="store_true", help="also run and trace the four journeys (a minute)")
    add_output(parser, "house.now")
    args = parser.parse_args()
    if args.commit:
        with tempfile.TemporaryDirectory() as folder:
            archive = subprocess.run(["git", "archive", args.commit], cwd=ROOT, capture_output=True, check=True).stdout
            subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
            result = measure(Path(folder), args.journeys)
    else:
        result = measure(ROOT, args.journeys)
    write_result(
        args.out,
        title=f"Layout of the code at {args.commit}" if args.commit else "Layout of the code",
        about="Sizes, import circles, repeated passages and type errors of the two packages. A journey lists the "
        "files that a reader enters who follows each function once, at its first call; a return is an entry into a "
        "file that was left before.",
        tables=tables(result),
        summary=[] if args.commit else summary(result),
        data=result,
        measured={"commit": args.commit} if args.commit else None,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
