"""Scores to log likelihood ratios: logistic regression on other trials than those that are judged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.verification.metrics import cllr

__all__ = ["Calibration"]


@dataclass(frozen=True)
class Calibration:
    """``scale * score + offset`` is a log likelihood ratio.

    >>> rng = np.random.default_rng(0)
    >>> labels = rng.random(20000) < 0.1
    >>> scores = rng.normal(size=20000) / 2 + labels  # two Gaussians: the ratio is 4 s - 2
    >>> fitted = Calibration.fit(scores, labels)
    >>> round(fitted.scale), round(fitted.offset)
    (4, -2)
    """

    scale: float
    offset: float

    def __call__(self, scores: ArrayLike) -> np.ndarray:
        """(trials,) -> (trials,) float64."""
        return self.scale * np.asarray(scores, dtype=np.float64) + self.offset

    @classmethod
    def fit(cls, scores: ArrayLike, labels: ArrayLike) -> Calibration:
        """Minimise :func:`.metrics.cllr`, in which target and other trials weigh the same however many there are.

        Raises ConfigError if there are not trials of both kinds, or the scores tell nothing.
        """
        from scipy.optimize import minimize

        values = np.asarray(scores, dtype=np.float64)
        centre, spread = values.mean(), values.std()
        if not spread > 0:
            raise ConfigError("all scores are the same: nothing to calibrate")
        standard = (values - centre) / spread
        found = minimize(lambda x: cllr(x[0] * standard + x[1], labels), np.array([1.0, 0.0]), method="BFGS")
        # Of trials that are separated without error the scale grows without end; 50 nats are as good as certain.
        scale, offset = found.x * min(1.0, 50 / max(abs(found.x[0]), 1e-12))
        return cls(float(scale / spread), float(offset - scale * centre / spread))
