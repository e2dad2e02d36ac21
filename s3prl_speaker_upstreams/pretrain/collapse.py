"""Self-supervision fails silently: what embeddings and targets look like, and when that means a collapse."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SpeakerUpstreamError
from ..verification.metrics import effective_dimension
from .config import CollapseConfig
from .ranks import gather_rows, mean_over_ranks

__all__ = ["Collapse", "CollapseMonitor", "Watch", "entropy"]


class Collapse(SpeakerUpstreamError, RuntimeError):
    """A run has collapsed although its loss may still fall; the message gives the sign, the numbers and advice."""


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats of the distributions in the last dimension.

    >>> round(float(entropy(torch.full((4,), 0.25))), 4), round(math.log(4), 4)
    (1.3863, 1.3863)
    """
    return -(p * torch.log(p.clamp_min(1e-30))).sum(-1)


class Watch(nn.Module):
    """The recent embeddings of all processes and, for ``prototypes`` > 0, how often each prototype was a target.

    A batch alone has too few rows to tell how they spread, so embeddings of the last steps are kept; its own marginal
    over the prototypes says as little, so that is averaged over about 100 steps. The buffers belong to the checkpoint:
    a resumed run logs what an uninterrupted one would.

    >>> watch = Watch(2)
    >>> watch.see(torch.eye(2))
    >>> watch.metrics()["effective_dimension"]
    1.0
    """

    RECENT = 512
    recent: Tensor
    seen: Tensor
    marginal: Tensor

    def __init__(self, dim: int, prototypes: int = 0) -> None:
        super().__init__()
        if prototypes:
            self.register_buffer("marginal", torch.full((prototypes,), 1.0 / prototypes))
        self.register_buffer("recent", torch.zeros(self.RECENT, dim))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.prototypes = prototypes

    @torch.no_grad()
    def see(self, embeddings: Tensor, targets: Tensor | None = None) -> None:
        """embeddings : (rows, dim), targets : (rows, prototypes) of this process."""
        if targets is not None:
            self.marginal.lerp_(mean_over_ranks(targets.mean(0)), 0.01 if int(self.seen) else 1.0)
        rows = gather_rows(embeddings.detach().float())[: self.RECENT]
        place = (torch.arange(rows.shape[0], device=rows.device) + self.seen) % self.RECENT
        self.recent[place] = rows
        self.seen += rows.shape[0]

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """``embedding_spread`` is 1 for directions spread evenly and 0 for a point.

        ``effective_dimension`` is at most dim, ``marginal_entropy`` at most ln(prototypes).
        """
        rows = self.recent[: min(int(self.seen), self.RECENT)]
        unit = F.normalize(rows, dim=-1)
        out = {"marginal_entropy": float(entropy(self.marginal))} if self.prototypes else {}
        out["embedding_spread"] = float(unit.std(0, unbiased=False).mean()) * math.sqrt(unit.shape[1])
        out["effective_dimension"] = effective_dimension(rows.cpu().numpy())
        return out


class CollapseMonitor:
    """Recognises the ways in which self-supervision fails silently, from the metrics of log steps.

    >>> monitor = CollapseMonitor(CollapseConfig(patience=1), prototypes=2048, grace_steps=50)
    >>> bad = dict(loss_minus_lnk=-3.0, teacher_entropy=2.5, marginal_entropy=2.7, effective_dimension=3.0,
    ...            embedding_spread=0.4)
    >>> monitor.update(20, bad) is None, monitor.update(60, bad) is not None
    (True, True)
    """

    def __init__(self, config: CollapseConfig, *, prototypes: int, grace_steps: int) -> None:
        self.config, self.lnk, self.grace_steps = config, math.log(max(prototypes, 2)), grace_steps
        self.counts: dict[str, int] = {}

    def update(self, step: int, metrics: dict[str, float]) -> str | None:
        """The advice if one sign has now been seen ``patience`` log steps in a row, else None.

        Signs whose metric is not there (an objective without prototypes) are not judged.
        """
        if self.config.action == "off" or step <= self.grace_steps:
            return None
        c, nan = self.config, math.nan  # comparisons with NaN are false
        below_lnk, targets, marginal, dimension, spread = (
            metrics.get(key, nan)
            for key in ("loss_minus_lnk", "teacher_entropy", "marginal_entropy", "effective_dimension",
                        "embedding_spread")
        )  # fmt: skip
        signs = {
            "uniform": (
                abs(below_lnk) < c.min_below_lnk,
                f"the output is still uniform over the prototypes (loss - ln K = {below_lnk:.4f})",
                "raise optim.lr, lower dino.teacher_temp, or check that the crops of one utterance share a speaker",
            ),
            "entropy": (
                targets > c.max_entropy_fraction * self.lnk,
                f"the teacher's targets say nothing (entropy {targets:.2f} of {self.lnk:.2f} nats)",
                "freeze the prototypes for longer (dino.freeze_last_layer), lower dino.teacher_temp or optim.lr",
            ),
            "marginal": (
                marginal < c.min_marginal_fraction * self.lnk,
                f"few prototypes are used (marginal entropy {marginal:.2f} of {self.lnk:.2f} nats)",
                "use dino.targets=sinkhorn, or raise dino.teacher_temp",
            ),
            "dimension": (
                dimension < c.min_effective_dimension,
                f"embeddings fill only {dimension:.1f} dimensions",
                "use dino.targets=sinkhorn and dino.koleo=0.3 (or dino.variance=10 dino.covariance=1) on little data",
            ),
            "point": (
                spread < c.min_spread,
                f"embeddings have shrunk to a point (spread {spread:.4f})",
                "lower optim.lr, check dino.center_momentum, or use dino.koleo=0.3",
            ),
        }
        for name, (bad, what, remedy) in signs.items():
            self.counts[name] = self.counts.get(name, 0) + 1 if bad else 0
            if self.counts[name] >= c.patience:
                return (
                    f"step {step}: collapsed: {what}, {self.counts[name]} log steps in a row. Remedy: {remedy}. "
                    "To go on regardless: dino.collapse.action=warn"
                )
        return None

    def state_dict(self) -> dict[str, int]:
        """Counts so far."""
        return dict(self.counts)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Counts of a resumed run."""
        self.counts = dict(state)
