"""DER and MTWV: numbers worked out by hand, properties, and pyannote.metrics where it is installed."""

from __future__ import annotations

import random

import numpy as np
import pytest

from s3prl_speaker_upstreams.superb import scoring
from s3prl_speaker_upstreams.superb.errors import ScoringError
from s3prl_speaker_upstreams.superb.reference import PAPER_TASKS, POINTS, ROWS, superb_score
from s3prl_speaker_upstreams.superb.scoring import Turn, diarization_error, mtwv, predictions_to_turns


def _turns(*spans: tuple[str, float, float], recording: str = "a") -> list[Turn]:
    return [Turn(recording, speaker, start, end) for speaker, start, end in spans]


def test_der_by_hand_with_overlap():
    # reference: x 0-10, y 8-14 (16 s of speaker time, 2 s of overlap)
    reference = _turns(("x", 0, 10), ("y", 8, 14))
    # hypothesis: 1 0-8 (= x), 2 8-15 (= y): misses x 8-10 (2 s), false alarm 14-15 (1 s), no confusion
    error = diarization_error(reference, _turns(("1", 0, 8), ("2", 8, 15)))
    assert (error.total, error.miss, error.false_alarm, error.confusion) == pytest.approx((16, 2, 1, 0))
    assert error.rate == pytest.approx(3 / 16)


def test_der_by_hand_with_confusion():
    # one system speaker for both: it pairs with x (6 s), the other 4 s are confused
    error = diarization_error(_turns(("x", 0, 6), ("y", 6, 10)), _turns(("1", 0, 10)))
    assert (error.miss, error.false_alarm, error.confusion) == pytest.approx((0, 0, 4))


def test_der_pairs_speakers_in_each_recording_for_itself():
    reference = [*_turns(("x", 0, 5)), *_turns(("x", 0, 5), recording="b")]
    hypothesis = [
        *_turns(("1", 0, 5)),
        *_turns(("2", 0, 5), recording="b"),
        *_turns(("3", 0, 99), recording="unscored"),
    ]
    assert diarization_error(reference, hypothesis).rate == 0


def test_der_is_invariant_to_names_and_cutting_and_counts_repeated_turns_once():
    draw = random.Random(1)
    spans = [(draw.choice("xyz"), start := draw.uniform(0, 30), start + draw.uniform(0.5, 5)) for _ in range(12)]
    hyp = [(draw.choice("123"), start := draw.uniform(0, 30), start + draw.uniform(0.5, 5)) for _ in range(12)]
    plain = diarization_error(_turns(*spans), _turns(*hyp)).rate
    renamed = [({"1": "3", "2": "1", "3": "2"}[s], a, b) for s, a, b in hyp]
    assert diarization_error(_turns(*spans), _turns(*renamed)).rate == pytest.approx(plain)
    cut = [part for s, a, b in hyp for part in ((s, a, (a + b) / 2), (s, (a + b) / 2, b))]
    assert diarization_error(_turns(*spans), _turns(*cut)).rate == pytest.approx(plain)
    assert diarization_error(_turns(*spans), _turns(*hyp, *hyp)).rate == pytest.approx(plain)
    assert diarization_error(_turns(*spans), _turns(*spans)).rate == pytest.approx(0)
    nothing = diarization_error(_turns(*spans), [])
    assert nothing.rate == pytest.approx(1) and nothing.miss == pytest.approx(nothing.total)


def test_der_equals_pyannote_metrics():
    core = pytest.importorskip("pyannote.core", reason="pyannote.metrics is not installed")
    diarization = pytest.importorskip("pyannote.metrics.diarization", reason="pyannote.metrics is not installed")
    draw = random.Random(0)
    for _ in range(10):
        reference, hypothesis = (
            [
                Turn(recording, f"{draw.randrange(3)}", start := draw.uniform(0, 25), start + draw.uniform(0.3, 4))
                for recording in ("a", "b")
                for _ in range(9)
            ]
            for _ in range(2)
        )
        metric = diarization.DiarizationErrorRate(collar=0.0, skip_overlap=False)
        for recording in ("a", "b"):
            pair = []
            for turns in (reference, hypothesis):
                annotation = core.Annotation(uri=recording)
                for index, turn in enumerate(turns):
                    if turn.recording == recording:
                        annotation[core.Segment(turn.start, turn.end), index] = turn.speaker
                pair.append(annotation.support())  # joins a speaker's overlapping turns, as dscore does
            # the whole time counts, as in dscore; without it pyannote warns and takes the same extent
            metric(*pair, uem=core.Timeline([core.Segment(0, 40)]))
        assert diarization_error(reference, hypothesis).rate == pytest.approx(abs(metric), abs=1e-9)


def test_md_eval_run_bare_reads_lower_for_it_scores_between_reference_turns_only():
    """Checked against pyannote.metrics with that time as its uem: the same number."""
    core = pytest.importorskip("pyannote.core", reason="pyannote.metrics is not installed")
    diarization = pytest.importorskip("pyannote.metrics.diarization", reason="pyannote.metrics is not installed")
    reference = _turns(("x", 2, 6), ("y", 5, 9))
    hypothesis = _turns(("1", 1, 6), ("2", 5.5, 11))
    dscore = diarization_error(reference, hypothesis)
    bare = diarization_error(reference, scoring.within_reference(reference, hypothesis))
    # 1 s before and 2 s behind the reference are false alarms to dscore; half a second of y is missed to both
    assert (dscore.false_alarm, dscore.miss, bare.false_alarm, bare.miss) == pytest.approx((3, 0.5, 0, 0.5))
    assert (dscore.rate, bare.rate) == pytest.approx((3.5 / 8, 0.5 / 8))
    pair = []
    for turns in (reference, hypothesis):
        annotation = core.Annotation(uri="a")
        for turn in turns:
            annotation[core.Segment(turn.start, turn.end), turn.speaker] = turn.speaker
        pair.append(annotation)
    metric = diarization.DiarizationErrorRate(collar=0.0, skip_overlap=False)
    assert metric(*pair, uem=core.Timeline([core.Segment(2, 9)])) == pytest.approx(bare.rate)


def test_rttm_survives_writing_and_reading_and_bad_lines_are_named(tmp_path):
    turns = _turns(("x", 0.25, 3.5), ("y", 2, 4))
    assert scoring.read_rttm(scoring.write_rttm(turns, tmp_path / "a.rttm")) == turns
    (tmp_path / "bad.rttm").write_text("SPEAKER a 1 zero 3 <NA> <NA> x <NA>\n")
    with pytest.raises(ScoringError, match="bad.rttm:1"):
        scoring.read_rttm(tmp_path / "bad.rttm")
    (tmp_path / "empty.rttm").write_text(";; nothing\n")
    with pytest.raises(ScoringError, match="no SPEAKER line"):
        scoring.read_rttm(tmp_path / "empty.rttm")


def test_predictions_become_turns_by_threshold_and_median():
    activity = np.zeros((10, 2))
    activity[2:5, 0] = 0.6
    activity[7, 1] = 0.9  # one frame: the median filter takes it away
    turns = predictions_to_turns("r", activity, frame_shift=1600, threshold=0.5, median=1)
    assert turns == [Turn("r", "r_0", 0.2, 0.5), Turn("r", "r_1", 0.7, pytest.approx(0.8))]
    assert [t.speaker for t in predictions_to_turns("r", activity, frame_shift=1600, threshold=0.5, median=3)] == [
        "r_0"
    ]
    assert predictions_to_turns("r", activity, frame_shift=1600, threshold=0.7, median=3) == []


def test_diarization_scoring_takes_the_best_setting_and_refuses_missing_predictions(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    (tmp_path / "scoring" / "predictions").mkdir(parents=True)
    (tmp_path / "frame_shift").write_text("1600\n")
    scoring.write_rttm([Turn("r", "x", 0.0, 1.0)], tmp_path / "rttm")
    with pytest.raises(ScoringError, match="no prediction"):
        scoring.score_diarization(tmp_path, tmp_path / "rttm")
    with h5py.File(tmp_path / "scoring" / "predictions" / "r.h5", "w") as file:
        # speech at 0.55 for 10 frames, then a lower hum that only 0.3 and 0.4 take for speech
        file["T_hat"] = np.concatenate([np.full((10, 1), 0.55), np.full((10, 1), 0.45)])
    best = scoring.score_diarization(tmp_path, tmp_path / "rttm")
    assert best["DER"] == pytest.approx(0) and best["threshold"] == 0.5
    assert len(list((tmp_path / "scoring").glob("hyp_*.rttm"))) == 10
    scoring.write_rttm([Turn("r", "x", 0, 1), Turn("gone", "x", 0, 1)], tmp_path / "rttm")
    with pytest.raises(ScoringError, match="none for gone"):
        scoring.score_diarization(tmp_path, tmp_path / "rttm")


# ---------------------------------------------------------------------------------------------- MTWV


def test_mtwv_by_hand():
    # query p in 2 of 4 documents, q in 1 of 4; beta 1
    scores = {("p", "a"): 5, ("p", "b"): 3, ("p", "c"): 4, ("p", "d"): 0,
              ("q", "a"): 1, ("q", "b"): 6, ("q", "c"): 2, ("q", "d"): 0}  # fmt: skip
    truth = {("p", "a"), ("p", "b"), ("q", "b")}
    # accepting q-b (6): 1/2; p-a (5): +1/4 = 3/4; p-c (4): -1/4 = 1/2; p-b (3): +1/4 = 3/4; later only losses
    assert mtwv(scores, truth, beta=1.0) == (pytest.approx(0.75), 5)
    # with beta 12.49 the same threshold is best, having no false alarm
    assert mtwv(scores, truth) == (pytest.approx(0.75), 5)
    # a miss costs more than a false alarm: go down to 3
    value, threshold = mtwv(scores, truth, beta=0.1)
    assert (value, threshold) == (pytest.approx(1 - 0.1 * (1 / 2) / 2), 3)


def test_mtwv_of_perfect_useless_and_tied_scores():
    truth = {("q", "a"), ("p", "b")}
    pairs = [(query, document) for query in "pq" for document in "abc"]
    assert mtwv({pair: float(pair in truth) for pair in pairs}, truth)[0] == pytest.approx(1)
    assert mtwv({pair: -float(pair in truth) for pair in pairs}, truth) == (0.0, float("inf"))
    # all tied: everything or nothing, and everything costs beta
    assert mtwv(dict.fromkeys(pairs, 1.0), truth) == (0.0, float("inf"))
    assert mtwv(dict.fromkeys(pairs, 1.0), truth, beta=0.5)[0] == pytest.approx(0.5)


def test_mtwv_queries_and_documents_that_were_not_searched_count_as_default():
    scores = {("q", "a"): 1.0, ("q", "b"): -1.0}
    truth = {("q", "a"), ("other", "b")}
    assert mtwv(scores, truth)[0] == pytest.approx(0.5)  # "other" is always missed
    assert mtwv(scores, truth, queries=["q"])[0] == pytest.approx(1)
    assert mtwv(scores, truth, queries=["q", "nowhere"])[0] == pytest.approx(1)  # in no document: left out
    with pytest.raises(ScoringError, match="occurs in any document"):
        mtwv(scores, {("z", "z")}, queries=["q"])


def test_mtwv_only_depends_on_the_order_of_scores():
    draw = np.random.default_rng(0)
    scores = {(f"q{q}", f"d{d}"): float(draw.normal()) for q in range(6) for d in range(20)}
    truth = {pair for pair in scores if draw.random() < 0.2}
    stretched = {pair: 3 * np.arctan(score) + 7 for pair, score in scores.items()}
    assert mtwv(stretched, truth, beta=1.0)[0] == pytest.approx(mtwv(scores, truth, beta=1.0)[0])


def test_quesst_files_are_read_as_the_official_scoring_does(tmp_path):
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth" / "x.rttm").write_text("LEXEME doc1 1 0.1 0.5 en_1 lex <NA> 0.5\nLEXEME doc2 1 0 1 fr_1 lex\n")
    (tmp_path / "truth" / "x.ecf.xml").write_text(
        '<ecf><excerpt audio_filename="Audio/doc1.wav"/><excerpt audio_filename="Audio/doc2.wav"/></ecf>'
    )
    (tmp_path / "truth" / "x.tlist.xml").write_text('<termlist><term termid="en_1"/><term termid="fr_1"/></termlist>')
    stdlist = tmp_path / "benchmark.stdlist.xml"
    stdlist.write_text(
        '<stdlist><detected_termlist termid="en_1"><term file="doc1" score="2.0"/><term file="doc2" score="0.1"/>'
        "</detected_termlist></stdlist>"
    )
    result = scoring.score_quesst(stdlist, tmp_path / "truth")
    assert result["MTWV"] == pytest.approx(0.5)  # the French query was not searched and counts as missed
    assert result["MTWV_searched"] == pytest.approx(1)
    stdlist.write_text(stdlist.read_text().replace("2.0", "nan"))
    with pytest.raises(ScoringError, match="NaN"):
        scoring.score_quesst(stdlist, tmp_path / "truth")


def test_beta_of_quesst_is_that_of_its_costs():
    assert pytest.approx((1 / 100) * (1 / 0.0008 - 1), abs=1e-3) == scoring.QUESST_BETA


# ---------------------------------------------------------------------------------------------- SUPERB score


def test_superb_score_is_0_at_fbank_1000_at_the_best_and_linear_between():
    assert superb_score(ROWS["FBANK"]) == 0
    assert superb_score({column: top for column, (_, top) in POINTS.items()}) == pytest.approx(1000)
    middle = {column: (zero + top) / 2 for column, (zero, top) in POINTS.items()}
    assert superb_score(middle) == pytest.approx(500)
    assert superb_score({k: v for k, v in middle.items() if k != "SV_eer_public"}) is None
    # a task with two metrics weighs as much as one with one: SF at the best, all else at FBANK
    slots = {**ROWS["FBANK"], "SF_f1_public": POINTS["SF_f1_public"][1], "SF_cer_public": POINTS["SF_cer_public"][1]}
    assert superb_score(slots) == pytest.approx(1000 / len(PAPER_TASKS))


def test_published_rows_are_complete_and_ordered_as_published():
    assert all(set(row) == set(POINTS) for row in ROWS.values())
    scores = {name: superb_score(row) for name, row in ROWS.items()}
    assert scores["FBANK"] < scores["wav2vec 2.0 Base"] < scores["HuBERT Base"]
