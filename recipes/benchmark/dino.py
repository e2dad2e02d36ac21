#!/usr/bin/env python3
"""One DINO step on CPU beside WeSpeaker's: same weights, same crops, same losses; where the time goes.

    python recipes/benchmark/dino.py --peer PATH/TO/wespeaker [--threads 1] [--rounds 5]

A step is everything between two batches of log-mel features: teacher and student passes over 2 x 3 s and 4 x 2 s crops,
head with 65,536 prototypes, loss, backward pass, clipping, SGD, teacher update; C=512, batch 4. WeSpeaker's step is
what its ssl/utils/dino_executor.py does, without loss scaling (which does nothing on CPU). The two take turns within a
round, so that a machine that slows down slows both; reported is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from results import add_output, write_result
from torch import Tensor, nn

from s3prl_speaker_upstreams.checkpoints import read_checkpoint
from s3prl_speaker_upstreams.ecapa import Ecapa
from s3prl_speaker_upstreams.pretrain.config import DinoConfig
from s3prl_speaker_upstreams.pretrain.dino import Dino, cross_view_loss
from s3prl_speaker_upstreams.pretrain.objective import CropEncoder, parameter_groups
from s3prl_speaker_upstreams.pretrain.trainer import clip_gradients

LR, MOMENTUM, CLIP, EMA = 0.05, 0.9, 3.0, 0.996


def peer_modules(checkout: Path) -> tuple[Any, Any, Any]:
    """WeSpeaker's network, DINO wrapper and helpers; its package's own ``__init__`` wants packages not needed here."""
    if not (checkout / "wespeaker" / "ssl").is_dir():
        sys.exit(f"{checkout}: no wespeaker/ssl there; expected a checkout of github.com/wenet-e2e/wespeaker")
    sys.path.insert(0, str(checkout))
    for name in ("wespeaker", "wespeaker.models", "wespeaker.ssl", "wespeaker.ssl.models", "wespeaker.ssl.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = package
    sys.modules["wespeaker"].models = sys.modules["wespeaker.models"]
    import wespeaker.models.pooling_layers as pooling

    sys.modules["wespeaker.models"].pooling_layers = pooling
    from wespeaker.models import ecapa_tdnn
    from wespeaker.ssl.models import dino_wrapper
    from wespeaker.ssl.utils import dino_utils

    return ecapa_tdnn, dino_wrapper, dino_utils


def peer_step(args: argparse.Namespace) -> tuple[nn.Module, Callable[[Tensor, Tensor], float]]:
    """WeSpeaker's model and its step: global and local features to loss."""
    ecapa_tdnn, wrapper, utils = peer_modules(Path(args.peer))
    if not dist.is_initialized():  # its centre is all-reduced in any case
        store = tempfile.NamedTemporaryFile(delete=False)
        dist.init_process_group("gloo", init_method=f"file://{store.name}.meet", rank=0, world_size=1)
    base = ecapa_tdnn.ECAPA_TDNN(args.channels, 80, 192, "ASTP", global_context_att=True, emb_bn=True)
    head = {"in_dim": 192, "out_dim": args.prototypes, "use_bn": True, "norm_last_layer": True, "nlayers": 3}
    loss = {"out_dim": args.prototypes, "n_scrops": 6, "n_tcrops": 2, "warmup_teacher_temp": 0.04, "teacher_temp": 0.04}
    model = wrapper.DINO(base, head, {**loss, "nepochs": 150}, sync_bn=False).train()
    optimizer = torch.optim.SGD(utils.get_params_groups(model), lr=LR, momentum=MOMENTUM, weight_decay=5e-5)
    optimizer.param_groups[1]["weight_decay"] = 0.0

    def step(long: Tensor, short: Tensor) -> float:
        value = model(short, long, 0)
        out = value.item()
        optimizer.zero_grad()
        value.backward()
        utils.clip_gradients(model, CLIP)
        optimizer.step()
        model.ema_update(EMA)
        return out

    return model, step


def our_step(
    peer: nn.Module, args: argparse.Namespace, precision: str, clock: dict[str, float] | None = None
) -> tuple[Dino, Callable[[Tensor, Tensor], float]]:
    """Our model with the peer's initial weights and its step; ``clock`` collects seconds per part."""
    with tempfile.TemporaryDirectory() as folder:
        state = {k: v for k, v in peer.t_model.state_dict().items() if not k.startswith("projection_head")}
        torch.save(state, Path(folder) / "avg_model.pt")
        checkpoint = read_checkpoint(Path(folder) / "avg_model.pt", format="wespeaker")
    encoder = Ecapa(checkpoint.ecapa)
    encoder.load_state_dict(checkpoint.state)
    config = DinoConfig(momentum=EMA, prototypes=args.prototypes, teacher_temp=0.04, warmup_teacher_temp=0.04)
    dino = Dino(CropEncoder(encoder, precision), 192, config)
    head = peer.s_model.projection_head
    for ours in (dino.student.head, dino.teacher.head):
        ours.mlp.load_state_dict(head.mlp.state_dict())
        ours.last_layer.weight.data.copy_(head.last_layer.weight_v.data)
    dino.train()
    groups = parameter_groups(dino)
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM)
    for group in optimizer.param_groups:
        group["weight_decay"] = 5e-5 if group["decay"] else 0.0
    parameters = [p for g in groups for p in g["params"]]

    def step(long: Tensor, short: Tensor) -> float:
        loss = dino([long, short], views=(2, 4))
        out = loss.item()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_gradients(parameters, CLIP, "per_parameter")
        optimizer.step()
        dino.after_step()
        return out

    def timed_step(long: Tensor, short: Tensor) -> float:
        """The same step taken apart: the pass through the head is cut from the encoder's graph to time them apart."""
        marks = [("", time.perf_counter())]

        def mark(name: str) -> None:
            marks.append((name, time.perf_counter()))

        with torch.no_grad():
            teacher = dino.teacher.encoder(long)
            mark("teacher encoder")
            logits = dino.teacher.head(teacher)
            mark("teacher head")
        embeddings = torch.cat([dino.student.encoder(long), dino.student.encoder(short)])
        mark("student encoder, forward")
        cut = embeddings.detach().requires_grad_()
        student = dino.student.head(cut).view(6, -1, args.prototypes)
        mark("student head, forward")
        targets = dino._targets(logits)
        loss = cross_view_loss(student, targets.view(2, -1, args.prototypes), 0.1)
        dino.watch.see(teacher, targets)
        mark("targets, loss, metrics")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        mark("loss and head, backward")
        embeddings.backward(cut.grad)
        mark("student encoder, backward")
        clip_gradients(parameters, CLIP, "per_parameter")
        mark("clipping")
        optimizer.step()
        mark("optimizer")
        dino.after_step()
        mark("teacher update")
        for (_, before), (name, after) in zip(marks, marks[1:], strict=False):
            clock[name] = clock.get(name, 0.0) + after - before
        return loss.item()

    return dino, step if clock is None else timed_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="checkout of github.com/wenet-e2e/wespeaker")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--loss-steps", type=int, default=2, help="steps whose losses are compared")
    add_output(parser, "dino.step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    long, short = torch.randn(2 * args.batch, 300, 80), torch.randn(4 * args.batch, 200, 80)
    long, short = (x - x.mean(1, keepdim=True) for x in (long, short))

    peer, step = peer_step(args)
    steps = {"peer": step}
    ours = {p: our_step(peer, args, p) for p in ("fp32", "bf16")}
    clock: dict[str, dict[str, float]] = {"fp32": {}, "bf16": {}}
    parts = {p: our_step(peer, args, p, clock[p]) for p in ("fp32", "bf16")}
    steps.update({name: pair[1] for name, pair in ours.items()})
    losses = {name: [run(long, short) for _ in range(args.loss_steps)] for name, run in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, run in steps.items():
            start = time.perf_counter()
            run(long, short)
            seconds[name].append(time.perf_counter() - start)
    for precision in clock:
        parts[precision][1](long, short)  # first use allocates
        clock[precision].clear()
        parts[precision][1](long, short)
    result = {
        "torch": str(torch.__version__),
        "threads": args.threads,
        "batch": args.batch,
        "channels": args.channels,
        "prototypes": args.prototypes,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "all_seconds": seconds,
        "speedup": {
            name: statistics.median(a / b for a, b in zip(seconds["peer"], seconds[name], strict=True)) for name in ours
        },
        "losses": losses,
        "largest_loss_difference": {
            name: max(abs(a - b) for a, b in zip(losses["peer"], losses[name], strict=True)) for name in ours
        },
        "breakdown_seconds": clock,
    }
    speeds = [["WeSpeaker", result["seconds"]["peer"], "", ""]]
    for name in ours:
        gap = result["largest_loss_difference"][name]
        speeds.append([f"ours, {name}", result["seconds"][name], result["speedup"][name], gap])
    breakdown = [
        [precision, part, value, f"{100 * value / sum(table.values()):.0f} %"]
        for precision, table in result["breakdown_seconds"].items()
        for part, value in table.items()
    ]
    write_result(
        args.out,
        title=f"A DINO step beside WeSpeaker's: batch {args.batch}, C={args.channels}, {args.prototypes} prototypes",
        about='Same weights, crops and settings, in turn within each round; seconds are medians, "times as fast" the '
        f"median of the rounds' ratios, losses those of {args.loss_steps} steps.",
        tables=[
            {"title": "", "columns": ["step", "seconds", "times as fast", "losses within"], "rows": speeds},
            {"title": "Where the time goes", "columns": ["precision", "part", "seconds", "share"], "rows": breakdown},
        ],
        summary=[
            [f"DINO step over WeSpeaker's, {name}", f"{result['speedup'][name]:.2f}x", aim]
            for name, aim in (("fp32", "1.35x"), ("bf16", "2.5x"))
        ],
        data=result,
    )


if __name__ == "__main__":
    main()
