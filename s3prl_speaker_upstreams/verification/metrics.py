"""Error rates, detection costs and their intervals, of scores and labels.

Scores are "larger means more likely the same speaker"; labels are 1 for target trials (same speaker), 0 for others.
Error rates are fractions, not per cent. Costs of *actual* decisions (:func:`act_dcf`, :func:`cllr`) want scores that
are log likelihood ratios: cosines must be calibrated first (:mod:`.calibration`).

>>> eer([0.9, 0.8, 0.3, 0.7, 0.2, 0.1], [1, 1, 1, 0, 0, 0])  # one of three missed, one of three false alarms
0.3333333333333333
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from s3prl_speaker_upstreams.errors import ConfigError

__all__ = [
    "act_dcf",
    "bootstrap",
    "cllr",
    "det_curve",
    "eer",
    "eer_threshold",
    "effective_dimension",
    "evaluate_scores",
    "min_cllr",
    "min_dcf",
]


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ConfigError(f"got scores {scores.shape} and labels {labels.shape}, expected two of the same (trials,)")
    labels = labels.astype(bool)
    if not labels.any() or labels.all():
        raise ConfigError(f"got {int(labels.sum())} target trials of {len(labels)}, expected some of both kinds")
    if not np.isfinite(scores).all():
        raise ConfigError(f"got {int((~np.isfinite(scores)).sum())} scores that are not finite; check the embeddings")
    return scores, labels


def det_curve(
    scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Miss rate, false alarm rate and threshold at every distinct score, thresholds rising.

    A trial is accepted if its score is at least the threshold; the last threshold, infinity, accepts none.

    Parameters
    ----------
    scores, labels : (trials,)
    weights : (trials,), optional
        How often each trial counts.

    Returns
    -------
    miss, false_alarm, threshold : (distinct scores + 1,) float64

    >>> miss, false_alarm, threshold = det_curve([1.0, 2.0, 2.0, 3.0], [0, 0, 1, 1])
    >>> miss.tolist(), false_alarm.tolist(), threshold.tolist()
    ([0.0, 0.0, 0.5, 1.0], [1.0, 0.5, 0.0, 0.0], [1.0, 2.0, 3.0, inf])
    """
    scores, labels = _checked(scores, labels)
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    # Equal scores are accepted together: only where the score changes is there a point of the curve.
    first = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    weight = np.ones(len(scores)) if weights is None else np.asarray(weights, dtype=np.float64)[order]
    target = np.concatenate([[0.0], np.cumsum(weight * labels[order])])
    other = np.concatenate([[0.0], np.cumsum(weight * ~labels[order])])
    points = np.concatenate([first, [len(scores)]])
    return target[points] / target[-1], 1 - other[points] / other[-1], np.concatenate([ranked[first], [np.inf]])


def _crossing(miss: np.ndarray, false_alarm: np.ndarray) -> tuple[float, int, float]:
    """Where the straight lines between the points of the curve cross miss = false alarm: rate, point before, share."""
    difference = miss - false_alarm  # rises from -1 to 1
    after = int(np.argmax(difference >= 0))
    before = max(after - 1, 0)
    step = difference[after] - difference[before]
    share = 1.0 if step == 0 else float(-difference[before] / step)
    return float(miss[before] + share * (miss[after] - miss[before])), before, share


def eer(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Equal error rate: where misses and false alarms are equally frequent, interpolated linearly on the curve.

    This is the convention of the field (the root of ``1 - x - tpr(x)`` on a piecewise linear ROC).

    >>> eer([3.0, 2.0, 1.0, 0.0], [1, 1, 0, 0]), eer([0.0, 0.0, 0.0, 0.0], [1, 1, 0, 0])
    (0.0, 0.5)
    """
    miss, false_alarm, _ = det_curve(scores, labels, weights)
    return _crossing(miss, false_alarm)[0]


def eer_threshold(scores: ArrayLike, labels: ArrayLike) -> float:
    """Smallest threshold at which misses are at least as frequent as false alarms; finite.

    >>> eer_threshold([3.0, 2.0, 1.0, 0.0], [1, 1, 0, 0])
    2.0
    """
    miss, false_alarm, threshold = det_curve(scores, labels)
    return float(threshold[: len(threshold) - 1][min(int(np.argmax(miss >= false_alarm)), len(threshold) - 2)])


def min_dcf(
    scores: ArrayLike,
    labels: ArrayLike,
    p_target: float = 0.01,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
    weights: ArrayLike | None = None,
) -> float:
    """Smallest detection cost over all thresholds, relative to the better of accepting all and accepting none.

    ``min over thresholds of (c_miss * p_target * miss + c_fa * (1 - p_target) * false alarms) / min(c_miss * p_target,
    c_fa * (1 - p_target))``, as in the NIST SRE and VoxSRC evaluation plans.

    >>> round(min_dcf([4.0, 3.0, 1.0, 2.0, 0.0], [1, 1, 1, 0, 0], p_target=0.01), 6)  # a third missed
    0.333333
    """
    if not 0 < p_target < 1:
        raise ConfigError(f"p_target: got {p_target}, expected a probability between 0 and 1")
    miss, false_alarm, _ = det_curve(scores, labels, weights)
    cost = c_miss * p_target * miss + c_fa * (1 - p_target) * false_alarm
    return float(cost.min() / min(c_miss * p_target, c_fa * (1 - p_target)))


def bootstrap(
    scores: ArrayLike,
    labels: ArrayLike,
    units: ArrayLike | None = None,
    *,
    measure: Callable[..., float] = eer,
    samples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Confidence interval of an error rate by drawing units with repetition.

    Trials that share a recording or a speaker are not independent, so drawing trials gives intervals that are far too
    narrow. With ``units`` a trial counts as often as the product of how often its two units were drawn.

    Parameters
    ----------
    scores, labels : (trials,)
    units : (trials, 2) int, optional
        Numbers of what the two sides are samples of: recordings, or speakers. None: trials are drawn.
    measure : callable of (scores, labels, weights=)
    samples : int
        How many draws.
    level : float
    seed : int

    Returns
    -------
    low, high : float

    >>> low, high = bootstrap([3.0, 1.0, 2.0, 0.0] * 20, [1, 1, 0, 0] * 20)
    >>> low <= 0.5 <= high
    True
    """
    scores, labels = _checked(scores, labels)
    rng = np.random.default_rng(seed)
    order = np.argsort(scores, kind="stable")  # once: sorting what is sorted costs next to nothing in every draw
    scores, labels = scores[order], labels[order]
    if units is None:
        pairs, count = np.arange(len(scores))[:, None], len(scores)
    else:
        distinct, numbers = np.unique(np.asarray(units), return_inverse=True)
        pairs, count = numbers.reshape(-1, 2)[order], len(distinct)
    out: list[float] = []
    for _ in range(20 * samples):
        drawn = np.bincount(rng.integers(count, size=count), minlength=count)
        # Both sides of one unit (a speaker's target trials): it was drawn once for both.
        same = pairs[:, 0] == pairs[:, -1]
        weights = np.where(same, drawn[pairs[:, 0]], drawn[pairs[:, 0]] * drawn[pairs[:, -1]])
        if (weights[labels] > 0).any() and (weights[~labels] > 0).any():
            out.append(measure(scores, labels, weights=weights))
        if len(out) == samples:
            break
    if not out:
        raise ConfigError(f"got {count} units, of which no draw holds trials of both kinds; draw smaller units")
    low, high = np.quantile(out, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _log2_1p_exp(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x) / np.log(2)


def cllr(scores: ArrayLike, labels: ArrayLike) -> float:
    """Cost of log likelihood ratios in bits a trial: 0 is perfect, 1 knows nothing (Bruemmer and du Preez, 2006).

    >>> cllr([0.0, 0.0], [1, 0]), round(cllr([np.log(3), -np.log(3)], [1, 0]), 4)
    (1.0, 0.415)
    """
    ratios, same = _checked(scores, labels)
    return float((_log2_1p_exp(-ratios[same]).mean() + _log2_1p_exp(ratios[~same]).mean()) / 2)


def min_cllr(scores: ArrayLike, labels: ArrayLike) -> float:
    """:func:`cllr` after the best monotonous calibration (pool adjacent violators) of these very trials.

    >>> min_cllr([3.0, 2.0, 1.0, 0.0], [1, 1, 0, 0]), min_cllr([5.0, 5.0], [1, 0])
    (0.0, 1.0)
    """
    raw, same = _checked(scores, labels)
    _, group = np.unique(raw, return_inverse=True)
    targets, others = np.bincount(group, same), np.bincount(group, ~same)
    # Blocks of scores whose share of targets rises: a later block with a smaller share is pooled with the one before.
    blocks: list[list[float]] = []
    for target, other in zip(targets, others, strict=True):
        blocks.append([target, other])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            target, other = blocks.pop()
            blocks[-1][0] += target
            blocks[-1][1] += other
    counts = np.array(blocks)
    with np.errstate(divide="ignore"):
        ratios = np.log(counts[:, 0] / same.sum()) - np.log(counts[:, 1] / (~same).sum())
    share = counts / [same.sum(), (~same).sum()]
    losses = np.stack([_log2_1p_exp(-ratios), _log2_1p_exp(ratios)], 1)
    return float((share * np.where(share > 0, losses, 0)).sum() / 2)


def act_dcf(
    scores: ArrayLike, labels: ArrayLike, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0
) -> float:
    """Detection cost of deciding by Bayes' threshold, relative to that of the better of accepting all and none.

    ``scores`` : log likelihood ratios. Never below :func:`min_dcf`; the difference is what calibration costs.

    >>> act_dcf([10.0, 10.0, -10.0, -10.0], [1, 1, 0, 0]), act_dcf([10.0, 0.0, 0.0, -10.0], [1, 1, 0, 0])
    (0.0, 0.5)
    """
    if not 0 < p_target < 1:
        raise ConfigError(f"p_target: got {p_target}, expected a probability between 0 and 1")
    ratios, same = _checked(scores, labels)
    accepted = ratios >= np.log(c_fa * (1 - p_target)) - np.log(c_miss * p_target)
    miss, false_alarm = 1 - accepted[same].mean(), accepted[~same].mean()
    cost = c_miss * p_target * miss + c_fa * (1 - p_target) * false_alarm
    return float(cost / min(c_miss * p_target, c_fa * (1 - p_target)))


def evaluate_scores(
    scores: ArrayLike, labels: ArrayLike, *, bootstrap_samples: int = 0, units: ArrayLike | None = None
) -> dict[str, float]:
    """EER, minDCF at 0.01 and 0.05, counts, and with ``bootstrap_samples`` a 95 % interval of the EER over ``units``.

    >>> sorted(evaluate_scores([3.0, 2.0, 1.0, 0.0], [1, 1, 0, 0]))
    ['eer', 'min_dcf_0.01', 'min_dcf_0.05', 'targets', 'trials']
    """
    out: dict[str, float] = {
        "eer": eer(scores, labels),
        "min_dcf_0.01": min_dcf(scores, labels, 0.01),
        "min_dcf_0.05": min_dcf(scores, labels, 0.05),
        "trials": len(np.asarray(labels)),
        "targets": int(np.asarray(labels).astype(bool).sum()),
    }
    if bootstrap_samples:
        out["eer_low"], out["eer_high"] = bootstrap(scores, labels, units, samples=bootstrap_samples)
    return out


def effective_dimension(x: ArrayLike) -> float:
    """Over how many dimensions the variance of ``x`` (N, D) spreads: exp of the entropy of the covariance's spectrum.

    1 for points on a line, D for a sphere, 0 for a single point; falls when a self-supervised training collapses.

    >>> round(effective_dimension(np.random.default_rng(0).normal(size=(100000, 8))), 1)
    8.0
    >>> round(effective_dimension(np.outer(np.arange(10.0), np.ones(8))), 3)
    1.0
    >>> round(effective_dimension(np.eye(8)), 3)  # 8 points span 7 directions evenly
    7.0
    """
    rows = np.asarray(x, dtype=np.float64)
    power = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
    if power.sum() <= 0:
        return 0.0
    share = power / power.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))
