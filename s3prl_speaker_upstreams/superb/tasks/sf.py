"""SF: slot filling on Audio SNIPS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s3prl_speaker_upstreams.common.files import write_text
from s3prl_speaker_upstreams.superb.errors import CorpusError
from s3prl_speaker_upstreams.superb.layouts import Layout, audio, need
from s3prl_speaker_upstreams.superb.task import EDITDISTANCE, STEPS, TENSORBOARD, Metric, Task, small_rnn

__all__ = ["CHARACTERS", "TASK"]

CHARACTERS = (" ", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "'")
"""SF's characters, before its slot tokens."""


class _SlotFilling(Task):
    def layout(self, root: Path) -> Layout:
        texts = ("all.iob.snips.txt", "slots.txt")
        need(root, "train", "valid", "test", *texts)
        found = {split: audio(root / split, ".wav") for split in ("train", "valid", "test")}
        rows = (root / "all.iob.snips.txt").read_text(encoding="utf-8").splitlines()
        known = {line.split(" ", 1)[0] for line in rows}
        for split, files in found.items():
            if not known & {file.stem for file in files}:
                raise CorpusError(
                    f"{root}/all.iob.snips.txt: no line for any recording of {split}, first {files[0].stem}"
                )
        return Layout(found, [root / name for name in texts])

    def settings(self, data: Path, prepared: Path) -> dict[str, Any]:
        return {
            "downstream_expert.corpus.path": str(data),
            "downstream_expert.text.vocab_file": str(prepared / "character.txt"),
            "downstream_expert.text.slots_file": str(data / "slots.txt"),
        }

    def prepare(self, data: Path, out: Path, s3prl_root: Path | None) -> None:
        write_text(out / "character.txt", "".join(f"{character}\n" for character in CHARACTERS))


TASK = _SlotFilling(
    name="SF",
    title="slot filling",
    order=90,
    downstream="ctc",
    corpus="Audio SNIPS, linked from s3prl's docs (train/, valid/, test/, all.iob.snips.txt, slots.txt)",
    packages=(TENSORBOARD, EDITDISTANCE),
    metrics=(
        Metric(
            *("Slot-F1", "slot_type_f1", 100.0, True, "SF_f1_public", (69.64, 89.81)),
            {
                "FBANK": 69.64,
                "wav2vec 2.0 Base": 88.3,
                "wav2vec 2.0 Large": 87.11,
                "HuBERT Base": 88.53,
                "HuBERT Large": 89.81,
            },
        ),
        Metric(
            *("Slot-CER", "slot_value_cer", 100.0, False, "SF_cer_public", (52.94, 21.76)),
            {
                "FBANK": 52.94,
                "wav2vec 2.0 Base": 24.77,
                "wav2vec 2.0 Large": 27.31,
                "HuBERT Base": 25.2,
                "HuBERT Large": 21.76,
            },
        ),
    ),
    smoke={**STEPS, "downstream_expert.corpus.batch_size": 2, **small_rnn("downstream_expert.model")},
    workers="downstream_expert.corpus.num_workers",
    batch="downstream_expert.corpus.batch_size",
    walks=True,
    predictions=(("test-hyp.ark", "sf_public/predict.ark"),),
    checkpoint_mb=550,
)
