"""Checkpoints of every public ECAPA-TDNN: reading them, and this package's own format.

>>> from s3prl_speaker_upstreams.checkpoints import FORMATS
>>> FORMATS
('native', 'speechbrain', 'sslsv', 'taoruijie', '3dspeaker', 'rdino', 'sdpn', 'wespeaker')
"""

from __future__ import annotations

from .checkpoint import ROLES, Checkpoint, build_encoder, expected_shapes
from .detection import FORMATS, detect
from .formats.native import save_native
from .networks import COPIES
from .reading import detect_format, find_file, load_encoder, read_checkpoint
from .untrained import untrained

__all__ = [
    "COPIES",
    "FORMATS",
    "ROLES",
    "Checkpoint",
    "build_encoder",
    "detect",
    "detect_format",
    "expected_shapes",
    "find_file",
    "load_encoder",
    "read_checkpoint",
    "save_native",
    "untrained",
]
