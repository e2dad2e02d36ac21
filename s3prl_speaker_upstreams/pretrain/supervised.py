"""Speaker classification by additive angular margin softmax or plain softmax, on one or more crops of an utterance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ecapa import Ecapa
from ..errors import ConfigError
from .aam import AamSoftmax
from .config import AamConfig
from .objective import Objective
from .schedules import margin_at

__all__ = ["Softmax", "Supervised"]


class Softmax(nn.Module):
    """Plain cross-entropy over a linear layer.

    >>> loss, accuracy = Softmax(8, 5)(torch.randn(4, 8), torch.tensor([0, 1, 2, 3]))
    >>> loss.shape
    torch.Size([])
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        if classes < 2:
            raise ConfigError(f"softmax: got {classes} classes, need at least 2")
        self.classes, self.margin = classes, 0.0
        self.linear = nn.Linear(dim, classes)

    def forward(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """embeddings : (rows, dim), labels : (rows,) -> mean loss and accuracy."""
        logits = F.linear(embeddings.float(), self.linear.weight, self.linear.bias)
        return F.cross_entropy(logits, labels), (logits.detach().argmax(1) == labels).float().mean()


class Supervised(Objective):
    """Every crop is classified as its utterance's speaker; the loss is the mean over all crops.

    >>> from .config import AamConfig
    >>> objective = Supervised(nn.Linear(5, 8), 8, AamConfig(), classes=3)
    >>> objective([torch.randn(4, 5), torch.randn(8, 5)], views=(2, 4), labels=torch.tensor([0, 2])).shape
    torch.Size([])
    """

    def __init__(self, encoder: nn.Module, dim: int, config: AamConfig, classes: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.head: AamSoftmax | Softmax = (
            Softmax(dim, classes)
            if config.loss == "softmax"
            else AamSoftmax(dim, classes, scale=config.scale, margin=config.margin, sub_centres=config.sub_centres)
        )
        self._margin_steps = (0, 0)
        self._accuracy = torch.zeros(())

    def plan(self, steps: Callable[[str], int], total: int) -> None:
        """See :class:`.objective.Objective`."""
        self._margin_steps = (steps(self.config.margin_start), steps(self.config.margin_end))

    def set_step(self, step: int) -> dict[str, float]:
        """Set the margin for the optimizer step ``step``."""
        if isinstance(self.head, Softmax):
            return {}
        aam, (start, end) = self.config, self._margin_steps
        self.head.margin = margin_at(
            step, start=start, end=end, initial=aam.initial_margin, final=aam.margin, shape=aam.margin_shape
        )
        return {"margin": self.head.margin}

    def forward(self, features: Sequence[Tensor], views: tuple[int, int], labels: Tensor | None = None) -> Tensor:
        """See :class:`.objective.Objective`."""
        if labels is None:
            raise ConfigError("supervised training: the batch has no speaker labels")
        embeddings = torch.cat([self.encoder(f).float() for f in features])
        loss, self._accuracy = self.head(embeddings, labels.repeat(sum(views)))
        return loss

    def metrics(self) -> dict[str, float]:
        """Accuracy of the last batch."""
        return {"accuracy": float(self._accuracy)}

    def networks(self) -> dict[str, Ecapa]:
        """See :class:`.objective.Objective`."""
        return {"supervised": self.encoder.ecapa}  # type: ignore[dict-item]
