"""How corpora lie on disk: what several tasks' checks share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from s3prl_speaker_upstreams.common.audio import find_audio
from s3prl_speaker_upstreams.superb.errors import CorpusError

__all__ = ["Layout", "audio", "files", "first_file", "librispeech", "lines", "need", "shipped", "text", "voxceleb"]

LIBRISPEECH_SPLITS = ("train-clean-100", "dev-clean", "test-clean")
LIBRISPEECH_COUNTS = {"train-clean-100": 28539, "dev-clean": 2703, "test-clean": 2620}


@dataclass(frozen=True)
class Layout:
    """What one task reads of a corpus.

    splits : part -> its recordings
    tables : texts that it reads beside them (transcripts, labels, lists)
    """

    splits: dict[str, list[Path]]
    tables: list[Path] = field(default_factory=list)

    @property
    def recordings(self) -> list[Path]:
        """All recordings, part by part."""
        return [path for paths in self.splits.values() for path in paths]


def need(root: Path, *names: str) -> None:
    """Raise CorpusError that says which of `names` are not below `root`, and what is."""
    absent = [name for name in names if not (root / name).exists()]
    if absent:
        there = sorted(path.name for path in root.iterdir())[:8]
        raise CorpusError(f"{root}: no {', '.join(absent)} in it; it holds {', '.join(there) or 'nothing'}")


def audio(folder: Path, *suffixes: str) -> list[Path]:
    """Recordings of those suffixes in or below `folder`, sorted; links to folders are followed, hidden files left out.

    Raises CorpusError if there is none.
    """
    found = [path for path in find_audio(folder) if path.suffix.lower() in suffixes] if folder.is_dir() else []
    if not found:
        raise CorpusError(f"{folder}: no {' or '.join(suffixes)} file in it or below")
    return found


def files(folder: Path, pattern: str = "*") -> list[Path]:
    """Files of `folder` whose names match, sorted; hidden ones (macOS's ``._a.txt``) left out."""
    return sorted(path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith("."))


def text(path: Path) -> str:
    """A list's text, without the byte order mark that some editors put in front."""
    return path.read_text(encoding="utf-8-sig")


def lines(path: Path) -> list[str]:
    """Lines of a text that are not blank."""
    return [line for line in text(path).splitlines() if line.strip()]


def first_file(*places: Path | None) -> Path | None:
    """The first of `places` that is a file."""
    return next((place for place in places if place is not None and place.is_file()), None)


def shipped(s3prl_root: Path | None, *parts: str) -> Path | None:
    """A file of s3prl's downstream folders in a checkout, if one was given."""
    return None if s3prl_root is None else s3prl_root.joinpath("s3prl", "downstream", *parts)


def librispeech(root: Path) -> Layout:
    """LibriSpeech's 100 hours (PR, ASR): each recording must have its transcript."""
    need(root, *LIBRISPEECH_SPLITS)
    found = {split: audio(root / split, ".flac") for split in LIBRISPEECH_SPLITS}
    tables = []
    for split, recordings in found.items():
        by_folder: dict[Path, set[str]] = {}
        for file in recordings:
            by_folder.setdefault(file.parent, set()).add(file.stem)
        for folder, stems in sorted(by_folder.items()):
            table = folder / f"{folder.parent.name}-{folder.name}.trans.txt"
            if not table.is_file():
                raise CorpusError(f"{table}: the transcripts of {split} are not there; extract the corpus again")
            known = {line.split(" ", 1)[0] for line in table.read_text(encoding="utf-8").splitlines()}
            missing = sorted(stems - known)
            if missing:
                raise CorpusError(f"{table}: no transcript of {missing[0]} ({len(missing)} such); extract it again")
            tables.append(table)
    return Layout(found, tables)


def voxceleb(root: Path, *lists: str) -> Layout:
    """VoxCeleb1 (SID, ASV), with those of `lists` that lie in its folder."""
    need(root, "dev/wav", "test/wav")
    found = {part: audio(root / part / "wav", ".wav") for part in ("dev", "test")}
    known = {f"id{number}" for number in range(10001, 11252)}
    strange = sorted({path.parts[-3] for paths in found.values() for path in paths} - known)
    if strange:
        raise CorpusError(
            f"{root}: speaker folder {strange[0]!r} ({len(strange)} such); expected id10001 to id11251, as VoxCeleb1 "
            "names them: dev/wav/id10001/VIDEO/00001.wav"
        )
    return Layout(found, [root / name for name in lists if (root / name).is_file()])
