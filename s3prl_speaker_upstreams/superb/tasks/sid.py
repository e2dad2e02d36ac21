"""SID: speaker identification on VoxCeleb1, 1251 speakers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s3prl_speaker_upstreams.common.files import write_text
from s3prl_speaker_upstreams.superb.errors import CorpusError
from s3prl_speaker_upstreams.superb.layouts import Layout, first_file, shipped, text, voxceleb
from s3prl_speaker_upstreams.superb.task import LIBROSA, STEPS, TENSORBOARD, Metric, Task

__all__ = ["TASK"]


class _SpeakerIdentification(Task):
    def layout(self, root: Path) -> Layout:
        return voxceleb(root, "veri_test_class.txt", "iden_split.txt")

    def settings(self, data: Path, prepared: Path) -> dict[str, Any]:
        return {
            "downstream_expert.datarc.file_path": str(data),
            "downstream_expert.datarc.meta_data": str(prepared / "veri_test_class.txt"),
        }

    def prepare(self, data: Path, out: Path, s3prl_root: Path | None) -> None:
        source = first_file(
            data / "veri_test_class.txt",
            data / "iden_split.txt",
            shipped(s3prl_root, "voxceleb1", "veri_test_class.txt"),
        )
        if source is None:
            raise CorpusError(
                f"{data}: neither iden_split.txt (from VoxCeleb1's page) nor veri_test_class.txt (from s3prl's "
                "repository, s3prl/downstream/voxceleb1) is there; put one into that folder or give a checkout with "
                "--s3prl-root"
            )
        there: dict[str, set[str]] = {part: set() for part in "123"}
        roots = [data / "dev" / "wav", data / "test" / "wav"]
        for number, line in enumerate(text(source).splitlines(), 1):
            fields = line.split()
            if len(fields) != 2 or fields[0] not in there:
                raise CorpusError(f"{source}:{number}: {line!r} is not '1|2|3 id/video/utterance.wav'")
            if not any((root / fields[1]).is_file() for root in roots):
                raise CorpusError(f"{source}:{number}: {fields[1]} is in neither {roots[0]} nor {roots[1]}")
            there[fields[0]].add(fields[1])
        empty = [name for part, name in (("1", "train"), ("2", "dev"), ("3", "test")) if not there[part]]
        if empty:
            raise CorpusError(f"{source}: no utterance of {', '.join(empty)}")
        write_text(out / "veri_test_class.txt", text(source))


TASK = _SpeakerIdentification(
    name="SID",
    title="speaker identification",
    order=50,
    downstream="voxceleb1",
    corpus="VoxCeleb1 (dev/wav and test/wav; robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html) and its list "
    "iden_split.txt in DATA",
    packages=(TENSORBOARD, LIBROSA),
    metrics=(
        Metric(
            *("SID acc", "acc", 100.0, True, "SID_acc_public", (20.058174, 90.3)),
            {
                "FBANK": 20.058174,
                "wav2vec 2.0 Base": 75.18,
                "wav2vec 2.0 Large": 86.14,
                "HuBERT Base": 81.42,
                "HuBERT Large": 90.33,
            },
        ),
    ),
    smoke={
        **STEPS,
        "runner.gradient_accumulate_steps": 1,
        "downstream_expert.datarc.train_batch_size": 4,
        "downstream_expert.datarc.max_timestep": 32000,
    },
    batch="downstream_expert.datarc.train_batch_size",
    predictions=(("test_predict.txt", "sid_public/predict.txt"),),
    counts={"dev": 148642, "test": 4874},
    checkpoint_mb=20,
)
