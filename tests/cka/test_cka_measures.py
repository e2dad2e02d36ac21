"""The other measures: against plain SVD references, by their invariances, by what is planted, and their intervals."""

import numpy as np
import pytest
import torch
from test_cka_intervals import OFF, World, data, result_of

from cka_addon.errors import SpecError
from cka_addon.estimators import Pairs
from cka_addon.measures import from_sample, from_sums
from cka_addon.moments import Moments
from cka_addon.options import Options
from cka_addon.result import CKAResult
from cka_addon.uncertainty import Kept

pytestmark = pytest.mark.compat
COVARIANCE = ("procrustes", "cca", "svcca", "pwcca")


def sums(layers, shuffle=None):
    moments = Moments([x.shape[1] for x in layers], Pairs((len(layers),)), dtype=torch.float64, paired=shuffle is None)
    half = len(layers[0]) // 2
    for part in (slice(0, half), slice(half, None)) if shuffle is None else (slice(None),):
        moments.update([x[part] for x in layers], order=shuffle)
    return moments


def measure(layers, names=COVARIANCE, **kwargs):
    return {
        m: f.values for m, f in from_sums(sums(layers), [str(i) for i in range(len(layers))], names, **kwargs).items()
    }


def layers(n=300, dims=(9, 14, 20), seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(n, 6, generator=g, dtype=torch.float64)
    return [
        base @ torch.randn(6, d, generator=g, dtype=torch.float64)
        + torch.randn(n, d, generator=g, dtype=torch.float64) * torch.linspace(0.1, 2, d, dtype=torch.float64)
        + 5
        for d in dims
    ]


def reference(x, y, variance=0.99):
    """The published definitions from the data matrices themselves."""
    x, y = (v.numpy() - v.numpy().mean(0) for v in (x, y))
    nuclear = np.linalg.svd(x.T @ y, compute_uv=False).sum()
    procrustes = nuclear / (np.linalg.norm(x) * np.linalg.norm(y))

    def basis(v, share=1.0):
        u, s, _ = np.linalg.svd(v, full_matrices=False)
        kept = len(s) if share == 1 else int((np.cumsum(s**2) / (s**2).sum() < share).sum()) + 1
        return u[:, :kept]

    cca = np.linalg.svd(basis(x).T @ basis(y), compute_uv=False)
    svcca = np.linalg.svd(basis(x, variance).T @ basis(y, variance), compute_uv=False)
    u, s, _ = np.linalg.svd(basis(x).T @ basis(y))
    variates = basis(x) @ u[:, : len(s)]
    weights = np.abs(variates.T @ x).sum(1)
    return {"procrustes": procrustes, "cca": cca.mean(), "svcca": svcca.mean(), "pwcca": weights @ s / weights.sum()}


@pytest.mark.parametrize("variance", [0.99, 0.7])
def test_equal_to_the_published_definitions(variance):
    data_ = layers()
    found = measure(data_, variance=variance)
    for i in range(3):
        for j in range(3):
            for name, want in reference(data_[i], data_[j], variance).items():
                assert found[name][i, j] == pytest.approx(want, abs=1e-8), (name, i, j)


def test_invariances():
    x, y = layers(dims=(9, 14))
    base = measure([x, y])
    g = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(9, 9, generator=g, dtype=torch.float64)).Q
    moved = measure([3 * x @ rotation - 7, y])
    for name in ("procrustes", "cca", "svcca"):
        assert moved[name][0, 1] == pytest.approx(base[name][0, 1], abs=1e-9), name
    # Its published weights sum over features, so PWCCA knows the basis: only scale and shift leave it alone.
    assert measure([3 * x - 7, y])["pwcca"][0, 1] == pytest.approx(base["pwcca"][0, 1], abs=1e-9)
    bent = measure([x @ torch.randn(9, 9, generator=g, dtype=torch.float64), y])
    assert bent["cca"][0, 1] == pytest.approx(base["cca"][0, 1], abs=1e-8)
    assert abs(bent["procrustes"][0, 1] - base["procrustes"][0, 1]) > 1e-3
    same = measure([x, 3 * x @ rotation + 1])
    assert all(value[0, 1] == pytest.approx(1, abs=1e-8) for value in same.values())


def test_ridge_damps_small_directions_and_is_used():
    x, y = layers(n=60, dims=(30, 40))
    plain, damped = (measure([x, y], ("cca",), ridge=r)["cca"][0, 1] for r in (0.0, 1.0))
    assert damped < plain - 0.1


def test_shuffled_baseline_is_high_where_width_approaches_examples_and_for_biased_measures_only():
    g = torch.Generator().manual_seed(0)
    few = [torch.randn(80, 40, generator=g, dtype=torch.float64) for _ in range(2)]
    order = torch.randperm(80, generator=g)
    found = from_sums(sums(few), ["a", "b"], COVARIANCE, shuffled=sums(few, order))
    assert found["cca"].baseline[0, 1] > 0.5 and found["procrustes"].baseline[0, 1] > 0.4
    # Independent layers are what shuffled ones are.
    assert abs(found["cca"].values[0, 1] - found["cca"].baseline[0, 1]) < 0.08


def test_values_without_each_unit_are_near_computing_again():
    everything, owner = data(World(2, 40))
    kept = Kept([str(u) for u in range(40)], everything, owner, np.ones(len(owner)))
    names = [str(i) for i in range(len(everything))]
    found = from_sums(sums([x.double() for x in everything]), names, COVARIANCE, kept=kept)
    for name in ("svcca", "pwcca"):  # computed again without each of ten groups: exactly
        for g in (0, 7):
            again = measure([x[owner % 10 != g].double() for x in everything], (name,))[name]
            assert np.abs(found[name].left_out.values[g] - again).max() < 1e-9
    for name in ("procrustes", "cca"):
        left = found[name].left_out.values[:, OFF[0], OFF[1]]
        again = [measure([x[owner != u].double() for x in everything], (name,))[name][OFF] for u in range(0, 40, 4)]
        want = np.array(again)
        got = left[::4]
        moved, again_ = (v - v.mean(0) for v in (got, want))
        assert np.corrcoef(moved.ravel(), again_.ravel())[0, 1] > 0.8, name
        assert np.abs(got.std(0) / want.std(0) - 1).max() < 0.3, name


def test_rsa_and_neighbours():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=g)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=g)).Q
    kept = Kept(
        [str(i) for i in range(50)],
        [x, 2 * x @ rotation + 3, torch.randn(200, 5, generator=g)],
        np.repeat(np.arange(50), 4),
        np.ones(200),
    )
    found, number = from_sample(kept, ("rsa", "knn"), neighbours=5)
    assert number == 200
    for name in ("rsa", "knn"):
        assert found[name].values[0, 1] == pytest.approx(1, abs=1e-4)
        assert abs(found[name].values[0, 2] - found[name].baseline[0, 2]) < 0.06
    assert found["knn"].baseline[0, 1] == pytest.approx(5 / 196, abs=0.02)
    # By hand: Spearman over pairs of different utterances.
    from scipy.stats import spearmanr

    a, b = ((v - v.mean(0)).numpy() for v in (kept.layers[0], kept.layers[2]))
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
    i, j = np.triu_indices(200, 1)
    apart = kept.owner[i] != kept.owner[j]
    want = spearmanr((a @ a.T)[i, j][apart], (b @ b.T)[i, j][apart]).statistic
    assert found["rsa"].values[0, 2] == pytest.approx(want, abs=1e-4)
    without = found["knn"].left_out
    assert without.values[:, 0, 2].mean() == pytest.approx(found["knn"].values[0, 2], abs=1e-3)


@pytest.mark.parametrize("form", ["gram", "stream"])
def test_all_measures_of_a_run_and_back_from_its_file(tmp_path, form):
    result = result_of(World(1, 40), mode="full", form=form, measures="all", precision="float64")
    everything, _ = data(World(1, 40))
    direct = measure([x.double() for x in everything])
    for name in COVARIANCE:
        assert np.abs(result.measures[name].values - direct[name]).max() < 1e-8, name
        one = result.measures[name]
        assert np.all(one.lower[OFF] <= one.values[OFF]) and np.all(one.values[OFF] <= one.upper[OFF])
        assert one.baseline[OFF].max() < one.values[OFF].max()
    assert result.details["options"]["permutations"] == 1
    again = CKAResult.load(result.save(tmp_path / "r.json"))
    assert list(again.measures) == ["procrustes", "cca", "svcca", "pwcca", "rsa", "knn"]
    for name, one in result.measures.items():
        assert np.array_equal(again.measures[name].values, one.values, equal_nan=True)
    table = again.to_frame()
    assert {"procrustes", "procrustes_lower", "cca_permuted", "shape_distance", "pwcca_of_b"} <= set(table.columns)
    assert again.of("cca").values[0, 1] == again.measures["cca"].values[0, 1]
    with pytest.raises(SpecError, match="got measure 'x'; the result has cka, procrustes"):
        again.of("x")


def test_more_measures_need_the_whole_data():
    with pytest.raises(SpecError, match="need mode='full'"):
        Options(measures="cka,cca")
    with pytest.raises(SpecError, match="got measure 'ccca'; did you mean"):
        Options(measures="ccca", mode="full")
