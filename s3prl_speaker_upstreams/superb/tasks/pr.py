"""PR: phoneme recognition on LibriSpeech 100 h."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s3prl_speaker_upstreams.common.files import write_text
from s3prl_speaker_upstreams.superb.errors import CorpusError
from s3prl_speaker_upstreams.superb.layouts import (
    LIBRISPEECH_COUNTS,
    LIBRISPEECH_SPLITS,
    Layout,
    files,
    librispeech,
    shipped,
)
from s3prl_speaker_upstreams.superb.task import EDITDISTANCE, STEPS, TENSORBOARD, Metric, Task

__all__ = ["PHONES", "TASK"]

_VOWELS = ("AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW")
_CONSONANTS = (
    *("B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N", "NG", "P"),
    *("R", "S", "SH", "T", "TH", "V", "W", "Y", "Z", "ZH"),
)
PHONES = (
    "SIL",
    "SPN",
    *sorted([*_CONSONANTS, *(f"{vowel}{stress}" for vowel in _VOWELS for stress in "012")]),
)
"""PR's classes: silence, spoken noise and the CMU dictionary's phones with lexical stress, in alphabetical order."""


class _PhonemeRecognition(Task):
    def layout(self, root: Path) -> Layout:
        found = librispeech(root)
        return Layout(found.splits, [*found.tables, *files(root / "lexicon", "*.txt")])

    def settings(self, data: Path, prepared: Path) -> dict[str, Any]:
        return {
            "downstream_expert.corpus.path": str(data),
            "downstream_expert.corpus.lexicon": sorted(map(str, (prepared / "lexicon").glob("*.txt"))),
            "downstream_expert.text.vocab_file": str(prepared / "phoneme.txt"),
        }

    def prepare(self, data: Path, out: Path, s3prl_root: Path | None) -> None:
        places = [data / "lexicon", shipped(s3prl_root, "ctc", "lexicon")]
        lexica = next((found for place in places if place and (found := files(place, "*.txt"))), None)
        if lexica is None:
            raise CorpusError(
                f"{data}/lexicon: no lexicon (*.txt). PR needs librispeech-lexicon-200k-g2p.txt and "
                "librispeech-lexicon-allothers-g2p.txt, which lie in s3prl's repository in "
                "s3prl/downstream/ctc/lexicon: put them into that folder, or give a checkout with --s3prl-root"
            )
        words: set[str] = set()
        for lexicon in lexica:
            rows = lexicon.read_text(encoding="utf-8").splitlines()
            for number, line in enumerate(rows, 1):
                word, *phones = line.split() or [""]
                strange = sorted(set(phones) - set(PHONES))
                if strange or not phones:
                    raise CorpusError(f"{lexicon}:{number}: {line!r} is not WORD PHONE PHONE...; unknown {strange}")
                words.add(word)
            write_text(out / "lexicon" / lexicon.name, "\n".join(rows) + "\n")
        _all_words_known(data, words)
        write_text(out / "phoneme.txt", "\n".join(PHONES) + "\n")


def _all_words_known(data: Path, words: set[str]) -> None:
    for text in librispeech(data).tables:
        for line in text.read_text(encoding="utf-8").splitlines():
            absent = [word for word in line.split()[1:] if word not in words]
            if absent:
                raise CorpusError(f"{text}: word {absent[0]!r} is in no lexicon; PR needs both lexicon files")


TASK = _PhonemeRecognition(
    name="PR",
    title="phoneme recognition",
    order=10,
    downstream="ctc",
    corpus=f"LibriSpeech {', '.join(LIBRISPEECH_SPLITS)} (openslr.org/12), and the two files "
    "librispeech-lexicon-*-g2p.txt of s3prl's repository (s3prl/downstream/ctc/lexicon) in DATA/lexicon",
    packages=(TENSORBOARD, EDITDISTANCE),
    metrics=(
        Metric(
            *("PER", "per", 100.0, False, "PR_per_public", (82.01, 3.53)),
            {
                "FBANK": 82.01,
                "wav2vec 2.0 Base": 5.74,
                "wav2vec 2.0 Large": 4.75,
                "HuBERT Base": 5.41,
                "HuBERT Large": 3.53,
            },
        ),
    ),
    smoke={**STEPS, "downstream_expert.corpus.batch_size": 2, "runner.gradient_accumulate_steps": 1},
    workers="downstream_expert.corpus.num_workers",
    batch="downstream_expert.corpus.batch_size",
    best_is_higher=False,
    walks=True,
    predictions=(("test-hyp.ark", "pr_public/predict.ark"),),
    counts=LIBRISPEECH_COUNTS,
    checkpoint_mb=10,
)
