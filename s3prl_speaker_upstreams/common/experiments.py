"""The checkpoints that s3prl's runner writes, read without running code from them."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from typing import Any

from s3prl_speaker_upstreams.errors import CheckpointUnreadable

__all__ = ["read_experiment"]


def read_experiment(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``run_downstream`` saved in a ``states-N.ckpt`` or ``dev-best.ckpt``: "Args", "Config", "Featurizer", ...

    Such a file holds an ``argparse.Namespace`` beside tensors and plain values; that class is let in, nothing else.

    Raises CheckpointUnreadable if the file is missing or cut off, or holds other objects.

    >>> import tempfile, torch
    >>> name = os.path.join(tempfile.mkdtemp(), "states-1.ckpt")
    >>> torch.save({"Args": argparse.Namespace(upstream="fbank"), "Step": 1}, name)
    >>> read_experiment(name)["Args"].upstream
    'fbank'
    """
    import torch

    if not os.path.isfile(path):
        raise CheckpointUnreadable(
            f"{path}: does not exist; expected a states-N.ckpt or dev-best.ckpt of s3prl's runner"
        )
    if not zipfile.is_zipfile(path):
        raise CheckpointUnreadable(f"{path}: is not a whole torch file; it was cut off or is something else")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0] if str(error) else "unknown content"
        raise CheckpointUnreadable(
            f"{path}: holds objects other than tensors, plain values and s3prl's options ({reason}); it was not "
            "loaded, for that could run code. Is it a checkpoint of s3prl's runner?"
        ) from error
    except (RuntimeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointUnreadable(f"{path}: is not a whole checkpoint ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointUnreadable(f"{path}: got a {type(found).__name__}, expected the dictionary of s3prl's runner")
    return found
