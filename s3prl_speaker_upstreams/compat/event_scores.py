"""Names of sed_eval and dcase_util that ``s3prl.problem`` imports for HEAR's event detection; they raise when used.

No task of SUPERB uses them, but ``import s3prl.problem`` imports all problems at once.
"""

from __future__ import annotations

import sys
from typing import Any

from s3prl_speaker_upstreams.errors import MissingPackage

__all__ = ["EventBasedMetrics", "MetaDataContainer", "SegmentBasedMetrics", "SoundEventMetrics", "sound_event"]


class SoundEventMetrics:
    """Stands for the metrics of ``sed_eval.sound_event``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise MissingPackage(f"{type(self).__name__}: sed_eval is not installed; pip install sed_eval")


class SegmentBasedMetrics(SoundEventMetrics):
    pass


class EventBasedMetrics(SoundEventMetrics):
    pass


class MetaDataContainer(SoundEventMetrics):
    """Stands for ``dcase_util.containers.MetaDataContainer``, which comes with sed_eval."""


sound_event = sys.modules[__name__]
