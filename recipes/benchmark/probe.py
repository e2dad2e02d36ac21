#!/usr/bin/env python3
"""Speed, accuracy and memory of the streamed linear probe beside scikit-learn's LogisticRegression (lbfgs).

    python recipes/benchmark/probe.py              13 x 768 + 4 x 1024, 500,000 frames; scikit-learn on one layer
    python recipes/benchmark/probe.py --frames 60000 --sklearn-frames 60000 --layers 768x2      minutes
    python recipes/benchmark/probe.py --show OUT/probe.json ... --out recipes/benchmark/results/probe.real_speech.json
                                                   results of cka-addon probe as a section of the results page

Features are made as they are needed (28 GB would not fit): correlated, of very different scale and mean, classes of
unequal size. Times are of the processor, one thread, without the making. Three penalties are fitted and one is chosen;
scikit-learn gets that one.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from results import add_output, write_result

from cka_addon.probe import solver
from cka_addon.probe.result import ProbeResult, percent

CLASSES, HELD_OUT, PIECE = 40, 20_000, 1024


class Layer:
    """Frames of one layer, piece by piece, always the same."""

    def __init__(self, width: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.width, self.seed = width, seed
        self.priors = torch.softmax(0.8 * torch.randn(CLASSES, generator=g), 0)
        self.centres = 1.2 * torch.randn(CLASSES, 64, generator=g)
        self.mix = torch.randn(64, width, generator=g) / 8
        self.more = torch.randn(256, width, generator=g) * torch.arange(1, 257)[:, None] ** -0.5
        self.scale = torch.exp(torch.randn(width, generator=g))

    def pieces(self, frames: int, what: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(features, classes) of `frames` frames; what : 0 to train on, 1 held out."""
        g = torch.Generator().manual_seed(1000 * self.seed + what)
        for start in range(0, frames, PIECE):
            n = min(PIECE, frames - start)
            y = torch.multinomial(self.priors, n, True, generator=g)
            z = self.centres[y] + 3 * torch.randn(n, 64, generator=g)
            z += 0.15 * z.square() * z.sign()
            noise = torch.randn(n, 256, generator=g) @ self.more + 0.3 * torch.randn(n, self.width, generator=g)
            yield (z @ self.mix + noise) * self.scale + 2 * self.scale, y


def accuracy(probe: solver.Softmax, layer: Layer) -> float:
    """Percent of the held-out frames."""
    right = sum(int((probe.scores(x).argmax(1) == y).sum()) for x, y in layer.pieces(HELD_OUT, 1))
    return 100 * right / HELD_OUT


def stream(layers: list[Layer], frames: int) -> tuple[list[solver.Softmax], list[float]]:
    """All layers together over one reading (more where frames are few): probes and processor seconds of each."""
    passes = solver.passes_for(frames)
    probes = [solver.StreamSoftmax(x.width, CLASSES, steps=passes * frames // solver.BATCH) for x in layers]
    spent = [0.0] * len(layers)
    for _ in range(passes):
        for parts in zip(*(layer.pieces(frames, 0) for layer in layers), strict=True):
            for k, (x, y) in enumerate(parts):
                begin = time.process_time()
                for xb, yb in zip(x.split(solver.BATCH), y.split(solver.BATCH), strict=True):
                    probes[k].update(xb, yb)
                spent[k] += time.process_time() - begin
    begin = time.process_time()
    done = [p.finish() for p in probes]
    spent = [s + (time.process_time() - begin) / len(layers) for s in spent]
    return done, spent


def all_layers(widths: list[int], frames: int) -> None:
    """In a process of its own, so that its memory is its own: prints seconds, accuracy and peak memory."""
    layers = [Layer(width, 10 + i) for i, width in enumerate(widths)]
    probes, spent = stream(layers, frames)
    scores = [accuracy(p, layer) for p, layer in zip(probes, layers, strict=True)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for width, seconds, score in zip(widths, spent, scores, strict=True):
        sys.stdout.write(f"layer {width} {seconds} {score}\n")
    sys.stdout.write(f"peak {peak}\n")


def show(paths: list[Path], out: Path) -> None:
    """Results of `cka-addon probe` as a section of the results page: one table a file, layers by properties."""
    tables, data = [], {}
    for path in paths:
        result = ProbeResult.load(path)
        columns, cells = ["layer"], {"chance": ["majority or mean"]}
        for p in result.properties:
            what = f"{len(p['classes'])} classes" if p["kind"] == "class" else "R2"
            columns.append(f"{p['name']} ({what}, {p['examples']} {p['unit']}s, {p['groups']} {p['by']}s)")
            for row in [{"model": "chance", **p["chance"]}, *p["rows"]]:
                name = "chance" if row["model"] == "chance" else f"{row['model']} / {row['layer']}"
                ends = [percent(row[k], p["metric"]) for k in ("value", "lower", "upper")]
                text = ends[0] if row["lower"] is None else f"{ends[0]} [{ends[1]}, {ends[2]}]"
                if row.get("selectivity") is not None:
                    text += f" s {percent(row['selectivity'], p['metric'])}"
                cells.setdefault(name, [name]).append(text)
            keys = (
                "model",
                "layer",
                "value",
                "lower",
                "upper",
                "macro_f1",
                "control",
                "selectivity",
                "solver",
                "verdict",
            )
            rows = [
                {k: round(v, 5) if isinstance(v, float) else v for k in keys if (v := r.get(k)) is not None}
                for r in p["rows"]
            ]
            data[f"{path.parent.name}: {p['name']}"] = {"rows": rows, "settings": result.details["settings"]}
        tables.append({"title": path.parent.name, "columns": columns, "rows": list(cells.values())})
    write_result(
        out,
        title="Probes of real speech",
        about="Linear probes of `cka-addon probe`: accuracy in percent or R2, its 95 % interval, the selectivity (s) "
        "where a control task was fitted. Folds hold whole groups: speakers, or utterances where speakers are asked "
        "for. The untrained twin and FBANK (80 bands with two differences) stand beside the trained layers.",
        tables=tables,
        data=data,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=500_000, help="frames of every layer (default %(default)s)")
    parser.add_argument("--layers", default="768x13,1024x4", metavar="WIDTHxN,...", help="default %(default)s")
    parser.add_argument("--sklearn-frames", type=int, default=500_000, help="for the comparison on the first layer")
    parser.add_argument("--max-iter", type=int, default=500, help="of scikit-learn (default %(default)s)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--show", type=Path, nargs="+", metavar="PROBE_JSON", help="results of cka-addon probe to write down"
    )
    add_output(parser, "probe.speed")
    options = parser.parse_args()
    if options.show:
        show(options.show, options.out)
        return 0
    torch.set_num_threads(1)
    widths = [int(w) for part in options.layers.split(",") for w, n in [part.split("x")] for _ in range(int(n))]
    if options.child:
        all_layers(widths, options.frames)
        return 0
    command = [sys.executable, __file__, "--child", "--layers", options.layers, "--frames", str(options.frames)]
    lines = [
        line.split() for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    ]
    found = [(int(w), float(s), float(a)) for kind, *rest in lines if kind == "layer" for w, s, a in [rest]]
    peak = next(float(rest[0]) for kind, *rest in lines if kind == "peak")

    from sklearn.linear_model import LogisticRegression

    layer, frames = Layer(widths[0], 10), options.sklearn_frames
    ((mine,), (seconds,)) = stream([layer], frames)
    pieces = list(layer.pieces(frames, 0))
    x, y = torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])
    del pieces
    scale = solver.Scale.of(x)
    z, labels = scale.apply(x).numpy(), y.numpy()
    del x
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = LogisticRegression(C=1 / (mine.strength * frames), max_iter=options.max_iter).fit(z, labels)
    peer_seconds = time.process_time() - begin
    score = accuracy(mine, layer)
    weight, bias = scale.unscale(
        torch.from_numpy(np.ascontiguousarray(peer.coef_.T, np.float32)),
        torch.from_numpy(peer.intercept_.astype(np.float32)),
    )
    peer_score = accuracy(solver.Softmax(weight, bias, mine.strength), layer)
    ratio = peer_seconds / seconds
    total = sum(s for _, s, _ in found)
    kinds = sorted({w for w, _, _ in found})
    write_result(
        options.out,
        title="Linear probe of all layers in a stream",
        about="Softmax probes of 40 classes, three penalties at once, on made features; processor seconds on one "
        "thread without the making of the features. scikit-learn: LogisticRegression, lbfgs, float32, on the same "
        "standardised frames held in memory, with the penalty that the stream chose.",
        tables=[
            {
                "title": f"{len(found)} layers, {options.frames} frames",
                "columns": ["width", "layers", "seconds a layer", "accuracy %"],
                "rows": [
                    [
                        w,
                        sum(width == w for width, _, _ in found),
                        float(np.mean([s for width, s, _ in found if width == w])),
                        f"{np.mean([a for width, _, a in found if width == w]):.2f}",
                    ]
                    for w in kinds
                ],
            },
            {
                "title": f"one layer of {widths[0]}, {frames} frames",
                "columns": ["probe", "seconds", "accuracy %", "iterations"],
                "rows": [
                    ["stream", seconds, f"{score:.2f}", f"{solver.passes_for(frames)} pass(es)"],
                    ["scikit-learn", peer_seconds, f"{peer_score:.2f}", int(peer.n_iter_[0])],
                ],
            },
        ],
        summary=[
            [f"linear probe over scikit-learn's, {frames} frames of {widths[0]}", f"{ratio:.0f}x", "10x"],
            ["... accuracy less scikit-learn's", f"{score - peer_score:+.2f} points", "within 0.3"],
            [f"... memory of {len(found)} layers, {options.frames} frames", f"{peak:.0f} MiB", "2 GiB"],
        ],
        data={"layers": found, "total_seconds": total, "peak_mib": peak, "ratio": ratio, "strength": mine.strength},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
