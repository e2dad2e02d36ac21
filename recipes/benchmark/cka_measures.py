#!/usr/bin/env python3
"""What Procrustes, CCA, SVCCA and PWCCA cost beside CKA, and beside decompositions of every pair's features.

    python recipes/benchmark/cka_measures.py --layers 13 --width 256 --examples 40000

Processor time of one thread. "per pair" is what netrep and the published CCA scripts do: singular value decompositions
of both layers' features for every pair; it is measured on a few pairs and multiplied. Values are compared as well.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from results import add_output, write_result

from cka_addon.estimators import Pairs
from cka_addon.measures import from_sums
from cka_addon.moments import Moments

CHUNK = 2048


def features(layers: int, width: int, examples: int) -> list[torch.Tensor]:
    """Layers that share a part, with a spectrum that falls as that of speech models does."""
    g = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1) ** -0.7
    base = torch.randn(examples, width, generator=g) * scale
    made = []
    for _ in range(layers):
        turn = torch.linalg.qr(torch.randn(width, width, generator=g)).Q
        made.append(base @ turn + 0.5 * torch.randn(examples, width, generator=g) * scale)
    return made


def per_pair(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """The four measures of one pair from its features."""
    x, y = x - x.mean(0), y - y.mean(0)
    (ux, sx, _), (uy, sy, _) = (np.linalg.svd(v, full_matrices=False) for v in (x, y))
    kx, ky = (int((np.cumsum(s**2) / (s**2).sum() < 0.99).sum()) + 1 for s in (sx, sy))
    u, s, _ = np.linalg.svd(ux.T @ uy)
    weights = np.abs((ux @ u).T @ x).sum(1)
    return {
        "procrustes": np.linalg.svd(x.T @ y, compute_uv=False).sum() / (np.linalg.norm(x) * np.linalg.norm(y)),
        "cca": s.mean(),
        "svcca": np.linalg.svd(ux[:, :kx].T @ uy[:, :ky], compute_uv=False).mean(),
        "pwcca": weights @ s / weights.sum(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--examples", type=int, default=40000)
    parser.add_argument("--pairs", type=int, default=3, help="pairs that the peers' way is measured on")
    add_output(parser, "cka.measures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = features(args.layers, args.width, args.examples)
    pairs = Pairs((args.layers,))
    names = [str(i) for i in range(args.layers)]
    start = time.process_time()
    moments = Moments([args.width] * args.layers, pairs)
    for a in range(0, args.examples, CHUNK):
        moments.update([v[a : a + CHUNK] for v in x])
    moments.hsic()
    cka = time.process_time() - start
    start = time.process_time()
    from_sums(moments, names, ("procrustes", "cca", "svcca", "pwcca"))
    extra = time.process_time() - start
    start = time.process_time()
    for k in range(args.pairs):
        per_pair(x[k].numpy(), x[k + 1].numpy())
    one = (time.process_time() - start) / args.pairs
    some = [v[:5000].double() for v in x[:2]]
    exact = Moments([args.width] * 2, Pairs((2,)), dtype=torch.float64)
    exact.update(some)
    again = from_sums(exact, names[:2], ("procrustes", "cca", "svcca", "pwcca"))
    want = per_pair(some[0].numpy(), some[1].numpy())
    error = max(abs(again[m].values[0, 1] - v) for m, v in want.items())
    count = args.layers * (args.layers + 1) // 2
    rows = [
        ["CKA alone, one pass", cka, 1.0],
        ["CKA and the four measures", cka + extra, (cka + extra) / cka],
        [f"the four measures per pair, {count} pairs (from {args.pairs})", one * count, one * count / cka],
    ]
    write_result(
        args.out,
        title=f"CKA and four more measures: {args.layers} x {args.layers} layers of {args.width}, n={args.examples}",
        about="Processor seconds of one thread. What is added to CKA's pass does not grow with the number of examples.",
        tables=[{"title": "", "columns": ["", "seconds", "times CKA alone"], "rows": rows}],
        summary=[
            ["CKA and four more measures, against CKA alone", f"{(cka + extra) / cka:.2f} times", "1.3"],
            ["the same, against the four measures per pair", f"{one * count / (cka + extra):.0f} times faster", "5"],
            ["largest difference from decompositions of the features, float64", f"{error:.1e}", "1e-05"],
        ],
        data={"error": error, "cka": cka, "extra": extra, "pair": one},
    )


if __name__ == "__main__":
    main()
