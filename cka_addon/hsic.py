"""HSIC and CKA of features in memory, by the cheaper of the two forms of arithmetic.

The definitions are in `estimators`, the Gram form (few examples) in `gram`, the streaming form (many) in `moments`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cka_addon.errors import NonFinite, TooFewExamples
from cka_addon.estimators import (
    MIN_EXAMPLES,
    Pairs,
    check_finite,
    check_varies,
    cka_from_hsic,
    crossover,
    spread,
)
from cka_addon.gram import GramKernel
from cka_addon.moments import Moments


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
    left, right = [torch.as_tensor(x) for x in xs], [torch.as_tensor(y) for y in ys or ()]
    layers = left + right
    names = (
        list(names)
        if names is not None
        else [f"x[{i}]" for i in range(len(left))] + [f"y[{i}]" for i in range(len(right))]
    )
    for name, layer in zip(names, layers, strict=True):
        if layer.ndim != 2 or layer.shape[0] != layers[0].shape[0]:
            raise ValueError(
                f"{name}: got shape {tuple(layer.shape)}; expected ({layers[0].shape[0]}, width): "
                "two dimensions and the same examples in every layer"
            )
    pairs = Pairs((len(left), len(right)), "across") if right else Pairs((len(left),))
    engine = BatchHsic([x.shape[1] for x in layers], pairs, biased=biased, form=form)
    h = engine(layers, names=names)
    check_varies(*spread(layers), names=names)
    values = cka_from_hsic(h, names=names, mask=pairs.mask())
    return values[: len(left), len(left) :] if right else values


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
