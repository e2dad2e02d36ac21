"""Scores that s3prl leaves to programs outside: diarization error rate (SD) and maximum term weighted value (QbE).

Own code of a few lines each, because the tools that s3prl's scripts call (dscore with a hard-coded path, the QUESST
scripts with their Java archive) come with no package. Both are tested with numbers worked out by hand, and the DER also
against pyannote.metrics, which the tests need and scoring does not: it would bring five packages for one page of
arithmetic, and gives dscore's number only where it is told of overlapping turns and of the time to score.
"""

from __future__ import annotations

import logging
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy  # its parts are loaded at first use

from s3prl_speaker_upstreams.common.files import write_text
from s3prl_speaker_upstreams.superb.errors import ScoringError
from s3prl_speaker_upstreams.superb.layouts import files

__all__ = [
    "MEDIANS",
    "QUESST_BETA",
    "QUESST_PRIOR",
    "THRESHOLDS",
    "DiarizationError",
    "Turn",
    "diarization_error",
    "mtwv",
    "predictions_to_turns",
    "read_rttm",
    "score_diarization",
    "score_quesst",
    "within_reference",
    "write_rttm",
]

logger = logging.getLogger(__name__)

THRESHOLDS, MEDIANS = (0.3, 0.4, 0.5, 0.6, 0.7), (1, 11)
"""SD's grid: speaker activity above the threshold, after a median filter of that many frames. The benchmark reports the
lowest DER of the ten on the test set (s3prl, downstream/diarization/score.sh); there is no choice on dev in it."""

QUESST_PRIOR = 0.0741289
"""Effective prior 1 / (1 + beta) of the MediaEval scoring tool, from the example in its README (QUESST 2015)."""

QUESST_BETA = (1 - QUESST_PRIOR) / QUESST_PRIOR
"""Weight of false alarms, 12.49: what a false alarm cost of 1, a miss cost of 100 and a prior of 0.0008 give."""


@dataclass(frozen=True)
class Turn:
    """One speaker talking in one recording, from `start` to `end` seconds."""

    recording: str
    speaker: str
    start: float
    end: float


@dataclass(frozen=True)
class DiarizationError:
    """Seconds of speaker time: `total` in the reference, and missed, falsely alarmed and confused."""

    total: float
    miss: float
    false_alarm: float
    confusion: float

    @property
    def rate(self) -> float:
        """(miss + false alarm + confusion) / total."""
        return (self.miss + self.false_alarm + self.confusion) / self.total


def read_rttm(path: str | Path) -> list[Turn]:
    """SPEAKER lines of a NIST RTTM file.

    Raises ScoringError if a line is not of that form or nothing is there.
    """
    turns = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split()
        if not fields or fields[0] != "SPEAKER":
            continue
        try:
            start, length = float(fields[3]), float(fields[4])
            turns.append(Turn(fields[1], fields[7], start, start + length))
        except (IndexError, ValueError) as error:
            raise ScoringError(f"{path}:{number}: {line!r} is no SPEAKER line of an RTTM file") from error
    if not turns:
        raise ScoringError(f"{path}: no SPEAKER line in it")
    return turns


def write_rttm(turns: Iterable[Turn], path: str | Path) -> Path:
    """Turns as SPEAKER lines with hundredths of a second, as the benchmark's scripts write them."""
    lines = (
        f"SPEAKER {turn.recording} 1 {turn.start:7.2f} {turn.end - turn.start:7.2f} <NA> <NA> {turn.speaker} <NA>\n"
        for turn in turns
    )
    return write_text(path, "".join(lines))


def diarization_error(reference: Sequence[Turn], hypothesis: Sequence[Turn]) -> DiarizationError:
    """Diarization error over all recordings of the reference; no collar, overlapped speech scored.

    Those are the settings of dscore that SUPERB uses: the whole of reference and hypothesis counts. NIST's md-eval run
    bare (``md-eval.pl -r REF -s HYP``, without ``-u``) has the same collar and overlap but scores from the first to the
    last reference turn only, so that false alarms outside are free and it reads lower; see :func:`within_reference`.
    Within a recording, speakers are paired so that the paired time is longest, and overlapping turns of one speaker
    count once, as dscore merges them. Recordings that the reference lacks are not scored.

    Examples
    --------
    One second of 10 missed, half a second confused:

    >>> ref = [Turn("a", "x", 0, 6), Turn("a", "y", 6, 10)]
    >>> round(diarization_error(ref, [Turn("a", "1", 0, 5), Turn("a", "2", 5.5, 10)]).rate, 3)
    0.1
    """
    recordings = sorted({turn.recording for turn in reference})
    if not recordings:
        raise ScoringError("the reference has no turn to score")
    parts = [_error_of(*(_of(turns, name) for turns in (reference, hypothesis))) for name in recordings]
    return DiarizationError(*(float(sum(column)) for column in zip(*parts, strict=True)))


def within_reference(reference: Sequence[Turn], hypothesis: Sequence[Turn]) -> list[Turn]:
    """The hypothesis cut to the time between each recording's first and last reference turn, as bare md-eval scores.

    Examples
    --------
    A false alarm of one second behind the reference's end costs a tenth with dscore and nothing with md-eval:

    >>> ref, hyp = [Turn("a", "x", 0, 10)], [Turn("a", "1", 0, 11)]
    >>> diarization_error(ref, hyp).rate, diarization_error(ref, within_reference(ref, hyp)).rate
    (0.1, 0.0)
    """
    spans: dict[str, tuple[float, float]] = {}
    for turn in reference:
        start, end = spans.get(turn.recording, (turn.start, turn.end))
        spans[turn.recording] = min(start, turn.start), max(end, turn.end)
    cut = (
        replace(turn, start=max(turn.start, spans[turn.recording][0]), end=min(turn.end, spans[turn.recording][1]))
        for turn in hypothesis
        if turn.recording in spans
    )
    return [turn for turn in cut if turn.end > turn.start]


def _of(turns: Sequence[Turn], recording: str) -> list[Turn]:
    return [turn for turn in turns if turn.recording == recording and turn.end > turn.start]


def _activity(turns: Sequence[Turn], edges: np.ndarray) -> np.ndarray:
    """(speakers, spans) bool: who talks between neighbouring `edges`."""
    speakers = sorted({turn.speaker for turn in turns})
    active = np.zeros((len(speakers), len(edges) - 1), bool)
    for turn in turns:
        first, last = np.searchsorted(edges, (turn.start, turn.end))
        active[speakers.index(turn.speaker), first:last] = True
    return active


def _error_of(reference: Sequence[Turn], hypothesis: Sequence[Turn]) -> tuple[float, float, float, float]:
    edges = np.unique([edge for turn in (*reference, *hypothesis) for edge in (turn.start, turn.end)])
    ref, hyp = _activity(reference, edges), _activity(hypothesis, edges)
    seconds = np.diff(edges)
    together = (ref * seconds) @ hyp.T.astype(float)  # (reference speakers, hypothesis speakers)
    matched = sum(
        (ref[r] & hyp[h]).astype(float)
        for r, h in zip(*scipy.optimize.linear_sum_assignment(together, maximize=True), strict=True)
    )
    counts, found = ref.sum(0), hyp.sum(0)
    right = np.broadcast_to(matched, seconds.shape)
    miss = np.maximum(counts - found, 0)
    false_alarm = np.maximum(found - counts, 0)
    confusion = np.minimum(counts, found) - right
    return (
        float(counts @ seconds),
        float(miss @ seconds),
        float(false_alarm @ seconds),
        float(confusion @ seconds),
    )


def predictions_to_turns(
    recording: str, activity: np.ndarray, *, frame_shift: int, threshold: float, median: int
) -> list[Turn]:
    """Turns from the downstream model's speaker activities.

    Parameters
    ----------
    activity : (frames, speakers), probabilities
    frame_shift : samples at 16 kHz per frame
    threshold, median : see :data:`THRESHOLDS`; median is odd

    Returns
    -------
    Turns rounded to hundredths of a second, as they stand in the RTTM files that the benchmark scores
    """
    active = (activity > threshold).astype(float)
    if median > 1:
        active = scipy.signal.medfilt(active, (median, 1))
    turns = []
    for speaker, column in enumerate(active.T):
        changes = np.flatnonzero(np.diff(np.pad(column, 1)))
        for first, last in zip(changes[::2], changes[1::2], strict=True):
            start = round(first * frame_shift / 16000, 2)
            length = round((last - first) * frame_shift / 16000, 2)
            turns.append(Turn(recording, f"{recording}_{speaker}", start, start + length))
    return turns


def score_diarization(expdir: str | Path, rttm: str | Path) -> dict[str, float]:
    """DER of a finished SD evaluation: the lowest over thresholds and median filters.

    Parameters
    ----------
    expdir : experiment whose ``scoring/predictions/*.h5`` and ``frame_shift`` s3prl's test evaluation wrote
    rttm : of the test set

    Returns
    -------
    {"DER", "miss", "false_alarm", "confusion" (shares), "threshold", "median"} of the best setting, and "DER_md_eval"
    of it (see :func:`within_reference`); the hypotheses of all ten are written to ``scoring/hyp_THRESHOLD_MEDIAN.rttm``

    Raises
    ------
    ScoringError if predictions are absent or a recording of the reference has none.
    """
    import h5py  # an extra of SD

    expdir = Path(expdir)
    predictions = files(expdir / "scoring" / "predictions", "*.h5")
    if not predictions:
        raise ScoringError(f"{expdir}/scoring/predictions: no prediction; run the evaluate stage first")
    reference = read_rttm(rttm)
    absent = sorted({turn.recording for turn in reference} - {file.stem for file in predictions})
    if absent:
        raise ScoringError(f"{expdir}/scoring/predictions: none for {absent[0]} ({len(absent)} such) of {rttm}")
    frame_shift = int((expdir / "frame_shift").read_text())
    activities = {}
    for file in predictions:
        with h5py.File(file, "r") as data:
            activities[file.stem] = data["T_hat"][:]
    best: dict[str, float] = {}
    for median in MEDIANS:
        for threshold in THRESHOLDS:
            turns = [
                turn
                for name, activity in activities.items()
                for turn in predictions_to_turns(
                    name, activity, frame_shift=frame_shift, threshold=threshold, median=median
                )
            ]
            write_rttm(turns, expdir / "scoring" / f"hyp_{threshold}_{median}.rttm")
            error = diarization_error(reference, turns)
            if not best or error.rate < best["DER"]:
                best = {
                    "DER": error.rate,
                    "miss": error.miss / error.total,
                    "false_alarm": error.false_alarm / error.total,
                    "confusion": error.confusion / error.total,
                    "DER_md_eval": diarization_error(reference, within_reference(reference, turns)).rate,
                    "threshold": threshold,
                    "median": float(median),
                }
    return best


def mtwv(
    scores: Mapping[tuple[str, str], float],
    truth: set[tuple[str, str]],
    *,
    queries: Iterable[str] | None = None,
    documents: Iterable[str] | None = None,
    default: float = -10.0,
    beta: float = QUESST_BETA,
) -> tuple[float, float]:
    """Maximum term weighted value and the threshold that reaches it.

    ``TWV(t) = 1 - mean over queries of (P_miss(t) + beta * P_fa(t))``, where a document is accepted for a query if its
    score is `t` or more, P_miss is the share of documents with the query that are rejected, and P_fa the share of
    documents without it that are accepted. Queries that no document holds are left out. (NIST STD 2006 evaluation plan,
    with documents for seconds, as QUESST counts.)

    Parameters
    ----------
    scores : (query, document) -> score
    truth : pairs of query and document that belong together
    queries, documents : all that count; None takes those in `scores` and `truth`
    default : score of pairs that `scores` lacks

    Returns
    -------
    (MTWV, threshold); accepting nothing gives 0 at infinity, so MTWV is never below 0

    Examples
    --------
    >>> mtwv({("q", "a"): 2.0, ("q", "b"): 1.0}, {("q", "a")}, beta=1.0)
    (1.0, 2.0)
    """
    names = sorted({q for q, _ in scores} | {q for q, _ in truth} if queries is None else set(queries))
    named = sorted({d for _, d in scores} | {d for _, d in truth} if documents is None else set(documents))
    row = {name: index for index, name in enumerate(named)}
    wanted = [name for name in names if any((name, file) in truth for file in named)]
    if not wanted:
        raise ScoringError("no query occurs in any document; are the ground truth and the predictions of one corpus?")
    all_scores, all_gains = [], []
    for name in wanted:
        own = np.full(len(named), default)
        target = np.zeros(len(named), bool)
        for file, index in row.items():
            own[index] = scores.get((name, file), default)
            target[index] = (name, file) in truth
        others = (~target).sum()
        # accepting a trial moves the mean by what it saves in misses or costs in false alarms
        gain = np.where(target, 1.0 / target.sum(), -beta / others if others else 0.0) / len(wanted)
        all_scores.append(own)
        all_gains.append(gain)
    flat, gains = np.concatenate(all_scores), np.concatenate(all_gains)
    order = np.argsort(-flat, kind="stable")
    flat, value = flat[order], np.cumsum(gains[order])
    ends = np.append(np.flatnonzero(np.diff(flat)), len(flat) - 1)  # equal scores are accepted together
    best = ends[np.argmax(value[ends])]
    if value[best] <= 0:
        return 0.0, float("inf")
    return float(value[best]), float(flat[best])


def _names(path: Path, element: str, attribute: str) -> list[str] | None:
    if not path.is_file():
        return None
    return [Path(found.get(attribute, "")).stem for found in ElementTree.parse(path).getroot().iter(element)]


def score_quesst(stdlist: str | Path, ground_truth: str | Path, *, beta: float = QUESST_BETA) -> dict[str, float]:
    """MTWV of s3prl's ``benchmark.stdlist.xml`` against one ground truth folder of QUESST 2014.

    Parameters
    ----------
    stdlist : the file
    ground_truth : folder ``groundtruth_quesst14_dev`` or ``..._eval`` with an .rttm (LEXEME lines), and an .ecf.xml and
        a .tlist.xml that say which documents and queries count

    Returns
    -------
    "MTWV" : over all queries and documents of the ground truth, those that s3prl does not search (other languages)
        scoring -10, which is what SUPERB reports (``score-TWV-Cnxe.sh ... -10``);
    "MTWV_searched" : over what was searched only; "threshold"
    """
    folder = Path(ground_truth)
    rttm, ecf, tlist = (next(iter(files(folder, p)), None) for p in ("*.rttm", "*.ecf.xml", "*.tlist.xml"))
    if rttm is None:
        raise ScoringError(f"{folder}: no .rttm file; expected the ground truth of QUESST 2014")
    truth = set()
    for line in rttm.read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if len(fields) > 5 and fields[0] == "LEXEME":
            truth.add((fields[5], fields[1]))
    scores = {}
    for found in ElementTree.parse(stdlist).getroot().iter("detected_termlist"):
        for term in found.iter("term"):
            scores[found.get("termid", ""), term.get("file", "")] = float(term.get("score", "nan"))
    if not scores:
        raise ScoringError(f"{stdlist}: holds no score")
    if not all(np.isfinite(value) for value in scores.values()):
        raise ScoringError(f"{stdlist}: holds scores that are no numbers; did the upstream give NaN?")
    queries = None if tlist is None else _names(tlist, "term", "termid")
    documents = None if ecf is None else _names(ecf, "excerpt", "audio_filename")
    official, threshold = mtwv(scores, truth, queries=queries, documents=documents, beta=beta)
    searched, _ = mtwv(
        scores, truth, queries={query for query, _ in scores}, documents={file for _, file in scores}, beta=beta
    )
    return {"MTWV": official, "MTWV_searched": searched, "threshold": threshold}
