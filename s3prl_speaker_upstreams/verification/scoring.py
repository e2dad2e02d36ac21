"""Scores of pairs of embeddings: cosine, after a mean or a linear map, normalised by a cohort.

Scores are "larger means more likely the same speaker".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.verification.trials import Trials

__all__ = ["as_norm", "cosine_scores", "score_pairs", "score_trials"]


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def cosine_scores(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosine of row ``i`` of ``x`` with row ``i`` of ``y``: (N, D), (N, D) -> (N,) float64.

    >>> cosine_scores(np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]])).round(4).tolist()
    [0.7071]
    """
    return np.einsum("nd,nd->n", _unit(x), _unit(y))


def as_norm(
    scores: np.ndarray, enrol_cohort: tuple[np.ndarray, np.ndarray], test_cohort: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
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
