"""What a run, or a shard of one, has gathered: blocks of utterances and sums that add up, saved and merged exactly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cka_addon import provenance
from cka_addon.errors import MergeError
from cka_addon.estimators import Pairs
from cka_addon.models import ModelInfo
from cka_addon.moments import Moments
from cka_addon.options import Options
from cka_addon.uncertainty import Kept


@dataclass
class Block:
    """What a block of utterances leaves behind.

    h, baseline : (layers, layers) float64, mean HSIC of its minibatches (minibatch mode)
    units : utterances or speakers in it;  batches : minibatches (1 in full mode);  examples : used
    dropped : left over behind the last minibatch
    pairs : (pairs of examples that were compared, those of one utterance)
    """

    utterances: int = 0
    units: int = 0
    examples: int = 0
    dropped: int = 0
    batches: int = 0
    pairs: tuple[float, float] = (0.0, 0.0)
    h: np.ndarray | None = None
    baseline: np.ndarray | None = None


@dataclass
class State:
    """Everything that a run, or a shard of one, has gathered; states of different blocks merge.

    plan : what makes two shards parts of one run
    total, total_baseline : accumulators over all blocks (full mode, streaming form)
    kept : per block, examples for the intervals (full mode): all of them in the Gram form, else a sample
    variation : per block, (examples, variance of every layer, mean of every feature), to find constant layers
    power : per block, (utterances, mean square of a frame in every layer), where examples are utterance means
    """

    plan: dict
    infos: list[ModelInfo]
    options: Options
    form: str
    blocks: dict[int, Block] = field(default_factory=dict)
    total: Moments | None = None
    total_baseline: Moments | None = None
    kept: dict[int, Kept] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    variation: dict[int, tuple[int, np.ndarray, np.ndarray]] = field(default_factory=dict)
    power: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)
    made_by: list[dict] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [f"{i.name}/{layer}" for i in self.infos for layer in i.layers]

    @property
    def dims(self) -> list[int]:
        return [d for i in self.infos for d in i.dims]

    @property
    def pairs(self) -> Pairs:
        return Pairs(tuple(len(i.layers) for i in self.infos), self.options.pairs)

    def merge(self, other: State) -> None:
        """Add the blocks of another shard of the same run. Raises MergeError where it is not one, or blocks overlap."""
        for key, value in self.plan.items():
            if other.plan.get(key) != value:
                raise MergeError(
                    f"shards differ in {key}: {value} and {other.plan.get(key)}; expected shards of one run"
                )
        if twice := sorted(set(self.blocks) & set(other.blocks)):
            raise MergeError(f"block {twice[0]} is in two shards; expected every shard once")
        self.blocks.update(other.blocks)
        self.kept.update(other.kept)
        self.left_out.update(other.left_out)
        self.variation.update(other.variation)
        self.power.update(other.power)
        self.made_by += other.made_by
        for name in ("total", "total_baseline"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is None:
                setattr(self, name, theirs)
            elif theirs is not None:
                mine.merge(theirs)

    def missing(self) -> list[int]:
        """Blocks that no shard has brought yet."""
        return sorted(set(range(self.plan["blocks"])) - set(self.blocks))

    # -- files -------------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> Path:
        """Write the state of a shard (one .safetensors file), atomically."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for b, block in self.blocks.items():
            if block.h is not None:
                tensors[f"block/{b}/h"] = torch.from_numpy(block.h)
            if block.baseline is not None:
                tensors[f"block/{b}/baseline"] = torch.from_numpy(block.baseline)
        for name in ("total", "total_baseline"):
            moments = getattr(self, name)
            if moments is not None:
                tensors[f"{name}/shift"] = moments.shift.cpu()
                tensors |= {f"{name}/{i}": t.cpu().contiguous() for i, t in enumerate(moments.tensors())}
        for b, kept in self.kept.items():
            tensors |= {f"kept/{b}/{i}": x.cpu().contiguous() for i, x in enumerate(kept.layers)}
            tensors |= {f"kept/{b}/owner": torch.from_numpy(kept.owner)}
            tensors |= {f"kept/{b}/weight": torch.from_numpy(kept.weight)}
        for b, (_, variance, mean) in self.variation.items():
            tensors[f"variation/{b}"] = torch.from_numpy(np.concatenate([variance, mean]))
        about = {
            "plan": self.plan,
            "infos": [i.to_dict() for i in self.infos],
            "options": asdict(self.options),
            "form": self.form,
            "left_out": self.left_out,
            "made_by": self.made_by,
            "n": {k: getattr(self, k).n for k in ("total", "total_baseline") if getattr(self, k) is not None},
            "power": {b: [n, power.tolist()] for b, (n, power) in self.power.items()},
            "variation": {b: n for b, (n, _, _) in self.variation.items()},
            "kept": {b: kept.units for b, kept in self.kept.items()},
            "blocks": {
                b: {k: getattr(x, k) for k in ("utterances", "units", "examples", "dropped", "batches", "pairs")}
                for b, x in self.blocks.items()
            },
        }
        metadata = {"cka_addon": json.dumps(about)}
        return provenance.write_atomically(
            path, lambda temporary: save_file(tensors, str(temporary), metadata=metadata)
        )

    @classmethod
    def load(cls, path: str | Path) -> State:
        """Read what `save` wrote. Raises MergeError where the file is something else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                about = json.loads(file.metadata()["cka_addon"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise MergeError(
                f"{path}: not a shard of a computation ({error}); expected a file of compute --shard"
            ) from error
        infos = [ModelInfo.from_dict(i) for i in about["infos"]]
        state = cls(about["plan"], infos, Options(**about["options"]), about["form"], left_out=about["left_out"])
        state.made_by = about["made_by"]
        for b, fields in about["blocks"].items():
            block = state.blocks[int(b)] = Block(**{**fields, "pairs": tuple(fields["pairs"])})
            for name in ("h", "baseline"):
                if f"block/{b}/{name}" in tensors:
                    setattr(block, name, tensors[f"block/{b}/{name}"].numpy())
        for name, n in about["n"].items():
            moments = Moments(state.dims, state.pairs, dtype=state.options.dtype, paired=name == "total")
            moments.n, moments.shift = n, tensors[f"{name}/shift"]
            for i, tensor in enumerate(moments.tensors()):
                tensor.copy_(tensors[f"{name}/{i}"])
            setattr(state, name, moments)
        for b, units in about["kept"].items():
            layers = [tensors[f"kept/{b}/{i}"] for i in range(len(state.dims))]
            state.kept[int(b)] = Kept(
                units, layers, tensors[f"kept/{b}/owner"].numpy(), tensors[f"kept/{b}/weight"].numpy()
            )
        state.power = {int(b): (n, np.array(power)) for b, (n, power) in about.get("power", {}).items()}
        for b, n in about["variation"].items():
            both = tensors[f"variation/{b}"].numpy()
            state.variation[int(b)] = (n, both[: len(state.dims)], both[len(state.dims) :])
        return state


def pool_variation(
    parts: Sequence[tuple[int, np.ndarray, np.ndarray]], dims: Sequence[int]
) -> tuple[int, np.ndarray, np.ndarray]:
    """(examples, variance of every layer, mean of every feature) of parts taken together."""
    n = np.array([p[0] for p in parts], dtype=np.float64)
    base = parts[0][2]
    # About the first part's mean, so that a large common mean costs no digits.
    away = np.stack([p[2] - base for p in parts])
    mean = n @ away / n.sum()
    between = n @ (away - mean) ** 2 / n.sum()
    starts = np.concatenate([[0], np.cumsum(dims)[:-1]]).astype(int)
    variance = n @ np.stack([p[1] for p in parts]) / n.sum() + np.add.reduceat(between, starts)
    return int(n.sum()), variance, base + mean
