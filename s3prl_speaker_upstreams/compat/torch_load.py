"""``torch.load`` for the checkpoints that s3prl itself writes, and for nothing else.

Since torch 2.6 ``torch.load`` refuses every class that is not a tensor or a plain container. s3prl's checkpoints hold
one: the ``argparse.Namespace`` of the command line. Loading is never made unsafe: the file is read by the same
restricted unpickler, with that one class (which runs no code) allowed, and only after it has shown s3prl's own keys.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["NamespaceLoader", "is_experiment", "load", "namespaces_are_refused"]

# top-level keys of what s3prl's runners save (downstream/runner.py:401, pretrain/runner.py:253), and the older layout
# that its pre-trained upstreams still have (utility/helper.py:139)
_LAYOUTS = ({"Args", "Config"}, {"Settings"})


def namespaces_are_refused() -> bool:
    """Whether this torch's default refuses a checkpoint that holds an ``argparse.Namespace``."""
    buffer = io.BytesIO()
    torch.save({"Args": argparse.Namespace()}, buffer)
    buffer.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            torch.load(buffer)
        except pickle.UnpicklingError:
            return True
    return False


def _pickle_of(file: Any) -> bytes | None:
    """The pickle inside a torch checkpoint (zip format, or the first 16 MiB of the old one), without running it."""
    if isinstance(file, str) or hasattr(file, "__fspath__"):
        with open(os.fspath(file), "rb") as stream:
            return _pickle_of(stream)
    start = file.tell()
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                names = [name for name in archive.namelist() if name.endswith("data.pkl")]
                return archive.read(names[0]) if names else None
        file.seek(start)
        return file.read(1 << 24)
    finally:
        file.seek(start)


def is_experiment(file: Any) -> bool:
    """Whether a torch checkpoint names the keys that s3prl's own runners save.

    Looks at the pickle's instructions; nothing is unpickled.
    """
    data = _pickle_of(file)
    if data is None:
        return False
    strings: set[str] = set()
    stream = io.BytesIO(data)
    try:
        for _ in range(4):  # the old format has three small pickles before the one with the content
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("BINUNICODE", "SHORT_BINUNICODE", "UNICODE"):
                    strings.add(str(argument))
    except ValueError:  # the end of what was read
        pass
    return any(keys <= strings for keys in _LAYOUTS)


class NamespaceLoader:
    """``torch.load`` that tries again, with ``argparse.Namespace`` allowed, for s3prl's own checkpoints.

    original : the ``torch.load`` in place before
    """

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, f: Any, *args: Any, **kwargs: Any) -> Any:
        seekable = hasattr(f, "seek") and hasattr(f, "tell")
        start = f.tell() if seekable else 0
        try:
            return self.original(f, *args, **kwargs)
        except pickle.UnpicklingError as error:
            if "argparse.Namespace" not in str(error) or kwargs.get("weights_only") is not None:
                raise  # whoever says what they want gets that
            if seekable:
                f.seek(start)
            if not is_experiment(f):
                raise
        with torch.serialization.safe_globals([argparse.Namespace]):
            return self.original(f, *args, **kwargs)


_loader = NamespaceLoader(torch.load)


def load(f: Any, *args: Any, **kwargs: Any) -> Any:
    """torch's own ``torch.load``, which also reads the experiment checkpoints of s3prl's runners.

    Raises what torch raises: any class but ``argparse.Namespace``, and any file of another layout, stays refused.
    """
    return _loader(f, *args, **kwargs)


def put_in_place() -> None:
    """Replace ``torch.load``, keeping whatever was there (another package may have wrapped it) as the reader."""
    if torch.load is not load:
        _loader.original = torch.load
        torch.load = load
