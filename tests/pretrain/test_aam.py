"""AAM-softmax by hand-computed angles."""

import math

import pytest
import torch
import torch.nn.functional as F

from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.pretrain.aam import AamSoftmax
from s3prl_speaker_upstreams.pretrain.schedules import margin_at


def at_angles(degrees):
    radians = torch.deg2rad(torch.tensor(degrees, dtype=torch.double))
    return torch.stack([radians.cos(), radians.sin()], 1)


def test_margin_is_added_to_the_true_angle_only():
    aam = AamSoftmax(2, 3, scale=10.0, margin=math.radians(20)).double()
    with torch.no_grad():
        aam.weight.copy_(at_angles([0.0, 90.0, 200.0]) * torch.tensor([[1.0], [5.0], [0.1]]))
    logits = aam.logits(aam.cosines(7.0 * at_angles([30.0])), torch.tensor([0]))
    expected = [math.cos(math.radians(d)) * 10 for d in (30 + 20, 60, 170)]
    torch.testing.assert_close(logits[0].float(), torch.tensor(expected), atol=1e-4, rtol=0)


def test_without_margin_it_is_cross_entropy_of_scaled_cosines():
    torch.manual_seed(0)
    aam = AamSoftmax(6, 5, scale=30.0, margin=0.0)
    x, y = torch.randn(4, 6), torch.tensor([0, 4, 2, 2])
    expected = F.cross_entropy(30 * F.linear(F.normalize(x), F.normalize(aam.weight)), y)
    torch.testing.assert_close(aam(x, y)[0], expected, atol=1e-4, rtol=1e-4)


def test_the_true_logit_never_rises_with_the_angle():
    aam = AamSoftmax(2, 2, scale=1.0, margin=0.5).double()
    with torch.no_grad():
        aam.weight.copy_(at_angles([0.0, 90.0]))
    logits = aam.logits(aam.cosines(at_angles(list(range(0, 181)))), torch.zeros(181, dtype=torch.long))[:, 0]
    # it also does not jump where the shifted continuation begins (angle pi - margin)
    assert (logits.diff() <= 1e-9).all() and logits.diff().abs().max() < 0.03


def test_gradient_is_finite_on_the_centre_and_opposite():
    aam = AamSoftmax(2, 2, margin=0.3)
    x = torch.cat([aam.weight[:1], -aam.weight[:1]]).detach().requires_grad_()
    aam(x, torch.tensor([0, 0]))[0].backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(aam.weight.grad).all()


def test_sub_centres_answer_with_the_nearest():
    aam = AamSoftmax(2, 2, sub_centres=2, scale=1.0, margin=0.0).double()
    with torch.no_grad():
        aam.weight.copy_(at_angles([0.0, 90.0, 180.0, 270.0]))  # class 0: 0 and 90 degrees, class 1: 180 and 270
    cosines = aam.cosines(at_angles([80.0]))[0]
    assert cosines.tolist() == pytest.approx([math.cos(math.radians(10)), math.cos(math.radians(100))])


@pytest.mark.parametrize("shape", ["exp", "linear"])
def test_margin_schedule_is_monotonous_from_initial_to_final(shape):
    values = [margin_at(s, start=20, end=40, initial=0.05, final=0.2, shape=shape) for s in range(60)]
    assert values[:21] == [0.05] * 21 and values[40:] == [0.2] * 20
    assert all(b >= a for a, b in zip(values, values[1:], strict=False))
    if shape == "linear":
        assert values[30] == pytest.approx(0.125)


def test_large_margin_fine_tuning_is_a_constant_margin():
    assert [margin_at(s, start=0, end=0, initial=0.5, final=0.5) for s in (0, 1, 99)] == [0.5] * 3


def test_one_class_is_refused():
    with pytest.raises(ConfigError, match="1 classes"):
        AamSoftmax(4, 1)
