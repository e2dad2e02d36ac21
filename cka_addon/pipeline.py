"""From recordings or feature stores to a CKA matrix: one pass over the audio for all models and all pairs of layers.

The utterances are put in a seeded random order and cut into blocks. A block is computed on its own whichever process
does it, and what it leaves adds up; so one process, many (torchrun) and shards merged later give the same result, and
the blocks give the intervals.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cka_addon import align, audio, provenance
from cka_addon.errors import AudioError, CkaError, ConstantLayer, MergeError, NonFinite, SpecError, TooFewExamples
from cka_addon.hsic import (
    ESTIMATORS,
    MIN_EXAMPLES,
    BatchHsic,
    Moments,
    Pairs,
    check_finite,
    check_varies,
    cka_from_hsic,
    crossover,
)
from cka_addon.models import Model, ModelInfo, check_names, load_models
from cka_addon.result import CKAResult
from cka_addon.store import FeatureStore, Utterance, format_bytes, parse_shard, reduce_utterance
from cka_addon.uncertainty import METHODS, intervals

logger = logging.getLogger(__name__)

MODES = ("minibatch", "full")
EXAMPLES = ("frames", "sampled", "means")
CHUNK = 2048  # examples per product of the streaming form: enough to make the product cheap, few enough for float32
GRAM_MEMORY = 2 << 30  # features that the full-data Gram form may hold


@dataclass(frozen=True)
class Options:
    """How CKA is computed; all of it is stored with the result.

    mode : "minibatch" averages HSIC over minibatches and then divides (Nguyen et al., arXiv 2010.15327); "full" is the
        exact value over all examples
    examples : "frames" (all), "sampled" (`frames` random ones per utterance) or "means" (one per utterance)
    batch_size : examples per minibatch;  mix : utterances whose examples are shuffled together before they are cut into
        minibatches (1 keeps the order of time: a minibatch then holds little more than one utterance)
    form : "gram", "stream" or "auto" (the cheaper one)
    pairs : "all", "within" or "across" models
    align : "nearest" or "pool", for models on different clocks
    blocks : groups of utterances, the unit of intervals and of work sharing
    permutations : times that the examples of one side are permuted in each minibatch (or over all data): the baseline
    """

    mode: str = "minibatch"
    examples: str = "frames"
    frames: int = 50
    batch_size: int = 512
    mix: int = 16
    form: str = "auto"
    biased: bool = False
    pairs: str = "all"
    align: str = "nearest"
    blocks: int = 20
    interval: str = "bootstrap"
    confidence: float = 0.95
    resamples: int = 1000
    permutations: int = 0
    seed: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        allowed = {
            "mode": MODES,
            "examples": EXAMPLES,
            "form": ("auto", "gram", "stream"),
            "pairs": ("all", "within", "across"),
            "align": align.ALIGNMENTS,
            "interval": METHODS,
            "precision": ("float32", "float64"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise SpecError(f"got {name}={getattr(self, name)!r}; expected one of {', '.join(values)}")
        smallest = MIN_EXAMPLES[self.biased]
        for name, least in {"batch_size": smallest, "mix": 1, "blocks": 1, "frames": 1, "permutations": 0}.items():
            if getattr(self, name) < least:
                raise SpecError(f"got {name}={getattr(self, name)}; expected at least {least}")
        if not 0 < self.confidence < 1:
            raise SpecError(f"got confidence={self.confidence}; expected a value between 0 and 1, e.g. 0.95")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "float64" else torch.float32


class LiveSource:
    """Features straight from the models: every recording is read once and run through all of them."""

    def __init__(
        self, models: Sequence[Model], recordings: Sequence[audio.Recording], *, skip_unreadable: bool
    ) -> None:
        unreadable = [r for r in recordings if r.problem]
        if unreadable and not skip_unreadable:
            raise AudioError(
                f"{len(unreadable)} of {len(recordings)} recordings cannot be read, first {unreadable[0].path}: "
                f"{unreadable[0].problem}; repair them or pass --skip-unreadable (they are then left out and counted)"
            )
        self.models = list(models)
        self.infos = [m.info for m in self.models]
        self._recordings = {r.id: r for r in recordings}
        self.ids = sorted(self._recordings)
        self.left_out: dict[str, str] = {}

    def seconds(self, utterance: str) -> float:
        return self._recordings[utterance].seconds or 0.0

    def read(self, utterance: str) -> Utterance:
        wav, about = audio.load(self._recordings[utterance])
        layers = [model(wav, utterance) for model in self.models]
        return Utterance(utterance, layers, about["seconds"], [None] * len(layers))

    def count(self, utterance: str) -> int:
        """Frames on the slowest clock, from the header."""
        slowest = max(info.clock.shift for info in self.infos)
        return max(1, int(self.seconds(utterance) / slowest)) if slowest else 1


class StoreSource:
    """Features from one or more stores; the utterances they have in common."""

    def __init__(self, stores: Sequence[FeatureStore], names: Sequence[str] | None = None) -> None:
        self.stores = list(stores)
        self.infos = [info for store in self.stores for info in store.infos]
        if names is not None:
            if len(names) != len(self.infos):
                raise SpecError(f"got {len(names)} names; expected {len(self.infos)}, one per model")
            self.infos = [replace(info, name=name) for info, name in zip(self.infos, names, strict=True)]
        check_names([info.name for info in self.infos])
        common = set(self.stores[0].ids).intersection(*(s.ids for s in self.stores[1:]))
        if not common:
            raise SpecError(
                f"the stores have no utterance in common: {', '.join(f'{s.path} {s.ids[:2]}' for s in self.stores)}; "
                "expected stores of the same recordings, found from the same folder or list"
            )
        self.ids = sorted(common)
        everything = set().union(*(s.ids for s in self.stores))
        self.left_out = {name: "not in every store" for name in sorted(everything - common)}
        for store in self.stores:
            self.left_out.update({name: problem for name, problem in store.skipped.items() if name not in common})

    def seconds(self, utterance: str) -> float:
        return self.stores[0].seconds(utterance)

    def read(self, utterance: str) -> Utterance:
        parts = [store.read(utterance) for store in self.stores]
        return Utterance(
            utterance,
            [layers for part in parts for layers in part.layers],
            parts[0].seconds,
            [instants for part in parts for instants in part.instants],
        )

    def count(self, utterance: str) -> int:
        return min(n for store in self.stores for n in store.frames(utterance))


def examples_of(utterance: Utterance, infos: Sequence[ModelInfo], options: Options) -> list[Tensor]:
    """Examples of one utterance: for all layers of all models, (examples, width), the same moments in each."""
    if options.examples == "means":
        return [x.double().mean(0, keepdim=True).to(options.dtype) for model in utterance.layers for x in model]
    sampled = [instants is not None for instants in utterance.instants]
    if any(sampled):
        if not all(sampled):
            raise SpecError("some stores hold sampled frames and others all frames; expected one kind: dump them alike")
        common = utterance.instants[0]
        for instants in utterance.instants[1:]:
            common = np.intersect1d(common, instants)
        if options.examples == "sampled":
            common = common[: options.frames]
        picks = [torch.from_numpy(np.flatnonzero(np.isin(instants, common))) for instants in utterance.instants]
        return [x[pick].to(options.dtype) for pick, model in zip(picks, utterance.layers, strict=True) for x in model]
    layers = utterance.layers
    if options.examples == "sampled":
        layers, _ = reduce_utterance(
            layers, infos, utterance.id, utterance.seconds, keep="sampled", frames=options.frames, seed=options.seed
        )
        return [x.to(options.dtype) for model in layers for x in model]
    ranges = align.align([len(m[0]) for m in layers], [i.clock for i in infos], rule=options.align)
    return [
        align.take(x.to(options.dtype), first, last)
        for (first, last), model in zip(ranges, layers, strict=True)
        for x in model
    ]


@dataclass
class Block:
    """What a block of utterances leaves behind.

    h, baseline : (layers, layers) float64, mean HSIC of its minibatches, or HSIC over all its examples
    batches : minibatches (1 in full mode);  examples : used;  dropped : left over behind the last minibatch
    """

    utterances: int = 0
    examples: int = 0
    dropped: int = 0
    batches: int = 0
    h: np.ndarray | None = None
    baseline: np.ndarray | None = None


@dataclass
class State:
    """Everything that a run, or a shard of one, has gathered; states of different blocks merge.

    plan : what makes two shards parts of one run
    total, total_baseline : accumulators over all blocks (full mode, streaming form)
    features : per block, the examples themselves (full mode, Gram form)
    variation : per block, (examples, variance of every layer, mean of every feature), to find constant layers
    """

    plan: dict
    infos: list[ModelInfo]
    options: Options
    form: str
    blocks: dict[int, Block] = field(default_factory=dict)
    total: Moments | None = None
    total_baseline: Moments | None = None
    features: dict[int, list[Tensor]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    variation: dict[int, tuple[int, np.ndarray, np.ndarray]] = field(default_factory=dict)
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
        self.features.update(other.features)
        self.left_out.update(other.left_out)
        self.variation.update(other.variation)
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
        for b, layers in self.features.items():
            tensors |= {f"features/{b}/{i}": x.cpu().contiguous() for i, x in enumerate(layers)}
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
            "variation": {b: n for b, (n, _, _) in self.variation.items()},
            "blocks": {
                b: {k: getattr(x, k) for k in ("utterances", "examples", "dropped", "batches")}
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
            block = state.blocks[int(b)] = Block(**fields)
            for name in ("h", "baseline"):
                if f"block/{b}/{name}" in tensors:
                    setattr(block, name, tensors[f"block/{b}/{name}"].numpy())
        for name, n in about["n"].items():
            moments = Moments(state.dims, state.pairs, dtype=state.options.dtype, paired=name == "total")
            moments.n, moments.shift = n, tensors[f"{name}/shift"]
            for i, tensor in enumerate(moments.tensors()):
                tensor.copy_(tensors[f"{name}/{i}"])
            setattr(state, name, moments)
        if state.form == "gram" and state.options.mode == "full":
            for b in state.blocks:
                state.features[b] = [tensors[f"features/{b}/{i}"] for i in range(len(state.dims))]
        for b, n in about["variation"].items():
            both = tensors[f"variation/{b}"].numpy()
            state.variation[int(b)] = (n, both[: len(state.dims)], both[len(state.dims) :])
        return state


class _Runner:
    """Works through blocks of utterances and fills a State."""

    def __init__(self, source, state: State, device: str, skip: bool) -> None:
        self.source, self.state, self.options, self.skip = source, state, state.options, skip
        self.device = torch.device(device)
        self.engine = BatchHsic(state.dims, state.pairs, biased=self.options.biased, form=self.options.form)
        self.block_moments: tuple[Moments, Moments | None] | None = None
        self.consecutive_failures = 0

    def examples(self, ids: Sequence[str], tick: Callable[[], object]) -> Iterator[list[Tensor]]:
        """Examples of utterance after utterance; bad recordings are left out and counted."""
        for name in ids:
            try:
                utterance = self.source.read(name)
                layers = examples_of(utterance, self.state.infos, self.options)
                check_finite(layers, self.state.names, name)
            except (AudioError, RuntimeError, NonFinite) as error:
                if isinstance(error, NonFinite) and not self.skip:
                    raise
                self.state.left_out[name] = f"{type(error).__name__}: {error}"
                logger.warning("left out %s: %s", name, error)
                self.consecutive_failures += 1
                if self.consecutive_failures >= 20:
                    raise SpecError(
                        f"20 recordings in a row failed, last '{name}': {error}; check the model and the recordings"
                    ) from error
                continue
            finally:
                tick()
            self.consecutive_failures = 0
            if len(layers[0]):
                yield [x.to(self.device) for x in layers]

    def run(self, number: int, ids: Sequence[str], tick: Callable[[], object]) -> None:
        """Compute one block."""
        block = Block(utterances=len(ids))
        rng = np.random.default_rng([self.options.seed, 1, number])
        self._variation: list[tuple[int, np.ndarray, np.ndarray]] = []
        stream = self.examples(ids, tick)
        if self.options.mode == "minibatch":
            self._minibatches(block, stream, rng)
        elif self.state.form == "stream":
            self._stream(block, stream, rng)
        else:
            parts = list(stream)
            layers = [torch.cat(column).cpu() for column in zip(*parts, strict=True)]
            layers = layers or [torch.zeros(0, d, dtype=self.options.dtype) for d in self.state.dims]
            self.state.features[number] = layers
            block.examples, block.batches = len(layers[0]), 1
            self._note(layers)
        block.utterances -= sum(name in self.state.left_out for name in ids)
        self.state.blocks[number] = block
        if self._variation:
            self.state.variation[number] = _pool_variation(self._variation, self.state.dims)

    def _note(self, layers: Sequence[Tensor]) -> None:
        """Keep variance and mean of the layers, so that a constant one is found whatever the estimator makes of it."""
        n = len(layers[0])
        if not n:
            return
        variance, means = [], []
        for x in layers:
            # About the first example: a constant layer then has zeros only.
            shifted = x - x[0]
            mean = shifted.mean(0, dtype=torch.float64)
            variance.append(max(0.0, float(shifted.square().sum(dtype=torch.float64)) / n - float(mean.square().sum())))
            means.append((mean + x[0].double()).cpu().numpy())
        self._variation.append((n, np.array(variance), np.concatenate(means)))

    def _minibatches(self, block: Block, stream: Iterator[list[Tensor]], rng: np.random.Generator) -> None:
        size, options = self.options.batch_size, self.options
        total = np.zeros((len(self.state.dims),) * 2)
        baseline = np.zeros_like(total)
        pool: list[list[Tensor]] = []

        def use(layers: list[Tensor]) -> None:
            nonlocal total, baseline
            total += self.engine(layers, names=self.state.names)
            for _ in range(options.permutations):
                order = torch.from_numpy(rng.permutation(len(layers[0]))).to(self.device)
                baseline += self.engine(layers, order=order, names=self.state.names) / options.permutations
            block.batches += 1
            block.examples += len(layers[0])

        def drain(last: bool) -> None:
            nonlocal pool
            if not pool:
                return
            layers = [torch.cat(column) for column in zip(*pool, strict=True)]
            n = len(layers[0])
            self._note(layers)
            if options.mix > 1:
                order = torch.from_numpy(rng.permutation(n)).to(self.device)
                layers = [x[order] for x in layers]
            full = n // size
            for i in range(full):
                use([x[i * size : (i + 1) * size] for x in layers])
            rest = [x[full * size :] for x in layers]
            pool = []
            if not last:
                pool = [rest] if len(rest[0]) else []
            elif len(rest[0]) >= max(MIN_EXAMPLES[options.biased], size // 2):
                use(rest)
            else:
                block.dropped += len(rest[0])

        held, utterances = 0, 0
        for layers in stream:
            pool.append(layers)
            held += len(layers[0])
            utterances += 1
            if utterances >= options.mix and held >= size:
                drain(last=False)
                held, utterances = (len(pool[0][0]) if pool else 0), 0
        drain(last=True)
        if block.batches:
            block.h = total / block.batches
            block.baseline = baseline / block.batches if options.permutations else None

    def _moments(self, paired: bool) -> Moments:
        return Moments(self.state.dims, self.state.pairs, dtype=self.options.dtype, device=self.device, paired=paired)

    def _stream(self, block: Block, stream: Iterator[list[Tensor]], rng: np.random.Generator) -> None:
        baseline = self.options.permutations > 0
        if self.block_moments is None:
            self.block_moments = (self._moments(True), self._moments(False) if baseline else None)
        mine, permuted = self.block_moments
        mine.reset()
        if permuted is not None:
            permuted.reset()
        pool: list[list[Tensor]] = []
        held = 0

        def drain() -> None:
            nonlocal pool, held
            if pool:
                layers = [torch.cat(column) for column in zip(*pool, strict=True)]
                pool, held = [], 0
                for start in range(0, len(layers[0]), CHUNK):
                    chunk = [x[start : start + CHUNK] for x in layers]
                    mine.update(chunk)
                    if permuted is not None:
                        order = torch.from_numpy(rng.permutation(len(chunk[0]))).to(self.device)
                        permuted.update(chunk, order=order)

        for layers in stream:
            pool.append(layers)
            held += len(layers[0])
            if held >= CHUNK:
                drain()
        drain()
        block.examples, block.batches = mine.n, 1
        if mine.n >= MIN_EXAMPLES[self.options.biased] and self.state.plan["blocks"] > 1:
            block.h = mine.hsic(self.options.biased)
        if mine.n:
            self._variation.append((mine.n, mine.spread()[0], (mine.s / mine.n + mine.shift).cpu().numpy()))
        for name, part in (("total", mine), ("total_baseline", permuted)):
            if part is None or part.n == 0:
                continue
            if getattr(self.state, name) is None:
                # Without other blocks the accumulators themselves are the total; a copy would double the memory.
                setattr(self.state, name, part if self.state.plan["blocks"] == 1 else part.copy())
            else:
                getattr(self.state, name).merge(part)


def _pool_variation(
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


def make_blocks(ids: Sequence[str], count: int, seed: int) -> list[list[str]]:
    """Utterances in a seeded random order, cut into `count` blocks of nearly equal size.

    >>> [len(b) for b in make_blocks(list("abcdefg"), 3, seed=0)]
    [3, 2, 2]
    """
    order = np.random.default_rng([seed, 0]).permutation(len(ids))
    return [[ids[i] for i in part] for part in np.array_split(order, min(count, len(ids)))]


def compute(
    models: Sequence | str | Path | FeatureStore | None = None,
    recordings: str | Path | Sequence | None = None,
    *,
    stores: Sequence[str | Path | FeatureStore] | str | Path | None = None,
    options: Options | None = None,
    shard: str | tuple[int, int] | None = None,
    limit: int | None = None,
    skip_unreadable: bool = False,
    device: str = "cpu",
    progress: bool = True,
    announce: Callable[[str], None] = logger.info,
    names: Sequence[str] | None = None,
    **settings: object,
) -> CKAResult:
    """CKA of all layers of one or more models.

    Either `models` (specifications, callables or `Model`s) and `recordings` (folder, list file or list of paths), or
    `stores` written by `dump`. `settings` are the fields of `Options`, e.g. mode="full", batch_size=256.
    Under torch.distributed every process calls it and each gets the whole result.

    >>> import tempfile, soundfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for i in range(6):
    ...     soundfile.write(folder / f"{i}.wav", np.random.default_rng(i).standard_normal(16000) / 9, 16000)
    >>> def model(wavs):
    ...     frames = wavs[0][: len(wavs[0]) // 320 * 320].reshape(1, -1, 320)
    ...     return {"hidden_states": [frames[..., :40], frames[..., :40] * 2, frames[..., 200:]]}
    >>> result = compute([Model(model, "toy")], folder, mode="full", progress=False)
    >>> result.values.shape, round(float(result.values[0, 1]), 6), bool(abs(result.values[0, 2]) < 0.1)
    ((3, 3), 1.0, True)
    """
    state = gather(
        models,
        recordings,
        stores=stores,
        options=options,
        shard=shard,
        limit=limit,
        skip_unreadable=skip_unreadable,
        device=device,
        progress=progress,
        announce=announce,
        names=names,
        **settings,
    )
    return finish(state)


def gather(
    models: Sequence | None = None,
    recordings: str | Path | Sequence | None = None,
    *,
    stores: Sequence | str | Path | None = None,
    options: Options | None = None,
    shard: str | tuple[int, int] | None = None,
    limit: int | None = None,
    skip_unreadable: bool = False,
    device: str = "cpu",
    progress: bool = True,
    announce: Callable[[str], None] = logger.info,
    names: Sequence[str] | None = None,
    **settings: object,
) -> State:
    """The part of `compute` before the division: the state of a run or of one shard of it (arguments as there)."""
    options = Options(**settings) if options is None else replace(options, **settings)
    source = _source(models, recordings, stores, limit, skip_unreadable, device, names)
    _check_examples(source, options)
    ids = source.ids
    index, count = parse_shard(shard)
    rank, world = _distributed()
    blocks = make_blocks(ids, options.blocks, options.seed)
    workers = count * world
    if len(blocks) < workers:
        raise SpecError(
            f"got {workers} processes or shards for {len(blocks)} blocks ({len(ids)} utterances); expected at least "
            "one block for each: raise --blocks or use fewer processes"
        )
    dims = [d for i in source.infos for d in i.dims]
    pairs = Pairs(tuple(len(i.layers) for i in source.infos), options.pairs)
    form = _form(options, source, dims, pairs)
    plan = {
        "blocks": len(blocks),
        "options": json.loads(json.dumps(asdict(options))),
        "form": form,
        "models": [{k: v for k, v in i.to_dict().items() if k != "provenance"} for i in source.infos],
        "weights": [i.provenance.get("weights_sha256") for i in source.infos],
        "utterances": len(ids),
        "utterances_sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
    }
    plan = json.loads(json.dumps(plan))
    state = State(plan, list(source.infos), options, form, left_out=dict(source.left_out))
    state.made_by = [provenance.collect(shard=f"{index}/{count}", device=device)]
    if options.mode == "full" and form == "stream":
        _check_memory(state, announce)
    mine = [b for b in range(len(blocks)) if b % workers == (index - 1) * world + rank]
    announce(
        f"{len(ids)} utterances in {len(blocks)} blocks, {len(source.infos)} models, {len(dims)} layers; {options.mode}"
        + (f", minibatches of {options.batch_size}" if options.mode == "minibatch" else "")
        + f", {form} form"
    )
    runner = _Runner(source, state, device, skip_unreadable)
    total = sum(len(blocks[b]) for b in mine)
    with tqdm(total=total, desc="compute", unit="utt", disable=not progress or rank > 0) as bar:
        for b in mine:
            runner.run(b, blocks[b], bar.update)
    if world > 1:
        _reduce(state)
    return state


def _source(models, recordings, stores, limit, skip_unreadable, device, names):
    if stores is not None:
        if models is not None or recordings is not None:
            raise SpecError("got stores and models or recordings; expected either stores, or models and recordings")
        stores = [stores] if isinstance(stores, (str, Path, FeatureStore)) else stores
        source = StoreSource([s if isinstance(s, FeatureStore) else FeatureStore(s) for s in stores], names)
        source.ids = source.ids[:limit]
        return source
    if models is None or recordings is None:
        raise SpecError("got neither stores nor models and recordings; expected one of the two")
    single = isinstance(models, (str, Model)) or callable(models)
    loaded = load_models([models] if single else models, device=device)
    found = audio.find_recordings(recordings, limit=limit)
    return LiveSource(loaded, found, skip_unreadable=skip_unreadable)


def _check_examples(source, options: Options) -> None:
    if isinstance(source, StoreSource):
        for store in source.stores:
            keep = store.options["keep"]
            fits = {"frames": EXAMPLES, "sampled": ("frames", "sampled"), "means": ("means",)}[keep]
            if options.examples not in fits:
                raise SpecError(
                    f"{store.path}: holds {keep}, asked for examples={options.examples}; expected {' or '.join(fits)}"
                )
        if (
            len(
                {(s.options["keep"], s.options["seed"] if s.options["keep"] == "sampled" else 0) for s in source.stores}
            )
            > 1
        ):
            raise SpecError("the stores keep different things or were sampled with different seeds; dump them alike")
    if options.examples == "frames":
        for info in source.infos:
            if not info.clock.shift:
                raise SpecError(f"{info.name}: gives one vector per utterance; compare with examples='means'")


def _form(options: Options, source, dims: list[int], pairs: Pairs) -> str:
    """Gram or streaming form. By the number of examples, not of processes: the result must not depend on those."""
    if options.form != "auto":
        return options.form
    if options.mode == "minibatch":
        return "gram" if options.batch_size <= crossover(dims, pairs) else "stream"
    per = {"means": lambda u: 1, "sampled": lambda u: min(options.frames, source.count(u)), "frames": source.count}
    n = sum(per[options.examples](u) for u in source.ids)
    small = n <= crossover(dims, pairs) and n * sum(dims) * options.dtype.itemsize <= GRAM_MEMORY
    return "gram" if small else "stream"


def _check_memory(state: State, announce: Callable[[str], None]) -> None:
    sets = (2 if state.plan["blocks"] > 1 else 1) * (2 if state.options.permutations else 1)
    need = sets * Moments.bytes_needed(state.dims, state.pairs)
    announce(f"accumulators: {format_bytes(need)}, whatever the number of frames")
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        free = int(next(line.split()[1] for line in text.splitlines() if line.startswith("MemAvailable"))) * 1024
    except (OSError, StopIteration, ValueError):
        return
    if need > free:
        raise SpecError(
            f"the accumulators need {format_bytes(need)}, {format_bytes(free)} are free; use --pairs across, fewer "
            "layers (layers= in the model), --blocks 1 (no intervals), or --mode minibatch"
        )


def _distributed() -> tuple[int, int]:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _reduce(state: State) -> None:
    """Bring every process's state to all of them: small things as objects, accumulators as one sum each."""
    import torch.distributed as dist

    small = [None] * dist.get_world_size()
    mine = (state.blocks, state.features, state.left_out, state.variation)
    shifts = {k: getattr(state, k).shift.cpu() for k in ("total", "total_baseline") if getattr(state, k) is not None}
    dist.all_gather_object(small, (mine, shifts))
    for (blocks, features, left_out, variation), _ in small:
        state.blocks.update(blocks)
        state.features.update(features)
        state.left_out.update(left_out)
        state.variation.update(variation)
    for name in ("total", "total_baseline"):
        shift = next((s[name] for _, s in small if name in s), None)
        if shift is None:
            continue
        moments = getattr(state, name)
        if moments is None:
            moments = Moments(state.dims, state.pairs, dtype=state.options.dtype, paired=name == "total")
            setattr(state, name, moments)
        moments.reshift(shift.to(moments.device))
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        n = torch.tensor([moments.n], dtype=torch.int64, device=device)
        dist.all_reduce(n)
        moments.n = int(n)
        for tensor in moments.tensors():
            moved = tensor.to(device)
            dist.all_reduce(moved)
            tensor.copy_(moved)


def merge(parts: Sequence[str | Path | State]) -> CKAResult:
    """The result of shards written by `compute --shard i/n`. Raises MergeError where one is missing or double."""
    states = [p if isinstance(p, State) else State.load(p) for p in parts]
    if not states:
        raise MergeError("got no shard; expected the files of compute --shard i/n")
    whole = states[0]
    for other in states[1:]:
        whole.merge(other)
    return finish(whole)


def finish(state: State) -> CKAResult:
    """Divide, lay the intervals and check. Raises ConstantLayer, TooFewExamples, MergeError; never returns NaN."""
    options, names = state.options, state.names
    if missing := state.missing():
        raise MergeError(
            f"{len(missing)} of {state.plan['blocks']} blocks are missing, first {missing[0]}; "
            "expected all shards: merge them"
        )
    mask = state.pairs.mask()
    order = sorted(state.blocks)
    blocks = [state.blocks[b] for b in order]
    examples = sum(b.examples for b in blocks)
    used = sum(b.utterances for b in blocks)
    if not used:
        raise TooFewExamples(
            f"none of {state.plan['utterances']} utterances could be used; the first: {_first(state.left_out)}"
        )
    smallest = MIN_EXAMPLES[options.biased]
    if examples >= smallest and state.variation:
        _, variance, mean = _pool_variation([state.variation[b] for b in sorted(state.variation)], state.dims)
        starts = np.concatenate([[0], np.cumsum(state.dims)[:-1]]).astype(int)
        check_varies(variance, np.add.reduceat(mean**2, starts), names=names, where=f" over all {used} utterances")
    if options.mode == "minibatch":
        batches = sum(b.batches for b in blocks)
        if not batches:
            most = max(b.dropped for b in blocks)
            raise TooFewExamples(
                f"no minibatch of {options.batch_size} examples (or half of one) could be filled: the largest of "
                f"{len(blocks)} blocks has {most}; use a smaller --batch-size, fewer --blocks or more audio"
            )
        h = sum(b.batches * b.h for b in blocks if b.batches) / batches
        weights = np.array([b.batches for b in blocks], dtype=np.float64)
        baseline = None
        if options.permutations:
            baseline = sum(b.batches * b.baseline for b in blocks if b.batches) / batches
    else:
        batches = None
        if examples < smallest:
            raise TooFewExamples(
                f"got {examples} examples of {used} utterances; the estimator needs at least {smallest}: use more audio"
            )
        h, baseline = _full(state, order)
        weights = np.array([b.examples for b in blocks], dtype=np.float64)
    try:
        values = cka_from_hsic(h, names=names, mask=mask)
    except ConstantLayer as error:
        raise ConstantLayer(f"{error} (over {used} utterances, {examples} examples)") from error
    base = None
    if baseline is not None:
        root = np.sqrt(np.diagonal(h))
        base = np.where(mask, baseline / root[:, None] / root[None, :], np.nan)
    usable = [i for i, b in enumerate(blocks) if b.h is not None and b.batches]
    ends = None
    if usable:
        ends = intervals(
            np.stack([blocks[i].h for i in usable]),
            weights[usable],
            values,
            method=options.interval,
            confidence=options.confidence,
            resamples=options.resamples,
            seed=options.seed,
        )
    if not np.isfinite(values[mask]).all():
        raise CkaError("a CKA value is not finite although every check passed: this is a bug, please report it")
    counts = {
        "utterances": used,
        "left_out": len(state.left_out),
        "examples": examples,
        "minibatches": batches,
        "examples_dropped": sum(b.dropped for b in blocks),
        "blocks": len(blocks),
    }
    clocks = [i.clock for i in state.infos]
    alignment = align.describe(clocks, options.align) if options.examples != "means" else {"rule": "utterance means"}
    details = {
        "estimator": ESTIMATORS[options.biased],
        "options": {**asdict(options), "form_used": state.form},
        "order": f"utterances sorted by id, permuted by seed {options.seed}, cut into {len(blocks)} blocks",
        "alignment": alignment,
        "counts": counts,
        "left_out": state.left_out,
        "models": [i.to_dict() for i in state.infos],
        "interval": f"{options.interval} over {len(usable)} blocks of utterances, {options.confidence:.0%}"
        if ends
        else "none",
        "utterances_sha256": state.plan["utterances_sha256"],
        "made_by": state.made_by,
    }
    low, high = (np.where(mask, e, np.nan) for e in ends) if ends else (None, None)
    return CKAResult(state.infos, values, mask, low, high, base, h, details)


def _first(left_out: dict[str, str]) -> str:
    return next((f"'{k}': {v}" for k, v in left_out.items()), "no reason recorded")


def _full(state: State, order: list[int]) -> tuple[np.ndarray, np.ndarray | None]:
    """HSIC over all examples and of the permuted ones; fills the blocks' HSIC where the Gram form is used."""
    options = state.options
    if state.form == "stream":
        h = state.total.hsic(options.biased)
        return h, None if state.total_baseline is None else state.total_baseline.hsic(options.biased)
    engine = BatchHsic(state.dims, state.pairs, biased=options.biased, form="gram")
    if len(order) > 1:
        for b in order:
            layers = state.features[b]
            if len(layers[0]) >= MIN_EXAMPLES[options.biased]:
                state.blocks[b].h = engine(layers, names=state.names)
    layers = [torch.cat([state.features[b][i] for b in order]) for i in range(len(state.dims))]
    h = engine(layers, names=state.names)
    if not options.permutations:
        return h, None
    rng = np.random.default_rng([options.seed, 2])
    total = np.zeros_like(h)
    for _ in range(options.permutations):
        permuted = torch.from_numpy(rng.permutation(len(layers[0])))
        total += engine(layers, order=permuted, names=state.names)
    return h, total / options.permutations
