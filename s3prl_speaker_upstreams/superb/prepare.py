"""Files that a task's s3prl code reads beside the corpus: lists, vocabularies, lexica, Kaldi tables.

The PyPI package of s3prl lacks them, and some hold a machine's paths; they are written into a folder of their own,
never into the corpus or the package. Where the user gives a checkout of s3prl (``--s3prl-root``), the lists that it
ships are taken from there, so that splits are the benchmark's to the line. What is written for one task stands in its
module of :mod:`.tasks`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

from s3prl_speaker_upstreams.common.audio import AUDIO_SUFFIXES
from s3prl_speaker_upstreams.common.files import locked, write_json
from s3prl_speaker_upstreams.superb.layouts import Layout
from s3prl_speaker_upstreams.superb.task import Task

__all__ = ["irregular", "prepare"]

logger = logging.getLogger(__name__)


def prepare(
    task: Task,
    data: str | Path,
    out: str | Path,
    s3prl_root: str | Path | None = None,
    *,
    corpus: str = "",
    force: bool = False,
) -> Path:
    """Write what `task` reads beside its corpus; whole or, after an error, not at all.

    Several processes may ask for the same folder: one writes, the others wait and take what it wrote.

    Parameters
    ----------
    task : of :data:`.tasks.TASKS`
    data : root of a corpus that :func:`.checks.check_corpus` accepted
    out : folder for the files
    s3prl_root : a checkout of s3prl, whose shipped lists are preferred; None for the PyPI package
    corpus : digest of the corpus; files prepared for another one are written anew
    force : write anew whatever is there

    Raises
    ------
    CorpusError if a list or a lexicon is absent, or does not fit the corpus.
    """
    data, out = Path(data).absolute(), Path(out).absolute()
    with locked(out.parent / f".{out.name}.lock", str(out), timeout=-1):
        whole = out / ".whole"
        if whole.is_file() and corpus and not force and _recorded(whole) == corpus:
            logger.info("prepare: done already (%s); --force repeats it", out)
            return out
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        try:
            beside.chmod(0o755)
            task.prepare(data, beside, None if s3prl_root is None else Path(s3prl_root).absolute())
            if task.walks:
                _link(task.layout(data), data, beside / "corpus")
            write_json(beside / ".whole", {"corpus": corpus})
            if out.exists():
                shutil.rmtree(out)
            beside.rename(out)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        logger.info("prepare: wrote %s", out)
    return out


def _recorded(whole: Path) -> str | None:
    text = whole.read_text()
    return json.loads(text)["corpus"] if text else None  # empty: written by an earlier version


def irregular(layout: Layout, root: Path) -> str:
    """What s3prl's own walk through a corpus would stumble over, in words; "" if nothing.

    It does not follow links to folders (their recordings would be left out without a word), and it opens hidden files
    such as macOS's ``._a.wav``, which are no recordings.
    """
    lowest = {Path(name) for name in {os.path.dirname(path) for path in layout.recordings}}
    folders = {above for folder in lowest for above in (folder, *folder.parents) if above.is_relative_to(root)}
    for folder in sorted(folders - {root}):
        if folder.is_symlink():
            return f"{folder} is a link"
    for folder in sorted(folders):
        with os.scandir(folder) as found:
            hidden = [entry.name for entry in found if entry.name.startswith(".")]
        if any(name.lower().endswith(AUDIO_SUFFIXES) for name in hidden):
            return f"{folder} holds hidden files, such as {sorted(hidden)[0]}"
    return ""


def _link(layout: Layout, root: Path, out: Path) -> None:
    """A tree of plain folders with links to what counts, where the corpus' own would be misread."""
    why = irregular(layout, root)
    if not why:
        return
    logger.info("prepare: %s; s3prl is given a tree of links to the recordings instead (%s)", why, out.name)
    for path in [*layout.recordings, *layout.tables]:
        place = out / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
