"""From what was gathered to a result: divide, lay the intervals and check."""

from __future__ import annotations

import logging
from dataclasses import asdict

import numpy as np
import torch

from cka_addon import align, measures
from cka_addon.errors import CkaError, ConstantLayer, MergeError, TooFewExamples
from cka_addon.estimators import ESTIMATORS, MIN_EXAMPLES, check_varies, cka_from_hsic
from cka_addon.hsic import BatchHsic
from cka_addon.moments import Moments
from cka_addon.options import parse_measures
from cka_addon.result import CKAResult, Measure
from cka_addon.state import Block, State, pool_variation
from cka_addon.uncertainty import (
    GRAM_BYTES,
    Kept,
    LeftOut,
    intervals,
    leave_out,
    ratio,
    without_each_block,
)

logger = logging.getLogger(__name__)


def finish(state: State) -> CKAResult:
    """Divide, lay the intervals and check. Raises ConstantLayer, TooFewExamples, MergeError; never returns NaN."""
    options, names, mask = state.options, state.names, state.pairs.mask()
    if missing := state.missing():
        raise MergeError(
            f"{len(missing)} of {state.plan['blocks']} blocks are missing, first {missing[0]}; "
            "expected all shards: merge them"
        )
    blocks = [state.blocks[b] for b in sorted(state.blocks)]
    examples, used = sum(b.examples for b in blocks), sum(b.utterances for b in blocks)
    if not used:
        raise TooFewExamples(
            f"none of {state.plan['utterances']} utterances could be used; the first: {_first(state.left_out)}"
        )
    _check_layers(state, examples, used)
    kept = Kept.join([state.kept[b] for b in sorted(state.kept)]) if state.kept else None
    if options.mode == "minibatch":
        h, baseline = _minibatch(blocks, options.batch_size)
    else:
        h, baseline = _full(state, kept, examples, used)
    try:
        values = cka_from_hsic(h, names=names, mask=mask)
    except ConstantLayer as error:
        raise ConstantLayer(f"{error} (over {used} utterances, {examples} examples)") from error
    base = None
    if baseline is not None:
        root = np.sqrt(np.diagonal(h))
        base = np.where(mask, baseline / root[:, None] / root[None, :], np.nan)
    left_out, problem = _left_out(state, blocks, kept, h, examples)
    lower = upper = None
    if left_out is not None and problem is None:
        lower, upper = intervals(
            left_out,
            np.where(mask, values, 0.0),
            method=options.interval,
            confidence=options.confidence,
            resamples=options.resamples,
            seed=options.seed,
        )
        lower, upper = np.where(mask, lower, np.nan), np.where(mask, upper, np.nan)
        np.fill_diagonal(lower, 1.0)
        np.fill_diagonal(upper, 1.0)
    if not np.isfinite(values[mask]).all():
        raise CkaError("a CKA value is not finite although every check passed: this is a bug, please report it")
    details = _details(state, blocks, examples, used)
    if problem is not None:
        details["interval"] = f"none: {problem}"
    elif left_out is not None:
        kinds = {"utterance": "utterances", "speaker": "speakers", "block": "blocks of utterances"}
        some = f"{len(left_out.units)} of " if len(left_out.units) < left_out.total else ""
        details["interval"] = (
            f"{options.interval} over {some}{left_out.total} {kinds[left_out.kind]}, {options.confidence:.0%}"
        )
    result = CKAResult(state.infos, values, mask, lower, upper, base, h, details, left_out)
    if kept is not None and len(parse_measures(options.measures)) > 1:
        _add_measures(result, state, kept, examples)
    return result


def _add_measures(result: CKAResult, state: State, kept: Kept, examples: int) -> None:
    """The other measures, with their intervals and what shuffled examples give."""
    options, mask = state.options, state.pairs.mask()
    wanted = parse_measures(options.measures)
    units = result.details["counts"]["units"]
    found: dict[str, measures.Measured] = {}
    if any(m in measures.COVARIANCE for m in wanted):
        found |= measures.from_sums(
            _sums(state, kept, None),
            state.names,
            wanted,
            ridge=options.ridge,
            variance=options.variance,
            shuffled=_sums(state, kept, np.random.default_rng([options.seed, 2])),
            kept=kept,
            units=units,
            kind=options.unit,
        )
    if any(m in measures.SAMPLED for m in wanted):
        some, number = measures.from_sample(
            kept,
            wanted,
            neighbours=options.neighbours,
            seed=options.seed,
            kind=options.unit,
            units=units,
        )
        found |= some
        result.details["sample"] = f"rsa and knn look at {number} of {examples} examples, drawn by seed {options.seed}"
    warnings = []
    for name in [m for m in wanted if m in found]:
        one = found[name]
        lower = upper = None
        if options.interval != "none" and one.left_out is not None and one.left_out.problem() is None:
            ends = intervals(
                one.left_out,
                np.where(mask, one.values, 0.0),
                method=options.interval,
                confidence=options.confidence,
                resamples=options.resamples,
                seed=options.seed,
            )
            lower, upper = (np.where(mask, e, np.nan) for e in ends)
        values = np.where(mask, one.values, np.nan)
        result.measures[name] = Measure(values, lower, upper, one.baseline, one.left_out)
        if one.baseline is not None:
            off = mask & ~np.eye(len(mask), dtype=bool)
            chance = float(np.nanmax(one.baseline[off])) if off.any() else 0.0
            if chance > 0.3:
                warnings.append(
                    f"{name}: shuffled examples give up to {chance:.2f} ({examples} examples, layers of up to "
                    f"{max(state.dims)} features): read values beside that baseline, or use more audio, --ridge, or "
                    "fewer components (--variance with svcca)"
                )
    if warnings:
        result.details["warnings"] = warnings
        for text in warnings:
            logger.warning("%s", text)


def _sums(state: State, kept: Kept, rng: np.random.Generator | None) -> Moments:
    """Sums over all examples, in order or (with a generator) with the second layer's examples permuted."""
    ready = state.total if rng is None else state.total_baseline
    if state.form == "stream" and ready is not None:
        return ready
    moments = Moments(state.dims, state.pairs, dtype=state.options.dtype, paired=rng is None)
    order = None if rng is None else torch.from_numpy(rng.permutation(len(kept.owner)))
    moments.update(kept.layers, order=order)
    return moments


def _check_layers(state: State, examples: int, used: int) -> None:
    """Raise ConstantLayer where a layer does not vary."""
    if examples < MIN_EXAMPLES[state.options.biased] or not state.variation:
        return
    _, variance, mean = pool_variation([state.variation[b] for b in sorted(state.variation)], state.dims)
    starts = np.concatenate([[0], np.cumsum(state.dims)[:-1]]).astype(int)
    power = None
    if state.power:
        counts = np.array([n for n, _ in state.power.values()], dtype=np.float64)
        power = counts @ np.stack([p for _, p in state.power.values()]) / counts.sum()
    check_varies(
        variance,
        np.add.reduceat(mean**2, starts),
        names=state.names,
        where=f" over all {used} utterances",
        frame_power=power,
    )


def _minibatch(blocks: list[Block], batch_size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Mean HSIC over all minibatches, and that of the permuted ones."""
    batches = sum(b.batches for b in blocks)
    if not batches:
        most = max(b.dropped for b in blocks)
        raise TooFewExamples(
            f"no minibatch of {batch_size} examples (or half of one) could be filled: the largest of "
            f"{len(blocks)} blocks has {most}; use a smaller --batch-size, fewer --blocks or more audio"
        )
    h = np.sum([b.batches * b.h for b in blocks if b.h is not None], axis=0) / batches
    permuted = [b.batches * b.baseline for b in blocks if b.baseline is not None]
    return h, np.sum(permuted, axis=0) / batches if permuted else None


def _full(state: State, kept: Kept | None, examples: int, used: int) -> tuple[np.ndarray, np.ndarray | None]:
    """HSIC over all examples, and of the permuted ones."""
    options = state.options
    smallest = MIN_EXAMPLES[options.biased]
    if examples < smallest or kept is None:
        raise TooFewExamples(
            f"got {examples} examples of {used} utterances; the estimator needs at least {smallest}: use more audio"
        )
    if state.form == "stream":
        assert state.total is not None
        permuted = None if state.total_baseline is None else state.total_baseline.hsic(options.biased)
        return state.total.hsic(options.biased), permuted
    engine = BatchHsic(state.dims, state.pairs, biased=options.biased, form="gram")
    h = engine(kept.layers, names=state.names)
    if not options.permutations:
        return h, None
    rng = np.random.default_rng([options.seed, 2])
    total = np.zeros_like(h)
    for _ in range(options.permutations):
        order = torch.from_numpy(rng.permutation(examples))
        total += engine(kept.layers, order=order, names=state.names)
    return h, total / options.permutations


def _left_out(
    state: State, blocks: list[Block], kept: Kept | None, h: np.ndarray, examples: int
) -> tuple[LeftOut | None, str | None]:
    """Values without each unit, and why there can be no interval."""
    options = state.options
    if options.interval == "none":
        return None, "not asked for"
    if options.mode == "minibatch":
        usable = [(str(i), b) for i, b in enumerate(blocks) if b.h is not None]
        found = LeftOut([name for name, _ in usable], np.empty(0), len(usable), "block")
        if problem := found.problem():
            return None, f"{problem}: use more utterances, a smaller --mix, or --mode full"
        weights = np.array([b.batches for _, b in usable], dtype=np.float64)
        found.values = ratio(without_each_block(np.stack([b.h for _, b in usable if b.h is not None]), weights))
    else:
        assert kept is not None
        total = sum(b.units for b in blocks)
        if problem := LeftOut(kept.units, np.empty(0), total, options.unit).problem():
            return None, f"{problem}: use more recordings"
        found = leave_out(
            kept, h, examples, _moments(state, kept), total=total, kind=options.unit, biased=options.biased
        )
    wanted = found.values[:, state.pairs.mask()]
    if not np.isfinite(wanted).all():
        return None, "without one of the units a layer's HSIC with itself is not positive: use more recordings"
    return found, None


def _moments(state: State, kept: Kept) -> Moments | None:
    """Sums over all examples; of those of the Gram form only where there are too many for Gram matrices."""
    if state.form == "stream":
        return state.total
    if len(kept.owner) ** 2 * len(kept.layers) * kept.layers[0].element_size() <= GRAM_BYTES:
        return None
    return _sums(state, kept, None)


def _details(state: State, blocks: list[Block], examples: int, used: int) -> dict:
    """Everything that made the numbers."""
    options = state.options
    pairs, same = (sum(b.pairs[k] for b in blocks) for k in (0, 1))
    if options.mode == "full":
        pairs = examples * (examples - 1.0)
    clocks = [i.clock for i in state.infos]
    return {
        "estimator": ESTIMATORS[options.biased],
        "options": {**asdict(options), "form_used": state.form},
        "order": f"utterances sorted by id, permuted by seed {options.seed}, cut into {len(blocks)} blocks",
        "alignment": align.describe(clocks, options.align)
        if options.examples != "means"
        else {"rule": "utterance means"},
        "counts": {
            "utterances": used,
            "left_out": len(state.left_out),
            "examples": examples,
            "minibatches": sum(b.batches for b in blocks) if options.mode == "minibatch" else None,
            "examples_dropped": sum(b.dropped for b in blocks),
            "blocks": len(blocks),
            "units": sum(b.units for b in blocks),
        },
        # What a minibatch's value owes to pairs of frames of one utterance, which are more alike than others.
        "pairs_within_utterances": same / pairs if pairs else None,
        "left_out": state.left_out,
        "models": [i.to_dict() for i in state.infos],
        "interval": "none",
        "utterances_sha256": state.plan["utterances_sha256"],
        "made_by": state.made_by,
    }


def _first(left_out: dict[str, str]) -> str:
    return next((f"'{k}': {v}" for k, v in left_out.items()), "no reason recorded")
