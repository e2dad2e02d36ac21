"""What speech there is: a table of utterances with durations and, where the layout tells, speakers.

Durations come from file headers, read in parallel; nothing is decoded unless silence is asked for. What was learned
about every file is cached together with its size and time of modification, so the next scan of a million files only
opens those that changed. Thresholds (shortest duration, silence) are applied afterwards and cost no new scan.

A file that cannot be used is counted and reported, never fatal:

>>> import numpy, soundfile, tempfile
>>> from pathlib import Path
>>> folder = Path(tempfile.mkdtemp())
>>> for speaker in ("anna", "ben"):
...     (folder / speaker).mkdir()
...     soundfile.write(folder / speaker / "1.wav", numpy.random.default_rng(0).normal(0, 0.1, 32000), 16000)
>>> _ = (folder / "ben" / "2.wav").write_bytes(b"no audio")
>>> manifest = build_manifest(folder, cache=False, progress=False)
>>> len(manifest), manifest.speakers, manifest.seconds
(2, ['anna', 'ben'], 4.0)
>>> manifest.report.unreadable
1
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from s3prl_speaker_upstreams.common.files import write_text
from s3prl_speaker_upstreams.errors import ConfigError

__all__ = ["AUDIO_SUFFIXES", "LAYOUTS", "Manifest", "NoSpeech", "ScanReport", "Utterance", "build_manifest"]

log = logging.getLogger(__name__)

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg")
LIST_SUFFIXES = (".txt", ".lst", ".scp", ".csv", ".tsv")
LAYOUTS = ("auto", "voxceleb", "speaker", "none")
# VoxCeleb1 and 2: [anything/]id00012/<video>/00001.wav
_VOXCELEB = re.compile(r"(?:^|/)(id\d{5})/[^/]+/[^/]+$")
_CACHE_VERSION = 1
_EXAMPLES = 5


class NoSpeech(ConfigError):
    """A folder or list holds not one usable utterance; the message tells what was found instead."""


@dataclass(frozen=True)
class Utterance:
    """One recording.

    Attributes
    ----------
    id : str
        Name of the utterance, unique in its manifest: the path below the root, with ``/`` on every system.
    path : str
        Where the file is.
    samples : int
        Length in samples at the file's own rate.
    sample_rate : int
        The file's own rate in Hz.
    speaker : str or None
        Speaker label, where the layout or the list tells one.

    >>> Utterance("a/1.wav", "/data/a/1.wav", 24000, 16000, "a").seconds
    1.5
    """

    id: str
    path: str
    samples: int
    sample_rate: int
    speaker: str | None = None

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.samples / self.sample_rate


@dataclass
class ScanReport:
    """How many files were found, kept and left out, with the first few of each kind left out.

    >>> print(ScanReport(found=3, kept=2, unreadable=1, layout="speaker", speakers=2))
    3 files found, 2 kept (layout 'speaker', 2 speakers); left out: 0 too short, 0 silent, 1 unreadable
    """

    found: int = 0
    kept: int = 0
    too_short: int = 0
    silent: int = 0
    unreadable: int = 0
    layout: str = "none"
    speakers: int = 0
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def count(self, kind: str, path: str, why: str) -> None:
        """Count one file left out as ``kind`` (``too_short``, ``silent`` or ``unreadable``)."""
        setattr(self, kind, getattr(self, kind) + 1)
        shown = self.examples.setdefault(kind, [])
        if len(shown) < _EXAMPLES:
            shown.append((path, why))

    def __str__(self) -> str:
        line = (
            f"{self.found} files found, {self.kept} kept (layout {self.layout!r}, {self.speakers} speakers); left out: "
            f"{self.too_short} too short, {self.silent} silent, {self.unreadable} unreadable"
        )
        for kind, shown in self.examples.items():
            line += f"\n  {kind}: " + "; ".join(f"{path} ({why})" for path, why in shown)
            if getattr(self, kind) > len(shown):
                line += f"; and {getattr(self, kind) - len(shown)} more"
        return line


class Manifest(Sequence):
    """Table of utterances, a few dozen bytes each, so that VoxCeleb2's million fits any worker process.

    Columns are flat arrays rather than objects because worker processes share them without copying.

    Parameters
    ----------
    ids : sequence of str
        Unique names; with ``root`` they are paths below it.
    samples, sample_rates : sequence of int
        Lengths in samples and rates in Hz, of the files themselves.
    speakers : sequence of str or None, optional
        Speaker of every utterance; None entries are unlabelled.
    paths : sequence of str, optional
        Files, where they are not ``root/id``.
    root : str
        Folder that ids are relative to.

    >>> manifest = Manifest(["a/1.wav", "b/1.wav"], [16000, 32000], [16000, 16000], ["a", "b"], root="/data")
    >>> manifest[1].path, manifest[1].seconds, manifest.labels.tolist()
    ('/data/b/1.wav', 2.0, [0, 1])
    """

    def __init__(
        self,
        ids: Sequence[str],
        samples: Sequence[int] | np.ndarray,
        sample_rates: Sequence[int] | np.ndarray,
        speakers: Sequence[str | None] | None = None,
        *,
        paths: Sequence[str] | None = None,
        root: str = "",
        report: ScanReport | None = None,
    ):
        if not len(ids) == len(samples) == len(sample_rates):
            raise ConfigError(f"got {len(ids)} ids, {len(samples)} lengths, {len(sample_rates)} rates: they must match")
        if len(set(ids)) != len(ids):
            double = next(name for name in ids if list(ids).count(name) > 1)
            raise ConfigError(f"utterance {double!r} is listed twice; every utterance needs a name of its own")
        self.root = str(root)
        self._ids = _Strings(ids)
        self._paths = None if paths is None else _Strings(paths)
        self.samples = np.asarray(samples, dtype=np.int64)
        self.sample_rates = np.asarray(sample_rates, dtype=np.int32)
        given = [None] * len(ids) if speakers is None else list(speakers)
        self.speakers: list[str] = sorted({name for name in given if name is not None})
        number = {name: index for index, name in enumerate(self.speakers)}
        self.labels = np.array([-1 if name is None else number[name] for name in given], dtype=np.int64)
        self.report = report or ScanReport(found=len(ids), kept=len(ids), speakers=len(self.speakers))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Utterance:
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"utterance {index} of {len(self)}")
        index %= len(self)
        name = self._ids[index]
        path = os.path.join(self.root, name) if self._paths is None else self._paths[index]
        label = int(self.labels[index])
        speaker = None if label < 0 else self.speakers[label]
        return Utterance(name, path, int(self.samples[index]), int(self.sample_rates[index]), speaker)

    def __iter__(self) -> Iterator[Utterance]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        hours, speakers = self.seconds / 3600, len(self.speakers)
        return f"Manifest({len(self)} utterances, {hours:.2f} h, {speakers} speakers, {self.root!r})"

    @property
    def seconds(self) -> float:
        """Total duration in seconds."""
        return float((self.samples / self.sample_rates).sum())

    @property
    def durations(self) -> np.ndarray:
        """Duration of every utterance in seconds, (N,) float64."""
        return self.samples / self.sample_rates

    @property
    def labelled(self) -> bool:
        """Whether every utterance has a speaker."""
        return bool(len(self)) and bool((self.labels >= 0).all())

    @property
    def fingerprint(self) -> str:
        """Digest of names, lengths and labels (not of where the folder is): two equal ones give equal training data."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(self._ids.raw(index) + b"\0")
        digest.update(self.samples.tobytes() + self.sample_rates.tobytes() + self.labels.tobytes())
        digest.update("\0".join(self.speakers).encode())
        return digest.hexdigest()

    def subset(self, indices: Iterable[int] | np.ndarray) -> Manifest:
        """Manifest of the utterances ``indices``, in that order; speaker numbers are counted anew.

        >>> Manifest(["a", "b", "c"], [1, 2, 3], [1, 1, 1]).subset([2, 0]).samples.tolist()
        [3, 1]
        """
        indices = np.asarray(list(indices), dtype=np.int64)
        names = [None if self.labels[i] < 0 else self.speakers[self.labels[i]] for i in indices]
        paths = None if self._paths is None else [self._paths[i] for i in indices]
        ids = [self._ids[i] for i in indices]
        return Manifest(ids, self.samples[indices], self.sample_rates[indices], names, paths=paths, root=self.root)

    def split_speakers(self, held_out: int, seed: int = 0) -> tuple[Manifest, Manifest]:
        """Split off ``held_out`` speakers drawn by ``seed``: (the other speakers, the held-out ones), disjoint.

        Raises ConfigError if there are not more speakers than that.
        """
        if not 0 < held_out < len(self.speakers):
            raise ConfigError(
                f"cannot hold out {held_out} of {len(self.speakers)} speakers; give a number from 1 to "
                f"{max(len(self.speakers) - 1, 0)}"
            )
        out = np.random.default_rng(seed).permutation(len(self.speakers))[:held_out]
        chosen = np.isin(self.labels, out)
        return self.subset(np.flatnonzero(~chosen)), self.subset(np.flatnonzero(chosen))

    def write(self, path: str | os.PathLike) -> Path:
        """Write as csv (id, path, samples, sample_rate, speaker); the file appears whole or not at all."""
        rows = io.StringIO()
        writer = csv.writer(rows, lineterminator="\n")
        writer.writerow(["id", "path", "samples", "sample_rate", "speaker"])
        for item in self:
            writer.writerow([item.id, item.path, item.samples, item.sample_rate, item.speaker or ""])
        return write_text(path, rows.getvalue())

    @classmethod
    def read(cls, path: str | os.PathLike) -> Manifest:
        """Read what :meth:`write` wrote. Raises ConfigError if the file is something else."""
        with open(path, newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            expected = ["id", "path", "samples", "sample_rate", "speaker"]
            if rows.fieldnames != expected:
                raise ConfigError(
                    f"{path}: got columns {rows.fieldnames}, expected {expected}; for a plain list use build_manifest"
                )
            table = list(rows)
        return cls(
            [row["id"] for row in table],
            [int(row["samples"]) for row in table],
            [int(row["sample_rate"]) for row in table],
            [row["speaker"] or None for row in table],
            paths=[row["path"] for row in table],
        )


class _Strings:
    """Many strings as one array of bytes and one of offsets: no Python object per string."""

    def __init__(self, strings: Iterable[str]):
        encoded = [os.fsencode(text) for text in strings]
        self._offsets = np.concatenate([[0], np.cumsum([len(text) for text in encoded])]).astype(np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def raw(self, index: int) -> bytes:
        return self._bytes[self._offsets[index] : self._offsets[index + 1]].tobytes()

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.raw(index))


@dataclass(slots=True)
class _Fact:
    """What a scan learned about one file; -1 and NaN mean 'not looked at'."""

    size: int
    mtime_ns: int
    samples: int = -1
    sample_rate: int = -1
    peak_db: float = float("nan")
    error: str = ""

    def row(self) -> tuple:
        return self.size, self.mtime_ns, self.samples, self.sample_rate, self.peak_db, self.error


def build_manifest(
    source: str | os.PathLike | Iterable[str | os.PathLike],
    *,
    layout: str = "auto",
    min_seconds: float = 1.0,
    silence_db: float | None = None,
    workers: int = 8,
    cache: str | os.PathLike | bool | None = None,
    progress: bool = True,
) -> Manifest:
    """Find all wav / flac / ogg files of a folder or list and read their durations.

    Parameters
    ----------
    source : folder, list file, or iterable of paths
        A folder is searched to any depth, following links to folders. A list file has one recording per line: a path,
        with its speaker before or behind it where known (``id00012 id00012/x/1.wav`` as in VoxCeleb's lists), separated
        by a tab or blanks, or by a comma in ``.csv``; paths are relative to the list. In ``.scp`` the other column is
        the utterance's name, not its speaker. A csv written by :meth:`Manifest.write` is taken as it is.
    layout : {"auto", "voxceleb", "speaker", "none"}
        Where the speaker is: ``voxceleb``: the ``id00012`` part; ``speaker``: the first folder below ``source``;
        ``none``: not known. ``auto`` takes ``voxceleb`` if all paths look so, else ``speaker`` if all files are at
        least one folder deep, else ``none``. Speakers given in a list file win.
    min_seconds : float
        Shorter recordings are left out.
    silence_db : float, optional
        Also decode every file once and leave out those whose peak is below this many dB of full scale (-60 is
        sensible). By default nothing is decoded here and silence is found while training.
    workers : int
        Threads that read headers.
    cache : path, bool or None
        File that remembers what was learned, keyed by each file's size and time of modification. None: one in the
        user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``); False: no cache.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Manifest
        Sorted by path, so the same files give the same numbers everywhere; ``.report`` says what was left out.

    Raises
    ------
    FileNotFoundError
        If ``source`` does not exist.
    NoSpeech
        If nothing usable was found.
    ConfigError
        If ``layout`` is unknown, or is named and does not fit.

    >>> build_manifest("/does/not/exist")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no folder or list of speech at /does/not/exist
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"got layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    root, files, named, speakers, key = _files(source)
    if isinstance(key, Manifest):
        return key
    facts = _cached_facts(key, cache)
    before = dict(facts)
    todo = []
    for path in files:
        try:
            state = os.stat(path)
        except OSError as problem:
            facts[path] = _Fact(-1, -1, error=_reason(problem))
            continue
        known = facts.get(path)
        if known is None or (known.size, known.mtime_ns) != (state.st_size, state.st_mtime_ns):
            known = facts[path] = _Fact(state.st_size, state.st_mtime_ns)
        if not known.error and (known.samples < 0 or (silence_db is not None and np.isnan(known.peak_db))):
            todo.append(path)

    def learn(path: str) -> None:
        _look(path, facts[path], decode=silence_db is not None)

    _for_all(learn, todo, workers, progress, "decoding" if silence_db is not None else "reading headers")
    facts = {path: facts[path] for path in files}
    if cache is not False and (todo or before.keys() != facts.keys()):
        _write_cache(key, cache, facts)

    layout, found_speakers = _speakers(named, layout, speakers, files)
    report = ScanReport(found=len(files), layout=layout)
    keep = []
    for index, path in enumerate(files):
        fact = facts[path]
        if fact.error:
            report.count("unreadable", path, fact.error)
        elif fact.samples < min_seconds * fact.sample_rate:
            report.count("too_short", path, f"{fact.samples / fact.sample_rate:.2f} s")
        elif silence_db is not None and fact.peak_db < silence_db:
            report.count("silent", path, f"peak {fact.peak_db:.0f} dB")
        else:
            keep.append(index)
    report.kept = len(keep)
    if not keep:
        raise NoSpeech(
            f"{source if isinstance(source, (str, os.PathLike)) else 'the list of paths'}: no usable speech; {report}\n"
            f"Expected {', '.join(AUDIO_SUFFIXES)} files of at least {min_seconds} s; convert m4a with ffmpeg "
            "(recipes/pretrain) or lower min_seconds."
        )
    chosen = [facts[files[i]] for i in keep]
    manifest = Manifest(
        [named[i] for i in keep],
        [fact.samples for fact in chosen],
        [fact.sample_rate for fact in chosen],
        [found_speakers[i] for i in keep],
        paths=None if root else [files[i] for i in keep],
        root=root,
        report=report,
    )
    report.speakers = len(manifest.speakers)
    log.log(logging.WARNING if report.unreadable or report.silent else logging.INFO, "%s: %s", root or key, report)
    return manifest


# ---------------------------------------------------------------------------------------------- finding files
def _files(source) -> tuple[str, list[str], list[str], list[str | None] | None, str | Manifest]:
    """-> (root or "", paths, unique names, speakers or None, what the cache is keyed by)."""
    if not isinstance(source, (str, os.PathLike)):
        paths = [os.path.abspath(os.fspath(path)) for path in source]
        unique = sorted(set(paths))
        return "", unique, _names(unique), None, "\n".join(unique)
    place = os.path.abspath(os.path.expanduser(os.fspath(source)))
    if os.path.isdir(place):
        names = sorted(_walk(place))
        return place, [os.path.join(place, *name.split("/")) for name in names], names, None, place
    if not os.path.exists(place):
        raise FileNotFoundError(f"no folder or list of speech at {place}")
    if place.lower().endswith(AUDIO_SUFFIXES):
        return "", [place], [os.path.basename(place)], None, place
    return _listed(place)


def _walk(root: str) -> Iterator[str]:
    """Names, relative to ``root`` and with '/', of all sound files; links are followed, loops are not."""
    stack, seen = [""], set()
    while stack:
        below = stack.pop()
        folder = os.path.join(root, below) if below else root
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = list(os.scandir(folder))
        except OSError as problem:
            log.warning("%s: folder is left out: %s", folder, _reason(problem))
            continue
        for entry in entries:
            if entry.name.startswith("."):  # editors, macOS (._name.wav) and unfinished copies
                continue
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.is_dir():
                stack.append(name)
            elif entry.name.lower().endswith(AUDIO_SUFFIXES):
                yield name


def _names(paths: list[str]) -> list[str]:
    """Paths below their common folder, with '/'."""
    if not paths:
        return []
    common = os.path.dirname(paths[0]) if len(paths) == 1 else os.path.commonpath(paths)
    return [os.path.relpath(path, common).replace(os.sep, "/") for path in paths]


def _listed(place: str) -> tuple[str, list[str], list[str], list[str | None] | None, str | Manifest]:
    base, suffix = os.path.dirname(place), os.path.splitext(place)[1].lower()
    if suffix not in LIST_SUFFIXES:
        raise ConfigError(
            f"{place}: got a file ending in {suffix or 'nothing'!r}, expected a folder, a list "
            f"({', '.join(LIST_SUFFIXES)}) or a sound file ({', '.join(AUDIO_SUFFIXES)})"
        )
    with open(place, newline="", encoding="utf-8") as file:
        text = file.read()
    if text.startswith("id,path,samples,sample_rate,speaker"):
        return "", [], [], None, Manifest.read(place)
    rows: dict[str, tuple[str | None, str | None]] = {}
    lines = csv.reader(io.StringIO(text)) if suffix == ".csv" else map(_columns, text.splitlines())
    for number, parts in enumerate(lines, 1):
        parts = [part.strip() for part in parts if part.strip()]
        if not parts or parts[0].startswith("#") or (number == 1 and suffix == ".csv" and not _audio_columns(parts)):
            continue
        columns = _audio_columns(parts)
        if len(columns) != 1 or len(parts) > 2:
            raise ConfigError(
                f"{place}, line {number}: got {' '.join(parts)!r}, expected one path of a "
                f"{'/'.join(AUDIO_SUFFIXES)} file and at most one more column (the speaker); for names "
                "with blanks make it a .csv"
            )
        path = parts[columns[0]]
        other = parts[1 - columns[0]] if len(parts) == 2 else None
        path = os.path.normpath(os.path.join(base, path))
        rows[path] = (None, other) if suffix == ".scp" else (other, None)
    paths = sorted(rows)
    speakers = [rows[path][0] for path in paths]
    given = [rows[path][1] for path in paths]
    names = given if all(given) and len(set(given)) == len(given) else _names(paths)
    return "", paths, names, speakers if any(speakers) else None, place


def _columns(line: str) -> list[str]:
    return line.split("\t") if "\t" in line else line.split()


def _audio_columns(parts: list[str]) -> list[int]:
    return [index for index, part in enumerate(parts) if part.lower().endswith(AUDIO_SUFFIXES)]


def _speakers(
    names: list[str], layout: str, given: list[str | None] | None, paths: list[str]
) -> tuple[str, list[str | None]]:
    if given is not None and layout == "auto":
        return "list", given
    vox = [_VOXCELEB.search(path.replace(os.sep, "/")) for path in paths] if layout in ("auto", "voxceleb") else []
    if vox and all(vox):
        return "voxceleb", [match.group(1) for match in vox]
    if layout == "voxceleb":
        odd = next((path for path, match in zip(paths, vox, strict=True) if not match), "nothing")
        raise ConfigError(
            f"got {odd}, expected .../id00012/<video>/<name>.wav; for other folders pass layout='speaker'"
        )
    deep = bool(names) and all("/" in name for name in names)
    if layout == "speaker" and not deep:
        odd = next(name for name in names if "/" not in name)
        raise ConfigError(f"got {odd!r}, expected <speaker>/<name>.wav for every file; else pass layout='none'")
    if layout == "speaker" or (layout == "auto" and deep):
        return "speaker", [name.split("/")[0] for name in names]
    return "none", [None] * len(names)


# ---------------------------------------------------------------------------------------------- looking at files
def _look(path: str, fact: _Fact, decode: bool) -> None:
    import soundfile

    try:
        if not decode:
            header = soundfile.info(path)
            fact.samples, fact.sample_rate = int(header.frames), int(header.samplerate)
        else:
            peak, samples = 0.0, 0
            with soundfile.SoundFile(path) as file:
                fact.sample_rate = int(file.samplerate)
                for block in file.blocks(1 << 18, dtype="float32"):
                    samples += len(block)
                    peak = max(peak, float(np.abs(block).max(initial=0.0)))
            fact.samples = samples
            fact.peak_db = 20 * float(np.log10(max(peak, 1e-10)))
        if fact.samples <= 0 or fact.sample_rate <= 0:
            fact.error = "holds no samples"
        elif fact.samples > 1 << 40:  # streams of unknown length carry a nonsense count
            fact.error = f"header claims {fact.samples} samples"
    except (OSError, RuntimeError, ValueError) as problem:  # soundfile's own errors are RuntimeErrors
        fact.error = _reason(problem)


def _reason(problem: BaseException) -> str:
    text = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
    return " ".join(str(text).split())[:160]


def _for_all(work: Callable[[str], None], items: list[str], workers: int, progress: bool, what: str) -> None:
    """Run ``work`` on all items in threads (libsndfile lets go of the interpreter while it reads)."""
    from tqdm import tqdm

    chunks = [items[start : start + 64] for start in range(0, len(items), 64)]  # a future per file costs a kilobyte

    def chunk_of(paths: list[str]) -> int:
        for path in paths:
            work(path)
        return len(paths)

    with (
        ThreadPoolExecutor(max(1, workers)) as pool,
        tqdm(total=len(items), desc=what, unit="file", disable=not progress or not items, delay=2) as bar,
    ):
        for done in pool.map(chunk_of, chunks):
            bar.update(done)


# ---------------------------------------------------------------------------------------------- cache
def _cache_path(key: str, cache: str | os.PathLike | bool | None) -> Path:
    if cache is not None and not isinstance(cache, bool):
        return Path(cache)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "s3prl_speaker_upstreams" / "manifests" / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:24]}.csv"


def _cached_facts(key: str, cache: str | os.PathLike | bool | None) -> dict[str, _Fact]:
    if cache is False:
        return {}
    path = _cache_path(key, cache)
    facts: dict[str, _Fact] = {}
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            head = json.loads(file.readline())
            if head.get("version") != _CACHE_VERSION:
                return {}
            for name, size, mtime, samples, rate, peak, error in csv.reader(file):
                facts[name] = _Fact(int(size), int(mtime), int(samples), int(rate), float(peak), error)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as problem:
        log.warning("%s: manifest cache is not readable (%s); the files are scanned again", path, _reason(problem))
        return {}
    return facts


def _write_cache(key: str, cache: str | os.PathLike | bool | None, facts: dict[str, _Fact]) -> None:
    rows = io.StringIO()
    rows.write(json.dumps({"version": _CACHE_VERSION, "columns": ["path", *_Fact.__slots__]}) + "\n")
    writer = csv.writer(rows, lineterminator="\n")
    for path, fact in facts.items():
        # What failed is not remembered: a disk that was away, or a copy under way, must not stay 'unreadable'.
        if not fact.error:
            writer.writerow([path, *fact.row()])
    try:
        write_text(_cache_path(key, cache), rows.getvalue())
    except OSError as problem:  # a read-only or full home must not stop a training
        log.warning("the manifest could not be cached: %s", _reason(problem))
