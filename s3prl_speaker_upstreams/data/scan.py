"""What the recordings of a source are: lengths and rates from their headers, in parallel, remembered between runs."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from s3prl_speaker_upstreams.common.audio import probe
from s3prl_speaker_upstreams.common.files import write_text
from s3prl_speaker_upstreams.errors import BadAudio

__all__ = ["Fact", "scan"]

log = logging.getLogger(__name__)

_CACHE_VERSION = 2  # 1 knew nothing of cut-off files


@dataclass(slots=True)
class Fact:
    """What a scan learned about one file; -1 and NaN mean 'not looked at'. ``error`` : why it is unusable, or ""."""

    size: int
    mtime_ns: int
    samples: int = -1
    sample_rate: int = -1
    peak_db: float = float("nan")
    error: str = ""

    def row(self) -> tuple[int, int, int, int, float, str]:
        return self.size, self.mtime_ns, self.samples, self.sample_rate, self.peak_db, self.error


def scan(
    paths: list[str],
    key: str,
    *,
    decode: bool = False,
    workers: int = 8,
    cache: str | os.PathLike[str] | bool | None = None,
    progress: bool = True,
) -> list[Fact]:
    """Facts of every file, in order; only what is new or changed is opened.

    Parameters
    ----------
    paths : files
    key : what the cache is of: the source's path
    decode : also find the peak of every file, for which all of it is read
    workers, cache, progress : as of :func:`.manifest.build_manifest`

    >>> import tempfile
    >>> from s3prl_speaker_upstreams.common.audio import write_audio
    >>> path = str(write_audio(Path(tempfile.mkdtemp()) / "a.wav", np.full(8000, 0.5)))
    >>> fact, = scan([path], "", decode=True, cache=False, progress=False)
    >>> fact.samples, round(fact.peak_db, 1), fact.error
    (8000, -6.0, '')
    """
    facts = _cached_facts(key, cache)
    before = set(facts)
    todo = []
    for path in paths:
        try:
            state = os.stat(path)
        except OSError as problem:
            facts[path] = Fact(-1, -1, error=_reason(problem, path))
            continue
        known = facts.get(path)
        if known is None or (known.size, known.mtime_ns) != (state.st_size, state.st_mtime_ns):
            known = facts[path] = Fact(state.st_size, state.st_mtime_ns)
        if not known.error and (known.samples < 0 or (decode and np.isnan(known.peak_db))):
            todo.append(path)
    _for_all(lambda path: _look(path, facts[path], decode), todo, workers, progress, decode)
    if cache is not False and (todo or before != set(paths)):
        _write_cache(key, cache, {path: facts[path] for path in paths})
    return [facts[path] for path in paths]


def _look(path: str, fact: Fact, decode: bool) -> None:
    try:
        header = probe(path)
        fact.samples, fact.sample_rate = header.frames, header.sample_rate
        if fact.samples > 1 << 40:  # streams of unknown length carry a nonsense count
            fact.error = f"header claims {fact.samples} samples"
        elif decode:
            _decode(path, fact)
    except (BadAudio, OSError, RuntimeError, ValueError) as problem:  # soundfile's own errors are RuntimeErrors
        fact.error = _reason(problem, path)


def _decode(path: str, fact: Fact) -> None:
    """Peak of the mean of the channels, and the true length."""
    import soundfile

    peak, samples = 0.0, 0
    with soundfile.SoundFile(path) as file:
        for block in file.blocks(1 << 18, dtype="float32", always_2d=True):
            samples += len(block)
            peak = max(peak, float(np.abs(block.mean(axis=1)).max(initial=0.0)))
    if samples < fact.samples and file.format != "MP3":  # an mp3's header may be an estimate
        fact.error = f"got {samples} samples, expected {fact.samples}; the file was cut off, copy it again"
    fact.samples = samples
    fact.peak_db = 20 * float(np.log10(max(peak, 1e-10)))


def _reason(problem: BaseException, path: str = "") -> str:
    text = str(problem) if isinstance(problem, BadAudio) else getattr(problem, "strerror", None) or str(problem)
    return " ".join(str(text or type(problem).__name__).removeprefix(f"{path}: ").split())[:160]


def _for_all(work: Callable[[str], None], items: list[str], workers: int, progress: bool, decode: bool) -> None:
    """Run ``work`` on all items in threads (libsndfile lets go of the interpreter while it reads)."""
    from tqdm import tqdm

    chunks = [items[start : start + 64] for start in range(0, len(items), 64)]  # a future per file costs a kilobyte

    def chunk_of(paths: list[str]) -> int:
        for path in paths:
            work(path)
        return len(paths)

    with (
        ThreadPoolExecutor(max(1, workers)) as pool,
        tqdm(
            total=len(items),
            desc="decoding" if decode else "reading headers",
            unit="file",
            disable=not progress or not items,
            delay=2,
        ) as bar,
    ):
        for done in pool.map(chunk_of, chunks):
            bar.update(done)


# ---------------------------------------------------------------------------------------------- cache
def _cache_path(key: str, cache: str | os.PathLike[str] | bool | None) -> Path:
    if cache is not None and not isinstance(cache, bool):
        return Path(cache)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "s3prl_speaker_upstreams" / "manifests" / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:24]}.csv"


def _cached_facts(key: str, cache: str | os.PathLike[str] | bool | None) -> dict[str, Fact]:
    if cache is False:
        return {}
    path = _cache_path(key, cache)
    facts: dict[str, Fact] = {}
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            head = json.loads(file.readline())
            if head.get("version") != _CACHE_VERSION:
                return {}
            for name, size, mtime, samples, rate, peak, error in csv.reader(file):
                facts[name] = Fact(int(size), int(mtime), int(samples), int(rate), float(peak), error)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as problem:
        log.warning("%s: manifest cache is not readable (%s); the files are scanned again", path, _reason(problem))
        return {}
    return facts


def _write_cache(key: str, cache: str | os.PathLike[str] | bool | None, facts: dict[str, Fact]) -> None:
    rows = io.StringIO()
    rows.write(json.dumps({"version": _CACHE_VERSION, "columns": ["path", *Fact.__slots__]}) + "\n")
    writer = csv.writer(rows, lineterminator="\n")
    for path, fact in facts.items():
        # What failed is not remembered: a disk that was away, or a copy under way, must not stay 'unreadable'.
        if not fact.error:
            writer.writerow([path, *fact.row()])
    try:
        write_text(_cache_path(key, cache), rows.getvalue())
    except OSError as problem:  # a read-only or full home must not stop a training
        log.warning("the manifest could not be cached: %s", _reason(problem))
