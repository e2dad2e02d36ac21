"""Look at a corpus before hours are spent on it: layout, splits, counts, sample rates, damaged files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from s3prl_speaker_upstreams.common.audio import SAMPLE_RATE, probe, read_audio
from s3prl_speaker_upstreams.errors import BadAudio
from s3prl_speaker_upstreams.superb.errors import CorpusError
from s3prl_speaker_upstreams.superb.layouts import Layout
from s3prl_speaker_upstreams.superb.task import Task

__all__ = ["CorpusReport", "audio_problem", "check_corpus", "layout_of", "need_root", "remarks"]

logger = logging.getLogger(__name__)

_SHOWN = 5  # problems named in an error; the rest is counted
_LAST = 16  # samples at the end of a compressed file that must decode


@dataclass(frozen=True)
class CorpusReport:
    """What was found: utterances of each split, seconds of audio, and how the counts compare to the full corpus."""

    task: str
    root: Path
    counts: dict[str, int]
    seconds: float
    remarks: tuple[str, ...] = ()


def audio_problem(path: Path, rate: int | None = SAMPLE_RATE) -> tuple[str, float]:
    """(what is wrong with one recording or "", its seconds).

    Finds missing, unreadable, empty and truncated files and, unless `rate` is None, other sample rates (Hz).

    Examples
    --------
    >>> audio_problem(Path("/nowhere.wav"))[0]
    'is not there'
    """
    if not path.is_file():
        return "is not there", 0.0
    try:
        info = probe(path)
        if path.suffix.lower() != ".wav":  # compressed: a header says nothing about the end
            read_audio(path, max(0, info.frames - _LAST), min(_LAST, info.frames), sample_rate=None)
    except BadAudio as error:
        return str(error).removeprefix(f"{path}: "), 0.0
    if rate is not None and info.sample_rate != rate:
        return f"has a sample rate of {info.sample_rate} Hz, expected {rate} Hz", info.seconds
    return "", info.seconds


def layout_of(task: Task, root: Path) -> Layout:
    """What `task` reads below `root`.

    Raises CorpusError that says what is missing and what to download.
    """
    need_root(task, root)
    try:
        return task.layout(root)
    except CorpusError as error:
        raise CorpusError(f"{error}. {task.name} needs {task.corpus}") from error


def need_root(task: Task, root: Path) -> None:
    """Raise CorpusError if there is no folder `root`, or it may not be read."""
    if not root.is_dir():
        raise CorpusError(f"{root}: no such folder. {task.name} needs {task.corpus}")
    if not os.access(root, os.R_OK | os.X_OK):
        raise CorpusError(f"{root}: may not be read; change its permissions")


def remarks(task: Task, counts: Mapping[str, int]) -> list[str]:
    """How the utterances of each split differ from the full corpus, where its number is published."""
    return [
        f"{split}: {counts[split]} utterances, the full corpus has {full}"
        for split, full in task.counts.items()
        if split in counts and counts[split] != full
    ]


def check_corpus(task: Task, root: str | os.PathLike[str], *, jobs: int = 8) -> CorpusReport:
    """Check the corpus of one task.

    Parameters
    ----------
    task : of :data:`.tasks.TASKS`
    root : its folder
    jobs : threads that look at recordings (headers and ends, not the whole of each file)

    Returns
    -------
    CorpusReport

    Raises
    ------
    CorpusError that names what is missing or damaged and what to download; at most five files are named.

    Examples
    --------
    >>> import tempfile
    >>> from s3prl_speaker_upstreams.demo.corpora import generate
    >>> from s3prl_speaker_upstreams.superb.tasks import TASKS
    >>> check_corpus(TASKS["SD"], generate("SD", tempfile.mkdtemp(), scale=2)).counts
    {'train': 4, 'dev': 2, 'test': 2}
    """
    root = Path(root).absolute()
    found = layout_of(task, root)
    rate = None if task.any_rate else SAMPLE_RATE
    files = found.recordings
    with ThreadPoolExecutor(jobs) as pool:
        looked = pool.map(lambda path: audio_problem(path, rate), files)
        results = list(tqdm(looked, total=len(files), desc=f"checking {task.name}", disable=len(files) < 2000))
    bad = [f"{path} {problem}" for path, (problem, _) in zip(files, results, strict=True) if problem]
    if bad:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise CorpusError(
            f"{len(bad)} of {len(files)} recordings of {task.name} cannot be used: {'; '.join(bad[:_SHOWN])}{more}. "
            "Extract those again, or convert them to 16 kHz: sox in.wav -r 16000 out.wav"
        )
    counts = {split: len(paths) for split, paths in found.splits.items()}
    notes = tuple(remarks(task, counts))
    report = CorpusReport(task.name, root, counts, sum(seconds for _, seconds in results), notes)
    logger.info(
        "%s: %s at %s, %.2f hours%s",
        task.name,
        json.dumps(report.counts),
        root,
        report.seconds / 3600,
        "".join(f"\n  note: {note}" for note in notes),
    )
    return report
