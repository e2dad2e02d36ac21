"""Features of one utterance, and what is kept of them: all frames, sampled frames or their mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cka_addon import align
from cka_addon.align import Clock
from cka_addon.models import ModelInfo


@dataclass
class Utterance:
    """Features of one utterance.

    layers : per model, one (frames, width) tensor per layer;  seconds : length of the recording
    instants : per model, (frames,) seconds of sampled frames, or None where all frames are there
    power : (layers of all models,) mean square of a frame where only its mean was stored, else None
    clocks : per model, when its frames are;  wav : (samples,) float32 at 16 kHz where it was asked for
    """

    id: str
    layers: list[list[Tensor]]
    seconds: float
    instants: list[np.ndarray | None]
    clocks: Sequence[Clock] = field(default_factory=tuple)
    wav: Tensor | None = None
    power: np.ndarray | None = None

    def frame_power(self) -> np.ndarray:
        """Mean square norm of a frame in every layer of every model, (layers,) float64: what a mean is judged by."""
        if self.power is not None:
            return self.power
        return frame_power(self.layers)

    @property
    def times(self) -> list[np.ndarray]:
        """Per model, the centre of every frame in seconds, (frames,); an utterance mean lies in the middle.

        >>> one = Utterance("a", [[torch.zeros(3, 4)]], 0.1, [None], [Clock(0.02, 0.0125)])
        >>> one.times[0].round(4).tolist()
        [0.0125, 0.0325, 0.0525]
        """
        found = []
        for clock, layers, instants in zip(self.clocks, self.layers, self.instants, strict=True):
            frames = len(layers[0])
            if instants is not None:
                found.append(clock.first_center + clock.shift * clock.nearest(instants))
            elif not clock.shift or frames == 1:
                found.append(np.full(frames, self.seconds / 2))
            else:
                found.append(clock.times(frames))
        return found


def frame_power(layers: Sequence[Sequence[Tensor]]) -> np.ndarray:
    """Mean square norm of a frame in every layer of every model, (layers,) float64."""
    return np.array([float(x.double().square().sum()) / max(1, len(x)) for model in layers for x in model])


def reduce_utterance(
    layers: list[list[Tensor]],
    infos: Sequence[ModelInfo],
    utterance: str,
    seconds: float,
    *,
    keep: str,
    frames: int,
    seed: int,
) -> tuple[list[list[Tensor]], np.ndarray | None]:
    """All frames, the frames nearest to `frames` random instants, or the mean over the utterance, for every model."""
    if keep == "means":
        return [[x.double().mean(0, keepdim=True).float() for x in model] for model in layers], None
    if keep == "frames":
        return layers, None
    instants = align.sample_instants(utterance, seconds, frames, seed)
    picks = [info.clock.nearest(instants) for info in infos]
    valid = np.ones(len(instants), bool)
    for pick, model in zip(picks, layers, strict=True):
        valid &= (pick >= 0) & (pick < len(model[0]))
    chosen = [
        [x[torch.from_numpy(pick[valid]).to(x.device)] for x in model]
        for pick, model in zip(picks, layers, strict=True)
    ]
    return chosen, instants[valid]
