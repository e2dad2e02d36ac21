"""Scoring: error rates by hand and against other definitions, transforms by what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.verification import scoring
from s3prl_speaker_upstreams.verification.metrics import (
    bootstrap,
    det_curve,
    eer,
    eer_threshold,
    effective_dimension,
    evaluate_scores,
    min_dcf,
)
from s3prl_speaker_upstreams.verification.scoring import cosine_scores, score_pairs, score_trials
from s3prl_speaker_upstreams.verification.transforms import WCCN, Whitening
from s3prl_speaker_upstreams.verification.trials import Trials, all_pairs, read_trials, write_trials


@pytest.mark.parametrize(
    ("targets", "others", "expected"),
    [
        ([2.0, 3.0], [0.0, 1.0], 0.0),
        ([0.0, 1.0], [2.0, 3.0], 1.0),
        ([1.0, 1.0], [1.0, 1.0], 0.5),
        # threshold 3: 1 of 4 targets missed, 1 of 4 others accepted
        ([1.0, 5.0, 6.0, 7.0], [0.0, 0.5, 2.0, 5.5], 0.25),
        # (miss, false alarm): (0, 1/3) at 1, (1/2, 1/3) above it: the line between crosses at 1/3
        ([1.0, 4.0], [0.0, 0.5, 3.0], 1 / 3),
        # ties across kinds: (0, 1) at 1, (1/2, 0) above it; 0.5 s = 1 - s at s = 2/3: miss 1/3
        ([1.0, 2.0], [1.0, 1.0, 1.0], 1 / 3),
    ],
)
def test_eer_by_hand(targets, others, expected):
    scores, labels = np.array(targets + others), np.array([1] * len(targets) + [0] * len(others))
    order = np.random.default_rng(0).permutation(len(scores))
    assert eer(scores[order], labels[order]) == pytest.approx(expected, abs=1e-12)


def test_eer_is_the_root_that_the_field_computes():
    roc_curve = pytest.importorskip("sklearn.metrics").roc_curve
    from scipy.interpolate import interp1d
    from scipy.optimize import brentq

    rng = np.random.default_rng(0)
    for trial in range(20):
        labels = rng.random(400) < 0.3
        scores = rng.normal(size=400) + 1.5 * labels
        if trial % 2:
            scores = scores.round(1)  # ties
        false_alarm, hits, _ = roc_curve(labels, scores)
        curve = interp1d(false_alarm, hits)
        root = brentq(lambda x, curve=curve: 1 - x - curve(x), 0, 1)
        assert eer(scores, labels) == pytest.approx(root, abs=1e-9)


def test_eer_depends_on_ranks_only_and_threshold_splits():
    rng = np.random.default_rng(1)
    labels = rng.random(2000) < 0.5
    scores = rng.normal(size=2000) + 2 * labels
    assert eer(3 * scores + 7, labels) == eer(scores, labels) == pytest.approx(0.159, abs=0.02)
    assert eer(-scores, ~labels) == pytest.approx(eer(scores, labels))
    threshold = eer_threshold(scores, labels)
    miss, false_alarm = (scores[labels] < threshold).mean(), (scores[~labels] >= threshold).mean()
    assert miss == pytest.approx(false_alarm, abs=0.01)


def test_min_dcf_by_hand():
    scores, labels = [5.0, 4.0, 1.0, 3.0, 2.0, 0.0], [1, 1, 1, 0, 0, 0]
    # Thresholds: above 3: misses 1/3, no false alarm. At 1: none missed, 2/3 false alarms.
    assert min_dcf(scores, labels, 0.01) == pytest.approx(0.01 / 3 / 0.01)
    # at 0.9: cost of missing 1/3 is 0.3, of 2/3 false alarms 0.0667; normalised by 0.1
    assert min_dcf(scores, labels, 0.9) == pytest.approx(0.1 * 2 / 3 / 0.1)
    assert min_dcf(scores, labels, 0.5, c_miss=10.0) == pytest.approx(0.5 * 2 / 3 / 0.5)
    # never worse than accepting none or all
    assert min_dcf([0.0, 1.0], [1, 0], 0.05) == 1.0
    with pytest.raises(ConfigError, match="p_target"):
        min_dcf(scores, labels, 1.0)


def test_min_dcf_against_all_thresholds():
    rng = np.random.default_rng(2)
    labels = rng.random(500) < 0.2
    scores = (rng.normal(size=500) + 2 * labels).round(1)
    for p in (0.01, 0.05, 0.5):
        costs = [
            p * (scores[labels] < t).mean() + (1 - p) * (scores[~labels] >= t).mean()
            for t in [*np.unique(scores), np.inf]
        ]
        assert min_dcf(scores, labels, p) == pytest.approx(min(costs) / min(p, 1 - p))


def test_curve_runs_from_accepting_all_to_none():
    rng = np.random.default_rng(3)
    miss, false_alarm, threshold = det_curve(rng.normal(size=50).round(1), np.arange(50) % 2)
    assert (miss[0], false_alarm[0], miss[-1], false_alarm[-1]) == (0, 1, 1, 0)
    assert (np.diff(miss) >= 0).all() and (np.diff(false_alarm) <= 0).all() and (np.diff(threshold) > 0).all()


def test_weights_count_as_repetitions():
    rng = np.random.default_rng(4)
    scores, labels, weights = rng.normal(size=60), np.arange(60) % 3 == 0, rng.integers(0, 4, 60)
    weights[:3] = 1
    repeated = np.repeat(np.arange(60), weights)
    assert eer(scores, labels, weights) == pytest.approx(eer(scores[repeated], labels[repeated]))
    assert min_dcf(scores, labels, weights=weights) == pytest.approx(min_dcf(scores[repeated], labels[repeated]))


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, 2.0], [1, 1], "2 target trials of 2"),
        ([1.0, 2.0], [1], "expected two of the same"),
        ([1.0, np.nan], [1, 0], "1 scores that are not finite"),
    ],
)
def test_what_has_no_error_rate(scores, labels, message):
    with pytest.raises(ConfigError, match=message):
        eer(scores, labels)


def test_bootstrap_by_recordings_is_wider_than_by_trials():
    rng = np.random.default_rng(5)
    speakers = np.repeat(np.arange(6), 10)
    # A recording's own offset is shared by all its trials.
    x = rng.normal(size=(6, 8))[speakers] + rng.normal(size=(60, 8)) * 1.2
    pairs, labels = all_pairs(speakers)
    scores = score_pairs(x, pairs)
    point = eer(scores, labels)
    by_trial, by_recording = bootstrap(scores, labels, samples=100), bootstrap(scores, labels, pairs, samples=100)
    for low, high in (by_trial, by_recording):
        assert low < point < high
    assert by_recording[1] - by_recording[0] > 1.5 * (by_trial[1] - by_trial[0])
    assert bootstrap(scores, labels, pairs, samples=20) == bootstrap(scores, labels, pairs, samples=20)
    by_speaker = bootstrap(scores, labels, speakers[pairs], samples=50)
    assert by_speaker[0] < by_speaker[1]
    shuffled = rng.permutation(len(scores))  # the order of the trials does not matter
    assert bootstrap(scores[shuffled], labels[shuffled], pairs[shuffled], samples=100) == pytest.approx(by_recording)


def test_summary():
    out = evaluate_scores([3.0, 2.0, 1.0, 0.0] * 5, [1, 1, 0, 0] * 5, bootstrap_samples=20)
    assert (out["eer"], out["min_dcf_0.01"], out["trials"], out["targets"]) == (0.0, 0.0, 20, 10)
    assert out["eer_low"] == out["eer_high"] == 0.0


def test_trial_lists(tmp_path):
    voxceleb, kaldi = tmp_path / "veri.txt", tmp_path / "trials"
    voxceleb.write_text("1 id1/a.wav id1/b.wav\n0 id1/a.wav id2/c.wav\n\n")
    kaldi.write_text("id1/a.wav id1/b.wav target\nid1/a.wav id2/c.wav nontarget\n")
    one, other = read_trials(voxceleb), read_trials(kaldi)
    assert (
        one.labels.tolist() == other.labels.tolist() == [1, 0] and one.test == other.test and one.enrol == other.enrol
    )
    again = read_trials(write_trials(one, tmp_path / "again.txt"))
    assert again.enrol == one.enrol and again.labels.tolist() == [1, 0] and len(again) == 2
    voxceleb.write_text("1 a b\nmaybe a b\n")
    with pytest.raises(ConfigError, match="line 2: got 'maybe a b'"):
        read_trials(voxceleb)
    voxceleb.write_text("\n")
    with pytest.raises(ConfigError, match="no trials"):
        read_trials(voxceleb)


def test_cosine_scores_of_a_list():
    vectors = {"a": np.array([3.0, 0.0]), "b": np.array([1.0, 1.0]), "c": np.array([0.0, -2.0])}
    trials = Trials(np.array([1, 0, 0]), ("a", "a", "b"), ("b", "c", "c"))
    np.testing.assert_allclose(score_trials(trials, vectors), [np.sqrt(0.5), 0, -np.sqrt(0.5)], atol=1e-12)
    mean = np.array([1.0, 0.0])
    expected = cosine_scores(np.array([[2.0, 0.0]]), np.array([[0.0, 1.0]]))
    assert score_trials(trials, vectors, mean=mean)[0] == pytest.approx(expected[0])
    with pytest.raises(ConfigError, match="1 of 3 recordings.*'c'"):
        score_trials(trials, {"a": vectors["a"], "b": vectors["b"]})


def test_as_norm_by_hand():
    rng = np.random.default_rng(6)
    x, cohort, pairs = rng.normal(size=(5, 4)), rng.normal(size=(30, 4)), np.array([[0, 1], [2, 3], [0, 4]])
    got = score_pairs(x, pairs, cohort=cohort, top_n=7)
    for (i, j), value in zip(pairs, got, strict=True):
        score = float(cosine_scores(x[[i]], x[[j]])[0])
        sides = []
        for k in (i, j):
            best = sorted((float(cosine_scores(x[[k]], c[None])[0]) for c in cohort), reverse=True)[:7]
            sides.append((score - np.mean(best)) / np.std(best))
        assert value == pytest.approx(np.mean(sides))
    # more than there are: the whole cohort
    np.testing.assert_allclose(
        score_pairs(x, pairs, cohort=cohort, top_n=300), score_pairs(x, pairs, cohort=cohort, top_n=30)
    )


def test_as_norm_in_blocks_is_the_same(monkeypatch):
    rng = np.random.default_rng(7)
    x, cohort, (pairs, _) = rng.normal(size=(9, 4)), rng.normal(size=(2**22, 4))[:500], all_pairs(range(9))
    whole = score_pairs(x, pairs, cohort=cohort, top_n=20)
    parts = np.concatenate([scoring._cohort_statistics(x[[i]], cohort, 20)[0] for i in range(9)])
    np.testing.assert_allclose(parts, scoring._cohort_statistics(x, cohort, 20)[0])
    assert np.isfinite(whole).all()


def test_as_norm_repairs_a_shift_between_conditions():
    """Recordings of one condition resemble each other; normalisation by a cohort of both conditions takes it out."""
    rng = np.random.default_rng(8)
    speakers = np.tile(np.repeat(np.arange(20), 4), 2)
    condition = np.repeat([0, 1], 80)
    shift = np.stack([np.zeros(16), np.eye(16)[0] * 3])
    base = rng.normal(size=(20, 16))

    def recordings(who, where):
        return who + rng.normal(size=(len(where), 16)) * 0.7 + shift[where]

    x = recordings(base[speakers], condition)
    cohort = recordings(rng.normal(size=(400, 16)), np.arange(400) % 2)
    pairs, labels = all_pairs(speakers)
    plain, normalised = score_pairs(x, pairs), score_pairs(x, pairs, cohort=cohort, top_n=100)
    assert eer(normalised, labels) < 0.85 * eer(plain, labels)


def test_whitening_and_wccn_undo_a_linear_map():
    rng = np.random.default_rng(9)
    speakers = np.repeat(np.arange(40), 10)
    x = rng.normal(size=(40, 6))[speakers] + 0.5 * rng.normal(size=(400, 6))
    distort = rng.normal(size=(6, 6)) * np.array([30, 10, 3, 1, 0.3, 0.1])[:, None]
    y = x @ distort + 5
    pairs, labels = all_pairs(speakers)
    rates = {
        "clean": eer(score_pairs(x, pairs, mean=x.mean(0)), labels),
        "distorted": eer(score_pairs(y, pairs, mean=y.mean(0)), labels),
        "whitened": eer(score_pairs(y, pairs, transform=Whitening.fit(y, shrink=0)), labels),
        "wccn": eer(score_pairs(y, pairs, transform=WCCN.fit(y, speakers, shrink=0)), labels),
    }
    assert rates["distorted"] > 2 * rates["clean"]
    assert rates["whitened"] == pytest.approx(rates["clean"], abs=0.01)
    assert rates["wccn"] == pytest.approx(rates["clean"], abs=0.01)


def test_wccn_scales_down_what_varies_within_a_group():
    rng = np.random.default_rng(10)
    groups = np.repeat(np.arange(100), 5)
    x = rng.normal(size=(100, 3))[groups] + rng.normal(size=(500, 3)) * np.array([5.0, 0.1, 0.1])
    y = WCCN.fit(x, groups)(x)
    between = np.stack([y[groups == g].mean(0) for g in range(100)]).std(0)
    within = np.std(y - np.stack([y[groups == g].mean(0) for g in range(100)])[groups], axis=0)
    ratio = between / within
    assert ratio[0] < 1.5 < 5 < ratio[1]
    with pytest.raises(ConfigError, match="groups of at least two"):
        WCCN.fit(x, np.arange(500))


def test_whitening_of_fewer_recordings_than_dimensions_stays_finite():
    x = np.random.default_rng(11).normal(size=(10, 64))
    out = Whitening.fit(x)(x)
    assert np.isfinite(out).all() and np.abs(out).max() < 1e3
    with pytest.raises(ConfigError, match="at least two"):
        Whitening.fit(x[:1])


def test_effective_dimension():
    rng = np.random.default_rng(12)
    x = rng.normal(size=(20000, 10))
    assert effective_dimension(x) == pytest.approx(10, abs=0.05)
    rotation = np.linalg.qr(rng.normal(size=(10, 10)))[0]
    flat = x * np.array([1, 1, 1] + [0] * 7) @ rotation
    assert effective_dimension(flat) == pytest.approx(3, abs=0.01)
    assert effective_dimension(100 * flat + 7) == pytest.approx(effective_dimension(flat))
    assert effective_dimension(np.ones((5, 3))) == 0.0
