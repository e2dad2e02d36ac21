"""Run a function right after (or around) the import of a named module. Standard library only.

A finder at the front of ``sys.meta_path`` lets the ordinary finders find the module, then puts a wrapper on the
``exec_module`` of *that* loader object. The module keeps its own loader and spec (``inspect``, ``pkgutil`` and
pickling see nothing unusual), and modules that nobody waits for cost one dictionary look-up.

>>> import sys
>>> seen = []
>>> watch(("sndhdr_like_example",), lambda module: seen.append(module.__name__))
>>> "sndhdr_like_example" in FINDER.waiting
True
>>> FINDER.forget("sndhdr_like_example")
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["FINDER", "lend", "watch"]

Callback = Callable[[ModuleType], None]
Undo = Callable[[], None]


class PostImportFinder:
    """Finds nothing itself; calls back once a watched module's body has run."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callback]] = {}
        self.lenders: dict[str, list[Callable[[], Undo | None]]] = {}
        self._late: list[str] = []  # modules that were half-way through their import when we were installed
        self._busy = threading.local()

    def forget(self, name: str) -> None:
        self.waiting.pop(name, None)
        self.lenders.pop(name, None)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.waiting and name not in self.lenders:
            return None
        self.run_late()
        busy = self._busy.__dict__.setdefault("names", set())
        if name in busy:  # another hook of this kind asks in its turn
            return None
        busy.add(name)
        try:
            spec = self._ask_the_others(name, path, target)
        finally:
            busy.discard(name)
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            self._call_back_after(spec, name)
        return spec

    def _ask_the_others(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                return spec
        return None

    def _call_back_after(self, spec: ModuleSpec, name: str) -> None:
        loader: Any = spec.loader
        original = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            if module.__name__ != name:  # a zip file has one loader for all its modules
                original(module)
                return
            undo = [lend() for lend in self.lenders.get(name, ())]
            try:
                original(module)
            finally:
                for give_back in undo:
                    if give_back is not None:
                        give_back()
            self.run(module)

        loader.exec_module = exec_module

    def run(self, module: ModuleType) -> None:
        for callback in self.waiting.get(module.__name__, ()):
            callback(module)

    def run_late(self) -> None:
        """Serve modules that were being imported at installation and are complete by now."""
        for name in list(self._late):
            module = sys.modules.get(name)
            if module is not None and not _initialising(module):
                self._late.remove(name)
                self.run(module)


def _initialising(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


FINDER = PostImportFinder()


def lend(names: Iterable[str], lender: Callable[[], Undo | None]) -> None:
    """Call ``lender()`` before the body of each of `names` runs, and what it returns once the body has run."""
    _listen()
    for name in names:
        FINDER.lenders.setdefault(name, []).append(lender)


def _listen() -> None:
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)


def watch(names: Iterable[str], callback: Callback) -> None:
    """Call ``callback(module)`` after each of `names` is imported; at once for those that already are."""
    _listen()
    for name in names:
        FINDER.waiting.setdefault(name, []).append(callback)
        module = sys.modules.get(name)
        if module is None:
            continue
        if _initialising(module):
            FINDER._late.append(name)
        else:
            callback(module)
