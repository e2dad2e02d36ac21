"""One training loop for both methods: one process or many, interruptible at any moment, every number logged.

Written so that the numbers depend on the configuration and the data alone: each utterance's crops and augmentation are
drawn from its own generator, statistics are those of the global batch, and a checkpoint holds all there is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from .. import __version__
from ..common.files import write_text
from ..errors import CheckpointMismatch, ConfigError, SpeakerUpstreamError
from .checkpointing import CheckpointStore, load_rng, rng_state
from .config import PretrainConfig, duration_steps
from .dino import Collapse, CollapseMonitor, parameter_groups
from .distributed import is_main, rank, synchronise_norms, world_size
from .tasks import DinoTask, SupervisedTask, cosine

__all__ = ["NonFinite", "Trainer", "learning_rate", "start_distributed"]

logger = logging.getLogger(__name__)

# may differ between a run and its continuation: they change no number of it
_FREE_KEYS = {
    "run.log_every",
    "run.save_every",
    "run.keep_last",
    "run.keep_best",
    "run.tensorboard",
    "run.threads",
    "run.device",
    "eval.every",
    "eval.trials",
    "eval.root",
    "data.workers",
    "data.prefetch",
    "data.cache_mb",
    "data.manifest_cache",
    "data.augment.cache_mb",
    "dino.collapse.action",
    "dino.collapse.patience",
    "model.init",
}


class NonFinite(SpeakerUpstreamError, ArithmeticError):
    """The loss or the gradient became infinite or not a number; the message names the step and the files."""


def start_distributed(device: torch.device) -> bool:
    """Join the process group that ``torchrun`` announced in the environment; False if there is none."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or dist.is_initialized():
        return dist.is_initialized()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return True


def pick_device(name: str) -> torch.device:
    """``auto``: this process's GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"run.device={name}: PyTorch sees no GPU; use run.device=cpu")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


def learning_rate(step: int, config: PretrainConfig, *, total: int, warmup: int, scale: float) -> float:
    """Learning rate of optimizer step ``step``: linear warm-up, then ``optim.schedule``; ``scale`` by global batch.

    "exponential" decays over the whole run from its start and is multiplied by the warm-up, as WeSpeaker does.
    """
    optim = config.optim
    top, low = optim.lr * scale, optim.min_lr * scale
    if optim.schedule == "exponential":
        decayed = top * (low / top) ** (step / max(total, 1))
        return decayed * min(step / warmup, 1.0) if warmup else decayed
    if step < warmup:
        return top * step / warmup
    return top if optim.schedule == "constant" else cosine(step - warmup, total - warmup, top, low)


def clip_gradients(parameters: list[nn.Parameter], limit: float, mode: str) -> Tensor:
    """Scale gradients down to norm ``limit`` (each parameter's own, or all together); returns the norm before."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = torch.stack(torch._foreach_norm(grads))
    total = torch.linalg.vector_norm(norms)
    if limit > 0:
        if mode == "global":
            torch._foreach_mul_(grads, (limit / (total + 1e-6)).clamp(max=1.0))
        else:
            factors = (limit / (norms + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(grads, list(factors.unbind(0)))
    return total


class _Scaler:
    """Loss scaling for float16; a no-op otherwise (and on PyTorch older than 2.3 without ``torch.amp.GradScaler``)."""

    def __new__(cls, device: torch.device, enabled: bool) -> Any:
        if hasattr(torch.amp, "GradScaler"):
            return torch.amp.GradScaler(device.type, enabled=enabled)
        if enabled and device.type != "cuda":
            raise ConfigError("run.precision=fp16 on CPU needs torch >= 2.3; use bf16 or fp32")
        return torch.cuda.amp.GradScaler(enabled=enabled)


class Trainer:
    """Train as ``config`` says into the folder ``out``; goes on from its newest checkpoint if there is one.

    ``loader`` yields batches of the task (see :mod:`.data`), has ``state_dict`` / ``load_state_dict`` and
    ``waited_seconds``; ``batches_per_epoch`` counts its batches. ``evaluate`` maps an encoder to metrics with ``eer``.
    """

    def __init__(
        self,
        config: PretrainConfig,
        out: str | Path,
        *,
        loader: Any,
        batches_per_epoch: int,
        classes: int = 0,
        data: dict[str, Any] | None = None,
        evaluate: Callable[[Any], dict[str, float]] | None = None,
        changed_config: bool = False,
    ) -> None:
        run = config.run
        self.config, self.out, self.loader, self.evaluate = config, Path(out), loader, evaluate
        self.data = dict(data or {})
        if run.threads:
            torch.set_num_threads(run.threads)
        self.device = pick_device(run.device)
        self.steps_per_epoch = max(batches_per_epoch // run.accumulate, 1)
        self.total = run.steps if run.steps is not None else max(round(run.epochs * self.steps_per_epoch), 1)
        self.global_batch = run.batch * run.accumulate * world_size()
        self.scale = self.global_batch / config.optim.lr_reference_batch if config.optim.lr_reference_batch else 1.0
        self.warmup = self._steps(config.optim.warmup)
        torch.manual_seed(run.seed)
        if config.method == "dino":
            self.task: DinoTask | SupervisedTask = DinoTask(config, self.total, self.steps_per_epoch)
        else:
            self.task = SupervisedTask(config, self.total, self.steps_per_epoch, classes)
        self.store = CheckpointStore(self.out / "checkpoints", run.keep_last)
        self.step = 0
        self.monitor = CollapseMonitor(
            config.dino.collapse, prototypes=config.dino.prototypes, grace_steps=self._steps(config.dino.collapse.grace)
        )
        self._changed_config = changed_config
        self._stop_signal = 0
        self._best = math.inf
        self._writer: Any = None

    def _steps(self, text: str) -> int:
        return duration_steps(text, self.steps_per_epoch, self.total)

    def describe(self) -> str:
        """Lines for the log's head: effective batch, learning rate, length, size."""
        run, optim = self.config.run, self.config.optim
        parameters = sum(p.numel() for p in self.task.parameters() if p.requires_grad)
        return (
            f"{self.config.method}: {self.total} steps of {self.global_batch} utterances ({run.batch} x "
            f"{run.accumulate} accumulated x {world_size()} processes), {self.steps_per_epoch} steps an epoch, "
            f"{self.total / self.steps_per_epoch:.1f} epochs; effective learning rate {optim.lr * self.scale:.3g} "
            f"(lr {optim.lr:g} x {self.scale:.3g}) after {self.warmup} warm-up steps, {optim.schedule} to "
            f"{optim.min_lr * self.scale:.3g}; {parameters:,} trained parameters, {run.precision} on {self.device}"
        )

    # --- the loop ------------------------------------------------------------------------------------------------

    def run(self, stop_after: int | None = None) -> dict[str, Any]:
        """Train to the end (or until step ``stop_after``); returns the last metrics.

        Raises Collapse, NonFinite, or ConfigError if the folder belongs to a run with another configuration.
        """
        config, run = self.config, self.config.run
        task = self.task.to(self.device)
        if world_size() > 1:
            synchronise_norms(task)
        self.optimizer = self._make_optimizer()
        self.scaler = _Scaler(self.device, run.precision == "fp16")
        self._initialise()
        model: nn.Module = task
        if world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            model = nn.parallel.DistributedDataParallel(task, device_ids=ids, broadcast_buffers=False)
        task.train()
        if is_main():
            self.out.mkdir(parents=True, exist_ok=True)
            write_text(self.out / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
            self._open_log()
            logger.info("%s", self.describe())
        batches = iter(self.loader)
        save_every = max(self._steps(config.run.save_every), 1)
        eval_every = max(self._steps(config.eval.every), 1)
        last: dict[str, Any] = {}
        interval, waited = time.perf_counter(), self.loader.waited_seconds
        interval_steps = 0
        end = self.total if stop_after is None else min(stop_after, self.total)
        tty = sys.stderr.isatty()
        bar = tqdm(
            total=self.total, initial=self.step, disable=not is_main(), unit="step", dynamic_ncols=tty,
            mininterval=0.5 if tty else 20.0, desc=config.method,
        )  # fmt: skip
        with self._signals(), bar:
            while self.step < end:
                schedule = self._set_schedules(self.step)
                loss, ids = self._accumulated_backward(model, batches)
                grad_norm = self._update(loss, ids)
                loss, stop = self._agree(loss)
                self.step += 1
                interval_steps += 1
                bar.update()
                if self.step % run.log_every == 0 or self.step == self.total:
                    metrics = self._average(self.task.metrics())
                    now = time.perf_counter()
                    waiting = (self.loader.waited_seconds - waited) / (now - interval)
                    last = {
                        "step": self.step,
                        "epoch": round(self.step / self.steps_per_epoch, 4),
                        "loss": loss,
                        **metrics,
                        **schedule,
                        "grad_norm": grad_norm,
                        "step_seconds": round((now - interval) / interval_steps, 5),
                        "waiting": round(waiting, 4),
                    }
                    interval, waited, interval_steps = now, self.loader.waited_seconds, 0
                    self._log(last)
                    bar.set_postfix(loss=f"{loss:.3f}", **self._short(metrics), refresh=False)
                    self._check_collapse(metrics)
                if self.step % eval_every == 0 or self.step == self.total:
                    evaluated = self._evaluate()
                    last.update(evaluated)
                    if evaluated:
                        interval, waited, interval_steps = time.perf_counter(), self.loader.waited_seconds, 0
                if self.step % save_every == 0 or self.step == self.total or stop or self.step == end:
                    self.save()
                if stop:
                    logger.warning("step %d: asked to stop by signal %d; checkpoint written", self.step, stop)
                    break
        if self._writer is not None:
            self._writer.close()
        return last

    def _set_schedules(self, step: int) -> dict[str, float]:
        optim = self.config.optim
        lr = learning_rate(step, self.config, total=self.total, warmup=self.warmup, scale=self.scale)
        wd = cosine(step, self.total, optim.weight_decay, optim.weight_decay_end)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = wd if group["decay"] else 0.0
        return {"lr": lr, "wd": wd, **self.task.set_step(step)}

    def _accumulated_backward(self, model: nn.Module, batches: Iterator[Any]) -> tuple[Tensor, list[str]]:
        """Gradients of one optimizer step; (mean loss of this process, ids of the utterances it saw)."""
        parts, ids = self.config.run.accumulate, []
        total = torch.zeros((), device=self.device)
        for part in range(parts):
            batch = next(batches)
            ids += list(batch.ids)
            inputs = self.task.inputs(batch, self.device)
            wait = isinstance(model, nn.parallel.DistributedDataParallel) and part < parts - 1
            with model.no_sync() if wait else contextlib.nullcontext():
                loss = model(inputs)
                if not math.isfinite(float(loss.detach())):
                    self._report_non_finite("loss", ids)
                    # every process must leave together, also those whose own loss is finite
                self.scaler.scale(loss / parts).backward()
            total += loss.detach() / parts
        return total, ids

    def _update(self, loss: Tensor, ids: list[str]) -> float:
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(clip_gradients(parameters, self.config.optim.clip, self.config.optim.clip_mode))
        self.task.after_backward()
        bad = torch.tensor(
            [float(not math.isfinite(float(loss))), float(not math.isfinite(norm) and not self.scaler.is_enabled())]
        )
        bad = self._sum(bad)
        if bad.any():
            if not math.isfinite(norm) and math.isfinite(float(loss)):
                self._report_non_finite("gradient", ids)
            what = "loss" if bad[0] else "gradient"
            everyone = self._gather(ids if not math.isfinite(float(loss)) or not bad[0] else [])
            names = [name for part in everyone for name in part]
            raise NonFinite(
                f"step {self.step + 1}: the {what} is not finite. Utterances of this step: {', '.join(names[:64])}. "
                f"Remedy: listen to these files; lower optim.lr ({self.config.optim.lr:g}) or optim.clip; with fp16 "
                f"use bf16. The newest checkpoint in {self.store.folder} is from before."
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step()
        return norm

    def _report_non_finite(self, what: str, ids: list[str]) -> None:
        logger.error("step %d, process %d: non-finite %s with %s", self.step + 1, rank(), what, ", ".join(ids))

    def _agree(self, loss: Tensor) -> tuple[float, int]:
        """Mean loss of all processes, and whether one of them was asked to stop."""
        both = self._sum(torch.tensor([float(loss), float(self._stop_signal)], dtype=torch.float64))
        return float(both[0]) / world_size(), int(both[1])

    def _sum(self, x: Tensor) -> Tensor:
        if world_size() == 1:
            return x
        x = x.to(self.device)
        dist.all_reduce(x)
        return x.cpu()

    def _average(self, metrics: dict[str, float]) -> dict[str, float]:
        if world_size() == 1:
            return metrics
        values = self._sum(torch.tensor([metrics[k] for k in sorted(metrics)], dtype=torch.float64)) / world_size()
        averaged = dict(zip(sorted(metrics), values.tolist(), strict=True))
        return {k: averaged[k] for k in metrics}

    def _gather(self, value: Any) -> list[Any]:
        if world_size() == 1:
            return [value]
        out: list[Any] = [None] * world_size()
        dist.all_gather_object(out, value)
        return out

    @staticmethod
    def _short(metrics: dict[str, float]) -> dict[str, str]:
        keys = {"kl": "kl", "marginal_entropy": "marg", "effective_dimension": "dim", "accuracy": "acc"}
        return {short: f"{metrics[k]:.2f}" for k, short in keys.items() if k in metrics}

    def _check_collapse(self, metrics: dict[str, float]) -> None:
        if self.config.method != "dino":
            return
        advice = self.monitor.update(self.step, metrics)
        if advice is None:
            return
        if self.config.dino.collapse.action == "stop":
            self.save()
            raise Collapse(advice)
        logger.warning("%s", advice)

    # --- logs ----------------------------------------------------------------------------------------------------

    def _open_log(self) -> None:
        """Drop log lines beyond the checkpoint that is continued from, so that every step appears once."""
        path = self.out / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= self.step:
                        kept.append(line)
                except (ValueError, KeyError):  # the line that a kill cut short
                    continue
        write_text(path, "".join(line + "\n" for line in kept))
        if self.config.run.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                logger.warning("no TensorBoard log: pip install tensorboard, or run.tensorboard=false")
            else:
                self._writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.step + 1)

    def _log(self, values: dict[str, Any]) -> None:
        if not is_main():
            return
        # JSON knows no infinity: a gradient norm is infinite where float16's loss scale was still too large
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with open(self.out / "metrics.jsonl", "a") as stream:
            stream.write(json.dumps(plain) + "\n")
        if self._writer is not None:
            for key, value in values.items():
                if key != "step" and isinstance(value, (int, float)):
                    self._writer.add_scalar(key, value, values["step"])

    def _evaluate(self) -> dict[str, float]:
        if self.evaluate is None:
            return {}
        result: dict[str, float] = {}
        if is_main():
            result = {k: float(v) for k, v in self.evaluate(self.task.encoder()).items()}
            self._log({"step": self.step, **result})
            logger.info("step %d: %s", self.step, ", ".join(f"{k} {v:.4f}" for k, v in result.items()))
        result = self._gather(result)[0]  # all processes must agree on whether this is the best
        if "eer" in result and result["eer"] < self._best and self.config.run.keep_best:
            self._best = result["eer"]
            if self.save() is not None:
                self.store.mark_best(self.step, self._best)
        return result

    # --- state ---------------------------------------------------------------------------------------------------

    def _make_optimizer(self) -> torch.optim.Optimizer:
        optim = self.config.optim
        groups = parameter_groups(self.task, optim.decay_norm_and_bias)
        if optim.name == "adamw":
            return torch.optim.AdamW(groups, lr=0.0, betas=tuple(optim.betas))
        return torch.optim.SGD(groups, lr=0.0, momentum=optim.momentum, nesterov=optim.nesterov)

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "format": 1,
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "task": self.task.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            "rng": self._gather(rng_state()),
            "monitor": self.monitor.state_dict(),
            "best": self._best,
            "config": self.config.to_dict(),
            "data": self.data,
            "world_size": world_size(),
            "versions": {"package": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
            "host": socket.gethostname(),
        }

    def save(self) -> Path | None:
        """Write a checkpoint of the current step (by the first process); None if it could not be written."""
        state = self.state()
        path = self.store.save(self.step, state) if is_main() else None
        if world_size() > 1:
            dist.barrier()
        return path

    def _initialise(self) -> None:
        found = self.store.load_newest() if is_main() or world_size() == 1 else None
        if world_size() > 1:  # all processes must agree on the file, also after a fallback by the first
            dist.barrier()
            found = self.store.load_newest() if not is_main() else found
            dist.barrier()
        if found is None:
            if self.config.model.init:
                self._load_init(self.config.model.init)
            return
        state, path = found
        self._check_same(state, path)
        self.task.load_state_dict(state["task"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.loader.load_state_dict(state["loader"])
        self.monitor.load_state_dict(state["monitor"])
        self.step, self._best = int(state["step"]), float(state["best"])
        if state["world_size"] == world_size():
            load_rng(state["rng"][rank()])
        else:
            logger.warning(
                "%s was written by %d processes, now %d: the run goes on, with other batches than it would have had",
                path,
                state["world_size"],
                world_size(),
            )
        logger.info("continuing from %s (step %d of %d)", path, self.step, self.total)

    def _load_init(self, source: str) -> None:
        path = Path(source)
        if path.suffix == ".pt" and path.name.startswith("step_"):
            state = CheckpointStore.load(path)["task"]
            try:
                self.task.load_state_dict(state)
            except RuntimeError as error:
                raise CheckpointMismatch(f"model.init={source}: {error}") from error
        else:
            from ..checkpoints import read_checkpoint

            checkpoint = read_checkpoint(source)
            if checkpoint.ecapa != self.task.ecapa_config:
                ours, theirs = self.task.ecapa_config.to_dict(), checkpoint.ecapa.to_dict()
                different = [f"{k}: {theirs[k]} there, {ours[k]} here" for k in ours if ours[k] != theirs[k]]
                raise CheckpointMismatch(
                    f"model.init={source}: another network: {'; '.join(different)}; set model.ecapa"
                )
            self.task.load_encoder_state(checkpoint.state)
        logger.info("starting from the weights of %s", source)

    def _check_same(self, state: dict[str, Any], path: Path) -> None:
        old, new = _flat(state["config"]), _flat(self.config.to_dict())
        different = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in _FREE_KEYS]
        if different and not self._changed_config:
            shown = "; ".join(f"{k}: {old.get(k)!r} before, {new.get(k)!r} now" for k in different[:5])
            raise ConfigError(
                f"{path} belongs to a run with another configuration ({shown}); choose another --out, or pass "
                "--changed-config to go on with the new values"
            )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM (a cluster's warning) ends the run after the current step, with a checkpoint."""

        def ask(number: int, frame: Any) -> None:
            self._stop_signal = number

        try:
            before = signal.signal(signal.SIGTERM, ask)
        except ValueError:  # not the main thread
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = list(value) if isinstance(value, tuple) else value
    return out
