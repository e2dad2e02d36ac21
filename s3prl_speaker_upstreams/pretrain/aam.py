"""Additive angular margin softmax (ArcFace, arXiv 1801.07698) with sub-centres."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError

__all__ = ["AamSoftmax"]


class AamSoftmax(nn.Module):
    """Cross-entropy over scaled cosines, the true class's angle enlarged by ``margin``.

    With ``sub_centres`` > 1 a class has several centres and answers with its nearest (Deng et al., ECCV 2020).

    >>> aam = AamSoftmax(8, 5, scale=32.0, margin=0.2)
    >>> loss, accuracy = aam(torch.randn(4, 8), torch.tensor([0, 1, 2, 3]))
    >>> loss.shape
    torch.Size([])
    """

    def __init__(
        self, dim: int, classes: int, *, scale: float = 32.0, margin: float = 0.2, sub_centres: int = 1
    ) -> None:
        super().__init__()
        if classes < 2 or sub_centres < 1:
            raise ConfigError(f"AAM-softmax: got {classes} classes, {sub_centres} sub-centres; need >= 2 and >= 1")
        self.scale, self.margin, self.sub_centres, self.classes = scale, margin, sub_centres, classes
        self.weight = nn.Parameter(torch.empty(classes * sub_centres, dim))
        nn.init.xavier_uniform_(self.weight)

    def cosines(self, embeddings: Tensor) -> Tensor:
        """embeddings : (rows, dim) -> (rows, classes), the largest over each class's sub-centres."""
        cosines = F.linear(F.normalize(embeddings.float()), F.normalize(self.weight.float()))
        return cosines.view(-1, self.classes, self.sub_centres).amax(-1) if self.sub_centres > 1 else cosines

    def logits(self, cosines: Tensor, labels: Tensor) -> Tensor:
        """Scaled cosines with cos(angle + margin) at each row's label; past pi - margin a shifted cosine."""
        true = cosines.gather(1, labels[:, None])
        sine = torch.sqrt((1.0 - true.square()).clamp_min(1e-12))
        moved = true * math.cos(self.margin) - sine * math.sin(self.margin)
        # past pi - margin the cosine would rise again and reward being wrong; go on falling from the same value instead
        limit = math.cos(math.pi - self.margin)
        moved = torch.where(true > limit, moved, true - 1.0 - limit)
        return cosines.scatter(1, labels[:, None], moved) * self.scale

    def forward(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """embeddings : (rows, dim), labels : (rows,) -> mean loss and accuracy (of the cosines without margin)."""
        cosines = self.cosines(embeddings)
        accuracy = (cosines.detach().argmax(1) == labels).float().mean()
        return F.cross_entropy(self.logits(cosines, labels), labels), accuracy
