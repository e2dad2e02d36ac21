"""A learnable filter bank on samples: LEAF's Gabor filters and Gaussian pooling (arXiv 2101.08596).

LEAF rather than SincNet (arXiv 1808.00158): its energies (squared modulus, low-pass, logarithm) are log-mel features
whose filters can move and widen, it starts on the mel filters themselves, and its frames have the same centres, so that
what changes against ``kind: log_mel`` is the filters alone. In place of LEAF's per-channel energy normalisation stands
the logarithm and normalisation of the other kinds, for the same reason. Squared moduli are taken every ``wave_stride``
samples instead of every one: they are band-limited to some hundreds of hertz, and the pooling averages them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .config import SAMPLE_RATE, FrontendConfig
from .layers import keep_float32

__all__ = ["FILTERS", "GaborBank"]

FILTERS = ("center", "width", "pooling")
"""Names of the parameters, (n_mels,) each."""

_HALF = math.sqrt(2 * math.log(2))  # half width at half magnitude of a Gaussian, in deviations


class GaborBank(nn.Module):
    """Energies of Gabor filters, sampled like frames.

    center : radians per sample;  width : deviation of the filter's envelope, samples;  pooling : deviation of the
    low-pass window, as a part of half the window's length. The first two start on the mel filters of ``cfg``.

    >>> bank = GaborBank(FrontendConfig(kind="wave", n_mels=40))
    >>> [tuple(x.shape) for x in bank([torch.randn(16000), torch.randn(1)])]
    [(101, 40), (1, 40)]
    """

    def __init__(self, cfg: FrontendConfig) -> None:
        super().__init__()
        if cfg.hop_length % cfg.wave_stride or (cfg.win_length // 2) % cfg.wave_stride:
            raise ConfigError(
                f"FrontendConfig: got wave_stride={cfg.wave_stride}, expected a divisor of hop_length="
                f"{cfg.hop_length} and of half of win_length={cfg.win_length}"
            )
        self.cfg = cfg
        self.reach = cfg.win_length // 2  # filters and pooling are 2 reach + 1 samples long
        low, high = (2595 * math.log10(1 + hz / 700) for hz in (cfg.fmin, cfg.fmax))
        points = 700 * (10 ** (torch.linspace(low, high, cfg.n_mels + 2) / 2595) - 1)
        # the square root of a triangle is above a half over three quarters of its base
        full_width = 0.75 * (points[2:] - points[:-2]) * 2 * math.pi / SAMPLE_RATE
        self.center = nn.Parameter(points[1:-1] * 2 * math.pi / SAMPLE_RATE)
        self.width = nn.Parameter((2 * _HALF / full_width).clamp(self._narrowest(), self._widest()))
        self.pooling = nn.Parameter(torch.full((cfg.n_mels,), 0.4))

    @staticmethod
    def _narrowest() -> float:
        return 4 * _HALF / math.pi

    def _widest(self) -> float:
        return (2 * self.reach + 1) * _HALF / math.pi

    def frames(self, samples: int) -> int:
        """Frames of an utterance of ``samples`` >= 1 samples."""
        if self.cfg.center:
            return 1 + samples // self.cfg.hop_length
        return 1 + max(0, samples - self.cfg.win_length) // self.cfg.hop_length

    def kernels(self) -> tuple[Tensor, Tensor]:
        """Real and imaginary parts of the filters one behind the other (2 n_mels, 1, length), and the low-pass windows
        (n_mels, 1, length / stride)."""
        t = torch.arange(-self.reach, self.reach + 1, device=self.center.device, dtype=torch.float32)
        center = self.center.float().clamp(0, math.pi)[:, None]
        width = self.width.float().clamp(self._narrowest(), self._widest())[:, None]
        envelope = torch.exp(-0.5 * (t / width).square()) / (math.sqrt(2 * math.pi) * width)
        filters = torch.cat([envelope * torch.cos(center * t), envelope * torch.sin(center * t)])
        steps = self.reach // self.cfg.wave_stride
        u = torch.arange(-steps, steps + 1, device=t.device, dtype=torch.float32) / max(1, steps)
        pooling = self.pooling.float().clamp(2 / (2 * self.reach + 1), 0.5)[:, None]
        windows = torch.exp(-0.5 * (u / pooling).square())
        return filters[:, None], (windows / windows.sum(1, keepdim=True))[:, None]

    def forward(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Energies of each utterance, (samples,) -> (frames, n_mels), before the logarithm. Beyond its ends it is
        silent."""
        filters, windows = self.kernels()
        found: list[Tensor] = []
        for _, run in groupby(wavs, key=len):  # neighbours of equal length in one operation
            found += self._of_one_length(torch.stack(list(run)), filters, windows).unbind(0)
        return found

    def _of_one_length(self, wavs: Tensor, filters: Tensor, windows: Tensor) -> Tensor:
        """(utterances, samples) -> (utterances, frames, n_mels)"""
        cfg, samples = self.cfg, wavs.shape[1]
        frames = self.frames(samples)
        first = 0 if cfg.center else self.reach  # sample on which frame 0 is centred
        begin = first - 2 * self.reach
        end = first + (frames - 1) * cfg.hop_length + 2 * self.reach + 1
        x = F.pad(wavs * cfg.scale, (-begin, max(0, end - samples)))[:, : end - begin]
        z = F.conv1d(x[:, None], filters, stride=cfg.wave_stride)
        energy = z[:, : cfg.n_mels].square() + z[:, cfg.n_mels :].square()
        # what the window reads beyond the utterance's ends is silence, not the tails of the filters
        at = begin + self.reach + cfg.wave_stride * torch.arange(energy.shape[2], device=x.device)
        energy = energy * ((at >= 0) & (at < samples))
        pooled = F.conv1d(energy, windows, stride=cfg.hop_length // cfg.wave_stride, groups=cfg.n_mels)
        return pooled.transpose(1, 2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GaborBank:
        return keep_float32(self, super()._apply, fn, recurse)
