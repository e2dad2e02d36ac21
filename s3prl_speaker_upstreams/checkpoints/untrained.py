"""Random weights that say so: for trying a pipeline where no trained weights can be had, and as a baseline."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..ecapa import DIALECTS, Ecapa, Frontend, FrontendConfig
from ..errors import ConfigError
from .checkpoint import Checkpoint

__all__ = ["untrained"]


def untrained(dialect: str = "speechbrain", *, seed: int = 0, **fields: Any) -> Checkpoint:
    """A network that was never trained: PyTorch's default random weights, drawn with a seed.

    dialect : whose architecture and front-end, a name in ``ecapa.DIALECTS``
    seed : of the weights; the same seed gives the same weights, and the global random state is left alone
    fields : of EcapaConfig or FrontendConfig, such as ``channels=256`` or ``kind="mfcc"``; the network's ``n_mels``
        follows the front-end

    Returns a Checkpoint of role "untrained", which every reader reports. Raises ConfigError for an unknown dialect.

    >>> checkpoint = untrained(channels=16, mfa_channels=24)
    >>> checkpoint.role, checkpoint.provenance["training_data"]
    ('untrained', 'none: random weights, seed 0')
    """
    if dialect not in DIALECTS:
        raise ConfigError(f"got dialect={dialect!r}, expected one of {', '.join(DIALECTS)}")
    of_frontend = {f.name for f in dataclasses.fields(FrontendConfig)}
    frontend = DIALECTS[dialect].frontend.replace(**{k: v for k, v in fields.items() if k in of_frontend})
    rest = {k: v for k, v in fields.items() if k not in of_frontend}
    config = DIALECTS[dialect].ecapa_config(**{**rest, "n_mels": frontend.width})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = {name: tensor.clone() for name, tensor in Ecapa(config).state_dict().items()}
    buffers = Frontend(frontend).own_tensors()
    provenance = {"training_data": f"none: random weights, seed {seed}", "dialect": dialect, "torch": torch.__version__}
    return Checkpoint(config, frontend, state, "native", "untrained", provenance, buffers)
