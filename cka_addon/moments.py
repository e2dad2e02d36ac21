"""HSIC of any number of examples in one pass: sums whose memory does not grow, and which add up over shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cka_addon.errors import TooFewExamples
from cka_addon.estimators import MIN_EXAMPLES, Pairs, unbiased_from_terms


@dataclass
class _Row:
    """Products of one layer with the layers of one span: (d_i, sum of their widths) float64."""

    first: int
    last: int
    product: Tensor


class Moments:
    """Exact one-pass accumulators of HSIC: memory does not depend on the number of examples, and two of them add up.

    For every wanted pair: X'Y, and per layer s = sum x_i, p_j = sum x_i |y_i|^2 for every other layer j, and over all
    layers T = sum k_i l_i, t = sum k_i. All are taken about a shift (the mean of the first examples seen), and
    `reshift` moves them to another one exactly, so accumulators with different shifts merge.

    paired=False accumulates X against the examples of Y in another order (the permutation baseline).

    >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    >>> whole = Moments([4], Pairs((1,))); whole.update([x])
    >>> part = Moments([4], Pairs((1,))); part.update([x[:40]])
    >>> rest = Moments([4], Pairs((1,))); rest.update([x[40:] ])
    >>> part.merge(rest)
    >>> bool(np.allclose(part.hsic(), whole.hsic(), rtol=1e-6))
    True
    """

    def __init__(
        self,
        dims: Sequence[int],
        pairs: Pairs,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        paired: bool = True,
    ) -> None:
        self.dims, self.pairs, self.paired = list(dims), pairs, paired
        self.dtype = dtype if dtype == torch.float64 else torch.float32
        self.device = torch.device(device)
        self.n = 0
        count = len(self.dims)
        self.offsets = np.concatenate([[0], np.cumsum(self.dims)]).astype(int).tolist()

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=self.device)

        self.shift: Tensor | None = None
        self.s = zeros(self.offsets[-1])
        self.left = zeros(self.offsets[-1], count)
        self.right = self.left if paired else zeros(self.offsets[-1], count)
        self.T = zeros(count, count)
        self.t = zeros(count)
        self.rows = [
            [_Row(a, b, zeros(self.dims[i], self.offsets[b] - self.offsets[a])) for a, b in pairs.spans(i)]
            for i in range(count)
        ]

    @staticmethod
    def bytes_needed(dims: Sequence[int], pairs: Pairs) -> int:
        """Memory of one set of accumulators."""
        d = np.asarray(dims, dtype=np.int64)
        return int(8 * ((np.outer(d, d) * np.triu(pairs.mask())).sum() + 2 * d.sum() * len(d)))

    def cut(self, layer: int) -> slice:
        """Columns of one layer among those of all layers."""
        return slice(self.offsets[layer], self.offsets[layer + 1])

    def update(self, layers: Sequence[Tensor], *, order: Tensor | None = None) -> None:
        """Add examples. layers : list of (n, d_l); order : (n,) permutation of the second layer's examples."""
        n = len(layers[0])
        if n == 0:
            return
        if (order is None) != self.paired:
            raise ValueError("paired accumulators take no order, unpaired ones need it")
        if self.shift is None:
            self.shift = (
                torch.cat([x.mean(0, dtype=torch.float64) for x in layers]).to(self.dtype).double().to(self.device)
            )
        shift = self.shift.to(self.dtype)
        z = torch.empty(n, self.offsets[-1], dtype=self.dtype, device=self.device)
        for i, x in enumerate(layers):
            torch.sub(x.to(self.device, self.dtype), shift[self.cut(i)], out=z[:, self.cut(i)])
        k = torch.empty(n, len(layers), dtype=torch.float64, device=self.device)
        for i in range(len(layers)):
            part = z[:, self.cut(i)].double()
            k[:, i] = part.square().sum(1)
            self.s[self.cut(i)] += part.sum(0)
        other, k_other = (z, k) if order is None else (z[order], k[order])
        for i in range(len(layers)):
            part = z[:, self.cut(i)].double()
            self.left[self.cut(i)] += part.T @ k_other
            if not self.paired:
                self.right[self.cut(i)] += other[:, self.cut(i)].double().T @ k
        self.T += k.T @ k_other
        self.t += k.sum(0)
        for i, spans in enumerate(self.rows):
            mine = z[:, self.cut(i)].T
            for row in spans:
                row.product += mine @ other[:, self.offsets[row.first] : self.offsets[row.last]]
        self.n += n

    def reshift(self, shift: Tensor) -> None:
        """Move the accumulators to another shift: x'' = x' - delta. Exact algebra, float64."""
        if self.n == 0 or self.shift is None:
            self.shift = shift.clone()
            return
        delta = shift.to(self.device) - self.shift
        if not bool(delta.any()):
            return
        n, count = self.n, len(self.dims)
        d = [delta[self.cut(i)] for i in range(count)]
        s = [self.s[self.cut(i)] for i in range(count)]
        dd = torch.stack([x @ x for x in d])
        ds = torch.stack([a @ b for a, b in zip(d, s, strict=True)])
        old_left, old_right = self.left, self.right
        # S_ij d_j and S_ij' d_i of every wanted pair, before the products move.
        new_left, new_right = old_left.clone(), old_right if self.paired else old_right.clone()
        new_right = new_left if self.paired else new_right
        new_T = self.T.clone()
        for i, spans in enumerate(self.rows):
            for row in spans:
                for j in range(row.first, row.last):
                    a = self.offsets[j] - self.offsets[row.first]
                    S = row.product[:, a : a + self.dims[j]]
                    Sd, dS = S @ d[j], d[i] @ S
                    for p, q, mine, product, left, right in (
                        (i, j, old_left, Sd, new_left, True),
                        (j, i, old_right, dS, new_right, False),
                    ):
                        if p == q and not right and self.paired:
                            continue
                        # sum x'' l'' = sum x l - 2 S e + |e|^2 s_x - d (sum l - 2 e's_y + n |e|^2)
                        left[self.cut(p), q] = (
                            mine[self.cut(p), q]
                            - 2 * product
                            + dd[q] * s[p]
                            - d[p] * (self.t[q] - 2 * ds[q] + n * dd[q])
                        )
                    value = (
                        self.T[i, j]
                        - 2 * (d[j] @ old_right[self.cut(j), i])
                        + dd[j] * self.t[i]
                        - 2 * (d[i] @ old_left[self.cut(i), j])
                        + 4 * (d[i] @ Sd)
                        - 2 * dd[j] * ds[i]
                        + dd[i] * self.t[j]
                        - 2 * dd[i] * ds[j]
                        + n * dd[i] * dd[j]
                    )
                    new_T[i, j] = value
                    if self.paired:
                        new_T[j, i] = value
                lo, hi = self.offsets[row.first], self.offsets[row.last]
                row.product -= torch.outer(s[i], delta[lo:hi]) + torch.outer(d[i], self.s[lo:hi] - n * delta[lo:hi])
        self.left, self.right, self.T = new_left, new_right, new_T
        self.t = self.t - 2 * ds + n * dd
        self.s = self.s - n * delta
        self.shift = shift.to(self.device).clone()

    def merge(self, other: Moments) -> None:
        """Add another set of accumulators (over other examples) to this one; its shift may differ."""
        if other.dims != self.dims or other.pairs != self.pairs or other.paired != self.paired:
            raise ValueError(
                f"got accumulators over widths {other.dims} and {other.pairs}; expected {self.dims} and {self.pairs}"
            )
        if other.n == 0 or other.shift is None:
            return
        if self.shift is None:
            self.shift = other.shift.clone().to(self.device)
        if not torch.equal(other.shift.to(self.device), self.shift):
            shift, other = self.shift, other.copy()
            other.reshift(shift)
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine += theirs.to(self.device)
        self.n += other.n

    def tensors(self) -> list[Tensor]:
        """The accumulators, all float64, in a fixed order (for merging, saving and reducing over processes)."""
        rows = [row.product for spans in self.rows for row in spans]
        return [self.s, self.left, self.T, self.t, *([] if self.paired else [self.right]), *rows]

    def copy(self) -> Moments:
        """An independent copy."""
        new = Moments(self.dims, self.pairs, dtype=self.dtype, device=self.device, paired=self.paired)
        new.n, new.shift = self.n, None if self.shift is None else self.shift.clone()
        for mine, theirs in zip(new.tensors(), self.tensors(), strict=True):
            mine.copy_(theirs)
        return new

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        for tensor in self.tensors():
            tensor.zero_()
        self.n, self.shift = 0, None

    def spread(self) -> tuple[np.ndarray, np.ndarray]:
        """Variance and squared norm of the mean of every layer, as `spread` gives them for features."""
        mean = self.s / self.n
        between = torch.stack([mean[self.cut(i)].square().sum() for i in range(len(self.dims))])
        whole = mean + (self.shift if self.shift is not None else 0)
        mean_sq = torch.stack([whole[self.cut(i)].square().sum() for i in range(len(self.dims))])
        return (self.t / self.n - between).clamp_min(0).cpu().numpy(), mean_sq.cpu().numpy()

    def cross_covariances(self) -> Iterator[tuple[int, int, int, Tensor]]:
        """(i, first, last + 1, C) for every range of layers that layer i is paired with.

        C : (d_i, widths of the range) float64, covariances of its features with those of layer i (divided by n)
        """
        for i, spans in enumerate(self.rows):
            for row in spans:
                lo, hi = self.offsets[row.first], self.offsets[row.last]
                yield (
                    i,
                    row.first,
                    row.last,
                    (row.product - torch.outer(self.s[self.cut(i)], self.s[lo:hi]) / self.n) / self.n,
                )

    def hsic(self, biased: bool = False) -> np.ndarray:
        """HSIC matrix (layers, layers) float64 of everything accumulated so far, valid for the wanted pairs."""
        count, n = len(self.dims), self.n
        if n < MIN_EXAMPLES[biased]:
            raise TooFewExamples(
                f"got {n} examples; the {'biased' if biased else 'unbiased'} estimator needs at least "
                f"{MIN_EXAMPLES[biased]}: use more audio"
            )
        s = [self.s[self.cut(i)] for i in range(count)]
        T = self.T.cpu().numpy()
        t = self.t.cpu().numpy()
        total = np.array([float(x @ x) for x in s]) - t
        h = np.full((count, count), np.nan)
        for i, spans in enumerate(self.rows):
            for row in spans:
                lo = self.offsets[row.first]
                weighted = s[i] @ row.product
                for j in range(row.first, row.last):
                    cols = slice(self.offsets[j] - lo, self.offsets[j + 1] - lo)
                    S = row.product[:, cols]
                    if biased:
                        h[i, j] = float((S - torch.outer(s[i], s[j]) / n).square().sum()) / (n - 1) ** 2
                    else:
                        trace = float(S.square().sum()) - T[i, j]
                        cross = float(
                            weighted[cols] @ s[j] - s[i] @ self.left[self.cut(i), j] - s[j] @ self.right[self.cut(j), i]
                        )
                        h[i, j] = unbiased_from_terms(trace, total[i], total[j], cross + T[i, j], n)
                    h[j, i] = h[i, j]
        return h
