"""Checkpoints of a run that appear whole or not at all, are verified when read, and fall back to the one before.

A checkpoint is ``step_00000150.pt`` with its SHA-256 in ``step_00000150.pt.sha256``. It is written beside, flushed to
the disk and renamed; a kill at any moment leaves the previous one. Reading uses ``torch.load(weights_only=True)``.
A full disk costs the older checkpoints first (all but the newest and the best), then this one, never the run.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import random
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ..common.digests import file_sha256
from ..common.files import write_text
from ..errors import CheckpointUnreadable

__all__ = ["FORMAT", "CheckpointStore", "is_run_checkpoint", "load_rng", "rng_state"]

FORMAT = 2
"""Of a run's checkpoint. 1: DINO's parts lay under ``core.``, the classifier's encoder was ``encoder_``."""

logger = logging.getLogger(__name__)

_NAME = re.compile(r"^step_(\d{8})\.pt$")


def rng_state() -> dict[str, Any]:
    """States of Python's, NumPy's and PyTorch's generators (CPU and every GPU), readable by ``weights_only=True``."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast(tuple, np.random.get_state())  # noqa: NPY002 - libraries below us may draw from it
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def load_rng(state: dict[str, Any]) -> None:
    """Set the generators to what :func:`rng_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def is_run_checkpoint(path: str | Path) -> bool:
    """Whether a file is a checkpoint of a run (``step_N.pt``, or an ``average.pt`` of them)."""
    path = Path(path)
    if path.suffix != ".pt" or not path.is_file():
        return False
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # damaged, or no file of PyTorch: its reader says what
        return bool(_NAME.match(path.name))
    return isinstance(state, dict) and {"task", "config", "step"} <= state.keys()


def _upgraded(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint as this version writes it."""
    if not isinstance(state, dict) or state.get("format") != 1:
        return state
    watched = ("core.marginal", "core.recent", "core.seen")
    task = {}
    for key, value in state.get("task", {}).items():
        if key in watched:
            key = "watch." + key.removeprefix("core.")
        elif key.startswith("encoder_."):
            key = "encoder." + key.removeprefix("encoder_.")
        task[key.removeprefix("core.")] = value
    return {**state, "format": FORMAT, "task": task}


class _Noting(io.FileIO):
    """A file that remembers why writing failed: ``torch.save`` reports any failure as a RuntimeError without reason."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        view, done = memoryview(data).cast("B"), 0
        try:
            while done < len(view):  # one call may write less than all
                done += super().write(view[done:]) or 0
        except OSError as error:
            self.failure = error
            raise
        return done


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


class CheckpointStore:
    """The checkpoints of one run in ``folder``: the last ``keep_last`` and the best.

    >>> import tempfile
    >>> store = CheckpointStore(tempfile.mkdtemp(), keep_last=2)
    >>> for step in (1, 2, 3): _ = store.save(step, {"x": torch.tensor(step)})
    >>> [p.name for p in store.paths()], int(store.load_newest()[0]["x"])
    (['step_00000002.pt', 'step_00000003.pt'], 3)
    """

    def __init__(self, folder: str | Path, keep_last: int = 3) -> None:
        self.folder, self.keep_last = Path(folder), keep_last

    def paths(self) -> list[Path]:
        """Checkpoints on disk, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if _NAME.match(p.name))

    def recent(self) -> list[Path]:
        """Checkpoints on disk, oldest first, without one that is older than the others and only kept as the best."""
        record, paths = self._best_record(), self.paths()
        if record is not None and record.get("outlived", len(paths) > self.keep_last):
            paths = [p for p in paths if self.step_of(p) != record["step"]]
        return paths

    @staticmethod
    def step_of(path: Path) -> int:
        """Optimizer steps done at a checkpoint, from its name."""
        match = _NAME.match(path.name)
        if match is None:
            raise CheckpointUnreadable(f"{path}: expected a name like step_00000150.pt")
        return int(match.group(1))

    def save(self, step: int, state: dict[str, Any]) -> Path | None:
        """Write ``state``; returns the path, or None if the disk refused (logged; the newest checkpoint is kept).

        On a full disk all but the newest and the best checkpoint make room, and it is tried again. Training goes on
        without this checkpoint if that fails too: losing some minutes at the next kill is better than stopping now.
        """
        path = self.folder / f"step_{step:08d}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob(".step_*.part"):  # of a run that was killed while writing
                stale.unlink(missing_ok=True)
            try:
                self._write(path, state)
            except OSError as error:
                if error.errno not in _NO_ROOM or not self._prune(keep_last=1, but=path):
                    raise
                logger.warning("step %d: the disk is full; older checkpoints were removed to make room", step)
                self._write(path, state)
        except OSError as error:
            if not path.exists():
                path.with_name(path.name + ".sha256").unlink(missing_ok=True)
            kept = self.paths()
            logger.error(
                "step %d: the checkpoint could not be written (%s); %s. Free space in %s; training goes on.",
                step,
                error,
                f"{kept[-1].name} is still whole and would be resumed from" if kept else "there is no older one",
                self.folder,
            )
            return None
        self._prune(self.keep_last)
        return path

    @staticmethod
    def _write(path: Path, state: dict[str, Any]) -> None:
        temporary = path.with_name(f".{path.name}.part")
        try:
            with _Noting(temporary, "w") as stream:
                try:
                    torch.save(state, cast(Any, stream))
                except RuntimeError as error:
                    raise stream.failure or OSError(str(error)) from error
                os.fsync(stream.fileno())
            digest = file_sha256(temporary)
            write_text(path.with_name(path.name + ".sha256"), f"{digest}  {path.name}\n", durable=True)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _prune(self, keep_last: int, but: Path | None = None) -> int:
        """Remove all but the best and the last ``keep_last``; returns how many there were to remove."""
        best, removed = self.best(), 0
        for path in self.paths()[:-keep_last]:
            if best is not None and path.name == best[0].name:
                record = self._best_record()
                if record is not None and not record.get("outlived"):
                    self._write_best({**record, "outlived": True})
            elif path != but:
                path.unlink(missing_ok=True)
                path.with_name(path.name + ".sha256").unlink(missing_ok=True)
                removed += 1
        return removed

    def mark_best(self, step: int, value: float, name: str = "eer") -> None:
        """Remember the checkpoint of ``step`` as the best by ``name`` (smaller is better)."""
        self._write_best({"step": step, name: value, "metric": name, "outlived": False})

    def _write_best(self, record: dict[str, Any]) -> None:
        try:
            write_text(self.folder / "best.json", json.dumps(record) + "\n", durable=True)
        except OSError as error:
            logger.error("%s could not be written (%s); training goes on", self.folder / "best.json", error)

    def _best_record(self) -> dict[str, Any] | None:
        try:
            record = json.loads((self.folder / "best.json").read_text())
            return record if isinstance(record["step"], int) and float(record[record["metric"]]) >= 0 else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def best(self) -> tuple[Path, float] | None:
        """The best checkpoint and its value, or None if there is none."""
        record = self._best_record()
        if record is None:
            return None
        return self.folder / f"step_{record['step']:08d}.pt", float(record[record["metric"]])

    @staticmethod
    def load(path: str | Path) -> dict[str, Any]:
        """One checkpoint, verified.

        Raises CheckpointUnreadable if it is missing, differs from its recorded SHA-256, or cannot be read.
        """
        path = Path(path)
        record = path.with_name(path.name + ".sha256")
        if not path.is_file():
            raise CheckpointUnreadable(f"{path}: no such checkpoint")
        try:
            if record.is_file():
                expected, got = record.read_text().split()[0], file_sha256(path)
                if got != expected:
                    raise CheckpointUnreadable(f"{path}: corrupt: SHA-256 {got[:12]}..., expected {expected[:12]}...")
            return _upgraded(torch.load(path, map_location="cpu", weights_only=True))
        except CheckpointUnreadable:
            raise
        except Exception as error:  # unpickling a damaged file may raise nearly anything
            raise CheckpointUnreadable(f"{path}: not readable: {type(error).__name__}: {error}") from error

    def load_newest(self) -> tuple[dict[str, Any], Path] | None:
        """The newest checkpoint that can be read; unreadable newer ones are reported and set aside as ``*.corrupt``.

        None if there never was a checkpoint. Raises CheckpointUnreadable, on every start, if there are some and none
        can be read: only the user may say that a run begins anew.
        """
        corrupt: list[tuple[Path, CheckpointUnreadable]] = []
        for path in reversed(self.paths()):
            try:
                state = self.load(path)
            except CheckpointUnreadable as problem:
                corrupt.append((path, problem))
                continue
            for bad, why in corrupt:
                logger.error("%s; falling back to the checkpoint before it", why)
                os.replace(bad, bad.with_name(bad.name + ".corrupt"))
                bad.with_name(bad.name + ".sha256").unlink(missing_ok=True)
            return state, path
        aside = sorted(self.folder.glob("step_*.corrupt")) if self.folder.is_dir() else []
        if corrupt or aside:
            raise CheckpointUnreadable(
                f"{self.folder}: none of {len(corrupt) + len(aside)} checkpoints can be read "
                f"({corrupt[0][1] if corrupt else aside[-1].name}). Bring one back from a copy, or remove this folder "
                "to begin again at step 0"
            )
        return None
