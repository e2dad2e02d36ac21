"""torchaudio refuses to be imported beside a torch that was built for another CUDA release.

2.11 is torchaudio's last release, while torch goes on; what pip installs together from the two names alone is a pair of
different CUDA releases. Nothing that s3prl uses of torchaudio runs CUDA code of torchaudio's own, and its extension has
been built against torch's stable interface since 2.9. The check becomes a line in the log there.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

__all__ = ["checks_the_release", "warn_instead"]

logger = logging.getLogger(__name__)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def checks_the_release(module: ModuleType) -> bool:
    """Whether this torchaudio (2.9 or later) refuses this torch, which is of a later release than itself."""
    import importlib.metadata

    import torch

    if not hasattr(module, "_check_cuda_version"):
        return False
    try:
        ours = _release(importlib.metadata.version("torchaudio"))
    except importlib.metadata.PackageNotFoundError:
        return False
    return (2, 9) <= ours < _release(torch.__version__)


def warn_instead(module: Any) -> None:
    """torchaudio/_extension/utils.py: ``_check_cuda_version`` logs what it would raise."""
    original = module._check_cuda_version

    @functools.wraps(original)
    def _check_cuda_version() -> Any:
        try:
            return original()
        except RuntimeError as error:
            logger.info("torchaudio's own CUDA kernels cannot be used, and s3prl uses none: %s", error)
            return None

    module._check_cuda_version = _check_cuda_version
