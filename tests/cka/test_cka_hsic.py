"""The estimators: against the definition, against hand-computed cases, by their invariances, and their numerics."""

import itertools

import numpy as np
import pytest
import torch

from cka_addon import _blas
from cka_addon.errors import ConstantLayer, NonFinite, TooFewExamples
from cka_addon.estimators import Pairs, Reference, crossover
from cka_addon.gram import GramKernel
from cka_addon.hsic import BatchHsic, cka_matrix, linear_cka
from cka_addon.moments import Moments

pytestmark = pytest.mark.compat
FORMS = ("gram", "stream")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def related(n, dims, seed=0, dtype=torch.float32, noise=0.5):
    """Layers that share a common part."""
    g = rng(seed)
    base = torch.randn(n, 10, generator=g, dtype=dtype)
    mix = [torch.randn(10, d, generator=g, dtype=dtype) for d in dims]
    return [base @ m + noise * torch.randn(n, d, generator=g, dtype=dtype) for m, d in zip(mix, dims, strict=True)]


def test_by_hand_unbiased():
    """n = 4, X = (1, 2, 3, 4)', Y = (1, 0, 0, 1)': every term worked out on paper.

    K~ row sums: k_ij = i j, so 9, 16, 21, 24 (sum 70); L~: only l_14 = l_41 = 1, row sums 1, 0, 0, 1 (sum 2).
    tr(K~L~) = 2 * 4 = 8; 1'K~L~1 = 9 + 24 = 33; HSIC_1 = (8 + 70 * 2 / 6 - 2 / 2 * 33) / (4 * 1) = -5 / 12.
    """
    x = np.array([[1.0], [2.0], [3.0], [4.0]])
    y = np.array([[1.0], [0.0], [0.0], [1.0]])
    assert Reference.hsic(x, y) == pytest.approx(-5 / 12, abs=1e-14)
    for form in FORMS:
        h = BatchHsic([1, 1], Pairs((2,)), form=form)([torch.tensor(x), torch.tensor(y)])
        assert h[0, 1] == pytest.approx(-5 / 12, abs=1e-12)


def test_by_hand_biased():
    """Two centred features: HSIC_0 = cov^2. X = (-1, 0, 1), Y = (-1, 2, -1): cov 0; X with itself: (2 / 2)^2 = 1."""
    x, y = torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([[-1.0], [2.0], [-1.0]])
    for form in FORMS:
        h = BatchHsic([1, 1], Pairs((2,)), biased=True, form=form)([x, y])
        assert np.allclose(h, [[1, 0], [0, 9]], atol=1e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [4, 5, 61, 300])
def test_against_the_definition(n, form, biased):
    layers = related(n, (5, 17, 40, 300), dtype=torch.float64)
    want = [[Reference.cka(a.numpy(), b.numpy(), biased=biased) for b in layers] for a in layers]
    assert np.allclose(cka_matrix(layers, form=form, biased=biased), want, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mean", [0, 10, 50, "outlier"])
def test_float32_with_a_common_mean(mean, form):
    """Features with a common mean of 0, 10, 50 and outlier channels of 1,000 stay within 1e-5 of float64."""
    layers = related(400, (64, 96, 128))
    for x in layers:
        if mean == "outlier":
            x[:, 3] += 1000
            x[:, 7] *= 30
        else:
            x += mean
    want = np.array([[Reference.cka(a.double().numpy(), b.double().numpy()) for b in layers] for a in layers])
    assert np.abs(cka_matrix(layers, form=form) - want).max() < 1e-5


def test_large_minibatch_in_float32():
    """n = 4,096: a textbook float32 sum is off by 2e-5 or NaN here."""
    layers = related(4096, (32, 24), noise=3.0)
    exact = cka_matrix([x.double() for x in layers], form="stream")
    assert np.abs(cka_matrix(layers, form="gram") - exact).max() < 1e-6


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_invariances(form, biased):
    x, y = related(120, (24, 30), dtype=torch.float64)
    base = cka_matrix([x], [y], form=form, biased=biased)[0, 0]
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=rng(1), dtype=torch.float64)).Q
    for changed in (x @ rotation, x * 17.5, x + torch.randn(24, generator=rng(2), dtype=torch.float64) * 5):
        assert cka_matrix([changed], [y], form=form, biased=biased)[0, 0] == pytest.approx(base, abs=1e-10)
        assert cka_matrix([changed], [x], form=form, biased=biased)[0, 0] == pytest.approx(1, abs=1e-10)
    # Linear but not orthogonal maps do change it: the measure is not blind.
    stretched = x * torch.linspace(0.01, 10, 24, dtype=torch.float64)
    assert abs(cka_matrix([stretched], [y], form=form, biased=biased)[0, 0] - base) > 0.01


def test_independent_features_are_near_zero_only_for_the_unbiased_form():
    values = {b: [] for b in (False, True)}
    for seed in range(20):
        x, y = (torch.randn(40, 200, generator=rng(100 + 2 * seed + k)) for k in range(2))
        for biased in values:
            values[biased].append(linear_cka(x, y, biased=biased))
    assert abs(np.mean(values[False])) < 0.01
    assert np.mean(values[True]) > 0.5


def test_minibatch_estimate_converges_to_the_full_value():
    x, y = related(20000, (8, 12), noise=2.0)
    full = cka_matrix([x], [y], form="stream")[0, 0]
    engine = BatchHsic([8, 12], Pairs((2,)))
    errors = []
    for batches in (4, 400):
        h = sum(engine([x[i * 50 : (i + 1) * 50], y[i * 50 : (i + 1) * 50]]) for i in range(batches))
        errors.append(abs(h[0, 1] / np.sqrt(h[0, 0] * h[1, 1]) - full))
    assert errors[1] < 0.004 < errors[0]


def test_gram_in_bands_of_rows_and_on_tiles(monkeypatch):
    layers = related(300, (20, 31, 7))
    order = torch.randperm(300, generator=rng(5))
    whole = GramKernel()
    banded = GramKernel(memory=3 * 300 * 64 * 4)
    assert np.allclose(banded(layers), whole(layers), rtol=1e-5)
    assert np.allclose(banded(layers, order=order), whole(layers, order=order), rtol=1e-4, atol=1e-5)
    syrk = whole(layers)
    monkeypatch.setattr(_blas, "available", lambda: False)
    assert np.allclose(GramKernel()(layers), syrk, rtol=1e-5)


def test_two_threads_give_the_same():
    layers = related(200, (40,) * 5)
    one = GramKernel()(layers)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert np.allclose(GramKernel()(layers), one, rtol=1e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
def test_permuted_examples(form):
    layers = related(90, (6, 9, 4), dtype=torch.float64)
    order = torch.randperm(90, generator=rng(1))
    h = BatchHsic([6, 9, 4], Pairs((3,)), form=form)(layers, order=order)
    for i, j in itertools.combinations(range(3), 2):
        assert h[i, j] == pytest.approx(Reference.hsic(layers[i].numpy(), layers[j][order].numpy()), rel=1e-9)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("kind", ["all", "within", "across"])
def test_merged_is_whole_whatever_the_shifts(kind, paired):
    dims, pairs = [6, 9, 4], Pairs((2, 1), kind)
    layers = [x + 20 for x in related(500, dims, dtype=torch.float64)]
    # The second part comes from elsewhere, so its shift is a different one.
    for x in layers:
        x[300:] += 7
    order = torch.cat([torch.randperm(300, generator=rng(1)), 300 + torch.randperm(200, generator=rng(2))])

    def moments(a, b):
        m = Moments(dims, pairs, dtype=torch.float64, paired=paired)
        m.update([x[a:b] for x in layers], order=None if paired else order[a:b] - a)
        return m

    whole = Moments(dims, pairs, dtype=torch.float64, paired=paired)
    for a, b in ((0, 300), (300, 500)):
        whole.update([x[a:b] for x in layers], order=None if paired else order[a:b] - a)
    first, second = moments(0, 300), moments(300, 500)
    assert not torch.equal(first.shift, second.shift)
    untouched = second.hsic()
    first.merge(second)
    mask = np.triu(pairs.mask())
    for biased in (False, True):
        got, want = first.hsic(biased), whole.hsic(biased)
        assert np.allclose(got[mask], want[mask], rtol=1e-9, atol=1e-12)
        assert np.isnan(got[~pairs.mask()]).all()
    assert np.allclose(second.hsic(), untouched, equal_nan=True, rtol=0)  # merging leaves the other one alone


def test_moving_the_shift_there_and_back():
    m = Moments([6, 9], Pairs((2,)), dtype=torch.float64)
    m.update(related(100, (6, 9), dtype=torch.float64))
    before = m.hsic()
    home = m.shift.clone()
    m.reshift(home + torch.randn(15, generator=rng(3), dtype=torch.float64))
    assert np.allclose(m.hsic(), before, rtol=1e-10)
    m.reshift(home)
    assert np.allclose(m.hsic(), before, rtol=1e-11)


def test_memory_of_the_accumulators_does_not_grow():
    m = Moments([6, 9], Pairs((2,)))
    size = sum(t.numel() for t in m.tensors())
    for seed in range(5):
        m.update(related(200, (6, 9), seed=seed))
    assert m.n == 1000 and sum(t.numel() for t in m.tensors()) == size
    assert Moments.bytes_needed([6, 9], Pairs((2,))) >= 8 * (36 + 54 + 81)


def test_crossover_follows_the_arithmetic():
    """Gram n * 2 d + 2 n per example against 2 (d^2 + d^2 + d^2) for two layers of one width; more layers, later."""
    assert crossover([768, 768], Pairs((1, 1), "across")) == int(6 * 768**2 / (2 * 768 + 6))
    few, many = crossover([768] * 2, Pairs((2,))), crossover([768] * 20, Pairs((20,)))
    assert 1500 < few < many


def test_errors_have_names():
    good = torch.randn(10, 4, generator=rng())
    with pytest.raises(ConstantLayer, match="layer flat"):
        cka_matrix([good, torch.full((10, 3), 1234.5)], names=["good", "flat"])
    with pytest.raises(TooFewExamples, match="got 3 examples.*at least 4"):
        cka_matrix([good[:3]])
    for value in (float("nan"), float("inf")):
        bad = good.clone()
        bad[2, 1] = value
        with pytest.raises(NonFinite, match="layer bad: 1 of 40 values"):
            cka_matrix([good, bad], names=["good", "bad"])
    with pytest.raises(ValueError, match="the same examples"):
        cka_matrix([good, good[:5]])


def test_values_are_not_clamped():
    """Negative estimates of independent features are what makes their mean zero: they must come out."""
    values = [
        linear_cka(torch.randn(8, 50, generator=rng(i)), torch.randn(8, 50, generator=rng(i + 99))) for i in range(30)
    ]
    assert min(values) < -0.05
