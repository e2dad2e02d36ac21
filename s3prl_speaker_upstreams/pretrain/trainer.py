"""One training loop for every objective: one process or many, interruptible at any moment, every number logged.

Written so that the numbers depend on the configuration and the data alone: each utterance's crops and augmentation are
drawn from its own generator, statistics are those of the global batch, and a checkpoint holds all there is.

However a run ends while Python is alive (SIGTERM, Ctrl-C, a dead loader worker, any exception), its last whole step is
saved first, and going on from it gives the numbers of a run that was never stopped.
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
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from .. import __version__
from ..common.files import append_line, locked, write_text
from ..ecapa import SpeakerEncoder
from ..errors import Busy, CheckpointUnreadable, ConfigError, SpeakerUpstreamError
from .checkpointing import FORMAT, CheckpointStore, load_rng, rng_state
from .collapse import Collapse, CollapseMonitor
from .config import PretrainConfig, flat
from .objective import CropEncoder, CropFeatures, model_configs, parameter_groups, speaker_encoder
from .objectives import build_objective
from .ranks import is_main, rank, synchronise_norms, world_size
from .schedules import duration_steps, half_cosine, learning_rate
from .selection import ClusterSelection
from .start import Start, begin_from

__all__ = ["NonFinite", "Trainer", "WorkerDied", "clip_gradients", "pick_device", "start_distributed"]

logger = logging.getLogger(__name__)

# May differ between a run and its continuation: they change no number of it. Folders may be moved and renamed: what is
# in them is compared by content (``state["data"]``).
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
    "data.train",
    "data.workers",
    "data.prefetch",
    "data.cache_mb",
    "data.manifest_cache",
    "data.augment.cache_mb",
    "data.augment.noise",
    "data.augment.rirs",
    "dino.collapse.action",
    "dino.collapse.patience",
    "model.init",
}


# What of the data must be the same for a run to go on as if never stopped, and what to call it.
_SAME_DATA = {"fingerprint": "the training speech", "noise": "the noise recordings", "rirs": "the impulse responses"}


class WorkerDied(SpeakerUpstreamError, RuntimeError):
    """A process that loads data was killed or crashed; the last whole step is saved."""


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


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products on ``device`` are emulated: processors without AVX-512 have none of their own.

    >>> emulates_bfloat16(torch.device("meta"))
    False
    """
    ops = torch.ops.mkldnn
    return device.type == "cpu" and not (hasattr(ops, "_is_mkldnn_bf16_supported") and ops._is_mkldnn_bf16_supported())


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

    ``loader`` yields batches of crops (see :mod:`s3prl_speaker_upstreams.data.datasets`), has ``state_dict`` /
    ``load_state_dict`` and ``waited_seconds``; ``batches_per_epoch`` counts its batches. ``speakers`` holds each
    utterance's class, for supervised training on several crops. ``start`` : weights that a new run begins with.
    ``evaluate`` maps an encoder to metrics with ``eer``.
    """

    def __init__(
        self,
        config: PretrainConfig,
        out: str | Path,
        *,
        loader: Any,
        batches_per_epoch: int,
        classes: int = 0,
        speakers: Tensor | None = None,
        start: Start | None = None,
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
        self.objective = build_objective(config, classes)
        self.objective.plan(self._steps, self.total)
        self.frontend = model_configs(config.model)[1]
        self.features = CropFeatures(self.frontend, speakers, config.data.augment, run.seed)
        self.selection = (
            ClusterSelection(loader, config.data, self._steps, run.seed)
            if config.data.positives == "clusters"
            else None
        )
        self._pairs: Counter[str] = Counter()  # of the loader, when they were last logged
        self.start = start
        self.store = CheckpointStore(self.out / "checkpoints", run.keep_last)
        self.step = 0
        self.shift = 0  # added to step: where in the schedules the run is, if its epochs changed their length
        self.stopped = 0  # the signal that ended the run early
        self.monitor = CollapseMonitor(
            config.dino.collapse, prototypes=config.dino.prototypes, grace_steps=self._steps(config.dino.collapse.grace)
        )
        self._changed_config = changed_config
        self._stop_signal = 0
        self._saved = -1  # the newest step that is on the disk
        self._updating = False
        self._whole: tuple[list[Tensor], dict[str, Any]] | None = None
        self._evaluated: set[int] = set()
        self._best = math.inf
        self._writer: Any = None
        self._unlogged: list[str] = []

    def _steps(self, text: str) -> int:
        return duration_steps(text, self.steps_per_epoch, self.total)

    @property
    def last_step(self) -> int:
        """Number of the step at which the run is finished: ``total``, unless its epochs changed their length."""
        return self.total - self.shift

    @property
    def saved(self) -> bool:
        """Whether the current step is on the disk."""
        return self._saved == self.step

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.step >= self.last_step

    def describe(self) -> str:
        """Lines for the log's head: effective batch, learning rate, length, size, and what to know about them."""
        run, optim = self.config.run, self.config.optim
        parameters = sum(p.numel() for p in self.objective.parameters() if p.requires_grad)
        text = (
            f"{self.config.method}: {self.total} steps of {self.global_batch} utterances ({run.batch} x "
            f"{run.accumulate} accumulated x {world_size()} processes), {self.steps_per_epoch} steps an epoch, "
            f"{self.total / self.steps_per_epoch:.1f} epochs; effective learning rate {optim.lr * self.scale:.3g} "
            f"(lr {optim.lr:g} x {self.scale:.3g}) after {self.warmup} warm-up steps, {optim.schedule} to "
            f"{optim.min_lr * self.scale:.3g}; {parameters:,} trained parameters, {run.precision} on {self.device}"
        )
        if run.accumulate > 1:
            text += (
                f"\nnote: run.accumulate={run.accumulate} is not run.batch={run.batch * run.accumulate}: "
                f"{self.objective.batch_statistics} see each micro-batch of {run.batch * world_size()} utterances "
                "alone; more processes see the global batch"
            )
        return text

    # --- the loop ------------------------------------------------------------------------------------------------

    def run(self, stop_after: int | None = None) -> dict[str, Any]:
        """Train to the end (or until step ``stop_after``); returns the last metrics.

        A signal (SIGTERM, SIGINT) ends it after the current step, with a checkpoint and ``stopped`` set. Raises Busy
        if another run is at work in the folder, Collapse, NonFinite, WorkerDied, CheckpointUnreadable if all
        checkpoints are damaged, or ConfigError if the folder belongs to a run with another configuration. Whatever is
        raised while training, the last whole step is saved first.
        """
        with self._only_run(), self._signals():
            try:
                return self._train(self._prepare(), stop_after)
            except BaseException as error:
                self._rescue()
                if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
                    raise WorkerDied(
                        f"step {self.step + 1}: {error} Remedy: if memory ran out (see dmesg), lower data.workers, "
                        "data.prefetch or data.cache_mb; the same command goes on from the saved step"
                    ) from error
                raise
            finally:
                self._close_log()

    def _prepare(self) -> nn.Module:
        """Optimizer, state of an earlier run, logs; returns what is called for the loss."""
        objective = self.objective.to(self.device)
        self.features.to(self.device)
        if world_size() > 1:
            synchronise_norms(objective)
        self.optimizer = self._make_optimizer()
        self.scaler = _Scaler(self.device, self.config.run.precision == "fp16")
        if self.config.run.precision == "bf16" and emulates_bfloat16(self.device):
            logger.warning(
                "run.precision=bf16: this processor has no bfloat16 arithmetic and emulates it, up to 15 times slower "
                "than run.precision=fp32"
            )
        self._initialise()
        model: nn.Module = objective
        if world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            model = nn.parallel.DistributedDataParallel(objective, device_ids=ids, broadcast_buffers=False)
        objective.train()
        if is_main():
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                write_text(self.out / "config.yaml", yaml.safe_dump(self.config.to_dict(), sort_keys=False))
            except OSError as error:
                raise ConfigError(f"--out {self.out}: cannot be written to: {error.strerror or error}") from error
            self._open_log()
            logger.info("%s", self.describe())
        return model

    def _train(self, model: nn.Module, stop_after: int | None) -> dict[str, Any]:
        config, run = self.config, self.config.run
        batches = iter(self.loader)
        save_every = max(self._steps(run.save_every), 1)
        eval_every = max(self._steps(config.eval.every), 1)
        last: dict[str, Any] = {}
        interval, waited = time.perf_counter(), self.loader.waited_seconds
        interval_steps = 0
        end = self.last_step if stop_after is None else min(stop_after, self.last_step)
        tty = sys.stderr.isatty()
        bar = tqdm(
            total=self.last_step, initial=self.step, disable=not is_main(), unit="step", dynamic_ncols=tty,
            mininterval=0.5 if tty else 20.0, desc=config.method,
        )  # fmt: skip
        self._mark_whole()
        if self._resumed_before_evaluation(eval_every):
            self._evaluate()
        with bar:
            while self.step < end:
                if self.selection is not None and self.selection.due(self.step):
                    ecapa = next(iter(self.objective.networks().values()))
                    network = CropEncoder(ecapa, run.precision, frontend=self.frontend).to(self.device)
                    self.selection.refresh(self.step, network, self.features, self.device)
                schedule = self._set_schedules(self.step + self.shift)
                own_loss, ids = self._accumulated_backward(model, batches)
                grad_norm = self._gradient_norm(own_loss, ids)
                with _undisturbed():  # a signal's exception in here would leave half a step
                    self._update()
                loss, stop = self._agree(own_loss)
                interval_steps += 1
                bar.update()
                if self.step % run.log_every == 0 or self.step == self.last_step:
                    metrics = self._average({**self.objective.metrics(), **self._positives()})
                    now = time.perf_counter()
                    waiting = (self.loader.waited_seconds - waited) / (now - interval)
                    last = {
                        "step": self.step,
                        "epoch": round((self.step + self.shift) / self.steps_per_epoch, 4),
                        "loss": loss,
                        **metrics,
                        **schedule,
                        "grad_norm": grad_norm,
                        "step_seconds": round((now - interval) / interval_steps, 5),
                        "waiting": round(waiting, 4),
                    }
                    interval, waited, interval_steps = now, self.loader.waited_seconds, 0
                    self._log(last)
                    bar.set_postfix({"loss": f"{loss:.3f}", **self._short(metrics)}, refresh=False)
                    self._check_collapse(metrics)
                evaluation_due = self.evaluate is not None and (
                    self.step % eval_every == 0 or self.step == self.last_step
                )
                if self.step % save_every == 0 or stop or self.step == end or evaluation_due:
                    self.save()  # before the evaluation: what happens in it must not cost the steps before
                if evaluation_due and not stop:
                    last.update(self._evaluate())
                    interval, waited, interval_steps = time.perf_counter(), self.loader.waited_seconds, 0
                if stop:
                    self.stopped = stop
                    if is_main():
                        logger.warning(
                            "step %d of %d: asked to stop by %s; %s. The same command goes on from there.",
                            self.step, self.last_step, signal.Signals(stop).name, self._kept(),
                        )  # fmt: skip
                    break
        return last

    def _positives(self) -> dict[str, float]:
        """Of this process's positive pairs since the last log, the shares from one recording, session and speaker."""
        counts = getattr(self.loader, "positives", None)
        if not counts:
            return {}
        new = {key: counts[key] - self._pairs[key] for key in counts}
        self._pairs = Counter(counts)
        return {f"positives_{key}": new[key] / max(new["pairs"], 1) for key in new if key != "pairs"}

    def _kept(self) -> str:
        return "checkpoint written" if self.saved else f"newest checkpoint: step {self._saved}"

    def _set_schedules(self, step: int) -> dict[str, float]:
        optim = self.config.optim
        lr = learning_rate(step, self.config, total=self.total, warmup=self.warmup, scale=self.scale)
        wd = half_cosine(step, self.total, optim.weight_decay, optim.weight_decay_end)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = wd if group["decay"] else 0.0
        return {"lr": lr, "wd": wd, **self.objective.set_step(step)}

    def _accumulated_backward(self, model: nn.Module, batches: Iterator[Any]) -> tuple[Tensor, list[str]]:
        """Gradients of one optimizer step; (mean loss of this process, ids of the utterances it saw)."""
        parts, ids = self.config.run.accumulate, []
        total = torch.zeros((), device=self.device)
        for part in range(parts):
            batch = next(batches)
            ids += list(batch.ids)
            crops = self.features.of(batch, self.device)
            wait = isinstance(model, nn.parallel.DistributedDataParallel) and part < parts - 1
            with model.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
                loss = model(*crops)
                if not math.isfinite(float(loss.detach())):
                    self._report_non_finite("loss", ids)
                    # every process must leave together, also those whose own loss is finite
                self.scaler.scale(loss / parts).backward()
            total += loss.detach() / parts
        return total, ids

    def _gradient_norm(self, loss: Tensor, ids: list[str]) -> float:
        """Unscale and clip; the norm before. Raises NonFinite, in every process, before anything is changed."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(clip_gradients(parameters, self.config.optim.clip, self.config.optim.clip_mode))
        self.objective.after_backward()
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
        return norm

    def _update(self) -> None:
        """The only place that changes parameters."""
        self._updating = True
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.after_step()
        self.step += 1
        self._mark_whole()
        self._updating = False

    def _mark_whole(self) -> None:
        """Remember what a step changes before its update, so that a stop in the middle of one loses that step alone."""
        now = [b.detach() for b in self.objective.buffers()]
        if self._whole is None:
            self._whole = [b.clone() for b in now], self.loader.state_dict()
            return
        kept = self._whole[0]
        for kind in {b.dtype for b in now}:  # a few calls instead of one for each buffer
            torch._foreach_copy_([k for k in kept if k.dtype == kind], [b for b in now if b.dtype == kind])
        self._whole = kept, self.loader.state_dict()

    def _rescue(self) -> None:
        """Save the last whole step, when the run leaves by an exception. Never raises, waits for no other process."""
        if self._whole is None or not is_main() or self.step in (0, self._saved):
            return
        try:
            if self._updating:
                logger.error("step %d was left half done; the newest checkpoint is that of step %d", self.step + 1,
                             self._saved)  # fmt: skip
                return
            buffers, loader = self._whole
            with torch.no_grad():
                for buffer, kept in zip(self.objective.buffers(), buffers, strict=True):
                    buffer.copy_(kept)
            state = self.state(rng=[rng_state()], loader=loader)
            finite = all(torch.isfinite(v).all() for v in state["task"].values() if v.is_floating_point())
            if not finite:
                logger.error("step %d holds values that are not finite and is not saved", self.step)
            elif self.store.save(self.step, state) is not None:
                logger.warning("step %d, the last whole one, is saved; the same command goes on from there", self.step)
        except Exception:
            logger.exception("step %d could not be saved", self.step)

    def _report_non_finite(self, what: str, ids: list[str]) -> None:
        logger.error("step %d, process %d: non-finite %s with %s", self.step + 1, rank(), what, ", ".join(ids))

    def _agree(self, loss: Tensor) -> tuple[float, int]:
        """Mean loss of all processes, and the signal if one of them was asked to stop."""
        both = self._sum(torch.tensor([float(loss), float(self._stop_signal)], dtype=torch.float64))
        return float(both[0]) / world_size(), (self._stop_signal or signal.SIGTERM) if both[1] else 0

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
        if self.config.method == "supervised":
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
            for line in path.read_text(errors="replace").splitlines():
                try:
                    record = json.loads(line)
                    if record["step"] <= self.step:
                        kept.append(line)
                        if "eer" in record:
                            self._evaluated.add(record["step"])
                except (ValueError, KeyError, TypeError):  # the line that a kill cut short
                    continue
        try:
            write_text(path, "".join(line + "\n" for line in kept))
        except OSError as error:
            logger.error("%s could not be written (%s); training goes on", path, error)
        if self.config.run.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                logger.warning("no TensorBoard log: pip install tensorboard, or run.tensorboard=false")
                return
            try:
                self._writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.step + 1)
            except OSError as error:
                logger.error("no TensorBoard log (%s); training goes on", error)

    def _log(self, values: dict[str, Any]) -> None:
        """One line to every log. A disk that refuses it costs no training: the line is written with a later one."""
        if not is_main():
            return
        # JSON knows no infinity: a gradient norm is infinite where float16's loss scale was still too large
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._unlogged.append(json.dumps(plain))
        try:
            append_line(self.out / "metrics.jsonl", "\n".join(self._unlogged))
            self._unlogged.clear()
        except OSError as error:
            if len(self._unlogged) == 1:
                logger.error("step %d: metrics.jsonl could not be written (%s); training goes on, the lines are kept "
                             "until it can", values["step"], error)  # fmt: skip
        if self._writer is not None:
            try:
                for key, value in values.items():
                    if key != "step" and isinstance(value, (int, float)):
                        self._writer.add_scalar(key, value, values["step"])
            except Exception as error:  # its writing thread raises here whatever went wrong there
                logger.error("step %d: no TensorBoard log from here on (%s); training goes on", values["step"], error)
                self._writer = None

    def _close_log(self) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except Exception as error:
                logger.error("the TensorBoard log could not be finished (%s)", error)
            self._writer = None

    def _resumed_before_evaluation(self, eval_every: int) -> bool:
        """Whether the run was stopped between a step's checkpoint and its evaluation."""
        if self.evaluate is None or self.step == 0:
            return False
        due = self.step % eval_every == 0 or self.step == self.last_step
        return self._gather(due and self.step not in self._evaluated)[0]

    def _evaluate(self) -> dict[str, float]:
        if self.evaluate is None:
            return {}
        # On all processes: they share the recordings, and none waits for another's work in a collective.
        result = {k: float(v) for k, v in self.evaluate(self.encoder()).items()}
        if is_main():
            self._log({"step": self.step, **result})
            logger.info("step %d: %s", self.step, ", ".join(f"{k} {v:.4f}" for k, v in result.items()))
        result = self._gather(result)[0]  # all processes must agree on whether this is the best
        if "eer" in result and result["eer"] < self._best and self.config.run.keep_best:
            self._best = result["eer"]
            if is_main() and self.saved:
                self.store.mark_best(self.step, self._best)
        return result

    # --- state ---------------------------------------------------------------------------------------------------

    def _make_optimizer(self) -> torch.optim.Optimizer:
        optim = self.config.optim
        groups = parameter_groups(self.objective, optim.decay_norm_and_bias)
        if optim.name == "adamw":
            return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas)
        return torch.optim.SGD(groups, lr=0.0, momentum=optim.momentum, nesterov=optim.nesterov)

    def encoder(self, role: str | None = None) -> SpeakerEncoder:
        """A copy of the network that is trained (of DINO's teacher), with its front-end, in eval mode on the CPU."""
        networks = self.objective.networks()
        return speaker_encoder(networks[role or next(iter(networks))], self.frontend)

    def state(self, rng: list[Any] | None = None, loader: dict[str, Any] | None = None) -> dict[str, Any]:
        """Everything that the next step depends on; generators and loader of now, or those that are given."""
        return {
            "format": FORMAT,
            "step": self.step,
            "shift": self.shift,
            "epoch": (self.step + self.shift) / self.steps_per_epoch,
            "task": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": loader or self.loader.state_dict(),
            "rng": rng or self._gather(rng_state()),
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
        if self.saved:
            return self.store.folder / f"step_{self.step:08d}.pt"
        state = self.state()
        path = self.store.save(self.step, state) if is_main() else None
        if self._gather(path is not None)[0]:
            self._saved = self.step
        return path

    def _initialise(self) -> None:
        found, said = None, ("", "")
        if is_main():
            try:
                found = self.store.load_newest()
                said = (str(found[1]) if found else "", "")
            except CheckpointUnreadable as error:
                said = ("", str(error))
        name, problem = self._gather(said)[0]  # all processes must agree on the file, also after a fallback
        if problem:
            raise CheckpointUnreadable(problem)
        if not name:
            if self.start is not None:
                taken = begin_from(self.objective, self.start, self.config, self.data)
                logger.info("starting from %s", taken)
            return
        state, path = found or (CheckpointStore.load(name), Path(name))
        self._check_same(state, path)
        try:
            self.objective.load_state_dict(state["task"])
        except RuntimeError as error:
            raise ConfigError(
                f"{path}: another network, objective or number of speakers than now ({str(error).splitlines()[-1]}); "
                f"begin a new run from its weights: choose another --out and set model.init={path}"
            ) from error
        if state["config"]["optim"]["name"] == self.config.optim.name:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            logger.warning("%s holds the state of another optimizer; %s begins without", path, self.config.optim.name)
        self.scaler.load_state_dict(state["scaler"])
        self.monitor.load_state_dict(state["monitor"])
        self.step = self._saved = int(state["step"])
        self.shift = int(state.get("shift", 0))
        best = self.store.best()  # marked after the checkpoint was written
        self._best = min(float(state["best"]), best[1] if best else math.inf)
        self._place_loader(state)
        if state["world_size"] == world_size() == len(state["rng"]):
            load_rng(state["rng"][rank()])
        elif state["world_size"] == world_size():
            load_rng(state["rng"][0])  # saved by the first process alone; no step draws from these generators
        else:
            logger.warning("%s was written by %d processes, now %d", path, state["world_size"], world_size())
        logger.info("continuing from %s (step %d of %d)", path, self.step, self.last_step)

    def _place_loader(self, state: dict[str, Any]) -> None:
        """Go on with the next batch; after a change of batch or data, from the same place in the epoch."""
        old, new = state["loader"], self.loader.state_dict()
        if all(old[key] == new[key] for key in ("fingerprint", "seed", "data_seed", "batch_size")):
            self.loader.load_state_dict(old)
        else:
            batches = self.loader.sampler.batches_per_epoch
            self.loader.seek(old["epoch"], min(old["batch"] * old["batch_size"] // new["batch_size"], batches))
        if self._changed_config and self.config.run.steps is None:
            self.shift = round(state["epoch"] * self.steps_per_epoch) - self.step
            if self.shift != state.get("shift", 0):
                logger.warning(
                    "an epoch has %d steps now: the schedules go on at epoch %.2f, the run ends with step %d",
                    self.steps_per_epoch, state["epoch"], self.last_step,
                )  # fmt: skip

    def _check_same(self, state: dict[str, Any], path: Path) -> None:
        try:  # what a run of an earlier version did not have yet was at its default
            before = PretrainConfig.from_dict(state["config"]).to_dict()
        except ConfigError:
            before = state["config"]
        old, new = flat(before), flat(self.config.to_dict())
        shown = [
            f"{k}: {old.get(k)!r} before, {new.get(k)!r} now"
            for k in sorted(old.keys() | new.keys())
            if old.get(k) != new.get(k) and k not in _FREE_KEYS
        ]
        for key, what in _SAME_DATA.items():
            was, now = state["data"].get(key), self.data.get(key)
            if key not in state["data"]:  # a run of an earlier version recorded the folder alone
                path_key = f"data.augment.{key}"
                was, now = old.get(path_key), new.get(path_key)
            if was != now:
                shown.append(f"{what} (fingerprint {str(was)[:12]} before, {str(now)[:12]} now)")
        batch = self.loader.state_dict()["batch_size"]
        if state["loader"]["batch_size"] != batch:
            shown.append(f"batch of all processes: {state['loader']['batch_size']} before, {batch} now")
        if shown and not self._changed_config:
            raise ConfigError(
                f"{path} belongs to a run with another configuration ({'; '.join(shown[:5])}); choose another --out, "
                "or pass --changed-config to go on with the new values"
            )
        speakers = state["data"].get("speaker_names"), self.data.get("speaker_names")
        if self.config.method == "supervised" and None not in speakers and speakers[0] != speakers[1]:
            raise ConfigError(
                f"{path}: the speakers are others now, so its classifier means nothing; begin a new run from its "
                f"weights: choose another --out and set model.init={path}"
            )
        if shown:
            logger.warning("%s: going on with a changed configuration: %s", path, "; ".join(shown))

    @contextlib.contextmanager
    def _only_run(self) -> Iterator[None]:
        """Hold the folder's lock while the run lasts; every process raises Busy if another run has it."""
        with contextlib.ExitStack() as held:
            problem = ""
            if is_main():
                try:
                    held.enter_context(locked(self.out / "run.lock", f"--out {self.out}"))
                except Busy as error:
                    problem = str(error)
                except NotImplementedError as error:  # a file system without locks
                    logger.warning("%s: no lock (%s): take care that no other run writes here", self.out, error)
            problem = self._gather(problem)[0]
            if problem:
                raise Busy(problem)
            yield

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM (a cluster's warning) and Ctrl-C end the run after the current step; a second Ctrl-C at once."""

        def ask(number: int, frame: Any) -> None:
            if number == signal.SIGINT and self._stop_signal == signal.SIGINT:
                raise KeyboardInterrupt
            if number == signal.SIGINT and is_main():
                logger.warning("stopping after this step; press Ctrl-C again to leave at once")
            self._stop_signal = number

        self._stop_signal = self.stopped = 0
        with _handlers({signal.SIGTERM: ask, signal.SIGINT: ask}):
            yield


@contextlib.contextmanager
def _handlers(wanted: dict[int, Callable[[int, Any], None]]) -> Iterator[None]:
    """Signal handlers for the block; nothing outside the main thread, where Python allows none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.getsignal(n) for n in wanted}
    before = {n: handler for n, handler in before.items() if handler is not None}  # None: not installed by Python
    for number in before:
        signal.signal(number, wanted[number])
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let signals wait until the block is through, those whose handlers may raise: Ctrl-C and a dead worker's."""
    came: list[tuple[int, Any]] = []

    def note(number: int, frame: Any) -> None:
        came.append((number, frame))

    with _handlers({signal.SIGINT: note, signal.SIGCHLD: note}):
        yield
    for number, frame in came:
        handler = signal.getsignal(number)
        if callable(handler):
            handler(number, frame)
