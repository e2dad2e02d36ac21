"""Linear maps of embeddings that are fitted before scoring: whitening and WCCN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from s3prl_speaker_upstreams.errors import ConfigError

__all__ = ["WCCN", "Whitening"]


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
