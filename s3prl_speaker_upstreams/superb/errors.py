"""Errors of the SUPERB recipes; each says what was found, what was expected, and the remedy."""

from __future__ import annotations

from s3prl_speaker_upstreams.errors import SpeakerUpstreamError

__all__ = [
    "CorpusError",
    "IdentityMismatch",
    "NoSpaceLeft",
    "RunFailed",
    "ScoringError",
    "UnknownTask",
    "UnknownUpstream",
]


class CorpusError(SpeakerUpstreamError, ValueError):
    """A corpus is absent, incomplete, of another sample rate, or holds damaged audio."""


class IdentityMismatch(SpeakerUpstreamError, ValueError):
    """Finished work was made from something else than this run; the message names the first field that differs."""


class UnknownTask(SpeakerUpstreamError, ValueError):
    """A task of that name does not exist; the message lists those that do."""


class UnknownUpstream(UnknownTask):
    """s3prl knows no upstream of that name, or the upstream gives no feature of that name."""


class ScoringError(SpeakerUpstreamError, ValueError):
    """Predictions and references do not belong together, or there is nothing to score."""


class RunFailed(SpeakerUpstreamError, RuntimeError):
    """The stock s3prl runner ended with an error; the message holds the last lines it wrote."""


class NoSpaceLeft(SpeakerUpstreamError, OSError):
    """The disk is, or will be, too full for the checkpoints of a run."""
