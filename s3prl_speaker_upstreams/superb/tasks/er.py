"""ER: emotion recognition on IEMOCAP, four classes, five folds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from s3prl_speaker_upstreams.common.files import write_text
from s3prl_speaker_upstreams.superb.errors import CorpusError
from s3prl_speaker_upstreams.superb.layouts import Layout, audio, files, first_file, need, shipped
from s3prl_speaker_upstreams.superb.task import STEPS, TENSORBOARD, Metric, Task

__all__ = ["TASK"]

_SESSIONS = tuple(f"Session{number}" for number in range(1, 6))
_FOLDS = tuple(f"fold{number}" for number in range(1, 6))


def _labels(root: Path, session: str) -> list[Path]:
    return files(root / session / "dialog" / "EmoEvaluation", "*.txt")


class _EmotionRecognition(Task):
    def layout(self, root: Path) -> Layout:
        need(root, *_SESSIONS, *(f"{name}/dialog/EmoEvaluation" for name in _SESSIONS))
        found = {name: audio(root / name / "sentences" / "wav", ".wav") for name in _SESSIONS}
        return Layout(found, [path for name in _SESSIONS for path in _labels(root, name)])

    def settings(self, data: Path, prepared: Path) -> dict[str, Any]:
        return {
            "downstream_expert.datarc.root": str(data),
            "downstream_expert.datarc.meta_data": str(prepared / "meta_data"),
        }

    def prepare(self, data: Path, out: Path, s3prl_root: Path | None) -> None:
        lists = shipped(s3prl_root, "emotion", "meta_data")
        if lists is not None and first_file(lists / "Session1" / "train_meta_data.json"):
            entries = json.loads((lists / "Session1" / "train_meta_data.json").read_text())["meta_data"]
            if all((data / entry["path"]).is_file() for entry in entries):
                for session in _SESSIONS:
                    for part in ("train", "test"):
                        name = f"{part}_meta_data.json"
                        write_text(out / "meta_data" / session / name, (lists / session / name).read_text())
                return
        own = {session: _utterances(data, session) for session in _SESSIONS}
        labels = {"neu": 0, "hap": 1, "ang": 2, "sad": 3}
        for session in _SESSIONS:
            train = [entry for other in _SESSIONS if other != session for entry in own[other]]
            for part, chosen in (("train", train), ("test", own[session])):
                text = json.dumps({"labels": labels, "meta_data": chosen})
                write_text(out / "meta_data" / session / f"{part}_meta_data.json", text)


def _utterances(data: Path, session: str) -> list[dict[str, str]]:
    """Utterances of one session with one of the four emotions; excited counts as happy, as the benchmark does."""
    wavs = {path.stem: path.relative_to(data) for path in audio(data / session / "sentences/wav", ".wav")}
    entries = []
    for file in _labels(data, session):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            fields = [field for field in re.split(r"[\t\n]", line) if field] if line.startswith("[") else []
            if len(fields) > 2 and fields[2] in ("neu", "hap", "ang", "sad", "exc") and fields[1] in wavs:
                emotion = "hap" if fields[2] == "exc" else fields[2]
                path = str(wavs[fields[1]])
                entries.append({"path": path, "label": emotion, "speaker": Path(path).name.split("_")[0]})
    if not entries:
        raise CorpusError(f"{data / session}: no utterance labelled neutral, happy, excited, angry or sad")
    return entries


TASK = _EmotionRecognition(
    name="ER",
    title="emotion recognition",
    order=100,
    downstream="emotion",
    corpus="IEMOCAP (Session1 to Session5; by form from sail.usc.edu/iemocap)",
    packages=(TENSORBOARD,),
    metrics=(
        Metric(
            *("ER acc", "acc", 100.0, True, "ER_acc_public", (48.23672168, 67.62)),
            {
                "FBANK": 48.23672168,
                "wav2vec 2.0 Base": 63.43,
                "wav2vec 2.0 Large": 65.64,
                "HuBERT Base": 64.92,
                "HuBERT Large": 67.62,
            },
        ),
    ),
    smoke={**STEPS, "runner.gradient_accumulate_steps": 1},
    batch="downstream_expert.datarc.train_batch_size",
    folds=_FOLDS,
    fold_key="downstream_expert.datarc.test_fold",
    predictions=tuple((f"{fold}/test_{fold}_predict.txt", f"er_{fold}_public/predict.txt") for fold in _FOLDS),
    counts={"Session1": 1819, "Session2": 1811, "Session3": 2136, "Session4": 2103, "Session5": 2170},
    checkpoint_mb=10,
)
