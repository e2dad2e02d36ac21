"""Linear CKA: the estimators and their definition, which pairs of layers are wanted, and checks of the features.

Notation: X (n, d1), Y (n, d2) are the features of the same n examples in two layers, K = X X', L = Y Y',
K~ is K with a zero diagonal and k_i = |x_i|^2 its diagonal.

    biased    HSIC_0 = tr(K H L H) / (n-1)^2,  H = I - 11'/n                       (Kornblith et al., arXiv 1905.00414)
    unbiased  HSIC_1 = [tr(K~L~) + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2/(n-2) 1'K~L~1] / (n(n-3))
                                                            (Song et al. 2012; Nguyen et al., arXiv 2010.15327, Eq. 3)
    CKA       HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))

Neither estimator changes when a constant vector is added to all features of a layer, and both are wrong in float32 when
a common mean is left in, so every product here is formed after a shift by a mean; sums are carried in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cka_addon.errors import ConstantLayer, NonFinite, TooFewExamples

ESTIMATORS = {
    False: "unbiased HSIC_1 (Song et al. 2012; Nguyen et al. 2021, Eq. 3)",
    True: "biased HSIC_0 (Gretton et al. 2005; Kornblith et al. 2019)",
}
MIN_EXAMPLES = {False: 4, True: 2}
# A layer whose spread is below this share of its common mean is constant as far as float32 can tell (eps = 1.2e-7).
_CONSTANT = 1e-6
# Means of frames that vary by less than this share of a frame: float16 features of a mean-normalised layer leave 4e-5,
# an hour of independent frames 2e-3.
_CONSTANT_MEANS = 5e-4
# Any vector near the mean will do as shift, as the row sums are kept: the mean of so many rows saves a pass over all.


@dataclass(frozen=True)
class Pairs:
    """Which pairs of layers are wanted, for layers that come in groups (models).

    groups : number of layers of each model, in order
    kind : "all", "within" (pairs of one model) or "across" (pairs of two models); a layer with itself is always there

    >>> Pairs((2, 1), "across").mask().astype(int)
    array([[1, 0, 1],
           [0, 1, 1],
           [1, 1, 1]])
    """

    groups: tuple[int, ...]
    kind: str = "all"

    def __post_init__(self) -> None:
        if self.kind not in ("all", "within", "across"):
            raise ValueError(f"got pairs={self.kind!r}; expected 'all', 'within' or 'across'")

    @property
    def n_layers(self) -> int:
        return sum(self.groups)

    def ranges(self) -> list[tuple[int, int]]:
        """First and last + 1 layer of every group."""
        ends = np.cumsum(self.groups).tolist()
        return [(end - size, end) for end, size in zip(ends, self.groups, strict=True)]

    def mask(self) -> np.ndarray:
        """(layers, layers) bool, symmetric: True where the pair is wanted."""
        owner = np.repeat(np.arange(len(self.groups)), self.groups)
        same = owner[:, None] == owner[None, :]
        mask = {"all": np.ones_like(same), "within": same, "across": ~same}[self.kind].copy()
        np.fill_diagonal(mask, True)
        return mask

    def spans(self, layer: int) -> list[tuple[int, int]]:
        """Ranges of layers j >= layer whose pair with `layer` is wanted; the first range starts at `layer`."""
        start, end = next(r for r in self.ranges() if r[0] <= layer < r[1])
        if self.kind == "all":
            return [(layer, self.n_layers)]
        if self.kind == "within":
            return [(layer, end)]
        return [(layer, layer + 1)] + ([(end, self.n_layers)] if end < self.n_layers else [])


def unbiased_from_terms(trace, sum_k, sum_l, cross, n: int):
    """HSIC_1 from tr(K~L~), 1'K~1, 1'L~1 and 1'K~L~1 (scalars or arrays). Eq. 3 of arXiv 2010.15327."""
    if n < MIN_EXAMPLES[False]:
        raise TooFewExamples(
            f"got {n} examples; the unbiased estimator needs at least 4: use more audio, larger batches or biased=True"
        )
    return (trace + sum_k * sum_l / ((n - 1) * (n - 2)) - 2.0 / (n - 2) * cross) / (n * (n - 3))


def cka_from_hsic(h: np.ndarray, *, names: Sequence[str], mask: np.ndarray | None = None) -> np.ndarray:
    """Divide HSIC values by the root of the product of their diagonal; pairs outside `mask` become NaN.

    h : (layers, layers) float64.  Raises ConstantLayer where a layer's HSIC with itself is not positive.
    """
    self_hsic = np.diagonal(h).copy()
    bad = np.flatnonzero(~(self_hsic > 0))
    if bad.size:
        raise ConstantLayer(
            f"layer {names[bad[0]]}: its HSIC with itself is {self_hsic[bad[0]]:.3g}, expected a positive value: "
            "the layer is constant over the examples, or there are too few; leave the layer out or use more audio"
        )
    root = np.sqrt(self_hsic)
    values = h / root[:, None] / root[None, :]
    np.fill_diagonal(values, 1.0)
    if mask is not None:
        values[~mask] = np.nan
    return values


def spread(layers: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Summed variance over the features and squared norm of the mean of every layer, both (layers,) float64."""
    variance, mean_sq = [], []
    for x in layers:
        x = x.double()
        mean = x.mean(0)
        variance.append(float((x - mean).square().sum() / len(x)))
        mean_sq.append(float(mean.square().sum()))
    return np.array(variance), np.array(mean_sq)


def check_varies(
    variance: np.ndarray,
    mean_sq: np.ndarray,
    *,
    names: Sequence[str],
    where: str = "",
    frame_power: np.ndarray | None = None,
) -> None:
    """Raise ConstantLayer naming the first layer whose variance is nothing beside its mean, or beside its frames.

    frame_power : mean square norm of a frame, where the examples are means of frames: what is left of a mean that was
        taken away is rounding noise, however it compares with itself
    """
    constant = np.flatnonzero(variance <= _CONSTANT**2 * mean_sq)
    if constant.size:
        raise ConstantLayer(
            f"layer {names[constant[0]]} is constant{where}: the variance of its features is "
            f"{variance[constant[0]]:.3g} about a mean of norm {math.sqrt(mean_sq[constant[0]]):.3g}; CKA with a "
            "constant is 0 / 0: leave the layer out, or check the model and its input"
        )
    if frame_power is None:
        return
    constant = np.flatnonzero(variance <= _CONSTANT_MEANS**2 * frame_power)
    if constant.size:
        raise ConstantLayer(
            f"layer {names[constant[0]]} has no utterance means to compare{where}: they vary by "
            f"{math.sqrt(max(0.0, variance[constant[0]])):.3g} where frames have a norm of "
            f"{math.sqrt(frame_power[constant[0]]):.3g}; it is normalised to mean 0 in every recording, and what is "
            "left is rounding noise: leave the layer out (layers=), or compare its frames"
        )


def check_finite(layers: Sequence[Tensor], names: Sequence[str], utterance: str = "") -> None:
    """Raise NonFinite naming layer and utterance.."""
    # A NaN or infinity anywhere makes the sum non-finite: one cheap pass where there is none.
    for name, x in zip(names, layers, strict=True):
        if not bool(torch.isfinite(x.sum(dtype=torch.float64))):
            bad = int((~torch.isfinite(x)).sum())
            where = f" in utterance '{utterance}'" if utterance else ""
            raise NonFinite(
                f"layer {name}{where}: {bad} of {x.numel()} values are NaN or infinite; expected finite features: "
                "check the model, the recording, or (float16 stores) dump with --dtype float32"
            )


def crossover(dims: Sequence[int], pairs: Pairs) -> int:
    """Number of examples above which the streaming form does less arithmetic than the Gram form.

    Operations per example: Gram n * sum(d) + 2 n * pairs; streaming 2 * sum over pairs of d_i d_j.
    """
    mask = np.triu(pairs.mask())
    d = np.asarray(dims, dtype=np.float64)
    stream = 2.0 * float((np.outer(d, d) * mask).sum())
    gram = float(d.sum() + 2.0 * mask.sum())
    return max(4, int(stream / gram))


class Reference:
    """The definition, written out with n x n matrices in float64: slow, for tests and for small checks by hand."""

    @staticmethod
    def hsic(x: np.ndarray, y: np.ndarray, *, biased: bool = False) -> float:
        """HSIC of features (n, d1) and (n, d2) from the definition."""
        k, l = (np.asarray(v, np.float64) @ np.asarray(v, np.float64).T for v in (x, y))  # noqa: E741
        n = len(k)
        if biased:
            h = np.eye(n) - 1.0 / n
            return float(np.trace(k @ h @ l @ h) / (n - 1) ** 2)
        np.fill_diagonal(k, 0)
        np.fill_diagonal(l, 0)
        one = np.ones(n)
        product = k @ l
        return float(unbiased_from_terms(np.trace(product), one @ k @ one, one @ l @ one, one @ product @ one, n))

    @classmethod
    def cka(cls, x: np.ndarray, y: np.ndarray, *, biased: bool = False) -> float:
        """CKA of features (n, d1) and (n, d2) from the definition."""
        own = cls.hsic(x, x, biased=biased) * cls.hsic(y, y, biased=biased)
        return cls.hsic(x, y, biased=biased) / math.sqrt(own)
