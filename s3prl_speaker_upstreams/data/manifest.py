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
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from s3prl_speaker_upstreams.common.audio import AUDIO_SUFFIXES
from s3prl_speaker_upstreams.common.files import write_text
from s3prl_speaker_upstreams.data.lists import LAYOUTS, read_listing
from s3prl_speaker_upstreams.data.scan import scan
from s3prl_speaker_upstreams.errors import ConfigError

__all__ = ["LAYOUTS", "Manifest", "NoSpeech", "ScanReport", "Utterance", "build_manifest", "join_manifests"]

log = logging.getLogger(__name__)

_EXAMPLES = 5
_COLUMNS = ["id", "path", "samples", "sample_rate", "speaker"]


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
    >>> str(ScanReport(missing=2, unsupported={".m4a": 3})).split("unreadable, ")[1]
    '2 missing, 3 of a kind that cannot be read (3 .m4a)'
    """

    found: int = 0
    kept: int = 0
    too_short: int = 0
    silent: int = 0
    unreadable: int = 0
    missing: int = 0
    unsupported: dict[str, int] = field(default_factory=dict)
    layout: str = "none"
    speakers: int = 0
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def count(self, kind: str, path: str, why: str) -> None:
        """Count one file left out as ``kind`` (``too_short``, ``silent``, ``unreadable`` or ``missing``)."""
        setattr(self, kind, getattr(self, kind) + 1)
        shown = self.examples.setdefault(kind, [])
        if len(shown) < _EXAMPLES:
            shown.append((path, why))

    def add(self, other: ScanReport) -> None:
        """Take in the counts and examples of another source."""
        for name in ("found", "kept", "too_short", "silent", "unreadable", "missing"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for suffix, count in other.unsupported.items():
            self.unsupported[suffix] = self.unsupported.get(suffix, 0) + count
        for kind, shown in other.examples.items():
            mine = self.examples.setdefault(kind, [])
            mine += shown[: _EXAMPLES - len(mine)]
        self.notes += other.notes

    def __str__(self) -> str:
        line = (
            f"{self.found} files found, {self.kept} kept (layout {self.layout!r}, {self.speakers} speakers); left out: "
            f"{self.too_short} too short, {self.silent} silent, {self.unreadable} unreadable"
        )
        if self.missing:
            line += f", {self.missing} missing"
        if self.unsupported:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(self.unsupported.items()))
            line += f", {sum(self.unsupported.values())} of a kind that cannot be read ({kinds})"
        for kind, shown in self.examples.items():
            line += f"\n  {kind}: " + "; ".join(f"{path} ({why})" for path, why in shown)
            if getattr(self, kind) > len(shown):
                line += f"; and {getattr(self, kind) - len(shown)} more"
        return "\n  ".join([line, *self.notes])


class Manifest(Sequence[Utterance]):
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

    def __getitem__(self, index: int) -> Utterance:  # type: ignore[override]
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

    def describe_speakers(self, largest: int = 5) -> str:
        """How many speakers there are, and who has most recordings: what to look at before a training.

        >>> Manifest(list("abc"), [1, 1, 1], [1, 1, 1], ["ann", "bob", "ann"]).describe_speakers()
        '2 speakers, most recordings: ann 2, bob 1'
        """
        unknown = int((self.labels < 0).sum())
        counts = np.bincount(self.labels[self.labels >= 0], minlength=len(self.speakers))
        most = np.argsort(-counts, kind="stable")[:largest]
        line = f"{len(self.speakers)} speakers"
        if len(most):
            line += ", most recordings: " + ", ".join(f"{self.speakers[i]} {counts[i]}" for i in most)
        return line + (f"; {unknown} recordings of unknown speakers" if unknown else "")

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

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write as csv (id, path, samples, sample_rate, speaker); the file appears whole or not at all."""
        rows = io.StringIO()
        writer = csv.writer(rows, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for item in self:
            writer.writerow([item.id, item.path, item.samples, item.sample_rate, item.speaker or ""])
        return write_text(path, rows.getvalue())

    @staticmethod
    def is_written(path: str | os.PathLike[str]) -> bool:
        """Whether a file is one that :meth:`write` wrote, by its first line."""
        try:
            with open(path, "rb") as file:
                first = file.readline(200)
        except OSError:
            return False
        return first.removeprefix(b"\xef\xbb\xbf").strip() == ",".join(_COLUMNS).encode()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Manifest:
        """Read what :meth:`write` wrote. Raises ConfigError if the file is something else."""
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.DictReader(file)
            if rows.fieldnames != _COLUMNS:
                raise ConfigError(
                    f"{path}: got columns {rows.fieldnames}, expected {_COLUMNS}; for a plain list use build_manifest"
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


def build_manifest(
    source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    layout: str = "auto",
    min_seconds: float = 1.0,
    silence_db: float | None = None,
    workers: int = 8,
    cache: str | os.PathLike[str] | bool | None = None,
    progress: bool = True,
) -> Manifest:
    """Find all recordings of a folder or list, who speaks in them, and how long they are.

    Parameters
    ----------
    source : folder, list file, or iterable of paths
        As :mod:`.lists` says. A csv written by :meth:`Manifest.write` is taken as it is, without looking at the files.
    layout : one of ``LAYOUTS``
        Where the speaker is; ``auto`` finds one way that fits all files, or refuses (see :mod:`.lists`).
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
        If ``layout`` is unknown or does not fit, or a list cannot be understood.

    >>> build_manifest("/does/not/exist")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no folder or list of speech at /does/not/exist
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"got layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if isinstance(source, (str, os.PathLike)):
        source = os.path.abspath(os.path.expanduser(os.fspath(source)))
        if Manifest.is_written(source):
            return Manifest.read(source)
        key = source
    else:
        source = sorted({os.path.abspath(os.fspath(path)) for path in source})
        key = "\n".join(source)
    listing = read_listing(source, layout)
    facts = scan(
        [entry.path for entry in listing], key, decode=silence_db is not None, workers=workers, cache=cache,
        progress=progress,
    )  # fmt: skip
    report = ScanReport(found=len(listing), layout=listing.layout, unsupported=dict(listing.unsupported))
    for path in listing.missing:
        report.count("missing", path, "no such file")
    keep = []
    for entry, fact in zip(listing, facts, strict=True):
        if fact.error:
            report.count("unreadable", entry.path, fact.error)
        elif fact.samples < min_seconds * fact.sample_rate:
            report.count("too_short", entry.path, f"{fact.samples / fact.sample_rate:.2f} s")
        elif silence_db is not None and fact.peak_db < silence_db:
            report.count("silent", entry.path, f"peak {fact.peak_db:.0f} dB")
        else:
            keep.append((entry, fact))
    report.kept = len(keep)
    report.notes = listing.notes
    if not keep:
        raise NoSpeech(
            f"{source if isinstance(source, str) else 'the list of paths'}: no usable speech; {report}\n"
            f"Expected {', '.join(AUDIO_SUFFIXES)} files of at least {min_seconds} s; convert m4a with ffmpeg "
            "(recipes/pretrain) or lower min_seconds."
        )
    manifest = Manifest(
        [entry.id for entry, _ in keep],
        [fact.samples for _, fact in keep],
        [fact.sample_rate for _, fact in keep],
        [entry.speaker for entry, _ in keep],
        paths=None if listing.root else [entry.path for entry, _ in keep],
        root=listing.root,
        report=report,
    )
    report.speakers = len(manifest.speakers)
    lost = report.unreadable or report.silent or report.missing or report.unsupported
    log.log(logging.WARNING if lost else logging.INFO, "%s: %s", listing.root or key, report)
    return manifest


def join_manifests(parts: Sequence[Manifest], sources: Sequence[str]) -> Manifest:
    """One manifest of several sources, one behind the other; ids get the number of their source in front.

    Raises ConfigError if one file has two speakers, or if speakers that were told by folders of the same name come from
    two sources: nothing says that they are the same person.

    >>> a = Manifest(["1.wav"], [16000], [16000], ["ann"], root="/a", report=ScanReport(layout="speaker"))
    >>> b = Manifest(["1.wav"], [16000], [16000], ["bob"], root="/b", report=ScanReport(layout="speaker"))
    >>> [item.id for item in join_manifests([a, b], ["a", "b"])]
    ['0/1.wav', '1/1.wav']
    """
    if len(parts) == 1:
        return parts[0]
    by_folder: dict[str, int] = {}
    of_file: dict[str, str | None] = {}
    for number, part in enumerate(parts):
        if part.report.layout == "speaker":
            for name in part.speakers:
                if by_folder.setdefault(name, number) != number:
                    raise ConfigError(
                        f"{sources[by_folder[name]]} and {sources[number]} both have a folder {name!r}, which would be "
                        "one speaker; if they are the same people, write one list with 'speaker path' lines, else "
                        "rename the folders"
                    )
        for item in part:
            real = os.path.realpath(item.path)
            if of_file.setdefault(real, item.speaker) != item.speaker:
                raise ConfigError(
                    f"{item.path} is in two sources with two speakers, {of_file[real]!r} and {item.speaker!r}"
                )
    items = [(f"{number}/{item.id}", item) for number, part in enumerate(parts) for item in part]
    layouts = {part.report.layout for part in parts}
    report = ScanReport(layout=layouts.pop() if len(layouts) == 1 else "mixed")
    for part in parts:
        report.add(part.report)
    joined = Manifest(
        [name for name, _ in items],
        [item.samples for _, item in items],
        [item.sample_rate for _, item in items],
        [item.speaker for _, item in items],
        paths=[item.path for _, item in items],
        report=report,
    )
    report.speakers = len(joined.speakers)
    return joined
