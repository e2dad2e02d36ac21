"""Which layers a SUPERB task leans on: the softmax weights in s3prl `run_downstream` checkpoints.

The weighted sum adds w_l * h_l, so a layer with large features counts for more than its weight says. The corrected
share is w_l * |h_l| / sum_k w_k * |h_k| with |h_l| the mean norm of a frame of that layer, measured on recordings.
"""

from __future__ import annotations

import argparse
import json
import logging
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from cka_addon import audio, provenance
from cka_addon.errors import CheckpointError, SpecError
from cka_addon.models import Model, load_model
from cka_addon.store import FeatureStore

logger = logging.getLogger(__name__)


@dataclass
class LayerWeights:
    """Weights of one downstream checkpoint.

    task : name of the task;  weights : (layers,) softmax weights, they add up to 1
    corrected : (layers,) shares corrected for the layers' norms, or None where no norms were given
    """

    task: str
    upstream: str
    weights: np.ndarray
    corrected: np.ndarray | None = None
    norms: np.ndarray | None = None
    layers: tuple[str, ...] = ()
    details: dict = field(default_factory=dict)


def read_checkpoint(path: str | Path) -> dict:
    """An s3prl downstream checkpoint, read without running code from it.

    Such a file holds an argparse.Namespace beside tensors and plain data; that class is allowed, nothing else.
    Raises CheckpointError where the file holds more, or is no downstream checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: does not exist; expected a states-N.ckpt or dev-best.ckpt of s3prl's run_downstream"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            states = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0] if str(error) else "unknown content"
        raise CheckpointError(
            f"{path}: holds objects that are not read for safety ({reason}); expected tensors, plain data and an "
            "argparse.Namespace, which is all that run_downstream writes: is it another kind of checkpoint?"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is not a torch checkpoint or is cut short ({error})") from error
    if not isinstance(states, Mapping) or "Featurizer" not in states:
        got = ", ".join(sorted(map(str, states))[:6]) if isinstance(states, Mapping) else type(states).__name__
        raise CheckpointError(f"{path}: got {got}; expected an s3prl downstream checkpoint with 'Featurizer'")
    return dict(states)


def read_layer_weights(path: str | Path, *, task: str | None = None) -> LayerWeights:
    """Softmax weights of one checkpoint; `task` names it, else the downstream's name and folder do.

    Raises CheckpointError where the task used one layer only and so has no weights.
    """
    states = read_checkpoint(path)
    found = {k.removeprefix("module."): v for k, v in states["Featurizer"].items()}
    args = states.get("Args")
    args = vars(args) if isinstance(args, argparse.Namespace) else dict(args or {})
    if "weights" not in found:
        raise CheckpointError(
            f"{path}: its featurizer has no layer weights: the task took one layer "
            f"(-s {args.get('upstream_feature_selection')}, -l {args.get('upstream_layer_selection')}); "
            "expected a run on hidden_states with more than one layer"
        )
    raw = found["weights"].double()
    if not bool(torch.isfinite(raw).all()):
        raise CheckpointError(f"{path}: the layer weights hold NaN or infinity; the training has diverged")
    variant = args.get("downstream_variant")
    name = task or "_".join(str(v) for v in (args.get("downstream"), variant) if v) or Path(path).parent.name
    return LayerWeights(
        task=name,
        upstream=str(args.get("upstream", "unknown")),
        weights=torch.softmax(raw, 0).numpy(),
        layers=_told_layers(args, len(raw)),
        details={
            "checkpoint": str(path),
            "checkpoint_sha256": provenance.file_sha256(path),
            "step": states.get("Step"),
            "upstream_ckpt": args.get("upstream_ckpt"),
            "upstream_model_config": args.get("upstream_model_config"),
            "feature": args.get("upstream_feature_selection", "hidden_states"),
            "normalize": bool(args.get("upstream_feature_normalize", False)),
        },
    )


def _told_layers(args: Mapping, count: int) -> tuple[str, ...]:
    """Names that the run kept with its arguments, where they are those of its weights."""
    names = args.get("upstream_layer_names") or ()
    whole = args.get("upstream_feature_selection", "hidden_states") == "hidden_states"
    return tuple(map(str, names)) if whole and len(names) == count else ()


def member_shares(weights: LayerWeights) -> list[dict[str, object]]:
    """What the members of a fused upstream, whose layers are called MEMBER:LAYER, take of the weights together.

    Returns rows of member, layers (how many), weight and, where norms are known, corrected; [] for other upstreams.

    >>> layers = ("wavlm:layer_0", "wavlm:layer_1", "ecapa:block_1")
    >>> rows = member_shares(LayerWeights("sid", "fusion", np.array([0.2, 0.3, 0.5]), layers=layers))
    >>> [(row["member"], round(row["weight"], 3)) for row in rows]
    [('wavlm', 0.5), ('ecapa', 0.5)]
    """
    if not weights.layers or not all(":" in name for name in weights.layers):
        return []
    owners = [name.partition(":")[0] for name in weights.layers]
    rows: list[dict[str, object]] = []
    for member in dict.fromkeys(owners):
        mine = [owner == member for owner in owners]
        row: dict[str, object] = {"member": member, "layers": sum(mine), "weight": float(weights.weights[mine].sum())}
        if weights.corrected is not None:
            row["corrected"] = float(weights.corrected[mine].sum())
        rows.append(row)
    return rows


def read_many(paths: Sequence[str | Path]) -> list[LayerWeights]:
    """Checkpoints, or folders of one run; "TASK=PATH" names a task.

    Of a folder of run_downstream the best or the newest states-N.ckpt is taken, of a folder of recipes/superb
    (EXP/UPSTREAM/TASK) the chosen one.

    Two runs of one task are told apart by their folders' names.
    """
    found = []
    for item in paths:
        text = str(item)
        match = re.match(r"^([A-Za-z0-9_.+ -]+)=(.+)$", text)
        task, path = (match.group(1), Path(match.group(2))) if match and not Path(text).exists() else (None, Path(text))
        if path.is_dir():
            path = _chosen(path) or path
        if path.is_dir():
            states = sorted(path.glob("states-*.ckpt"), key=lambda p: int(re.sub(r"\D", "", p.stem) or 0))
            best = [*sorted(path.glob("dev-best.ckpt")), *sorted(path.glob("*best*.ckpt"))]
            if not states and not best:
                raise CheckpointError(
                    f"{path}: no states-N.ckpt in it; expected an experiment folder of run_downstream"
                )
            path = (best or states[-1:])[0]
        found.append(read_layer_weights(path, task=task))
    names = [w.task for w in found]
    for w in found:
        if names.count(w.task) > 1:
            w.task = f"{w.task} ({Path(w.details['checkpoint']).parent.name})"
    return found


def _chosen(folder: Path) -> Path | None:
    """The checkpoint that recipes/superb chose, in EXP/UPSTREAM/TASK (of its first fold); None elsewhere."""
    choice = folder / "choice.json"
    if not choice.is_file():
        if any(folder.glob("lr*")) and not any(folder.glob("*.ckpt")):
            raise CheckpointError(
                f"{folder}: no choice.json in it, training or choosing is not finished; run the choose stage, or name "
                "one of its lr* folders"
            )
        return None
    try:
        chosen = next(iter(json.loads(choice.read_text(encoding="utf-8"))["checkpoints"].values()))
    except (ValueError, KeyError, StopIteration, AttributeError) as error:
        raise CheckpointError(
            f"{choice}: names no checkpoint ({error!r}); a task without a probe to train has no layer weights"
        ) from error
    path = Path(chosen)
    # The experiment may have been moved since: then the same path below the folder.
    tail = path.parts[path.parts.index(folder.name) + 1 :] if folder.name in path.parts else path.parts[-2:]
    for candidate in (path, folder.joinpath(*tail)):
        if candidate.is_file():
            return candidate
    raise CheckpointError(f"{choice}: chose {chosen}, which does not exist; was it removed or moved?")


def measure_norms(
    source: FeatureStore | Model | str,
    recordings: str | Path | None = None,
    *,
    model: str | None = None,
    limit: int | None = 100,
    seed: int = 0,
    progress: bool = True,
) -> tuple[tuple[str, ...], np.ndarray, dict]:
    """Mean norm of a frame of every layer: (layer names, (layers,) float64, how it was measured).

    source : a feature store, or a model (then `recordings` too);  model : which one, where the store holds several
    limit : number of utterances, drawn at random
    """
    from tqdm import tqdm

    rng = np.random.default_rng(seed)
    if isinstance(source, FeatureStore):
        names = [i.name for i in source.infos]
        if model is None and len(names) > 1:
            raise SpecError(f"{source.path}: holds {', '.join(names)}; name one of them for the norms")
        if model is not None and model not in names:
            raise SpecError(f"{source.path}: holds no model '{model}'; expected one of {', '.join(names)}")
        position = names.index(model) if model else 0
        info = source.infos[position]
        ids = [source.ids[i] for i in sorted(rng.permutation(len(source.ids))[:limit])]
        stream = (source.read(name).layers[position] for name in ids)
        about: dict[str, object] = {"store": str(source.path)}
    else:
        if recordings is None:
            raise SpecError("got a model but no recordings; expected recordings to measure the layers' norms on")
        loaded = load_model(source)
        info = loaded.info
        found = [r for r in audio.find_recordings(recordings) if not r.problem]
        ids = [found[i] for i in sorted(rng.permutation(len(found))[:limit])]
        stream = (loaded(audio.load(r)[0], r.id) for r in ids)
        about = {
            "model": info.name,
            "recordings": str(recordings),
        }
    options = info.provenance.get("options") or {}
    about |= {
        "upstream": info.provenance.get("upstream", info.name),
        "weights_sha256": info.provenance.get("weights_sha256"),
        "ckpt": options.get("ckpt"),
        "ckpt_sha256": info.provenance.get("ckpt_sha256"),
        "model_config": options.get("model_config"),
        "model_config_sha256": info.provenance.get("model_config_sha256"),
    }
    total, count = np.zeros(len(info.layers)), 0
    for layers in tqdm(stream, total=len(ids), desc="norms", unit="utt", disable=not progress):
        total += [float(x.norm(dim=1).sum(dtype=torch.float64)) for x in layers]
        count += len(layers[0])
    if not count:
        raise SpecError("no frame was found to measure the norms on; expected at least one readable recording")
    return info.layers, total / count, {**about, "utterances": len(ids), "frames": count}


def correct(
    weights: LayerWeights,
    layers: Sequence[str],
    norms: np.ndarray,
    how: Mapping | None = None,
    *,
    other_model: bool = False,
) -> LayerWeights:
    """Add the shares corrected for the layers' norms, w_l |h_l| / sum_k w_k |h_k|.

    A run with --upstream_feature_normalize has equal norms by construction: its shares are its weights.
    how : what the norms were measured on (`measure_norms`): the upstream and its checkpoint must be those of the run
    other_model : take the norms although they are of another model by name, or cannot be told to be of the same one
    Raises CheckpointError where the numbers of layers or the models differ.

    >>> w = correct(LayerWeights("pr", "x", np.array([0.5, 0.5])), ["a", "b"], np.array([1.0, 3.0]))
    >>> w.corrected.tolist()
    [0.25, 0.75]
    """
    if len(norms) != len(weights.weights):
        raise CheckpointError(
            f"{weights.task}: has {len(weights.weights)} layer weights, the norms are of {len(norms)} layers; "
            "expected norms of all layers of the same upstream"
        )
    if how and not other_model and (differs := _another_model(weights, how)):
        raise CheckpointError(
            f"{weights.task}: {differs}; expected norms of the run's own upstream: measure them with "
            f"{_as_model(weights)}, or say that it is the same model with --other-model"
        )
    weights.norms, weights.layers = np.asarray(norms, np.float64), tuple(layers)
    scaled = weights.weights * (1.0 if weights.details.get("normalize") else weights.norms)
    weights.corrected = scaled / scaled.sum()
    weights.details["norms"] = dict(how or {})
    return weights


def _another_model(weights: LayerWeights, how: Mapping) -> str | None:
    """How the model of the norms differs from the run's upstream; None where it is the same."""
    if "upstream" not in how:
        return None
    if str(how["upstream"]) != weights.upstream:
        return f"was trained on upstream {weights.upstream}, the norms are of {how['upstream']}"
    for run, mine in (("upstream_ckpt", "ckpt"), ("upstream_model_config", "model_config")):
        theirs, ours = weights.details.get(run) or None, how.get(mine) or None
        if theirs == ours:
            continue
        if not theirs or not ours:
            return f"was trained with {run}={theirs}, the norms are of a model with {mine}={ours}"
        path = Path(str(theirs)).expanduser()
        if path.is_file() and how.get(f"{mine}_sha256"):
            if provenance.file_sha256(path) != how[f"{mine}_sha256"]:
                return f"was trained with {run}={theirs}, the norms are of another file, {ours}"
        elif path.resolve() != Path(str(ours)).expanduser().resolve():
            return f"was trained with {run}={theirs} (not here to compare), the norms are of {ours}"
    return None


def _as_model(weights: LayerWeights) -> str:
    options = {
        "ckpt": weights.details.get("upstream_ckpt"),
        "model_config": weights.details.get("upstream_model_config"),
    }
    return " ".join([f'-m "s3prl:{weights.upstream}', *(f"{k}={v}" for k, v in options.items() if v)]) + '"'


def table(items: Sequence[LayerWeights]):
    """pandas table, one row per task and layer."""
    import pandas

    rows = []
    for w in items:
        for i, value in enumerate(w.weights):
            row = {"task": w.task, "upstream": w.upstream, "layer": i}
            row["layer_name"] = w.layers[i] if w.layers else f"layer_{i}"
            row["weight"] = value
            if w.corrected is not None and w.norms is not None:
                row |= {"norm": w.norms[i], "corrected": w.corrected[i]}
            row["checkpoint"] = w.details.get("checkpoint")
            rows.append(row)
    return pandas.DataFrame(rows)
