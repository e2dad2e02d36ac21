"""ECAPA-TDNN and DINO-ECAPA-TDNN as s3prl / SUPERB upstreams with per-block hidden states."""

from __future__ import annotations

__version__ = "0.1.0"
