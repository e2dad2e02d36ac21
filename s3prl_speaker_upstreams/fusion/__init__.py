"""``-u fusion``: several upstreams as one, whose layers one probe weighs together.

>>> from s3prl_speaker_upstreams.fusion import parse
>>> [member.upstream for member in parse("wavlm_base_plus+ecapa_dino").members]
['wavlm_base_plus', 'ecapa_dino']
"""

from __future__ import annotations

from s3prl_speaker_upstreams.fusion.config import FusionConfig, Member, parse

__all__ = ["FusionConfig", "Member", "parse"]
