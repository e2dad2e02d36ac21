"""The ECAPA-TDNN family: one front-end and one model whose differences are named configuration fields."""

from .config import DIALECTS, Dialect, EcapaConfig, FrontendConfig
from .frontend import Frontend
from .model import OUTPUTS, Ecapa, SpeakerEncoder
from .ragged import Ragged

__all__ = [
    "DIALECTS",
    "OUTPUTS",
    "Dialect",
    "Ecapa",
    "EcapaConfig",
    "Frontend",
    "FrontendConfig",
    "Ragged",
    "SpeakerEncoder",
]
