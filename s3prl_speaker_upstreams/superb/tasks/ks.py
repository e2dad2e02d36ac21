"""KS: keyword spotting on Speech Commands v0.01, twelve classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s3prl_speaker_upstreams.superb.layouts import Layout, audio, need
from s3prl_speaker_upstreams.superb.task import STEPS, TENSORBOARD, Metric, Task

__all__ = ["TASK"]


class _KeywordSpotting(Task):
    def layout(self, root: Path) -> Layout:
        need(root, "train", "test", "train/_background_noise_")
        train = [path for path in audio(root / "train", ".wav") if path.parent.name != "_background_noise_"]
        noise = audio(root / "train" / "_background_noise_", ".wav")
        return Layout({"train": train, "test": audio(root / "test", ".wav"), "background": noise})

    def settings(self, data: Path, prepared: Path) -> dict[str, Any]:
        return {
            "downstream_expert.datarc.speech_commands_root": str(data / "train"),
            "downstream_expert.datarc.speech_commands_test_root": str(data / "test"),
        }


TASK = _KeywordSpotting(
    name="KS",
    title="keyword spotting",
    order=30,
    downstream="speech_commands",
    corpus="Speech Commands v0.01 unpacked in DATA/train and its test set in DATA/test "
    "(download.tensorflow.org/data/speech_commands_v0.01.tar.gz and speech_commands_test_set_v0.01.tar.gz)",
    packages=(TENSORBOARD,),
    metrics=(
        Metric(
            *("KS acc", "acc", 100.0, True, "KS_acc_public", (41.3826674, 96.66)),
            {
                "FBANK": 41.3826674,
                "wav2vec 2.0 Base": 96.23,
                "wav2vec 2.0 Large": 96.66,
                "HuBERT Base": 96.3,
                "HuBERT Large": 95.29,
            },
        ),
    ),
    smoke={**STEPS, "downstream_expert.datarc.batch_size": 4},
    batch="downstream_expert.datarc.batch_size",
    any_rate=True,
    walks=True,
    predictions=(("test_predict.txt", "ks_public/predict.txt"),),
    counts={"test": 3081},
    checkpoint_mb=10,
)
