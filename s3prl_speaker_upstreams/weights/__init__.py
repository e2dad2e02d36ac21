"""Named weights: the registry of public checkpoints, and finding or downloading the file of one.

>>> from s3prl_speaker_upstreams.weights import REGISTRY
>>> REGISTRY["ecapa_tdnn"].format, REGISTRY["ecapa_dino"].eer
('speechbrain', 3.16)
"""

from __future__ import annotations

from .cache import by_hand_path, cache_folder, cached, hub_cache_folder, resolve
from .downloader import download
from .registry import REGISTRY, PublicCheckpoint, lookup

__all__ = [
    "REGISTRY",
    "PublicCheckpoint",
    "by_hand_path",
    "cache_folder",
    "cached",
    "download",
    "hub_cache_folder",
    "lookup",
    "resolve",
]
