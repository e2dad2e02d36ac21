"""Errors raised by the stand-ins; each says what was got, what was expected and what to do."""

from __future__ import annotations

from s3prl_speaker_upstreams.errors import SpeakerUpstreamError

__all__ = ["AudioUnreadable", "RemovedApi", "UnsupportedAudioOption", "UnsupportedEffect"]


class RemovedApi(SpeakerUpstreamError, RuntimeError):
    """Something that current packages removed was really used, and nothing equal can be supplied."""


class AudioUnreadable(SpeakerUpstreamError, OSError, RuntimeError):
    """An audio file is missing, truncated or not audio (also a RuntimeError, as torchaudio's own was)."""


class UnsupportedAudioOption(SpeakerUpstreamError, ValueError):
    """A torchaudio I/O argument that the stand-in does not carry out."""


class UnsupportedEffect(SpeakerUpstreamError, ValueError):
    """A sox effect, or an option of one, outside channels / rate / gain / silence."""
