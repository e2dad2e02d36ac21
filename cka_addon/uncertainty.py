"""How sure a value is: intervals from leaving out one unit (an utterance, a speaker, a block) at a time.

Utterances, not frames, are what a corpus is a sample of: frames of one utterance resemble each other. So the spread of
a value is taken from what it becomes when one unit is left out (the delete-one jackknife). The interval is Student's t
on Fisher's z scale, where a similarity near 1 or 0 has a symmetric distribution. Two things keep it honest for a few
dozen utterances: the degrees of freedom follow from how heavy the tails of the units' influences are (2 N / (kurtosis -
1), at most N - 1), as a variance that hangs on few units is not well known; and the bias that leaving units out shows
is added to the error. Coverage of these intervals is measured in `recipes/benchmark/cka_intervals.py`.

What HSIC is without a unit follows from sums, without computing it again: with S = sum x_i y_i' over all examples and
S_u over those of unit u, |S - S_u|^2 = |S|^2 - 2 <S, S_u> + |S_u|^2, and the other terms of the estimator likewise.
<S, S_u> = sum over i in u of x_i' S y_i needs the whole S, which is known at the end only; `Kept` holds the features
for that: all of them where they are few (then the result is exact), else random frames of every unit.
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
        # The noise is an estimate too: a tenth of it stays, and it is never believed to be more than three quarters.
        return np.sqrt((self.total - 1) * np.maximum(variance - 0.9 * self.noise, 0.25 * variance))

    def freedom(self) -> np.ndarray:
        """Degrees of freedom of the standard error, (layers, layers): fewer where single units make up the variance."""
        away = self.values - self.values.mean(0)
        scale = np.sqrt((away**2).mean(0))
        kurtosis = ((away / np.where(scale > 0, scale, 1.0)) ** 4).mean(0)
        units = len(self.units)
        return np.clip(2 * units / np.maximum(kurtosis - 1, 2), 3, units - 1)

    def bias(self, point: np.ndarray) -> np.ndarray:
        """What the values are too large by, to first order in 1 / units."""
        return (self.total - 1) * (self.values.mean(0) - point)

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


def pick_frames(count: int, wanted: int, seed: int) -> np.ndarray:
    """Positions of `wanted` of `count` examples at random, in random order (all of them in order where they are few).

    At random, not evenly spread: two halves then differ by just as much as the sample does from all.

    >>> sorted(pick_frames(100, 3, seed=0).tolist()), pick_frames(2, 3, seed=0).tolist()
    ([20, 36, 82], [0, 1])
    """
    return np.arange(count) if wanted >= count else np.random.default_rng(seed).permutation(count)[:wanted]


def leave_out(
    kept: Kept,
    h: np.ndarray,
    n: int,
    moments: Moments | None = None,
    *,
    total: int | None = None,
    kind: str = "utterance",
    biased: bool = False,
) -> LeftOut:
    """CKA without each unit. h : HSIC of all n examples;  total : units of the run, where `kept` holds some of them

    moments : sums over all examples, where `kept` holds a sample of them; they are moved to the mean
    """
    if moments is None:
        if len(kept.owner) ** 2 * len(kept.layers) * kept.layers[0].element_size() > GRAM_BYTES:
            raise ValueError("too many examples for Gram matrices: the sums over all of them are needed")
        return LeftOut(kept.units, ratio(_from_grams(kept, biased)), total or len(kept.units), kind)
    left, halves = _from_moments(kept, moments, biased)
    diagonal = np.diagonal(h)
    root = np.sqrt(np.where(diagonal > 0, diagonal, np.nan))
    part = np.einsum("uii->ui", halves) / diagonal
    # The change of h_xy / sqrt(h_xx h_yy) that a small change of the three makes.
    change = halves / root[:, None] / root - 0.5 * ratio(h) * (part[:, :, None] + part[:, None, :])
    return LeftOut(kept.units, ratio(left), total or len(kept.units), kind, (change**2).mean(0))


def _hsic(trace, sum_k, sum_l, cross, diagonals, n, biased: bool):
    """HSIC of n examples from tr(K~L~), 1'K~1, 1'L~1, 1'K~L~1; biased: sums with the diagonals, sum k_i l_i apart."""
    if not biased:
        n = np.maximum(n, 4)
        return (trace + sum_k * sum_l / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3))
    return (trace + diagonals - 2 / n * cross + sum_k * sum_l / n**2) / (n - 1) ** 2


def _from_grams(kept: Kept, biased: bool) -> np.ndarray:
    """HSIC without each unit from the Gram matrices of all examples: exact, (units, layers, layers)."""
    n, count, units = len(kept.owner), len(kept.layers), len(kept.units)
    owner = torch.from_numpy(kept.owner)
    grams = torch.empty(count, n, n, dtype=torch.float64 if n <= 1024 else torch.float32)
    for index, x in enumerate(kept.layers):
        z = x.double() - x.double().mean(0)
        grams[index] = z @ z.T
    own = torch.diagonal(grams, dim1=1, dim2=2).double().clone()  # (layers, n): k_i
    torch.diagonal(grams, dim1=1, dim2=2).zero_()
    rows = torch.zeros(units, count, count, dtype=torch.float64)
    for start in range(0, n, 256):
        part = grams[:, start : start + 256].permute(1, 0, 2)  # (rows, layers, n)
        rows.index_add_(0, owner[start : start + 256], torch.bmm(part, part.transpose(1, 2)).double())
    size = torch.bincount(owner, minlength=units).double()
    inside = _inside(kept, torch.ones(n, dtype=torch.float64), size)
    of_unit = torch.zeros(count, units, n, dtype=torch.float64)
    for index in range(count):
        of_unit[index].index_add_(0, owner, grams[index].double())
    sums = grams.sum(2, dtype=torch.float64)  # (layers, n): K~1
    here = torch.zeros(units, n, dtype=torch.bool)
    here[owner, torch.arange(n)] = True
    within = (of_unit * here).sum(2)  # (layers, units)
    total = (
        sums.sum(1)[:, None] - 2 * torch.zeros(count, units, dtype=torch.float64).index_add_(1, owner, sums) + within
    )
    if biased:
        sums = sums + own
        total = total + own.sum(1)[:, None] - torch.zeros_like(total).index_add_(1, owner, own)
    stays = (sums[:, None, :] - of_unit).masked_fill_(here, 0.0)
    cross = torch.einsum("lun,mun->ulm", stays, stays)
    both = torch.einsum("ln,mn->lm", own, own) - _by_unit(own, owner, units)
    trace = rows.sum(0) - 2 * rows + torch.from_numpy(inside)
    q = (n - size).numpy()[:, None, None]
    total = total.T
    found = _hsic(
        trace.numpy(), total[:, :, None].numpy(), total[:, None, :].numpy(), cross.numpy(), both.numpy(), q, biased
    )
    return found


def _by_unit(values: Tensor, owner: Tensor, units: int) -> Tensor:
    """Sum over each unit's examples of the products of two layers' values: (layers, n) -> (units, layers, layers)."""
    count = len(values)
    products = (values.T[:, :, None] * values.T[:, None, :]).reshape(-1, count * count)
    found = torch.zeros(units, count * count, dtype=torch.float64).index_add_(0, owner, products)
    return found.reshape(units, count, count)


def _from_moments(kept: Kept, moments: Moments, biased: bool) -> tuple[np.ndarray, np.ndarray]:
    """HSIC without each unit from the sums over all examples and the features of some, (units, layers, layers).

    Exact where all examples were kept. The second array is half the difference between what two halves of a unit's
    frames give: how much of the spread over units comes from having kept a sample of them; 0 where all were kept.
    """
    count, n, units = len(kept.layers), moments.n, len(kept.units)
    owner, weight = torch.from_numpy(kept.owner), torch.from_numpy(kept.weight)
    assert moments.shift is not None
    moments.reshift(moments.shift + moments.s / n)
    mean = moments.shift.cpu()
    x = torch.cat([layer.double().cpu() for layer in kept.layers], 1).sub_(mean).float()
    cuts = [moments.cut(i) for i in range(count)]

    def total(values: Tensor) -> Tensor:
        return torch.zeros(units, *values.shape[1:], dtype=values.dtype).index_add_(0, owner, values)

    size = total(weight)
    s = total(x * weight.float()[:, None])  # (units, widths): sum of the unit's examples
    k = torch.stack([x[:, c].double().square().sum(1) for c in cuts], 1)  # (n, layers)
    a = torch.stack([(x[:, c] * s[owner][:, c]).sum(1, dtype=torch.float64) for c in cuts], 1)  # x_i's_u
    norms = torch.stack([s[:, c].double().square().sum(1) for c in cuts], 1)
    t = moments.t.cpu()
    own_sum = norms - (t - total(weight[:, None] * k))  # 1'K~1 without the unit
    inside = torch.from_numpy(_inside(kept, weight, size))
    p = moments.left.cpu()  # (widths, layers): sum x_i k_i of the other layer
    # Every other kept example of a unit; a last one without a partner takes no side.
    place = torch.arange(len(owner)) - torch.searchsorted(owner, owner)
    last = (place == torch.bincount(owner, minlength=units)[owner] - 1) & (place % 2 == 0)
    side = torch.where(last, 0.0, 1.0 - 2.0 * (place % 2)) * weight
    found = torch.full((units, count, count), float("nan"), dtype=torch.float64)
    halves = torch.zeros(units, count, count, dtype=torch.float64)
    q = n - size
    everyone = abs(float(size.sum()) - n) < 0.5
    for i, j0, j1, c in moments.cross_covariances():
        lo = moments.offsets[j0]
        product = x[:, cuts[i]] @ (n * c).float().cpu()
        full = (n * c).square()
        of_unit = s[:, cuts[i]] @ (n * c).float().cpu()
        for j in range(j0, j1):
            columns = slice(moments.offsets[j] - lo, moments.offsets[j + 1] - lo)
            along = (product[:, columns] * x[:, cuts[j]]).sum(1, dtype=torch.float64)  # x_i'S y_i
            whole, all_both = float(full[:, columns].sum()), float(moments.T[i, j])
            both, of_units = total(weight * k[:, i] * k[:, j]), total(weight * along)
            if everyone:
                # The units' sums add up to what is known exactly: sampled frames then leave no error in their mean.
                both = both + (all_both - both.sum()) * size / n
                of_units = of_units + (whole - of_units.sum()) * size / n
            moved = (of_unit[:, columns] * s[:, cuts[j]]).sum(1, dtype=torch.float64)
            moved = moved - total(weight * a[:, i] * a[:, j])  # s_u'(S - S_u)t_u
            trace = whole - all_both - 2 * of_units + 2 * both + inside[:, i, j]
            if biased:
                value = (trace + all_both - both - 2 / q * moved + norms[:, i] * norms[:, j] / q**2) / (q - 1) ** 2
            else:
                cross = moved + s[:, cuts[i]].double() @ p[cuts[i], j] - total(weight * a[:, i] * k[:, j])
                cross = cross + s[:, cuts[j]].double() @ p[cuts[j], i] - total(weight * a[:, j] * k[:, i])
                cross = cross + all_both - both
                value = _hsic(trace, own_sum[:, i], own_sum[:, j], cross, None, q, False)
            found[:, i, j] = found[:, j, i] = value
            halves[:, i, j] = halves[:, j, i] = -2 * total(side * along) / q**2
    kept_share = (torch.bincount(owner, minlength=units) / size).clamp(0, 1)
    return found.numpy(), (halves * (1 - kept_share).sqrt()[:, None, None]).numpy()


def _inside(kept: Kept, weight: Tensor, size: Tensor) -> np.ndarray:
    """The sum of k_ij l_ij over pairs i != j of one unit, about the mean of all: (units, layers, layers)."""
    count, units = len(kept.layers), len(kept.units)
    owner = torch.from_numpy(kept.owner)
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
        if len(mine) < 2:
            continue
        w = weight[mine]
        ww = w[:, None] * w[None, :]
        ww.fill_diagonal_(0)
        grams = []
        for x, mean in zip(kept.layers, means, strict=True):
            z = (x[mine].double() - mean).float() if len(mine) > 64 else x[mine].double() - mean
            grams.append((z @ z.T).double().reshape(-1))
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
    >>> x = rng.uniform(size=40)                                      # light tails: all 39 degrees of freedom
    >>> means = ((x.sum() - x) / 39)[:, None, None]
    >>> low, high = intervals(LeftOut([str(i) for i in range(40)], means, 40), x.mean()[None, None], bounded=False)
    >>> half = 2.0227 * x.std(ddof=1) / 40**0.5                       # Student's quantile
    >>> bool(np.allclose([low[0, 0], high[0, 0]], [x.mean() - half, x.mean() + half], rtol=1e-3))
    True
    """
    from scipy import stats

    if method not in METHODS[:2]:
        raise ValueError(f"got interval={method!r}; expected one of {', '.join(METHODS[:2])}")
    tail = (1 - confidence) / 2
    bias = left_out.bias(point)
    if len(left_out.units) < left_out.total:
        # Of some units only the mean is not the mean of all: what is off by chance is no bias.
        variance = (left_out.total - 1) ** 2 * left_out.values.var(0) / len(left_out.units)
        bias = np.sqrt(np.maximum(bias**2 - variance, 0.0))
    error = np.sqrt(left_out.spread() ** 2 + bias**2)
    slope = np.ones_like(point)
    centre = point
    if bounded:
        inside = np.abs(point) < 1 - 1e-9
        slope = np.where(inside, 1 - np.where(inside, point, 0.0) ** 2, np.nan)
        centre = np.arctanh(np.where(inside, point, 0.0))
    if method == "jackknife":
        t_low = t_high = stats.t.ppf(1 - tail, left_out.freedom())
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
