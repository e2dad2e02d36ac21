"""Kaldi tables of parallel recordings, as the loaders of SE and SS read them."""

from __future__ import annotations

from pathlib import Path

from s3prl_speaker_upstreams.common.files import write_text
from s3prl_speaker_upstreams.superb.errors import CorpusError

__all__ = ["no_blanks", "write_tables"]


def write_tables(out: Path, condition: str, files: dict[str, Path]) -> None:
    """Write ``OUT/CONDITION/{wav.scp,utt2spk,spk2utt}`` of recordings by name."""
    write_text(out / condition / "wav.scp", "".join(f"{name} {path}\n" for name, path in sorted(files.items())))
    for table in ("utt2spk", "spk2utt"):
        write_text(out / condition / table, "".join(f"{name} {name}\n" for name in sorted(files)))


def no_blanks(path: Path) -> None:
    """Raise CorpusError if the path holds blanks, at which s3prl splits the tables."""
    if len(str(path).split()) != 1:
        raise CorpusError(f"{path}: s3prl splits Kaldi tables at blanks, so the path must hold none; use a link to it")
