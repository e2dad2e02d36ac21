"""ASV calls ``.cuda()`` whatever ``--device`` says; here the tensor goes where the features are."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["CudaMeans", "follow_the_features"]


class CudaMeans(TorchFunctionMode):
    """Within this context (this thread only) ``tensor.cuda()`` means ``tensor.to(device)``.

    >>> import torch
    >>> with CudaMeans(torch.device("cpu")):
    ...     torch.zeros(2).cuda().device.type
    'cpu'
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0].to(self.device)
        return func(*args, **(kwargs or {}))


def follow_the_features(module: ModuleType) -> None:
    """s3prl/downstream/sv_voxceleb1/expert.py: ``forward(mode, features, ...)`` with features on any device."""
    original = module.DownstreamExpert.forward

    @functools.wraps(original)
    def forward(self: Any, mode: str, features: Any, *args: Any, **kwargs: Any) -> Any:
        device = features[0].device
        if device.type == "cuda" and device.index == torch.cuda.current_device():
            return original(self, mode, features, *args, **kwargs)
        with CudaMeans(device):
            return original(self, mode, features, *args, **kwargs)

    module.DownstreamExpert.forward = forward
