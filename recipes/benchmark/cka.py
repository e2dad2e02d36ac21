#!/usr/bin/env python3
"""Speed, memory and accuracy of CKA against pytorch-cka, cka-pytorch, torch_cka and ckatorch, on the same tensors.

    pip install --no-deps pytorch-cka cka-pytorch torch-cka ckatorch
    python recipes/benchmark/cka.py speed --threads 1           the fast ones, interleaved
    python recipes/benchmark/cka.py speed --threads 1 --slow    the slow peers too (minutes)
    python recipes/benchmark/cka.py memory                      peak extra memory, one process per library
    python recipes/benchmark/cka.py accuracy                    error by common mean
    python recipes/benchmark/cka.py end-to-end                  audio to matrix: share of CKA beside two forward passes
    python recipes/benchmark/cka.py speed --device cuda         where there is a GPU

Every library is called as its own class does it for one minibatch: Gram matrices of all layers, then all HSIC values.
Only the submodules needed are imported, so that none of their plotting dependencies is. A library that is not installed
is left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from results import FOLDER, write_result

# pytorch-cka's package is called "cka", as this file is: it must not find itself.
sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

WORKLOADS = {
    "25 x 25 layers of 1024, n=256": ([1024] * 25, [1024] * 25, 256),
    "13 x 768 against 4 x 1024, n=512": ([768] * 13, [1024] * 4, 512),
    "13 x 768 against 4 x 1024, n=2048": ([768] * 13, [1024] * 4, 2048),
}
FAST = ("ours", "pytorch-cka")
SLOW = ("cka-pytorch", "torch_cka", "ckatorch")
# Too slow to be worth the electricity: minutes for one matrix.
SKIP = {("ckatorch", 2048)}


def submodule(package: str, name: str) -> types.ModuleType:
    """package.name without running the package's __init__ (which imports plotting libraries)."""
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ImportError(f"{package} is not installed")
        stub = types.ModuleType(package)
        stub.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = stub
    return importlib.import_module(f"{package}.{name}")


def ours(xs, ys):
    from cka_addon.estimators import Pairs, cka_from_hsic
    from cka_addon.hsic import BatchHsic

    dims = [x.shape[1] for x in xs + ys]
    names = [str(i) for i in range(len(dims))]
    engine = BatchHsic(dims, Pairs((len(xs), len(ys)), "across"), form="gram")

    def run():
        return torch.from_numpy(cka_from_hsic(engine(xs + ys), names=names)[: len(xs), len(xs) :])

    return run


def pytorch_cka(xs, ys):
    hsic = submodule("cka", "hsic").hsic

    def run():
        gx = torch.stack([torch.mm(f, f.T) for f in xs])
        gy = torch.stack([torch.mm(f, f.T) for f in ys])
        xy, xx, yy = hsic(gx, gy)
        return xy / torch.sqrt(xx[:, None] * yy[None, :])

    return run


def cka_pytorch(xs, ys):
    hsic1 = submodule("cka_pytorch", "hsic").hsic1

    def run(batched=32):
        gx, gy = [x @ x.T for x in xs], [y @ y.T for y in ys]

        def own(grams):
            parts = [torch.stack(grams[i : i + batched]) for i in range(0, len(grams), batched)]
            return torch.cat([hsic1(g, g) for g in parts])

        pairs = [(i, j) for i in range(len(gx)) for j in range(len(gy))]
        xy = []
        for k in range(0, len(pairs), batched):
            some = pairs[k : k + batched]
            xy.append(hsic1(torch.stack([gx[i] for i, _ in some]), torch.stack([gy[j] for _, j in some])))
        xy = torch.cat(xy).reshape(len(gx), len(gy))
        return xy / torch.sqrt(torch.outer(own(gx), own(gy)) + 1e-4)

    return run


def torch_cka(xs, ys):
    cls = submodule("torch_cka", "cka").CKA
    me = types.SimpleNamespace(device=xs[0].device)

    def run():
        out = torch.zeros(len(xs), len(ys), 3)
        for i, x in enumerate(xs):
            k = (x @ x.t()).fill_diagonal_(0.0)
            out[i, :, 0] += cls._HSIC(me, k, k)
            for j, y in enumerate(ys):
                other = (y @ y.t()).fill_diagonal_(0)
                out[i, j, 1] += cls._HSIC(me, k, other)
                out[i, j, 2] += cls._HSIC(me, other, other)
        return out[:, :, 1] / (out[:, :, 0].sqrt() * out[:, :, 2].sqrt())

    return run


def ckatorch(xs, ys):
    cka_batch = submodule("ckatorch", "core").cka_batch

    def run():
        return torch.tensor([[float(cka_batch(x[None], y[None])) for y in ys] for x in xs])

    return run


LIBRARIES = {
    "ours": ours,
    "pytorch-cka": pytorch_cka,
    "cka-pytorch": cka_pytorch,
    "torch_cka": torch_cka,
    "ckatorch": ckatorch,
}


def tensors(name, device="cpu", mean=0.0):
    dims_x, dims_y, n = WORKLOADS[name]
    g = torch.Generator().manual_seed(0)
    base = torch.randn(n, 32, generator=g)

    def layer(d):
        x = base @ torch.randn(32, d, generator=g) / 6 + torch.randn(n, d, generator=g) + mean
        return x.to(device)

    return [layer(d) for d in dims_x], [layer(d) for d in dims_y]


def build(names, xs, ys):
    runs = {}
    for name in names:
        try:
            runs[name] = LIBRARIES[name](xs, ys)
        except ImportError as error:
            print(f"left out {name}: {error}", file=sys.stderr)
    return runs


NOW = {"wall": time.perf_counter, "cpu": time.process_time}
now = time.perf_counter


def clock(run, device):
    if device != "cpu":
        torch.cuda.synchronize()
    start = now()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return now() - start


def peak_rate(device):
    """Operations per second of one large float32 product: what the machine can do."""
    a = torch.randn(2048, 2048, device=device)
    out = torch.empty_like(a)
    times = [clock(lambda: torch.mm(a, a, out=out), device) for _ in range(5)]
    return 2 * 2048**3 / min(times)


def speed(args):
    torch.set_num_threads(args.threads)
    where = f"{args.threads} thread(s), {args.device}, {args.clock} time"
    rows: list[list[object]] = []
    summary: list[list[object]] = []
    aims = {1: ("1.5x", "1.8x", "2.5x"), 2: ("1.4x", "1.7x", "2.5x")}.get(args.threads, ("", "", ""))
    for name in WORKLOADS:
        if args.only and args.only not in name:
            continue
        dims_x, dims_y, n = WORKLOADS[name]
        xs, ys = tensors(name, args.device)
        chosen = FAST + (SLOW if args.slow else ())
        runs = build([c for c in chosen if (c, n) not in SKIP], xs, ys)
        for run in (r for k, r in runs.items() if k in FAST):
            run()
        times = {k: [] for k in runs}
        rounds = args.rounds or (15 if n < 1000 else 5)
        rates = []
        for r in range(rounds):
            rates.append(peak_rate(args.device) if r < 3 else 0)
            for k, run in runs.items():
                if k in FAST or r == 0:
                    times[k].append(clock(run, args.device))
        # The limit: symmetric Gram products (half of a product each) and one product over all pairs of layers.
        operations = n * n * (sum(dims_x) + sum(dims_y) + len(dims_x) * len(dims_y))
        base = statistics.median(times["pytorch-cka"]) if "pytorch-cka" in times else float("nan")
        for k, t in times.items():
            m = statistics.median(t)
            rows.append([name, k, m * 1e3, min(t) * 1e3, max(t) * 1e3, base / m, f"{operations / m / max(rates):.0%}"])
            print(*rows[-1], file=sys.stderr, flush=True)
            if k == "ours":
                aim = aims[list(WORKLOADS).index(name)]
                summary.append([f"CKA kernel over pytorch-cka's, {name}, {where}", f"{base / m:.2f}x", aim])
    write_result(
        args.out or FOLDER / f"cka.speed_{args.device.partition(':')[0]}_{args.threads}.json",
        title=f"CKA of one minibatch, {where}",
        about="The same tensors for all libraries, in turn within each round, each called as its own class does it for "
        "one minibatch; milliseconds. The limit: symmetric Gram products and one product over all pairs of layers, at "
        "the rate of one large matrix product.",
        tables=[
            {
                "title": "",
                "columns": ["workload", "library", "median", "least", "most", "pytorch-cka / it", "of the limit"],
                "rows": rows,
            }
        ],
        summary=summary,
        data={"arguments": vars(args), "rows": rows},
    )


def memory(args):
    """Peak extra resident memory, each library in a process of its own."""
    if args.one:
        library, name = args.one
        xs, ys = tensors(name)
        torch.set_num_threads(1)
        run = LIBRARIES[library]([x[:16] for x in xs], [y[:16] for y in ys])
        run()  # imports and thread pools are not the algorithm's
        run = LIBRARIES[library](xs, ys)
        Path("/proc/self/clear_refs").write_text("5")

        def status(key):
            line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
            return int(line.split()[1]) / 1024

        before = status("VmRSS")
        run()
        print(f"{status('VmHWM') - before:.0f}")
        return
    rows = []
    for name, (_, _, n) in WORKLOADS.items():
        for library in FAST + (SLOW if args.slow else ()):
            if (library, n) in SKIP:
                continue
            command = [sys.executable, __file__, "memory", "--one", library, name]
            done = subprocess.run(command, capture_output=True, text=True)
            rows.append([name, library, done.stdout.strip() or f"- ({done.stderr.strip().splitlines()[-1]})"])
            print(*rows[-1], file=sys.stderr, flush=True)
    write_result(
        args.out or FOLDER / "cka.memory.json",
        title="CKA of one minibatch: memory",
        about="Peak extra resident memory of one call, each library in a process of its own; MiB.",
        tables=[{"title": "", "columns": ["workload", "library", "MiB"], "rows": rows}],
        data=rows,
    )


def accuracy(args):
    """Largest error of a CKA value against the definition in float64, by common mean."""
    from cka_addon.estimators import Reference

    torch.set_num_threads(1)
    rows = {k: [] for k in LIBRARIES}
    for mean in (0.0, 10.0, 50.0):
        g = torch.Generator().manual_seed(0)
        base = torch.randn(256, 32, generator=g)
        xs, ys = (
            [base @ torch.randn(32, 256, generator=g) / 6 + torch.randn(256, 256, generator=g) + mean for _ in range(3)]
            for _ in range(2)
        )
        want = np.array([[Reference.cka(x.double().numpy(), y.double().numpy()) for y in ys] for x in xs])
        for k, run in build(LIBRARIES, xs, ys).items():
            error = np.abs(run().double().numpy() - want).max()
            rows[k].append("NaN" if np.isnan(error) else f"{error:.0e}")
    table = [[k, *row] for k, row in rows.items() if row]
    write_result(
        args.out or FOLDER / "cka.accuracy.json",
        title="CKA: error by common mean",
        about="Largest error of a value against the definition in float64; n=256, 3 x 3 layers of 256, float32.",
        tables=[{"title": "", "columns": ["library", "mean 0", "mean 10", "mean 50"], "rows": table}],
        summary=[["CKA error, features of mean 50", rows["ours"][-1], ""]],
        data=rows,
    )


def end_to_end(args):
    """Two WavLM BASE-sized models: time of the forward passes, and what reading, aligning and CKA take on top."""
    import tempfile

    import soundfile
    from transformers import WavLMConfig, WavLMModel

    from cka_addon import audio
    from cka_addon.models import Model, _TransformersForward
    from cka_addon.run import compute

    torch.set_num_threads(args.threads)
    folder = args.audio
    if folder is None:
        folder = tempfile.mkdtemp()
        for i in range(args.utterances):
            soundfile.write(f"{folder}/{i:03d}.wav", 0.1 * np.random.default_rng(i).standard_normal(16000 * 4), 16000)
    torch.manual_seed(0)
    models = [
        Model(_TransformersForward(WavLMModel(WavLMConfig()).eval(), False), name, device=args.device) for name in "ab"
    ]
    recordings = audio.find_recordings(folder, limit=args.utterances)
    wavs = [audio.load(r)[0] for r in recordings]
    forward, whole = [], []
    for _ in range(args.rounds or 2):
        forward.append(clock(lambda: [m(w) for w in wavs for m in models], args.device))
        paths = [r.path for r in recordings]
        settings = {"mode": args.mode, "progress": False, "device": args.device, "blocks": 5}
        whole.append(clock(lambda p=paths, s=settings: compute(models, p, **s), args.device))
    f, w = min(forward), min(whole)
    seconds = sum(len(x) for x in wavs) / 16000
    on_top = f"{100 * (w - f) / f:.1f} %"
    row = [args.mode, args.threads, args.device, args.clock, len(wavs), seconds, f, w, on_top]
    columns = [
        "mode",
        "threads",
        "device",
        "clock",
        "recordings",
        "seconds of audio",
        "forward passes",
        "whole",
        "on top",
    ]
    write_result(
        args.out or FOLDER / f"cka.end_to_end_{args.mode}.json",
        title=f"CKA from audio to matrix, {args.mode}",
        about="Two WavLM models of BASE size (13 + 13 layers of 768): seconds of the two forward passes alone, and of "
        "the whole way from audio to matrix; the best of the rounds.",
        tables=[{"title": "", "columns": columns, "rows": [row]}],
        summary=[[f"CKA on top of two BASE-size forward passes, {args.mode}", on_top, ""]],
        data=row,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory", "accuracy", "end-to-end"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--slow", action="store_true", help="also the peers that take minutes")
    parser.add_argument("--only", help="workloads whose name holds this text")
    parser.add_argument("--rounds", type=int, help="repetitions")
    parser.add_argument("--audio", help="folder of recordings for end-to-end (default: made-up ones)")
    parser.add_argument("--utterances", type=int, default=12)
    parser.add_argument("--mode", default="minibatch", choices=("minibatch", "full"))
    parser.add_argument("--out", type=Path, metavar="JSON", help="the result (default: in recipes/benchmark/results)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument(
        "--clock", choices=sorted(NOW), default="wall", help="cpu: processor time, for one thread on a busy machine"
    )
    args = parser.parse_args()
    if args.clock == "cpu" and (args.threads > 1 or args.device != "cpu"):
        parser.error("processor time adds up over threads: --clock cpu goes with --threads 1 on the CPU")
    global now
    now = NOW[args.clock]
    {"speed": speed, "memory": memory, "accuracy": accuracy, "end-to-end": end_to_end}[args.what](args)


if __name__ == "__main__":
    main()
