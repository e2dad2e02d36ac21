"""Published SUPERB results and the points that define the SUPERB score, each read in its source.

Source: the program of the official leaderboard, github.com/superbbenchmark/website-react at commit cacb90e (27 April
2024): rows from ``backend/utils.py`` (``get_leaderboard_default``, entries of the Interspeech 2021 paper, arXiv
2105.01051), reference points from ``frontend/src/Data.js``, the formula from ``frontend/src/overall_metrics.js``. The
numbers stand with their task in :mod:`.tasks`.

The leaderboard's FBANK row has KS 41.38, IC 9.65, SID 20.06 and ER 48.24, obtained with the downstream models of the
challenge; it is given as it stands there, being the score's zero point. WavLM and speaker models are not among the
public-set rows of that source, so no row of them is given.
"""

from __future__ import annotations

from collections.abc import Mapping

from s3prl_speaker_upstreams.superb.tasks import TASKS

__all__ = ["PAPER_TASKS", "POINTS", "ROWS", "SOURCE", "superb_score"]

SOURCE = "SUPERB leaderboard, superbbenchmark/website-react@cacb90e, backend/utils.py (rows of arXiv 2105.01051)"

_METRICS = [(task, metric) for task in TASKS.values() for metric in task.metrics]

ROWS: dict[str, dict[str, float]] = {
    row: {metric.leaderboard: metric.published[row] for _, metric in _METRICS if row in metric.published}
    for row in ("FBANK", "wav2vec 2.0 Base", "wav2vec 2.0 Large", "HuBERT Base", "HuBERT Large")
}
"""Upstream -> leaderboard column -> value, in the leaderboard's units (per cent where a share)."""

POINTS: dict[str, tuple[float, float]] = {metric.leaderboard: metric.points for _, metric in _METRICS}
"""Leaderboard column -> (value that scores 0, value that scores 1000)."""

PAPER_TASKS: tuple[str, ...] = tuple(
    dict.fromkeys(metric.leaderboard.split("_")[0] for task, metric in _METRICS if task.paper)
)
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
