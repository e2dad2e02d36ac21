"""Linear CKA: the estimators, the minibatch (Gram) kernel and the exact one-pass (streaming) accumulators.

Notation: X (n, d1), Y (n, d2) are the features of the same n examples in two layers, K = X X', L = Y Y',
K~ is K with a zero diagonal and k_i = |x_i|^2 its diagonal.

    biased    HSIC_0 = tr(K H L H) / (n-1)^2,  H = I - 11'/n                       (Kornblith et al., arXiv 1905.00414)
    unbiased  HSIC_1 = [tr(K~L~) + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2/(n-2) 1'K~L~1] / (n(n-3))
                                                            (Song et al. 2012; Nguyen et al., arXiv 2010.15327, Eq. 3)
    CKA       HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))

Neither estimator changes when a constant vector is added to all features of a layer, and both are wrong in float32 when
a common mean is left in, so every product here is formed after a shift by a mean; sums are carried in float64.

The row sums of a Gram matrix need no Gram matrix: K~1 = X (X'1) - k. Only tr(K~L~) does, and it only needs the lower
triangles: tr(K~L~) = 2 <tril(K), tril(L)>.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cka_addon import _blas
from cka_addon.errors import ConstantLayer, NonFinite, TooFewExamples

ESTIMATORS = {
    False: "unbiased HSIC_1 (Song et al. 2012; Nguyen et al. 2021, Eq. 3)",
    True: "biased HSIC_0 (Gretton et al. 2005; Kornblith et al. 2019)",
}
MIN_EXAMPLES = {False: 4, True: 2}
# A layer whose spread is below this share of its common mean is constant as far as float32 can tell (eps = 1.2e-7).
_CONSTANT = 1e-6
# Any vector near the mean will do as shift, as the row sums are kept: the mean of so many rows saves a pass over all.
_SHIFT_ROWS = 32


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


def linear_cka(x: Tensor | np.ndarray, y: Tensor | np.ndarray, *, biased: bool = False) -> float:
    """CKA of two sets of features of the same examples, in float64.

    x : (examples, d1);  y : (examples, d2)
    Raises TooFewExamples, ConstantLayer or NonFinite instead of returning NaN.

    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> round(linear_cka(x, 3 * x + 1), 9)
    1.0
    """
    values = cka_matrix([torch.as_tensor(x).double()], [torch.as_tensor(y).double()], biased=biased)
    return float(values[0, 0])


def cka_matrix(
    xs: Sequence[Tensor | np.ndarray],
    ys: Sequence[Tensor | np.ndarray] | None = None,
    *,
    biased: bool = False,
    form: str = "auto",
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """CKA of every layer of `xs` with every layer of `ys` (of `xs` with itself where `ys` is None).

    xs, ys : lists of (examples, width) arrays or tensors over the same examples, any widths
    form : "gram", "stream" or "auto" (the cheaper one)
    Returns (len(xs), len(ys)) float64.

    >>> g = torch.Generator().manual_seed(0)
    >>> x = [torch.randn(64, 16, generator=g) for _ in range(3)]
    >>> cka_matrix(x).shape, cka_matrix(x, x[:2]).shape
    ((3, 3), (3, 2))
    """
    xs = [torch.as_tensor(x) for x in xs]
    ys = [] if ys is None else [torch.as_tensor(y) for y in ys]
    layers = xs + ys
    names = (
        list(names) if names is not None else [f"x[{i}]" for i in range(len(xs))] + [f"y[{i}]" for i in range(len(ys))]
    )
    for name, layer in zip(names, layers, strict=True):
        if layer.ndim != 2 or layer.shape[0] != layers[0].shape[0]:
            raise ValueError(
                f"{name}: got shape {tuple(layer.shape)}; expected ({layers[0].shape[0]}, width): "
                "two dimensions and the same examples in every layer"
            )
    pairs = Pairs((len(xs), len(ys)), "across") if ys else Pairs((len(xs),))
    engine = BatchHsic([x.shape[1] for x in layers], pairs, biased=biased, form=form)
    h = engine(layers, names=names)
    check_varies(*spread(layers), names=names)
    values = cka_from_hsic(h, names=names, mask=pairs.mask())
    return values[: len(xs), len(xs) :] if ys else values


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


def check_varies(variance: np.ndarray, mean_sq: np.ndarray, *, names: Sequence[str], where: str = "") -> None:
    """Raise ConstantLayer naming the first layer whose variance is nothing beside its mean."""
    constant = np.flatnonzero(variance <= _CONSTANT**2 * mean_sq)
    if constant.size:
        raise ConstantLayer(
            f"layer {names[constant[0]]} is constant{where}: the variance of its features is "
            f"{variance[constant[0]]:.3g} about a mean of norm {math.sqrt(mean_sq[constant[0]]):.3g}; CKA with a "
            "constant is 0 / 0: leave the layer out, or check the model and its input"
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


class BatchHsic:
    """HSIC of all wanted pairs of layers over one batch of examples; buffers are kept for the next batch.

    >>> engine = BatchHsic([8, 8], Pairs((2,)))
    >>> engine([torch.randn(32, 8), torch.randn(32, 8)]).shape
    (2, 2)
    """

    def __init__(
        self,
        dims: Sequence[int],
        pairs: Pairs,
        *,
        biased: bool = False,
        form: str = "auto",
        memory: int = 512 << 20,
    ) -> None:
        if form not in ("auto", "gram", "stream"):
            raise ValueError(f"got form={form!r}; expected 'auto', 'gram' or 'stream'")
        self.dims, self.pairs, self.biased, self.form = list(dims), pairs, biased, form
        self.crossover = crossover(dims, pairs)
        self._gram = GramKernel(memory=memory)

    def form_for(self, n: int) -> str:
        """The form used for n examples."""
        if self.form != "auto":
            return self.form
        return "gram" if n <= self.crossover else "stream"

    def __call__(
        self, layers: Sequence[Tensor], *, order: Tensor | None = None, names: Sequence[str] | None = None
    ) -> np.ndarray:
        """HSIC matrix (layers, layers) float64, valid for the wanted pairs.

        layers : list of (n, d_l) tensors
        order : (n,) permutation of the examples for the second layer of each pair (the permutation baseline); the
            diagonal is then of no use
        """
        n = len(layers[0])
        if n < MIN_EXAMPLES[self.biased]:
            raise TooFewExamples(
                f"got {n} examples; the {'biased' if self.biased else 'unbiased'} estimator needs at least "
                f"{MIN_EXAMPLES[self.biased]}: use more audio or larger batches"
            )
        h = self._hsic(layers, order)
        # Looked for afterwards: NaN or infinity in any feature reaches the sums, and a pass over the features is saved.
        if not np.isfinite(h[self.pairs.mask()]).all():
            names = names or [str(i) for i in range(len(layers))]
            check_finite(layers, names)
            raise NonFinite(
                f"layers {', '.join(names)}: the features are finite, but their products do not fit "
                f"{str(layers[0].dtype).removeprefix('torch.')}; scale them down, or use precision='float64'"
            )
        return h

    def _hsic(self, layers: Sequence[Tensor], order: Tensor | None) -> np.ndarray:
        if self.form_for(len(layers[0])) == "stream":
            moments = Moments(
                self.dims, self.pairs, dtype=layers[0].dtype, device=layers[0].device, paired=order is None
            )
            moments.update(layers, order=order)
            return moments.hsic(self.biased)
        return self._gram(layers, biased=self.biased, order=order)


class GramKernel:
    """HSIC of one batch through Gram matrices: cost n^2 sum(d) + 2 n^2 pairs operations, no n x n matrix of float64.

    memory : bytes that the Gram matrices of one pass may take; larger batches go through in bands of rows
    """

    def __init__(self, *, memory: int = 512 << 20) -> None:
        self.memory = memory
        self._buffers: dict[object, Tensor] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._pool_size = 0

    def __call__(self, layers: Sequence[Tensor], *, biased: bool = False, order: Tensor | None = None) -> np.ndarray:
        """HSIC matrix (layers, layers) float64; layers : list of (n, d_l), order as in `BatchHsic`."""
        layers = [x.detach() if x.dtype in (torch.float32, torch.float64) else x.detach().float() for x in layers]
        n = len(layers[0])
        second = None if order is None else [x[order] for x in layers]
        left, right = _RowStats(len(layers), n), None if second is None else _RowStats(len(layers), n)
        trace = self._trace(layers, left, second, right)
        right = right or left
        if biased:
            # tr(K H L H) = tr(KL) - 2/n 1'KL1 + 1'K1 1'L1 / n^2, here with the diagonals.
            k, l = left.rows + left.diagonal, right.rows + right.diagonal  # noqa: E741
            trace = trace + left.diagonal @ right.diagonal.T
            return (trace - 2.0 / n * (k @ l.T) + np.outer(k.sum(1), l.sum(1)) / n**2) / (n - 1) ** 2
        cross = left.rows @ right.rows.T
        return unbiased_from_terms(trace, left.rows.sum(1)[:, None], right.rows.sum(1)[None, :], cross, n)

    def _trace(
        self, layers: list[Tensor], left: _RowStats, second: list[Tensor] | None, right: _RowStats | None
    ) -> np.ndarray:
        """tr(K~_i L~_j) of all pairs, (layers, layers) float64; fills the row statistics on the way."""
        n, count = len(layers[0]), len(layers)
        item = layers[0].element_size()
        held = count if second is None else 2 * count
        if n * n * item * held <= self.memory:
            bands = [(0, n)]
        else:
            rows = max(64, int(self.memory / (held * n * item)) // 64 * 64)
            bands = [(r, min(n, r + rows)) for r in range(0, n, rows)]
        trace = np.zeros((count, count))
        for r0, r1 in bands:
            one = self._grams("left", layers, left, r0, r1)
            two = one if second is None else self._grams("right", second, right, r0, r1)
            trace += self._products(one, two, r0, r1)
        return 2.0 * trace

    def _buffer(self, key: object, shape: tuple[int, ...], like: Tensor, zero: bool = False) -> Tensor:
        """A buffer kept from batch to batch: fresh memory of this size costs as much as the arithmetic."""
        held = self._buffers.get(key)
        if held is None or held.shape != shape or held.dtype != like.dtype or held.device != like.device:
            make = torch.zeros if zero else torch.empty
            held = self._buffers[key] = make(shape, dtype=like.dtype, device=like.device)
        return held

    def _grams(self, key: str, layers: list[Tensor], stats: _RowStats, r0: int, r1: int) -> Tensor:
        """Strictly lower part of rows r0..r1 of every layer's centred Gram matrix: (layers, r1 - r0, r1)."""
        like, n = layers[0], len(layers[0])
        out = self._buffer((key, r0), (len(layers), r1 - r0, r1), like, zero=True)
        whole = r0 == 0 and r1 == n
        threads = torch.get_num_threads()
        single = _blas.single_threaded() if threads > 1 and whole else None
        if like.device.type != "cpu" or not whole or not _blas.available() or (threads > 1 and single is None):
            for index, x in enumerate(layers):
                self._gram_tiles(x, out[index], stats, index, r0, r1)
            return out
        # numpy and a pool of threads with single-threaded products, one layer each: at these sizes it beats one
        # product on many threads, and numpy starts no threads of its own.
        arrays, grams = [x.numpy() for x in layers], out.numpy()
        workers = min(threads, len(layers))
        scratch = self._buffer("scratch", (workers, n * max(x.shape[1] for x in layers)), like).numpy()

        def work(worker: int) -> None:
            for index in range(worker, len(arrays), workers):
                d = arrays[index].shape[1]
                x = scratch[worker, : n * d].reshape(n, d)
                np.subtract(arrays[index], arrays[index][:: max(1, n // _SHIFT_ROWS)].mean(0), out=x)
                _blas.syrk_lower(x, grams[index])
                # The diagonal is k_i: read before it is cleared.
                diagonal = grams[index].reshape(-1)[:: n + 1]
                stats.fill(index, diagonal, x @ x.sum(0))
                diagonal[:] = 0

        if workers == 1:
            with _blas.in_one_thread() if threads > 1 else nullcontext():
                work(0)
        else:
            if self._pool is None or self._pool_size != workers:
                self._pool, self._pool_size = ThreadPoolExecutor(workers), workers
            with single:
                list(self._pool.map(work, range(workers)))
        return out

    def _gram_tiles(self, x: Tensor, out: Tensor, stats: _RowStats, index: int, r0: int, r1: int) -> None:
        """The same with torch's general product, one tile of rows at a time (other devices, bands of large batches)."""
        tile = 128 if x.device.type == "cpu" else 2048
        centred = torch.sub(
            x[:r1],
            x[:: max(1, len(x) // _SHIFT_ROWS)].mean(0),
            out=self._buffer(("centred", x.shape[1]), x.shape, x)[:r1],
        )
        for t0 in range(r0, r1, tile):
            t1 = min(r1, t0 + tile)
            rows = out[t0 - r0 : t1 - r0]
            torch.mm(centred[t0:t1], centred[:t1].T, out=rows[:, :t1])
            rows[:, t0:t1].tril_(-1)
        if r1 == len(x):
            k = torch.einsum("nd,nd->n", centred, centred)
            stats.fill(index, k.cpu().numpy(), torch.mv(centred, centred.sum(0)).cpu().numpy())

    def _products(self, one: Tensor, two: Tensor, r0: int, r1: int) -> np.ndarray:
        """<one_i, two_j> over the lower triangles, (layers, layers), added up in float64 row by row."""
        count, rows, _ = one.shape
        result = torch.zeros(count, count, dtype=torch.float64, device=one.device)
        step = 64 if one.device.type == "cpu" else 512
        for a in range(0, rows, step):
            b = min(rows, a + step)
            # (rows, layers, columns): one small product per row, so no float32 sum is longer than n. All pairs at once,
            # wanted or not: leaving some out would save less than the calls to do so cost.
            left = one[:, a:b, : r0 + b].permute(1, 0, 2)
            right = left if two is one else two[:, a:b, : r0 + b].permute(1, 0, 2)
            result += torch.bmm(left, right.transpose(1, 2)).sum(0, dtype=torch.float64)
        return result.cpu().numpy()


class _RowStats:
    """k_i and K~1 of every layer, (layers, n) float64: what a batch needs beside the Gram products.

    The shift is near the mean, not the mean; what it leaves (the sum of the shifted rows) is in `rows`, so nothing is
    lost.
    """

    def __init__(self, layers: int, n: int) -> None:
        self.diagonal, self.rows = np.zeros((layers, n)), np.zeros((layers, n))

    def fill(self, layer: int, diagonal: np.ndarray, row_sums: np.ndarray) -> None:
        """diagonal : (n,) k_i;  row_sums : (n,) K1 with the diagonal."""
        self.diagonal[layer] = diagonal
        self.rows[layer] = row_sums.astype(np.float64) - self.diagonal[layer]


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
        wide = {"dtype": torch.float64, "device": self.device}
        self.shift: Tensor | None = None
        self.s = torch.zeros(self.offsets[-1], **wide)
        self.left = torch.zeros(self.offsets[-1], count, **wide)
        self.right = self.left if paired else torch.zeros(self.offsets[-1], count, **wide)
        self.T = torch.zeros(count, count, **wide)
        self.t = torch.zeros(count, **wide)
        self.rows = [
            [
                _Row(a, b, torch.zeros(self.dims[i], self.offsets[b] - self.offsets[a], **wide))
                for a, b in pairs.spans(i)
            ]
            for i in range(count)
        ]

    @staticmethod
    def bytes_needed(dims: Sequence[int], pairs: Pairs) -> int:
        """Memory of one set of accumulators."""
        d = np.asarray(dims, dtype=np.int64)
        return int(8 * ((np.outer(d, d) * np.triu(pairs.mask())).sum() + 2 * d.sum() * len(d)))

    def _cut(self, layer: int) -> slice:
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
            torch.sub(x.to(self.device, self.dtype), shift[self._cut(i)], out=z[:, self._cut(i)])
        k = torch.empty(n, len(layers), dtype=torch.float64, device=self.device)
        for i in range(len(layers)):
            part = z[:, self._cut(i)].double()
            k[:, i] = part.square().sum(1)
            self.s[self._cut(i)] += part.sum(0)
        other, k_other = (z, k) if order is None else (z[order], k[order])
        for i in range(len(layers)):
            part = z[:, self._cut(i)].double()
            self.left[self._cut(i)] += part.T @ k_other
            if not self.paired:
                self.right[self._cut(i)] += other[:, self._cut(i)].double().T @ k
        self.T += k.T @ k_other
        self.t += k.sum(0)
        for i, spans in enumerate(self.rows):
            mine = z[:, self._cut(i)].T
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
        d = [delta[self._cut(i)] for i in range(count)]
        s = [self.s[self._cut(i)] for i in range(count)]
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
                        left[self._cut(p), q] = (
                            mine[self._cut(p), q]
                            - 2 * product
                            + dd[q] * s[p]
                            - d[p] * (self.t[q] - 2 * ds[q] + n * dd[q])
                        )
                    value = (
                        self.T[i, j]
                        - 2 * (d[j] @ old_right[self._cut(j), i])
                        + dd[j] * self.t[i]
                        - 2 * (d[i] @ old_left[self._cut(i), j])
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
        if other.n == 0:
            return
        if self.shift is None:
            self.shift = other.shift.clone().to(self.device)
        if not torch.equal(other.shift.to(self.device), self.shift):
            other = other.copy()
            other.reshift(self.shift)
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
        between = torch.stack([mean[self._cut(i)].square().sum() for i in range(len(self.dims))])
        whole = mean + (self.shift if self.shift is not None else 0)
        mean_sq = torch.stack([whole[self._cut(i)].square().sum() for i in range(len(self.dims))])
        return (self.t / self.n - between).clamp_min(0).cpu().numpy(), mean_sq.cpu().numpy()

    def hsic(self, biased: bool = False) -> np.ndarray:
        """HSIC matrix (layers, layers) float64 of everything accumulated so far, valid for the wanted pairs."""
        count, n = len(self.dims), self.n
        if n < MIN_EXAMPLES[biased]:
            raise TooFewExamples(
                f"got {n} examples; the {'biased' if biased else 'unbiased'} estimator needs at least "
                f"{MIN_EXAMPLES[biased]}: use more audio"
            )
        s = [self.s[self._cut(i)] for i in range(count)]
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
                            weighted[cols] @ s[j]
                            - s[i] @ self.left[self._cut(i), j]
                            - s[j] @ self.right[self._cut(j), i]
                        )
                        h[i, j] = unbiased_from_terms(trace, total[i], total[j], cross + T[i, j], n)
                    h[j, i] = h[i, j]
        return h


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
