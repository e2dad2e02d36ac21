"""IC: intent classification on Fluent Speech Commands; all three slots must be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s3prl_speaker_upstreams.superb.errors import CorpusError
from s3prl_speaker_upstreams.superb.layouts import Layout, need
from s3prl_speaker_upstreams.superb.task import STEPS, TENSORBOARD, Metric, Task

__all__ = ["TASK"]

_SLOTS = ("action", "object", "location")


class _IntentClassification(Task):
    def layout(self, root: Path) -> Layout:
        tables = {split: f"data/{split}_data.csv" for split in ("train", "valid", "test")}
        need(root, "data", "wavs", *tables.values())
        import pandas  # late: half a second

        found: dict[str, list[Path]] = {}
        known: dict[str, set[str]] = {}
        for split, name in tables.items():
            table = pandas.read_csv(root / name)
            absent = {"path", *_SLOTS} - set(table.columns)
            if absent:
                raise CorpusError(f"{root}/{name}: no column {', '.join(sorted(absent))}")
            found[split] = [root / path for path in table["path"]]
            for slot in _SLOTS:
                values = set(table[slot])
                if split == "train":
                    known[slot] = values
                elif values - known[slot]:
                    raise CorpusError(
                        f"{root}/{name}: {slot} {sorted(values - known[slot])[0]!r} is not in train_data.csv"
                    )
        return Layout(found, [root / name for name in tables.values()])

    def settings(self, data: Path, prepared: Path) -> dict[str, Any]:
        return {"downstream_expert.datarc.file_path": str(data)}


TASK = _IntentClassification(
    name="IC",
    title="intent classification",
    order=80,
    downstream="fluent_commands",
    corpus="Fluent Speech Commands (wavs/ and data/*.csv; fluent.ai)",
    packages=(TENSORBOARD,),
    metrics=(
        Metric(
            *("IC acc", "acc", 100.0, True, "IC_acc_public", (9.649354219, 98.76)),
            {
                "FBANK": 9.649354219,
                "wav2vec 2.0 Base": 92.35,
                "wav2vec 2.0 Large": 95.28,
                "HuBERT Base": 98.34,
                "HuBERT Large": 98.76,
            },
        ),
    ),
    smoke={
        **STEPS,
        "downstream_expert.datarc.train_batch_size": 4,
        "downstream_expert.datarc.eval_batch_size": 4,
    },
    batch="downstream_expert.datarc.train_batch_size",
    predictions=(("test_predict.csv", "ic_public/predict.csv"),),
    counts={"train": 23132, "valid": 3118, "test": 3793},
    checkpoint_mb=10,
)
