"""Starting from weights (``model.init``): what they are, what is taken from them, and what is new.

The weights decide the network and the front-end; what the configuration says itself changes them (see
:class:`.config.ModelConfig`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import read_checkpoint
from ..common.hints import did_you_mean
from ..ecapa import EcapaConfig, FrontendConfig
from ..ecapa.config import DIALECTS
from ..errors import CheckpointMismatch, CheckpointUnreadable
from ..weights import REGISTRY, resolve
from .checkpointing import CheckpointStore, is_run_checkpoint
from .config import ModelConfig, PretrainConfig, read_yaml
from .export import encoder_of, find_checkpoint
from .objective import Objective, model_configs, network_state

__all__ = ["Start", "adopted", "begin_from", "read_start"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Weights to start from.

    source : as ``model.init`` named them
    ecapa, frontend : their network and front-end
    encoder : state of the ECAPA-TDNN
    run : the whole state, if it is a checkpoint of a run of ours
    """

    source: str
    ecapa: EcapaConfig
    frontend: FrontendConfig
    encoder: Mapping[str, Tensor]
    run: dict[str, Any] | None = None


def read_start(source: str) -> Start:
    """The weights that ``model.init`` names: a registry name, or a file or folder of any readable format.

    Raises CheckpointUnreadable or CheckpointMismatch if there are none or they cannot be read.
    """
    path = Path(source).expanduser()
    if (path / "checkpoints").is_dir() or is_run_checkpoint(path):
        state = CheckpointStore.load(find_checkpoint(path))
        encoder, role = encoder_of(state)
        logger.info("model.init: %s is a run of ours (%s, step %d): its %s", source, state["config"]["method"],
                    state["step"], role)  # fmt: skip
        return Start(source, encoder.ecapa.cfg, encoder.frontend.cfg, network_state(encoder), state)
    if not path.exists() and source in REGISTRY:
        entry = REGISTRY[source]
        options: dict[str, Any] = {"frontend": entry.frontend} if entry.frontend else {}
        checkpoint = read_checkpoint(resolve(source), format=entry.format, **options)
    elif path.exists():
        checkpoint = read_checkpoint(path)
    else:
        raise CheckpointUnreadable(
            f"model.init={source}: no such file or folder, and no name of the registry; "
            f"{did_you_mean(source, REGISTRY)}"
        )
    filters: dict[str, Tensor] = {}
    if checkpoint.frontend.kind == "wave":
        filters = {f"bank.{name}": tensor for name, tensor in checkpoint.frontend_buffers.items()}
    else:
        _check_buffers(source, checkpoint.frontend, checkpoint.frontend_buffers)
    return Start(source, checkpoint.ecapa, checkpoint.frontend, {**checkpoint.state, **filters})


def _check_buffers(source: str, config: FrontendConfig, buffers: Mapping[str, Tensor]) -> None:
    """A front-end's own window and mel filters must be those of its configuration: training computes them."""
    from ..ecapa import Frontend

    made = Frontend(config)
    for name, given in buffers.items():
        if not torch.allclose(given, getattr(made, name), atol=1e-4):
            raise CheckpointMismatch(
                f"model.init={source}: carries a {name} of its own that its front-end's configuration does not give; "
                "training from it would use other features"
            )


def adopted(model: ModelConfig, out: str | Path | None = None) -> tuple[ModelConfig, Start | None]:
    """``model`` with the network and front-end of its ``init`` spelled out, and the weights to load.

    A run that goes on in ``out`` has taken them already: its own record holds, and the source need not be there any
    more; then the second value is None.
    """
    if not model.init:
        return model, None
    start, (ecapa, frontend) = None, (None, None)
    if out is not None and CheckpointStore(Path(out) / "checkpoints").paths():
        record = PretrainConfig.from_dict(read_yaml(Path(out) / "config.yaml")).model
        if record.init == model.init:
            ecapa, frontend = model_configs(record)
    if ecapa is None or frontend is None:
        start = read_start(model.init)
        ecapa, frontend = start.ecapa, start.frontend
    theirs = frontend
    if model.dialect != "native":
        frontend = DIALECTS[model.dialect].frontend
    ecapa, frontend = ecapa.replace(**model.ecapa), frontend.replace(**model.frontend)
    if start is not None and frontend != theirs:
        logger.warning("model.init=%s: its network is trained on with another front-end than its own, as asked",
                       model.init)  # fmt: skip
    spelled = dataclasses.replace(
        model, dialect="native", ecapa=ecapa.to_dict(), frontend=frontend.to_dict(), init=model.init
    )
    return spelled, start


def begin_from(objective: Objective, start: Start, config: PretrainConfig, data: Mapping[str, Any]) -> str:
    """Load weights into a new objective; returns what was taken and what is new.

    Of a run of the same objective everything is taken, for classifiers only if the speakers are the same ones.

    Raises CheckpointMismatch if the network was made another one.
    """
    run = start.run
    if run is not None and run["config"]["method"] == config.method:
        mine = {k: v.shape for k, v in objective.state_dict().items()}
        same_shapes = mine == {k: v.shape for k, v in run["task"].items()}
        if same_shapes and (config.method != "supervised" or _same_speakers(run["data"], data)):
            objective.load_state_dict(run["task"])
            return f"all weights of {start.source}"
    ours, theirs = next(iter(objective.networks().values())).cfg.to_dict(), start.ecapa.to_dict()
    different = [f"{k}: {theirs[k]} there, {ours[k]} here" for k in ours if ours[k] != theirs[k]]
    if different:
        raise CheckpointMismatch(
            f"model.init={start.source}: another network: {'; '.join(different)}; leave model.ecapa to the checkpoint"
        )
    for network in objective.networks().values():
        network.load_state_dict(start.encoder)
    what = {"dino": "head and prototypes are", "supervised": "the classifier is"}.get(config.method, "the projector is")
    return f"the network of {start.source}; {what} new"


def _same_speakers(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    if theirs.get("speaker_names") and ours.get("speaker_names"):
        return theirs["speaker_names"] == ours["speaker_names"]
    return theirs.get("fingerprint") == ours.get("fingerprint")  # a run of an earlier version
