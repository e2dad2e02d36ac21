"""Speaker verification scores and their error rates.

Scores are "larger means more likely the same speaker"; labels are 1 for target trials (same speaker), 0 for others.
Error rates are fractions, not per cent.

>>> eer([0.9, 0.8, 0.3, 0.7, 0.2, 0.1], [1, 1, 1, 0, 0, 0])  # one of three missed, one of three false alarms
0.3333333333333333
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from s3prl_speaker_upstreams.common.files import write_text
from s3prl_speaker_upstreams.errors import ConfigError

__all__ = [
    "Trials",
    "WCCN",
    "Whitening",
    "all_pairs",
    "as_norm",
    "bootstrap",
    "cosine",
    "det_curve",
    "eer",
    "eer_threshold",
    "effective_dimension",
    "evaluate_scores",
    "min_dcf",
    "read_trials",
    "score_pairs",
    "score_trials",
    "write_trials",
]


# ---------------------------------------------------------------------------------------------- error rates
def _checked(scores, labels) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ConfigError(f"got scores {scores.shape} and labels {labels.shape}, expected two of the same (trials,)")
    labels = labels.astype(bool)
    if not labels.any() or labels.all():
        raise ConfigError(f"got {int(labels.sum())} target trials of {len(labels)}, expected some of both kinds")
    if not np.isfinite(scores).all():
        raise ConfigError(f"got {int((~np.isfinite(scores)).sum())} scores that are not finite; check the embeddings")
    return scores, labels


def det_curve(scores, labels, weights=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


def eer(scores, labels, weights=None) -> float:
    """Equal error rate: where misses and false alarms are equally frequent, interpolated linearly on the curve.

    This is the convention of the field (the root of ``1 - x - tpr(x)`` on a piecewise linear ROC).

    >>> eer([3.0, 2.0, 1.0, 0.0], [1, 1, 0, 0]), eer([0.0, 0.0, 0.0, 0.0], [1, 1, 0, 0])
    (0.0, 0.5)
    """
    miss, false_alarm, _ = det_curve(scores, labels, weights)
    return _crossing(miss, false_alarm)[0]


def eer_threshold(scores, labels) -> float:
    """Smallest threshold at which misses are at least as frequent as false alarms; finite.

    >>> eer_threshold([3.0, 2.0, 1.0, 0.0], [1, 1, 0, 0])
    2.0
    """
    miss, false_alarm, threshold = det_curve(scores, labels)
    return float(threshold[: len(threshold) - 1][min(int(np.argmax(miss >= false_alarm)), len(threshold) - 2)])


def min_dcf(scores, labels, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0, weights=None) -> float:
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
    scores, labels, units=None, *, measure: Callable = eer, samples: int = 200, level: float = 0.95, seed: int = 0
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


def evaluate_scores(scores, labels, *, bootstrap_samples: int = 0, units=None) -> dict[str, float]:
    """EER, minDCF at 0.01 and 0.05, counts, and with ``bootstrap_samples`` a 95 % interval of the EER.

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


# ---------------------------------------------------------------------------------------------- trial lists
@dataclass(frozen=True)
class Trials:
    """A trial list: ``labels`` (trials,) int64, and the names of both sides."""

    labels: np.ndarray
    enrol: tuple[str, ...]
    test: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.enrol)

    @property
    def names(self) -> list[str]:
        """Every recording that is needed, once, sorted."""
        return sorted({*self.enrol, *self.test})


_LABELS = {"1": 1, "0": 0, "target": 1, "nontarget": 0, "imposter": 0, "impostor": 0}


def read_trials(path: str | os.PathLike) -> Trials:
    """Read ``label enrol test`` lines (VoxCeleb: label 1 or 0) or ``enrol test target|nontarget`` lines (Kaldi).

    Raises ConfigError naming the first line that is neither.

    >>> import tempfile
    >>> name = tempfile.mkstemp()[1]
    >>> _ = Path(name).write_text("1 id1/a.wav id1/b.wav\\n0 id1/a.wav id2/c.wav\\n")
    >>> trials = read_trials(name)
    >>> trials.labels.tolist(), trials.names
    ([1, 0], ['id1/a.wav', 'id1/b.wav', 'id2/c.wav'])
    """
    labels, enrol, test = [], [], []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) == 3 and parts[0] in _LABELS:
            label, first, second = parts
        elif len(parts) == 3 and parts[2] in _LABELS:
            first, second, label = parts
        else:
            raise ConfigError(
                f"{path}, line {number}: got {line!r}, expected '1|0 enrol test' or 'enrol test target|nontarget'"
            )
        labels.append(_LABELS[label])
        enrol.append(first)
        test.append(second)
    if not labels:
        raise ConfigError(f"{path}: got no trials, expected lines like '1 id1/a.wav id1/b.wav'")
    return Trials(np.array(labels, dtype=np.int64), tuple(enrol), tuple(test))


def write_trials(trials: Trials, path: str | os.PathLike) -> Path:
    """Write ``label enrol test`` lines; the file appears whole or not at all."""
    rows = zip(trials.labels, trials.enrol, trials.test, strict=True)
    return write_text(path, "".join(f"{label} {first} {second}\n" for label, first, second in rows))


def all_pairs(speakers: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of recordings once: pairs (trials, 2) and labels (trials,), 1 where the speaker is the same.

    >>> pairs, labels = all_pairs(["a", "a", "b"])
    >>> pairs.tolist(), labels.tolist()
    ([[0, 1], [0, 2], [1, 2]], [1, 0, 0])
    """
    speakers = np.asarray(speakers)
    first, second = np.triu_indices(len(speakers), 1)
    return np.stack([first, second], 1), (speakers[first] == speakers[second]).astype(np.int64)


# ---------------------------------------------------------------------------------------------- scores
def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosine of row ``i`` of ``x`` with row ``i`` of ``y``: (N, D), (N, D) -> (N,) float64.

    >>> cosine(np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]])).round(4).tolist()
    [0.7071]
    """
    return np.einsum("nd,nd->n", _unit(x), _unit(y))


def as_norm(scores: np.ndarray, enrol_cohort: tuple, test_cohort: tuple) -> np.ndarray:
    """Mean of the two sides' normalised scores, ``((s - m_e) / d_e + (s - m_t) / d_t) / 2``.

    Parameters
    ----------
    scores : (trials,)
    enrol_cohort, test_cohort : (mean, deviation), each (trials,)
        Of the highest cohort scores of either side (Matejka et al., Interspeech 2017, adaptive s-norm).

    >>> as_norm(np.array([0.5]), (np.array([0.1]), np.array([0.2])), (np.array([0.3]), np.array([0.1]))).tolist()
    [2.0]
    """
    (mean_e, dev_e), (mean_t, dev_t) = enrol_cohort, test_cohort
    return 0.5 * ((scores - mean_e) / dev_e + (scores - mean_t) / dev_t)


def _cohort_statistics(x: np.ndarray, cohort: np.ndarray, top_n: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the ``top_n`` highest cosines of every row of ``x`` with the cohort; in blocks."""
    x, cohort = _unit(x), _unit(cohort)
    top = min(top_n, len(cohort))
    mean, deviation = np.empty(len(x)), np.empty(len(x))
    block = max(1, 2**24 // len(cohort))
    for start in range(0, len(x), block):
        scores = x[start : start + block] @ cohort.T
        best = np.partition(scores, len(cohort) - top, axis=1)[:, len(cohort) - top :]
        mean[start : start + block], deviation[start : start + block] = best.mean(1), best.std(1)
    return mean, np.maximum(deviation, 1e-6)


def score_trials(
    trials: Trials,
    embeddings: Mapping[str, np.ndarray],
    *,
    mean: np.ndarray | None = None,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    cohort: np.ndarray | None = None,
    top_n: int = 300,
) -> np.ndarray:
    """Cosine scores of a trial list.

    Parameters
    ----------
    trials : Trials
    embeddings : mapping of name -> (D,)
    mean : (D,), optional
        Subtracted from all embeddings first (that of the cohort or of training speech).
    transform : callable (N, D) -> (N, E), optional
        For instance :class:`Whitening` or :class:`WCCN`; applied after the mean.
    cohort : (M, D), optional
        Embeddings of other speakers, treated as the trials' are; with them scores are AS-normalised.
    top_n : int
        Nearest members of the cohort that the normalisation uses, of either side.

    Returns
    -------
    (trials,) float64

    Raises ConfigError if an embedding is missing.

    >>> trials = Trials(np.array([1, 0]), ("a", "a"), ("b", "c"))
    >>> score_trials(trials, {"a": np.array([1.0, 0.0]), "b": np.array([2.0, 0.0]), "c": np.array([0.0, 1.0])}).tolist()
    [1.0, 0.0]
    """
    names = trials.names
    missing = [name for name in names if name not in embeddings]
    if missing:
        raise ConfigError(
            f"got no embedding for {len(missing)} of {len(names)} recordings of the trial list, first {missing[0]!r}; "
            "are its paths relative to the folder that was embedded?"
        )
    table = np.stack([np.asarray(embeddings[name], dtype=np.float64) for name in names])
    row = {name: index for index, name in enumerate(names)}
    enrol = np.array([row[name] for name in trials.enrol])
    test = np.array([row[name] for name in trials.test])
    return score_pairs(table, np.stack([enrol, test], 1), mean=mean, transform=transform, cohort=cohort, top_n=top_n)


def score_pairs(
    embeddings: np.ndarray,
    pairs: np.ndarray,
    *,
    mean: np.ndarray | None = None,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    cohort: np.ndarray | None = None,
    top_n: int = 300,
) -> np.ndarray:
    """As :func:`score_trials`, of rows of ``embeddings`` (N, D) that ``pairs`` (trials, 2) number.

    >>> score_pairs(np.eye(2), np.array([[0, 0], [0, 1]])).tolist()
    [1.0, 0.0]
    """

    def treat(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, dtype=np.float64)
        x = x if mean is None else x - mean
        return _unit(x if transform is None else transform(x))

    table = treat(embeddings)
    scores = np.einsum("nd,nd->n", table[pairs[:, 0]], table[pairs[:, 1]])
    if cohort is None:
        return scores
    centre, deviation = _cohort_statistics(table, treat(cohort), top_n)
    sides = [(centre[pairs[:, side]], deviation[pairs[:, side]]) for side in (0, 1)]
    return as_norm(scores, sides[0], sides[1])


# ---------------------------------------------------------------------------------------------- transforms
@dataclass(frozen=True)
class _AffineMap:
    """``(x - mean) @ matrix``, however the two were fitted."""

    mean: np.ndarray
    matrix: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, D) float64."""
        return (np.asarray(x, dtype=np.float64) - self.mean) @ self.matrix


class Whitening(_AffineMap):
    """``(x - mean) @ matrix``: unit covariance over the speech it was fitted on.

    >>> x = np.random.default_rng(0).normal(size=(1000, 2)) @ np.array([[3.0, 0.0], [1.0, 0.1]]) + 5
    >>> np.cov(Whitening.fit(x, shrink=0.0)(x).T).round(6).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    @classmethod
    def fit(cls, x: np.ndarray, shrink: float = 1e-3) -> Whitening:
        """Fit on embeddings ``x`` (N, D).

        ``shrink`` times the mean variance is added to all variances, so that directions without variance are not
        blown up. Raises ConfigError for fewer than two embeddings.
        """
        x = _embeddings(x)
        return cls(x.mean(0), _inverse_root(np.cov(x.T, ddof=1), shrink))


class WCCN(_AffineMap):
    """``(x - mean) @ matrix``: unit covariance *within* classes (Hatch et al., Interspeech 2006).

    Classes may be speakers, or, without labels, augmented crops of one utterance: then what augmentation changes is
    scaled down.

    >>> rng = np.random.default_rng(0)
    >>> groups = np.repeat(np.arange(50), 20)
    >>> x = rng.normal(size=(50, 2))[groups] * 5 + rng.normal(size=(1000, 2)) * [4.0, 0.5]
    >>> y = WCCN.fit(x, groups, shrink=0.0)(x)
    >>> within = y - np.stack([y[groups == g].mean(0) for g in range(50)])[groups]
    >>> (within.T @ within / (1000 - 50)).round(6).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    @classmethod
    def fit(cls, x: np.ndarray, groups: Sequence | np.ndarray, shrink: float = 1e-3) -> WCCN:
        """Fit on embeddings ``x`` (N, D) of classes ``groups`` (N,).

        Raises ConfigError if no class has two members.
        """
        x = _embeddings(x)
        _, numbers, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
        if len(numbers) != len(x) or counts.max() < 2:
            raise ConfigError(f"got {len(x)} embeddings in {len(counts)} groups, expected groups of at least two")
        sums = np.zeros((len(counts), x.shape[1]))
        np.add.at(sums, numbers, x)
        within = x - (sums / counts[:, None])[numbers]
        return cls(x.mean(0), _inverse_root(within.T @ within / max(len(x) - len(counts), 1), shrink))


def _embeddings(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2 or not np.isfinite(x).all():
        raise ConfigError(f"got embeddings of shape {x.shape}, expected at least two finite ones, (N, D)")
    return x


def _inverse_root(covariance: np.ndarray, shrink: float) -> np.ndarray:
    covariance = np.atleast_2d(covariance)
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, 0) + shrink * max(values.mean(), 0)
    floor = max(float(values.max()) * 1e-10, 1e-30)
    return (vectors / np.sqrt(np.maximum(values, floor))) @ vectors.T


def effective_dimension(x: np.ndarray) -> float:
    """Over how many dimensions the variance of ``x`` (N, D) spreads: exp of the entropy of the covariance's spectrum.

    1 for points on a line, D for a sphere; falls when a self-supervised training collapses.

    >>> round(effective_dimension(np.random.default_rng(0).normal(size=(100000, 8))), 1)
    8.0
    >>> round(effective_dimension(np.outer(np.arange(10.0), np.ones(8))), 3)
    1.0
    """
    x = np.asarray(x, dtype=np.float64)
    values = np.maximum(np.linalg.eigvalsh(np.atleast_2d(np.cov(x.T))), 0)
    total = values.sum()
    if total <= 0:
        return 0.0
    share = values / total
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))
