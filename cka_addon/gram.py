"""HSIC of one batch through Gram matrices: the minibatch kernel.

The row sums of a Gram matrix need no Gram matrix: K~1 = X (X'1) - k. Only tr(K~L~) does, and it only needs the lower
triangles: tr(K~L~) = 2 <tril(K), tril(L)>.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from cka_addon import _blas
from cka_addon.estimators import unbiased_from_terms

# Any vector near the mean will do as shift, as the row sums are kept: the mean of so many rows saves a pass over all.
_SHIFT_ROWS = 32


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
            two = one if second is None or right is None else self._grams("right", second, right, r0, r1)
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
            with single or nullcontext():
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
