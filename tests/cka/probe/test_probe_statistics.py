"""Intervals and verdicts are honest: coverage over many draws of groups."""

import numpy as np
import pytest

from cka_addon.probe import statistics


def families(groups, seed, layers=6, level=0.3):
    rng = np.random.default_rng(seed)
    ease = 0.1 * rng.standard_normal(groups)
    size = rng.integers(20, 60, groups)
    columns = []
    for _ in range(layers):
        right = rng.binomial(size, np.clip(level + ease + 0.03 * rng.standard_normal(groups), 0, 1))
        columns.append(np.stack([size - right, size], 1).astype(float))
    return columns


@pytest.mark.parametrize("groups", [10, 40])
def test_intervals_cover_and_families_hold_their_level(groups):
    hits = false = 0
    for seed in range(200):
        columns = families(groups, seed)
        found = statistics.interval(columns[0], statistics.r2, statistics.draw(groups, 300, seed))
        hits += found.lower <= 0.3 <= found.upper
        made = statistics.differences(columns, statistics.r2, resamples=300, seed=seed)
        false += any(d.significant for d in made)
    assert 0.90 <= hits / 200 <= 0.99
    assert false / 200 <= 0.12  # 5 of 100 families by right; 24 of 200 is four deviations above


def test_a_real_difference_is_found_and_named():
    columns = families(30, 0)
    columns.append(families(30, 0, level=0.5)[0])
    names = [str(i) for i in range(7)]
    found = statistics.verdicts(names, statistics.differences(columns, statistics.r2))
    assert found["6"] == "distinct, above all others"
    assert all(found[n] == "below 1 of 6" for n in names[:6])


def test_few_groups_give_no_interval_but_the_reason():
    found = statistics.interval(np.ones((3, 2)), statistics.r2, statistics.draw(3, 100, 0))
    assert found.lower is None and "3 groups" in found.why
    assert statistics.differences([np.ones((3, 2))] * 2, statistics.r2) == []


def test_macro_f1_is_that_of_sklearn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(5, size=300), rng.integers(5, size=300)
    sums = statistics.class_sums(rng.integers(7, size=300), 7, truth, guess, 5).sum(0)
    assert float(statistics.macro_f1(sums)) == pytest.approx(metrics.f1_score(truth, guess, average="macro"))
    assert float(statistics.accuracy(sums)) == pytest.approx((truth == guess).mean())
