"""From what was gathered to a result: divide, lay the intervals and check."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import torch

from cka_addon import align
from cka_addon.errors import CkaError, ConstantLayer, MergeError, TooFewExamples
from cka_addon.estimators import ESTIMATORS, MIN_EXAMPLES, check_varies, cka_from_hsic
from cka_addon.hsic import BatchHsic
from cka_addon.result import CKAResult
from cka_addon.state import State, pool_variation
from cka_addon.uncertainty import intervals


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
        _, variance, mean = pool_variation([state.variation[b] for b in sorted(state.variation)], state.dims)
        starts = np.concatenate([[0], np.cumsum(state.dims)[:-1]]).astype(int)
        power = None
        if state.power:
            counts_ = np.array([n for n, _ in state.power.values()], dtype=np.float64)
            power = counts_ @ np.stack([p for _, p in state.power.values()]) / counts_.sum()
        check_varies(
            variance,
            np.add.reduceat(mean**2, starts),
            names=names,
            where=f" over all {used} utterances",
            frame_power=power,
        )
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
