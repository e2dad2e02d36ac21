"""Speaker verification of any encoder on a trial list, such as VoxCeleb's: scores, error rates, intervals.

Three scorings stand beside each other: plain cosine; cosine after the mean of a cohort was subtracted (``mean``); and
that normalised by the cohort's nearest members (``asnorm``). The last two need a cohort, speech of other speakers.

>>> import soundfile, tempfile
>>> root = Path(tempfile.mkdtemp())
>>> for name, level in (("a", 0.1), ("b", 0.1), ("c", 0.5)):
...     soundfile.write(root / f"{name}.wav", np.full(800, level), 16000)
>>> trials = Trials(np.array([1, 0]), ("a.wav", "a.wav"), ("b.wav", "c.wav"))
>>> verification(lambda wavs: np.array([[1.0, wav.mean()] for wav in wavs]), trials, root, progress=False)["eer"]
0.0
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from s3prl_speaker_upstreams.common.audio import AUDIO_SUFFIXES
from s3prl_speaker_upstreams.data.keyed import random_for
from s3prl_speaker_upstreams.data.lists import read_listing
from s3prl_speaker_upstreams.data.manifest import Manifest, build_manifest
from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.verification.calibration import Calibration
from s3prl_speaker_upstreams.verification.embedding import Embed, embed_files, embed_with
from s3prl_speaker_upstreams.verification.metrics import act_dcf, cllr, evaluate_scores, min_cllr
from s3prl_speaker_upstreams.verification.parallel import Ranks
from s3prl_speaker_upstreams.verification.scoring import score_trials
from s3prl_speaker_upstreams.verification.trials import Trials, read_scores, read_trials, speaker_units

__all__ = ["Outcome", "choose_cohort", "find_recordings", "judge", "verification", "verify"]

log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What a trial list gave.

    Attributes
    ----------
    trials : Trials
        Those that were scored.
    scores : mapping of scoring ("cosine", "mean", "asnorm") -> (trials,)
    numbers : dict
        See :func:`verification`.
    notes : list of str
        What a reader of the numbers must know: trials left out, labels that look inverted.
    """

    trials: Trials
    scores: dict[str, np.ndarray]
    numbers: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def verification(
    encoder: Any, trials: Trials | str | os.PathLike[str], root: str | os.PathLike[str], **options: Any
) -> dict[str, Any]:
    """The numbers of :func:`verify`, which takes the same arguments.

    Returns
    -------
    dict
        ``eer``, ``min_dcf_0.01``, ``min_dcf_0.05``, ``trials``, ``targets``; with a cohort the rates also as
        ``mean_...`` and ``asnorm_...``; with ``bootstrap_samples`` also ``eer_low``, ``eer_high``; with ``calibrate``
        also ``cllr``, ``min_cllr``, ``act_dcf_0.01`` and ``act_dcf_0.05``, all of them for each scoring.
    """
    return verify(encoder, trials, root, **options).numbers


def verify(
    encoder: Any,
    trials: Trials | str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    cohort: Manifest | str | os.PathLike[str] | None = None,
    cohort_utterances: int = 3000,
    cohort_layout: str = "auto",
    top_n: int = 300,
    sample_rate: int = 16000,
    max_seconds: float | None = None,
    batch: int = 16,
    device: Any = "cpu",
    ranks: Ranks | None = None,
    skip_unusable: bool = False,
    bootstrap_samples: int = 0,
    calibrate: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Outcome:
    """Embed the recordings of a trial list, score its trials, and measure.

    Parameters
    ----------
    encoder : callable (see :data:`.embedding.Embed`), or a SpeakerEncoder
        A SpeakerEncoder is moved to ``device`` and fed ``batch`` recordings at a time.
    trials : Trials, or path of a trial list
    root : folder, or list of recordings
        Where the recordings named in the list are, see :func:`find_recordings`.
    cohort : Manifest, folder or list, optional
        Speech of other speakers. Its mean is subtracted for ``mean_...``, its members also normalise the scores for
        ``asnorm_...``; where it is labelled, a member is the mean over a speaker.
    cohort_utterances : int
        At most so many of it, see :func:`choose_cohort`.
    cohort_layout : str
        Where the speakers of a folder or list are, one of ``data.lists.LAYOUTS``.
    top_n : int
        Nearest members of the cohort that AS-norm uses, of either side.
    sample_rate, max_seconds : as of :func:`.embedding.embed_files`
    ranks : Ranks, optional
        Processes that share the work, for instance ``Ranks.current()``; every one gets the whole outcome.
    skip_unusable : bool
        Leave out trials of recordings that are missing or unusable, and say so, instead of raising.
    bootstrap_samples : int
        Draws for the 95 % interval of the EER, by speaker where speakers can be told; 0: no interval.
    calibrate : path, optional
        Score file of other trials (written by :func:`.trials.write_scores`) that a calibration is fitted on.
    seed : int
        Of the choice of the cohort.

    Raises ConfigError or BadAudio if a recording of the list is missing or unusable.
    """
    trials = trials if isinstance(trials, Trials) else read_trials(trials)
    notes: list[str] = []
    ranks = ranks or Ranks()
    embed: Embed = encoder if not hasattr(encoder, "ecapa") else embed_with(encoder, batch, device)
    progress = progress and ranks.rank == 0
    missing: dict[str, str] = {}
    paths = find_recordings(trials, root, missing if skip_unusable else None)
    names = [name for name in trials.names if name not in missing]
    options: dict[str, Any] = {"sample_rate": sample_rate, "max_seconds": max_seconds, "ranks": ranks}
    unusable: dict[str, str] | None = {} if skip_unusable else None
    rows = embed_files(embed, paths, progress="embedding trials" if progress else "", skip=unusable, **options)
    embeddings = {name: row for name, row in zip(names, rows, strict=True) if np.isfinite(row).all()}
    if len(embeddings) < len(trials.names):
        whole = len(trials)
        trials = _only(trials, embeddings)
        reasons = [*missing.values(), *(unusable or {}).values()]
        notes.append(
            f"{len(reasons)} recordings are missing or unusable and {whole - len(trials)} of {whole} trials left out: "
            f"not comparable with other results. {'; '.join(reasons[:5])}"
        )
    scores = {"cosine": score_trials(trials, embeddings)}
    if cohort is not None:
        if not isinstance(cohort, Manifest):
            cohort = build_manifest(cohort, layout=cohort_layout, min_seconds=0.25, progress=progress)
        members, mean = _cohort(embed, cohort, cohort_utterances, seed, progress, options, notes)
        scores["mean"] = score_trials(trials, embeddings, mean=mean)
        scores["asnorm"] = score_trials(trials, embeddings, mean=mean, cohort=members, top_n=top_n)
    numbers = judge(trials, scores, notes, bootstrap_samples=bootstrap_samples, calibrate=calibrate)
    if ranks.rank == 0:
        for note in notes:
            log.warning("%s", note)
    return Outcome(trials, scores, numbers, notes)


def judge(
    trials: Trials,
    scores: Mapping[str, np.ndarray],
    notes: list[str],
    *,
    bootstrap_samples: int = 0,
    calibrate: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """The numbers of :func:`verification` from scores that are there; what must be said goes to ``notes``.

    >>> notes = []
    >>> judge(Trials(np.array([1, 0]), ("a", "a"), ("b", "c")), {"cosine": np.array([0.1, 0.9])}, notes)["eer"]
    1.0
    >>> notes[0][:40]
    'the EER is 100.0 %: worse than guessing,'
    """
    numbers: dict[str, Any] = {}
    units, what = speaker_units(trials) if bootstrap_samples else (None, "")
    other = read_scores(calibrate) if calibrate is not None else None
    for scoring, values in scores.items():
        prefix = "" if scoring == "cosine" else f"{scoring}_"
        measured: dict[str, Any] = evaluate_scores(
            values, trials.labels, bootstrap_samples=bootstrap_samples, units=units
        )
        if other is not None:
            if scoring not in other[1]:
                raise ConfigError(f"{calibrate}: has no scores {scoring!r}; it has {', '.join(other[1])}")
            ratios = Calibration.fit(other[1][scoring], other[0].labels)(values)
            measured["cllr"], measured["min_cllr"] = cllr(ratios, trials.labels), min_cllr(values, trials.labels)
            measured |= {f"act_dcf_{p}": act_dcf(ratios, trials.labels, p) for p in (0.01, 0.05)}
        counts = ("trials", "targets")
        numbers |= {k if k in counts else prefix + k: v for k, v in measured.items() if not (prefix and k in counts)}
    if bootstrap_samples:
        numbers["interval_by"] = what
        if what == "recordings":
            notes.append("speakers could not be told: the interval is by recordings, and too narrow")
    if numbers["eer"] > 0.5:
        notes.append(
            f"the EER is {100 * numbers['eer']:.1f} %: worse than guessing, so that the labels of the trial list are "
            "perhaps inverted; 1 or 'target' must mean the same speaker"
        )
    return numbers


def find_recordings(
    trials: Trials | str | os.PathLike[str], root: str | os.PathLike[str], missing: dict[str, str] | None = None
) -> list[str]:
    """Paths of a trial list's recordings, in the order of ``trials.names``.

    Parameters
    ----------
    root : folder, or list
        In a folder, the names are paths; an ending may be missing or another (``.flac`` for ``.wav``). A list (Kaldi's
        ``wav.scp``, WeSpeaker's ``raw.list``, a csv: see :mod:`s3prl_speaker_upstreams.data.lists`) says where the
        recording of a name is.
    missing : dict, optional
        Names that are not found are noted here, with the reason, and left out; without it they raise ConfigError.
    """
    trials = trials if isinstance(trials, Trials) else read_trials(trials)
    listed = {} if os.path.isdir(root) else {entry.id: entry.path for entry in read_listing(root, "none")}
    found, lost = [], {}
    for name in trials.names:
        path = listed.get(name) if listed else _found(Path(root), name)
        if path is None:
            lost[name] = f"{name}: not in {root}" if listed else f"{Path(root) / name}: no such recording"
        else:
            found.append(path)
    if lost and missing is None:
        raise ConfigError(
            f"{next(iter(lost.values()))} ({len(lost)} of {len(trials.names)} are not found); give the folder that the "
            "names of the trial list begin in, or a list of 'name path' lines"
        )
    (missing if missing is not None else {}).update(lost)
    return found


def _found(root: Path, name: str) -> str | None:
    # A converted corpus keeps the names of the list up to the ending.
    candidates = [root / name, *(root / f"{name}{suffix}" for suffix in AUDIO_SUFFIXES)]
    if name.lower().endswith(AUDIO_SUFFIXES):
        candidates += [(root / name).with_suffix(suffix) for suffix in AUDIO_SUFFIXES]
    return next((os.fspath(path) for path in candidates if path.is_file()), None)


def _only(trials: Trials, embeddings: Mapping[str, np.ndarray]) -> Trials:
    keep = [a in embeddings and b in embeddings for a, b in zip(trials.enrol, trials.test, strict=True)]
    index = np.flatnonzero(keep)
    if not len(index):
        raise ConfigError("no trial is left: none has both of its recordings")
    return Trials(trials.labels[index], tuple(trials.enrol[i] for i in index), tuple(trials.test[i] for i in index))


# ---------------------------------------------------------------------------------------------- cohort
def choose_cohort(cohort: Manifest, utterances: int, seed: int = 0) -> np.ndarray:
    """Numbers of at most ``utterances`` recordings that ``seed`` draws, spread evenly over the speakers; sorted.

    >>> manifest = Manifest(list("abcd"), [1] * 4, [1] * 4, ["ann", "ann", "ann", "bob"])
    >>> [manifest[i].speaker for i in choose_cohort(manifest, 2)]
    ['ann', 'bob']
    """
    order = random_for(seed, 0, "", "cohort").permutation(len(cohort))
    if cohort.labelled:
        # One of each speaker, then a second one, ...: in the order drawn, by how many of the speaker came before.
        seen: dict[int, int] = {}
        turn = np.empty(len(order), dtype=np.int64)
        for place, label in enumerate(cohort.labels[order].tolist()):
            turn[place] = seen[label] = seen.get(label, -1) + 1
        order = order[np.argsort(turn, kind="stable")]
    return np.sort(order[:utterances])


def _cohort(
    embed: Embed,
    cohort: Manifest,
    utterances: int,
    seed: int,
    progress: bool,
    options: dict[str, Any],
    notes: list[str],
) -> tuple[np.ndarray, np.ndarray]:
    """Members (M, D), means over speakers where these are known, and the mean (D,) over recordings."""
    chosen = choose_cohort(cohort, utterances, seed)
    unusable: dict[str, str] = {}
    rows = embed_files(
        embed, [cohort[int(index)].path for index in chosen],
        progress="embedding cohort" if progress else "", skip=unusable, **options,
    )  # fmt: skip
    whole = np.isfinite(rows).all(1)
    rows, labels = rows[whole], cohort.labels[chosen[whole]]
    if unusable:
        notes.append(f"{len(unusable)} recordings of the cohort are unusable: {next(iter(unusable.values()))}")
    if not cohort.labelled:
        log.info("the cohort states no speakers: its members are %d recordings", len(rows))
        return rows, rows.mean(0)
    members = np.stack([rows[labels == label].mean(0) for label in np.unique(labels)])
    log.info("cohort: means of %d speakers over %d recordings", len(members), len(rows))
    return members, rows.mean(0)
