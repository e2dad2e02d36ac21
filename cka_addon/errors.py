"""Errors of cka_addon. Every message says what was got, what was expected and what to do about it."""

from __future__ import annotations


class CkaError(Exception):
    """Base of every error that this package raises on purpose."""


class SpecError(CkaError, ValueError):
    """A model specification, option or argument that cannot be used."""


class AudioError(CkaError, ValueError):
    """Audio that is missing, unreadable or empty."""


class StoreError(CkaError, ValueError):
    """A feature store that is incomplete, damaged or does not fit what was asked of it."""


class MergeError(CkaError, ValueError):
    """Shards that do not belong together, overlap or are missing."""


class TooFewExamples(CkaError, ValueError):
    """Fewer examples than the estimator needs (4 for the unbiased one)."""


class ConstantLayer(CkaError, ValueError):
    """A layer that does not vary over the examples: CKA with it is 0 / 0."""


class NonFinite(CkaError, ValueError):
    """NaN or infinite features, with the layer and the utterance that hold them."""


class CheckpointError(CkaError, ValueError):
    """An s3prl downstream checkpoint that is not one, or cannot be read safely."""


class MissingPackage(CkaError, ImportError):
    """An optional package is not installed; the message holds the line that installs it."""


def require(module: str, install: str, purpose: str):
    """Import an optional package or say how to get it.

    >>> require("json", "pip install json", "this example").dumps([1])
    '[1]'
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(
            f"{purpose} needs the package '{module}', which could not be imported ({error}); install it: {install}"
        ) from error
