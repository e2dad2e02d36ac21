"""Errors of the probes. Every message says what was got, what was expected and what to do about it."""

from __future__ import annotations

from cka_addon.errors import CkaError


class LabelError(CkaError, ValueError):
    """Labels that cannot be read, match no utterance, or do not fit the question."""


class FoldError(CkaError, ValueError):
    """Groups that cannot be dealt to folds, or folds that share a group."""


class ProbeError(CkaError, ValueError):
    """A probe that cannot be fitted, or options that contradict each other."""
