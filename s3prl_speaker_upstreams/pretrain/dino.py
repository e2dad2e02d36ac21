"""DINO for speakers: Caron et al. 2021 (arXiv 2104.14294), read from top to bottom.

A student sees all crops of an utterance, an exponential-moving-average teacher only the long ones; the student's
distribution over prototypes must match the teacher's distribution of *another* crop of the same utterance. The
teacher's distribution is kept from collapsing by centring and sharpening, or by Sinkhorn-Knopp balancing (arXiv
2006.09882). KoLeo (arXiv 1806.03198) and RDINO's variance and covariance terms (arXiv 2211.04168) keep embeddings
apart; prototypes that both networks share and a flat mean assignment make it SDPN (arXiv 2308.02774).

One step, in the order of :class:`Dino`'s methods: ``set_step`` (schedules), ``forward`` (teacher, student, targets,
loss) and backward, ``after_backward`` (the last layer is frozen at first), the optimizer, ``after_step`` (the teacher
follows).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ecapa import Ecapa
from ..ecapa.layers import always_batch_statistics
from .collapse import Watch, entropy
from .config import DinoConfig
from .objective import Objective
from .pairs import variance_covariance
from .ranks import gather_rows, mean_over_ranks, sum_over_ranks, sum_over_ranks_, world_size
from .schedules import half_cosine, ramp

__all__ = [
    "Branch",
    "Dino",
    "DinoHead",
    "Prototypes",
    "cross_view_loss",
    "koleo_loss",
    "mean_entropy_loss",
    "rdino_regularisation",
    "sinkhorn_targets",
]


class Dino(Objective):
    """Student, teacher, centre and the loss between them.

    ``encoder`` maps a batch of crops to embeddings ``(rows, dim)``. Call with the crops' batches per length (the
    teacher's first); get the loss of this process.

    >>> torch.manual_seed(0) and None
    >>> dino = Dino(nn.Linear(5, 8), 8, DinoConfig(prototypes=16, head_hidden=12, bottleneck=6, head_norm=False))
    >>> loss = dino([torch.randn(6, 5), torch.randn(12, 5)], views=(2, 4))   # 3 utterances, 2 long and 4 short crops
    >>> loss.backward(); dino.after_step()
    >>> sorted(dino.metrics())[:3]
    ['effective_dimension', 'embedding_spread', 'kl']
    """

    center: Tensor

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
        self.watch = Watch(dim, config.prototypes)
        self.teacher_temp, self.momentum = config.warmup_teacher_temp, config.momentum
        self.regularisation = config.regularisation_start
        self.frozen = False
        self.total = self.temp_steps = self.freeze_steps = self.regularisation_steps = 0
        self._last: dict[str, Tensor] = {}
        balanced = "Sinkhorn-Knopp" if config.targets == "sinkhorn" else "the centre"
        self.batch_statistics = f"BatchNorm, {balanced}{' and KoLeo' if config.koleo else ''}"

    def plan(self, steps: Callable[[str], int], total: int) -> None:
        """See :class:`.objective.Objective`."""
        self.total = total
        self.temp_steps = steps(self.config.teacher_temp_warmup)
        self.freeze_steps = steps(self.config.freeze_last_layer)
        self.regularisation_steps = steps(self.config.regularisation_warmup)

    # --- a step, from top to bottom ------------------------------------------------------------------------------

    def set_step(self, step: int) -> dict[str, float]:
        """Schedules of the optimizer step ``step`` (0-based): teacher's temperature and momentum; what to log."""
        c = self.config
        self.teacher_temp = ramp(step, self.temp_steps, c.warmup_teacher_temp, c.teacher_temp)
        self.momentum = half_cosine(step, self.total, c.momentum, c.momentum_end)
        self.regularisation = ramp(step, self.regularisation_steps, c.regularisation_start, c.regularisation_weight)
        self.frozen = step < self.freeze_steps
        return {"momentum": self.momentum, "teacher_temp": self.teacher_temp}

    def forward(self, features: Sequence[Tensor], views: tuple[int, int], labels: Tensor | None = None) -> Tensor:
        """Loss of this process's crops.

        features : one entry per crop length, the global crops first; each what ``encoder`` takes, rows ordered crop by
        crop (all utterances' first crop, then all utterances' second, ...). views : (global, local) crops of each.
        labels : not used.
        """
        config, (n_global, n_local) = self.config, views
        with torch.no_grad():
            teacher_embeddings, teacher_logits = self.teacher(features[:1], self._prototypes())
            targets = self._targets(teacher_logits)
        embeddings, logits = self.student(features)

        student = logits.view(n_global + n_local, -1, config.prototypes)
        loss = cross_view_loss(student, targets.view(n_global, -1, config.prototypes), config.student_temp)
        self._last = {"cross_entropy": loss.detach(), "teacher_entropy": entropy(targets).mean()}
        self.watch.see(teacher_embeddings, targets)

        if config.me_max:
            flat = mean_entropy_loss(logits, config.student_temp)
            loss = loss + config.me_max * flat
            self._last["me_max"] = flat.detach()
        long = embeddings[: teacher_embeddings.shape[0]].view(n_global, -1, embeddings.shape[1])
        if config.koleo:
            koleo = torch.stack([koleo_loss(gather_rows(view)) for view in long]).mean()
            loss = loss + config.koleo * koleo
            self._last["koleo"] = koleo.detach()
        if config.variance or config.covariance:
            own = teacher_embeddings.view(n_global, -1, embeddings.shape[1])
            variance, covariance = rdino_regularisation(gather_rows(long.mean(0)), gather_rows(own.mean(0)))
            if config.covariance_scale == "code":
                covariance = covariance * (embeddings.shape[1] / config.prototypes)
            loss = loss + self.regularisation * (config.variance * variance + config.covariance * covariance)
            self._last.update(variance=variance.detach(), covariance=covariance.detach())
        return loss

    def _prototypes(self) -> Prototypes | None:
        """The student's, where both networks share them."""
        return self.student.head.last_layer if self.config.shared_prototypes else None

    def _targets(self, logits: Tensor) -> Tensor:
        """The teacher's distributions, kept from collapsing; the centre follows the teacher's mean."""
        config = self.config
        if config.targets == "sinkhorn":
            return sinkhorn_targets(logits, self.teacher_temp, config.sinkhorn_iterations)
        targets = F.softmax((logits - self.center) / self.teacher_temp, dim=-1)
        self.center.lerp_(mean_over_ranks(logits.mean(0)), 1 - config.center_momentum)
        return targets

    def after_backward(self) -> None:
        """Drop the last layer's gradient while it is frozen: moving prototypes too early is unstable."""
        if self.frozen:
            self.student.head.last_layer.weight.grad = None

    @torch.no_grad()
    def after_step(self) -> None:
        """Teacher becomes momentum * teacher + (1 - momentum) * student; BatchNorm as ``teacher_norm`` says."""
        kept = 1.0 - self.momentum
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), kept)
        if self.config.teacher_norm == "own":
            return
        for own, new in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
            if self.config.teacher_norm == "running" and own.is_floating_point():
                own.lerp_(new, kept)
            else:
                own.copy_(new)

    # --- around it -----------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Dino:
        """Training mode; the teacher normalises by running statistics under ``teacher_norm: running``."""
        super().train(mode)
        if mode and self.config.teacher_norm == "running":
            self.teacher.eval()
        return self

    def metrics(self) -> dict[str, float]:
        """Numbers of the last step (this process's loss terms; entropy, spread and dimension over the recent past).

        ``loss_minus_lnk`` is 0 for a uniform output, ``kl`` the part of the loss that learning can remove; the others
        are those of :meth:`.collapse.Watch.metrics`.
        """
        last = {k: float(v) for k, v in self._last.items()}
        out = {
            "loss_minus_lnk": last["cross_entropy"] - math.log(self.config.prototypes),
            "teacher_entropy": last["teacher_entropy"],
            "kl": last["cross_entropy"] - last["teacher_entropy"],
            **self.watch.metrics(),
            "teacher_temp": self.teacher_temp,
        }
        out.update({k: last[k] for k in ("koleo", "variance", "covariance", "me_max") if k in last})
        return out

    def networks(self) -> dict[str, Ecapa]:
        """See :class:`.objective.Objective`."""
        return {"teacher": self.teacher.encoder.ecapa, "student": self.student.encoder.ecapa}  # type: ignore[dict-item]


# ------------------------------------------------------------------------------------------------------ networks
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

    def forward(self, x: Tensor, prototypes: Prototypes | None = None) -> Tensor:
        """x : (rows, dim) embeddings -> (rows, prototypes) cosines, with the head's own or the given prototypes."""
        return (prototypes or self.last_layer)(F.normalize(self.mlp(x), dim=-1))


class Branch(nn.Module):
    """Encoder and head of the student or of the teacher.

    ``encoder`` maps one batch of equally long crops to embeddings ``(rows, dim)``; it is called once per crop length.
    """

    def __init__(self, encoder: nn.Module, head: DinoHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, batches: Sequence[Tensor], prototypes: Prototypes | None = None) -> tuple[Tensor, Tensor]:
        """One batch per crop length -> embeddings (rows, dim) and logits (rows, prototypes), in the batches' order;
        by the given prototypes instead of the head's own."""
        embeddings = torch.cat([self.encoder(batch).float() for batch in batches])
        with torch.autocast(
            embeddings.device.type, enabled=False
        ):  # 65,536-way softmax at temperature 0.04 needs float32
            return embeddings, self.head(embeddings, prototypes)


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


class _UnitRowsLinear(torch.autograd.Function):
    """``z @ (v / |v|).T`` for unit-norm rows of ``v``, without ever writing the normalised matrix.

    With 65,536 prototypes ``v`` is 64 MB while ``z`` has tens of rows: what counts is how often ``v`` is walked
    through. Scaling the logits by ``1 / |v|`` costs a small array; the radial part of the gradient, which normalisation
    removes, ``(g_k . v_k) / |v_k|^2``, comes out of ``sum(grad * logits)`` over the rows of ``z`` alone.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, v: Tensor) -> Tensor:
        inverse = torch.linalg.vector_norm(v, dim=1).clamp_min(1e-12).reciprocal_()
        logits = (z @ v.t()).mul_(inverse)
        ctx.save_for_backward(z, v, inverse, logits)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        z, v, inverse, logits = ctx.saved_tensors
        scaled = grad * inverse
        grad_z = scaled @ v if ctx.needs_input_grad[0] else None
        grad_v = None
        if ctx.needs_input_grad[1]:
            radial = (grad * logits).sum(0).mul_(inverse.square())
            grad_v = (v * radial.unsqueeze(1)).addmm_(scaled.t(), z, beta=-1.0)
        return grad_z, grad_v


# ------------------------------------------------------------------------------------------------------ losses
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


def koleo_loss(embeddings: Tensor, eps: float = 1e-8) -> Tensor:
    """Minus the mean log distance to the nearest neighbour among unit embeddings (Kozachenko-Leonenko).

    embeddings : (rows, dim), rows >= 2, of different utterances.
    """
    z = F.normalize(embeddings.float(), dim=-1, eps=eps)
    with torch.no_grad():
        cosines = z @ z.t()
        nearest = cosines.fill_diagonal_(-2.0).argmax(1)
    return -torch.log(F.pairwise_distance(z, z[nearest], eps=eps) + eps).mean()


def mean_entropy_loss(logits: Tensor, temperature: float) -> Tensor:
    """ln(prototypes) minus the entropy of the mean assignment, over all crops of all processes; 0 if it is flat.

    logits : (rows, prototypes). The "me-max" term of masked siamese networks (arXiv 2204.07141) and SDPN.

    >>> float(mean_entropy_loss(torch.zeros(3, 4), 0.1))
    0.0
    """
    mean = sum_over_ranks(F.softmax(logits.float() / temperature, dim=-1).mean(0)) / world_size()
    return math.log(logits.shape[1]) - entropy(mean)


def rdino_regularisation(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """RDINO's (variance, covariance) losses on embeddings averaged over the global crops (arXiv 2211.04168, sec. 2.3).

    student, teacher : (rows, dim). Variance: hinge at 1 on each dimension's deviation, mean of both networks.
    Covariance: squares off the diagonal, divided by dim, sum of both networks. (The authors' code divides by the
    number of prototypes instead, 65,536 in its recipe: ``dino.covariance_scale``.)
    """
    (std_s, cov_s), (std_t, cov_t) = variance_covariance(student), variance_covariance(teacher)
    return (std_s + std_t) / 2, cov_s + cov_t
