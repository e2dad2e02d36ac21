"""Audio SNIPS: spoken commands with slots (slot filling)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s3prl_speaker_upstreams.compat.ctc_corpus._common import Bucketed, audio_files
from s3prl_speaker_upstreams.errors import ConfigError

__all__ = ["SnipsDataset"]

logger = logging.getLogger(__name__)


class SnipsDataset(Bucketed):
    """``path/split/**/SPEAKER-....wav`` with one list for all of ``path``.

    The list is ``all.iob.snips.txt`` (``ID BOS words EOS<tab>O labels intent``) for the slot encoders, else
    ``all-trans.txt`` (``ID words``). ``{split}_speakers`` in the configuration names the speakers that count: an
    utterance does if its name begins with one of them.
    Raises ConfigError for a missing list, or if no utterance is left.
    """

    def __init__(
        self,
        split: Sequence[str] | str,
        tokenizer: Any,
        bucket_size: int,
        path: str,
        num_workers: int = 12,
        ascending: bool = False,
        **kwargs: Any,
    ) -> None:
        self.path = path
        splits = [split] if type(split) is str else list(split)
        key = f"{splits[0]}_speakers"
        if key not in kwargs:
            raise ConfigError(f"snips: got no corpus.{key}; expected the list of speakers of split {splits[0]!r}")
        self.speaker_list = kwargs[key]
        source = Path(path) / ("all.iob.snips.txt" if "-slot" in tokenizer.token_type else "all-trans.txt")
        if not source.is_file():
            raise ConfigError(f"{source}: no such file; expected the transcripts of Audio SNIPS; check corpus.path")
        texts = {}
        with open(source, encoding="utf-8") as lines:
            for line in lines:
                name, _, text = line.strip().partition(" ")
                texts[name] = text
        files = audio_files(path, splits, ".wav")
        named = {file: file.name.split(".wav", 1)[0] for file in files}
        unknown = [file for file in files if named[file] not in texts]
        if unknown:
            logger.warning("%d of %d audio files have no line in %s and are left out", len(unknown), len(files), source)
        speakers = tuple(self.speaker_list)
        chosen = [file for file in files if named[file] in texts and named[file].startswith(speakers)]
        if not chosen:
            raise ConfigError(
                f"{Path(path) / splits[0]}: got {len(files)} wav files, none of speakers {list(speakers)} with a "
                f"line in {source.name}; check corpus.{key}"
            )
        super().__init__(
            [(file, tokenizer.encode(texts[named[file]])) for file in chosen], bucket_size, ascending=ascending
        )
