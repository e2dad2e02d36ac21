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
from dataclasses import asdict
from pathlib import Path

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
from cka_addon.options import Options
from cka_addon.result import CKAResult
from cka_addon.sources import Source, check_examples, examples_of, iterate, open_source
from cka_addon.state import Block, State, pool_variation
from cka_addon.store import FeatureStore, format_bytes, parse_shard

logger = logging.getLogger(__name__)

CHUNK = 2048  # examples per product of the streaming form: enough to make the product cheap, few enough for float32
GRAM_MEMORY = 2 << 30  # features that the full-data Gram form may hold


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
    source: Source | None = None,
    **settings: object,
) -> State:
    """The part of `compute` before the division: the state of a run or of one shard of it (arguments as there).

    source : an open source of features, instead of models, recordings or stores
    """
    options = build(Options, settings, options)
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
        "utterances_sha256": hashlib.sha256(
            "\n".join(f"{name}\t{source.seconds(name):.2f}" for name in ids).encode()
        ).hexdigest(),
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
    runner = Runner(source, state, device, skip_unreadable)
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
    mine = (state.blocks, state.features, state.left_out, state.variation, state.power)
    shifts = {k: getattr(state, k).shift.cpu() for k in ("total", "total_baseline") if getattr(state, k) is not None}
    dist.all_gather_object(small, (mine, shifts))
    for (blocks, features, left_out, variation, power), _ in small:
        state.blocks.update(blocks)
        state.features.update(features)
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

    def __init__(self, source: Source, state: State, device: str, skip: bool) -> None:
        self.source, self.state, self.options, self.skip = source, state, state.options, skip
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
                yield [x.to(self.device) for x in layers]
        self.state.left_out.update(self.source.left_out)

    def run(self, number: int, ids: Sequence[str], tick: Callable[[], object]) -> None:
        """Compute one block."""
        block = Block(utterances=len(ids))
        rng = np.random.default_rng([self.options.seed, 1, number])
        self._variation: list[tuple[int, np.ndarray, np.ndarray]] = []
        self._power: list[np.ndarray] = []
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
