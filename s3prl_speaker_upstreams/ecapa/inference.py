"""The fast way through an :class:`~.model.Ecapa` without gradients: same weights and results, fewer passes over memory.

Batch normalisation behind a ReLU is a scale and a shift. Here they are folded into the neighbouring products wherever
they commute with what lies between: |scale| into the layer in front (ReLU commutes with a positive factor), its sign
and the shift into the layer behind. A shift in front of a zero-padded convolution does not commute with the padding;
there the gaps hold the value that the folded layer reads as zero. What remains is one product per layer with the ReLU
in its epilogue, one sum per Res2 convolution and one pass for squeeze-excitation and residual.

Utterances go through the network in packs of about ``PACK`` frames, so that what one layer writes is still in the
processor's cache when the next one reads it. The layout of a pack for a convolution is that of :class:`~.ragged.Gaps`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import EcapaConfig
from .layers import BatchNorm, Block, ConvNorm, Convolution
from .ragged import Gaps, Ragged, patches

__all__ = ["Plan"]

PACK = 1536
"""Frames that go through the network together on a CPU (longer utterances go alone)."""


def _wide(x: Tensor) -> Tensor:
    # Folding in double precision costs nothing and leaves one rounding; Apple's GPUs have no doubles.
    return x if x.device.type == "mps" else x.double()


def _scale_shift(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Batch normalisation in eval mode as x * scale + shift."""
    scale = _wide(norm.weight) / (_wide(norm.running_var) + norm.eps).sqrt()
    return scale, _wide(norm.bias) - _wide(norm.running_mean) * scale


def _sign(scale: Tensor) -> Tensor:
    return torch.where(scale < 0, -1.0, 1.0).to(scale)


def _onednn(device: torch.device, dtype: torch.dtype) -> bool:
    # oneDNN's products with weights in its own layout and ReLU in the epilogue are PyTorch's fastest on a CPU (15 to
    # 25 % before F.linear); they are internal operators, so F.linear stands in where they are missing. In bfloat16 they
    # raise on processors without AVX-512, where F.linear works.
    ops = torch.ops.mkldnn
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return False
    return dtype != torch.bfloat16 or (hasattr(ops, "_is_mkldnn_bf16_supported") and ops._is_mkldnn_bf16_supported())


class _Linear:
    """relu(x W' + b) or x W' + b for x : (frames, inputs)."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype, relu: bool = True) -> None:
        self.weight, self.bias, self.relu = weight.to(dtype).contiguous(), bias.to(dtype), relu
        self.onednn = _onednn(weight.device, dtype)
        if self.onednn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACK)

    def __call__(self, x: Tensor) -> Tensor:
        if self.onednn:
            return torch.ops.mkldnn._linear_pointwise(
                x, self.weight, self.bias, "relu" if self.relu else "none", [], ""
            )
        y = F.linear(x, self.weight, self.bias)
        return y.relu_() if self.relu else y


class _Convolution:
    """relu(dilated convolution of kernel 3) without padding: (rows, width) -> (rows - 2 dilation, width)."""

    def __init__(self, weight: Tensor, bias: Tensor, dilation: int, dtype: torch.dtype) -> None:
        self.dilation = [1, dilation]
        self.bias = bias.to(dtype)
        self.weight = weight.to(dtype)[:, :, None].contiguous(memory_format=torch.channels_last)
        self.onednn = _onednn(weight.device, dtype)
        if self.onednn:
            width = weight.shape[1]
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, [0, 0], [1, 1], self.dilation, 1, [1, width, 1, PACK]
            )

    def __call__(self, rows: Tensor) -> Tensor:
        image = rows[None, None].permute(0, 3, 1, 2)  # one line, channels last in memory
        if self.onednn:
            y = torch.ops.mkldnn._convolution_pointwise(
                image, self.weight, self.bias, [0, 0], [1, 1], self.dilation, 1, "relu", [], ""
            )
        else:
            y = F.conv2d(image, self.weight, self.bias, dilation=self.dilation).relu_()
        return y.permute(0, 2, 3, 1).flatten(0, 2)


class _FoldedBlock:
    """One SE-Res2 block; see the module's text for what is folded where."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        cfg = block.cfg
        self.dilation, self.mirrored = block.dilation, cfg.padding == "reflect"
        self.width = width = cfg.channels // cfg.res2_scale
        self.first = 1 if cfg.res2_identity == "first" else 0
        scale, shift = _scale_shift(block.tdnn1.norm)
        self.tdnn1 = _Linear(*_scaled(block.tdnn1.conv, scale.abs()), dtype)
        signs, shifts = list(_sign(scale).split(width)), list(shift.split(width))

        self.convolutions: list[_Convolution] = []
        self.ratios: list[Tensor | None] = []
        self.outside: list[Tensor] = []
        before_sign = before_shift = None
        for chunk, layer in enumerate(block.res2_layers(), start=self.first):
            sign, shift = signs[chunk], shifts[chunk]
            ratio = None
            if before_sign is not None:
                shift = shift + before_shift
                if not torch.equal(sign, before_sign):
                    ratio = (sign * before_sign).to(dtype)
            scale, behind = _scale_shift(layer.norm)
            weight, bias = _scaled(layer.conv, scale.abs())
            bias = bias + weight.sum(2) @ shift
            self.convolutions.append(_Convolution(weight * sign[:, None], bias, block.dilation, dtype))
            self.ratios.append(ratio)
            self.outside.append((-shift * sign).to(dtype))
            signs[chunk], shifts[chunk] = before_sign, before_shift = _sign(scale), behind

        weight = _wide(block.tdnn2.conv.weight[:, :, 0])
        bias = _wide(block.tdnn2.conv.bias) + weight @ torch.cat(shifts)
        self.tdnn2 = _Linear(weight * torch.cat(signs), bias, dtype)
        self.scale, self.shift = (x.float() for x in _scale_shift(block.tdnn2.norm))
        self.se = block.se

    def __call__(self, x: Ragged, out: Tensor) -> Tensor:
        """x : the pack; the block's output is written to ``out`` : (frames, channels), which is returned."""
        y = self.tdnn2(self._res2(Ragged(self.tdnn1(x.data), x.lengths)))
        mean = torch.cat([g.mean(1, dtype=torch.float32) for g in Ragged(y, x.lengths).grids()])
        gains = self.se.gains(mean * self.scale + self.shift)
        scales, shifts = (gains * self.scale).to(out.dtype), (gains * self.shift).to(out.dtype)
        start = 0
        for i, n in enumerate(x.lengths):
            rows = slice(start, start + n)
            torch.addcmul(x.data[rows], y[rows], scales[i], out=out[rows]).add_(shifts[i])
            start += n
        return out

    def _res2(self, x: Ragged) -> Tensor:
        d, width = self.dilation, self.width
        gaps = Gaps.of(x.lengths, d, x.data.device)
        spread = x.data.index_select(0, gaps.source)  # every chunk's rows, gaps between utterances
        inner = spread[d : len(spread) - d]  # the rows that a convolution without padding gives
        rows = torch.empty(len(spread), width, dtype=spread.dtype, device=spread.device)
        y = None
        for j, (convolution, ratio) in enumerate(zip(self.convolutions, self.ratios, strict=True)):
            columns = slice((j + self.first) * width, (j + self.first + 1) * width)
            if y is None:
                rows.copy_(spread[:, columns])
            elif ratio is None:
                torch.add(inner[:, columns], y, out=rows[d : len(rows) - d])
            else:
                torch.addcmul(inner[:, columns], y, ratio, out=rows[d : len(rows) - d])
            if not self.mirrored:
                rows.index_copy_(0, gaps.gap, self.outside[j].expand(len(gaps.gap), -1))
            elif y is not None:
                rows.index_copy_(0, gaps.gap, rows.index_select(0, gaps.gap_source))
            y = convolution(rows)
            inner[:, columns] = y
        return inner if len(x.lengths) == 1 else spread.index_select(0, gaps.real)


def _scaled(conv: Convolution, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias with every output multiplied; weight (out, in) for a kernel of 1."""
    weight = _wide(conv.weight) * scale[:, None, None]
    return weight[:, :, 0] if weight.shape[2] == 1 else weight, _wide(conv.bias) * scale


class Plan:
    """Folded copy of an :class:`~.model.Ecapa`, down to the MFA; it does not follow later changes of the weights.

    block_1, blocks, mfa : the network's parts;  dtype : of the products; what is returned is float32
    """

    @torch.no_grad()
    def __init__(
        self, cfg: EcapaConfig, block_1: ConvNorm, blocks: Sequence[Block], mfa: ConvNorm, dtype: torch.dtype
    ) -> None:
        self.cfg, self.dtype = cfg, dtype
        weight = _wide(block_1.conv.weight).transpose(1, 2).flatten(1)
        self.block_1 = _Linear(weight, _wide(block_1.conv.bias), dtype)
        self.block_1_norm = tuple(x.to(dtype) for x in _scale_shift(block_1.norm))
        self.blocks = [_FoldedBlock(block, dtype) for block in blocks]
        self.mfa_product = _Linear(_wide(mfa.conv.weight)[:, :, 0], _wide(mfa.conv.bias), dtype)
        self.mfa_norm = tuple(x.float() for x in _scale_shift(mfa.norm)) if cfg.mfa_norm else None

    @torch.no_grad()
    def __call__(self, features: Ragged, mfa: bool) -> tuple[tuple[Ragged, ...], Ragged | None]:
        """The four blocks and, if asked, the MFA."""
        cfg = self.cfg
        lengths = [-(-n // cfg.stride) for n in features.lengths]
        new = features.data.new_empty
        states = [new(sum(lengths), cfg.channels, dtype=torch.float32) for _ in range(4)]
        top = new(sum(lengths), cfg.mfa_channels, dtype=torch.float32) if mfa else None
        start = 0
        for pack in _packs(features, PACK * cfg.stride if features.data.device.type == "cpu" else 1 << 18):
            stop = start + sum(-(-n // cfg.stride) for n in pack.lengths)
            with torch.autocast(states[0].device.type, enabled=False):
                self._run(pack, [s[start:stop] for s in states], None if top is None else top[start:stop])
            start = stop
        return tuple(Ragged(s, lengths) for s in states), None if top is None else Ragged(top, lengths)

    def _run(self, pack: Ragged, states: list[Tensor], top: Tensor | None) -> None:
        """Take one pack through the network, into rows of the results."""
        x, lengths = patches(pack, self.cfg.kernel_size, self.cfg.stride, self.cfg.padding)
        # In a lower precision the network works on copies of its own, in float32 on the results themselves.
        work = states if self.dtype == torch.float32 else [torch.empty_like(s, dtype=self.dtype) for s in states]
        y = self.block_1(x.to(self.dtype))
        scale, shift = self.block_1_norm
        torch.addcmul(shift, y, scale, out=work[0])
        total = work[0]
        for i, block in enumerate(self.blocks, start=1):
            block(Ragged(total, lengths), out=work[i])
            if self.cfg.block_wiring == "sequential":
                total = work[i]
            elif i < 3:
                total = total + work[i]
        if work is not states:
            for state, copy in zip(states, work, strict=True):
                state.copy_(copy)
        if top is not None:
            self._top(work[1:], top)

    def _top(self, blocks: Sequence[Tensor], out: Tensor) -> None:
        y = self.mfa_product(torch.cat(list(blocks), 1).to(self.dtype))
        if self.mfa_norm is None:
            out.copy_(y)
        else:
            scale, shift = self.mfa_norm
            torch.addcmul(shift, y, scale, out=out)

    @torch.no_grad()
    def mfa(self, hidden_states: Sequence[Ragged]) -> Ragged:
        """The MFA of blocks that are there already."""
        lengths = hidden_states[0].lengths
        blocks = [h.data for h in hidden_states[1:]]
        out = blocks[0].new_empty(len(blocks[0]), self.cfg.mfa_channels, dtype=torch.float32)
        with torch.autocast(out.device.type, enabled=False):
            for start in range(0, len(out), PACK):
                rows = slice(start, start + PACK)
                self._top([b[rows] for b in blocks], out[rows])
        return Ragged(out, lengths)


def _packs(features: Ragged, frames: int) -> Iterator[Ragged]:
    """Neighbouring utterances of together at most ``frames``; a longer one by itself."""
    start = stop = 0
    lengths: list[int] = []
    for n in features.lengths:
        if lengths and stop - start + n > frames:
            yield Ragged(features.data[start:stop], lengths)
            start, lengths = stop, []
        lengths.append(n)
        stop += n
    yield Ragged(features.data[start:stop], lengths)
