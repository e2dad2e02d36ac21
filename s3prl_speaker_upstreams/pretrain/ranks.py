"""The few collectives that make several processes compute what one process with the whole batch would.

Everything works without :mod:`torch.distributed` being initialised (a world of one), with gloo on CPU and with NCCL.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collectives
from torch import Tensor, nn

__all__ = [
    "GlobalBatchNorm",
    "gather_rows",
    "is_main",
    "mean_over_ranks",
    "rank",
    "sum_over_ranks",
    "sum_over_ranks_",
    "synchronise_norms",
    "world_size",
]


def world_size() -> int:
    """Processes in this run; 1 when not distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process; 0 when not distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main() -> bool:
    """True in the process that writes logs and checkpoints."""
    return rank() == 0


def sum_over_ranks_(x: Tensor) -> Tensor:
    """``x`` summed over all processes, in place and without gradient."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of ``x`` over all processes, a new tensor without gradient."""
    return sum_over_ranks_(x.detach().clone()) / world_size()


def sum_over_ranks(x: Tensor) -> Tensor:
    """``x`` summed over all processes, with the gradient of the sum of all processes' losses."""
    return collectives.all_reduce(x) if world_size() > 1 else x


def gather_rows(x: Tensor) -> Tensor:
    """``x : (n, ...)`` of all processes one behind the other, ``(world * n, ...)``; n must be the same everywhere.

    Differentiable: the gradient is that of the sum of all processes' losses; DistributedDataParallel then averages.
    """
    if world_size() == 1:
        return x
    if not (torch.is_grad_enabled() and x.requires_grad):
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)
    return torch.cat(collectives.all_gather(x.contiguous()))


class GlobalBatchNorm(nn.BatchNorm1d):
    """BatchNorm whose training statistics are those of the batches of all processes together.

    ``x : (N, C)`` or ``(N, C, T)``. Unlike :class:`torch.nn.SyncBatchNorm` it works on CPU with gloo. The variance is
    summed around the global mean in a second pass, so that many processes lose no digits against one.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        if x.dim() not in (2, 3) or x.shape[1] != self.num_features:
            raise ValueError(f"GlobalBatchNorm: got {tuple(x.shape)}, expected (N, {self.num_features}[, T])")
        dims, shape = ((0,), (1, -1)) if x.dim() == 2 else ((0, 2), (1, -1, 1))
        values = x.float()
        local = values.new_tensor([x.numel() / self.num_features])
        total = sum_over_ranks(torch.cat([values.sum(dims), local]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = values - mean.view(shape)
        var = sum_over_ranks(centred.square().sum(dims)) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                batches = self.num_batches_tracked
                assert batches is not None  # there are running statistics
                batches.add_(1)
                rate = self.momentum if self.momentum is not None else 1.0 / float(batches)
                self.running_mean.lerp_(mean.detach(), rate)
                self.running_var.lerp_(var.detach() * (count / (count - 1)), rate)
        y = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


def synchronise_norms(module: nn.Module) -> nn.Module:
    """``module`` with every BatchNorm1d made a :class:`GlobalBatchNorm`, parameters and buffers shared; in place.

    >>> net = synchronise_norms(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    >>> type(net[1]).__name__
    'GlobalBatchNorm'
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d) and not isinstance(child, GlobalBatchNorm):
            new = GlobalBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            if child.affine:
                new.weight, new.bias = child.weight, child.bias
            new.running_mean, new.running_var = child.running_mean, child.running_var
            new.num_batches_tracked = child.num_batches_tracked
            new.train(child.training)
            setattr(module, name, new)
        else:
            synchronise_norms(child)
    return module
