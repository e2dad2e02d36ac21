"""How sure a value is: intervals from leaving out one unit (an utterance, a speaker, a block) at a time.

Utterances, not frames, are what a corpus is a sample of: frames of one utterance resemble each other. So the spread of
a value is taken from what it becomes when one unit is left out (the delete-one jackknife), the interval from Student's
t with as many degrees of freedom as there are units less one, on Fisher's z scale, where a similarity near 1 or 0 has
a symmetric distribution. Coverage of these intervals is measured in `recipes/benchmark/cka_intervals.py`.

What leaving a unit out does to HSIC is known from sums, without computing anything again: with R_u the sum of
k_ij l_ij over all i in u and all j, T_u its part with j in u, n' the examples that stay, and Q_u what the moved mean
does,  HSIC_-u = (n^2 HSIC - 2 R_u + T_u - 2 Q_u) / n'^2. R_u = sum of x_i' C y_i needs the whole cross-covariance C,
which is known at the end only; `Kept` holds the features for that: all of them where they are few, else a sample of
frames of every unit, evenly spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cka_addon.moments import Moments

METHODS = ("jackknife", "bootstrap", "none")
MIN_UNITS = {"utterance": 10, "speaker": 8, "block": 5}
KEPT_FRAMES = 8192  # frames kept for the intervals, and for measures that work on a sample
KEPT_BYTES = 1 << 30
LEAST_FRAMES = 8  # of a unit; where there is no room for so many, fewer units are kept
GRAM_BYTES = 256 << 20


@dataclass
class Kept:
    """Examples of some units, kept until the end.

    units : names;  layers : per layer, (examples, width);  owner : (examples,) index of the unit
    weight : (examples,) how many examples of its unit each stands for
    """

    units: list[str]
    layers: list[Tensor]
    owner: np.ndarray
    weight: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[Kept]) -> Kept:
        """Several blocks' as one; units are of one block each."""
        starts = np.cumsum([0, *(len(p.units) for p in parts)])
        return cls(
            [name for p in parts for name in p.units],
            [torch.cat(column) for column in zip(*(p.layers for p in parts), strict=True)],
            np.concatenate([p.owner + start for p, start in zip(parts, starts[:-1], strict=True)]),
            np.concatenate([p.weight for p in parts]),
        )


@dataclass
class LeftOut:
    """What a matrix of values becomes without each unit.

    units : names;  values : (units, layers, layers);  total : units of the whole run, of which these may be a part
    kind : "utterance", "speaker" or "block"
    noise : (layers, layers) part of the variance over units that comes from having kept some of their frames only
    """

    units: list[str]
    values: np.ndarray
    total: int
    kind: str = "utterance"
    noise: np.ndarray | float = 0.0

    def spread(self) -> np.ndarray:
        """Standard error of every value, (layers, layers)."""
        variance = ((self.values - self.values.mean(0)) ** 2).mean(0)
        # The noise is an estimate too: it is never believed to be more than three quarters of what was found.
        return np.sqrt((self.total - 1) * np.maximum(variance - self.noise, 0.25 * variance))

    def problem(self) -> str | None:
        """Why there can be no interval; None where there can be one."""
        least = MIN_UNITS[self.kind]
        if len(self.units) >= least:
            return None
        plural = {"utterance": "utterances", "speaker": "speakers", "block": "blocks of utterances"}[self.kind]
        return f"{len(self.units)} {plural}, intervals need at least {least}"


def frames_to_keep(dims: Sequence[int], itemsize: int, units: int) -> tuple[int, int]:
    """(units to keep examples of, examples of each) for the intervals of a run with many examples.

    >>> frames_to_keep([768] * 13, 4, 25), frames_to_keep([768] * 13, 4, 2000)
    ((25, 327), (1024, 8))
    """
    room = int(min(KEPT_FRAMES, KEPT_BYTES // (sum(dims) * itemsize)))
    wanted = max(1, min(units, room // LEAST_FRAMES))
    return wanted, max(2, room // wanted)


def pick_frames(count: int, wanted: int, offset: float) -> np.ndarray:
    """Positions of `wanted` of `count` examples, evenly spread. offset : 0 to 1, where the first one lies.

    >>> pick_frames(10, 3, 0.5).tolist(), pick_frames(2, 3, 0.5).tolist()
    ([1, 5, 8], [0, 1])
    """
    if wanted >= count:
        return np.arange(count)
    return ((np.arange(wanted) + offset) * count / wanted).astype(int)


def leave_out(
    kept: Kept,
    h: np.ndarray,
    n: int,
    moments: Moments | None = None,
    *,
    total: int | None = None,
    kind: str = "utterance",
) -> LeftOut:
    """CKA without each unit. h : HSIC of all n examples;  total : units of the run, where `kept` holds some of them

    moments : sums over all examples, where `kept` holds a sample of them
    """
    left, noise = without_each_unit(kept, h, n, moments)
    values = ratio(left)
    diagonal = np.diagonal(h)
    root = np.sqrt(np.where(diagonal > 0, diagonal, np.nan))
    part = np.einsum("uii->ui", noise) / diagonal
    # The change of h_xy / sqrt(h_xx h_yy) that a small change of the three makes.
    change = noise / root[:, None] / root - 0.5 * ratio(h) * (part[:, :, None] + part[:, None, :])
    return LeftOut(kept.units, values, total or len(kept.units), kind, (change**2).mean(0))


def without_each_unit(
    kept: Kept, h: np.ndarray, n: int, moments: Moments | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """HSIC without each unit, and half the difference between two halves of its frames, both (units, layers, layers).

    h : HSIC of all n examples;  moments : sums over all of them, where `kept` holds a sample
    The halves tell how much of the spread over units comes from having kept a sample of frames; 0 where all were kept.
    """
    owner = torch.from_numpy(kept.owner)
    weight = torch.from_numpy(kept.weight)
    units, count = len(kept.units), len(kept.layers)
    size = torch.zeros(units, dtype=torch.float64).index_add_(0, owner, weight)
    if moments is None and len(owner) ** 2 * count * kept.layers[0].element_size() <= GRAM_BYTES:
        row_sums, moved = _from_grams(kept, owner, units)
        halves = np.zeros_like(row_sums)
    else:
        if moments is None:
            raise ValueError("too many examples for Gram matrices: the sums over all of them are needed")
        row_sums, moved, halves = _from_moments(kept, owner, weight, units, moments)
    inside = _inside(kept, owner, weight, units, size)
    left = (n - size).numpy()[:, None, None]
    share = 1 - (torch.bincount(owner, minlength=units) / size).clamp(0, 1).numpy()[:, None, None]
    return (n**2 * h - 2 * row_sums + inside - 2 * moved) / left**2, -2 * halves * np.sqrt(share) / left**2


def _from_grams(kept: Kept, owner: Tensor, units: int) -> tuple[np.ndarray, np.ndarray]:
    """R_u and Q_u from the Gram matrices of all examples (weights 1)."""
    n, count = len(owner), len(kept.layers)
    centred = [x.double() - x.double().mean(0) for x in kept.layers]
    grams = torch.stack([(x @ x.T).float() for x in centred])  # (layers, n, n)
    diagonal = torch.stack([x.square().sum(1) for x in centred])  # (layers, n)
    rows = torch.zeros(units, count, count, dtype=torch.float64)
    for start in range(0, n, 256):
        part = grams[:, start : start + 256].permute(1, 0, 2)  # (rows, layers, n)
        found = torch.bmm(part, part.transpose(1, 2)).double()
        d = diagonal[:, start : start + 256].T
        found -= d[:, :, None] * d[:, None, :]
        rows.index_add_(0, owner[start : start + 256], found)
    # s_u' C t_u = (1/n) sum over i, j in u of (K L)_ij; nothing of it is left where units are single examples.
    moved = torch.zeros_like(rows)
    if units < n:
        sums = torch.zeros(count, units, n, dtype=torch.float32).index_add_(1, owner, grams)  # sum over i in u of K_i.
        moved = torch.einsum("lun,mun->ulm", sums.double(), sums.double()) / n
        own = rows + torch.zeros_like(rows).index_add_(0, owner, (diagonal.T[:, :, None] * diagonal.T[:, None, :]))
        moved = moved - own / n
    return rows.numpy(), moved.numpy()


def _from_moments(
    kept: Kept, owner: Tensor, weight: Tensor, units: int, moments: Moments
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R_u and Q_u from cross-covariances of all examples and features of some; half of what two halves differ."""
    count, n = len(kept.layers), moments.n
    assert moments.shift is not None
    mean = (moments.shift + moments.s / n).cpu()
    x = torch.cat([layer.double().cpu() for layer in kept.layers], 1).sub_(mean).float()
    scaled = weight.float()[:, None]
    rows = torch.zeros(units, count, count, dtype=torch.float64)
    moved, halves = torch.zeros_like(rows), torch.zeros_like(rows)
    # Every other kept example of a unit; a last one without a partner takes no side.
    place = torch.arange(len(owner)) - torch.searchsorted(owner, owner)
    last = (place == torch.bincount(owner)[owner] - 1) & (place % 2 == 0)
    side = torch.where(last, 0.0, 1.0 - 2.0 * (place % 2)) * weight
    k = torch.stack([x[:, moments.cut(i)].double().square().sum(1) for i in range(count)], 1)
    sums = torch.zeros(units, x.shape[1]).index_add_(0, owner, x * scaled)
    for i, j0, j1, c in moments.cross_covariances():
        lo, hi = moments.offsets[j0], moments.offsets[j1]
        product = x[:, moments.cut(i)] @ c.float().cpu()
        of_unit = torch.zeros(units, hi - lo).index_add_(0, owner, product * scaled)
        product *= x[:, lo:hi]
        of_unit *= sums[:, lo:hi]
        for j in range(j0, j1):
            columns = slice(moments.offsets[j] - lo, moments.offsets[j + 1] - lo)
            a = product[:, columns].sum(1, dtype=torch.float64)
            own = torch.zeros(units, dtype=torch.float64).index_add_(0, owner, weight * a)
            diagonal = torch.zeros(units, dtype=torch.float64).index_add_(0, owner, weight * k[:, i] * k[:, j])
            rows[:, i, j] = rows[:, j, i] = n * own - diagonal
            half = torch.zeros(units, dtype=torch.float64).index_add_(0, owner, side * a)
            halves[:, i, j] = halves[:, j, i] = n * half
            moved[:, i, j] = moved[:, j, i] = of_unit[:, columns].sum(1, dtype=torch.float64) - own
    return rows.numpy(), moved.numpy(), halves.numpy()


def _inside(kept: Kept, owner: Tensor, weight: Tensor, units: int, size: Tensor) -> np.ndarray:
    """T_u: the sum of k_ij l_ij over pairs i != j of one unit, (units, layers, layers)."""
    count = len(kept.layers)
    found = torch.zeros(units, count, count, dtype=torch.float64)
    if units == len(owner):
        return found.numpy()
    total = weight.sum()
    means = [(x.double() * weight[:, None]).sum(0) / total for x in kept.layers]
    order = torch.argsort(owner, stable=True)
    ends = torch.cumsum(torch.bincount(owner, minlength=units), 0).tolist()
    start = 0
    for u, end in enumerate(ends):
        mine = order[start:end]
        start = end
        m = len(mine)
        if m < 2:
            continue
        w = weight[mine]
        ww = w[:, None] * w[None, :]
        ww.fill_diagonal_(0)
        grams = []
        for x, mean in zip(kept.layers, means, strict=True):
            z = x[mine].double() - mean
            grams.append((z @ z.T).reshape(-1))
        g = torch.stack(grams)
        # What the sampled pairs stand for: all pairs of the unit's examples.
        scale = size[u] * (size[u] - 1) / ww.sum()
        found[u] = scale * ((g * ww.reshape(-1)) @ g.T)
    return found.numpy()


def ratio(h: np.ndarray) -> np.ndarray:
    """HSIC (..., layers, layers) -> CKA; NaN where a diagonal entry is not positive."""
    diagonal = np.diagonal(h, axis1=-2, axis2=-1)
    root = np.sqrt(np.where(diagonal > 0, diagonal, np.nan))
    return h / root[..., :, None] / root[..., None, :]


def without_each_block(h: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean of the blocks' HSIC without each block. h : (blocks, layers, layers); weights : (blocks,)"""
    weighted = weights[:, None, None] * h
    return (weighted.sum(0) - weighted) / (weights.sum() - weights)[:, None, None]


def intervals(
    left_out: LeftOut,
    point: np.ndarray,
    *,
    method: str = "jackknife",
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    bounded: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of the interval of every value.

    point : (layers, layers) value of the whole run, which the interval is laid about
    method : "jackknife" (Student's t), or "bootstrap": units drawn with replacement, studentised (bootstrap-t)
    bounded : values are similarities up to 1, so work on Fisher's z scale

    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal(40)
    >>> means = ((x.sum() - x) / 39)[:, None, None]
    >>> low, high = intervals(LeftOut([str(i) for i in range(40)], means, 40), x.mean()[None, None], bounded=False)
    >>> half = 2.0227 * x.std(ddof=1) / 40**0.5                       # t quantile for 39 degrees of freedom
    >>> bool(np.allclose([low[0, 0], high[0, 0]], [x.mean() - half, x.mean() + half], rtol=1e-3))
    True
    """
    from scipy import stats

    if method not in METHODS[:2]:
        raise ValueError(f"got interval={method!r}; expected one of {', '.join(METHODS[:2])}")
    tail = (1 - confidence) / 2
    error = left_out.spread()
    slope = np.ones_like(point)
    centre = point
    if bounded:
        inside = np.abs(point) < 1 - 1e-9
        slope = np.where(inside, 1 - np.where(inside, point, 0.0) ** 2, np.nan)
        centre = np.arctanh(np.where(inside, point, 0.0))
    if method == "jackknife":
        t_low = t_high = float(stats.t.ppf(1 - tail, len(left_out.units) - 1))
    else:
        t_low, t_high = _bootstrap_t(left_out, tail, resamples, seed)
    low, high = centre - t_low * error / slope, centre + t_high * error / slope
    if bounded:
        # A value at 1 (a layer with itself, or with its copy) has no z: the plain interval, which has no width either.
        low = np.where(inside, np.tanh(low), point - t_low * error)
        high = np.where(inside, np.tanh(high), point + t_high * error)
    return low, high


def _bootstrap_t(left_out: LeftOut, tail: float, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles of (mean of resampled units - mean) / its standard error, which replace Student's."""
    rng = np.random.default_rng(seed)
    count = len(left_out.units)
    away = left_out.values.mean(0) - left_out.values  # influence of each unit, up to a factor
    draws = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    mean = np.tensordot(draws, away, 1) / count
    square = np.tensordot(draws, away**2, 1) / count
    error = np.sqrt(np.maximum(square - mean**2, 1e-300) / (count - 1))
    scores = mean / error
    return np.quantile(scores, 1 - tail, axis=0), -np.quantile(scores, tail, axis=0)
