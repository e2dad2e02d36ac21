#!/usr/bin/env python3
"""How often do the intervals of `cka-addon compute` hold the value of the whole corpus? Measured on real speech.

    cka-addon dump -m ecapa_dino_small -m fbank -a SPEECH/readers -o store --dtype float16
    python recipes/benchmark/cka_intervals.py store --labels SPEECH/readers/labels.tsv:speaker --draws 300

Utterances (or speakers) are drawn without replacement from the store, the value and its 95 % interval are computed as
the package does it, and it is counted how often the interval holds the value of the whole store. A draw of N from M
lies nearer to the whole than a draw from an endless corpus would, by sqrt(1 - N / M): deviations are divided by that.
Every layer is projected at random to --width dimensions first, so that thousands of draws take minutes.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from results import add_output, write_result
from torch import Tensor

from cka_addon.estimators import Pairs
from cka_addon.hsic import BatchHsic
from cka_addon.moments import Moments
from cka_addon.options import Options
from cka_addon.sources import examples_of, iterate, open_source
from cka_addon.uncertainty import (
    Kept,
    LeftOut,
    frames_to_keep,
    intervals,
    leave_out,
    pick_frames,
    ratio,
    without_each_block,
)
from cka_addon.units import speakers


class Corpus:
    """Features of a store, projected, with the sums of every utterance ready to be added up."""

    def __init__(self, store: str, width: int, layers: list[int] | None) -> None:
        source = open_source(stores=[store])
        g = torch.Generator().manual_seed(0)
        self.ids: list[str] = []
        self.frames: list[list[Tensor]] = []
        project: list[Tensor] | None = None
        for utterance in iterate(source, progress=True):
            found = examples_of(utterance, source.infos, Options())
            found = [found[i] for i in layers] if layers else found
            if project is None:
                project = [torch.randn(x.shape[1], min(width, x.shape[1]), generator=g) for x in found]
                shift = [x.mean(0) for x in found]
            self.frames.append([(x - s) @ p / p.shape[0] ** 0.5 for x, s, p in zip(found, shift, project, strict=True)])
            self.ids.append(utterance.id)
        self.dims = [x.shape[1] for x in self.frames[0]]
        self.pairs = Pairs((len(self.dims),))
        self.sums: list[Moments] = []
        whole = Moments(self.dims, self.pairs)
        zero = torch.zeros(sum(self.dims), dtype=torch.float64)
        for layers_ in self.frames:
            m = Moments(self.dims, self.pairs)
            m.shift = zero
            m.update(layers_)
            self.sums.append(m)
        self.flat = torch.stack([torch.cat([t.reshape(-1) for t in m.tensors()]).float() for m in self.sums])
        self.counts = np.array([m.n for m in self.sums])
        del whole
        self.means = [torch.stack([u[k].mean(0) for u in self.frames]) for k in range(len(self.dims))]

    def moments(self, chosen: np.ndarray) -> Moments:
        """Sums over some utterances."""
        m = Moments(self.dims, self.pairs)
        m.shift = self.sums[0].shift
        m.n = int(self.counts[chosen].sum())
        total, at = self.flat[chosen].sum(0, dtype=torch.float64), 0
        for t in m.tensors():
            t.copy_(total[at : at + t.numel()].reshape(t.shape))
            at += t.numel()
        return m

    def full(self, chosen: np.ndarray, units: list[str] | None = None) -> tuple[np.ndarray, LeftOut]:
        """Value and what it is without each unit, over all frames; as `compute --mode full` does it."""
        moments = self.moments(chosen)
        names = units or [self.ids[i] for i in chosen]
        distinct = sorted(set(names))
        keep, frames = frames_to_keep(self.dims, 4, len(distinct))
        keep, quota = min(keep, len(distinct)), max(2, frames // (len(names) // len(distinct)))
        # The room of the real thing: as wide as one BASE model, not as the projection.
        known = {name: k for k, name in enumerate(distinct[:keep])}
        parts, owner, weight = [], [], []
        rng = np.random.default_rng(0)
        for i, name in zip(chosen, names, strict=True):
            if name in known:
                pick = pick_frames(int(self.counts[i]), quota, int(rng.integers(1 << 32)))
                parts.append([x[torch.from_numpy(pick)] for x in self.frames[i]])
                owner += [known[name]] * len(pick)
                weight += [self.counts[i] / len(pick)] * len(pick)
        order = np.argsort(owner, kind="stable")
        layers = [torch.cat(column)[torch.from_numpy(order)] for column in zip(*parts, strict=True)]
        kept = Kept(distinct[:keep], layers, np.array(owner)[order], np.array(weight)[order])
        h = moments.hsic()
        return ratio(h), leave_out(kept, h, moments.n, moments, total=len(distinct))

    def of_means(self, chosen: np.ndarray, units: list[str] | None = None) -> tuple[np.ndarray, LeftOut]:
        """The same over utterance means."""
        names = units or [self.ids[i] for i in chosen]
        distinct = sorted(set(names))
        owner = np.array([distinct.index(n) for n in names])
        order = np.argsort(owner, kind="stable")
        layers = [x[torch.from_numpy(chosen[order])] for x in self.means]
        h = BatchHsic(self.dims, self.pairs, form="gram")(layers)
        return ratio(h), leave_out(Kept(distinct, layers, owner[order], np.ones(len(owner))), h, len(owner))

    def minibatch(self, chosen: np.ndarray, rng: np.random.Generator, mix: int = 16, size: int = 512):
        """Value and what it is without each block, from minibatches of `mix` utterances."""
        engine = BatchHsic(self.dims, self.pairs, form="gram")
        h, weights = [], []
        for block in np.array_split(chosen, max(1, min(20, len(chosen) // mix))):
            total, batches = np.zeros((len(self.dims),) * 2), 0
            for pool in np.array_split(block, max(1, len(block) // mix)):
                layers = [torch.cat([self.frames[i][k] for i in pool]) for k in range(len(self.dims))]
                order = torch.from_numpy(rng.permutation(len(layers[0])))
                for part in order.split(size):
                    if len(part) >= size // 2:
                        total += engine([x[part] for x in layers])
                        batches += 1
            h.append(total / batches)
            weights.append(batches)
        w = np.array(weights, dtype=np.float64)
        value = ratio((w[:, None, None] * np.stack(h)).sum(0) / w.sum())
        if len(h) < 5:
            return value, None
        return value, LeftOut(
            [str(i) for i in range(len(h))], ratio(without_each_block(np.stack(h), w)), len(h), "block"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--labels", help="who speaks, for the speaker rows")
    parser.add_argument("--layers", help="which layers, positions with commas (default all)")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--sizes", default="25,50,100,200,400")
    parser.add_argument("--modes", default="full,means,speaker,speaker-means,minibatch")
    parser.add_argument("--methods", default="jackknife,bootstrap")
    add_output(parser, "cka.intervals")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    corpus = Corpus(args.store, args.width, [int(i) for i in args.layers.split(",")] if args.layers else None)
    everyone = np.arange(len(corpus.ids))
    off = np.triu_indices(len(corpus.dims), 1)
    whole = ratio(corpus.moments(everyone).hsic())
    truths = {"full": whole, "speaker": whole}
    truths["means"] = truths["speaker-means"] = ratio(BatchHsic(corpus.dims, corpus.pairs)(corpus.means))
    who = speakers(corpus.ids, args.labels) if args.labels else {}
    table = []
    for mode in args.modes.split(","):
        if mode == "minibatch":
            rounds = [
                corpus.minibatch(np.random.default_rng(s).permutation(everyone), np.random.default_rng(s))[0]
                for s in range(3)
            ]
            truths["minibatch"] = np.mean(rounds, 0)
        people = sorted(set(who.values()))
        for size in map(int, args.sizes.split(",")):
            start = time.time()
            population = len(people) if mode.startswith("speaker") else len(everyone)
            if size > population // 2:
                continue
            found, ends = [], {m: [] for m in args.methods.split(",")}
            for draw in range(args.draws):
                rng = np.random.default_rng([draw, size])
                if mode.startswith("speaker"):
                    some = {people[i] for i in rng.permutation(population)[:size]}
                    chosen = np.array([i for i in everyone if who[corpus.ids[i]] in some])
                    units = [who[corpus.ids[i]] for i in chosen]
                    value, left = (corpus.of_means if "means" in mode else corpus.full)(chosen, units)
                else:
                    chosen = rng.permutation(everyone)[:size]
                    if mode == "minibatch":
                        value, left = corpus.minibatch(chosen, rng)
                    else:
                        value, left = (corpus.of_means if mode == "means" else corpus.full)(np.sort(chosen))
                found.append(value[off])
                if left is None:
                    break
                for method in ends:
                    low, high = intervals(left, value, method=method)
                    ends[method].append((low[off], high[off]))
            if left is None:
                table.append({"mode": mode, "units": size, "interval": "none: too few blocks"})
                print(json.dumps(table[-1]), flush=True)
                continue
            values, truth = np.array(found), truths[mode][off]
            moved = values + (truth - values) / np.sqrt(1 - size / population)
            spread = values.std(0) / np.sqrt(1 - size / population)
            for method, pairs in ends.items():
                low, high = (np.array([p[k] for p in pairs]) for k in (0, 1))
                inside = ((low <= moved) & (moved <= high)).mean(0)
                row = {
                    "mode": mode, "units": size, "method": method, "draws": args.draws,
                    "coverage": round(float(inside.mean()), 4), "worst pair": round(float(inside.min()), 4),
                    "width / ideal": round(float(((high - low).mean(0) / (2 * 1.96 * spread)).mean()), 3),
                    "largest bias, in standard deviations": round(
                        float(np.abs((values.mean(0) - truth) / spread).max()), 2
                    ),
                    "seconds": round(time.time() - start, 1),
                }  # fmt: skip
                if mode == "minibatch":
                    row["largest bias against full"] = round(
                        float(np.abs((truths[mode] - truths["full"])[off] / spread).max()), 2
                    )
                table.append(row)
                print(json.dumps(row), flush=True)
    columns = [k for k in max(table, key=len) if k != "method"]
    full = [r for r in table if r.get("method") == "jackknife"]
    write_result(
        args.out,
        title="CKA: how often 95 % intervals hold the value of the corpus",
        about=(
            "Draws of utterances (or speakers) of real speech: mean coverage over pairs of layers, the worst pair, the "
            "width against an ideal interval, and biases in standard deviations. Minibatch intervals are for the value "
            "that minibatches estimate; how far that is from the full one stands in the last column."
        ),
        tables=[{"title": "", "columns": columns, "rows": [[r.get(c, "-") for c in columns] for r in table]}],
        summary=[
            [
                "CKA intervals: mean coverage over modes, 25 to 400 utterances",
                f"{min(r['coverage'] for r in full):.1%} to {max(r['coverage'] for r in full):.1%}",
                "93 to 97 %",
            ]
        ],
        data=table,
    )


if __name__ == "__main__":
    main()
