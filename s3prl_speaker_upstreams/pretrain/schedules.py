"""What changes from step to step, as functions of the step: durations, half cosines, learning rate, margin."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Literal

from ..errors import ConfigError

if TYPE_CHECKING:
    from .config import PretrainConfig

__all__ = ["duration_steps", "half_cosine", "learning_rate", "margin_at", "ramp"]

_DURATION = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(epochs?|steps?|%)?\s*$")


def duration_steps(text: str | float, steps_per_epoch: int, total_steps: int) -> int:
    """Optimizer steps of a duration written as "20 epochs" (or plain 20), "40 steps" or "10%" of the run.

    >>> duration_steps("2 epochs", 100, 1000), duration_steps(0.5, 100, 1000), duration_steps("40 steps", 100, 1000)
    (200, 50, 40)
    >>> duration_steps("10%", 100, 1000)
    100
    """
    match = _DURATION.match(str(text))
    if match is None:
        raise ConfigError(f"duration {text!r}: expected '20 epochs', '40 steps' or '10%'")
    number, unit = float(match.group(1)), (match.group(2) or "epochs")
    if unit.startswith("epoch"):
        return round(number * steps_per_epoch)
    return round(number) if unit.startswith("step") else round(total_steps * number / 100)


def half_cosine(step: int, total: int, start: float, end: float) -> float:
    """``start`` at step 0 falling (or rising) along half a cosine to ``end`` at ``total``.

    >>> [round(half_cosine(s, 10, 1.0, 0.0), 3) for s in (0, 5, 10)]
    [1.0, 0.5, 0.0]
    """
    part = min(max(step / max(total, 1), 0.0), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * part))


def ramp(step: int, steps: int, start: float, end: float) -> float:
    """``start`` at step 0, ``end`` from ``steps`` on, a straight line in between.

    >>> [ramp(s, 4, 0.0, 1.0) for s in (0, 1, 4, 9)], ramp(0, 0, 0.0, 1.0)
    ([0.0, 0.25, 1.0, 1.0], 1.0)
    """
    return start + (end - start) * (min(step / steps, 1.0) if steps else 1.0)


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
    return top if optim.schedule == "constant" else half_cosine(step - warmup, total - warmup, top, low)


def margin_at(
    step: int,
    *,
    start: int,
    end: int,
    initial: float,
    final: float,
    shape: Literal["exp", "linear"] = "exp",
) -> float:
    """Margin (radians) at an optimizer step: ``initial`` until ``start``, ``final`` from ``end`` on.

    In between it rises linearly, or exponentially towards ``final`` (a thousandth is left at ``end``, as in
    WeSpeaker).

    >>> [round(margin_at(s, start=10, end=20, initial=0.0, final=0.2), 3) for s in (0, 10, 15, 20, 99)]
    [0.0, 0.0, 0.194, 0.2, 0.2]
    """
    if step >= end:
        return final
    if step < start:
        return initial
    part = (step - start) / (end - start)
    return initial + (final - initial) * (part if shape == "linear" else 1.0 - 1e-3**part)
