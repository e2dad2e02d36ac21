"""From recordings or feature stores to a CKA matrix: one pass over the audio for all models and all pairs of layers.

The utterances are put in a seeded random order and cut into blocks. A block is computed on its own whichever process
does it, and what it leaves adds up; so one process, many (torchrun) and shards merged later give the same result, and
the blocks give the intervals.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cka_addon import provenance
from cka_addon.config import build
from cka_addon.errors import MergeError, SpecError
from cka_addon.estimators import MIN_EXAMPLES, Pairs, crossover
from cka_addon.finish import finish
from cka_addon.hsic import BatchHsic
from cka_addon.moments import Moments
from cka_addon.options import Options, parse_measures
from cka_addon.result import CKAResult
from cka_addon.sources import Source, check_examples, examples_of, iterate, open_source
from cka_addon.state import Block, State, pool_variation
from cka_addon.store import FeatureStore, format_bytes, parse_shard
from cka_addon.uncertainty import Kept, frames_to_keep, pick_frames
from cka_addon.units import speakers

logger = logging.getLogger(__name__)

CHUNK = 2048  # examples per product of the streaming form: enough to make the product cheap, few enough for float32
GRAM_MEMORY = 2 << 30  # features that the full-data Gram form may hold


def make_blocks(ids: Sequence[str], count: int, seed: int) -> list[list[str]]:
    """Utterances (or speakers) in a seeded random order, cut into `count` blocks of nearly equal size.

    >>> [len(b) for b in make_blocks(list("abcdefg"), 3, seed=0)]
    [3, 2, 2]
    """
    order = np.random.default_rng([seed, 0]).permutation(len(ids))
    return [[ids[i] for i in part] for part in np.array_split(order, min(count, len(ids)))]


def block_count(options: Options, utterances: int, units: int) -> int:
    """Number of blocks: in minibatch mode each must hold a whole mixture of utterances, or it estimates another value.

    >>> block_count(Options(), 100, 100), block_count(Options(mode="full"), 100, 100)
    (6, 20)
    """
    most = max(1, utterances // options.mix) if options.mode == "minibatch" else utterances
    return min(options.blocks, most, units)


def units_of(source: Source, options: Options) -> dict[str, str]:
    """The unit (utterance or speaker) of every utterance. Raises SpecError where nothing tells who speaks."""
    if options.unit == "utterance":
        return {name: name for name in source.ids}
    known = getattr(source, "speakers", {}) if options.labels is None else {}
    if all(name in known for name in source.ids):
        return {name: known[name] for name in source.ids}
    return speakers(source.ids, options.labels)


def compute(
    models: Sequence | str | Callable | None = None,
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
    **settings: Any,
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
    >>> result = compute([model], folder, mode="full", progress=False)
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
    models: Sequence | str | Callable | None = None,
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
    source: Source | None = None,
    **settings: Any,
) -> State:
    """The part of `compute` before the division: the state of a run or of one shard of it (arguments as there).

    source : an open source of features, instead of models, recordings or stores
    """
    options = build(Options, settings, options)
    if len(parse_measures(options.measures)) > 1 and not options.permutations:
        # All measures but CKA look high by chance: none without what chance gives.
        options = replace(options, permutations=1)
    if stores is not None and recordings is not None:
        raise SpecError("got stores and models or recordings; expected either stores, or models and recordings")
    source = source or open_source(
        models,
        recordings,
        stores=stores,
        limit=limit,
        skip_unreadable=skip_unreadable,
        device=device,
        names=names,
    )
    check_examples(source, options)
    if overlap := getattr(source, "overlap", None):
        announce(overlap)
    ids = source.ids
    index, count = parse_shard(shard)
    rank, world = _distributed()
    unit_of = units_of(source, options)
    members: dict[str, list[str]] = {}
    for name in ids:
        members.setdefault(unit_of[name], []).append(name)
    groups = make_blocks(sorted(members), block_count(options, len(ids), len(members)), options.seed)
    blocks = [[name for unit in group for name in members[unit]] for group in groups]
    workers = count * world
    if len(blocks) < workers:
        raise SpecError(
            f"got {workers} processes or shards for {len(blocks)} blocks ({len(ids)} utterances); expected at least "
            "one block for each: raise --blocks, lower --mix (a block holds at least so many utterances in minibatch "
            "mode) or use fewer processes"
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
        "grouped": getattr(source, "grouped", {}),
        "utterances": len(ids),
        "units": len(members),
        "utterances_sha256": hashlib.sha256(
            "\n".join(f"{name}\t{source.seconds(name):.2f}" for name in ids).encode()
        ).hexdigest(),
    }
    plan = json.loads(json.dumps(plan))
    state = State(plan, list(source.infos), options, form, left_out=dict(source.left_out))
    state.made_by = [provenance.collect(shard=f"{index}/{count}", device=device, **plan["grouped"])]
    if options.mode == "full" and form == "stream":
        _check_memory(state, announce)
    mine = [b for b in range(len(blocks)) if b % workers == (index - 1) * world + rank]
    announce(
        f"{len(ids)} utterances in {len(blocks)} blocks, {len(source.infos)} models, {len(dims)} layers; {options.mode}"
        + (f", minibatches of {options.batch_size}" if options.mode == "minibatch" else "")
        + f", {form} form"
    )
    if options.mode == "full" and form == "stream":
        announce(expected_cost(source, options, dims, pairs))
    runner = Runner(source, state, device, skip_unreadable, members)
    total = sum(len(blocks[b]) for b in mine)
    with tqdm(total=total, desc="compute", unit="utt", disable=not progress or rank > 0) as bar:
        for b in mine:
            runner.run(b, blocks[b], bar.update)
    if world > 1:
        _reduce(state)
    return state


def _form(options: Options, source: Source, dims: list[int], pairs: Pairs) -> str:
    """Gram or streaming form. By the number of examples, not of processes: the result must not depend on those."""
    if options.form != "auto":
        return options.form
    if options.mode == "minibatch":
        return "gram" if options.batch_size <= crossover(dims, pairs) else "stream"
    n = example_count(source, options)
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


def expected_cost(source: Source, options: Options, dims: Sequence[int], pairs: Pairs) -> str:
    """What exact streaming will cost on this machine, in words; with the cheaper way where that matters."""
    width = np.asarray(dims, dtype=np.float64)
    per_example = 2.0 * float((np.outer(width, width) * np.triu(pairs.mask())).sum())
    examples = example_count(source, options)
    if per_example * examples < 1e11:
        return f"about {examples} examples"
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    a @ b
    start = time.perf_counter()
    for _ in range(4):
        a @ b
    rate = 4 * 2 * 512**3 / (time.perf_counter() - start)
    seconds = per_example * examples / rate
    text = f"about {examples} examples, {format_duration(seconds)} of arithmetic on this machine's CPU"
    if seconds > 60 and options.examples == "frames":
        fewer = 20 * len(source.ids)
        text += (
            f"; --examples sampled --frames 20 takes {format_duration(seconds * min(1.0, fewer / examples))} and its "
            "intervals say what that costs in accuracy; a GPU (--device cuda) is faster too"
        )
    return text


def format_duration(seconds: float) -> str:
    """Rounded for reading.

    >>> format_duration(0.4), format_duration(75), format_duration(7300)
    ('1 s', '75 s', '2.0 h')
    """
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def example_count(source: Source, options: Options) -> int:
    """Examples of a run, from the lengths of the recordings."""
    if options.examples == "means":
        return len(source.ids)
    counts = (source.count(name) for name in source.ids)
    return sum(min(options.frames, n) if options.examples == "sampled" else n for n in counts)


def _distributed() -> tuple[int, int]:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _reduce(state: State) -> None:
    """Bring every process's state to all of them: small things as objects, accumulators as one sum each."""
    import torch.distributed as dist

    small: list[Any] = [None] * dist.get_world_size()
    mine = (state.blocks, state.kept, state.left_out, state.variation, state.power)
    shifts = {k: getattr(state, k).shift.cpu() for k in ("total", "total_baseline") if getattr(state, k) is not None}
    dist.all_gather_object(small, (mine, shifts))
    for (blocks, kept, left_out, variation, power), _ in small:
        state.blocks.update(blocks)
        state.kept.update(kept)
        state.left_out.update(left_out)
        state.variation.update(variation)
        state.power.update(power)
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


class Runner:
    """Works through blocks of utterances and fills a State."""

    def __init__(
        self, source: Source, state: State, device: str, skip: bool, members: Mapping[str, Sequence[str]]
    ) -> None:
        self.source, self.state, self.options, self.skip = source, state, state.options, skip
        self.unit_of = {name: unit for unit, names in members.items() for name in names}
        everything = state.options.mode == "full" and state.form == "gram"
        units, frames = frames_to_keep(state.dims, state.options.dtype.itemsize, len(members))
        # A random subset of the units, the same whichever process computes them.
        order = [unit for group in make_blocks(sorted(members), 1, state.options.seed) for unit in group]
        wanted = order if everything else order[:units] if state.options.mode == "full" else []
        self.quota = {
            name: 1 << 40 if everything else max(2, frames // len(members[unit]))
            for unit in wanted
            for name in members[unit]
        }
        self.device = torch.device(device)
        self.engine = BatchHsic(state.dims, state.pairs, biased=self.options.biased, form=self.options.form)
        self.block_moments: tuple[Moments, Moments | None] | None = None

    def examples(self, ids: Sequence[str], tick: Callable[[], object]) -> Iterator[list[Tensor]]:
        """Examples of utterance after utterance; bad recordings are left out and counted."""
        for utterance in iterate(self.source, ids, skip=self.skip, tick=tick):
            layers = examples_of(utterance, self.state.infos, self.options)
            if self.options.examples == "means":
                self._power.append(utterance.frame_power())
            if len(layers[0]):
                if utterance.id in self.quota:
                    self._keep(utterance.id, layers)
                self._lengths.append(len(layers[0]))
                yield [x.to(self.device) for x in layers]
        self.state.left_out.update(self.source.left_out)

    def _keep(self, name: str, layers: Sequence[Tensor]) -> None:
        """Put examples of an utterance aside for the intervals."""
        count = len(layers[0])
        digest = hashlib.sha256(f"{self.options.seed}|{name}".encode()).digest()
        chosen = pick_frames(count, self.quota[name], int.from_bytes(digest[:4], "little"))
        pick = torch.from_numpy(chosen)
        unit = self.unit_of[name]
        owner = self._kept_units.setdefault(unit, len(self._kept_units))
        self._kept.append(([x[pick].cpu() for x in layers], owner, count / len(chosen)))

    def _kept_examples(self) -> Kept | None:
        """All that was put aside in this block."""
        if not self._kept:
            return None
        sizes = [len(layers[0]) for layers, _, _ in self._kept]
        return Kept(
            list(self._kept_units),
            [torch.cat(column) for column in zip(*(layers for layers, _, _ in self._kept), strict=True)],
            np.repeat([owner for _, owner, _ in self._kept], sizes),
            np.repeat([weight for _, _, weight in self._kept], sizes),
        )

    def run(self, number: int, ids: Sequence[str], tick: Callable[[], object]) -> None:
        """Compute one block."""
        block = Block(utterances=len(ids))
        rng = np.random.default_rng([self.options.seed, 1, number])
        self._variation: list[tuple[int, np.ndarray, np.ndarray]] = []
        self._power: list[np.ndarray] = []
        self._kept: list[tuple[list[Tensor], int, float]] = []
        self._kept_units: dict[str, int] = {}
        self._lengths: list[int] = []
        stream = self.examples(ids, tick)
        if self.options.mode == "minibatch":
            self._minibatches(block, stream, rng)
        elif self.state.form == "stream":
            self._stream(block, stream, rng)
        else:
            for _ in stream:
                pass
            block.batches = 1
            if (kept := self._kept_examples()) is not None:
                block.examples = len(kept.owner)
                self._note(kept.layers)
        block.utterances -= sum(name in self.state.left_out for name in ids)
        gone = self.state.left_out
        block.units = len({self.unit_of[name] for name in ids if name not in gone})
        if self.options.mode == "full":
            lengths = np.array(self._lengths, dtype=np.float64)
            block.pairs = (0.0, float((lengths * (lengths - 1)).sum()))
        if (kept := self._kept_examples()) is not None:
            self.state.kept[number] = kept
        self.state.blocks[number] = block
        if self._variation:
            self.state.variation[number] = pool_variation(self._variation, self.state.dims)
        if self._power:
            self.state.power[number] = (len(self._power), np.mean(self._power, 0))

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
        origin: list[np.ndarray] = []  # which utterance every pooled example is of

        def use(layers: list[Tensor], of: np.ndarray) -> None:
            nonlocal total, baseline
            counts = np.bincount(of - of.min()).astype(np.float64)
            n = len(of)
            block.pairs = (
                block.pairs[0] + n * (n - 1.0),
                block.pairs[1] + float((counts * (counts - 1)).sum()),
            )
            total += self.engine(layers, names=self.state.names)
            for _ in range(options.permutations):
                order = torch.from_numpy(rng.permutation(len(layers[0]))).to(self.device)
                baseline += self.engine(layers, order=order, names=self.state.names) / options.permutations
            block.batches += 1
            block.examples += len(layers[0])

        def drain(last: bool) -> None:
            nonlocal pool, origin
            if not pool:
                return
            of = np.concatenate(origin)
            layers = [torch.cat(column) for column in zip(*pool, strict=True)]
            n = len(layers[0])
            self._note(layers)
            if options.mix > 1:
                shuffled = rng.permutation(n)
                order = torch.from_numpy(shuffled).to(self.device)
                layers, of = [x[order] for x in layers], of[shuffled]
            full = n // size
            for i in range(full):
                use([x[i * size : (i + 1) * size] for x in layers], of[i * size : (i + 1) * size])
            rest = [x[full * size :] for x in layers]
            pool, origin = [], []
            if not last:
                pool, origin = ([rest], [of[full * size :]]) if len(rest[0]) else ([], [])
            elif len(rest[0]) >= max(MIN_EXAMPLES[options.biased], size // 2):
                use(rest, of[full * size :])
            else:
                block.dropped += len(rest[0])

        held, utterances = 0, 0
        for number, layers in enumerate(stream):
            pool.append(layers)
            origin.append(np.full(len(layers[0]), number))
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
        if mine.n and mine.shift is not None:
            self._variation.append((mine.n, mine.spread()[0], (mine.s / mine.n + mine.shift).cpu().numpy()))
        for name, part in (("total", mine), ("total_baseline", permuted)):
            if part is None or part.n == 0:
                continue
            if getattr(self.state, name) is None:
                # Without other blocks the accumulators themselves are the total; a copy would double the memory.
                setattr(self.state, name, part if self.state.plan["blocks"] == 1 else part.copy())
            else:
                getattr(self.state, name).merge(part)
