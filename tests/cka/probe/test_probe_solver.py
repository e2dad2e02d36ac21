"""The solvers against scikit-learn on the same data, and a stream against memory."""

import numpy as np
import pytest
import torch

from cka_addon.probe import solver
from cka_addon.probe.errors import ProbeError


def planted(n, width, classes, seed, noise=2.0):
    """Correlated features of very different scale and mean with classes in some directions."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(classes + 20, width, generator=g)
    centres = torch.randn(classes, classes + 20, generator=g)
    scale = torch.exp(torch.randn(width, generator=g))
    draw = torch.Generator().manual_seed(seed + 1)
    y = torch.multinomial(torch.softmax(torch.randn(classes, generator=g), 0), n, True, generator=draw)
    z = centres[y] + noise * torch.randn(n, classes + 20, generator=draw)
    x = (z @ mix + 3 * torch.randn(n, width, generator=draw)) * scale + 5 * scale
    return x, y


def accuracy(probe, x, y):
    return 100 * float((probe.scores(x).argmax(1) == y).double().mean())


@pytest.mark.parametrize("strength", [1e-2, 1e-4])
def test_softmax_is_that_of_sklearn(strength):
    linear = pytest.importorskip("sklearn.linear_model")
    x, y = planted(9000, 48, 8, seed=0)
    (x, xt), (y, yt) = (x[:3000], x[3000:]), (y[:3000], y[3000:])
    mine = solver.fit_softmax(x, y, 8, strengths=(strength,))
    scale = solver.Scale.of(x)
    theirs = linear.LogisticRegression(C=1 / (strength * len(x)), max_iter=2000, tol=1e-6)
    theirs.fit(scale.apply(x).numpy(), y.numpy())
    score = 100 * theirs.score(scale.apply(xt).numpy(), yt.numpy())
    assert 60 < score < 99
    assert abs(accuracy(mine, xt, yt) - score) < 0.3
    loss = -np.log(theirs.predict_proba(scale.apply(xt).numpy())[np.arange(len(yt)), yt.numpy()]).mean()
    assert abs(solver.log_loss(mine.scores(xt), yt) - loss) < 1e-3


def test_ridge_is_that_of_sklearn():
    linear = pytest.importorskip("sklearn.linear_model")
    x, _ = planted(2000, 40, 5, seed=3)
    y = (x[:, 0] / x[:, 0].std() + torch.randn(2000, generator=torch.Generator().manual_seed(1))).double()
    moments = solver.Moments(x.mean(0))
    moments.update(x, y)
    mine = solver.solve_ridge(moments, 0.01)
    scale = solver.Scale.of(x.double())
    theirs = linear.Ridge(alpha=0.01 * len(x)).fit(scale.apply(x.double()).numpy(), y.numpy())
    np.testing.assert_allclose(mine.predict(x).numpy(), theirs.predict(scale.apply(x.double()).numpy()), atol=1e-3)
    assert moments.squared_error(mine) == pytest.approx(float((mine.predict(x) - y).square().sum()), rel=1e-4)


def test_stream_is_as_good_as_memory():
    x, y = planted(60000, 48, 8, seed=5)
    xt, yt = x[40000:], y[40000:]
    x, y = x[:40000], y[:40000]
    inner = np.arange(40000) % 5 == 0
    exact = accuracy(solver.fit_softmax(x, y, 8, inner=inner), xt, yt)
    passes = solver.passes_for(len(x))
    stream = solver.StreamSoftmax(48, 8, steps=passes * len(x) // solver.BATCH)
    rng = np.random.default_rng(0)
    for _ in range(passes):
        parts = (([x[i : i + 500]], np.arange(i, i + 500)) for i in range(0, len(x), 500))
        for (some,), at in solver.batches(parts, solver.BATCH, rng):
            stream.update(some, y[torch.from_numpy(at)])
    assert abs(accuracy(stream.finish(), xt, yt) - exact) < 0.3


def test_stream_stays_finite_where_features_repeat_each_other():
    """A strong penalty in directions of little variance must not make the steps grow."""
    x, y = planted(14000, 20, 40, seed=9)
    g = torch.Generator().manual_seed(2)
    wide = x @ torch.randn(20, 120, generator=g) + 1e-3 * torch.randn(14000, 120, generator=g)
    stream = solver.StreamSoftmax(120, 40, steps=60, strengths=(1e-2, 1e-3, 1e-5), warm=3000)
    for _ in range(5):
        for i in range(0, 12000, solver.BATCH):
            stream.update(wide[i : i + solver.BATCH], y[i : i + solver.BATCH])
    exact = solver.fit_softmax(wide[:12000], y[:12000], 40, strengths=(1e-3,))
    assert accuracy(stream.finish(), wide[12000:], y[12000:]) > accuracy(exact, wide[12000:], y[12000:]) - 2


def test_batches_give_every_row_once():
    parts = [([torch.arange(i, i + 7).float()[:, None]], np.arange(i, i + 7)) for i in range(0, 70, 7)]
    rows = []
    for (x,), at in solver.batches(iter(parts), 16, np.random.default_rng(0), mix=3):
        assert x[:, 0].tolist() == at.tolist() and len(at) <= 16
        rows += at.tolist()
    assert sorted(rows) == list(range(70))


def test_constant_and_huge_features_do_no_harm():
    x, y = planted(2000, 20, 4, seed=7)
    plain = accuracy(solver.fit_softmax(x, y, 4, strengths=(1e-3,)), x, y)
    odd = torch.cat([x, torch.full((2000, 1), 3e4), 1e4 + x[:, :1]], 1)
    assert abs(accuracy(solver.fit_softmax(odd, y, 4, strengths=(1e-3,)), odd, y) - plain) < 1.0
    target = x[:, 0].double()
    probe = solver.fit_ridge(odd, target, inner=np.arange(2000) % 4 == 0)
    assert float((probe.predict(odd) - target).square().mean() / target.var()) < 1e-3


def test_network_learns_what_is_not_linear_and_repeats():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 4, generator=g)
    y = ((x[:, 0] * x[:, 1]) > 0).long()
    inner = np.arange(3000) % 5 == 0
    linear = accuracy(solver.fit_softmax(x, y, 2, inner=inner), x, y)
    first = solver.fit_network(x, y, 2, inner=inner, seed=1)
    again = solver.fit_network(x, y, 2, inner=inner, seed=1)
    assert linear < 60 and accuracy(first, x, y) > 90
    assert torch.equal(first.scores(x), again.scores(x))


def test_nothing_to_choose_with_is_named():
    with pytest.raises(ProbeError, match="no inner part"):
        solver.fit_softmax(torch.randn(9, 2), torch.zeros(9, dtype=torch.int64), 2)
