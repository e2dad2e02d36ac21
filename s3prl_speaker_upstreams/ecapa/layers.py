"""Layers of ECAPA-TDNN, each on real frames only: (frames, channels) matrices, or :class:`~.ragged.Ragged` ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import EcapaConfig
from .ragged import Gaps, Ragged

__all__ = [
    "BatchNorm",
    "Block",
    "ConvNorm",
    "Convolution",
    "Pooling",
    "SqueezeExcitation",
    "always_batch_statistics",
    "keep_float32",
]

M = TypeVar("M", bound=nn.Module)
_LOWER = (torch.float16, torch.bfloat16)


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of (values, channels) that knows when it is being trained.

    In train mode the statistics of the batch are used, and the running ones updated, only where gradients are recorded
    and this layer's own parameters require them. A frozen network in train mode (``S3PRLUpstream`` leaves it so) thus
    computes what it does in eval mode, and its running statistics stay. :func:`always_batch_statistics` asks for those
    of the batch regardless. A single value per channel has no variance: the running statistics are used.

    The running statistics stay in float32 when the module is converted to a lower precision: variances span more
    decades than half precision has.

    >>> norm = BatchNorm(3).train()
    >>> norm(torch.ones(1, 3)).isfinite().all().item(), norm.num_batches_tracked.item()
    (True, 0)
    >>> with torch.no_grad():
    ...     torch.equal(norm(torch.eye(3)), norm.eval()(torch.eye(3))), norm.num_batches_tracked.item()
    (True, 0)
    """

    always_batch = False
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def uses_batch(self) -> bool:
        """Whether a forward pass now would take the statistics of its batch."""
        if not self.training:
            return False
        own = self.weight.requires_grad or self.bias.requires_grad
        return self.always_batch or (own and torch.is_grad_enabled())

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if weight.dtype in _LOWER:  # PyTorch takes them and the running statistics in float32, or none of them
            weight, bias = weight.float(), bias.float()
        if len(x) == 1 or not self.uses_batch():
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, eps=self.eps)
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        # As a one-row image in channels-last order, which PyTorch's CPU kernel reads in memory order.
        image = x.view(1, 1, *x.shape).permute(0, 3, 1, 2)
        y = F.batch_norm(image, self.running_mean, self.running_var, weight, bias, True, momentum, self.eps)
        return y.permute(0, 2, 3, 1).reshape(x.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchNorm:
        return keep_float32(self, super()._apply, fn, recurse)


def always_batch_statistics(module: M, always: bool = True) -> M:
    """Let every :class:`BatchNorm` in ``module`` take the statistics of its batch in train mode, gradients or not.

    For a teacher that normalises by its own batches, and for measuring statistics anew. Returns ``module``.

    >>> norm = always_batch_statistics(nn.Sequential(BatchNorm(2))).train()
    >>> with torch.no_grad():
    ...     norm(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).tolist()[0][1], int(norm[0].num_batches_tracked)
    (0.0, 1)
    """
    for part in module.modules():
        if isinstance(part, BatchNorm):
            part.always_batch = always
    return module


def keep_float32(module: M, apply: Callable[..., M], fn: Callable[[Tensor], Tensor], recurse: bool) -> M:
    """``nn.Module._apply``, after which no buffer of ``module`` itself, and unless it is a norm no parameter, is in a
    precision below float32."""
    kept: dict[str, Tensor] = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    if not isinstance(module, BatchNorm):
        kept |= {name: parameter.data for name, parameter in module._parameters.items() if parameter is not None}
    apply(fn, recurse)
    for name, before in kept.items():
        now = getattr(module, name)
        if now.dtype in _LOWER:
            now.data = before.to(now.device, torch.float32)
    return module


class Convolution(nn.Conv1d):
    """A convolution that has a bias."""

    bias: Tensor


class ConvNorm(nn.Module):
    """Convolution, ReLU, batch normalisation (the last where ``norm``)."""

    norm: BatchNorm

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 1, norm: bool = True) -> None:
        super().__init__()
        self.conv = Convolution(inputs, outputs, kernel_size)
        if norm:
            self.norm = BatchNorm(outputs)

    def finish(self, y: Tensor) -> Tensor:
        """What follows the convolution: y : (frames, channels)."""
        y = F.relu(y)
        return self.norm(y) if hasattr(self, "norm") else y

    def forward(self, x: Tensor) -> Tensor:
        """Pointwise: x : (frames, channels)."""
        return self.finish(_pointwise(x, self.conv))


def _pointwise(x: Tensor, conv: Convolution) -> Tensor:
    return F.linear(x, conv.weight[:, :, 0], conv.bias)


class SqueezeExcitation(nn.Module):
    """Per-utterance channel gains from the mean over its frames."""

    def __init__(self, channels: int, bottleneck: int) -> None:
        super().__init__()
        self.conv1 = Convolution(channels, bottleneck, 1)
        self.conv2 = Convolution(bottleneck, channels, 1)

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

    def res2_layers(self) -> list[ConvNorm]:
        """The Res2 convolutions in order."""
        return cast("list[ConvNorm]", list(self.res2))

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
        for tdnn, chunk in zip(self.res2_layers(), chunks[1:] if first else chunks[:-1], strict=True):
            y = chunk if y is None else chunk + y
            y = tdnn.finish(self._dilated(Ragged(y, x.lengths), tdnn.conv))
            outputs.append(y)
        return torch.cat([chunks[0], *outputs] if first else [*outputs, chunks[-1]], 1)

    def _dilated(self, x: Ragged, conv: Convolution) -> Tensor:
        """Convolution of kernel 3 within each utterance: (frames, channels) -> (frames, channels)."""
        width, zeros = self.dilation, self.cfg.padding == "zeros"
        batch, length = len(x.lengths), x.lengths[0]
        gaps = None if all(n == length for n in x.lengths) else Gaps.of(x.lengths, width, x.data.device)
        if gaps is None:
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
            padding=(0, width if gaps is None and zeros else 0),
            dilation=(1, width),
        )
        y = y.permute(0, 2, 3, 1).flatten(0, 2)
        return y if gaps is None else F.embedding(gaps.real - width, y)


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
        self.conv1 = Convolution(3 * width if cfg.attention_context else width, cfg.attention_channels, 1)
        if cfg.attention_hidden == "relu_norm_tanh":
            self.norm = BatchNorm(cfg.attention_channels)
        self.conv2 = Convolution(cfg.attention_channels, width, 1)

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
