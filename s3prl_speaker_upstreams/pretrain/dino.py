"""DINO for speakers: Caron et al. 2021 (arXiv 2104.14294), read from top to bottom.

A student sees all crops of an utterance, an exponential-moving-average teacher only the long ones; the student's
distribution over prototypes must match the teacher's distribution of *another* crop of the same utterance. The
teacher's distribution is kept from collapsing by centring and sharpening, or by Sinkhorn-Knopp balancing (arXiv
2006.09882). KoLeo (arXiv 1806.03198) and RDINO's variance and covariance terms (arXiv 2211.04168) keep
embeddings apart.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ecapa.layers import always_batch_statistics
from ..errors import SpeakerUpstreamError
from ..verification.metrics import effective_dimension
from .config import CollapseConfig, DinoConfig
from .distributed import gather_rows, sum_over_ranks_, world_size

__all__ = [
    "Branch",
    "Collapse",
    "CollapseMonitor",
    "Dino",
    "DinoHead",
    "Prototypes",
    "cross_view_loss",
    "effective_dimension",
    "koleo_loss",
    "parameter_groups",
    "rdino_regularisation",
    "sinkhorn_targets",
]


class Collapse(SpeakerUpstreamError, RuntimeError):
    """A DINO run has collapsed although its loss may still fall; the message gives the sign, the numbers and advice."""


class _UnitRowsLinear(torch.autograd.Function):
    """``z @ (v / |v|).T`` for unit-norm rows of ``v``, without ever writing the normalised matrix.

    With 65,536 prototypes ``v`` is 64 MB while ``z`` has tens of rows: what counts is how often ``v`` is walked
    through. Scaling the logits by ``1 / |v|`` costs a small array; the radial part of the gradient, which normalisation
    removes, ``(g_k . v_k) / |v_k|^2``, comes out of ``sum(grad * logits)`` over the rows of ``z`` alone.
    """

    @staticmethod
    def forward(ctx, z: Tensor, v: Tensor) -> Tensor:
        inverse = torch.linalg.vector_norm(v, dim=1).clamp_min(1e-12).reciprocal_()
        logits = (z @ v.t()).mul_(inverse)
        ctx.save_for_backward(z, v, inverse, logits)
        return logits

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        z, v, inverse, logits = ctx.saved_tensors
        scaled = grad * inverse
        grad_z = scaled @ v if ctx.needs_input_grad[0] else None
        grad_v = None
        if ctx.needs_input_grad[1]:
            radial = (grad * logits).sum(0).mul_(inverse.square())
            grad_v = (v * radial.unsqueeze(1)).addmm_(scaled.t(), z, beta=-1.0)
        return grad_z, grad_v


class Prototypes(nn.Module):
    """Cosines between unit rows and weight-normalised prototypes (gain fixed at 1).

    >>> Prototypes(4, 10)(F.normalize(torch.randn(2, 4))).shape
    torch.Size([2, 10])
    """

    def __init__(self, dim: int, prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(prototypes, dim))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, z: Tensor) -> Tensor:
        """z : (rows, dim) of unit norm -> (rows, prototypes) cosines."""
        return _UnitRowsLinear.apply(z, self.weight)


class DinoHead(nn.Module):
    """Projection head: ``layers`` linear layers with GELU (and BatchNorm), L2 norm, prototypes.

    >>> DinoHead(8, prototypes=16, layers=3, hidden=12, bottleneck=6)(torch.randn(4, 8)).shape
    torch.Size([4, 16])
    """

    def __init__(
        self,
        dim: int,
        *,
        prototypes: int,
        layers: int = 3,
        hidden: int = 2048,
        bottleneck: int = 256,
        norm: bool = True,
    ) -> None:
        super().__init__()
        widths = [dim] + [hidden] * (layers - 1) + [bottleneck]
        mlp: list[nn.Module] = []
        for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            linear = nn.Linear(a, b)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            mlp.append(linear)
            if i < layers - 1:
                if norm:
                    mlp.append(nn.BatchNorm1d(b))
                mlp.append(nn.GELU())
        self.mlp = nn.Sequential(*mlp)
        self.last_layer = Prototypes(bottleneck, prototypes)

    def forward(self, x: Tensor) -> Tensor:
        """x : (rows, dim) embeddings -> (rows, prototypes) cosines."""
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Branch(nn.Module):
    """Encoder and head of the student or of the teacher.

    ``encoder`` maps one batch of equally long crops to embeddings ``(rows, dim)``; it is called once per crop length.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, batches: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """One batch per crop length -> embeddings (rows, dim) and logits (rows, prototypes), in the batches' order."""
        embeddings = torch.cat([self.encoder(batch).float() for batch in batches])
        with torch.autocast(
            embeddings.device.type, enabled=False
        ):  # 65,536-way softmax at temperature 0.04 needs float32
            return embeddings, self.head(embeddings)


@torch.no_grad()
def sinkhorn_targets(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Teacher distributions balanced over prototypes, over the batches of all processes together.

    logits : (rows, prototypes) -> (rows, prototypes), rows sum to 1. Alternately gives each prototype and each row the
    same mass (Sinkhorn-Knopp; Eq. 3 of arXiv 2006.09882, as in DINOv2).
    """
    logits = logits.float() / temperature
    top = logits.max()
    if world_size() > 1:
        torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX)
    q = torch.exp(logits - top)
    rows, prototypes = q.shape[0] * world_size(), q.shape[1]
    for _ in range(iterations):
        mass = sum_over_ranks_(q.sum(0))
        q /= mass.clamp_min_(torch.finfo(q.dtype).tiny).mul_(prototypes)
        q /= q.sum(1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny).mul_(rows)
    return q.mul_(rows)


def cross_view_loss(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy between every student crop and every *other* teacher crop of the same utterance.

    student : (views, batch, prototypes) cosines, at least 2 views, the first ones being the teacher's; targets :
    (teacher views, batch, prototypes). The sum over pairs is regrouped: a student crop meets the sum of the targets
    that are not its own, so each student row takes part in one product however many teacher crops there are.
    """
    views, teacher_views = student.shape[0], targets.shape[0]
    total = targets.sum(0, keepdim=True)
    others = torch.cat([total - targets, total.expand(views - teacher_views, -1, -1)])
    pairs = views * teacher_views - teacher_views
    log_p = F.log_softmax(student / temperature, dim=-1)
    return -(others * log_p).sum() / (pairs * student.shape[1])


def koleo_loss(embeddings: Tensor, eps: float = 1e-8) -> Tensor:
    """Minus the mean log distance to the nearest neighbour among unit embeddings (Kozachenko-Leonenko).

    embeddings : (rows, dim), rows >= 2, of different utterances.
    """
    z = F.normalize(embeddings.float(), dim=-1, eps=eps)
    with torch.no_grad():
        cosines = z @ z.t()
        nearest = cosines.fill_diagonal_(-2.0).argmax(1)
    return -torch.log(F.pairwise_distance(z, z[nearest], eps=eps) + eps).mean()


def rdino_regularisation(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """RDINO's (variance, covariance) losses on embeddings averaged over the global crops (arXiv 2211.04168, sec. 2.3).

    student, teacher : (rows, dim). Variance: hinge at 1 on each dimension's deviation, mean of both networks.
    Covariance: squares off the diagonal, divided by dim, sum of both networks.
    """

    def terms(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float() - x.float().mean(0)
        std = torch.sqrt(x.var(0) + 1e-4)
        cov = x.t() @ x / (x.shape[0] - 1)
        off = cov.square().sum() - cov.diagonal().square().sum()
        return F.relu(1 - std).mean(), off / x.shape[1]

    std_s, cov_s = terms(student)
    std_t, cov_t = terms(teacher)
    return (std_s + std_t) / 2, cov_s + cov_t


def _entropy(p: Tensor) -> Tensor:
    return -(p * torch.log(p.clamp_min(1e-30))).sum(-1)


class Dino(nn.Module):
    """Student, teacher, centre and the loss between them.

    ``encoder`` maps a batch of crops to embeddings ``(rows, dim)``. Call with the crops' batches per length (the
    teacher's first); get the loss of this process. After the optimizer's step call :meth:`update_teacher`.

    >>> torch.manual_seed(0) and None
    >>> dino = Dino(nn.Linear(5, 8), 8, DinoConfig(prototypes=16, head_hidden=12, bottleneck=6, head_norm=False))
    >>> loss = dino([torch.randn(6, 5), torch.randn(12, 5)], views=(2, 4))   # 3 utterances, 2 long and 4 short crops
    >>> loss.backward(); dino.update_teacher(0.99)
    >>> sorted(dino.metrics())[:3]
    ['effective_dimension', 'embedding_spread', 'kl']
    """

    RECENT = 512  # embeddings kept for spread and effective dimension: a batch alone has too few rows to tell

    def __init__(self, encoder: nn.Module, dim: int, config: DinoConfig) -> None:
        super().__init__()
        self.config = config
        head = DinoHead(
            dim,
            prototypes=config.prototypes,
            layers=config.head_layers,
            hidden=config.head_hidden,
            bottleneck=config.bottleneck,
            norm=config.head_norm,
        )
        self.student = Branch(encoder, head)
        self.teacher = always_batch_statistics(copy.deepcopy(self.student).requires_grad_(False))
        self.register_buffer("center", torch.zeros(config.prototypes))
        self.register_buffer("marginal", torch.full((config.prototypes,), 1.0 / config.prototypes))
        self.register_buffer("recent", torch.zeros(self.RECENT, dim))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.teacher_temp = config.warmup_teacher_temp
        self.regularisation = config.regularisation_start
        self._last: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Dino:
        """Training mode; the teacher normalises by running statistics under ``teacher_norm: running``."""
        super().train(mode)
        if mode and self.config.teacher_norm == "running":
            self.teacher.eval()
        return self

    def forward(self, batches: Sequence[Any], views: tuple[int, int]) -> Tensor:
        """Loss of this process's crops.

        batches : one entry per crop length, the global crops first; each what ``encoder`` takes, rows ordered crop by
        crop (all utterances' first crop, then all utterances' second, ...). views : (global, local) crops of each.
        """
        config, (n_global, n_local) = self.config, views
        with torch.no_grad():
            teacher_embeddings, teacher_logits = self.teacher(batches[:1])
        embeddings, logits = self.student(batches)
        targets = self._targets(teacher_logits)
        student = logits.view(n_global + n_local, -1, config.prototypes)
        loss = cross_view_loss(student, targets.view(n_global, -1, config.prototypes), config.student_temp)
        self._observe(loss, targets, teacher_embeddings)
        globals_ = embeddings[: teacher_embeddings.shape[0]].view(n_global, -1, embeddings.shape[1])
        if config.koleo:
            koleo = sum(koleo_loss(gather_rows(view)) for view in globals_) / n_global
            loss = loss + config.koleo * koleo
            self._last["koleo"] = koleo.detach()
        if config.variance or config.covariance:
            own = teacher_embeddings.view(n_global, -1, embeddings.shape[1])
            variance, covariance = rdino_regularisation(gather_rows(globals_.mean(0)), gather_rows(own.mean(0)))
            loss = loss + self.regularisation * (config.variance * variance + config.covariance * covariance)
            self._last.update(variance=variance.detach(), covariance=covariance.detach())
        return loss

    @torch.no_grad()
    def _targets(self, logits: Tensor) -> Tensor:
        config = self.config
        if config.targets == "sinkhorn":
            return sinkhorn_targets(logits, self.teacher_temp, config.sinkhorn_iterations)
        targets = F.softmax((logits - self.center) / self.teacher_temp, dim=-1)
        mean = sum_over_ranks_(logits.sum(0)) / (logits.shape[0] * world_size())
        self.center.lerp_(mean, 1 - config.center_momentum)
        return targets

    @torch.no_grad()
    def _observe(self, loss: Tensor, targets: Tensor, embeddings: Tensor) -> None:
        entropy = _entropy(targets).mean()
        self._last = {"cross_entropy": loss.detach(), "teacher_entropy": entropy}
        mean = sum_over_ranks_(targets.sum(0)) / (targets.shape[0] * world_size())
        # a batch has fewer rows than there are prototypes, so its own marginal says little: averaged over ~100 steps
        self.marginal.lerp_(mean, 0.01 if int(self.seen) else 1.0)
        rows = gather_rows(embeddings)[: self.RECENT]
        place = (torch.arange(rows.shape[0], device=rows.device) + self.seen) % self.RECENT
        self.recent[place] = rows
        self.seen += rows.shape[0]

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Teacher becomes momentum * teacher + (1 - momentum) * student; BatchNorm as ``teacher_norm`` says."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1.0 - momentum)
        if self.config.teacher_norm == "own":
            return
        for kept, new in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
            if self.config.teacher_norm == "running" and kept.is_floating_point():
                kept.lerp_(new, 1.0 - momentum)
            else:
                kept.copy_(new)

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Numbers of the last step (this process's loss terms; entropy, spread and dimension over the recent past).

        ``loss_minus_lnk`` is 0 for a uniform output, ``kl`` the part of the loss that learning can remove,
        ``embedding_spread`` 1 for directions spread evenly and 0 for a point, ``effective_dimension`` at most dim.
        """
        last = {k: float(v) for k, v in self._last.items()}
        rows = self.recent[: min(int(self.seen), self.RECENT)]
        unit = F.normalize(rows.float(), dim=-1)
        out = {
            "loss_minus_lnk": last["cross_entropy"] - math.log(self.config.prototypes),
            "teacher_entropy": last["teacher_entropy"],
            "marginal_entropy": float(_entropy(self.marginal)),
            "kl": last["cross_entropy"] - last["teacher_entropy"],
            "embedding_spread": float(unit.std(0, unbiased=False).mean()) * math.sqrt(unit.shape[1]),
            "effective_dimension": effective_dimension(rows.detach().cpu()),
            "teacher_temp": self.teacher_temp,
        }
        out.update({k: last[k] for k in ("koleo", "variance", "covariance") if k in last})
        return out


class CollapseMonitor:
    """Recognises the ways in which DINO fails silently, from the metrics of log steps.

    >>> monitor = CollapseMonitor(CollapseConfig(patience=1), prototypes=2048, grace_steps=50)
    >>> bad = dict(loss_minus_lnk=-3.0, teacher_entropy=2.5, marginal_entropy=2.7, effective_dimension=3.0,
    ...            embedding_spread=0.4)
    >>> monitor.update(20, bad) is None, monitor.update(60, bad) is not None
    (True, True)
    """

    def __init__(self, config: CollapseConfig, *, prototypes: int, grace_steps: int) -> None:
        self.config, self.lnk, self.grace_steps = config, math.log(prototypes), grace_steps
        self.counts: dict[str, int] = {}

    def update(self, step: int, metrics: dict[str, float]) -> str | None:
        """The advice if one sign has now been seen ``patience`` log steps in a row, else None."""
        if self.config.action == "off" or step <= self.grace_steps:
            return None
        c = self.config
        signs = {
            "uniform": (
                abs(metrics["loss_minus_lnk"]) < c.min_below_lnk,
                f"the output is still uniform over the prototypes (loss - ln K = {metrics['loss_minus_lnk']:.4f})",
                "raise optim.lr, lower dino.teacher_temp, or check that the crops of one utterance share a speaker",
            ),
            "entropy": (
                metrics["teacher_entropy"] > c.max_entropy_fraction * self.lnk,
                f"the teacher's targets say nothing (entropy {metrics['teacher_entropy']:.2f} of {self.lnk:.2f} nats)",
                "freeze the prototypes for longer (dino.freeze_last_layer), lower dino.teacher_temp or optim.lr",
            ),
            "marginal": (
                metrics["marginal_entropy"] < c.min_marginal_fraction * self.lnk,
                f"few prototypes are used (marginal entropy {metrics['marginal_entropy']:.2f} of {self.lnk:.2f} nats)",
                "use dino.targets=sinkhorn, or raise dino.teacher_temp",
            ),
            "dimension": (
                metrics["effective_dimension"] < c.min_effective_dimension,
                f"embeddings fill only {metrics['effective_dimension']:.1f} dimensions",
                "use dino.targets=sinkhorn and dino.koleo=0.3 (or dino.variance=10 dino.covariance=1) on little data",
            ),
            "point": (
                metrics["embedding_spread"] < c.min_spread,
                f"embeddings have shrunk to a point (spread {metrics['embedding_spread']:.4f})",
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


def parameter_groups(module: nn.Module, decay_norm_and_bias: bool = False) -> list[dict[str, Any]]:
    """Optimizer groups: weights with weight decay, biases and norm parameters without (unless asked)."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim == 1 and not decay_norm_and_bias else decay).append(parameter)
    groups = [{"params": decay, "decay": True}, {"params": plain, "decay": False}]
    return [g for g in groups if g["params"]]
