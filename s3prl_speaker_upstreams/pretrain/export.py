"""From a run's checkpoint to a file that ``-u ecapa_dino_local -k FILE`` takes, saying where it comes from."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..checkpoints import Checkpoint, read_checkpoint, save_native
from ..common.files import write_text, write_whole
from ..common.provenance import git_revision
from ..ecapa import SpeakerEncoder
from ..errors import CheckpointMismatch, CheckpointUnreadable, ConfigError
from .checkpointing import CheckpointStore, is_run_checkpoint
from .config import PretrainConfig
from .norms import recalibrate_norms
from .objective import ENCODERS, encoder_from, model_configs, roles_of

__all__ = [
    "average_checkpoints",
    "average_states",
    "encoder_of",
    "export",
    "export_state",
    "find_checkpoint",
    "model_card",
]

logger = logging.getLogger(__name__)


def find_checkpoint(run: str | Path, which: str = "newest") -> Path:
    """A checkpoint file of a run: ``newest``, ``best`` or a step number; ``run`` may be the file itself.

    Raises CheckpointUnreadable if there is none.
    """
    run = Path(run)
    if run.is_file():
        return run
    store = CheckpointStore(run / "checkpoints")
    paths = store.paths()
    if not paths:
        raise CheckpointUnreadable(f"{run}: no checkpoints/step_*.pt; expected the --out folder of a `pretrain` run")
    if which == "newest":
        return paths[-1]
    if which == "best":
        best = store.best()
        if best is None or not best[0].exists():
            raise CheckpointUnreadable(f"{run}: no best checkpoint; train with eval.trials=..., or use newest")
        return best[0]
    wanted = run / "checkpoints" / f"step_{int(which):08d}.pt" if which.isdigit() else None
    if wanted is None or not wanted.exists():
        steps = ", ".join(str(store.step_of(p)) for p in paths)
        raise CheckpointUnreadable(f"{run}: no checkpoint {which!r}; expected newest, best or one of the steps {steps}")
    return wanted


def encoder_of(state: dict[str, Any], role: str | None = None) -> tuple[SpeakerEncoder, str]:
    """The speaker encoder in a run's checkpoint and its role.

    role : "teacher" (default of DINO) or "student"; "supervised" for a classifier, "student" for SimCLR and VICReg.
    Raises ConfigError for another.
    """
    config = PretrainConfig.from_dict(state["config"])
    valid = roles_of(config.method)
    role = role or valid[0]
    if role not in valid:
        raise ConfigError(f"role {role!r}: this {config.method} run has {' and '.join(valid)}")
    prefix = ENCODERS[config.method][role]
    weights = {k[len(prefix) :]: v for k, v in state["task"].items() if k.startswith(prefix)}
    return encoder_from(weights, *model_configs(config.model)), role


def _metrics_at(run: Path, step: int) -> dict[str, Any]:
    """The numbers that the log has of a step; where it has none of a kind, the newest before, with their step."""
    merged: dict[str, Any] = {}
    log = run / "metrics.jsonl"
    if log.exists():
        for line in log.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
                if record["step"] > step:
                    continue
            except (ValueError, KeyError, TypeError):
                continue
            if "eer" in record and "loss" not in record:
                record["evaluated_at_step"] = record.pop("step")
            merged.update(record)
    return merged


def export(
    run: str | Path,
    destination: str | Path,
    *,
    which: str = "newest",
    role: str | None = None,
    calibration: Iterable[Sequence[Tensor]] | None = None,
    fp16: bool = False,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write a run's encoder in this project's format, with provenance.

    run : the ``--out`` folder of a run, or one of its checkpoints. destination : file (``.safetensors``) or folder.
    calibration : batches of waveforms (lists of 1-D tensors) to measure BatchNorm statistics on anew, or None to keep
    those of the checkpoint. extra : entries added to the provenance (licence, metrics measured afterwards, ...).
    """
    path = find_checkpoint(run, which)
    return export_state(
        CheckpointStore.load(path), path, destination, role=role, calibration=calibration, fp16=fp16, extra=extra
    )


def export_state(
    state: dict[str, Any],
    path: Path,
    destination: str | Path,
    *,
    role: str | None = None,
    calibration: Iterable[Sequence[Tensor]] | None = None,
    fp16: bool = False,
    extra: dict[str, Any] | None = None,
) -> Path:
    """As :func:`export`, of the state in memory; ``path`` : where its checkpoint is, or would be."""
    encoder, role = encoder_of(state, role)
    norm_policy = f"as trained ({state['config']['dino']['teacher_norm']})" if role == "teacher" else "as trained"
    if calibration is not None:
        count = recalibrate_encoder(encoder, calibration)
        norm_policy = f"recalibrated on {count} batches of unaugmented speech"
    provenance = provenance_of(state, path, norm_policy)
    provenance.update(extra or {})
    written = save_native(encoder, destination, provenance, role=role, fp16=fp16)
    logger.info("%s of %s (step %d) written to %s", role, path, state["step"], written)
    return Path(written)


def recalibrate_encoder(encoder: SpeakerEncoder, batches: Iterable[Sequence[Tensor]]) -> int:
    """:func:`.norms.recalibrate_norms` on batches of waveforms; returns their number."""

    class _Run(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, wavs: Sequence[Tensor]) -> Tensor:
            return self.encoder(list(wavs), outputs=("embedding",))["embedding"]

    count = recalibrate_norms(_Run(), batches)
    encoder.eval()
    return count


def provenance_of(state: dict[str, Any], path: Path, norm_policy: str) -> dict[str, Any]:
    """What an exported file says about itself: data, configuration, code, metrics."""
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    metrics = {k: v for k, v in _metrics_at(run, state["step"]).items() if isinstance(v, (int, float)) and v == v}
    return {
        "method": state["config"]["method"],
        "step": state["step"],
        "epoch": round(state["epoch"], 3),
        "configuration": state["config"],
        "training_data": state["data"],
        "norm_statistics": norm_policy,
        "metrics": {k: v for k, v in metrics.items() if abs(v) != float("inf")},
        "git_revision": git_revision() or "unknown",
        "versions": state["versions"],
        "package": __version__,
        "exported": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def average_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of floating-point tensors in double precision, rounded once; counters are those of the last.

    >>> average_states([{"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}])["w"]
    tensor([1.5000])
    """
    if not states:
        raise ConfigError("nothing to average: got no checkpoints")
    first = states[0]
    for index, state in enumerate(states[1:], 1):
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in first.items()}:
            raise CheckpointMismatch(
                f"checkpoint {index} has other tensors than the first; average those of one network"
            )
    return {
        k: torch.stack([s[k].double() for s in states]).mean(0).to(v.dtype) if v.is_floating_point() else states[-1][k]
        for k, v in first.items()
    }


def average_checkpoints(
    sources: Sequence[str | Path],
    destination: str | Path,
    *,
    last: int | None = None,
    role: str | None = None,
    fp16: bool = False,
) -> Path:
    """Average encoders and write the result in this project's format.

    sources : a run's folder (its ``last`` checkpoints are taken, without one that was only kept as the best), or
    several checkpoints of any readable format. destination : a .safetensors file or a folder gets the encoder; a .pt
    file all weights of a run, to start from (``model.init``). last : default 5, or all if there are fewer; more than
    there are is a ConfigError, since the average would be of fewer than was asked for.
    """
    if len(sources) == 1 and Path(sources[0]).is_dir() and (Path(sources[0]) / "checkpoints").is_dir():
        files = CheckpointStore(Path(sources[0]) / "checkpoints").recent()
        if last is not None and not 1 <= last <= len(files):
            raise ConfigError(
                f"--last {last}: {sources[0]} holds {len(files)} checkpoints to average (run.keep_last says how many "
                f"are kept); give a number from 1 to {len(files)}"
            )
        files = files[-(last or 5) :]
    else:
        files = [Path(s) for s in sources]
    checkpoints: list[Checkpoint] = []
    states: list[dict[str, Any]] = []
    base: dict[str, Any] = {}
    for file in files:
        if is_run_checkpoint(file):
            state = CheckpointStore.load(file)
            states.append(state)
            encoder, found = encoder_of(state, role)
            base = provenance_of(state, file, "averaged")
            checkpoints.append(
                Checkpoint(
                    ecapa=encoder.ecapa.cfg,
                    frontend=encoder.frontend.cfg,
                    state=encoder.ecapa.state_dict(),
                    format="native",
                    role=found,
                    provenance={},
                    frontend_buffers=encoder.frontend.own_tensors(),
                )
            )
        else:
            checkpoints.append(read_checkpoint(file, role=role) if role else read_checkpoint(file))
    if not checkpoints:
        raise CheckpointUnreadable(f"{', '.join(map(str, sources))}: no checkpoints found to average")
    first = checkpoints[0]
    for file, other in zip(files[1:], checkpoints[1:], strict=True):
        if other.ecapa != first.ecapa or other.frontend != first.frontend:
            raise CheckpointMismatch(f"{file}: another network or front-end than {files[0]}; average those of one run")
    if Path(destination).suffix == ".pt":
        return _average_run(states, files, Path(destination))
    result = Checkpoint(
        ecapa=first.ecapa,
        frontend=first.frontend,
        state=average_states([c.state for c in checkpoints]),
        format="native",
        role=first.role,
        provenance={},
        frontend_buffers=average_states([dict(c.frontend_buffers) for c in checkpoints]),
    )
    provenance = {**base, "averaged": [file.name for file in files]}
    return Path(save_native(result, destination, provenance, role=first.role, fp16=fp16))


def _average_run(states: Sequence[dict[str, Any]], files: Sequence[Path], destination: Path) -> Path:
    """All weights of a run averaged, its head or classifier too: what ``model.init`` fine-tunes from."""
    if len(states) != len(files):
        raise ConfigError(f"{destination}: only checkpoints of runs (step_N.pt) hold a classifier; give a .safetensors")
    last = states[-1]
    kept = {k: last[k] for k in ("format", "step", "epoch", "config", "data", "versions")}
    whole = {**kept, "task": average_states([s["task"] for s in states]), "averaged": [f.name for f in files]}
    return write_whole(destination, lambda beside: torch.save(whole, beside), durable=True)


def model_card(path: str | Path, *, title: str, sections: dict[str, str]) -> Path:
    """Write a Markdown model card beside a model file: ``model.safetensors`` gets ``model.md``."""
    path = Path(path).with_suffix(".md")
    text = f"# {title}\n" + "".join(f"\n## {name}\n\n{body.strip()}\n" for name, body in sections.items())
    write_text(path, text)
    return path
