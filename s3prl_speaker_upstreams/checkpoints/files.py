"""Reading checkpoint files from disk, safely, and saying in plain words what a damaged or foreign file is.

Nothing here knows ECAPA-TDNN. :func:`open_file` gives the object that was saved (for PyTorch files) or the tensors and
metadata (for safetensors); :func:`sniff` tells what a file is from its first bytes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointMismatch, CheckpointUnreadable, MissingPackage

__all__ = ["File", "numpy_safe_globals", "open_file", "option", "sniff"]

logger = logging.getLogger(__name__)

_LFS = b"version https://git-lfs.github.com/spec"
_UNSUPPORTED_GLOBAL = re.compile(r"(?:GLOBAL|[Uu]nsupported class)\s+([\w.]+)")
_UNSUPPORTED_INSTR = re.compile(r"Can only build|not allowed|Unsupported operand|Trying to (?:load|instantiate|call)")


@dataclass(frozen=True)
class File:
    """An opened checkpoint file.

    path : where it is
    tensors : every tensor of the file by its path, the keys that lead to it joined with dots
    entries : the top-level keys
    metadata : of a safetensors file; None of others

    >>> sorted(File.of(Path("x.pt"), {"epoch": 3, "model": {"a.weight": torch.zeros(1)}}).tensors)
    ['model.a.weight']
    """

    path: Path
    tensors: Mapping[str, Tensor]
    entries: frozenset[str] = frozenset()
    metadata: Mapping[str, str] | None = None

    @classmethod
    def of(cls, path: Path, data: Any, metadata: Mapping[str, str] | None = None) -> File:
        """From the object that was saved.

        Raises CheckpointMismatch if it is neither a mapping nor a module.
        """
        if not isinstance(data, (Mapping, torch.nn.Module)):
            raise CheckpointMismatch(
                f"{path}: got a saved {type(data).__name__}, expected a mapping of names to tensors (a state dict)"
            )
        entries = frozenset(map(str, data)) if isinstance(data, Mapping) else frozenset()
        return cls(path, dict(_tensors(data, "", frozenset())), entries, metadata)


def _tensors(value: Any, path: str, above: frozenset[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    elif isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    # A pickle may hold a mapping that holds itself.
    if isinstance(value, Mapping) and id(value) not in above:
        for key, inner in value.items():
            yield from _tensors(inner, f"{path}.{key}" if path else str(key), above | {id(value)})


def option(name: str, value: str) -> str:
    """How to pass an option of reading, in each of the places where a user can.

    >>> option("format", "wespeaker")
    "--format wespeaker (format='wespeaker'; for run_downstream.py a yaml file with `format: wespeaker`, given with -g)"
    >>> option("allow_pickle", "True")[:36]
    '--allow-pickle (allow_pickle=True; f'
    """
    flag = f"--{name.replace('_', '-')}"
    if value == "True":
        return f"{flag} ({name}=True; for run_downstream.py a yaml file with `{name}: true`, given with -g)"
    return f"{flag} {value} ({name}={value!r}; for run_downstream.py a yaml file with `{name}: {value}`, given with -g)"


def sniff(path: str | os.PathLike) -> str:
    """What a file is, from its first bytes.

    Returns one of ``"zip"`` (PyTorch's current container), ``"pickle"`` (its old one), ``"safetensors"``, ``"tar"``,
    ``"gzip"``, ``"onnx"``, ``"hdf5"``, ``"numpy"``, ``"empty"``, ``"html"``, ``"git-lfs"``, ``"json"``, ``"text"``,
    ``"unknown"``.

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
    if head.startswith(b"\x89HDF\r\n"):
        return "hdf5"
    if head.startswith(b"\x93NUMPY"):
        return "numpy"
    # A protobuf whose first field is ONNX's small version number and whose second is the producer's name or the graph.
    if head[0] == 0x08 and len(head) > 2 and head[1] < 32 and head[2] in (0x12, 0x1A, 0x22, 0x3A):
        return "onnx"
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
    "onnx": "the file is an ONNX graph for inference, with its weights folded in; pass the PyTorch checkpoint that it "
    "was exported from",
    "hdf5": "the file is HDF5 (Keras or MATLAB), not a PyTorch checkpoint",
    "numpy": "the file is a NumPy array, not a checkpoint",
}


def _numpy_scalar_under(module: str) -> Any:
    """numpy's scalar constructor under the module path by which an older or newer numpy pickled it."""
    multiarray = importlib.import_module("numpy._core.multiarray" if hasattr(np, "_core") else "numpy.core.multiarray")

    def scalar(dtype: np.dtype, value: Any = None) -> Any:
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


def open_file(path: str | os.PathLike, *, allow_pickle: bool = False) -> File:
    """Read one checkpoint file to CPU memory.

    path : a PyTorch file (current or old container) or a ``.safetensors`` file
    allow_pickle : read pickles that hold more than tensors and plain containers. Such a file can run any code when it
        is opened, so only pass True for files from somebody you trust.

    PyTorch files in the current container are memory-mapped: an optimizer state beside the weights costs no memory.
    Their checksums (of a zip's members) are verified, about a second per gigabyte; PyTorch's old container and
    safetensors have none.

    Raises CheckpointUnreadable if the file is missing, damaged, no checkpoint, or needs `allow_pickle`.

    >>> import tempfile, pathlib, torch
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.pt"
    >>> torch.save({"weight": torch.ones(2)}, path)
    >>> open_file(path).tensors["weight"]
    tensor([1., 1.])
    """
    path = Path(path)
    try:
        kind = sniff(path)
    except FileNotFoundError as error:
        raise CheckpointUnreadable(
            f"{path}: no such file or folder (from {Path.cwd()}); pass the weights file or the folder that holds it"
        ) from error
    except IsADirectoryError as error:
        raise CheckpointUnreadable(f"{path}: is a folder; expected a file") from error
    except OSError as error:
        raise CheckpointUnreadable(f"{path}: cannot be read: {error}") from error
    if kind in _NOT_A_CHECKPOINT:
        raise CheckpointUnreadable(f"{path}: {_NOT_A_CHECKPOINT[kind]}")
    if kind == "tar":
        raise CheckpointUnreadable(f"{path}: {_describe_tar(path)}")
    if kind == "safetensors":
        return _open_safetensors(path)
    if kind == "unknown":
        raise CheckpointUnreadable(
            f"{path}: neither a PyTorch nor a safetensors file (first bytes {_first_bytes(path)}); "
            "it may be damaged: compare its size with the original's and fetch it again"
        )
    if kind == "zip":
        _check_torch_zip(path)
    return File.of(path, _torch_load(path, zipped=kind == "zip", allow_pickle=allow_pickle))


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
    """Tell a foreign, truncated or damaged zip from PyTorch's container, before torch does so in its own words."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            _check_is_torchs(path, names)
            # torch.serialization.set_crc32_options(False) leaves all checksums zero: nothing to hold the data against.
            if any(member.CRC for member in archive.infolist()):
                damaged = archive.testzip()
                if damaged is not None:
                    raise zipfile.BadZipFile(f"the checksum of {damaged} differs")
            else:
                logger.info("%s: was saved without checksums: that it is undamaged cannot be verified", path)
    # NotImplementedError, RuntimeError: a flipped bit in a member's flags asks for another compression or a password.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        if isinstance(error, CheckpointUnreadable):
            raise
        size = path.stat().st_size
        raise CheckpointUnreadable(
            f"{path}: truncated or damaged ({size:,} bytes; {error}); the download or copy was probably interrupted: "
            "delete it and fetch it again"
        ) from error


def _check_is_torchs(path: Path, names: list[str]) -> None:
    inside = {name.partition("/")[2] or name for name in names}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        raise CheckpointUnreadable(
            f"{path}: is a TorchScript program (torch.jit.save), not a checkpoint; pass the checkpoint that it was "
            "made from, or, if you trust it, save its weights: torch.save(torch.jit.load(PATH).state_dict(), "
            "'weights.pt')"
        )
    if any(name.endswith(("serialized_exported_program.json", "models/model.json")) for name in names):
        raise CheckpointUnreadable(
            f"{path}: is an exported program (torch.export), not a checkpoint; pass the checkpoint that it was made "
            "from"
        )
    if "data.pkl" in inside:
        return
    weights = [n for n in names if n.endswith((".pt", ".pth", ".ckpt", ".bin", ".model", ".safetensors"))]
    raise CheckpointUnreadable(
        f"{path}: is a zip archive (holding {', '.join((weights or names)[:3])}), not a checkpoint; unpack it and pass "
        "the folder or file inside"
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
        raise CheckpointUnreadable(_explain(path, error, allow_pickle, zipped)) from error


def _explain(path: Path, error: Exception, allow_pickle: bool, zipped: bool) -> str:
    message = str(error)
    first = message.splitlines()[0][:200] if message else type(error).__name__
    found = _UNSUPPORTED_GLOBAL.search(message)
    trust = f"if you trust where the file comes from, pass {option('allow_pickle', 'True')}"
    if found and not allow_pickle:
        if _holds_module(path, zipped):
            return (
                f"{path}: is a whole pickled module ({found.group(1)}), not a state dict, and opening it could run "
                "code, so it was refused. Where that class can be imported, save its weights: "
                f"torch.save(model.state_dict(), 'weights.pt'); or, {trust}"
            )
        return (
            f"{path}: the pickle refers to {found.group(1)}, which is not a tensor or plain container and could run "
            f"code when loaded, so it was refused; {trust}"
        )
    if isinstance(error, (ImportError, AttributeError)) and allow_pickle:
        return (
            f"{path}: the pickle needs code that is not here ({first}); open it where its project is installed and "
            "save the weights: torch.save(model.state_dict(), 'weights.pt')"
        )
    if not zipped and not _begins_as_torchs(path):
        return (
            f"{path}: is a Python pickle that torch.save did not write; load it where it was made and save the "
            "weights: torch.save(state_dict, 'weights.pt')"
        )
    if not allow_pickle and _UNSUPPORTED_INSTR.search(message):
        reason = re.search(r"WeightsUnpickler error: ([^\n]*)", message)
        what = reason.group(1) if reason else first
        if zipped:  # its checksums are right
            return f"{path}: the safe loader cannot open this pickle ({what}); {trust}"
        return f"{path}: damaged, or a pickle that the safe loader cannot open ({what}); {trust}"
    return (
        f"{path}: truncated or damaged PyTorch file ({path.stat().st_size:,} bytes; {type(error).__name__}: {first}); "
        "delete it and fetch it again"
    )


def _begins_as_torchs(path: Path) -> bool:
    """Whether a pickle begins with the number that marks PyTorch's old container."""
    with open(path, "rb") as file:
        return torch.serialization.MAGIC_NUMBER.to_bytes(10, "little") in file.read(32)


def _holds_module(path: Path, zipped: bool) -> bool:
    """Whether the pickle of a file is of a module's attributes."""
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        else:
            with open(path, "rb") as file:
                pickled = file.read(10_000_000)
    except (OSError, zipfile.BadZipFile, StopIteration):
        return False
    return all(word in pickled for word in (b"_parameters", b"_buffers", b"_modules"))


def _open_safetensors(path: Path) -> File:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
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
    return File.of(path, data, metadata)
