"""Costs of calibrated scores, against definitions and other ways to compute them; intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest

from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.verification.calibration import Calibration
from s3prl_speaker_upstreams.verification.metrics import act_dcf, bootstrap, cllr, eer, min_cllr, min_dcf
from s3prl_speaker_upstreams.verification.scoring import score_pairs
from s3prl_speaker_upstreams.verification.trials import (
    Trials,
    all_pairs,
    read_scores,
    read_trials,
    speaker_units,
    write_scores,
)


def gaussians(seed: int, trials: int = 3000, distance: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Log likelihood ratios of two Gaussians ``distance`` apart, which are calibrated by construction."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(trials) < 0.2).astype(int)
    x = rng.normal(size=trials) + distance * labels
    return distance * x - distance**2 / 2, labels


def test_calibrated_scores_cost_what_they_must():
    ratios, labels = gaussians(0, 100_000)
    assert cllr(ratios, labels) == pytest.approx(min_cllr(ratios, labels), abs=0.003)
    assert act_dcf(ratios, labels, 0.05) == pytest.approx(min_dcf(ratios, labels, 0.05), abs=0.02)
    shifted = ratios + 3
    assert cllr(shifted, labels) > cllr(ratios, labels) + 0.2 and act_dcf(shifted, labels, 0.05) > 1.5 * act_dcf(
        ratios, labels, 0.05
    )
    assert min_cllr(shifted, labels) == pytest.approx(min_cllr(ratios, labels))
    again = Calibration.fit(0.1 * shifted - 7, labels)(0.1 * shifted - 7)
    assert (np.abs(again - ratios) < 0.1 + 0.02 * np.abs(ratios)).all()


def test_min_cllr_is_that_of_isotonic_regression():
    isotonic = pytest.importorskip("sklearn.isotonic").IsotonicRegression
    for seed in range(5):
        scores, labels = gaussians(seed, 400, 1.0)
        scores = scores.round(1)  # ties
        share = isotonic(y_min=0, y_max=1).fit(scores, labels).predict(scores)
        odds = labels.sum() / (1 - labels).sum()
        with np.errstate(divide="ignore"):
            ratios = np.log(share) - np.log(1 - share) - np.log(odds)
        expected = np.logaddexp(0, -ratios[labels == 1]).mean() + np.logaddexp(0, ratios[labels == 0]).mean()
        assert min_cllr(scores, labels) == pytest.approx(expected / 2 / np.log(2), abs=1e-9)


def test_calibration_needs_something_to_fit():
    with pytest.raises(ConfigError, match="all scores are the same"):
        Calibration.fit([1.0, 1.0], [1, 0])
    with pytest.raises(ConfigError, match="some of both kinds"):
        Calibration.fit([1.0, 2.0], [1, 1])
    perfect = Calibration.fit([0.0, 0.1, 0.9, 1.0], [0, 0, 1, 1])
    assert np.isfinite([perfect.scale, perfect.offset]).all()
    assert cllr(perfect([0.0, 1.0]), [0, 1]) < 0.01


def test_interval_by_speaker_covers_where_that_by_trial_does_not():
    """50 corpora of 20 speakers: the error rate over all speakers lies in most of the intervals by speaker."""

    def corpus(seed: int, speakers: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        who = np.repeat(np.arange(speakers), 4)
        spread = rng.uniform(0.4, 1.8, speakers)  # some speakers are harder than others
        x = rng.normal(size=(speakers, 6))[who] + rng.normal(size=(len(who), 6)) * spread[who][:, None]
        pairs, labels = all_pairs(who)
        return score_pairs(x, pairs), labels, who[pairs]

    truth = float(np.mean([eer(*corpus(1000 + seed, 100)[:2]) for seed in range(5)]))
    covered = {"speaker": 0, "trial": 0}
    for seed in range(50):
        scores, labels, units = corpus(seed, 20)
        for name, by in (("speaker", units), ("trial", None)):
            low, high = bootstrap(scores, labels, by, samples=60)
            covered[name] += low <= truth <= high
    assert covered["speaker"] >= 42 and covered["trial"] <= 38


NAMED = [("id10001/a/1.wav", "id10001/b/1.wav", 1), ("id10001/a/1.wav", "id10002/a/1.wav", 0)]


def trials_of(rows) -> Trials:
    return Trials(np.array([r[2] for r in rows]), tuple(r[0] for r in rows), tuple(r[1] for r in rows))


def test_speakers_are_told_by_name_or_by_what_target_trials_link():
    units, what = speaker_units(trials_of(NAMED))
    assert what == "speakers, by name" and units.tolist() == [[0, 0], [0, 1]]
    # Folders that contradict the labels name no speakers: sessions, say.
    sessions = [("s1/a", "s2/a", 1), ("s2/a", "s3/a", 1), ("s1/a", "s4/a", 0)]
    units, what = speaker_units(trials_of(sessions))
    assert what == "speakers, as target trials link them" and units.tolist() == [[0, 0], [0, 0], [0, 1]]
    one = [("u1", "u2", 1), ("u2", "u3", 1), ("u1", "u3", 0)]  # contradicts itself
    assert speaker_units(trials_of(one))[1] == "recordings"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text", ["1\ta b.wav\tc.wav\n", "a b.wav,c.wav,target\n", "1;a b.wav;c.wav\n"])
def test_trial_lists_with_blanks_in_names_and_byte_order_marks(tmp_path, text, encoding):
    (tmp_path / "trials.txt").write_text(text, encoding=encoding)
    trials = read_trials(tmp_path / "trials.txt")
    assert (trials.labels.tolist(), trials.enrol, trials.test) == ([1], ("a b.wav",), ("c.wav",))


def test_score_files_come_back(tmp_path):
    trials = trials_of(NAMED)
    scores = {"cosine": np.array([0.123456, -0.5]), "asnorm": np.array([12.5, -3.0])}
    again, read = read_scores(write_scores(trials, scores, tmp_path / "scores.tsv"))
    assert again.enrol == trials.enrol and again.labels.tolist() == [1, 0]
    assert {name: x.tolist() for name, x in read.items()} == {name: x.tolist() for name, x in scores.items()}
    (tmp_path / "other.tsv").write_text("a b c\n")
    with pytest.raises(ConfigError, match="expected a file of `evaluate --scores`"):
        read_scores(tmp_path / "other.tsv")
