"""How sure a CKA value is: intervals from blocks of utterances.

The utterances are dealt at random into blocks. HSIC within a block is an independent, noisier estimate of what the
whole run estimates: to first order a U-statistic over all data has the variance of the mean of the same statistic over
blocks, so the spread over blocks gives the interval without keeping anything but one small matrix per block. (The mean
over blocks forgets pairs of different blocks, whose part in the variance is of second order: intervals are a little
wide rather than narrow.) Frames of one utterance stay in one block, so their dependence is accounted for.
"""

from __future__ import annotations

import logging

import numpy as np

logger = logging.getLogger(__name__)

METHODS = ("bootstrap", "jackknife", "none")
MIN_BLOCKS = 5


def ratio(h: np.ndarray) -> np.ndarray:
    """HSIC (..., layers, layers) -> CKA; NaN where a diagonal entry is not positive."""
    diagonal = np.diagonal(h, axis1=-2, axis2=-1)
    root = np.sqrt(np.where(diagonal > 0, diagonal, np.nan))
    return h / root[..., :, None] / root[..., None, :]


def intervals(
    blocks: np.ndarray,
    weights: np.ndarray,
    point: np.ndarray,
    *,
    method: str = "bootstrap",
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Lower and upper end of the interval of every CKA value, or None where there can be none.

    blocks : (blocks, layers, layers) HSIC of each block;  weights : (blocks,) its number of examples or minibatches
    point : (layers, layers) CKA of the whole run, which the interval is laid about
    method : "bootstrap" draws blocks with replacement and takes percentiles, widened for the small number of blocks
        (by t over normal quantile and by sqrt(B / (B - 1))); "jackknife" leaves one block out at a time and uses t

    >>> rng = np.random.default_rng(0)
    >>> h = np.eye(2) + 0.5 * (1 - np.eye(2)) + 0.02 * rng.standard_normal((20, 1, 1)) * (1 - np.eye(2))
    >>> low, high = intervals(h, np.ones(20), ratio(h.mean(0)))
    >>> bool(low[0, 1] < 0.5 < high[0, 1]), bool(high[0, 1] - low[0, 1] < 0.05)
    (True, True)
    """
    from scipy import stats

    if method not in METHODS:
        raise ValueError(f"got interval={method!r}; expected one of {', '.join(METHODS)}")
    count = len(blocks)
    if method == "none":
        return None
    if count < MIN_BLOCKS:
        logger.warning("no intervals: %d blocks of utterances, expected at least %d", count, MIN_BLOCKS)
        return None
    tail = (1 - confidence) / 2
    t = float(stats.t.ppf(1 - tail, count - 1))
    weighted = weights[:, None, None] * np.nan_to_num(blocks)
    total = weighted.sum(0)
    if method == "jackknife":
        left_out = ratio((total - weighted) / (weights.sum() - weights)[:, None, None])
        if np.isnan(left_out).any():
            logger.warning("no intervals: a layer's HSIC with itself is not positive in part of the data")
            return None
        half = t * np.sqrt((count - 1) / count * ((left_out - left_out.mean(0)) ** 2).sum(0))
        low, high = point - half, point + half
    else:
        rng = np.random.default_rng(seed)
        draws = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
        drawn = np.tensordot(draws, weighted, 1) / (draws @ weights)[:, None, None]
        values = ratio(drawn)
        bad = np.isnan(values).any(axis=(1, 2))
        if bad.mean() > 0.01:
            logger.warning(
                "no intervals: in %.0f %% of the resamples a layer's own HSIC is not positive", 100 * bad.mean()
            )
            return None
        values = values[~bad]
        widen = t / float(stats.norm.ppf(1 - tail)) * np.sqrt(count / (count - 1))
        centre = ratio(total / weights.sum())
        low = point + widen * (np.quantile(values, tail, axis=0) - centre)
        high = point + widen * (np.quantile(values, 1 - tail, axis=0) - centre)
    for ends in (low, high):
        np.fill_diagonal(ends, 1.0)
    return low, high
