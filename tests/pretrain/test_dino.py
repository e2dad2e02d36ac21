"""DINO's parts against hand-computed numbers, invariances and plain re-statements of the published formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s3prl_speaker_upstreams.pretrain.collapse import CollapseMonitor
from s3prl_speaker_upstreams.pretrain.config import CollapseConfig, DinoConfig
from s3prl_speaker_upstreams.pretrain.dino import (
    Dino,
    DinoHead,
    Prototypes,
    cross_view_loss,
    koleo_loss,
    rdino_regularisation,
    sinkhorn_targets,
)
from s3prl_speaker_upstreams.pretrain.objective import parameter_groups
from s3prl_speaker_upstreams.verification.metrics import effective_dimension


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small(**changes) -> DinoConfig:
    values = {"prototypes": 16, "head_hidden": 12, "bottleneck": 6, "head_norm": False, **changes}
    return DinoConfig(**values)


def make(encoder=None, **changes) -> Dino:
    return Dino(encoder or nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)), 8, small(**changes))


# --- prototypes ----------------------------------------------------------------------------------------------------


def test_prototypes_are_weight_normalised_and_their_gradient_is_autograds():
    layer = Prototypes(7, 11).double()
    with torch.no_grad():
        layer.weight.mul_(torch.rand(11, 1) * 5 + 0.1)
    z = F.normalize(torch.randn(4, 7, dtype=torch.double), dim=-1).requires_grad_()
    upstream = torch.randn(4, 11, dtype=torch.double)
    ours = torch.autograd.grad((layer(z) * upstream).sum(), (z, layer.weight))
    plain = torch.autograd.grad((F.linear(z, F.normalize(layer.weight)) * upstream).sum(), (z, layer.weight))
    torch.testing.assert_close(layer(z), F.linear(z, F.normalize(layer.weight)))
    torch.testing.assert_close(ours[0], plain[0])
    torch.testing.assert_close(ours[1], plain[1])
    assert torch.autograd.gradcheck(lambda a, b: type(layer).forward(_with(layer, b), a), (z, layer.weight))


def _with(layer, weight):
    other = Prototypes(weight.shape[1], weight.shape[0]).double()
    del other.weight
    other.weight = weight
    return other


def test_scaling_a_prototype_changes_nothing():
    layer, z = Prototypes(4, 5), F.normalize(torch.randn(3, 4), dim=-1)
    before = layer(z)
    with torch.no_grad():
        layer.weight[2] *= 100
    torch.testing.assert_close(layer(z), before)


def test_head_has_the_published_shape():
    head = DinoHead(192, prototypes=65536)
    linears = [m for m in head.mlp if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == [(192, 2048), (2048, 2048), (2048, 256)]
    assert sum(isinstance(m, nn.BatchNorm1d) for m in head.mlp) == 2
    assert head.last_layer.weight.shape == (65536, 256)
    cosines = head(torch.randn(3, 192))
    assert cosines.shape == (3, 65536) and cosines.abs().max() <= 1 + 1e-5


# --- the loss --------------------------------------------------------------------------------------------------------


def _pairwise(student, targets, temperature):
    terms = []
    for t in range(targets.shape[0]):
        for v in range(student.shape[0]):
            if t != v:
                terms.append(-(targets[t] * F.log_softmax(student[v] / temperature, -1)).sum(-1).mean())
    return sum(terms) / len(terms)


@pytest.mark.parametrize("views", [2, 3, 6])
def test_loss_is_the_mean_over_all_pairs_of_different_crops(views):
    student = torch.randn(views, 5, 9, dtype=torch.double, requires_grad=True)
    targets = torch.softmax(torch.randn(2, 5, 9, dtype=torch.double), -1)
    ours, plain = cross_view_loss(student, targets, 0.1), _pairwise(student, targets, 0.1)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (ours, plain)))


def test_a_uniform_student_loses_ln_k():
    loss = cross_view_loss(torch.zeros(6, 2, 64), torch.softmax(torch.randn(2, 2, 64), -1), 0.1)
    assert float(loss) == pytest.approx(math.log(64), abs=1e-5)


def test_centre_follows_the_teachers_mean_and_is_subtracted():
    dino = make(targets="centring", center_momentum=0.75)
    logits = torch.randn(6, 16)
    dino.teacher_temp = 0.05
    first = dino._targets(logits)
    torch.testing.assert_close(first, F.softmax(logits / 0.05, -1))
    torch.testing.assert_close(dino.center, 0.25 * logits.mean(0))
    second = dino._targets(logits)
    torch.testing.assert_close(second, F.softmax((logits - 0.25 * logits.mean(0)) / 0.05, -1))


# --- Sinkhorn-Knopp -------------------------------------------------------------------------------------------------


def test_sinkhorn_balances_prototypes_and_keeps_rows_distributions():
    logits = torch.randn(40, 8) * 0.1 + torch.linspace(0, 1, 8)  # one prototype is everybody's favourite
    plain = F.softmax(logits / 0.05, -1).mean(0)
    balanced = sinkhorn_targets(logits, 0.05, iterations=50)
    torch.testing.assert_close(balanced.sum(1), torch.ones(40))
    torch.testing.assert_close(balanced.mean(0), torch.full((8,), 1 / 8), atol=1e-3, rtol=0)
    assert plain.max() > 0.5


def test_sinkhorn_ignores_offsets_and_does_not_overflow():
    logits = torch.randn(12, 6)
    a = sinkhorn_targets(logits, 0.04)
    torch.testing.assert_close(sinkhorn_targets(logits + 1000.0, 0.04), a, rtol=1e-2, atol=1e-3)
    assert torch.isfinite(sinkhorn_targets(logits * 1000, 0.04)).all()


# --- regularisers ---------------------------------------------------------------------------------------------------


def test_koleo_by_hand():
    # unit vectors at 0, 90 and 120 degrees: nearest distances 2 sin(45), 2 sin(15), 2 sin(15)
    angles = torch.tensor([0.0, math.pi / 2, 2 * math.pi / 3])
    z = 3 * torch.stack([angles.cos(), angles.sin()], 1)  # length does not matter
    expected = -(math.log(2 * math.sin(math.pi / 4)) + 2 * math.log(2 * math.sin(math.pi / 12))) / 3
    assert float(koleo_loss(z)) == pytest.approx(expected, abs=1e-5)


def test_koleo_pushes_neighbours_apart():
    z = torch.nn.Parameter(F.normalize(torch.randn(32, 8) * 0.05 + torch.ones(8), dim=-1))
    before = effective_dimension(z.detach())
    optimizer = torch.optim.SGD([z], lr=0.5)
    spread = [float(torch.pdist(F.normalize(z.detach(), dim=-1)).min())]
    for _ in range(50):
        optimizer.zero_grad()
        koleo_loss(z).backward()
        optimizer.step()
    spread.append(float(torch.pdist(F.normalize(z.detach(), dim=-1)).min()))
    assert spread[1] > 2 * spread[0] and effective_dimension(z.detach()) > 0.9 * before


def test_rdino_terms_by_hand():
    x = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])  # variance 2 in both, covariance 2
    y = torch.tensor([[0.5, 0.0], [-0.5, 0.0]])  # variances 0.5 and 0, covariance 0
    variance, covariance = rdino_regularisation(x, y)
    y_terms = (max(0.0, 1 - math.sqrt(0.5001)) + (1 - math.sqrt(1e-4))) / 2
    assert float(variance) == pytest.approx((0.0 + y_terms) / 2, abs=1e-6)
    assert float(covariance) == pytest.approx(2 * 2.0**2 / 2, abs=1e-5)


def test_effective_dimension():
    assert effective_dimension(torch.randn(2000, 3) @ torch.randn(3, 20)) < 3.01
    assert effective_dimension(torch.randn(4000, 10)) == pytest.approx(10, abs=0.1)
    shifted = torch.randn(50, 4)
    assert effective_dimension(shifted + 100) == pytest.approx(effective_dimension(shifted), rel=1e-4)


# --- teacher ---------------------------------------------------------------------------------------------------------


def step(dino: Dino, momentum: float = 0.9) -> torch.Tensor:
    dino.train()
    loss = dino([torch.randn(6, 5) + 3.0, torch.randn(12, 5) - 1.0], views=(2, 4))
    loss.backward()
    with torch.no_grad():
        for p in dino.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
    dino.momentum = momentum
    dino.after_step()
    return loss


def test_teacher_starts_equal_moves_as_an_average_and_gets_no_gradient():
    dino = make()
    for s, t in zip(dino.student.parameters(), dino.teacher.parameters(), strict=True):
        torch.testing.assert_close(s, t)
    before = [t.clone() for t in dino.teacher.parameters()]
    step(dino, 0.75)
    moved = 0
    for b, s, t in zip(before, dino.student.parameters(), dino.teacher.parameters(), strict=True):
        torch.testing.assert_close(t, 0.75 * b + 0.25 * s)
        assert t.grad is None and not t.requires_grad
        moved += int(not torch.equal(b, t))
    assert moved > 3
    assert not any(p.requires_grad for p in dino.teacher.parameters())
    trained = {id(p) for g in parameter_groups(dino) for p in g["params"]}
    assert trained == {id(p) for p in dino.student.parameters()}


def test_teacher_sees_global_crops_only_and_student_all():
    calls = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 8)

        def forward(self, x):
            calls.append((self.linear.weight.requires_grad, x.shape[0]))
            return self.linear(x)

    dino = make(Spy())
    dino([torch.randn(6, 5), torch.randn(12, 5)], views=(2, 4))
    assert calls == [(False, 6), (True, 6), (True, 12)]  # one pass per network and crop length


def _norms(dino):
    return dino.student.encoder[1], dino.teacher.encoder[1]


def test_teacher_norm_own_keeps_statistics_of_its_own_batches():
    dino = make(teacher_norm="own")
    torch.manual_seed(1)
    x = torch.randn(6, 5) + 3.0
    with torch.no_grad():
        expected = 0.1 * dino.teacher.encoder[0](x).mean(0)
    torch.manual_seed(1)
    step(dino)
    student, teacher = _norms(dino)
    torch.testing.assert_close(teacher.running_mean, expected)
    assert int(teacher.num_batches_tracked) == 1 and int(student.num_batches_tracked) == 2
    assert not torch.allclose(student.running_mean, teacher.running_mean)


def test_teacher_norm_student_copies_statistics():
    dino = make(teacher_norm="student")
    for _ in range(3):
        step(dino)
    student, teacher = _norms(dino)
    assert torch.equal(student.running_mean, teacher.running_mean)
    assert torch.equal(student.running_var, teacher.running_var)
    assert torch.equal(student.num_batches_tracked, teacher.num_batches_tracked)
    assert dino.teacher.training  # while training it normalises by its batch


def test_teacher_norm_running_normalises_by_averaged_statistics():
    dino = make(teacher_norm="running")
    dino.train()
    assert not dino.teacher.training and dino.student.training
    before = _norms(dino)[1].running_mean.clone()
    step(dino, 0.8)
    student, teacher = _norms(dino)
    torch.testing.assert_close(teacher.running_mean, 0.8 * before + 0.2 * student.running_mean)
    # rows do not depend on the rest of the batch
    x = torch.randn(6, 5)
    torch.testing.assert_close(dino.teacher([x])[0][:2], dino.teacher([x[:2]])[0])


def test_own_policy_normalises_by_the_batch():
    dino = make(teacher_norm="own").train()
    x = torch.randn(6, 5)
    assert not torch.allclose(dino.teacher([x])[0][:2], dino.teacher([x[:2]])[0])


# --- learning and collapse --------------------------------------------------------------------------------------------


def test_it_learns_to_tell_utterances_apart():
    """Crops of one "speaker" share a direction: after training, embeddings of one speaker are closer than of two."""
    torch.manual_seed(3)
    speakers = torch.randn(12, 5)
    dino = Dino(
        nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 8)),
        8,
        small(prototypes=32, targets="sinkhorn", koleo=0.1),
    )
    optimizer = torch.optim.AdamW(parameter_groups(dino), lr=5e-3)

    def crops(n):
        return torch.cat([torch.cat([speakers, 3 * torch.randn(12, 5)], 1) for _ in range(n)])

    def gap():
        with torch.no_grad():
            z = F.normalize(dino.teacher.encoder(crops(20)), dim=-1).view(20, 12, 8)
            z = F.normalize(z - z.mean((0, 1)), dim=-1)
            same = torch.einsum("asd,bsd->sab", z, z).mean()
            other = torch.einsum("asd,btd->ab", z, z).mean() / 144
        return float(same - other)

    before, losses = gap(), []
    for _ in range(250):
        loss = dino([crops(2), crops(4)], views=(2, 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dino.momentum = 0.95
        dino.after_step()
        losses.append(float(dino._last["cross_entropy"]))
    assert sum(losses[-20:]) < sum(losses[:20])
    assert gap() > before + 0.1
    metrics = dino.metrics()
    assert metrics["marginal_entropy"] > 0.8 * math.log(32)
    assert metrics["kl"] == pytest.approx(metrics["loss_minus_lnk"] + math.log(32) - metrics["teacher_entropy"])


def test_metrics_see_a_collapse_to_a_point_and_to_a_line():
    class Constant(nn.Module):
        def __init__(self, mode):
            super().__init__()
            self.linear, self.mode = nn.Linear(5, 8), mode

        def forward(self, x):
            y = self.linear(x)
            return y * 1e-4 + 1.0 if self.mode == "point" else y[:, :1] * torch.ones(8)

    for mode, key, limit in (("point", "embedding_spread", 0.02), ("line", "effective_dimension", 1.5)):
        dino = make(Constant(mode))
        for _ in range(8):
            step(dino)
        assert dino.metrics()[key] < limit
    healthy = make()
    for _ in range(8):
        step(healthy)
    assert healthy.metrics()["embedding_spread"] > 0.02 and healthy.metrics()["effective_dimension"] > 1.5


HEALTHY = {
    "loss_minus_lnk": -3.0,
    "teacher_entropy": 5.0,
    "marginal_entropy": 7.5,
    "effective_dimension": 30.0,
    "embedding_spread": 0.8,
}


@pytest.mark.parametrize(
    ("bad", "advice"),
    [
        ({"effective_dimension": 3.0}, "dino.koleo=0.3"),
        ({"marginal_entropy": 2.7}, "dino.targets=sinkhorn"),
        ({"embedding_spread": 1e-3}, "shrunk to a point"),
        ({"loss_minus_lnk": 0.0}, "still uniform"),
        ({"teacher_entropy": 7.48}, "dino.freeze_last_layer"),
    ],
)
def test_every_collapse_is_recognised_after_grace_and_patience(bad, advice):
    monitor = CollapseMonitor(CollapseConfig(patience=3), prototypes=2048, grace_steps=50)
    sick = {**HEALTHY, **bad}
    assert [monitor.update(s, sick) for s in range(10, 60, 10)] == [None] * 5  # within grace
    assert monitor.update(60, sick) is None and monitor.update(70, sick) is None
    assert monitor.update(80, HEALTHY) is None  # a recovery starts the count anew
    assert monitor.update(90, sick) is None and monitor.update(100, sick) is None
    assert advice in monitor.update(110, sick)


def test_plain_centring_statistics_of_the_brief_are_called_a_collapse_and_the_good_recipe_is_not():
    monitor = CollapseMonitor(CollapseConfig(patience=1), prototypes=2048, grace_steps=0)
    assert monitor.update(100, {**HEALTHY, "marginal_entropy": 2.7, "effective_dimension": 3.0}) is not None
    assert monitor.update(100, {**HEALTHY, "marginal_entropy": 7.6, "effective_dimension": 22.0}) is None
