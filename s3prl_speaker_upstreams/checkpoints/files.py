"""Reading checkpoint files from disk, safely, and saying in plain words what a damaged or foreign file is.

Nothing here knows ECAPA-TDNN. :func:`load_file` gives the object that was saved (for PyTorch files) or the tensors and
metadata (for safetensors); :func:`sniff` tells what a file is from its first bytes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import CheckpointUnreadable

__all__ = ["LoadedFile", "load_file", "numpy_safe_globals", "sniff"]

logger = logging.getLogger(__name__)

_LFS = b"version https://git-lfs.github.com/spec"
_UNSUPPORTED_GLOBAL = re.compile(r"(?:GLOBAL|[Uu]nsupported class)\s+([\w.]+)")
_UNSUPPORTED_INSTR = re.compile(r"Can only build|not allowed|Unsupported operand|Trying to (?:load|instantiate|call)")


class LoadedFile(NamedTuple):
    """What a checkpoint file holds: `data` (any object) and, for safetensors, its `metadata` (else None).

    >>> LoadedFile({"weight": 1}).metadata is None
    True
    """

    data: Any
    metadata: dict[str, str] | None = None


def sniff(path: str | os.PathLike) -> str:
    """What a file is, from its first bytes.

    Returns one of ``"zip"`` (PyTorch's current container), ``"pickle"`` (its old one), ``"safetensors"``, ``"tar"``,
    ``"gzip"``, ``"empty"``, ``"html"``, ``"git-lfs"``, ``"json"``, ``"text"``, ``"unknown"``.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.ckpt"
    >>> _ = path.write_text("<!DOCTYPE html><title>404</title>")
    >>> sniff(path)
    'html'
    """
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head:
        return "empty"
    if head[:4] == b"PK\x03\x04":
        return "zip"
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    if head[257:262] == b"ustar":
        return "tar"
    if head.startswith(_LFS):
        return "git-lfs"
    # A safetensors file is an 8-byte little-endian header size, then that many bytes of JSON.
    if len(head) > 9 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 100_000_000:
        return "safetensors"
    if head[0] == 0x80 and len(head) > 1 and head[1] <= 5:
        return "pickle"
    lowered = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if lowered.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "html"
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        # A multi-byte character may be cut by the 4096-byte window.
        if error.start < len(head) - 4:
            return "unknown"
        text = head[: error.start].decode("utf-8")
    if any(ord(c) < 32 and c not in "\t\r\n\f" for c in text):
        return "unknown"
    return "json" if lowered.startswith((b"{", b"[")) else "text"


_NOT_A_CHECKPOINT = {
    "empty": "the file has 0 bytes; a download was probably interrupted: delete it and fetch it again",
    "html": "the file is a web page, not a checkpoint (an error or log-in page saved under the model's name); "
    "delete it and download the file itself (on Hugging Face: the 'resolve' link, not 'blob')",
    "git-lfs": "the file is a git-lfs pointer (a few lines of text), not the weights; run `git lfs pull` in the cloned "
    "repository or download the file itself",
    "json": "the file is JSON text, not a checkpoint (an error message of a download service, or a configuration file)",
    "text": "the file is plain text, not a checkpoint; pass the weights file (.pt, .ckpt, .bin, .pth, .model, "
    ".safetensors) or the folder that holds it",
    "gzip": "the file is a gzip archive; unpack it and pass the weights file or folder inside",
}


def _numpy_scalar_under(module: str) -> Any:
    """numpy's scalar constructor under the module path by which an older or newer numpy pickled it."""
    try:
        from numpy._core import multiarray
    except ImportError:  # numpy < 2
        from numpy.core import multiarray

    def scalar(dtype: np.dtype, value: Any = None) -> np.generic:
        # Object dtypes would unpickle arbitrary things; a metric or learning rate never has one.
        if dtype.hasobject:
            raise CheckpointUnreadable("a numpy object scalar in the checkpoint was refused")
        return multiarray.scalar(dtype, value)

    # torch's allow-list looks globals up by these names (torch 2.5 does not take (object, name) pairs).
    scalar.__module__, scalar.__name__, scalar.__qualname__ = module, "scalar", "scalar"
    return scalar


@contextlib.contextmanager
def numpy_safe_globals() -> Iterator[None]:
    """Let ``torch.load(weights_only=True)`` read numpy scalars, which optimizers' and trainers' states often hold.

    Only inert things are allowed: numpy's scalar constructor (as numpy 1 and numpy 2 name it), ``np.dtype``, the
    number dtypes and ``_codecs.encode``. On torch older than 2.5, which cannot allow anything, this does nothing.

    >>> with numpy_safe_globals():
    ...     pass
    """
    if not hasattr(torch.serialization, "safe_globals"):
        yield
        return
    import _codecs

    allowed: list[Any] = [
        _numpy_scalar_under("numpy.core.multiarray"),
        _numpy_scalar_under("numpy._core.multiarray"),
        np.dtype,
        _codecs.encode,
    ]
    # Before numpy 1.25 there is no np.dtypes; type(np.dtype(...)) is the same class on every version.
    allowed += [type(np.dtype(kind)) for kind in ("float64", "float32", "float16", "int64", "int32", "bool")]
    with torch.serialization.safe_globals(allowed):
        yield


def load_file(path: str | os.PathLike, *, allow_pickle: bool = False) -> LoadedFile:
    """Read one checkpoint file to CPU memory.

    path : a PyTorch file (current or old container) or a ``.safetensors`` file
    allow_pickle : read pickles that hold more than tensors and plain containers. Such a file can run any code when it
        is opened, so only pass True for files from somebody you trust.

    PyTorch files in the current container are memory-mapped: an optimizer state beside the weights costs no memory.

    Raises CheckpointUnreadable if the file is missing, damaged, no checkpoint, or needs `allow_pickle`.

    >>> import tempfile, pathlib, torch
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.pt"
    >>> torch.save({"weight": torch.ones(2)}, path)
    >>> load_file(path).data["weight"]
    tensor([1., 1.])
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointUnreadable(
            f"{path}: no such file or folder (from {Path.cwd()}); pass the weights file or the folder that holds it"
        )
    if path.is_dir():
        raise CheckpointUnreadable(f"{path}: is a folder; expected a file")
    try:
        kind = sniff(path)
    except OSError as error:
        raise CheckpointUnreadable(f"{path}: cannot be read: {error}") from error
    if kind in _NOT_A_CHECKPOINT:
        raise CheckpointUnreadable(f"{path}: {_NOT_A_CHECKPOINT[kind]}")
    if kind == "tar":
        raise CheckpointUnreadable(f"{path}: {_describe_tar(path)}")
    if kind == "safetensors":
        return _load_safetensors(path)
    if kind == "unknown":
        raise CheckpointUnreadable(
            f"{path}: neither a PyTorch nor a safetensors file (first bytes {_first_bytes(path)}); "
            "it may be damaged: compare its size with the original's and fetch it again"
        )
    if kind == "zip":
        _check_torch_zip(path)
    return LoadedFile(_torch_load(path, zipped=kind == "zip", allow_pickle=allow_pickle))


def _first_bytes(path: Path) -> str:
    with open(path, "rb") as file:
        return repr(file.read(8))


def _describe_tar(path: Path) -> str:
    try:
        with tarfile.open(path) as tar:
            names = [Path(member.name).name for member in tar.getmembers()[:50]]
    except (tarfile.TarError, OSError):
        names = []
    if {"model_config.yaml", "model_weights.ckpt"} & set(names):
        return (
            "is a NeMo archive (.nemo). NeMo's ecapa_tdnn uses group convolutions in place of Res2 and TitaNet is "
            "another network: neither can be loaded as ECAPA-TDNN. Use a checkpoint of another project, for example "
            "the entry ecapa_tdnn (SpeechBrain)"
        )
    return f"is a tar archive (of {', '.join(names[:3]) or 'nothing readable'}); unpack it and pass the file inside"


def _check_torch_zip(path: Path) -> None:
    """Tell a truncated or foreign zip from PyTorch's container before torch does so in its own words."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        size = path.stat().st_size
        raise CheckpointUnreadable(
            f"{path}: truncated or damaged ({size:,} bytes; its table of contents at the end is missing: {error}); "
            "the download was probably interrupted: delete it and fetch it again"
        ) from error
    if any(name.endswith("data.pkl") for name in names):
        return
    weights = [n for n in names if n.endswith((".pt", ".pth", ".ckpt", ".bin", ".model", ".safetensors"))]
    inside = ", ".join((weights or names)[:3])
    raise CheckpointUnreadable(
        f"{path}: is a zip archive (holding {inside}), not a checkpoint; unpack it and pass the folder or file inside"
    )


def _torch_load(path: Path, *, zipped: bool, allow_pickle: bool) -> Any:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": not allow_pickle}
    if allow_pickle:
        logger.warning("%s: opened with allow_pickle: the file may run code of its own", path)
    try:
        with contextlib.nullcontext() if allow_pickle else numpy_safe_globals():
            if zipped:
                try:
                    return torch.load(str(path), mmap=True, **options)
                except (RuntimeError, OSError) as error:
                    # Some network file systems cannot map files; what is really damaged fails again below.
                    logger.debug("%s: not memory-mapped: %s", path, error)
            return torch.load(str(path), **options)
    except CheckpointUnreadable:
        raise
    except Exception as error:
        # torch reports refused globals, damaged pickles and short reads as UnpicklingError, RuntimeError, EOFError,
        # ValueError, KeyError, ... depending on where the damage is; every one of them is turned into one error.
        raise CheckpointUnreadable(_explain(path, error, allow_pickle)) from error


def _explain(path: Path, error: Exception, allow_pickle: bool) -> str:
    message = str(error)
    found = _UNSUPPORTED_GLOBAL.search(message)
    if found and not allow_pickle:
        return (
            f"{path}: the pickle refers to {found.group(1)}, which is not a tensor or plain container and could run "
            "code when loaded, so it was refused; if you trust where the file comes from, pass allow_pickle=True "
            "(command line: --allow-pickle)"
        )
    if not allow_pickle and _UNSUPPORTED_INSTR.search(message):
        reason = re.search(r"WeightsUnpickler error: ([^\n]*)", message)
        return (
            f"{path}: damaged, or a pickle that the safe loader cannot open "
            f"({reason.group(1) if reason else message.splitlines()[0][:200]}); if you trust where the file comes "
            "from, try allow_pickle=True (command line: --allow-pickle)"
        )
    first = message.splitlines()[0][:200] if message else type(error).__name__
    return (
        f"{path}: truncated or damaged PyTorch file ({path.stat().st_size:,} bytes; {type(error).__name__}: {first}); "
        "delete it and fetch it again"
    )


def _load_safetensors(path: Path) -> LoadedFile:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        from ..errors import MissingPackage

        raise MissingPackage(f"{path} is a safetensors file; run: pip install safetensors") from error
    try:
        with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            data = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError, ValueError, json.JSONDecodeError) as error:
        raise CheckpointUnreadable(
            f"{path}: truncated or damaged safetensors file ({path.stat().st_size:,} bytes; {error}); "
            "delete it and fetch it again"
        ) from error
    return LoadedFile(data, metadata)
