"""Identity by content: SHA-256 of files, of a network's state, and of plain data."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["file_sha256", "json_sha256", "state_sha256"]

_CHUNK = 1 << 20


def file_sha256(path: str | os.PathLike[str], description: str | None = None) -> str:
    """SHA-256 of a file, hexadecimal; with a ``description`` a bar appears if it takes over two seconds.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as empty:
    ...     file_sha256(empty.name)[:8]
    'e3b0c442'
    """
    from tqdm import tqdm

    digest = hashlib.sha256()
    bar = tqdm(
        total=os.path.getsize(path), desc=description, unit="B", unit_scale=True, delay=2, leave=False,
        disable=description is None or not sys.stderr,
    )  # fmt: skip
    with open(path, "rb") as file, bar:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and values of a ``state_dict``: the same however it was stored.

    >>> import torch
    >>> a, b = {"w": torch.ones(2)}, {"w": torch.ones(2).view(2, 1)}
    >>> state_sha256(a) == state_sha256({"w": torch.ones(2)}), state_sha256(a) == state_sha256(b)
    (True, False)
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(plain.numpy().data)
    return digest.hexdigest()


def json_sha256(data: Any) -> str:
    """SHA-256 of plain data (what JSON can hold), whatever the order of its keys.

    >>> json_sha256({"a": 1, "b": [2]}) == json_sha256({"b": [2], "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()
