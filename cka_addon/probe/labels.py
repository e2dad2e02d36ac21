"""Labels of speech: one value per utterance, or values with times, from the formats that corpora come in.

A label is written `[NAME=]SOURCE[:COLUMN][@UNIT]`:

    labels.tsv:speaker         a column of a csv or tsv file (with columns `start` and `end` too: values with times)
    phones.ctm                 CTM: utterance channel start duration value
    grids/:phones              a folder of Praat TextGrids (short or long), tier `phones`; or one file
    timit/:phn  timit/:wrd     TIMIT, times in samples at 16 kHz
    labs/:lab                  xlabel (ESPS / xwaves: end time, colour, value below a line `#`)
    dialogues.rttm             RTTM: who speaks when
    utt2spk                    Kaldi: utterance value
    path:speaker               the speaker from the recording's path
    made:channel               a known change made to every recording (see `cka_addon.probe.made`)
    computed:f0                a number computed from the recording

UNIT is `frame`, `segment` (mean over its frames) or `utterance`; values with times are segments, the others utterances,
where it is not said.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cka_addon.probe.errors import LabelError

UNITS = ("frame", "segment", "utterance")
KINDS = ("class", "number")
TIMIT_RATE = 16000  # .phn and .wrd count samples at TIMIT's rate
NUMBER_FROM = 10  # a column of numbers with more different values than this is a number, not a class
_ID_COLUMNS = (
    "utterance",
    "utterance_id",
    "utt",
    "utt_id",
    "id",
    "file",
    "filename",
    "path",
    "wav",
    "name",
    "recording",
)
_ENDINGS = {".phn": "timit", ".wrd": "timit", ".lab": "xlabel", ".lablaut": "xlabel", ".labsilb": "xlabel"}
_TOKEN = re.compile(r'"(?:[^"]|"")*"|\[\d*\]|<exists>|(?<![\w.])[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.])')
_VOXCELEB = re.compile(r"(?:^|/)(id\d{5})/[^/]+/[^/]+$")


@dataclass(frozen=True)
class Segment:
    """A value from `start` to `end`, seconds."""

    start: float
    end: float
    value: str


@dataclass(frozen=True)
class LabelSpec:
    """A parsed label specification.

    source : file, folder, "path", "made" or "computed";  column : column, tier, ending or kind of change
    """

    name: str
    source: str
    column: str | None = None
    unit: str | None = None


@dataclass
class Labels:
    """One property of utterances.

    utterances : id -> value;  segments : id -> values with times, sorted by start (one of the two is filled)
    unit : what an example is;  kind : "class" or "number";  notes : what was found while reading, for the report
    """

    name: str
    source: str
    unit: str
    kind: str = "class"
    utterances: dict[str, str] = field(default_factory=dict)
    segments: dict[str, list[Segment]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ids(self) -> list[str]:
        """Names of the utterances that have a label, as the file writes them."""
        return sorted(self.segments or self.utterances)

    def values(self) -> Counter[str]:
        """How often each value occurs."""
        if self.segments:
            return Counter(s.value for rows in self.segments.values() for s in rows)
        return Counter(self.utterances.values())

    def without(self, ignored: Iterable[str]) -> Labels:
        """The labels without some values (silence, noise, empty ones)."""
        out = set(ignored)
        return replace(
            self,
            utterances={k: v for k, v in self.utterances.items() if v not in out},
            segments={k: [s for s in rows if s.value not in out] for k, rows in self.segments.items()},
            notes=list(self.notes),
        )


def parse_label(text: str) -> LabelSpec:
    """Parse `[NAME=]SOURCE[:COLUMN][@UNIT]`.

    >>> parse_label("labels.tsv:speaker")
    LabelSpec(name='speaker', source='labels.tsv', column='speaker', unit=None)
    >>> parse_label("phone=align/phones.ctm@frame")
    LabelSpec(name='phone', source='align/phones.ctm', column=None, unit='frame')
    """
    match = re.match(r"^(?:([A-Za-z_][\w.-]*)=)?(.+?)(?:@([a-z]+))?$", text.strip())
    if match is None:
        raise LabelError(f"got labels '{text}'; expected [NAME=]FILE[:COLUMN][@UNIT], e.g. labels.tsv:speaker")
    name, body, unit = match.groups()
    if unit is not None and unit not in UNITS:
        raise LabelError(f"got labels '{text}': unit '{unit}'; expected one of {', '.join(UNITS)}")
    source, column = body, None
    if ":" in body and not Path(body).exists():
        source, _, column = body.rpartition(":")
        if not source or not column:
            raise LabelError(f"got labels '{text}'; expected a file before and a column behind the colon")
    if name is None:
        name = column or Path(source).stem
    return LabelSpec(name, source, column, unit)


def read_labels(spec: str | LabelSpec, *, kind: str | None = None) -> Labels:
    """Read the labels of a specification (files and folders; `path`, `made` and `computed` need the recordings).

    kind : "class" or "number"; by itself a column of more than ten different numbers is a number
    Raises LabelError naming file and line where something cannot be read.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "words.ctm"
    >>> _ = file.write_text("a 1 0.00 0.30 good\\na 1 0.30 0.25 day\\n")
    >>> read_labels(f"word={file}").segments["a"][1]
    Segment(start=0.3, end=0.55, value='day')
    """
    spec = parse_label(spec) if isinstance(spec, str) else spec
    if kind is not None and kind not in KINDS:
        raise LabelError(f"{spec.name}: got kind '{kind}'; expected one of {', '.join(KINDS)}")
    path = Path(spec.source).expanduser()
    if not path.exists():
        raise LabelError(f"{spec.name}: {path} does not exist; expected a label file or a folder of them")
    found = _read_folder(path, spec.column) if path.is_dir() else _read_file(path, spec.column)
    labels = Labels(spec.name, f"{spec.source}:{spec.column}" if spec.column else spec.source, spec.unit or "utterance")
    if found and isinstance(next(iter(found.values())), list):
        labels.segments = {k: _in_order(v) for k, v in found.items()}  # type: ignore[arg-type]
        labels.unit = spec.unit or "segment"
    else:
        labels.utterances = {k: str(v) for k, v in found.items() if v != ""}
        if spec.unit == "segment":
            raise LabelError(f"{spec.name}: {path} has no times; expected a file with times for unit 'segment'")
    if not labels.values():
        raise LabelError(f"{path}: holds no label; expected at least one value")
    labels.kind = kind or _kind(labels.values())
    if labels.kind == "number":
        _check_numbers(labels)
    return labels


def _in_order(rows: list[Segment]) -> list[Segment]:
    return sorted(rows, key=lambda s: (s.start, s.end))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) != float("inf") and value == value else None


def _kind(values: Mapping[str, int]) -> str:
    if len(values) > NUMBER_FROM and all(_number(v) is not None for v in values):
        return "number"
    return "class"


def _check_numbers(labels: Labels) -> None:
    for value in labels.values():
        if _number(value) is None:
            raise LabelError(f"{labels.name}: got '{value}' among numbers; expected finite numbers, or kind 'class'")


# -- files -----------------------------------------------------------------------------------------------------------
_Found = dict[str, "str | list[Segment]"]


def _read_file(path: Path, column: str | None) -> _Found:
    ending = path.suffix.lower()
    if ending == ".ctm":
        return _ctm(path)
    if ending == ".rttm":
        return _rttm(path)
    if ending == ".textgrid":
        return {path.stem: read_textgrid(path, column)}
    if ending in _ENDINGS:
        return {path.stem: _timed(path)}
    if ending in (".csv", ".tsv"):
        return _table(path, column)
    text = _text(path)
    first = next((line for line in text.splitlines() if line.strip()), "")
    if column is not None and ("\t" in first or "," in first):
        return _table(path, column)
    if column is None or path.name in ("utt2spk", "utt2gender", "utt2lang", "spk2gender"):
        return _kaldi(path)
    raise LabelError(
        f"{path}: of an unknown format; expected .csv, .tsv, .ctm, .TextGrid, .phn, .wrd, .lab (xlabel), .rttm "
        "or utt2spk"
    )


def _read_folder(path: Path, column: str | None) -> _Found:
    """Label files of a folder: their ids are the paths below it without the ending, as recordings have them."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    grids = [p for p in files if p.suffix.lower() == ".textgrid"]
    endings = {p.suffix.lower() for p in files if p.suffix.lower() in _ENDINGS}
    wanted = f".{column.lower().lstrip('.')}" if column else None
    if wanted in endings:
        chosen = [p for p in files if p.suffix.lower() == wanted]
        return {_id(p, path): _timed(p) for p in chosen}
    if grids:
        return {_id(p, path): read_textgrid(p, column) for p in grids}
    if column is None and len(endings) == 1:
        return {_id(p, path): _timed(p) for p in files if p.suffix.lower() in endings}
    offer = ", ".join(sorted(endings)) or "none"
    raise LabelError(
        f"{path}: got column '{column}', label files there end in: {offer}; expected FOLDER:TIER for TextGrids or "
        "FOLDER:phn, FOLDER:wrd, FOLDER:lab"
    )


def _id(path: Path, root: Path) -> str:
    return path.relative_to(root).with_suffix("").as_posix()


def _text(path: Path) -> str:
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _lines(path: Path) -> Iterable[tuple[int, list[str]]]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        parts = line.split()
        if parts and not parts[0].startswith(";;"):
            yield number, parts


def _segment(where: str, start: str, end: str, value: str, *, scale: float = 1.0, duration: bool = False) -> Segment:
    a, b = _number(start), _number(end)
    if a is None or b is None:
        raise LabelError(f"{where}: got times '{start}' and '{end}'; expected numbers")
    a, b = round(a * scale, 9), round((a + b if duration else b) * scale, 9)
    if a < 0 or b < a:
        raise LabelError(f"{where}: got a segment from {a:g} to {b:g} s; expected 0 <= start <= end")
    return Segment(a, b, value)


def _ctm(path: Path) -> _Found:
    found: dict[str, list[Segment]] = {}
    for number, parts in _lines(path):
        if len(parts) < 5:
            raise LabelError(
                f"{path}:{number}: got {len(parts)} fields; expected 'utterance channel start duration value'"
            )
        row = _segment(f"{path}:{number}", parts[2], parts[3], parts[4], duration=True)
        found.setdefault(parts[0], []).append(row)
    return dict(found)


def _rttm(path: Path) -> _Found:
    found: dict[str, list[Segment]] = {}
    for number, parts in _lines(path):
        if parts[0] != "SPEAKER":
            continue
        if len(parts) < 8:
            raise LabelError(
                f"{path}:{number}: got {len(parts)} fields; expected at least 8: SPEAKER file 1 start duration ..."
            )
        row = _segment(f"{path}:{number}", parts[3], parts[4], parts[7], duration=True)
        found.setdefault(parts[1], []).append(row)
    return dict(found)


def _kaldi(path: Path) -> _Found:
    found: _Found = {}
    for number, parts in _lines(path):
        if len(parts) != 2:
            raise LabelError(
                f"{path}:{number}: got {len(parts)} fields; expected 'utterance value', as in Kaldi's utt2spk"
            )
        if found.setdefault(parts[0], parts[1]) != parts[1]:
            raise LabelError(
                f"{path}:{number}: '{parts[0]}' has two values, {found[parts[0]]} and {parts[1]}; expected one"
            )
    return found


def _timed(path: Path) -> list[Segment]:
    return _timit(path) if _ENDINGS[path.suffix.lower()] == "timit" else _xlabel(path)


def _timit(path: Path) -> list[Segment]:
    rows = []
    for number, parts in _lines(path):
        if len(parts) < 3:
            raise LabelError(f"{path}:{number}: got {len(parts)} fields; expected 'first_sample last_sample value'")
        rows.append(_segment(f"{path}:{number}", parts[0], parts[1], " ".join(parts[2:]), scale=1 / TIMIT_RATE))
    return rows


def _xlabel(path: Path) -> list[Segment]:
    """ESPS / xwaves labels: each line gives the end of a segment, which begins where the one before ended."""
    lines = list(_lines(path))
    header = next((i for i, (_, parts) in enumerate(lines) if parts[0] == "#"), None)
    if header is None:
        raise LabelError(f"{path}: no line '#' before the labels; expected an xlabel (ESPS / xwaves) file")
    rows, before = [], "0"
    for number, parts in lines[header + 1 :]:
        if len(parts) < 2:
            raise LabelError(f"{path}:{number}: got {len(parts)} fields; expected 'end colour value'")
        rows.append(_segment(f"{path}:{number}", before, parts[0], " ".join(parts[2:]).rstrip(";")))
        before = parts[0]
    return rows


def read_textgrid(path: str | Path, tier: str | None = None) -> list[Segment]:
    """Intervals of one tier of a Praat TextGrid, in the long or the short text format; empty ones are left out.

    tier : its name; may be left out where there is one interval tier only. Raises LabelError with the tiers there are.
    """
    # The numbers of items, as in `intervals [3]:`, are no values; only strings may hold anything.
    tokens = [t for t in _TOKEN.findall(_text(Path(path))) if not t.startswith("[")]
    if tokens[:2] != ['"ooTextFile"', '"TextGrid"'] or "<exists>" not in tokens:
        raise LabelError(f"{path}: is not a Praat TextGrid in text form; expected one saved as text (long or short)")
    at = tokens.index("<exists>") + 1
    tiers: dict[str, list[Segment]] = {}
    points: list[str] = []
    try:
        count, at = int(tokens[at]), at + 1
        for _ in range(count):
            sort, name, size = tokens[at].strip('"'), _unquote(tokens[at + 1]), int(tokens[at + 4])
            at += 5
            step = 3 if sort == "IntervalTier" else 2
            rows = [tokens[at + i * step : at + (i + 1) * step] for i in range(size)]
            at += size * step
            if sort != "IntervalTier":
                points.append(name)
                continue
            kept = tiers.setdefault(name, [])
            for start, end, value in rows:
                if _unquote(value).strip():
                    kept.append(_segment(str(path), start, end, _unquote(value).strip()))
    except (IndexError, ValueError) as error:
        if isinstance(error, LabelError):
            raise
        raise LabelError(f"{path}: ends in the middle of a tier; expected a whole TextGrid: save it again") from error
    chosen = tier if tier is not None else next(iter(tiers), None) if len(tiers) == 1 else None
    if chosen not in tiers:
        extra = f" (point tiers, which have no length: {', '.join(points)})" if points else ""
        raise LabelError(f"{path}: got tier '{tier}'; expected one of {', '.join(tiers) or 'none'}{extra}")
    return tiers[chosen]


def _unquote(token: str) -> str:
    return token[1:-1].replace('""', '"')


def read_table(path: str | Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a csv (comma or semicolon) or tsv file with a header line."""
    path = Path(path)
    text = _text(path)
    header = text.split("\n", 1)[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" or "\t" in header else max(",;", key=header.count)
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    columns = [c.strip() for c in reader.fieldnames or []]
    rows = []
    for number, row in enumerate(reader, 2):
        if None in row or None in row.values():
            raise LabelError(
                f"{path}:{number}: has not the {len(columns)} fields of the header; expected one for each column"
            )
        rows.append({k.strip(): v.strip() for k, v in row.items()})
    if not rows:
        raise LabelError(f"{path}: holds no row below the header; expected one per utterance or segment")
    return columns, rows


def _table(path: Path, column: str | None) -> _Found:
    columns, rows = read_table(path)
    key = next((c for c in columns if c.lower() in _ID_COLUMNS), columns[0])
    others = [c for c in columns if c != key]
    if column is None or column not in columns:
        raise LabelError(f"{path}: got column '{column}'; expected {path.name}:COLUMN with one of {', '.join(others)}")
    if "start" in columns and ("end" in columns or "duration" in columns):
        last = "end" if "end" in columns else "duration"
        timed: dict[str, list[Segment]] = {}
        for number, row in enumerate(rows, 2):
            if row[column]:
                segment = _segment(
                    f"{path}:{number}", row["start"], row[last], row[column], duration=last == "duration"
                )
                timed.setdefault(row[key], []).append(segment)
        return dict(timed)
    found: _Found = {}
    for number, row in enumerate(rows, 2):
        if found.setdefault(row[key], row[column]) != row[column]:
            raise LabelError(
                f"{path}:{number}: '{row[key]}' has two values, {found[row[key]]} and {row[column]}; expected one"
            )
    return found


# -- names of utterances ---------------------------------------------------------------------------------------------
def match_names(names: Sequence[str], utterances: Sequence[str], what: str = "labels") -> tuple[dict[str, str], str]:
    """Which label belongs to which recording: ({name in the labels: id of the recording}, the rule that found them).

    Names are compared as they are, without the audio file's ending, and by the last part of the path where that is
    unique. Raises LabelError showing both sides where none fits.

    >>> match_names(["r1_a.wav", "r1_b.wav"], ["r1/r1_a", "r1/r1_b"])
    ({'r1_a.wav': 'r1/r1_a', 'r1_b.wav': 'r1/r1_b'}, 'the file name without its ending')
    """
    rules = {
        "the whole id": (lambda n: n, lambda u: u),
        "the id without its ending": (_bare, lambda u: u),
        "the file name without its ending": (lambda n: _bare(n).rsplit("/", 1)[-1], lambda u: u.rsplit("/", 1)[-1]),
    }
    best: tuple[dict[str, str], str] = ({}, "")
    for rule, (left, right) in rules.items():
        keys: dict[str, list[str]] = {}
        for u in utterances:
            keys.setdefault(right(u), []).append(u)
        lefts = Counter(left(n) for n in names)
        found = {n: keys[left(n)][0] for n in names if lefts[left(n)] == 1 and len(keys.get(left(n), ())) == 1}
        if len(found) > len(best[0]):
            best = found, rule
    if not best[0]:
        raise LabelError(
            f"{what}: none of {len(names)} names fits one of {len(utterances)} recordings: the labels have "
            f"{', '.join(map(repr, list(names)[:2]))}, the recordings are {', '.join(map(repr, utterances[:2]))}; "
            "expected equal ids or equal file names: give ids in a list file (id <tab> path) or change the label file"
        )
    return best


def _bare(name: str) -> str:
    name = name.replace("\\", "/").removeprefix("./")
    return re.sub(r"\.(wav|flac|ogg|mp3|aiff|aif|au|w64|sph|opus|m4a)$", "", name, flags=re.IGNORECASE)


def speakers_of(utterances: Sequence[str]) -> dict[str, str]:
    """Speaker of every recording from its id (its path below the corpus folder), by one rule for all of them.

    VoxCeleb's `id00012/<video>/<file>` gives that part; else the first folder. Raises LabelError where the recordings
    do not all look the same way, or lie in no folder.

    >>> speakers_of(["anna/1", "ben/x/2"])
    {'anna/1': 'anna', 'ben/x/2': 'ben'}
    """
    vox = {u: m.group(1) for u in utterances if (m := _VOXCELEB.search(u))}
    if len(vox) == len(utterances) and vox:
        return vox
    if vox:
        other = next(u for u in utterances if u not in vox)
        raise LabelError(
            f"{len(vox)} of {len(utterances)} recordings lie as VoxCeleb's ({next(iter(vox))}), others do not "
            f"({other}); expected one layout: state the speakers with --labels FILE:speaker"
        )
    flat = [u for u in utterances if "/" not in u]
    if flat:
        raise LabelError(
            f"{len(flat)} of {len(utterances)} recordings lie in no folder, first '{flat[0]}'; expected "
            "SPEAKER/FILE for every one: state the speakers with --labels FILE:speaker"
        )
    return {u: u.split("/", 1)[0] for u in utterances}


def path_labels(spec: LabelSpec, utterances: Sequence[str]) -> Labels:
    """Labels `path:speaker`."""
    if spec.column not in (None, "speaker"):
        raise LabelError(f"got labels 'path:{spec.column}'; expected path:speaker")
    name = spec.name if spec.name != "path" else "speaker"
    return Labels(name, "path:speaker", spec.unit or "utterance", utterances=speakers_of(utterances))
