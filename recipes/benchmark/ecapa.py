#!/usr/bin/env python
"""Time from features to hidden states and MFA: this project's ECAPA-TDNN against the classes it reads checkpoints of.

All contenders hold the same random weights, get the same utterances and run in turn within each round of one process;
the best of the rounds counts, and every ratio is between times of that process. Peers are optional: SpeechBrain as
installed, WeSpeaker as the path of a checkout. The matrix-product rate is the best that PyTorch reaches here on the
network's own shapes.

    python recipes/benchmark/ecapa.py --threads 1 2 --wespeaker ~/wespeaker
    python recipes/benchmark/ecapa.py --device cuda --cases ragged equal
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import platform
import random
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from results import add_output, write_result

from s3prl_speaker_upstreams.ecapa import DIALECTS, Ecapa, Frontend, Ragged

logger = logging.getLogger("benchmark.ecapa")
Run = Callable[[], object]


def utterances(case: str, seed: int, batches: int) -> list[list[torch.Tensor]]:
    """Batches of noise at speech level: "ragged" 8 of 1 to 15 s, "equal" 16 of 4 s, "short" 32 of 0.3 to 2 s."""
    draw = random.Random(seed)
    lengths = {
        "ragged": lambda: [draw.uniform(1, 15) for _ in range(8)],
        "equal": lambda: [4.0] * 16,
        "short": lambda: [draw.uniform(0.3, 2) for _ in range(32)],
    }[case]
    generator = torch.Generator().manual_seed(seed)
    return [
        [0.05 * torch.randn(int(16000 * s), generator=generator) for s in lengths()]
        for _ in range(1 if case == "equal" else batches)
    ]


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Batch-norm statistics and weights as of a trained network: positive scales, means off zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
            module.running_mean.normal_(0.3, 0.1, generator=generator)
            module.running_var.uniform_(0.2, 1.0, generator=generator)


def speechbrain_names(name: str) -> str:
    """Our parameter name as SpeechBrain's ECAPA_TDNN calls it."""
    block, _, rest = name.partition(".")
    rest = rest.replace("conv.", "conv.conv.").replace("norm.", "norm.norm.").replace("res2.", "res2net_block.blocks.")
    for i in (1, 2):
        rest = rest.replace(f"se.conv{i}.", f"se_block.conv{i}.conv.")
    return f"blocks.{int(block[-1]) - 1}.{rest}" if block.startswith("block_") else f"{block}.{rest}"


def wespeaker_names(name: str) -> str:
    """Our parameter name as WeSpeaker's ECAPA_TDNN calls it."""
    block, _, rest = name.partition(".")
    if block == "mfa":
        return name.removeprefix("mfa.")
    rest = rest.replace("norm.", "bn.").replace("tdnn1.", "se_res2block.0.").replace("tdnn2.", "se_res2block.2.")
    rest = rest.replace("se.conv", "se_res2block.3.linear")
    if rest.startswith("res2."):
        _, index, kind, leaf = rest.split(".")
        rest = f"se_res2block.1.{kind}s.{index}.{leaf}"
    return f"layer{block[-1]}.{rest}"


def port(ours: Ecapa, peer: torch.nn.Module, names: Callable[[str], str]) -> None:
    """Copy our frame-level weights into a peer."""
    theirs = peer.state_dict()
    for name, value in ours.state_dict().items():
        if name.startswith(("block_", "mfa.")):
            target = theirs[names(name)]
            target.copy_(value.reshape(target.shape))


def load_speechbrain(ours: Ecapa) -> torch.nn.Module:
    """SpeechBrain's class with our weights."""
    cls = importlib.import_module("speechbrain.lobes.models.ECAPA_TDNN").ECAPA_TDNN
    c = ours.cfg.channels
    peer = cls(80, channels=[c, c, c, c, 3 * c], lin_neurons=192).eval()
    port(ours, peer, speechbrain_names)
    return peer


def load_wespeaker(ours: Ecapa, checkout: Path) -> torch.nn.Module:
    """WeSpeaker's class with our weights, without its package's own imports (which need more than the model does)."""
    package = types.ModuleType("wespeaker")
    package.__path__ = [str(checkout / "wespeaker")]
    sys.modules["wespeaker"] = package
    module = importlib.import_module("wespeaker.models.ecapa_tdnn")
    peer = module.ECAPA_TDNN(channels=ours.cfg.channels, feat_dim=80, embed_dim=192, pooling_func="ASTP").eval()
    port(ours, peer, wespeaker_names)
    return peer


def run_speechbrain(peer: torch.nn.Module, features: torch.Tensor, share: torch.Tensor | None) -> list[torch.Tensor]:
    """Its blocks and MFA: (batch, channels, frames) each; ``share`` : relative lengths of a padded batch."""
    x, states = features.transpose(1, 2), []
    for i, block in enumerate(peer.blocks):
        x = block(x, lengths=share) if i else block(x)
        states.append(x)
    return [*states, peer.mfa(torch.cat(states[1:], 1))]


def run_wespeaker(peer: torch.nn.Module, features: torch.Tensor) -> list[torch.Tensor]:
    """Its blocks and MFA."""
    x = features.transpose(1, 2)
    states = []
    for layer in (peer.layer1, peer.layer2, peer.layer3, peer.layer4):
        x = layer(x)
        states.append(x)
    return [*states, F.relu(peer.conv(torch.cat(states[1:], 1)))]


def gflop_per_frame(ours: Ecapa) -> float:
    """Multiplications and additions of all convolutions down to the MFA."""
    cfg = ours.cfg
    width = cfg.channels // cfg.res2_scale
    block = 2 * cfg.channels**2 + (cfg.res2_scale - 1) * 3 * width**2
    macs = cfg.n_mels * cfg.kernel_size * cfg.channels + 3 * block + 3 * cfg.channels * cfg.mfa_channels
    return 2 * macs / 1e9


class Clock:
    """Wall time of a call, with the device's queue empty before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, run: Run) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def interleaved(runs: dict[str, Run], rounds: int, clock: Clock) -> dict[str, float]:
    """Best seconds of each over ``rounds``, in turn within a round, after one round that does not count."""
    best = dict.fromkeys(runs, float("inf"))
    for i in range(rounds + 1):
        for name, run in runs.items():
            seconds = clock(run)
            if i:
                best[name] = min(best[name], seconds)
    return best


def product_runs(cfg, frames: int, device: torch.device) -> dict[str, Run]:
    """Matrix products of the network's shapes, by every way that PyTorch has: their best is "the machine's rate"."""
    runs: dict[str, Run] = {}
    for inputs, outputs in ((cfg.channels, cfg.channels), (3 * cfg.channels, cfg.mfa_channels)):
        x, w, b = torch.randn(frames, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
        x, w, b = x.to(device), w.to(device), b.to(device)
        name = f"{frames}x{inputs}x{outputs}"
        runs[f"linear {name}"] = lambda x=x, w=w, b=b: F.linear(x, w, b)
        image, kernel = x.t().contiguous()[None], w[:, :, None].contiguous()
        runs[f"conv1d {name}"] = lambda x=image, w=kernel, b=b: F.conv1d(x, w, b)
        if device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            packed = torch.ops.mkldnn._reorder_linear_weight(w, frames)
            runs[f"onednn {name}"] = lambda x=x, w=packed, b=b: torch.ops.mkldnn._linear_pointwise(
                x, w, b, "none", [], ""
            )
    return runs


def peak_memory(run: Run) -> int:
    """Bytes allocated at most during a call, beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def contenders(args: argparse.Namespace, case: str, models: dict, device: torch.device) -> tuple[dict[str, Run], dict]:
    """What to time on a case, and facts about it."""
    batches = utterances(case, args.seed, args.batches)
    runs: dict[str, Run] = {}
    frames = 0

    def per_dialect(dialect: str) -> list[Ragged]:
        frontend = Frontend(DIALECTS[dialect].frontend)
        batch = [frontend(wavs) for wavs in batches]
        return [Ragged(b.data.to(device), b.lengths) for b in batch]

    if "speechbrain" in models:
        features = per_dialect("speechbrain")
        frames = sum(len(f.data) for f in features)
        for name, model in models["speechbrain"].items():
            if name.startswith("ours"):
                runs[name] = lambda m=model, fs=features: [m(f, ("hidden_states", "mfa")) for f in fs]
                continue
            shares = [torch.tensor(f.lengths, device=device) / max(f.lengths) for f in features]
            padded = [f.pad() for f in features]
            alone = [u[None] for f in features for u in f.split()]
            runs[f"{name}, padded batch"] = lambda m=model, ps=padded, ss=shares: [
                run_speechbrain(m, p, s) for p, s in zip(ps, ss, strict=True)
            ]
            runs[f"{name}, one at a time"] = lambda m=model, us=alone: [run_speechbrain(m, u, None) for u in us]
        cpu_frontend = Frontend(DIALECTS["speechbrain"].frontend).to(device)
        wavs = [[w.to(device) for w in batch] for batch in batches]
        runs["our front-end"] = lambda f=cpu_frontend, ws=wavs: [f(w) for w in ws]
    if "wespeaker" in models:
        features = per_dialect("wespeaker")
        for name, model in models["wespeaker"].items():
            if name.startswith("ours"):
                runs[name] = lambda m=model, fs=features: [m(f, ("hidden_states", "mfa")) for f in fs]
                continue
            padded = [f.pad() for f in features]
            alone = [u[None] for f in features for u in f.split()]
            runs[f"{name}, padded batch"] = lambda m=model, ps=padded: [run_wespeaker(m, p) for p in ps]
            runs[f"{name}, one at a time"] = lambda m=model, us=alone: [run_wespeaker(m, u) for u in us]
    seconds = sum(len(w) for b in batches for w in b) / 16000
    return runs, {"audio_seconds": seconds, "frames": frames, "lengths": [[len(w) for w in b] for b in batches]}


def build(args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, torch.nn.Module]]:
    """Models by dialect: ours in float32 and bf16, and the peers that are there."""
    torch.manual_seed(args.seed)
    found: dict[str, dict[str, torch.nn.Module]] = {}
    for dialect in ("speechbrain", "wespeaker"):
        if dialect == "wespeaker" and not args.wespeaker:
            continue
        widths = {"channels": args.channels}
        if dialect == "speechbrain":
            widths["mfa_channels"] = 3 * args.channels
        cfg = DIALECTS[dialect].ecapa_config(**widths)
        ours = Ecapa(cfg).eval()
        randomise(ours, args.seed)
        half = Ecapa(cfg, dtype="bf16").eval()
        half.load_state_dict(ours.state_dict())
        tag = "" if dialect == "speechbrain" else " (WeSpeaker's shape)"
        found[dialect] = {f"ours{tag}": ours, f"ours bf16{tag}": half}
        with contextlib.suppress(ImportError):
            if dialect == "speechbrain" and not args.no_speechbrain:
                found[dialect]["SpeechBrain"] = load_speechbrain(ours)
        if dialect == "wespeaker":
            found[dialect]["WeSpeaker"] = load_wespeaker(ours, args.wespeaker)
    return {d: {n: m.to(device) for n, m in models.items()} for d, models in found.items()}


def deviations(models: dict, device: torch.device) -> dict[str, float]:
    """max |difference| / max |ours| of the MFA on one 3 s utterance, against ours in float32."""
    found = {}
    for dialect, members in models.items():
        frontend = Frontend(DIALECTS[dialect].frontend)
        features = frontend([0.05 * torch.randn(48000, generator=torch.Generator().manual_seed(1))])
        features = Ragged(features.data.to(device), features.lengths)
        reference = None
        for name, model in members.items():
            if name.startswith("ours"):
                got = model(features, ("mfa",))["mfa"].data
            elif dialect == "speechbrain":
                got = run_speechbrain(model, features.data[None], None)[-1][0].t()
            else:
                got = run_wespeaker(model, features.data[None])[-1][0].t()
            reference = got if reference is None else reference
            found[name] = ((got - reference).abs().max() / reference.abs().max()).item()
    return found


def tables(result: dict) -> list[dict]:
    """The measurements as tables of the results page."""
    found = []
    for case in result["cases"]:
        rate = case["gflops"]
        rows = []
        for name, seconds in case["seconds"].items():
            base = case["seconds"].get("ours (WeSpeaker's shape)" if "WeSpeaker" in name else "ours")
            work = case["gflop"] / seconds if name in ("ours", "SpeechBrain, one at a time") else None
            rows.append(
                [
                    name,
                    seconds,
                    round(case["audio_seconds"] / seconds),
                    f"{seconds / base:.2f}" if base and not name.startswith("our") else "",
                    f"{100 * work / rate:.0f} %" if work else "",
                    round(case["memory"][name] / 1e6) if name in case["memory"] else "",
                ]
            )
        title = f"{case['case']}, {case['threads']} thread(s), {case['audio_seconds']:.0f} s of speech"
        columns = ["contender", "seconds", "x real time", "ours is faster by", f"of {rate:.0f} GFLOP/s", "peak MB"]
        found.append({"title": title, "columns": columns, "rows": rows})
    deviations = [[name, value] for name, value in result["deviation"].items() if name != "ours"]
    title = "max |difference| / max |value| of the MFA against ours in float32"
    return [*found, {"title": title, "columns": ["contender", "deviation"], "rows": deviations}]


def summary(result: dict) -> list[list[object]]:
    """The rows for the top of the results page."""
    rows: list[list[object]] = []
    aims = {"ragged": "2.5x", "equal": "1.1x"}
    for case in result["cases"]:
        where = f"{case['case']}, {case['threads']} thread(s)"
        for peer, ours in (("SpeechBrain", "ours"), ("WeSpeaker", "ours (WeSpeaker's shape)")):
            times = case["seconds"]
            if f"{peer}, padded batch" in times:
                padded = times[f"{peer}, padded batch"] / times[ours]
                alone = times[f"{peer}, one at a time"] / times[ours]
                rows.append(
                    [f"encoder over {peer}'s padded batch, {where}", f"{padded:.2f}x", aims.get(case["case"], "")]
                )
                rows.append([f"encoder over {peer} one at a time, {where}", f"{alone:.2f}x", "1.3x"])
        if "ours" in times:
            rows.append([f"encoder, bf16 over float32, {where}", f"{times['ours'] / times['ours bf16']:.2f}x", "1.7x"])
            share = f"{100 * case['gflop'] / times['ours'] / case['gflops']:.0f} %"
            rows.append([f"encoder, share of the matrix-product rate, {where}", share, "80 %"])
    return rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("--cases", nargs="+", default=["ragged", "equal"], choices=["ragged", "equal", "short"])
    add("--threads", nargs="+", type=int, default=[1, 2], help="thread counts to run one after the other")
    add("--channels", type=int, default=1024, help="width C of the blocks (default %(default)s)")
    add("--rounds", type=int, default=3, help="rounds that count; the best is taken (default %(default)s)")
    add("--batches", type=int, default=2, help="batches in the ragged and short cases (default %(default)s)")
    add("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda (adds peak memory)")
    add("--wespeaker", type=Path, help="path of a WeSpeaker checkout, to compare with its class")
    add("--no-speechbrain", action="store_true", help="leave SpeechBrain out although it is installed")
    add("--seed", type=int, default=0, help="of weights and utterances (default %(default)s)")
    add_output(parser, "encoder.speed")
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict:
    """Run the benchmark; returns what is written as JSON."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    models = build(args, args.device)
    result = {
        "command": "recipes/benchmark/ecapa.py " + " ".join(sys.argv[1:] if argv is None else argv),
        "torch": torch.__version__,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else "cpu",
        "deviation": deviations(models, args.device),
        "cases": [],
    }
    clock = Clock(args.device)
    ours = models["speechbrain"]["ours"]
    for threads in args.threads if args.device.type == "cpu" else args.threads[:1]:
        torch.set_num_threads(threads)
        for case in args.cases:
            runs, facts = contenders(args, case, models, args.device)
            products = product_runs(ours.cfg, 1536, args.device)
            logger.info("%s, %d thread(s): %d contenders, %d rounds", case, threads, len(runs), args.rounds)
            seconds = interleaved(runs, args.rounds, clock)
            rates = {}
            # Single products are short: more rounds, so that their best is as undisturbed as that of the long runs.
            for name, best in interleaved(products, 4 * args.rounds, clock).items():
                m, k, n = (int(x) for x in name.split()[1].split("x"))
                rates[name] = 2 * m * k * n / 1e9 / best
            memory = {n: peak_memory(r) for n, r in runs.items()} if args.device.type == "cuda" else {}
            result["cases"].append(
                {
                    "case": case,
                    "threads": threads,
                    **facts,
                    "gflop": facts["frames"] * gflop_per_frame(ours),
                    "seconds": seconds,
                    "products_gflops": rates,
                    "gflops": max(rates.values()),
                    "memory": memory,
                }
            )
    write_result(
        args.out,
        title=f"Encoder, C={args.channels}: time to hidden states and MFA",
        about="From features through the four blocks and the MFA, random weights shared by all contenders, in turn "
        "within each round of one process; the best of the rounds. The rate is of the fastest large float32 matrix "
        "product in the same run.",
        tables=tables(result),
        summary=summary(result),
        data=result,
    )
    return result


if __name__ == "__main__":
    main()
