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
    f"{OURS}/fusion": [f"{OURS}.{part}" for part in ("pretrain", "superb", "compat", "hubconf", "registration")],
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
    outside = {name for name in importing - allowed if not name.startswith(("compat/", "superb/", "fusion/"))}
    assert not outside


def calls(part: str):
    for path in sources(part):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path, node


@pytest.mark.parametrize("part", [OURS, "cka_addon"])
def test_no_eval_or_exec_or_bare_except(part):
    for path, call in calls(part):
        if isinstance(call.func, ast.Name):
            assert call.func.id not in {"eval", "exec"}, f"{path}:{call.lineno}"
    for path in sources(part):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"bare except in {path}:{node.lineno}"


def unsafe_load(call: ast.Call) -> bool:
    """Whether a call unpickles what could run code: pickle's own, or torch.load without ``weights_only=True``."""
    name = ast.unparse(call.func)
    if name in ("pickle.load", "pickle.loads", "torch.jit.load", "joblib.load"):
        return True
    if name != "torch.load":
        return False
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    only = given.get("weights_only")
    return not (isinstance(only, ast.Constant) and only.value is True)


@pytest.mark.parametrize("part", [OURS, "cka_addon"])
def test_nothing_is_unpickled_that_could_run_code(part):
    # The one place that can be told to (allow_pickle; test_files.py holds that nothing runs without being told), and
    # the one that asks what torch's default refuses, of bytes that it has just made.
    allowed = {ROOT / OURS / "checkpoints" / "files.py", ROOT / OURS / "compat" / "torch_load.py"}
    assert [f"{path}:{call.lineno}" for path, call in calls(part) if unsafe_load(call) and path not in allowed] == []


@pytest.mark.parametrize(
    ("line", "unsafe"),
    [
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=safe)", True),
        ("torch.load(path, map_location='cpu', weights_only=True)", False),
        ("pickle.loads(data)", True),
        ("json.load(file)", False),
    ],
)
def test_the_check_of_loading_sees_what_it_looks_for(line, unsafe):
    assert unsafe_load(ast.parse(line).body[0].value) == unsafe
