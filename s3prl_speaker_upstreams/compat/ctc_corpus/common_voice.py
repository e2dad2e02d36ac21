"""Common Voice and SBCSAE after s3prl's preprocessing: lists of files and sentences."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from typing import Any

from s3prl_speaker_upstreams.compat.ctc_corpus._common import Bucketed

__all__ = ["CommonVoiceDataset"]


class CommonVoiceDataset(Bucketed):
    """Tab-separated lists with a header line: path below ``path``, sentence.

    split : list files; the order in them is kept
    ratio, offset : below 1, every ``int(1 / ratio)``-th line from `offset` on
    """

    def __init__(
        self,
        split: Sequence[str],
        tokenizer: Any,
        bucket_size: int,
        path: str,
        ascending: bool = False,
        ratio: float = 1.0,
        offset: int = 0,
        **kwargs: Any,
    ) -> None:
        self.path = path
        utterances = []
        for source in split:
            with open(source, encoding="utf-8", newline="") as lines:
                rows = csv.reader(lines, delimiter="\t")
                next(rows, None)
                utterances += [(os.path.join(path, row[0]), tokenizer.encode(row[1])) for row in rows]
        if ratio < 1.0:
            utterances = utterances[offset :: int(1.0 / ratio)]
        super().__init__(utterances, bucket_size)
        # the lists are sorted by length of audio already
        self.file_list = [file for file, _ in utterances]  # type: ignore[assignment]
        self.text = [tokens for _, tokens in utterances]  # type: ignore[assignment]
