"""What made a result: versions, git revision, checkpoint hashes, options; and files that appear whole or not at all."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_PACKAGES = (
    "s3prl-speaker-upstreams",
    "torch",
    "torchaudio",
    "numpy",
    "scipy",
    "s3prl",
    "transformers",
    "soundfile",
    "soxr",
)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_revision(folder: Path | None = None) -> str | None:
    """Commit of the checkout that holds this package, with "-dirty" where files were changed; None outside git."""
    folder = folder or Path(__file__).resolve().parent
    try:
        head = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "-uno", "--", "."],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("-dirty" if changed else "")


def collect(**options: object) -> dict[str, object]:
    """Provenance of a result that is being made now; `options` are stored under "options".

    >>> sorted(collect(seed=1))
    ['command', 'created', 'git_revision', 'options', 'platform', 'versions']
    """
    return {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "platform": platform.platform(),
        "versions": dict(versions()),
        "git_revision": git_revision(),
        "options": options,
    }


def file_sha256(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def weights_sha256(module: torch.nn.Module) -> str:
    """Hex SHA-256 of the names, types, shapes and values of a module's state: the same however it was stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_atomically(path: str | os.PathLike, write: Callable[[Path], object]) -> Path:
    """Call `write` on a temporary path beside `path`, then rename: `path` appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The ending stays at the end: savefig and others read the format from it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: str | os.PathLike, data: object) -> Path:
    """Write JSON atomically; NaN and infinity are refused, they have no place in a result."""
    text = json.dumps(data, indent=1, allow_nan=False, default=str)
    return write_atomically(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))
