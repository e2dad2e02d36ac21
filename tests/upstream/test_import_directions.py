"""The design's import directions, read from the sources: who may know of whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = "s3prl_speaker_upstreams"

# part -> what it must not import, neither at its top nor inside a function
FORBIDDEN = {
    f"{OURS}/common": [
        "s3prl",
        *(
            f"{OURS}.{part}"
            for part in (
                "ecapa",
                "checkpoints",
                "weights",
                "data",
                "pretrain",
                "verification",
                "superb",
                "demo",
                "compat",
                "expert",
                "hubconf",
                "registration",
            )  # fmt: skip
        ),
    ],
    f"{OURS}/data": ["s3prl", *(f"{OURS}.{part}" for part in ("checkpoints", "weights", "pretrain", "verification"))],
    f"{OURS}/verification": ["s3prl", f"{OURS}.pretrain", f"{OURS}.expert", f"{OURS}.superb"],
    f"{OURS}/ecapa": [
        "s3prl",
        f"{OURS}.checkpoints",
        f"{OURS}.weights",
        f"{OURS}.expert",
        f"{OURS}.compat",
        f"{OURS}.pretrain",
    ],
    f"{OURS}/checkpoints": ["s3prl", f"{OURS}.weights", f"{OURS}.expert", f"{OURS}.compat", f"{OURS}.pretrain"],
    f"{OURS}/weights": ["s3prl", f"{OURS}.expert", f"{OURS}.compat", f"{OURS}.pretrain"],
    f"{OURS}/pretrain": ["s3prl", f"{OURS}.expert", f"{OURS}.compat", f"{OURS}.hubconf", f"{OURS}.registration"],
    f"{OURS}/compat": [
        f"{OURS}.{part}"
        for part in ("ecapa", "checkpoints", "weights", "expert", "hubconf", "registration", "pretrain", "superb")
    ],
    f"{OURS}/superb": [
        f"{OURS}.{part}"
        for part in (
            *("ecapa", "checkpoints", "weights", "data", "pretrain", "verification"),
            *("compat", "expert", "hubconf", "registration"),
        )
    ],
    f"{OURS}/demo": ["s3prl", *(f"{OURS}.{part}" for part in ("ecapa", "checkpoints", "pretrain", "compat", "expert"))],
    "cka_addon": [OURS],
}


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all modules that a source file imports, at any depth."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def sources(part: str) -> list[Path]:
    files = sorted((ROOT / part).rglob("*.py"))
    assert files, f"{part} has no sources"
    return files


@pytest.mark.parametrize("part", sorted(FORBIDDEN))
def test_import_directions(part):
    for path in sources(part):
        for module in imported_modules(path):
            for forbidden in FORBIDDEN[part]:
                assert module != forbidden and not module.startswith(forbidden + "."), f"{path} imports {module}"


def test_the_reader_sees_relative_and_nested_imports(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    source = tmp_path / "pkg" / "sub" / "mod.py"
    source.parent.mkdir(parents=True)
    source.write_text("def f():\n    from ..other import thing\n    import s3prl.hub\n")
    assert {"pkg.other", "pkg.other.thing", "s3prl.hub"} <= imported_modules(source)


def test_s3prl_is_imported_in_few_modules():
    importing = set()
    for path in sources(OURS):
        if any(module == "s3prl" or module.startswith("s3prl.") for module in imported_modules(path)):
            importing.add(str(path.relative_to(ROOT / OURS)))
    allowed = {"__init__.py", "expert.py", "doctor.py"}
    outside = {name for name in importing - allowed if not name.startswith(("compat/", "superb/"))}
    assert not outside


def test_no_eval_exec_or_unsafe_load():
    for part in (OURS, "cka_addon"):
        for path in sources(part):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id not in {"eval", "exec"}, f"{path}:{node.lineno}"
                if isinstance(node, ast.ExceptHandler):
                    assert node.type is not None, f"bare except in {path}:{node.lineno}"
