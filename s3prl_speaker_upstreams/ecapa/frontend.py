"""One front-end for all projects and kinds of features; :class:`~.config.FrontendConfig` names the differences.

Short input: every utterance of at least one sample gives at least one frame. Centred dialects pad as their originals
do, the reflection folded back as often as a very short utterance needs (``np.pad`` mode "reflect"). Framed ones
(Kaldi's ``snip_edges``) give one frame below ``win_length`` samples, completed with zeros behind the utterance. Both
equal the original from its own minimum on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BadWaveform, ConfigError
from .config import SAMPLE_RATE, FrontendConfig
from .layers import keep_float32
from .ragged import Ragged, reflect_index
from .wave import FILTERS, GaborBank

__all__ = ["Frontend", "differences"]

PREEMPHASIS = 0.97


def _device_type(x: Tensor) -> str:
    return str(x.device.type)


def _window(cfg: FrontendConfig) -> Tensor:
    if cfg.window == "hamming":
        return torch.hamming_window(cfg.win_length, periodic=cfg.window_periodic)
    hann = torch.hann_window(cfg.win_length, periodic=cfg.window_periodic)
    return hann**0.85 if cfg.window == "povey" else hann


def _mel_filters(cfg: FrontendConfig) -> Tensor:
    """(n_fft // 2 + 1, n_mels) triangular filters.

    In float32 throughout, as the originals compute them: in double precision the upper filters differ by up to 2e-5.
    """
    bins = torch.linspace(0, SAMPLE_RATE // 2, cfg.n_fft // 2 + 1)
    if cfg.mel == "kaldi":
        low, high = (1127 * math.log(1 + hz / 700) for hz in (cfg.fmin, cfg.fmax))
        step = (high - low) / (cfg.n_mels + 1)
        points = low + torch.arange(cfg.n_mels + 2) * step
        bins = 1127 * (1 + bins / 700).log()
    else:
        low, high = (2595 * math.log10(1 + hz / 700) for hz in (cfg.fmin, cfg.fmax))
        points = 700 * (10 ** (torch.linspace(low, high, cfg.n_mels + 2) / 2595) - 1)
    left, middle, right = points[:-2], points[1:-1], points[2:]
    if cfg.mel == "speechbrain":
        slope = (bins[:, None] - middle) / (middle - left)
        rise, fall = 1 + slope, 1 - slope
    else:
        rise = (bins[:, None] - left) / (middle - left)
        fall = (right - bins[:, None]) / (right - middle)
    filters = torch.minimum(rise, fall).clamp(min=0)
    if cfg.mel == "kaldi":
        filters[-1] = 0  # Kaldi leaves the Nyquist bin out
    return filters


def _cosines(cfg: FrontendConfig) -> Tensor:
    """(n_mels, n_mfcc): the orthonormal DCT-II, liftered."""
    band = torch.arange(cfg.n_mels, dtype=torch.float64) + 0.5
    order = torch.arange(cfg.n_mfcc, dtype=torch.float64)
    dct = torch.cos(math.pi / cfg.n_mels * band[:, None] * order) * math.sqrt(2 / cfg.n_mels)
    dct[:, 0] /= math.sqrt(2)
    if cfg.lifter:
        dct *= 1 + cfg.lifter / 2 * torch.sin(math.pi * order / cfg.lifter)
    return dct.float()


def differences(x: Tensor) -> Tensor:
    """Slopes over five frames, the first and last frame repeated beyond the ends. x : (frames, features)

    >>> differences(torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])).flatten().tolist()[2]
    1.0
    """
    last = len(x) - 1
    at = torch.arange(len(x), device=x.device)
    steps = [(x[(at + n).clamp(max=last)] - x[(at - n).clamp(min=0)]) * n for n in (1, 2)]
    return (steps[0] + steps[1]) / 10


class Frontend(nn.Module):
    """Waveforms to normalised features, each utterance by itself.

    cfg : the dialect and the kind of features
    given : what a checkpoint carries of its own, in place of what ``cfg`` makes: ``window`` (win_length,) and ``mel``
        (n_fft // 2 + 1, n_mels), only then part of ``state_dict``; of kind "wave" the filters' parameters, (n_mels,)
        each, which always are

    >>> frontend = Frontend(FrontendConfig())
    >>> features = frontend([torch.randn(16000), torch.randn(1)])
    >>> features.data.shape, features.lengths
    (torch.Size([102, 80]), [101, 1])

    Raises ConfigError if a given tensor has the wrong shape, or a name that this kind does not have.
    """

    window: Tensor
    mel: Tensor
    dct: Tensor

    def __init__(self, cfg: FrontendConfig, **given: Tensor | None) -> None:
        super().__init__()
        self.cfg = cfg
        own: dict[str, Tensor] = {}
        if cfg.kind == "wave":
            self.bank = GaborBank(cfg)
            own = {name: getattr(self.bank, name).detach() for name in FILTERS}
        else:
            own = {"window": _window(cfg), "mel": _mel_filters(cfg)}
        for name, tensor in given.items():
            if tensor is not None and (name not in own or tensor.shape != own[name].shape):
                expected = f"{tuple(own[name].shape)}" if name in own else f"one of {', '.join(own)}"
                raise ConfigError(
                    f"Frontend: got {name} of shape {tuple(tensor.shape)}, expected {expected} for kind={cfg.kind}, "
                    f"win_length={cfg.win_length}, n_fft={cfg.n_fft}, n_mels={cfg.n_mels}"
                )
        for name, made in own.items():
            tensor = given.get(name)
            chosen = made if tensor is None else tensor.detach().float().clone()
            if cfg.kind == "wave":
                getattr(self.bank, name).data.copy_(chosen)
            else:
                self.register_buffer(name, chosen, persistent=tensor is not None)
        if cfg.kind == "mfcc":
            self.register_buffer("dct", _cosines(cfg), persistent=False)

    def own_tensors(self) -> dict[str, Tensor]:
        """What ``cfg`` does not determine, by the names of the constructor: a checkpoint has to keep it."""
        if self.cfg.kind == "wave":
            return {name: getattr(self.bank, name).detach() for name in FILTERS}
        made = {"window": _window(self.cfg), "mel": _mel_filters(self.cfg)}
        return {name: now for name in made if not torch.equal((now := getattr(self, name)).cpu(), made[name])}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frontend:
        # Spectra have no meaning in half precision: after .half() the features are still computed in float32.
        return keep_float32(self, super()._apply, fn, recurse)

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return self.cfg.hop_length

    def frames(self, n_samples: int) -> int:
        """Frames of an utterance of ``n_samples`` >= 1 samples.

        >>> Frontend(FrontendConfig(center=False)).frames(16000)
        98
        """
        if self.cfg.center:
            return 1 + n_samples // self.cfg.hop_length
        return 1 + max(0, n_samples - self.cfg.win_length) // self.cfg.hop_length

    def forward(self, wavs: Sequence[Tensor]) -> Ragged:
        """Features of ``wavs``, a list of (samples,) float tensors in +-1: Ragged of (frames, width) in float32.

        Raises BadWaveform if the list is empty or a waveform is not one-dimensional floating point of at least a
        sample.
        """
        raw = self.raw(wavs)
        return Ragged(torch.cat([self._normalise(x) for x in raw.split()]), raw.lengths)

    def raw(self, wavs: Sequence[Tensor]) -> Ragged:
        """As :meth:`forward`, before the normalisation."""
        if self.cfg.kind != "mfcc":
            return self.log_mel(wavs)
        bands = self.log_mel(wavs)
        with torch.autocast(_device_type(bands.data), enabled=False):
            found = []
            for x in bands.split():
                parts = [x @ self.dct]
                for _ in range(self.cfg.deltas):
                    parts.append(differences(parts[-1]))
                found.append(torch.cat(parts, 1))
        return Ragged(torch.cat(found), bands.lengths)

    def log_mel(self, wavs: Sequence[Tensor]) -> Ragged:
        """Log energies of the mel bands, or of the learned filters, before the normalisation: (frames, n_mels)."""
        cfg = self.cfg
        if len(wavs) == 0:
            raise BadWaveform("got no waveforms, expected a list of at least one")
        frames: list[Tensor] = []
        for i, wav in enumerate(wavs):
            if wav.dim() != 1 or not wav.is_floating_point() or len(wav) == 0:
                raise BadWaveform(
                    f"waveform {i}: got {wav.dtype} of shape {tuple(wav.shape)}, expected a one-dimensional "
                    "floating-point tensor of at least one sample, 16 kHz, in +-1"
                )
            if cfg.kind != "wave":
                frames.append(self._frame(wav.to(self.window)))
        with torch.autocast(_device_type(wavs[0]), enabled=False):
            if cfg.kind == "wave":
                frames = self.bank([wav.to(self.bank.center) for wav in wavs])
            x, lengths = torch.cat(frames), [len(utterance) for utterance in frames]
            power = x if cfg.kind == "wave" else self._power(x, lengths)
            power = power + cfg.log_floor if cfg.log_floor_mode == "add" else power.clamp(min=cfg.log_floor)
            x = power.log() if cfg.log == "ln" else 10 * power.log10()
        if cfg.top_db is not None:
            x = torch.cat([torch.maximum(u, u.max() - cfg.top_db) for u in x.split(lengths)])
        return Ragged(x, lengths)

    def _power(self, x: Tensor, lengths: list[int]) -> Tensor:
        """(frames, win_length) -> (frames, n_mels)"""
        cfg = self.cfg
        if cfg.remove_dc:
            x = x - x.mean(1, keepdim=True)
        if cfg.preemphasis == "frame":
            # Not sub(alpha=): its fused rounding moves the lowest bands by 5e-5.
            x = torch.cat([x[:, :1] - PREEMPHASIS * x[:, :1], x[:, 1:] - PREEMPHASIS * x[:, :-1]], 1)
        # The window's place among the zeros changes only the rounding of the spectrum: it is the originals' place.
        before = (cfg.n_fft - cfg.win_length) // 2 if cfg.center else 0
        x = F.pad(x * self.window, (before, cfg.n_fft - cfg.win_length - before))
        spectrum = torch.fft.rfft(x)
        # |X|^2 summed by the filters: real and imaginary parts are squared side by side and share their filter.
        squares = torch.view_as_real(spectrum).flatten(1).square()
        mel = self.mel.repeat_interleave(2, 0)
        # One product per utterance: its rounding depends on the number of rows, and dividing by the deviation of
        # two nearly equal frames can blow that up a thousandfold.
        return torch.cat([x @ mel for x in squares.split(lengths)])

    def _frame(self, wav: Tensor) -> Tensor:
        """(frames, win_length) view or copy of one utterance."""
        cfg = self.cfg
        if cfg.scale != 1:
            wav = wav * cfg.scale
        if cfg.preemphasis == "waveform":
            before = torch.cat([wav[1:2] if len(wav) > 1 else wav, wav[:-1]])
            wav = wav - PREEMPHASIS * before
        pad = cfg.win_length // 2
        if not cfg.center:
            wav = F.pad(wav, (0, max(0, cfg.win_length - len(wav))))
        elif cfg.center_pad == "zeros":
            wav = F.pad(wav, (pad, pad))
        elif len(wav) > pad:
            wav = F.pad(wav[None], (pad, pad), mode="reflect")[0]
        else:
            index = reflect_index(np.arange(-pad, len(wav) + pad), len(wav))
            wav = wav[torch.from_numpy(index).to(wav.device)]
        return wav.unfold(0, cfg.win_length, cfg.hop_length)

    def _normalise(self, x: Tensor) -> Tensor:
        """(frames, n_mels) of one utterance, normalised over its frames."""
        if self.cfg.normalisation == "none":
            return x
        x = x - x.mean(0)
        if self.cfg.normalisation == "mean_var":
            x = x / (x.square().mean(0) + self.cfg.norm_eps).sqrt()
        return x
