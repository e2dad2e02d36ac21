"""What made a result: versions, git revision, command, machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["collect", "git_revision", "versions"]

_PACKAGES = (
    "s3prl-speaker-upstreams", "torch", "torchaudio", "numpy", "scipy", "s3prl", "espnet-s3prl", "transformers",
    "huggingface-hub", "speechbrain", "soundfile", "soxr", "librosa",
)  # fmt: skip


def versions(packages: tuple[str, ...] = _PACKAGES) -> dict[str, str]:
    """Versions of Python and of the packages that can change a number; those that are not installed are left out.

    >>> sorted(versions(("numpy", "not-a-package")))
    ['numpy', 'python']
    """
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision(folder: str | Path | None = None) -> str | None:
    """Commit of the checkout that holds ``folder`` (default: this package), with "-dirty" where tracked files differ.

    None outside git or without it.
    """
    where = ["git", "-C", str(folder or Path(__file__).resolve().parent)]
    try:
        head = _output([*where, "rev-parse", "HEAD"])
        changed = _output([*where, "status", "--porcelain", "-uno", "--", "."])
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("-dirty" if changed else "")


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def collect(**options: Any) -> dict[str, Any]:
    """Provenance of a result that is being made now; ``options`` are stored under "options".

    >>> sorted(collect(seed=1))
    ['command', 'created', 'git_revision', 'options', 'platform', 'versions']
    """
    return {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "platform": platform.platform(),
        "versions": versions(),
        "git_revision": git_revision(),
        "options": options,
    }
