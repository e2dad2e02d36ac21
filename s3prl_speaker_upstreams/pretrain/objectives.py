"""Which objective a configuration names."""

from __future__ import annotations

from .config import PretrainConfig
from .dino import Dino
from .objective import CropEncoder, Objective, build_network, model_configs
from .pairs import Simclr, Vicreg
from .supervised import Supervised

__all__ = ["build_objective"]


def build_objective(config: PretrainConfig, classes: int = 0) -> Objective:
    """The objective that ``config.method`` names around a new encoder.

    >>> from .config import load
    >>> type(build_objective(load("smoke"))).__name__
    'Dino'
    """
    ecapa, frontend = model_configs(config.model)
    encoder = CropEncoder(build_network(ecapa, frontend), config.run.precision, config.run.compile, frontend)
    dim = ecapa.embedding_dim
    if config.method == "dino":
        return Dino(encoder, dim, config.dino)
    if config.method == "simclr":
        return Simclr(encoder, dim, config.simclr)
    if config.method == "vicreg":
        return Vicreg(encoder, dim, config.vicreg)
    return Supervised(encoder, dim, config.aam, classes)
