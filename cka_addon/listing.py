"""Lists of recordings: one format for this package and for s3prl_speaker_upstreams' pre-training.

A line is one of

    path                     blanks in names are allowed
    id<TAB>path              also with blanks between them (Kaldi's wav.scp)
    speaker<TAB>path         where the first words repeat, they are speakers and the ids come from the paths
    {"key": .., "wav": ..}   WeSpeaker's raw.list ("spk": who speaks)

or the file is a table (.csv, .tsv, or a first line of column names) with a column path / wav / file and, where there
are, id / key / utt and speaker / spk. Blank lines and lines that begin with # are skipped; relative paths begin in the
list's folder. Text is UTF-8, with or without byte order mark, or UTF-16 with one.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cka_addon.errors import AudioError

_PATH = ("path", "wav", "wav_path", "file", "filename", "filepath", "file_path", "audio", "audio_path")
_ID = ("id", "key", "utt", "utt_id", "utterance", "utterance_id")
_SPEAKER = ("speaker", "spk", "spk_id", "speaker_id", "speakerid")


@dataclass(frozen=True)
class Listed:
    """A recording as a list names it. speaker : where the list says who speaks"""

    id: str
    path: Path
    speaker: str | None = None


def read_text(path: str | Path) -> str:
    """Text of a list or a table of labels. Raises AudioError where it is neither UTF-8 nor marked UTF-16."""
    data = Path(path).read_bytes()
    marks = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    encoding = next((name for mark, name in marks.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise AudioError(
            f"{path}:{line}: got text that is not UTF-8 (GBK or Latin-1?); save it as UTF-8, e.g. "
            f"iconv -f GBK -t UTF-8 {Path(path).name}"
        ) from error
    if "\0" in text:
        raise AudioError(f"{path}: got binary data or UTF-16 without its mark; expected text in UTF-8, one path a line")
    return text


def read_list(path: Path, suffixes: Sequence[str]) -> list[Listed]:
    """The recordings of a list file, in its order. suffixes : endings of recordings, in lower case.

    Raises AudioError with the number of the line where a file does not exist or a line cannot be understood.
    """
    lines = [(n, line.strip()) for n, line in enumerate(read_text(path).splitlines(), 1)]
    lines = [(n, line) for n, line in lines if line and not line.startswith("#")]
    if not lines:
        raise AudioError(f"{path}: holds no path; expected one recording per line")
    rows = _table(path, lines) or [(n, *_split(line, path, suffixes)) for n, line in lines]
    first = [name for _, name, _, _ in rows if name]
    repeated = len(set(first)) < len(first)
    found = []
    for number, name, file, speaker in rows:
        target = Path(file).expanduser()
        target = target if target.is_absolute() else path.parent / target
        if not target.is_file():
            raise AudioError(f"{path}:{number}: {target} does not exist; expected the path of a recording")
        if speaker is None and name and repeated:
            name, speaker = "", name
        found.append(Listed(name or Path(file).with_suffix("").as_posix(), target, speaker))
    return found


def _split(line: str, path: Path, suffixes: Sequence[str]) -> tuple[str, str, str | None]:
    """(first word or "", path, speaker) of one line."""
    if line.startswith("{"):
        try:
            item = json.loads(line)
            return str(item["key"]), str(item["wav"]), str(item["spk"]) if "spk" in item else None
        except (ValueError, KeyError, TypeError) as error:
            raise AudioError(f'{path}: got {line[:60]}; expected {{"key": .., "wav": ..}} ({error!r})') from error
    if path.suffix.lower() == ".csv" and "\t" not in line:  # without column names
        separator = ";" if ";" in line and "," not in line else ","
        cells = next(csv.reader(io.StringIO(line), delimiter=separator, skipinitialspace=True))
        line = "\t".join(cell.strip() for cell in cells if cell.strip())
    name, tab, file = line.rpartition("\t")
    if tab:
        # `path<TAB>speaker`, the other way about, where only the first is a recording's name.
        if name.strip().lower().endswith(tuple(suffixes)) and not file.strip().lower().endswith(tuple(suffixes)):
            return file.strip(), name.strip(), None
        return name.strip(), file.strip(), None
    if " " in line and not (path.parent / line).is_file():
        word, _, rest = line.partition(" ")
        start, _, end = line.rpartition(" ")
        if rest.strip().lower().endswith(tuple(suffixes)):
            return word, rest.strip(), None
        if start.strip().lower().endswith(tuple(suffixes)):
            return end, start.strip(), None
    return "", line, None


def _table(path: Path, lines: list[tuple[int, str]]) -> list[tuple[int, str, str, str | None]] | None:
    """(line, id, path, speaker) of a table with column names, or None where the file is none."""
    head = lines[0][1]
    separator = next((s for s in "\t,;" if s in head), None)
    columns = [c.strip().strip('"').lower() for c in head.split(separator)] if separator else [head.lower()]
    at = {kind: next((columns.index(c) for c in names if c in columns), None) for kind, names in _KINDS.items()}
    place = at["path"]
    if separator is None or place is None:
        return None
    rows = []
    for number, line in lines[1:]:
        cells = [c.strip() for c in next(csv.reader(io.StringIO(line), delimiter=separator, skipinitialspace=True))]
        if len(cells) != len(columns):
            raise AudioError(f"{path}:{number}: got {len(cells)} columns; expected {len(columns)} ({head})")
        name, speaker = (cells[i] if (i := at[kind]) is not None else None for kind in ("id", "speaker"))
        rows.append((number, name or "", cells[place], speaker))
    return rows


_KINDS = {"path": _PATH, "id": _ID, "speaker": _SPEAKER}
