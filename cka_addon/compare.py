"""Is one similarity larger than another? Differences with intervals, paired over the utterances that both come from.

    cka-addon compare result.json wavlm/11,dino/block_1 wavlm/11,dino/block_4      two pairs of layers of one result
    cka-addon compare before.json after.json wavlm/3,wavlm/11                      one pair in two results
    cka-addon compare before.json after.json                                       every pair that both have
    cka-addon compare minibatch.json full.json                                     what minibatches add to the value

Two values of the same utterances (or speakers) move together from sample to sample, so their difference is known
better than either: without each unit both are computed again, and the spread of the difference is taken from that.
Results of other utterances are taken as independent. With several differences, p values are corrected (Holm).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cka_addon.errors import SpecError
from cka_addon.result import CKAResult
from cka_addon.uncertainty import LeftOut


@dataclass
class Difference:
    """first - second, with its interval; p : two-sided, corrected for the number of differences asked for together."""

    first: str
    second: str
    value: float
    lower: float
    upper: float
    p: float
    paired: bool
    error: float

    def __str__(self) -> str:
        how = "paired" if self.paired else "independent"
        verdict = "no difference shown" if self.lower <= 0 <= self.upper else "larger" if self.value > 0 else "smaller"
        return (
            f"{self.first} - {self.second} = {self.value:+.4f} [{self.lower:+.4f}, {self.upper:+.4f}], "
            f"p = {self.p:.2g} ({how}): {verdict}"
        )


def pair_of(result: CKAResult, text: str) -> tuple[int, int]:
    """Rows of "model/layer,model/layer". Raises SpecError where that pair is not in the result."""
    parts = text.split(",")
    if len(parts) != 2:
        raise SpecError(f"got pair '{text}'; expected MODEL/LAYER,MODEL/LAYER")
    i, j = (result.find(p.strip()) for p in parts)
    if not result.mask[i, j]:
        raise SpecError(f"{text} was not computed; compute with --pairs all")
    return i, j


def differences(
    first: CKAResult, second: CKAResult, pairs: Sequence[tuple[tuple[int, int], tuple[int, int]]], *, confidence=0.95
) -> list[Difference]:
    """first[i, j] - second[k, l] for every ((i, j), (k, l)).

    Raises SpecError where a result holds no values without single units (interval="none", or saved without its file).

    >>> from cka_addon.align import Clock
    >>> from cka_addon.models import ModelInfo
    >>> left = LeftOut([str(i) for i in range(30)], np.random.default_rng(0).normal(0.5, 0.01, (30, 2, 2)), 30)
    >>> info = ModelInfo("m", ("a", "b"), (1, 1), Clock(0.02, 0.0))
    >>> r = CKAResult([info], np.full((2, 2), 0.5), np.ones((2, 2), bool), None, None, None, np.ones((2, 2)), {}, left)
    >>> differences(r, r, [((0, 1), (0, 1))])[0].value
    0.0
    """
    from scipy import stats

    for result in (first, second):
        if result.left_out is None:
            reason = result.details.get("interval", "none")
            raise SpecError(
                f"a result has no values without single units (interval {reason}); compute it with --interval "
                "jackknife, and keep RESULT.units.npz beside it"
            )
    one, two = first.left_out, second.left_out
    assert one is not None and two is not None
    paired = one.units == two.units and one.kind == two.kind
    if paired and one.kind == "block" and first is not second:
        # Blocks carry numbers only: the same ones hold the same utterances where order and list are the same.
        same = [(r.details.get("utterances_sha256"), r.details.get("order")) for r in (first, second)]
        paired = same[0] == same[1]
    found = []
    for a, b in pairs:
        value = float(first.values[a] - second.values[b])
        x, y = one.values[:, a[0], a[1]], two.values[:, b[0], b[1]]
        parts = [(x - y, one)] if paired else [(x, one), (y, two)]
        errors, freedom = [], []
        for left, source in parts:
            moved = LeftOut(source.units, left[:, None, None], source.total, source.kind)
            errors.append(float(moved.spread()[0, 0]))
            freedom.append(float(moved.freedom()[0, 0]))
        error, dof = float(np.hypot.reduce(errors)), min(freedom)
        half = float(stats.t.ppf(0.5 + confidence / 2, dof)) * error
        p = float(2 * stats.t.sf(abs(value) / error, dof)) if error > 0 else float(value == 0)
        names = [",".join("/".join(r.labels[k]) for k in pair) for r, pair in ((first, a), (second, b))]
        found.append(Difference(names[0], names[1], value, value - half, value + half, p, paired, error))
    _holm(found)
    return found


def _holm(found: list[Difference]) -> None:
    """Correct the p values for their number (Holm 1979)."""
    largest = 0.0
    for rank, item in enumerate(sorted(found, key=lambda d: d.p)):
        largest = max(largest, min(1.0, item.p * (len(found) - rank)))
        item.p = largest


def every_pair(first: CKAResult, second: CKAResult, *, confidence: float = 0.95) -> list[Difference]:
    """All pairs of layers that two results share, by name."""
    labels = {label: k for k, label in enumerate(second.labels)}
    shared = [(k, labels[label]) for k, label in enumerate(first.labels) if label in labels]
    if len(shared) < 2:
        raise SpecError(f"the results share {len(shared)} layers by name; expected at least two: name models alike")
    pairs = [
        ((i, j), (k, l))
        for (i, k), (j, l) in itertools.combinations(shared, 2)  # noqa: E741
        if first.mask[i, j] and second.mask[k, l]
    ]
    return differences(first, second, pairs, confidence=confidence)


def bias_of_minibatches(minibatch: CKAResult, full: CKAResult) -> str:
    """What the minibatch estimate adds to the exact value, in words; both of the same utterances."""
    if (minibatch.details["options"]["mode"], full.details["options"]["mode"]) != ("minibatch", "full"):
        raise SpecError("got results of other modes; expected one of --mode minibatch and one of --mode full")
    if minibatch.details["utterances_sha256"] != full.details["utterances_sha256"]:
        raise SpecError("the results are of other utterances; expected the same recordings in both modes")
    off = np.triu(minibatch.mask & full.mask, 1)
    away = (minibatch.values - full.values)[off]
    most = away[np.abs(away).argmax()]
    text = f"minibatches give {away.mean():+.4f} on average and up to {most:+.4f} against all examples"
    if minibatch.left_out is not None:
        error = minibatch.left_out.spread()[off]
        text += f" (up to {np.abs(away / np.maximum(error, 1e-12)).max():.1f} standard errors)"
    shares = [r.details.get("pairs_within_utterances") for r in (minibatch, full)]
    if all(s is not None for s in shares):
        text += f": {shares[0]:.1%} of the pairs in a minibatch are of one utterance, {shares[1]:.2%} of all pairs"
    return text
