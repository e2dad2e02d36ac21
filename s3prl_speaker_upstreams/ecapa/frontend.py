"""One log-mel front-end for all projects; :class:`~.config.FrontendConfig` names the differences.

Short input: every utterance of at least one sample gives at least one frame. Centred dialects pad as their originals do, the
reflection folded back as often as a very short utterance needs (``np.pad`` mode "reflect"). Framed ones (Kaldi's
``snip_edges``) give one frame below ``win_length`` samples, completed with zeros behind the utterance. Both equal the original
from its own minimum on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BadWaveform, ConfigError
from .config import SAMPLE_RATE, FrontendConfig
from .ragged import Ragged, reflect_index

__all__ = ["Frontend"]

PREEMPHASIS = 0.97


def _window(cfg: FrontendConfig) -> Tensor:
    if cfg.window == "hamming":
        return torch.hamming_window(cfg.win_length, periodic=cfg.window_periodic)
    hann = torch.hann_window(cfg.win_length, periodic=cfg.window_periodic)
    return hann**0.85 if cfg.window == "povey" else hann


def _mel_scale(hz: np.ndarray | float, cfg: FrontendConfig) -> np.ndarray:
    # Kaldi writes 1127 ln, the others 2595 log10: equal but for the last digits.
    return 1127.0 * np.log1p(np.asarray(hz) / 700.0) if cfg.mel == "kaldi" else 2595.0 * np.log10(1 + np.asarray(hz) / 700)


def _mel_filters(cfg: FrontendConfig) -> Tensor:
    """(n_fft // 2 + 1, n_mels) triangular filters."""
    points = np.linspace(_mel_scale(cfg.fmin, cfg), _mel_scale(cfg.fmax, cfg), cfg.n_mels + 2)
    bins = np.linspace(0, SAMPLE_RATE / 2, cfg.n_fft // 2 + 1)
    if cfg.mel == "kaldi":
        bins = _mel_scale(bins, cfg)
    else:
        points = 700 * (10 ** (points / 2595) - 1)
    left, middle, right = points[:-2], points[1:-1], points[2:]
    rise = (bins[:, None] - left) / (middle - left)
    fall = 2 - rise if cfg.mel == "speechbrain" else (right - bins[:, None]) / (right - middle)
    filters = np.maximum(0, np.minimum(rise, fall))
    if cfg.mel == "kaldi":
        filters[-1] = 0  # Kaldi leaves the Nyquist bin out
    return torch.from_numpy(filters).float()


class Frontend(nn.Module):
    """Waveforms to normalised log-mel features, each utterance by itself.

    cfg : the dialect
    window : (win_length,) and mel : (n_fft // 2 + 1, n_mels) replace the computed ones where a checkpoint carries its own;
        only then are they part of ``state_dict``

    >>> frontend = Frontend(FrontendConfig())
    >>> features = frontend([torch.randn(16000), torch.randn(1)])
    >>> features.data.shape, features.lengths
    (torch.Size([102, 80]), [101, 1])

    Raises ConfigError if a given buffer has the wrong shape.
    """

    def __init__(self, cfg: FrontendConfig, window: Tensor | None = None, mel: Tensor | None = None) -> None:
        super().__init__()
        self.cfg = cfg
        for name, given, own in (("window", window, _window(cfg)), ("mel", mel, _mel_filters(cfg))):
            if given is not None and given.shape != own.shape:
                raise ConfigError(
                    f"Frontend: got {name} of shape {tuple(given.shape)}, expected {tuple(own.shape)} for "
                    f"win_length={cfg.win_length}, n_fft={cfg.n_fft}, n_mels={cfg.n_mels}"
                )
            buffer = own if given is None else given.detach().float().clone()
            self.register_buffer(name, buffer, persistent=given is not None)

    def frames(self, n_samples: int) -> int:
        """Frames of an utterance of ``n_samples`` >= 1 samples.

        >>> Frontend(FrontendConfig(center=False)).frames(16000)
        98
        """
        if self.cfg.center:
            return 1 + n_samples // self.cfg.hop_length
        return 1 + max(0, n_samples - self.cfg.win_length) // self.cfg.hop_length

    def forward(self, wavs: Sequence[Tensor]) -> Ragged:
        """Features of ``wavs``, a list of (samples,) float tensors in +-1: Ragged of (frames, n_mels) in float32.

        Raises BadWaveform if the list is empty or a waveform is not one-dimensional floating point of at least a sample.
        """
        raw = self.log_mel(wavs)
        return Ragged(torch.cat([self._normalise(x) for x in raw.split()]), raw.lengths)

    def log_mel(self, wavs: Sequence[Tensor]) -> Ragged:
        """As :meth:`forward`, before the normalisation."""
        cfg = self.cfg
        if len(wavs) == 0:
            raise BadWaveform("got no waveforms, expected a list of at least one")
        lengths, frames = [], []
        for i, wav in enumerate(wavs):
            if wav.dim() != 1 or not wav.is_floating_point() or len(wav) == 0:
                raise BadWaveform(
                    f"waveform {i}: got {wav.dtype} of shape {tuple(wav.shape)}, expected a one-dimensional floating-point "
                    "tensor of at least one sample, 16 kHz, in +-1"
                )
            frames.append(self._frame(wav.to(self.window)))
            lengths.append(len(frames[-1]))
        with torch.autocast(self.window.device.type, enabled=False):
            x = torch.cat(frames)
            if cfg.remove_dc:
                x = x - x.mean(1, keepdim=True)
            if cfg.preemphasis == "frame":
                x = torch.cat([x[:, :1] * (1 - PREEMPHASIS), torch.sub(x[:, 1:], x[:, :-1], alpha=PREEMPHASIS)], 1)
            spectrum = torch.fft.rfft(x * self.window, n=cfg.n_fft)
            # |X|^2 summed by the filters: real and imaginary parts are squared side by side and share their filter.
            squares = torch.view_as_real(spectrum).flatten(1).square()
            power = squares @ self.mel.repeat_interleave(2, 0)
            power = power + cfg.log_floor if cfg.log_floor_mode == "add" else power.clamp(min=cfg.log_floor)
            x = power.log() if cfg.log == "ln" else 10 * power.log10()
        if cfg.top_db is not None:
            x = torch.cat([torch.maximum(u, u.max() - cfg.top_db) for u in x.split(lengths)])
        return Ragged(x, lengths)

    def _frame(self, wav: Tensor) -> Tensor:
        """(frames, win_length) view or copy of one utterance."""
        cfg = self.cfg
        if cfg.scale != 1:
            wav = wav * cfg.scale
        if cfg.preemphasis == "waveform":
            wav = torch.cat([wav[:1] - PREEMPHASIS * wav[1:2] if len(wav) > 1 else wav * (1 - PREEMPHASIS), wav[1:] - PREEMPHASIS * wav[:-1]])
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
