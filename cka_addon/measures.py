"""Second opinions beside CKA, from the same pass: Procrustes, CCA, SVCCA, PWCCA; RSA and mutual neighbours on a sample.

With the covariances C_xx, C_yy, C_xy of all examples (sums that `full` mode gathers for CKA anyway) and s_k the
singular values of a matrix:

    procrustes   sum s_k(C_xy) / sqrt(tr C_xx tr C_yy): 1 where one layer is a rotated, scaled, shifted copy of the
                 other; arccos of it is the angular shape distance of Williams et al. (arXiv 2110.14739)
    cca          mean of s_k(C_xx^-1/2 C_xy C_yy^-1/2), the canonical correlations: blind to any invertible map
    svcca        the same after keeping the principal components that hold `variance` of each layer's variance
                 (Raghu et al., arXiv 1706.05806)
    pwcca        the correlations weighted by how much of the first layer (the row) each canonical variate accounts for
                 (Morcos et al., arXiv 1806.05759): not symmetric, and of the published ones the only measure
                 here that a rotation of the features changes
    rsa          Spearman correlation of the two layers' dissimilarities (1 - cosine about the mean) over pairs of
                 examples of different utterances: with centring it is close to CKA, do not count both
    knn          share of the `neighbours` nearest examples (cosine, other utterances only) that two layers agree on
                 (mutual k-NN, Huh et al., arXiv 2405.07987)

Intervals of procrustes and cca come from what leaving a unit out changes to first order. The components of svcca and
the weights of pwcca change with it in ways that have no useful derivative: they are computed again without each of 10
groups of units where the layers are narrow enough for that, and have no interval elsewhere.

All but CKA look high by chance where layers are wide and examples few: each stands beside the same measure of shuffled
examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cka_addon.errors import ConstantLayer, SpecError
from cka_addon.moments import Moments
from cka_addon.uncertainty import Kept, LeftOut

COVARIANCE = ("procrustes", "cca", "svcca", "pwcca")
SAMPLED = ("rsa", "knn")
SAMPLE = 1000  # examples that rsa and knn look at
GROUPS = 10  # of units, for the measures that are computed again
AGAIN = 3e11  # operations that computing again may take: some 20 seconds
INFLUENCE_FRAMES = 2048  # kept examples that the intervals of the covariance measures use
# Directions of a layer with less than this share of the largest variance are rounding noise of the products.
RANK = {torch.float32: 1e-6, torch.float64: 1e-12}


@dataclass
class Measured:
    """One measure of all wanted pairs: (layers, layers) values, of shuffled examples, and without each unit."""

    values: np.ndarray
    baseline: np.ndarray | None
    left_out: LeftOut | None


@dataclass
class _Layer:
    """Principal axes of a layer: covariance = axes diag(power) axes', largest first, rounding noise left out."""

    axes: Tensor
    power: Tensor
    total: float
    whiten: Tensor  # axes / sqrt(power + ridge)
    kept: int  # components for svcca


def _axes(c: Tensor, *, rank: float, ridge: float, variance: float, name: str) -> _Layer:
    power, axes = torch.linalg.eigh(c)
    power, axes = power.flip(0), axes.flip(1)
    if not float(power[0]) > 0:
        raise ConstantLayer(f"layer {name} is constant: it has no covariance; leave it out")
    good = int((power > rank * power[0]).sum())
    total = float(power.clamp_min(0).sum())
    power, axes = power[:good], axes[:, :good]
    share = torch.cumsum(power, 0) / power.sum()
    kept = min(good, int((share < variance).sum()) + 1)
    return _Layer(axes, power, total, axes / (power + ridge * total / len(c)).sqrt(), kept)


def from_sums(
    moments: Moments,
    names: Sequence[str],
    measures: Sequence[str],
    *,
    ridge: float = 0.0,
    variance: float = 0.99,
    shuffled: Moments | None = None,
    kept: Kept | None = None,
    units: int | None = None,
    kind: str = "utterance",
) -> dict[str, Measured]:
    """The measures that are functions of covariances, for all wanted pairs.

    ridge : share of a layer's mean variance that is added before whitening (cca, svcca, pwcca)
    shuffled : sums over permuted examples, for the baseline
    kept : examples of single units, for the values without each unit (to first order: the axes stay as they are)

    >>> from cka_addon.estimators import Pairs
    >>> x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> sums = Moments([6, 6], Pairs((2,)), dtype=torch.float64)
    >>> sums.update([x, x @ torch.randn(6, 6, dtype=torch.float64)])
    >>> found = from_sums(sums, ["a", "b"], ["cca", "procrustes"])
    >>> round(float(found["cca"].values[0, 1]), 9), bool(found["procrustes"].values[0, 1] < 1)
    (1.0, True)
    """
    wanted = [m for m in measures if m in COVARIANCE]
    count = len(names)
    layers: list[_Layer] = []
    for i, c in _own(moments):
        rank = RANK[moments.dtype]
        layers.append(_axes(c, rank=rank, ridge=ridge, variance=variance, name=names[i]))
    values = {m: np.full((count, count), np.nan) for m in wanted}
    chance = {m: np.full((count, count), np.nan) for m in wanted}
    influence = _Influence(moments, kept, layers) if kept is not None else None
    smooth = [m for m in wanted if m in ("procrustes", "cca")]
    without = {m: np.full((len(kept.units), count, count), np.nan) for m in smooth} if kept is not None else {}
    for i, j, c in _pairs(moments):
        for m, (value, back, gradient) in _measure(wanted, c, layers[i], layers[j], influence is not None).items():
            values[m][i, j], values[m][j, i] = value, back
            if influence is not None and m in smooth:
                without[m][:, i, j] = without[m][:, j, i] = influence(m, i, j, value, gradient)
    if shuffled is not None:
        for i, j, c in _pairs(shuffled):
            for m, (value, back, _) in _measure(wanted, c, layers[i], layers[j], False).items():
                chance[m][i, j], chance[m][j, i] = value, back
    left = {}
    if kept is not None:
        left = {m: LeftOut(kept.units, without[m], units or len(kept.units), kind) for m in smooth}
        rest = [m for m in wanted if m not in smooth]
        cost = 20.0 * GROUPS * len(rest) * sum(min(c.shape) ** 2 * max(c.shape) for _, _, c in _pairs(moments))
        if rest and cost < AGAIN and len(kept.units) >= GROUPS:
            left |= _again(moments, kept, names, rest, ridge=ridge, variance=variance)
    return {m: Measured(values[m], chance[m] if shuffled is not None else None, left.get(m)) for m in wanted}


def _again(
    moments: Moments, kept: Kept, names: Sequence[str], measures: Sequence[str], *, ridge: float, variance: float
) -> dict[str, LeftOut]:
    """The measures computed again without each of some groups of units."""
    assert moments.shift is not None
    mean = (moments.shift + moments.s / moments.n).cpu()
    x = torch.cat([layer.double().cpu() for layer in kept.layers], 1) - mean
    group = torch.from_numpy(kept.owner % GROUPS)
    weight = torch.from_numpy(kept.weight)
    # Where a part of the units was kept, a group stands for its share of all of them.
    scale = moments.n / float(weight.sum())
    found = {m: np.full((GROUPS, len(names), len(names)), np.nan) for m in measures}
    for g in range(GROUPS):
        mine = group == g
        z, w = x[mine], scale * weight[mine][:, None]
        n = moments.n - float(w.sum())
        shift = -(z * w).sum(0) / n  # the mean of those that stay
        layers: list[_Layer] = []

        def stays(
            c: Tensor, i: int, j: int, z: Tensor = z, w: Tensor = w, n: float = n, shift: Tensor = shift
        ) -> Tensor:
            a, b = moments.cut(i), moments.cut(j)
            return (moments.n * c - (z[:, a] * w).T @ z[:, b]) / n - torch.outer(shift[a], shift[b])

        for i, c in _own(moments):
            rank = RANK[moments.dtype]
            layers.append(_axes(stays(c, i, i), rank=rank, ridge=ridge, variance=variance, name=names[i]))
        for i, j, c in _pairs(moments):
            for m, (value, back, _) in _measure(measures, stays(c, i, j), layers[i], layers[j], False).items():
                found[m][g, i, j], found[m][g, j, i] = value, back
    return {m: LeftOut([f"group {g}" for g in range(GROUPS)], v, GROUPS, "block") for m, v in found.items()}


def _own(moments: Moments) -> Iterator[tuple[int, Tensor]]:
    for i, first, _, c in moments.cross_covariances():
        if first == i:
            yield i, c[:, : moments.dims[i]].cpu()


def _pairs(moments: Moments) -> Iterator[tuple[int, int, Tensor]]:
    for i, first, last, c in moments.cross_covariances():
        lo = moments.offsets[first]
        for j in range(first, last):
            yield i, j, c[:, moments.offsets[j] - lo : moments.offsets[j + 1] - lo].cpu()


def _measure(
    names: Sequence[str], c: Tensor, x: _Layer, y: _Layer, gradients: bool
) -> dict[str, tuple[float, float, tuple[Tensor, ...]]]:
    """Measures of a pair with covariance c (d_x, d_y): (value, value seen from y, what the derivative needs)."""
    found: dict[str, tuple[float, float, tuple[Tensor, ...]]] = {}
    if "procrustes" in names:
        polar: tuple[Tensor, ...] = ()
        if gradients:
            u, s, v = torch.linalg.svd(c, full_matrices=False)
            polar = (u @ v, s.sum())
        else:
            s = torch.linalg.svdvals(c)
        value = float(s.sum()) / (x.total * y.total) ** 0.5
        found["procrustes"] = (value, value, polar)
    if not {"cca", "svcca", "pwcca"} & set(names):
        return found
    # Whitened along the principal axes of both, largest first: the leading block is what SVCCA keeps.
    white = x.whiten.T @ c @ y.whiten
    if "svcca" in names:
        value = float(torch.linalg.svdvals(white[: x.kept, : y.kept]).clamp(0, 1).mean())
        found["svcca"] = (value, value, ())
    if {"cca", "pwcca"} & set(names):
        u, s, v = torch.linalg.svd(white, full_matrices=False)
        s = s.clamp(0, 1)
        if "cca" in names:
            value = float(s.mean())
            found["cca"] = (value, value, (x.whiten @ u, s, y.whiten @ v.T, torch.full_like(s, 1 / len(s))))
        if "pwcca" in names:
            # X' h_k: what each feature of the leading layer has of canonical variate k.
            weights = [(layer.axes * layer.power.sqrt() @ w).abs().sum(0) for layer, w in ((x, u), (y, v.T))]
            ours, theirs = (float(w @ s / w.sum()) for w in weights)
            found["pwcca"] = (ours, theirs, ())
    return found


class _Influence:
    """Values without each unit, to first order, from the kept examples."""

    def __init__(self, moments: Moments, kept: Kept, layers: list[_Layer]) -> None:
        step = max(1, len(kept.owner) // INFLUENCE_FRAMES)
        pick = np.arange(0, len(kept.owner), step)
        owner = kept.owner[pick]
        present = np.bincount(owner, minlength=len(kept.units))
        # Thinning must not lose a unit: then all examples are taken.
        if (present == 0).any():
            pick, owner = np.arange(len(kept.owner)), kept.owner
        size = np.bincount(kept.owner, weights=kept.weight, minlength=len(kept.units))
        self.owner = torch.from_numpy(owner)
        counts = np.bincount(owner, minlength=len(kept.units))
        self.weight = torch.from_numpy((size / np.maximum(counts, 1))[owner])
        self.size, self.units, self.n = torch.from_numpy(size), len(kept.units), moments.n
        assert moments.shift is not None
        mean = (moments.shift + moments.s / moments.n).cpu()
        self.x = [
            (x[torch.from_numpy(pick)].double() - mean[moments.cut(i)]).float() for i, x in enumerate(kept.layers)
        ]
        self.layers = layers

    def _without(self, value: float, derivative: Tensor) -> np.ndarray:
        """Value without each unit. derivative : (examples,) of the value, mean 0 over all examples"""
        total = torch.zeros(self.units, dtype=torch.float64).index_add_(
            0, self.owner, self.weight * derivative.double()
        )
        return (value - total / (self.n - self.size)).numpy()

    def __call__(self, name: str, a: int, b: int, value: float, gradient: tuple[Tensor, ...]) -> np.ndarray:
        x, y = self.x[a], self.x[b]
        if name == "procrustes":
            polar, nuclear = gradient
            along = ((x @ polar.float()) * y).sum(1).double() / float(nuclear)
            ours = x.square().sum(1).double() / self.layers[a].total
            theirs = y.square().sum(1).double() / self.layers[b].total
            return self._without(value, value * (along - 0.5 * ours - 0.5 * theirs))
        left, s, right, weights = gradient
        u, v = x @ left.float(), y @ right.float()
        s, weights = s.float(), weights.float()
        return self._without(value, ((u * v - 0.5 * s * (u.square() + v.square())) @ weights).double())


def from_sample(
    kept: Kept, measures: Sequence[str], *, neighbours: int = 10, seed: int = 0, kind: str = "utterance", units: int = 0
) -> tuple[dict[str, Measured], int]:
    """The measures that look at pairs of examples, on at most 1,000 of the kept ones; and on how many."""
    rng = np.random.default_rng([seed, 4])
    pick = np.sort(rng.permutation(len(kept.owner))[:SAMPLE])
    present, owner = np.unique(kept.owner[pick], return_inverse=True)
    names = [kept.units[i] for i in present]
    n, count = len(pick), len(kept.layers)
    if len(names) < 2 or n <= neighbours:
        raise SpecError(
            f"got {n} examples of {len(names)} utterances; rsa and knn compare examples of different utterances and "
            f"need more than {neighbours}: use more recordings"
        )
    other = torch.from_numpy(owner[:, None] != owner[None, :])
    cosines = []
    for layer in kept.layers:
        x = layer[torch.from_numpy(pick)].double()
        x = torch.nn.functional.normalize(x - x.mean(0), dim=1)
        cosines.append((x @ x.T).float())
    shuffle = torch.from_numpy(rng.permutation(n))
    groups = torch.from_numpy(owner)
    found = {}
    if "rsa" in measures:
        ranks = torch.stack([_ranks(c, other) for c in cosines])  # (layers, n, n), standardised, 0 within utterances
        values, without = _correlate(ranks, ranks, groups, len(names))
        chance, _ = _correlate(ranks, ranks[:, shuffle][:, :, shuffle] * other, groups, len(names))
        found["rsa"] = Measured(values, chance, LeftOut(names, without, units or len(names), kind))
    if "knn" in measures:
        near = torch.zeros(count, n, n)
        for index, c in enumerate(cosines):
            top = c.masked_fill(~other, -2.0).topk(neighbours, dim=1).indices
            near[index].scatter_(1, top, 1.0)
        rows = torch.bmm(near.permute(1, 0, 2), near.permute(1, 2, 0)).double() / neighbours  # (n, layers, layers)
        size = torch.bincount(groups).double()[:, None, None]
        of_unit = torch.zeros(len(names), count, count, dtype=torch.float64).index_add_(0, groups, rows)
        without = ((rows.sum(0) - of_unit) / (n - size)).numpy()
        moved = near[:, shuffle][:, :, shuffle]
        chance = (torch.einsum("ljk,mjk->lm", near, moved) / (n * neighbours)).double().numpy()
        found["knn"] = Measured(rows.mean(0).numpy(), chance, LeftOut(names, without, units or len(names), kind))
    return found, n


def _ranks(cosine: Tensor, other: Tensor) -> Tensor:
    """Ranks of the dissimilarities of examples of different utterances, mean 0 and variance 1; 0 elsewhere."""
    from scipy.stats import rankdata

    upper = torch.triu(other, 1)
    ranks = torch.from_numpy(rankdata(-cosine[upper].numpy()))
    ranks = (ranks - ranks.mean()) / ranks.std(unbiased=False)
    found = torch.zeros_like(cosine)
    found[upper] = ranks.float()
    return found + found.T


def _correlate(x: Tensor, y: Tensor, groups: Tensor, units: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlation of standardised (layers, n, n) matrices over their off-diagonal entries, and without each unit."""
    count, n, _ = x.shape
    rows, mine, theirs = torch.zeros(n, count, count), torch.zeros(n, count), torch.zeros(n, count)
    for start in range(0, n, 128):
        a, b = x[:, start : start + 128].permute(1, 0, 2), y[:, start : start + 128].permute(1, 0, 2)
        rows[start : start + 128] = torch.bmm(a, b.transpose(1, 2))
        mine[start : start + 128], theirs[start : start + 128] = a.square().sum(2), b.square().sum(2)

    def without(values: Tensor) -> Tensor:
        """Sum over pairs that do not touch a unit: pairs within one count nothing, so each pair is in two rows."""
        total = torch.zeros(units, *values.shape[1:], dtype=torch.float64).index_add_(0, groups, values.double())
        return values.sum(0, dtype=torch.float64) - 2 * total

    value = (
        rows.sum(0, dtype=torch.float64)
        / (mine.sum(0, dtype=torch.float64)[:, None] * theirs.sum(0, dtype=torch.float64)[None, :])
        .clamp_min(1e-300)
        .sqrt()
    )
    left = without(rows) / (without(mine)[:, :, None] * without(theirs)[:, None, :]).clamp_min(1e-300).sqrt()
    return value.numpy(), left.numpy()
