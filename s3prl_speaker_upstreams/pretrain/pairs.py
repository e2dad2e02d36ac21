"""Objectives on pairs of crops of one utterance, with one network and no teacher: SimCLR and VICReg.

A pair is two crops of which at least one is a long one; with two long crops and four short ones these are nine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ecapa import Ecapa
from .collapse import Watch
from .config import ProjectorConfig, SimclrConfig, VicregConfig
from .objective import Objective
from .ranks import gather_rows

__all__ = ["Pairs", "Simclr", "Vicreg", "nt_xent", "variance_covariance"]


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss (arXiv 2002.05709, Eq. 1): find each row's partner among all other rows of both views.

    a, b : (rows, dim), row i of both from the same utterance.

    >>> round(float(nt_xent(torch.eye(2), torch.eye(2), 1.0)), 4)   # ln(1 + 2 / e)
    0.5514
    """
    z = F.normalize(torch.cat([a, b]).float(), dim=-1)
    logits = (z @ z.t() / temperature).fill_diagonal_(-torch.inf)
    rows = torch.arange(len(a), device=z.device)
    return F.cross_entropy(logits, torch.cat([rows + len(a), rows]))


def variance_covariance(x: Tensor) -> tuple[Tensor, Tensor]:
    """VICReg's regularisers (arXiv 2105.04906, Eq. 1 to 4) of x : (rows, dim).

    Variance: hinge at 1 on each dimension's deviation, mean over dimensions. Covariance: squares off the diagonal,
    divided by dim.

    >>> variance_covariance(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))[1]   # both entries are 2
    tensor(4.)
    """
    x = x.float() - x.float().mean(0)
    std = torch.sqrt(x.var(0) + 1e-4)
    cov = x.t() @ x / (x.shape[0] - 1)
    off = cov.square().sum() - cov.diagonal().square().sum()
    return F.relu(1 - std).mean(), off / x.shape[1]


def projector(dim: int, config: ProjectorConfig) -> nn.Sequential:
    """``layers`` linear layers with BatchNorm and ReLU between them; the loss is on its output."""
    widths = [dim] + [config.hidden] * (config.layers - 1) + [config.dim]
    parts: list[nn.Module] = []
    for i in range(config.layers):
        parts.append(nn.Linear(widths[i], widths[i + 1]))
        if i < config.layers - 1:
            parts += [nn.BatchNorm1d(widths[i + 1]), nn.ReLU()]
    return nn.Sequential(*parts)


class Pairs(Objective):
    """Encoder, projector, and the mean of a loss over all pairs of crops."""

    def __init__(self, encoder: nn.Module, dim: int, head: ProjectorConfig) -> None:
        super().__init__()
        self.encoder, self.projector, self.watch = encoder, projector(dim, head), Watch(dim)
        self._last: dict[str, Tensor] = {}

    def pair_loss(self, views: list[Tensor], pairs: list[tuple[int, int]]) -> Tensor:
        """Loss of projected ``views``, each (rows, dim) of this process, over index ``pairs``."""
        raise NotImplementedError

    def forward(self, features: Sequence[Tensor], views: tuple[int, int], labels: Tensor | None = None) -> Tensor:
        """See :class:`.objective.Objective`; labels are not used."""
        embeddings = torch.cat([self.encoder(f).float() for f in features])
        with torch.autocast(embeddings.device.type, enabled=False):
            projected = list(self.projector(embeddings).chunk(sum(views)))
        self.watch.see(embeddings[: features[0].shape[0]])
        return self.pair_loss(projected, [(g, v) for g in range(views[0]) for v in range(g + 1, sum(views))])

    def metrics(self) -> dict[str, float]:
        """Spread and effective dimension of recent embeddings, and the loss's parts."""
        return {**self.watch.metrics(), **{k: float(v) for k, v in self._last.items()}}

    def networks(self) -> dict[str, Ecapa]:
        """See :class:`.objective.Objective`."""
        return {"student": self.encoder.ecapa}  # type: ignore[dict-item]


class Simclr(Pairs):
    """SimCLR: Chen et al. 2020. Other utterances of the batch (of all processes) are the negatives.

    >>> objective = Simclr(nn.Linear(5, 8), 8, SimclrConfig(head=ProjectorConfig(hidden=12, dim=6)))
    >>> objective([torch.randn(6, 5)], views=(2, 0)).shape
    torch.Size([])
    """

    batch_statistics = "BatchNorm and the negatives"

    def __init__(self, encoder: nn.Module, dim: int, config: SimclrConfig) -> None:
        super().__init__(encoder, dim, config.head)
        self.config = config

    def pair_loss(self, views: list[Tensor], pairs: list[tuple[int, int]]) -> Tensor:
        """Mean NT-Xent over pairs."""
        everyone = [gather_rows(view) for view in views]
        return torch.stack([nt_xent(everyone[a], everyone[b], self.config.temperature) for a, b in pairs]).mean()


class Vicreg(Pairs):
    """VICReg: Bardes et al. 2022. No negatives; variance and covariance keep the projections apart.

    >>> objective = Vicreg(nn.Linear(5, 8), 8, VicregConfig(head=ProjectorConfig(hidden=12, dim=6)))
    >>> objective([torch.randn(6, 5)], views=(2, 0)).shape
    torch.Size([])
    """

    batch_statistics = "BatchNorm, variance and covariance"

    def __init__(self, encoder: nn.Module, dim: int, config: VicregConfig) -> None:
        super().__init__(encoder, dim, config.head)
        self.config = config

    def pair_loss(self, views: list[Tensor], pairs: list[tuple[int, int]]) -> Tensor:
        """Invariance over pairs, variance and covariance over views."""
        c = self.config
        invariance = torch.stack([F.mse_loss(views[a], views[b]) for a, b in pairs]).mean()
        terms = [variance_covariance(gather_rows(view)) for view in views]
        variance = torch.stack([v for v, _ in terms]).mean()
        covariance = torch.stack([cov for _, cov in terms]).mean()
        self._last = {name: value.detach() for name, value in
                      (("invariance", invariance), ("variance", variance), ("covariance", covariance))}  # fmt: skip
        # as the authors' code weighs them: the variance's mean and the covariance's sum over two views
        return c.invariance * invariance + c.variance * variance + 2 * c.covariance * covariance
