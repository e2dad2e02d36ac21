"""Correctness and speed on a GPU; see gpu.sh, which starts this. ``--tiny --device cpu`` runs every part small."""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib
import importlib.util
import logging
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ecapa as encoder_benchmark
import numpy as np
import torch
from results import ROOT, add_output, write_result
from torch import Tensor, nn

from cka_addon.estimators import Pairs, Reference, cka_from_hsic
from cka_addon.hsic import BatchHsic
from s3prl_speaker_upstreams.checkpoints import load_encoder
from s3prl_speaker_upstreams.ecapa import DIALECTS, Ecapa, Frontend, Ragged, SpeakerEncoder
from s3prl_speaker_upstreams.pretrain.aam import AamSoftmax
from s3prl_speaker_upstreams.pretrain.config import DinoConfig
from s3prl_speaker_upstreams.pretrain.dino import Dino
from s3prl_speaker_upstreams.pretrain.objective import parameter_groups

BUDGET = 520.0  # seconds for all parts; a part that would begin later is skipped by name


@dataclass
class Bench:
    """What the parts share, and what they found."""

    device: torch.device
    tiny: bool
    seed: int
    checks: list[list[object]] = field(default_factory=list)  # what, figure, limit, held
    speeds: list[list[object]] = field(default_factory=list)  # part, what, seconds, rate, unit, share, peak MB
    skipped: list[list[object]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def check(self, what: str, error: float, limit: float) -> None:
        self.checks.append([what, error, limit, bool(error <= limit)])

    def time(self, run: Callable[[], object], rounds: int = 5) -> float:
        """Median seconds of a call, the queue empty before and after; one call first that does not count."""
        clock = encoder_benchmark.Clock(self.device)
        clock(run)
        return statistics.median(clock(run) for _ in range(1 if self.tiny else rounds))

    def peak(self, run: Callable[[], object]) -> float | str:
        """Megabytes that a call allocates at most beyond what is there; empty on CPU."""
        return round(encoder_benchmark.peak_memory(run) / 1e6) if self.device.type == "cuda" else ""

    def speed(self, part: str, what: str, seconds: float, rate: float, unit: str, share: str = "", peak: object = ""):
        self.speeds.append([part, what, seconds, rate, unit, share, peak])


def relative(found: Tensor, wanted: Tensor) -> float:
    """max |difference| / max |wanted|"""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Products of float32 matrices and convolutions in TF32, or not."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def noise(bench: Bench, *seconds: float, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.05 * torch.randn(int(16000 * s), generator=generator).to(bench.device) for s in seconds]


# --- correctness ---------------------------------------------------------------------------------------------------


def goldens(bench: Bench) -> None:
    """The original implementations' activations that travel with the tests."""
    data = ROOT / "tests" / "checkpoints" / "data"
    outputs = ("hidden_states", "mfa", "pooled", "embedding")
    for path in sorted(data.glob("*.golden.pt")):
        name = path.name.partition(".")[0]
        (source,) = [p for p in data.glob(f"{name}.*") if p != path]
        encoder = load_encoder(source, format=name).to(bench.device).eval()
        worst: dict[str, float] = {}
        for case in torch.load(path, weights_only=True)["cases"]:
            features = case.get("features")
            with torch.no_grad(), tf32(False):
                wav = (case["wave_int16"].float() / 32768).to(bench.device)
                if features is None:
                    features = encoder([wav], outputs=("fbank",))["fbank"].data
                out = encoder.ecapa(Ragged(features.to(bench.device), [len(features)]), outputs=outputs)
            found = {f"block{i}": block.data.T for i, block in enumerate(out["hidden_states"])}
            found |= {"mfa": out["mfa"].data.T, "pooled": out["pooled"][0], "embedding": out["embedding"][0]}
            for key in found.keys() & case.keys():
                worst[key] = max(worst.get(key, 0.0), relative(found[key], case[key]))
        bench.check(f"{name}'s own activations, blocks to embedding", max(worst.values()), 1e-5)


def exact_batches(bench: Bench) -> None:
    """Every utterance alone and in a batch, from the waveform."""
    lengths = (0.11, 0.4, 0.63) if bench.tiny else (0.02, 0.3, 1.0, 2.7, 9.1, 14.9)
    width = {"channels": 32, "mfa_channels": 96} if bench.tiny else {"channels": 512}
    for dialect in ("speechbrain", "wespeaker"):
        for dtype, limit in (("float32", 1e-5), ("bf16", 1e-2)):
            torch.manual_seed(bench.seed)
            config = DIALECTS[dialect].ecapa_config(**width)
            encoder = SpeakerEncoder(
                config, DIALECTS[dialect].frontend, **({"dtype": dtype} if dtype == "bf16" else {})
            )
            encoder_benchmark.randomise(encoder, bench.seed)
            encoder = encoder.to(bench.device).eval()
            wavs = noise(bench, *lengths)
            names = ("hidden_states", "mfa", "embedding")
            with torch.no_grad(), tf32(False):
                together = encoder(wavs, outputs=names)
                states = [h.split() for h in (*together["hidden_states"], together["mfa"])]
                worst = 0.0
                for i, wav in enumerate(wavs):
                    alone = encoder([wav], outputs=names)
                    for batch, one in zip(states, (*alone["hidden_states"], alone["mfa"]), strict=True):
                        worst = max(worst, relative(batch[i], one.data))
                    worst = max(worst, relative(together["embedding"][i], alone["embedding"][0]))
            bench.check(f"alone and in a batch, {dialect}, {dtype}", worst, limit)


class Crops(nn.Module):
    """Equally long crops' features (rows, frames, mels) to embeddings, by autocast where asked for."""

    def __init__(self, ecapa: Ecapa, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.ecapa, self.dtype = ecapa, dtype

    def forward(self, features: Tensor) -> Tensor:
        rows, frames, mels = features.shape
        ragged = Ragged(features.reshape(-1, mels), [frames] * rows)
        with torch.autocast(features.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            return self.ecapa(ragged, outputs=("embedding",))["embedding"].float()


def dino_model(bench: Bench, channels: int, prototypes: int, dtype: torch.dtype | None = None) -> Dino:
    torch.manual_seed(bench.seed)
    config = DIALECTS["wespeaker"].ecapa_config(channels=channels, mfa_channels=3 * channels)
    hidden = {} if prototypes > 4096 else {"head_hidden": 64, "bottleneck": 16}
    settings = DinoConfig(prototypes=prototypes, **hidden)
    return Dino(Crops(Ecapa(config), dtype), config.embedding_dim, settings).train()


def crops(bench: Bench, batch: int, long: int, short: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(bench.seed)
    shapes = ((2 * batch, long, 80), (4 * batch, short, 80))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def dino_update(dino: Dino, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> Tensor:
    loss = dino(batches, views=(2, 4))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 3.0)
    optimizer.step()
    dino.momentum = 0.99
    dino.after_step()
    return loss.detach()


def training_step(bench: Bench) -> None:
    """One DINO and one AAM step, on the CPU and on the device: loss and gradients."""
    channels, frames = (16, (40, 30)) if bench.tiny else (64, (200, 120))
    results = []
    for device in (torch.device("cpu"), bench.device):
        dino = dino_model(bench, channels, 256).to(device)
        with tf32(False):
            loss = dino([x.to(device) for x in crops(bench, 4, *frames)], views=(2, 4))
            loss.backward()
        gradients = torch.cat([p.grad.flatten().cpu() for p in dino.parameters() if p.grad is not None])
        results.append((loss.detach(), gradients))
    bench.check("DINO loss, CPU against device", relative(results[1][0], results[0][0]), 1e-4)
    difference = (results[1][1] - results[0][1]).norm() / results[0][1].norm()
    bench.check("DINO gradient (norm of the difference), CPU against device", float(difference), 1e-3)
    results = []
    for device in (torch.device("cpu"), bench.device):
        torch.manual_seed(bench.seed)
        head = AamSoftmax(64, 50).to(device)
        embeddings = torch.randn(16, 64, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
        with tf32(False):
            loss, _ = head(embeddings, torch.arange(16, device=device))
            loss.backward()
        results.append((loss, embeddings.grad))
    bench.check("AAM loss, CPU against device", relative(results[1][0], results[0][0]), 1e-5)
    bench.check("AAM gradient, CPU against device", relative(results[1][1], results[0][1]), 1e-4)


def resumed(bench: Bench) -> None:
    """Four DINO steps at once, and two, a checkpoint in a file, two more: the same bits, deterministic algorithms."""
    batches = [x.to(bench.device) for x in crops(bench, 4, 60, 40)]

    def fresh() -> tuple[Dino, torch.optim.Optimizer]:
        dino = dino_model(bench, 32, 256).to(bench.device)
        return dino, torch.optim.SGD(parameter_groups(dino), lr=0.05, momentum=0.9)

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        dino, optimizer = fresh()
        for step in range(4):
            if step == 2:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "state.pt"
                    torch.save({"model": dino.state_dict(), "optimizer": optimizer.state_dict()}, path)
                    saved = torch.load(path, map_location=bench.device, weights_only=True)
            dino_update(dino, optimizer, batches)
        again, optimizer = fresh()
        again.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        for _ in range(2):
            dino_update(again, optimizer, batches)
    finally:
        torch.use_deterministic_algorithms(before)
    pairs = zip(dino.state_dict().items(), again.state_dict().values(), strict=True)
    different = sum(not torch.equal(a, b) for (_, a), b in pairs)
    bench.check("resumed training, tensors with other bits than uninterrupted", float(different), 0.0)


def resumed_trainer(bench: Bench) -> None:
    """The trainer itself: a run stopped half way and gone on with, against one that was not."""
    soundfile = importlib.import_module("soundfile")
    importlib.import_module("tqdm")
    assemble = importlib.import_module("s3prl_speaker_upstreams.pretrain.assemble")
    load = importlib.import_module("s3prl_speaker_upstreams.pretrain.config").load
    with tempfile.TemporaryDirectory() as folder:
        speech = Path(folder) / "speech"
        for i in range(12):
            (speech / f"s{i % 4}").mkdir(parents=True, exist_ok=True)
            wav = np.random.default_rng(i).normal(0, 0.1, 20000)
            soundfile.write(speech / f"s{i % 4}" / f"{i}.wav", wav, 16000)
        overrides = [
            f"data.train=[{speech}]",
            "run.steps=6",
            "run.tensorboard=false",
            f"run.device={bench.device.type}",
        ]
        config = load("smoke", overrides=overrides)
        torch.use_deterministic_algorithms(True)
        states = []
        try:
            for stops in ((None,), (3, None)):
                out = Path(folder) / f"run{len(stops)}"
                for stop in stops:
                    trainer = assemble.build_trainer(copy.deepcopy(config), out)
                    trainer.run(stop_after=stop)
                    trainer.loader.close()
                states.append(trainer.objective.state_dict())
        finally:
            torch.use_deterministic_algorithms(False)
    different = sum(not torch.equal(states[0][k], states[1][k]) for k in states[0])
    bench.check("resumed run of the trainer, tensors with other bits", float(different), 0.0)


def cka_values(bench: Bench) -> None:
    """CKA values against the definition in float64, by common mean of the features."""
    n, d = (48, 16) if bench.tiny else (256, 256)
    for mean in (0.0, 10.0, 50.0):
        generator = torch.Generator().manual_seed(bench.seed)
        base = torch.randn(n, 8, generator=generator)
        layers = [
            base @ torch.randn(8, d, generator=generator) / 3 + torch.randn(n, d, generator=generator) + mean
            for _ in range(4)
        ]
        for form in ("gram", "stream"):
            engine = BatchHsic([d] * 4, Pairs((4,)), form=form)
            with tf32(False):
                found = cka_from_hsic(engine([x.to(bench.device) for x in layers]), names=list("abcd"))
            wanted = np.array([[Reference.cka(x.double().numpy(), y.double().numpy()) for y in layers] for x in layers])
            bench.check(
                f"CKA values, {form} form, mean {mean:g}", float(np.abs(np.asarray(found) - wanted).max()), 1e-4
            )


# --- speed ---------------------------------------------------------------------------------------------------------


def matrix_rates(bench: Bench) -> dict[str, float]:
    """GFLOP/s of one large product in each precision: what shares are of."""
    n = 256 if bench.tiny else 8192 if bench.device.type == "cuda" else 1024
    rates = {}
    for name, dtype, allowed in (
        ("float32", torch.float32, False),
        ("TF32", torch.float32, True),
        ("bf16", torch.bfloat16, True),
    ):
        if name == "TF32" and bench.device.type != "cuda":
            continue
        a = torch.randn(n, n, device=bench.device, dtype=dtype)
        out = torch.empty_like(a)
        with tf32(allowed):
            rates[name] = 2 * n**3 / 1e9 / bench.time(lambda a=a, out=out: torch.mm(a, a, out=out), 10)
    return rates


def encoder_speed(bench: Bench) -> None:
    """Hidden states and MFA, C=1024: ours in each precision, against a padded batch of ours and SpeechBrain's class."""
    channels = 32 if bench.tiny else 1024
    torch.manual_seed(bench.seed)
    config = DIALECTS["speechbrain"].ecapa_config(channels=channels, mfa_channels=3 * channels)
    model = Ecapa(config).eval()
    encoder_benchmark.randomise(model, bench.seed)
    half = Ecapa(config, dtype="bf16").eval()
    half.load_state_dict(model.state_dict())
    model, half = model.to(bench.device), half.to(bench.device)
    speechbrain = None
    with contextlib.suppress(ImportError):
        speechbrain = encoder_benchmark.load_speechbrain(model.cpu()).to(bench.device)
    model = model.to(bench.device)
    if speechbrain is None:
        bench.skipped.append(["encoder against SpeechBrain's class", "speechbrain is not installed"])
    rates = matrix_rates(bench)
    for name, rate in rates.items():
        bench.speed("matrix product", name, 0.0, rate, "GFLOP/s")
    frontend = Frontend(DIALECTS["speechbrain"].frontend).to(bench.device)
    draw = np.random.default_rng(bench.seed)
    names = ("hidden_states", "mfa")
    for case, lengths in {
        "ragged, 32 of 1 to 15 s": draw.uniform(1, 15, 32),
        "equal, 64 of 4 s": np.full(64, 4.0),
    }.items():
        lengths = lengths[:3] / 10 if bench.tiny else lengths
        wavs = noise(bench, *lengths)
        seconds = float(sum(lengths))
        with torch.no_grad():
            features = frontend(wavs)
            taken = bench.time(lambda w=wavs: frontend(w))
            bench.speed(
                case, "front-end", taken, seconds / taken, "s of audio / s", "", bench.peak(lambda w=wavs: frontend(w))
            )
            frames = max(features.lengths)
            padded = Ragged(features.pad().reshape(-1, 80), [frames] * len(wavs))
            work = len(features.data) * encoder_benchmark.gflop_per_frame(model)

            def measure(what, run, precision, useful=work, case=case, seconds=seconds):
                with tf32(precision != "float32"):
                    try:
                        taken = bench.time(run)
                        peak = bench.peak(run)
                    except Exception as error:  # a compiler that is not there is no reason to lose the rest
                        bench.skipped.append([f"{case}, {what}", f"{type(error).__name__}: {str(error)[:100]}"])
                        return
                rate = rates.get(precision, 0.0)
                share = f"{100 * useful / taken / rate:.0f} %" if rate else ""
                bench.speed(case, what, taken, seconds / taken, "s of audio / s", share, peak)

            for precision, network in (("float32", model), ("TF32", model), ("bf16", half)):
                if precision in rates:
                    measure(f"ours, {precision}", lambda m=network, f=features: m(f, names), precision)
                    measure(
                        f"ours on the padded batch, {precision}", lambda m=network, f=padded: m(f, names), precision
                    )
            if bench.device.type == "cuda":
                for mode in ("default", "reduce-overhead"):
                    compiled = torch.compile(half, mode=mode)
                    note = "torch.compile" + (" with CUDA graphs" if mode != "default" else "")
                    measure(f"ours, bf16, {note}", lambda m=compiled, f=features: m(f, names), "bf16")
            if speechbrain is not None:
                share = torch.tensor(features.lengths, device=bench.device) / frames
                batch = features.pad()
                for precision in ("float32", "TF32", "bf16"):
                    if precision not in rates:
                        continue

                    def run(p=precision, b=batch, s=share):
                        with torch.autocast(bench.device.type, dtype=torch.bfloat16, enabled=p == "bf16"):
                            return encoder_benchmark.run_speechbrain(speechbrain, b, s)

                    measure(f"SpeechBrain, padded batch, {precision}", run, precision)


def cka_speed(bench: Bench) -> None:
    """The CKA kernel on one minibatch against pytorch-cka's."""
    spec = importlib.util.spec_from_file_location("cka_benchmark", Path(__file__).with_name("cka.py"))
    kernel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    for name in kernel.WORKLOADS:
        xs, ys = kernel.tensors(name)
        if bench.tiny:
            xs, ys = [x[:64, :32] for x in xs[:3]], [y[:64, :32] for y in ys[:3]]
        xs, ys = [x.contiguous().to(bench.device) for x in xs], [y.contiguous().to(bench.device) for y in ys]
        runs = kernel.build(kernel.FAST, xs, ys)
        if len(runs) == 1:
            bench.skipped.append([f"CKA kernel against pytorch-cka, {name}", "pytorch-cka is not installed"])
        with torch.no_grad(), tf32(False):
            times = {library: bench.time(run) for library, run in runs.items()}
        for library, taken in times.items():
            share = f"{times[library] / times['ours']:.2f}x ours" if library != "ours" else ""
            bench.speed("CKA minibatch", f"{name}, {library}", taken, 1 / taken, "minibatches / s", share)


def training_speed(bench: Bench) -> None:
    """DINO and AAM steps at published sizes, from features."""
    channels, prototypes, batch, long, short = (16, 256, 2, 30, 20) if bench.tiny else (512, 65536, 64, 300, 200)
    classes, frames = (20, 30) if bench.tiny else (17982, 200)
    for name, dtype in (("float32", None), ("TF32", None), ("bf16", torch.bfloat16)):
        if name == "TF32" and bench.device.type != "cuda":
            continue
        with tf32(name != "float32"):
            dino = dino_model(bench, channels, prototypes, dtype).to(bench.device)
            optimizer = torch.optim.SGD(parameter_groups(dino), lr=0.05, momentum=0.9)
            inputs = [x.to(bench.device) for x in crops(bench, batch, long, short)]

            def step(d=dino, o=optimizer, x=inputs):
                return dino_update(d, o, x)

            taken = bench.time(step)
            what = f"DINO, C={channels}, {prototypes} prototypes, batch {batch}, {name}"
            bench.speed("training step", what, taken, batch / taken, "utterances / s", "", bench.peak(step))
            del dino, optimizer, inputs, step
            torch.manual_seed(bench.seed)
            config = DIALECTS["wespeaker"].ecapa_config(channels=channels, mfa_channels=3 * channels)
            encoder = Crops(Ecapa(config).train(), dtype).to(bench.device)
            head = AamSoftmax(config.embedding_dim, classes).to(bench.device)
            parameters = [*encoder.parameters(), *head.parameters()]
            optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
            features = torch.randn(2 * batch, frames, 80, device=bench.device)
            labels = torch.randint(classes, (2 * batch,), device=bench.device)

            def aam_step(e=encoder, h=head, o=optimizer, x=features, y=labels):
                loss, _ = h(e(x), y)
                o.zero_grad(set_to_none=True)
                loss.backward()
                o.step()

            taken = bench.time(aam_step)
            what = f"AAM, C={channels}, {classes} speakers, batch {2 * batch}, {name}"
            bench.speed("training step", what, taken, 2 * batch / taken, "utterances / s", "", bench.peak(aam_step))
            del encoder, head, parameters, optimizer, features, labels, aam_step
            gc.collect()
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()


PARTS: dict[str, tuple[Callable[[Bench], None], ...]] = {
    "correctness": (goldens, exact_batches, training_step, resumed, resumed_trainer, cka_values),
    "speed": (encoder_speed, cka_speed, training_speed),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu.sh", description="Correctness and speed on a GPU.")
    single = [part.__name__ for parts in PARTS.values() for part in parts]
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=[*PARTS, *single], metavar="PART")
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    parser.add_argument("--device", type=torch.device, help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: the way, not the figures")
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser, "gpu.tiny")
    args = parser.parse_args(argv)
    if args.list:
        for half, parts in PARTS.items():
            sys.stdout.write("".join(f"{half}: {part.__name__}: {part.__doc__}\n" for part in parts))
        return 0
    device = args.device or torch.device("cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU; --tiny --device cpu runs the same parts small")
    logging.disable(logging.INFO)
    bench = Bench(device, args.tiny, args.seed)
    chosen = [p for half, parts in PARTS.items() for p in parts if {half, p.__name__} & set(args.parts)]
    start = time.monotonic()
    for part in chosen:
        began = time.monotonic()
        if began - start > BUDGET:
            bench.skipped.append([part.__name__, f"{BUDGET:.0f} s were over"])
            continue
        try:
            part(bench)
        except ModuleNotFoundError as error:
            bench.skipped.append([part.__name__, f"needs {error.name}"])
        except Exception as error:  # the other parts still tell something
            sys.stderr.write(traceback.format_exc())
            bench.checks.append([f"{part.__name__} runs", f"{type(error).__name__}: {error}", "no error", False])
        bench.seconds[part.__name__] = time.monotonic() - began
        sys.stderr.write(f"{part.__name__}: {bench.seconds[part.__name__]:.1f} s\n")
    failed = [row for row in bench.checks if not row[3]]
    columns = ["part", "what", "seconds", "rate", "unit", "share of the matrix rate", "peak MB"]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    name = torch.cuda.get_device_name(device).split()[-1].lower() if device.type == "cuda" else "tiny"
    out = (
        args.out
        if args.out.name != "gpu.tiny.json" or device.type != "cuda"
        else args.out.with_name(f"gpu.{name}.json")
    )
    write_result(
        out,
        title=f"Correctness and speed on {where}" + (", tiny sizes (the way, not the figures)" if args.tiny else ""),
        about="Errors are max |difference| / max |value| unless said otherwise. TF32 is off in all checks. Speeds are "
        "medians; shares are of one large matrix product in the same precision and run.",
        tables=[
            {"title": "Correctness", "columns": ["check", "error", "limit", "held"], "rows": bench.checks},
            {"title": "Speed", "columns": columns, "rows": bench.speeds},
            {"title": "Skipped", "columns": ["what", "why"], "rows": bench.skipped},
            {"title": "Seconds", "columns": ["part", "seconds"], "rows": [list(x) for x in bench.seconds.items()]},
        ],
        summary=[[f"checks held on {where}", f"{len(bench.checks) - len(failed)} of {len(bench.checks)}", "all"]],
        data={"arguments": {k: str(v) for k, v in vars(args).items()}, "seconds": time.monotonic() - start},
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
