"""Published SUPERB results and the points that define the SUPERB score, each read in its source.

Source: the program of the official leaderboard, github.com/superbbenchmark/website-react at commit cacb90e (27 April
2024): rows from ``backend/utils.py`` (``get_leaderboard_default``, entries of the Interspeech 2021 paper, arXiv
2105.01051), reference points from ``frontend/src/Data.js``, the formula from ``frontend/src/overall_metrics.js``.

The leaderboard's FBANK row has KS 41.38, IC 9.65, SID 20.06 and ER 48.24, obtained with the downstream models of the
challenge; it is given as it stands there, being the score's zero point. WavLM and speaker models are not among the
public-set rows of that source, so no row of them is given.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["PAPER_TASKS", "POINTS", "ROWS", "SOURCE", "superb_score"]

SOURCE = "SUPERB leaderboard, superbbenchmark/website-react@cacb90e, backend/utils.py (rows of arXiv 2105.01051)"

_COLUMNS = (
    *("PR_per_public", "ASR_wer_public", "KS_acc_public", "QbE_mtwv_public", "SID_acc_public", "SV_eer_public"),
    *("SD_der_public", "IC_acc_public", "SF_f1_public", "SF_cer_public", "ER_acc_public"),
    *("SE_pesq_public", "SE_stoi_public", "SS_sisdri_public"),
)


def _row(*values: float) -> dict[str, float]:
    return dict(zip(_COLUMNS, values, strict=True))


ROWS: dict[str, dict[str, float]] = {
    "FBANK": _row(
        *(82.01, 23.18, 41.3826674, 0.58, 20.058174, 9.56, 10.05, 9.649354219, 69.64, 52.94, 48.23672168),
        *(2.55, 93.6, 9.2341),
    ),
    "wav2vec 2.0 Base": _row(5.74, 6.43, 96.23, 2.33, 75.18, 6.02, 6.08, 92.35, 88.3, 24.77, 63.43, 2.55, 93.9, 9.77),
    "wav2vec 2.0 Large": _row(4.75, 3.75, 96.66, 4.89, 86.14, 5.65, 5.62, 95.28, 87.11, 27.31, 65.64, 2.52, 94, 10.02),
    "HuBERT Base": _row(5.41, 6.42, 96.3, 7.36, 81.42, 5.11, 5.88, 98.34, 88.53, 25.2, 64.92, 2.58, 93.9, 9.36),
    "HuBERT Large": _row(3.53, 3.62, 95.29, 3.53, 90.33, 5.98, 5.75, 98.76, 89.81, 21.76, 67.62, 2.64, 94.2, 10.45),
}
"""Upstream -> leaderboard column -> value, in the leaderboard's units (per cent where a share)."""

POINTS: dict[str, tuple[float, float]] = {
    "PR_per_public": (82.01, 3.53),
    "KS_acc_public": (41.3826674, 96.66),
    "IC_acc_public": (9.649354219, 98.76),
    "SID_acc_public": (20.058174, 90.3),
    "ER_acc_public": (48.23672168, 67.62),
    "ASR_wer_public": (23.18, 3.62),
    "QbE_mtwv_public": (0.58, 7.36),
    "SF_f1_public": (69.64, 89.81),
    "SF_cer_public": (52.94, 21.76),
    "SV_eer_public": (9.56, 5.11),
    "SD_der_public": (10.05, 5.62),
    "SE_pesq_public": (2.55, 2.64),
    "SE_stoi_public": (93.6, 94.2),
    "SS_sisdri_public": (9.2341, 10.4514),
}
"""Leaderboard column -> (value that scores 0, value that scores 1000)."""

PAPER_TASKS = ("PR", "ASR", "KS", "QbE", "SID", "SV", "SD", "IC", "SF", "ER")
"""The ten tasks of the SUPERB paper, over which the leaderboard's "Paper" score is taken."""


def superb_score(values: Mapping[str, float], tasks: tuple[str, ...] = PAPER_TASKS) -> float | None:
    """SUPERB score of one upstream, or None where a task has no value (as the leaderboard does).

    Each metric becomes ``1000 (value - zero) / (top - zero)`` with the points of :data:`POINTS`; a task is the mean of
    its metrics, and the score the mean of the tasks.

    Parameters
    ----------
    values : leaderboard column -> value, for example {"PR_per_public": 82.01, ...}
    tasks : which to average, by the leaderboard's prefix (ASV is "SV" there)

    Examples
    --------
    >>> superb_score(ROWS["FBANK"])
    0.0
    >>> round(superb_score({"KS_acc_public": 96.66}, ("KS",)))
    1000
    """
    scores = []
    for task in tasks:
        columns = [column for column in POINTS if column.split("_")[0] == task]
        if not all(column in values for column in columns):
            return None
        scaled = [1000.0 * (values[c] - POINTS[c][0]) / (POINTS[c][1] - POINTS[c][0]) for c in columns]
        scores.append(sum(scaled) / len(scaled))
    return sum(scores) / len(scores) if scores else None
