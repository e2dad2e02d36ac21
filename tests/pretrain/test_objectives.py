"""Objectives beside DINO against plain re-statements of their formulas, and that each trains through the same loop."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.pretrain.checkpointing import CheckpointStore
from s3prl_speaker_upstreams.pretrain.config import AamConfig, DinoConfig, differences, load
from s3prl_speaker_upstreams.pretrain.dino import Dino, mean_entropy_loss, rdino_regularisation
from s3prl_speaker_upstreams.pretrain.export import encoder_of
from s3prl_speaker_upstreams.pretrain.pairs import nt_xent, variance_covariance
from s3prl_speaker_upstreams.pretrain.supervised import Softmax, Supervised


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_nt_xent_is_the_papers_sum():
    a, b = torch.randn(5, 4, dtype=torch.double), torch.randn(5, 4, dtype=torch.double)
    z = F.normalize(torch.cat([a, b]).float(), dim=-1)
    terms = []
    for i in range(10):
        others = [math.exp(float(z[i] @ z[k]) / 0.2) for k in range(10) if k != i]
        terms.append(-math.log(math.exp(float(z[i] @ z[(i + 5) % 10]) / 0.2) / sum(others)))
    assert float(nt_xent(a, b, 0.2)) == pytest.approx(sum(terms) / 10, abs=1e-5)


def test_variance_and_covariance_by_hand():
    x = torch.tensor([[0.5, 0.5, 0.0], [-0.5, -0.5, 0.0]])  # variances 0.5, 0.5, 0; one covariance of 0.5
    variance, covariance = variance_covariance(x)
    assert float(variance) == pytest.approx((2 * (1 - math.sqrt(0.5001)) + 1 - 0.01) / 3, abs=1e-6)
    assert float(covariance) == pytest.approx(2 * 0.25 / 3, abs=1e-6)


def test_softmax_is_a_linear_layer_and_cross_entropy():
    head, x, y = Softmax(6, 4), torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    loss, accuracy = head(x, y)
    torch.testing.assert_close(loss, F.cross_entropy(head.linear(x), y))
    assert float(accuracy) == pytest.approx(float((head.linear(x).argmax(1) == y).float().mean()))


def test_supervised_on_several_crops_is_the_mean_over_crops():
    objective = Supervised(nn.Linear(5, 8), 8, AamConfig(margin=0.2), classes=3)
    objective.plan(lambda text: 0, 1)
    objective.set_step(0)
    long, short, labels = torch.randn(4, 5), torch.randn(8, 5), torch.tensor([2, 0])
    loss = objective([long, short], views=(2, 4), labels=labels)
    crops = torch.cat([long, short])
    single = [objective([crops[i : i + 1]], views=(1, 0), labels=labels[i % 2, None]) for i in range(12)]
    torch.testing.assert_close(loss, torch.stack(single).mean())


# --- SDPN and RDINO, as options of DINO ------------------------------------------------------------------------------


def small(**changes):
    return DinoConfig(**{"prototypes": 16, "head_hidden": 12, "bottleneck": 6, "head_norm": False, **changes})


def test_me_max_is_zero_for_a_flat_mean_and_ln_k_for_one_prototype():
    logits = torch.zeros(16, 16).fill_diagonal_(10.0)  # each crop sure of another prototype
    assert float(mean_entropy_loss(logits, 0.1)) == pytest.approx(0.0, abs=1e-5)
    assert float(mean_entropy_loss(logits[:1].expand(8, -1), 0.1)) == pytest.approx(math.log(16), abs=1e-4)


def test_shared_prototypes_are_the_students_for_both():
    dino = Dino(nn.Linear(5, 8), 8, small(shared_prototypes=True))
    with torch.no_grad():
        dino.student.head.last_layer.weight.copy_(torch.randn(16, 6))
    x = torch.randn(4, 5)
    expected = dino.student([x])[1]
    shared = dino.teacher([x], dino._prototypes())[1]
    torch.testing.assert_close(shared, expected)  # the networks are still equal
    assert not torch.allclose(dino.teacher([x])[1], expected)


def test_rdinos_covariance_in_both_scales():
    torch.manual_seed(1)
    x, losses = [torch.randn(6, 5), torch.randn(12, 5)], {}
    for scale in ("paper", "code"):
        torch.manual_seed(2)
        dino = Dino(nn.Linear(5, 8), 8, small(covariance=1.0, covariance_scale=scale))
        dino.regularisation = 1.0
        dino(x, views=(2, 4))
        losses[scale] = dino.metrics()["covariance"]
    assert losses["code"] == pytest.approx(losses["paper"] * 8 / 16, rel=1e-5)
    y = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    assert float(rdino_regularisation(y, y)[1]) == pytest.approx(2 * 2 * 4 / 2)  # divided by the dimension


# --- all through the trainer -----------------------------------------------------------------------------------------

OBJECTIVES = {
    "simclr": ("method=simclr", "data.local_crops=0"),
    "vicreg": ("method=vicreg",),
    "softmax": ("method=supervised", "aam.loss=softmax", "data.speeds=[1.0]"),
    "supervised on many crops": ("method=supervised", "data.crops=multi"),
    "sdpn": ("dino.shared_prototypes=true", "dino.me_max=1", "dino.teacher_temp=0.025", "data.global_crops=1"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_trains_resumes_and_exports(corpus, make, log, tmp_path, name):
    overrides = ("run.steps=4", "run.save_every=1000 steps", *OBJECTIVES[name])
    whole = make(corpus, tmp_path / "whole", *overrides)
    whole.run()
    make(corpus, tmp_path / "parts", *overrides).run(stop_after=2)
    again = make(corpus, tmp_path / "parts", *overrides)
    again.run()
    a, b = whole.objective.state_dict(), again.objective.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    row = log(tmp_path / "whole")[-1]
    expected = {"simclr": "effective_dimension", "vicreg": "invariance", "sdpn": "me_max"}.get(name, "accuracy")
    assert math.isfinite(row["loss"]) and math.isfinite(row[expected])
    state = CheckpointStore.load(whole.store.paths()[-1])
    encoder, role = encoder_of(state)
    assert role == {"simclr": "student", "vicreg": "student", "sdpn": "teacher"}.get(name, "supervised")
    trained = whole.objective.networks()[role].state_dict()
    assert all(torch.equal(v, trained[k]) for k, v in encoder.ecapa.state_dict().items())


@pytest.mark.e2e
def test_a_compiled_encoder_gives_the_same_losses(corpus, make, log, tmp_path, monkeypatch, caplog):
    """Traced whole, without the minutes that generating code takes."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="aot_eager", fullgraph=True, **options))
    for name in ("false", "true"):
        with caplog.at_level("INFO"):
            make(corpus, tmp_path / name, "run.steps=3", f"run.compile={name}").run()
    losses = [[r["loss"] for r in log(tmp_path / name)] for name in ("false", "true")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and caplog.text.count("torch.compile: ") == 3


@pytest.mark.parametrize("size", ["", "small_"])
def test_a_matched_pair_differs_in_the_objective_alone(size):
    one, two = (load(f"matched_{size}{name}") for name in ("dino", "supervised"))
    assert differences(one, two) == {"method": ("dino", "supervised")}
    assert one.multi_crop and two.multi_crop


def test_a_matched_pair_sees_the_same_crops(corpus, make, tmp_path):
    """The crops of the first batches, bit for bit, and the labels of their utterances."""
    base = ("data.crops=multi", "data.speeds=[1.0]")
    dino = make(corpus, tmp_path / "a", *base)
    supervised = make(corpus, tmp_path / "b", *base, "method=supervised")
    for _ in range(3):
        batch, labelled = next(dino.loader), next(supervised.loader)
        assert batch.ids == labelled.ids
        one, two = dino.features.of(batch, torch.device("cpu")), supervised.features.of(labelled, torch.device("cpu"))
        assert all(torch.equal(x, y) for x, y in zip(one.features, two.features, strict=True))
        names = [supervised.loader.dataset.manifest.speakers[int(i)] for i in two.labels]
        assert names == [i.split("/")[0] for i in labelled.ids] and one.labels is None


def test_an_objective_that_compares_crops_wants_crops():
    with pytest.raises(ConfigError, match="simclr compares different views"):
        load("smoke", overrides=["method=simclr", "data.global_crops=1", "data.local_crops=0"])
    with pytest.raises(ConfigError, match="data.crops=single"):
        load("smoke", overrides=["data.crops=single"])
