"""Errors of this package: each message says what was got, what was expected, and what to do about it.

Every class is a :class:`SpeakerUpstreamError` and also the built-in that callers would catch anyway, so
``except ValueError`` in existing code keeps working.

>>> from s3prl_speaker_upstreams.errors import BadWaveform
>>> issubclass(BadWaveform, ValueError)
True
"""

from __future__ import annotations

__all__ = [
    "BadAudio",
    "BadWaveform",
    "Busy",
    "CheckpointMismatch",
    "CheckpointUnreadable",
    "ConfigError",
    "DamagedAudio",
    "DownloadError",
    "MissingPackage",
    "SpeakerUpstreamError",
]


class SpeakerUpstreamError(Exception):
    """Base class of every error that this package raises on purpose."""


class CheckpointUnreadable(SpeakerUpstreamError, OSError):
    """A checkpoint file is missing, truncated, or not a file that PyTorch or safetensors can read safely."""


class CheckpointMismatch(SpeakerUpstreamError, ValueError):
    """A checkpoint was read, but its keys or shapes are not those of the expected format."""


class BadWaveform(SpeakerUpstreamError, ValueError):
    """A waveform is empty, non-finite, of integer type, not one-dimensional, or the list of them is empty."""


class BadAudio(BadWaveform, OSError):
    """A recording is unusable: it cannot be opened or decoded, or its header claims an impossible rate."""


class DamagedAudio(BadAudio):
    """A recording is cut off, empty, or holds values that are not finite."""


class Busy(SpeakerUpstreamError, OSError):
    """Another process is at work on the same folder or file."""


class ConfigError(SpeakerUpstreamError, ValueError):
    """A configuration key or value is unknown or out of range."""


class DownloadError(SpeakerUpstreamError, OSError):
    """A file could not be downloaded or failed its checksum; the message says where to put it by hand."""


class MissingPackage(SpeakerUpstreamError, ImportError):
    """An optional package is needed; the message holds the ``pip install`` line."""
