"""ASR: character CTC on LibriSpeech 100 h, without language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import soundfile

from s3prl_speaker_upstreams.common.files import write_text
from s3prl_speaker_upstreams.superb.layouts import LIBRISPEECH_COUNTS, LIBRISPEECH_SPLITS, Layout, librispeech
from s3prl_speaker_upstreams.superb.task import EDITDISTANCE, STEPS, TENSORBOARD, Metric, Task, small_rnn

__all__ = ["LETTERS", "TASK"]

LETTERS = "|ETAONIHSRDLUMCWFGYPBVK'XJQZ"
"""ASR's characters, by falling frequency in LibriSpeech; ``|`` ends a word."""


class _SpeechRecognition(Task):
    def layout(self, root: Path) -> Layout:
        return librispeech(root)

    def settings(self, data: Path, prepared: Path) -> dict[str, Any]:
        return {
            "downstream_expert.datarc.libri_root": str(data),
            "downstream_expert.datarc.bucket_file": str(prepared / "len_for_bucket"),
            "downstream_expert.datarc.dict_path": str(prepared / "char.dict"),
        }

    def prepare(self, data: Path, out: Path, s3prl_root: Path | None) -> None:
        # the counts that fairseq's format asks for play no part; the order gives the classes
        write_text(out / "char.dict", "".join(f"{letter} {len(LETTERS) - i}\n" for i, letter in enumerate(LETTERS)))
        for split, files in librispeech(data).splits.items():
            rows = [(soundfile.info(str(file)).frames, file) for file in files]
            rows.sort(key=lambda row: row[0], reverse=True)
            table = [",file_path,length,label\n"]
            table += [f"{i},{file.relative_to(data)},{frames},\n" for i, (frames, file) in enumerate(rows)]
            write_text(out / "len_for_bucket" / f"{split}.csv", "".join(table))


TASK = _SpeechRecognition(
    name="ASR",
    title="speech recognition",
    order=20,
    downstream="asr",
    corpus=f"LibriSpeech {', '.join(LIBRISPEECH_SPLITS)} (openslr.org/12)",
    packages=(TENSORBOARD, EDITDISTANCE),
    metrics=(
        Metric(
            *("WER", "wer", 1.0, False, "ASR_wer_public", (23.18, 3.62)),
            {
                "FBANK": 23.18,
                "wav2vec 2.0 Base": 6.43,
                "wav2vec 2.0 Large": 3.75,
                "HuBERT Base": 6.42,
                "HuBERT Large": 3.62,
            },
        ),
    ),
    smoke={
        **STEPS,
        "downstream_expert.datarc.batch_size": 2,
        "downstream_expert.datarc.train_batch_size": 2,
        **small_rnn("downstream_expert.modelrc"),
    },
    batch="downstream_expert.datarc.train_batch_size",
    best="dev-clean-best.ckpt",
    best_is_higher=False,
    test_split="test-clean",
    dev_split="dev-clean",
    predictions=(("test-clean-noLM-hyp.ark", "asr_public/predict.ark"),),
    counts=LIBRISPEECH_COUNTS,
    checkpoint_mb=550,
)
