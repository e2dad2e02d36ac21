"""Lists of recordings and who speaks in them: one format, one rule for every file of a source.

**What a source is.** A folder (searched through; links followed, hidden files left out), a sound file, a sequence of
paths, or a list file:

=====================================  ================================================================================
lines                                  meaning
=====================================  ================================================================================
``path``                               one recording a line, blanks in names allowed
``word path``, ``path word``           tab or blanks between them; the words are speakers, or names of the recordings
                                       where no two of them are equal (``id<TAB>path``, Kaldi's ``wav.scp``)
a first line of column names           ``.csv``, ``.tsv`` or with tabs, commas or semicolons: SpeechBrain's and
                                       3D-Speaker's csv, this package's own manifest; columns by name (see ``_COLUMNS``)
``{"key": .., "wav": .., "spk": ..}``  WeSpeaker's ``raw.list``
=====================================  ================================================================================

A ``wav.scp``, or a folder that holds one and no recordings, takes its speakers from the ``utt2spk`` beside it. Blank
lines and lines that begin with ``#`` are skipped. Text is UTF-8, with or without byte order mark, or UTF-16 with one.
Relative paths begin in the list's folder, or, if none of the listed files is there, in the current one.

**Who speaks** is stated or found in the same way for every file of a source, and only files that exist are asked:

1. stated in the list (``list``), for all lines or for none;
2. all paths end in ``id00012/<video>/<name>`` (``voxceleb``);
3. all paths end in ``84/121123/84-121123-0001.flac`` (``librispeech``);
4. a folder whose files all lie in folders: the first folder (``speaker``), unless these are called like parts of a
   corpus (``train``, ``wav``); a list whose files all lie one folder below what their paths share: that folder;
5. else nobody is known (``none``).

Where some files fit and some do not, no rule is taken: :class:`~s3prl_speaker_upstreams.errors.ConfigError` names one
of each and the choices. A ``layout`` that is given is applied as it is.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> for name in ("ann/1.wav", "ann/2.wav", "bob/1.wav"):
...     (folder / name).parent.mkdir(exist_ok=True); (folder / name).touch()
>>> [(entry.id, entry.speaker) for entry in read_listing(folder)]
[('ann/1.wav', 'ann'), ('ann/2.wav', 'ann'), ('bob/1.wav', 'bob')]
>>> _ = (folder / "list.txt").write_text("spk1 ann/1.wav\\nspk1 ann/2.wav\\nspk2 bob/1.wav\\nspk2 bob/gone.wav\\n")
>>> listing = read_listing(folder / "list.txt")
>>> [entry.speaker for entry in listing], listing.layout, [Path(path).name for path in listing.missing]
(['spk1', 'spk1', 'spk2'], 'list', ['gone.wav'])
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s3prl_speaker_upstreams.common.audio import AUDIO_SUFFIXES, OTHER_SUFFIXES, find_names
from s3prl_speaker_upstreams.errors import ConfigError

__all__ = ["LAYOUTS", "Entry", "Listing", "read_listing", "read_text"]

LAYOUTS = ("auto", "list", "voxceleb", "librispeech", "speaker", "none")

_SOUND = AUDIO_SUFFIXES + OTHER_SUFFIXES
# What the columns of a list with a first line of names are called there, in lower case.
_COLUMNS = {
    "path": ("path", "wav", "wav_path", "file", "filename", "filepath", "file_path", "audio", "audio_path"),
    "speaker": ("speaker", "spk", "spk_id", "speaker_id", "speakerid"),
    "id": ("id", "key", "utt", "utt_id", "utterance", "utterance_id"),
}
_VOXCELEB = re.compile(r"(?:^|/)(id\d{5})/[^/]+/[^/]+$")
_LIBRISPEECH = re.compile(r"(?:^|/)(\d+)/(\d+)/\1-\2-[^/]+$")
# First folders of corpora that are parts of them, not speakers.
_PARTS = re.compile(
    r"^(?:train|dev|test|valid|validation|eval|unlab|wav|wavs|flac|audio|data|clips)(?:[-_ .\d].*)?$", re.I
)
_CHOICES = (
    "--set data.layout=speaker (the folder a list's file lies in, or the first folder below a folder), =voxceleb, "
    "=librispeech or =none (nobody is known), or a list with 'speaker path' lines (of a cohort: --cohort-layout)"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One recording. id : unique name in its listing; path : file; speaker : label, where known."""

    id: str
    path: str
    speaker: str | None = None


@dataclass
class Listing(Sequence[Entry]):
    """Recordings of one source, sorted by path.

    Attributes
    ----------
    entries : list of Entry
    root : folder that the ids are paths below, or "" where they are not
    layout : which rule gave the speakers, one of ``LAYOUTS`` but "auto"
    missing : listed files that do not exist
    unsupported : how many files of each ending that cannot be read (``.m4a``)
    notes : what else the reader should know, a sentence each
    """

    entries: list[Entry]
    root: str = ""
    layout: str = "none"
    missing: list[str] = field(default_factory=list)
    unsupported: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: Any) -> Any:
        return self.entries[index]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)


@dataclass(slots=True)
class _Row:
    line: int
    path: str
    id: str | None = None
    speaker: str | None = None


def read_listing(source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], layout: str = "auto") -> Listing:
    """The recordings of ``source`` and who speaks in them; see the head of this module. No recording is opened.

    Raises
    ------
    FileNotFoundError
        If there is no such folder or file.
    ConfigError
        If the list cannot be understood, states two speakers for one path, or the evidence for speakers is mixed.

    >>> [os.path.basename(path) for path in read_listing(["nowhere/1.wav", "nowhere/2.wav"]).missing]
    ['1.wav', '2.wav']
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"got layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if not isinstance(source, (str, os.PathLike)):
        rows = [_Row(0, os.fspath(path)) for path in source]
        return _resolved(rows, "", layout, "the list of paths")
    place = os.path.abspath(os.path.expanduser(os.fspath(source)))
    if os.path.isdir(place):
        names = find_names(place, _SOUND)
        if names or not os.path.isfile(os.path.join(place, "wav.scp")):
            return _folder(place, names, layout)
        place = os.path.join(place, "wav.scp")
    if not os.path.exists(place):
        raise FileNotFoundError(f"no folder or list of speech at {place}")
    if place.lower().endswith(_SOUND):
        return _resolved([_Row(0, place)], "", layout, place)
    return _resolved(_rows(place, words_are_speakers=layout == "list"), os.path.dirname(place), layout, place)


# ---------------------------------------------------------------------------------------------- folders, found files
def _folder(place: str, names: list[str], layout: str) -> Listing:
    unsupported = Counter(_suffix(name) for name in names if not name.lower().endswith(AUDIO_SUFFIXES))
    names = [name for name in names if name.lower().endswith(AUDIO_SUFFIXES)]
    # Looked at as paths from the root on, so that one speaker's folder of VoxCeleb is recognised too.
    paths = [f"{place}/{name}".replace(os.sep, "/") for name in names]
    found, speakers = _speakers(paths, names, layout, place, listed=False)
    entries = [
        Entry(name, os.path.join(place, *name.split("/")), speaker)
        for name, speaker in zip(names, speakers, strict=True)
    ]
    return Listing(entries, place, found, unsupported=unsupported)


def _resolved(rows: list[_Row], base: str, layout: str, what: str) -> Listing:
    """Rows of a list: paths made absolute, duplicates joined, missing files set aside, speakers told."""
    relative = [row for row in rows if not os.path.isabs(os.path.expanduser(row.path))]
    if base and relative and not any(os.path.isfile(os.path.join(base, row.path)) for row in relative):
        if any(os.path.isfile(row.path) for row in relative):
            base = ""
    notes, missing, unsupported = [], [], Counter[str]()
    stated = sum(bool(row.speaker) for row in rows)
    # A column for speakers that is empty throughout says that nobody is known; paths are not asked then.
    layout = "none" if layout == "auto" and rows and all(row.speaker == "" for row in rows) else layout
    if layout in ("auto", "list") and 0 < stated < len(rows):
        odd = next(row for row in rows if not row.speaker)
        raise ConfigError(
            f"{what}: {stated} of {len(rows)} lines state a speaker, line {odd.line} ({odd.path}) does not; state all "
            f"or none, or choose {_CHOICES}"
        )
    kept: dict[str, _Row] = {}
    repeated = 0
    for row in rows:
        listed, row.path = row.path, os.path.abspath(os.path.join(base, os.path.expanduser(row.path)))
        other = kept.get(row.path)
        if other is None:
            kept[row.path] = row
        elif other.speaker != row.speaker:
            raise ConfigError(
                f"{what}: {listed} is listed with two speakers, {other.speaker!r} (line {other.line}) and "
                f"{row.speaker!r} (line {row.line}); a recording has one"
            )
        else:
            repeated += 1
    if repeated:
        notes.append(
            f"{repeated} lines name a recording again (segments of it, perhaps): whole recordings are used once"
        )
    rows = []
    for path in sorted(kept):
        if not path.lower().endswith(AUDIO_SUFFIXES):
            unsupported[_suffix(path)] += 1
        elif not os.path.isfile(path):
            missing.append(path)
        else:
            rows.append(kept[path])
    paths = [row.path.replace(os.sep, "/") for row in rows]
    if stated and layout in ("auto", "list"):
        found, speakers = "list", [row.speaker for row in rows]
    elif layout == "list":
        raise ConfigError(f"{what}: states no speakers, as layout=list expects; choose {_CHOICES}")
    else:
        found, speakers = _speakers(paths, _below_common(paths), layout, what, listed=True)
    names = [row.id or "" for row in rows]
    if not all(names) or len(set(names)) != len(names):
        names = _below_common(paths)
    entries = [Entry(name, row.path, speaker) for name, row, speaker in zip(names, rows, speakers, strict=True)]
    return Listing(entries, "", found, missing, unsupported, notes)


def _below_common(paths: list[str]) -> list[str]:
    """Paths below their common folder."""
    if not paths:
        return []
    common = os.path.dirname(paths[0]) if len(paths) == 1 else os.path.commonpath(paths)
    return [os.path.relpath(path, common).replace(os.sep, "/") for path in paths]


def _speakers(
    paths: list[str], names: list[str], layout: str, what: str, *, listed: bool
) -> tuple[str, list[str | None]]:
    """Rules 2 to 5: (layout, a speaker for every file). ``names`` are the paths below the root, or what they share."""
    nobody: list[str | None] = [None] * len(paths)
    if layout == "none" or not paths:
        return "none", nobody
    for kind, pattern, example in (
        ("voxceleb", _VOXCELEB, ".../id00012/<video>/<name>.wav"),
        ("librispeech", _LIBRISPEECH, ".../84/121123/84-121123-0001.flac"),
    ):
        if layout not in ("auto", kind):
            continue
        found = [pattern.search(path) for path in paths]
        if all(found):
            return kind, [match.group(1) for match in found if match]
        odd = next(path for path, match in zip(paths, found, strict=True) if not match)
        if layout == kind:
            raise ConfigError(f"got {odd}, expected {example} for every file; for other folders pass layout='speaker'")
        if any(found):
            good = next(path for path, match in zip(paths, found, strict=True) if match)
            raise ConfigError(
                f"{what}: {sum(map(bool, found))} of {len(paths)} files lie as in {kind} ({good}), others do not "
                f"({odd}); who speaks must be found in one way for all. Leave the others out, or choose {_CHOICES}"
            )
    if layout == "list":
        raise ConfigError(f"{what}: layout=list is for lists that state speakers, this is a folder; choose {_CHOICES}")
    depths = [name.count("/") for name in names]
    if layout == "speaker":
        if listed:
            return "speaker", _parents(paths, what)
        if min(depths) < 1:
            odd = next(name for name, depth in zip(names, depths, strict=True) if depth < 1)
            raise ConfigError(f"got {odd!r}, expected <speaker>/<name>.wav for every file; else pass layout='none'")
        return "speaker", [name.split("/")[0] for name in names]
    if min(depths) == 0 and max(depths) > 0 or (listed and min(depths) == 1 and max(depths) > 1):
        shallow, deep = names[depths.index(min(depths))], names[depths.index(max(depths))]
        raise ConfigError(
            f"{what}: {deep!r} and {shallow!r} lie at different depths, so that folders cannot tell the speakers; "
            f"leave one of the two out, or choose {_CHOICES}"
        )
    if max(depths) == 0 or (listed and max(depths) > 1):
        return "none", nobody
    first = [name.split("/")[0] for name in names]
    parts = sorted({name for name in first if _PARTS.match(name)})
    if parts:
        raise ConfigError(
            f"{what}: the first folders ({', '.join(sorted(set(first))[:5])}) look like parts of a corpus, not like "
            f"speakers; name one of them as the source, or choose {_CHOICES}"
        )
    return "speaker", list(first)


def _parents(paths: list[str], what: str) -> list[str | None]:
    """The folder that each file lies in; two folders of one name are refused, since they would be one speaker."""
    seen: dict[str, str] = {}
    for path in paths:
        folder = os.path.dirname(path)
        other = seen.setdefault(os.path.basename(folder), folder)
        if other != folder:
            raise ConfigError(
                f"{what}: {other} and {folder} have the same name and would be one speaker; write a list with 'speaker "
                "path' lines"
            )
    return [os.path.basename(os.path.dirname(path)) for path in paths]


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower() or "no ending"


# ---------------------------------------------------------------------------------------------- list files
def read_text(path: str | os.PathLike[str]) -> str:
    """Text of a list, as UTF-8 (a byte order mark is left out) or, with its mark, UTF-16.

    Raises ConfigError naming the first line that is neither, with the command that converts it.

    >>> import tempfile
    >>> name = tempfile.mkstemp()[1]
    >>> _ = Path(name).write_bytes("a.wav".encode("utf-16"))
    >>> read_text(name)
    'a.wav'
    """
    data = Path(path).read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    if b"\0" in data:
        raise ConfigError(f"{path}: got binary data, or UTF-16 without its mark; expected a list as UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}, line {line}: got bytes that are not UTF-8 (GBK or Latin-1, perhaps), expected UTF-8 or UTF-16; "
            f"convert it: iconv -f GBK -t UTF-8 {path}"
        ) from None


def _rows(place: str, words_are_speakers: bool) -> list[_Row]:
    """What a list file says, without asking whether the files exist (but where blanks could be read in two ways)."""
    text = read_text(place)
    lines = [
        (number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not lines:
        raise ConfigError(f"{place}: holds no line; expected the path of a recording in each")
    if lines[0][1].lstrip().startswith("{"):
        return [_json_row(place, number, line) for number, line in lines]
    separator, header = _header(lines[0][1])
    if header:
        return _table(place, text, separator, header)
    rows = _words(place, lines, words_are_speakers)
    speakers = os.path.join(os.path.dirname(place), "utt2spk")
    if os.path.basename(place).lower().endswith(".scp") and os.path.isfile(speakers):
        _state(rows, speakers, place)
    return rows


def _json_row(place: str, number: int, line: str) -> _Row:
    try:
        record = json.loads(line)
        path, speaker = record["wav"], record.get("spk")
        return _Row(number, str(path), str(record["key"]), None if speaker is None else str(speaker))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'{place}, line {number}: got {line[:80]!r}, expected {{"key": ..., "wav": ..., "spk": ...}}'
        ) from error


def _header(line: str) -> tuple[str, dict[str, int]]:
    """Separator, and which column is the path, speaker and id, if a line is one of column names; else "", {}."""
    for separator in ("\t", ",", ";"):
        names = [name.strip().strip('"').lower() for name in line.split(separator)]
        columns = {
            what: names.index(known)
            for what, all_known in _COLUMNS.items()
            for known in reversed(all_known)
            if known in names
        }
        if "path" in columns:
            return separator, columns
    return "", {}


def _table(place: str, text: str, separator: str, columns: dict[str, int]) -> list[_Row]:
    rows = []
    width = 0
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    for parts in reader:
        parts = [part.strip() for part in parts]
        if not any(parts) or parts[0].startswith("#"):
            continue
        if not width:
            width = len(parts)
            continue
        if len(parts) != width or not parts[columns["path"]]:
            raise ConfigError(
                f"{place}, line {reader.line_num}: got {len(parts)} columns, expected {width} as in its first line"
            )
        row = _Row(reader.line_num, _path(place, reader.line_num, parts[columns["path"]]))
        row.id = (parts[columns["id"]] or None) if "id" in columns else None
        row.speaker = parts[columns["speaker"]] if "speaker" in columns else None
        rows.append(row)
    return rows


def _path(place: str, number: int, path: str) -> str:
    if path.startswith(("$", "{")):
        raise ConfigError(
            f"{place}, line {number}: got {path!r}, expected a path; write the folder instead of what stands for it"
        )
    if path.endswith("|"):
        raise ConfigError(f"{place}, line {number}: got a command, which is not run: {path[:80]!r}; expected a path")
    if not path.lower().endswith(_SOUND):
        raise ConfigError(
            f"{place}, line {number}: got {path!r}, expected the path of a recording ({', '.join(AUDIO_SUFFIXES)})"
        )
    return path


def _words(place: str, lines: list[tuple[int, str]], words_are_speakers: bool) -> list[_Row]:
    """Lines without column names: a path, or a path and one word more, in the same order on every line."""
    if place.lower().endswith(".csv"):
        mark = ";" if ";" in lines[0][1] and "," not in lines[0][1] else ","
        split = [
            (number, [part.strip() for part in next(csv.reader([line], delimiter=mark))]) for number, line in lines
        ]
        split = [(number, [part for part in parts if part]) for number, parts in split]
    else:
        whole = _whole_names(place, [line.strip() for _, line in lines if "\t" not in line])
        split = []
        for number, line in lines:
            line = line.strip()
            if "\t" in line:
                parts = [part.strip() for part in line.split("\t") if part.strip()]
            else:
                parts = [line] if whole else line.split()
                if not whole and len(parts) > 2:  # blanks in the path, or a command
                    first, _, rest = line.partition(" ")
                    parts = (
                        [first, rest.strip()] if rest.strip().lower().endswith(_SOUND) or rest.endswith("|") else parts
                    )
            split.append((number, parts))
    width = len(split[0][1])
    if not any(part.lower().endswith(_SOUND) or part.endswith("|") for part in split[0][1]):
        raise ConfigError(
            f"{place}, line {split[0][0]}: got {lines[0][1].strip()!r}, expected the path of a recording "
            f"({', '.join(AUDIO_SUFFIXES)}), or column names of which one is {', '.join(_COLUMNS['path'])}"
        )
    for number, parts in split:
        if len(parts) != width or width > 2:
            raise ConfigError(
                f"{place}, line {number}: got {' '.join(parts)!r}, expected a path, or a path and one word (a speaker "
                "or name), on every line alike; for names with blanks put tabs between the columns"
            )
    if width == 1:
        return [_Row(number, _path(place, number, parts[0])) for number, parts in split]
    behind = [parts[1].lower().endswith(_SOUND) or parts[1].endswith("|") for _, parts in split]
    before = [parts[0].lower().endswith(_SOUND) for _, parts in split]
    if all(behind) and not all(before):
        column = 1
    elif all(before) and not any(behind):
        column = 0
    else:
        number = next(n for (n, _), a, b in zip(split, before, behind, strict=True) if a == b or not b)
        raise ConfigError(
            f"{place}, line {number}: the path must stand in the same column on every line, and the other must be no "
            "path; expected 'speaker path' or 'path speaker'"
        )
    words = [parts[1 - column] for _, parts in split]
    distinct = len(set(words)) == len(words)
    named = place.lower().endswith(".scp") or (distinct and not words_are_speakers)
    return [
        _Row(number, _path(place, number, parts[column]), word if named else None, None if named else word)
        for (number, parts), word in zip(split, words, strict=True)
    ]


def _whole_names(place: str, lines: list[str]) -> bool:
    """Whether lines with blanks are names with blanks rather than two columns: by which of the two files exist."""

    def there(path: str) -> bool:
        if not path.lower().endswith(_SOUND):
            return False
        return os.path.isfile(os.path.join(os.path.dirname(place), path)) or os.path.isfile(path)

    single = [line for line in lines if len(line.split()) == 1]
    several = [line for line in lines if len(line.split()) > 1][:1000]  # a million need not all be looked up
    whole = [line for line in several if there(line)] or single
    columns = [line for line in several if any(map(there, (line.split(None, 1)[1], line.rsplit(None, 1)[0])))]
    if whole and columns:
        raise ConfigError(
            f"{place}: {columns[0]!r} is a word and a path, {whole[0]!r} a path alone, perhaps with blanks; expected "
            "the same on every line, with tabs between columns where names have blanks"
        )
    return bool(whole)


def _state(rows: list[_Row], utt2spk: str, place: str) -> None:
    """Speakers of Kaldi's utt2spk, for all utterances of the wav.scp."""
    speakers = {}
    for number, line in enumerate(read_text(utt2spk).splitlines(), 1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 2:
            raise ConfigError(f"{utt2spk}, line {number}: got {line!r}, expected 'utterance speaker'")
        speakers[parts[0]] = parts[1]
    without = [row for row in rows if row.id not in speakers]
    if without:
        raise ConfigError(
            f"{utt2spk}: states no speaker of {len(without)} of the {len(rows)} utterances in {place}, first "
            f"{without[0].id!r}; state all, or rename the file"
        )
    for row in rows:
        row.speaker = speakers[row.id or ""]
