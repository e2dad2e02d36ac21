"""The finder that calls back after an import: whoever finds the module, once per import, and without leaving traces."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import zipfile

import pytest

from s3prl_speaker_upstreams.compat._hooks import FINDER, PostImportFinder, lend, watch

pytestmark = pytest.mark.compat


@pytest.fixture
def module_file(tmp_path, monkeypatch):
    (tmp_path / "compat_probe_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "compat_probe_module"
    sys.modules.pop("compat_probe_module", None)
    FINDER.forget("compat_probe_module")


def test_called_after_the_body_and_the_module_stays_ordinary(module_file):
    seen = []
    watch((module_file,), lambda module: seen.append(module.value))
    module = importlib.import_module(module_file)
    assert seen == [1]
    assert type(module.__loader__).__name__ == "SourceFileLoader" and module.__spec__.loader is module.__loader__
    assert inspect.getsource(module) == "value = 1\n"


def test_called_at_once_for_an_imported_module_and_again_after_reload(module_file):
    module = importlib.import_module(module_file)
    seen = []
    watch((module_file,), seen.append)
    assert seen == [module]
    importlib.reload(module)
    assert seen == [module, module]


def test_looking_for_a_module_does_not_call(module_file):
    seen = []
    watch((module_file,), seen.append)
    assert importlib.util.find_spec(module_file) is not None
    assert seen == []
    importlib.import_module(module_file)
    assert len(seen) == 1


def test_missing_module_still_raises(module_file):
    watch(("compat_probe_absent",), lambda module: None)
    try:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("compat_probe_absent")
    finally:
        FINDER.forget("compat_probe_absent")


def test_modules_in_a_zip_share_a_loader(tmp_path, monkeypatch):
    archive = tmp_path / "all.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("compat_zip_a.py", "import compat_zip_b\nvalue = 'a'\n")
        file.writestr("compat_zip_b.py", "value = 'b'\n")
    monkeypatch.syspath_prepend(str(archive))
    seen = []
    watch(("compat_zip_a", "compat_zip_b"), lambda module: seen.append(module.value))
    try:
        importlib.import_module("compat_zip_a")
    finally:
        for name in ("compat_zip_a", "compat_zip_b"):
            FINDER.forget(name)
            sys.modules.pop(name, None)
    assert seen == ["b", "a"]


def test_a_half_imported_module_is_served_once_it_is_complete(tmp_path, monkeypatch):
    """install() can happen while torchaudio is in the middle of its own import."""
    (tmp_path / "compat_probe_half.py").write_text(
        "from s3prl_speaker_upstreams.compat import _hooks\n"
        "_hooks.watch(('compat_probe_half',), lambda module: module.seen.append(module.late))\n"
        "seen = []\nlate = 'set after the hook was registered'\n"
    )
    (tmp_path / "compat_probe_next.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    watch(("compat_probe_next",), lambda module: None)
    try:
        half = importlib.import_module("compat_probe_half")
        assert half.seen == []
        importlib.import_module("compat_probe_next")
        assert half.seen == ["set after the hook was registered"]
    finally:
        for name in ("compat_probe_half", "compat_probe_next"):
            FINDER.forget(name)
            sys.modules.pop(name, None)


def test_two_finders_that_ask_each_other_do_not_loop(module_file, monkeypatch):
    other = PostImportFinder()
    seen = []
    other.waiting[module_file] = [lambda module: seen.append("other")]
    watch((module_file,), lambda module: seen.append("ours"))
    monkeypatch.setattr(sys, "meta_path", [other, *sys.meta_path])
    importlib.import_module(module_file)
    assert sorted(seen) == ["other", "ours"]


def test_lent_only_while_the_body_runs(tmp_path, monkeypatch):
    (tmp_path / "compat_probe_borrower.py").write_text("import compat_probe_lent\nraise KeyError('body failed')\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def lender():
        sys.modules["compat_probe_lent"] = type(sys)("compat_probe_lent")
        return lambda: sys.modules.pop("compat_probe_lent")

    lend(("compat_probe_borrower",), lender)
    try:
        with pytest.raises(KeyError, match="body failed"):
            importlib.import_module("compat_probe_borrower")
    finally:
        FINDER.forget("compat_probe_borrower")
    assert "compat_probe_lent" not in sys.modules
