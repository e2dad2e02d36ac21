"""Names that s3prl imports from packages without ever using them; they raise when used."""

from __future__ import annotations

from typing import Any

from s3prl_speaker_upstreams.errors import MissingPackage

__all__ = ["Transformer"]


class Transformer:
    """Stands for ``sox.Transformer``, imported and unused by s3prl/downstream/sv_voxceleb1/dataset.py."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise MissingPackage("sox.Transformer: the Python package sox is not installed; pip install sox")
