"""LibriSpeech with its transcripts as phonemes, through pronunciation lexicons (phoneme recognition)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from s3prl_speaker_upstreams.compat.ctc_corpus._common import Bucketed, audio_files, transcripts_beside
from s3prl_speaker_upstreams.errors import ConfigError

__all__ = ["LibriPhoneDataset", "read_lexicons"]

logger = logging.getLogger(__name__)


def read_lexicons(files: Sequence[str], phonemes: Sequence[str]) -> dict[str, str]:
    """Word -> its phonemes, separated by spaces; the first of several pronunciations counts.

    files : text files of ``WORD PHONEME PHONEME ...`` lines, earlier files first
    phonemes : all that the vocabulary knows
    Raises ConfigError for a phoneme outside the vocabulary.
    """
    known = set(phonemes)
    words: dict[str, str] = {}
    again = 0
    for file in files:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                word, *spoken = line.split() or [""]
                if not word:
                    continue
                unknown = [phoneme for phoneme in spoken if phoneme not in known]
                if unknown:
                    raise ConfigError(
                        f"{file}:{number}: got phoneme {unknown[0]!r} of {word!r}, not in text.vocab_file; "
                        "use the lexicon and the vocabulary of the same source"
                    )
                again += word in words
                words.setdefault(word, " ".join(spoken))
    if again:
        logger.info("%d further pronunciations in the lexicons were passed over; the first of each word counts", again)
    return words


class LibriPhoneDataset(Bucketed):
    """LibriSpeech's layout (see ``librispeech.py``) and lexicon files.

    Raises ConfigError for a word that no lexicon has.
    """

    def __init__(
        self,
        split: Sequence[str],
        tokenizer: Any,
        bucket_size: int,
        path: str,
        lexicon: Sequence[str],
        ascending: bool = False,
        **kwargs: Any,
    ) -> None:
        self.path = path
        words = read_lexicons(lexicon, tokenizer._vocab_list)
        files = audio_files(path, split, ".flac")
        utterances = []
        for file, text in transcripts_beside(files).items():
            missing = [word for word in text.split() if word not in words]
            if missing:
                raise ConfigError(
                    f"{file}: got word {missing[0]!r}, which none of the lexicons {list(lexicon)} has; "
                    "add the lexicon of words outside the main one"
                )
            utterances.append((file, tokenizer.encode(" ".join(words[word] for word in text.split()))))
        super().__init__(utterances, bucket_size, ascending=ascending)
