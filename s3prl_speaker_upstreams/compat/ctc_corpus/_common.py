"""What the corpora share: utterances sorted by the length of their text, handed out singly or in buckets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from s3prl_speaker_upstreams.errors import ConfigError

__all__ = ["Bucketed", "audio_files", "transcripts_beside"]

Utterance = tuple[Any, list[int]]


class Bucketed(Dataset):
    """Pairs of (audio path, token numbers), longest text first.

    bucket_size : 1 gives one pair per index; above 1 a list of that many neighbours, so that a batch has like lengths
                  (the last start is moved back to fill the bucket)
    """

    def __init__(self, utterances: Sequence[Utterance], bucket_size: int, *, ascending: bool = False) -> None:
        ordered = sorted(utterances, key=lambda utterance: len(utterance[1]), reverse=not ascending)
        self.bucket_size = bucket_size
        self.file_list = tuple(path for path, _ in ordered)
        self.text = tuple(tokens for _, tokens in ordered)

    def __getitem__(self, index: int) -> Utterance | list[Utterance]:
        if self.bucket_size <= 1:
            return self.file_list[index], self.text[index]
        # A corpus smaller than one bucket gives a negative start, and so fewer utterances than it has. A checkout of
        # s3prl does the same, and batches must be the same there and here: choose corpus.batch_size accordingly.
        start = min(len(self.file_list) - self.bucket_size, index)
        stop = start + self.bucket_size
        return list(zip(self.file_list[start:stop], self.text[start:stop], strict=True))

    def __len__(self) -> int:
        return len(self.file_list)


def audio_files(root: str, splits: Sequence[str], suffix: str) -> list[Path]:
    """All files with `suffix` under ``root/split``, split by split. Raises ConfigError for a split without any."""
    found: list[Path] = []
    for split in splits:
        folder = Path(root) / split
        files = list(folder.rglob(f"*{suffix}"))
        if not files:
            raise ConfigError(
                f"{folder}: got no {suffix} file; expected the audio of split {split!r}; "
                "check corpus.path and the split's name"
            )
        found += files
    return found


def transcripts_beside(files: Sequence[Path]) -> dict[Path, str]:
    """LibriSpeech's text for each ``SPEAKER-CHAPTER-NUMBER.flac``, from ``SPEAKER-CHAPTER.trans.txt`` beside it.

    Raises ConfigError for a missing list or line.
    """
    lists: dict[Path, dict[str, str]] = {}
    texts = {}
    for file in files:
        source = file.with_name(file.stem.rpartition("-")[0] + ".trans.txt")
        if source not in lists:
            if not source.is_file():
                raise ConfigError(
                    f"{source}: no such transcript; expected one beside {file.name}; unpack LibriSpeech again"
                )
            lines = (line.rstrip("\n").partition(" ") for line in source.read_text(encoding="utf-8").splitlines())
            lists[source] = {name: text for name, _, text in lines}
        if file.stem not in lists[source]:
            raise ConfigError(
                f"{source}: got no line for {file.stem}; expected one per audio file; unpack LibriSpeech again"
            )
        texts[file] = lists[source][file.stem]
    return texts
