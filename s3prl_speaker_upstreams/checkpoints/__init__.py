"""Checkpoints of every public ECAPA-TDNN: reading them, and this package's own format.

>>> from s3prl_speaker_upstreams.checkpoints import FORMATS
>>> FORMATS
('speechbrain', '3dspeaker', 'wespeaker', 'rdino', 'sdpn', 'sslsv', 'taoruijie', 'native')
"""

from __future__ import annotations

from .native import save_native
from .readers import FORMATS, ROLES, Checkpoint, build_encoder, detect_format, load_encoder, read_checkpoint
from .untrained import untrained

__all__ = [
    "FORMATS",
    "ROLES",
    "Checkpoint",
    "build_encoder",
    "detect_format",
    "load_encoder",
    "read_checkpoint",
    "save_native",
    "untrained",
]
