"""Three places where s3prl does not heed ``--device``: ASV's ``.cuda()``, SE's and SS's fixed ``cuda:0``, evaluation on
the CPU of a machine that has a GPU."""

from __future__ import annotations

import functools
import sys
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["CudaMeans", "cuda_device_refuses_cpu", "evaluate_on_cpu", "follow_the_argument", "follow_the_features"]


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


def follow_the_argument(module: Any) -> None:
    """s3prl/downstream/{enhancement,separation}_stft/expert.py: their ``device``, cuda:0 wherever CUDA exists.

    The runner passes its command line to the constructor; ``device`` among it is what counts, here and in ``loss.py``.
    """
    original = module.DownstreamExpert.__init__
    loss: Any = sys.modules.get(f"{module.__name__.rpartition('.')[0]}.loss")

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        device = torch.device(kwargs["device"]) if kwargs.get("device") else module.device
        for part in (module, loss):
            if part is not None:
                part.device = device
        with CudaMeans(device):  # loss.py:76 calls .cuda() on its window
            original(self, *args, **kwargs)

    module.DownstreamExpert.__init__ = __init__


def cuda_device_refuses_cpu(module: ModuleType) -> bool:
    """Whether ``with torch.cuda.device("cpu")``, which the runner says after asking ``is_available``, raises."""
    try:
        torch.cuda.device("cpu")
    except ValueError:
        return True
    return False


def evaluate_on_cpu(module: ModuleType) -> None:
    """s3prl/downstream/runner.py: ``Runner.evaluate`` with ``--device cpu`` on a machine that has a GPU."""
    original = module.Runner.evaluate

    @functools.wraps(original)
    def evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.device(self.args.device).type == "cuda" or not torch.cuda.is_available():
            return original(self, *args, **kwargs)
        cuda: Any = torch.cuda
        real = cuda.device
        cuda.device = lambda device: nullcontext() if device == self.args.device else real(device)
        try:
            return original(self, *args, **kwargs)
        finally:
            cuda.device = real

    module.Runner.evaluate = evaluate
