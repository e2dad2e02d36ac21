"""LibriSpeech with its transcripts as characters or words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from s3prl_speaker_upstreams.compat.ctc_corpus._common import Bucketed, audio_files, transcripts_beside

__all__ = ["LibriDataset"]


class LibriDataset(Bucketed):
    """``path/split/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac`` with ``SPEAKER-CHAPTER.trans.txt`` beside.

    split : folder names such as ``["train-clean-100"]``
    tokenizer : s3prl's text encoder
    """

    def __init__(
        self, split: Sequence[str], tokenizer: Any, bucket_size: int, path: str, ascending: bool = False, **kwargs: Any
    ) -> None:
        self.path = path
        files = audio_files(path, split, ".flac")
        texts = transcripts_beside(files)
        super().__init__([(file, tokenizer.encode(texts[file])) for file in files], bucket_size, ascending=ascending)
