"""ECAPA-TDNN (arXiv 2005.07143) on real frames only: every utterance gets what it would get alone, in any batch.

The originals pad a batch to its longest utterance and their convolutions read that padding: SpeechBrain's ``block_4``
of a short utterance is off by 75 % beside a long one. Here a batch is a :class:`~.ragged.Ragged` matrix of real
frames; before every convolution the frames beyond an utterance's own ends hold what a run alone would see there (its
reflection, or zeros), and means, softmax and batch statistics run over real frames only.

Two ways through the same weights: this module's differentiable one (training, fine-tuning), and :mod:`.inference`,
which the model takes by itself in eval mode when no gradients are recorded.

Short input: any utterance of at least one frame works. A reflection longer than the utterance is folded back
repeatedly (as ``np.pad`` does); the variance of a single frame is zero before its floor, also where the original
divides by n - 1.

Fine-tuning: in train mode BatchNorm takes its statistics over the real frames of the batch. Where a batch holds a
single value per channel (one frame in all; for ``pool_norm`` and ``embedding_norm`` one utterance) no variance exists:
the running statistics are used, and not updated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .config import EcapaConfig, FrontendConfig
from .frontend import Frontend
from .inference import Plan
from .ragged import Gaps, Ragged, patches

__all__ = ["OUTPUTS", "BatchNorm", "Ecapa", "SpeakerEncoder"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
OUTPUTS = ("hidden_states", "mfa", "pooled", "embedding")


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of (values, channels); a single value is normalised by the running statistics.

    >>> norm = BatchNorm(3).train()
    >>> norm(torch.ones(1, 3)).isfinite().all().item(), norm.num_batches_tracked.item()
    (True, 0)
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        self.num_batches_tracked.add_(1)
        # As a one-row image in channels-last order, which PyTorch's CPU kernel reads in memory order.
        image = x.view(1, 1, *x.shape).permute(0, 3, 1, 2)
        y = F.batch_norm(
            image, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
        )
        return y.permute(0, 2, 3, 1).reshape(x.shape)


class ConvNorm(nn.Module):
    """Convolution, ReLU, batch normalisation (the last where ``norm``)."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 1, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel_size)
        if norm:
            self.norm = BatchNorm(outputs)

    def finish(self, y: Tensor) -> Tensor:
        """What follows the convolution: y : (frames, channels)."""
        y = F.relu(y)
        return self.norm(y) if hasattr(self, "norm") else y

    def forward(self, x: Tensor) -> Tensor:
        """Pointwise: x : (frames, channels)."""
        return self.finish(_pointwise(x, self.conv))


def _pointwise(x: Tensor, conv: nn.Conv1d) -> Tensor:
    return F.linear(x, conv.weight[:, :, 0], conv.bias)


class SqueezeExcitation(nn.Module):
    """Per-utterance channel gains from the mean over its frames."""

    def __init__(self, channels: int, bottleneck: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels, bottleneck, 1)
        self.conv2 = nn.Conv1d(bottleneck, channels, 1)

    def gains(self, mean: Tensor) -> Tensor:
        """mean : (utterances, channels) -> (utterances, channels)."""
        return torch.sigmoid(_pointwise(F.relu(_pointwise(mean, self.conv1)), self.conv2))


class Block(nn.Module):
    """SE-Res2 block: pointwise, Res2 convolutions of kernel 3, pointwise, squeeze-excitation, residual."""

    def __init__(self, cfg: EcapaConfig, dilation: int) -> None:
        super().__init__()
        self.cfg, self.dilation = cfg, dilation
        width = cfg.channels // cfg.res2_scale
        self.tdnn1 = ConvNorm(cfg.channels, cfg.channels)
        self.res2 = nn.ModuleList(ConvNorm(width, width, 3) for _ in range(cfg.res2_scale - 1))
        self.tdnn2 = ConvNorm(cfg.channels, cfg.channels)
        self.se = SqueezeExcitation(cfg.channels, cfg.se_channels)

    def forward(self, x: Ragged) -> Ragged:
        y = self.tdnn2(self._res2(Ragged(self.tdnn1(x.data), x.lengths)))
        grids = list(Ragged(y, x.lengths).grids())
        gains = self.se.gains(_join([grid.mean(1) for grid in grids]))
        out, first = [], 0
        for before, grid in zip(x.grids(), grids, strict=True):
            out.append(torch.addcmul(before, grid, gains[first : first + len(grid), None]).flatten(0, 1))
            first += len(grid)
        return Ragged(_join(out), x.lengths)

    def _res2(self, x: Ragged) -> Tensor:
        chunks = x.data.chunk(self.cfg.res2_scale, 1)
        first = self.cfg.res2_identity == "first"
        outputs, y = [], None
        for tdnn, chunk in zip(self.res2, chunks[1:] if first else chunks[:-1], strict=True):
            y = chunk if y is None else chunk + y
            y = tdnn.finish(self._dilated(Ragged(y, x.lengths), tdnn.conv))
            outputs.append(y)
        return torch.cat([chunks[0], *outputs] if first else [*outputs, chunks[-1]], 1)

    def _dilated(self, x: Ragged, conv: nn.Conv1d) -> Tensor:
        """Convolution of kernel 3 within each utterance: (frames, channels) -> (frames, channels)."""
        width, zeros = self.dilation, self.cfg.padding == "zeros"
        batch, length = len(x.lengths), x.lengths[0]
        equal = all(n == length for n in x.lengths)
        gaps = None if equal else Gaps.of(x.lengths, width, x.data.device)
        if equal:
            rows = x.data.view(batch, length, -1)
            if not zeros:
                rows = _mirror(rows, width)
        elif zeros:
            rows = x.data.new_zeros(1, len(gaps.source), x.data.shape[1])
            rows = rows[0].index_copy(0, gaps.real, x.data)[None]
        else:
            # Embedding rather than indexing: the same gather, with a fast backward pass.
            rows = F.embedding(gaps.source, x.data)[None]
        # (batch, rows, channels) as an image of one line, channels last in memory: no copies.
        y = F.conv2d(
            rows.unsqueeze(1).permute(0, 3, 1, 2),
            conv.weight[:, :, None],
            conv.bias,
            padding=(0, width if equal and zeros else 0),
            dilation=(1, width),
        )
        y = y.permute(0, 2, 3, 1).flatten(0, 2)
        return y if equal else F.embedding(gaps.real - width, y)


def _mirror(x: Tensor, width: int) -> Tensor:
    """x : (batch, frames, channels) with ``width`` mirrored frames before and behind."""
    if x.shape[1] > width:
        return torch.cat([x[:, 1 : width + 1].flip(1), x, x[:, -width - 1 : -1].flip(1)], 1)
    return x[:, Gaps.of([x.shape[1]], width, x.device).source]


class Pooling(nn.Module):
    """Attentive statistics pooling: (frames, M) of each utterance -> (2M,) weighted mean and deviation."""

    def __init__(self, cfg: EcapaConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.mfa_channels
        self.conv1 = nn.Conv1d(3 * width if cfg.attention_context else width, cfg.attention_channels, 1)
        if cfg.attention_hidden == "relu_norm_tanh":
            self.norm = BatchNorm(cfg.attention_channels)
        self.conv2 = nn.Conv1d(cfg.attention_channels, width, 1)

    def forward(self, x: Ragged) -> Tensor:
        grids = list(x.grids())
        hidden = F.linear(x.data, self.conv1.weight[:, : self.cfg.mfa_channels, 0], self.conv1.bias)
        if self.cfg.attention_context:
            # The context is constant over an utterance: its part of the product is computed once for each.
            context = _join([self._context(grid) for grid in grids])
            context = F.linear(context.to(x.data.dtype), self.conv1.weight[:, self.cfg.mfa_channels :, 0])
            repeats = torch.tensor(x.lengths, device=context.device)
            hidden = hidden + context.repeat_interleave(repeats, 0, output_size=len(x.data))
        if self.cfg.attention_hidden == "relu_norm_tanh":
            hidden = self.norm(F.relu(hidden))
        scores = Ragged(_pointwise(torch.tanh(hidden), self.conv2), x.lengths)
        return _join([self._weighted(grid, score) for grid, score in zip(grids, scores.grids(), strict=True)])

    def _context(self, x: Tensor) -> Tensor:
        """Mean and deviation over the frames of x : (utterances, frames, M)."""
        cfg, frames = self.cfg, x.shape[1]
        mean, var = _Statistics.apply(x, None)
        if cfg.context_var_unbiased:
            var = var * (frames / max(1, frames - 1))
        floor = cfg.context_var_floor
        var = var + floor if cfg.context_var_floor_mode == "add" else var.clamp(min=floor)
        return torch.cat([mean, var.sqrt()], 1)

    def _weighted(self, x: Tensor, scores: Tensor) -> Tensor:
        """Mean and deviation under softmax weights over the frames; both (utterances, frames, M)."""
        # Also where the original takes moments (cfg.pool_var): the same number, without their cancellation.
        mean, var = _Statistics.apply(x, scores)
        return torch.cat([mean, var.clamp(min=self.cfg.pool_var_floor).sqrt()], 1)


class _Statistics(torch.autograd.Function):
    """Mean and variance over the frames of x : (utterances, frames, M), equally weighted or by softmax of scores.

    In float32 at least. The backward pass is written out because it is short: the weighted sum of the
    deviations d from the mean is zero, so the variance has no gradient through the mean. Recorded operations would make
    about twice the passes over memory.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if scores is None:
                weights, mean = None, x.mean(1)
                d = x - mean[:, None]
                var = d.square().mean(1)
            else:
                weights = scores.to(x.dtype).softmax(1)
                mean = (weights * x).sum(1)
                d = x - mean[:, None]
                var = (weights * d).mul_(d).sum(1)
        ctx.save_for_backward(weights, d, var)
        return mean, var

    @staticmethod
    def backward(ctx, to_mean: Tensor, to_var: Tensor) -> tuple[Tensor, Tensor | None]:
        weights, d, var = ctx.saved_tensors
        to_mean, to_var, var = to_mean[:, None], to_var[:, None], var[:, None]
        if weights is None:
            return torch.addcmul(to_mean, d, 2 * to_var).div_(d.shape[1]).to(ctx.dtype), None
        half = d * to_var
        to_x = torch.add(to_mean, half, alpha=2).mul_(weights)
        to_scores = half.add_(to_mean).mul_(d).sub_(to_var * var).mul_(weights)
        return to_x.to(ctx.dtype), to_scores.to(ctx.dtype)


def _join(parts: list[Tensor]) -> Tensor:
    """As torch.cat, without the copy where there is only one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Ecapa(nn.Module):
    """The network from features to embedding.

    >>> model = Ecapa(EcapaConfig(channels=32, mfa_channels=96)).eval()
    >>> out = model(Ragged(torch.randn(50, 80), [40, 10]), outputs=("hidden_states", "embedding"))
    >>> len(out["hidden_states"]), out["hidden_states"][3].data.shape, out["embedding"].shape
    (4, torch.Size([50, 32]), torch.Size([2, 192]))
    """

    def __init__(self, cfg: EcapaConfig, dtype: str = "float32") -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ConfigError(f"Ecapa: got dtype={dtype!r}, expected one of {list(DTYPES)}")
        self.cfg, self.dtype = cfg, dtype
        self._plan: tuple[tuple, Plan] | None = None
        self.block_1 = ConvNorm(cfg.n_mels, cfg.channels, cfg.kernel_size)
        self.block_2, self.block_3, self.block_4 = (Block(cfg, d) for d in cfg.dilations)
        self.mfa = ConvNorm(3 * cfg.channels, cfg.mfa_channels, norm=cfg.mfa_norm)
        self.pool = Pooling(cfg)
        self.pool_norm = BatchNorm(2 * cfg.mfa_channels)
        self.embedding = nn.Linear(2 * cfg.mfa_channels, cfg.embedding_dim)
        if cfg.embedding_norm:
            self.embedding_norm = BatchNorm(cfg.embedding_dim)

    def forward(
        self, features: Ragged, outputs: Sequence[str] = ("hidden_states",)
    ) -> dict[str, Tensor | Ragged | tuple[Ragged, ...]]:
        """The asked ``outputs``, computing no further than needed.

        features : Ragged of (frames, n_mels)
        "hidden_states" : tuple of Ragged (frames, channels), block_1 .. block_4; "mfa" : Ragged (frames, mfa_channels);
        "pooled" : (utterances, 2 mfa_channels); "embedding" : (utterances, embedding_dim)

        Raises ConfigError on an unknown output.
        """
        unknown = [name for name in outputs if name not in OUTPUTS]
        if unknown or not outputs:
            raise ConfigError(f"Ecapa: got outputs={list(outputs)}, expected some of {list(OUTPUTS)}")
        deep = [name for name in outputs if name != "hidden_states"]
        mfa = None
        if self._differentiable(features.data):
            states = self._blocks(features)
        else:
            states, mfa = self._folded()(features, mfa=bool(deep))
        found = self._head(states, deep, mfa) if deep else {}
        return {name: states if name == "hidden_states" else found[name] for name in outputs}

    def head(self, hidden_states: Sequence[Ragged], outputs: Sequence[str]) -> dict[str, Tensor | Ragged]:
        """Some of "mfa", "pooled", "embedding" from the hidden states of :meth:`forward`.

        Raises ConfigError on an unknown output.
        """
        unknown = [name for name in outputs if name not in OUTPUTS[1:]]
        if unknown or not outputs:
            raise ConfigError(f"Ecapa.head: got outputs={list(outputs)}, expected some of {list(OUTPUTS[1:])}")
        return self._head(hidden_states, outputs, None)

    def _head(self, states: Sequence[Ragged], outputs: Sequence[str], mfa: Ragged | None) -> dict[str, Tensor | Ragged]:
        if mfa is None and self._differentiable(states[0].data):
            mfa = Ragged(self.mfa(torch.cat([h.data for h in states[1:]], 1)), states[0].lengths)
        elif mfa is None:
            mfa = self._folded().mfa(states)
        found: dict = {"mfa": mfa}
        if "pooled" in outputs or "embedding" in outputs:
            found["pooled"] = self.pool(mfa)
        if "embedding" in outputs:
            x = self.embedding(self.pool_norm(found["pooled"]))
            found["embedding"] = self.embedding_norm(x) if self.cfg.embedding_norm else x
        return {name: found[name] for name in outputs}

    def _differentiable(self, x: Tensor) -> bool:
        """Whether to take the path that records gradients.

        It is also the one that torch.compile can see through, and that a model converted to another precision takes.
        """
        if self.training or torch.compiler.is_compiling() or self.block_1.conv.weight.dtype != torch.float32:
            return True
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))

    def train(self, mode: bool = True) -> Ecapa:
        """As ``nn.Module.train``; also forgets the folded weights."""
        self._plan = None
        return super().train(mode)

    def _folded(self) -> Plan:
        """The folded weights, made anew when a parameter or buffer has changed since."""
        tensors = [*self.parameters(), *self.buffers()]
        # Changes through ``.data`` leave the version alone; three values catch those that touch every parameter.
        probes = (self.block_1.conv.bias, self.block_4.tdnn2.conv.bias, self.mfa.conv.bias)
        state = (
            self.dtype,
            torch.stack([p.detach()[0] for p in probes]).tolist(),
            *((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors),
        )
        if self._plan is None or self._plan[0] != state:
            self._plan = state, Plan(self, DTYPES[self.dtype])
        return self._plan[1]

    def __getstate__(self) -> dict:
        # Weights in the layout of the processor at hand can be neither copied nor pickled.
        return {**self.__dict__, "_plan": None}

    def _blocks(self, features: Ragged) -> tuple[Ragged, ...]:
        cfg = self.cfg
        x, lengths = patches(features, cfg.kernel_size, cfg.stride, cfg.padding)
        conv = self.block_1.conv
        x = F.linear(x, conv.weight.transpose(1, 2).flatten(1), conv.bias)
        states = [Ragged(self.block_1.finish(x), lengths)]
        total = states[0].data
        for block in (self.block_2, self.block_3, self.block_4):
            states.append(block(Ragged(total, lengths) if cfg.block_wiring == "cumulative" else states[-1]))
            if cfg.block_wiring == "cumulative":
                total = total + states[-1].data
        return tuple(states)


class SpeakerEncoder(nn.Module):
    """Front-end and network: waveforms in, hidden states out.

    >>> encoder = SpeakerEncoder(EcapaConfig(channels=32, mfa_channels=96), FrontendConfig()).eval()
    >>> out = encoder([torch.randn(16000), torch.randn(800)])
    >>> [h.lengths for h in out["hidden_states"]], encoder.downsample_rate, encoder.hidden_size
    ([[101, 6], [101, 6], [101, 6], [101, 6]], 160, 32)
    """

    def __init__(
        self, ecapa: EcapaConfig, frontend: FrontendConfig, dtype: str = "float32", **frontend_buffers: Tensor
    ) -> None:
        super().__init__()
        if ecapa.n_mels != frontend.n_mels:
            raise ConfigError(f"got {frontend.n_mels} mel bands and a network for {ecapa.n_mels}; they must be equal")
        self.frontend = Frontend(frontend, **frontend_buffers)
        self.ecapa = Ecapa(ecapa, dtype)

    @property
    def downsample_rate(self) -> int:
        """Samples per hidden-state frame."""
        return self.frontend.cfg.hop_length * self.ecapa.cfg.stride

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.ecapa.cfg.channels

    def forward(
        self, wavs: Sequence[Tensor], outputs: Sequence[str] = ("hidden_states",)
    ) -> dict[str, Tensor | Ragged | tuple[Ragged, ...]]:
        """As :meth:`Ecapa.forward`, from a list of (samples,) waveforms; "fbank" adds the features : Ragged."""
        features = self.frontend(wavs)
        rest = [name for name in outputs if name != "fbank"]
        found = self.ecapa(features, rest) if rest else {}
        return {**found, "fbank": features} if "fbank" in outputs else found
