"""SE: speech enhancement on VoiceBank-DEMAND."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3prl_speaker_upstreams.superb.errors import CorpusError
from s3prl_speaker_upstreams.superb.kaldi import no_blanks, write_tables
from s3prl_speaker_upstreams.superb.layouts import Layout, audio, need
from s3prl_speaker_upstreams.superb.task import (
    H5PY,
    LIBROSA,
    STFT_STEPS,
    TENSORBOARD,
    Metric,
    Package,
    Task,
    loader_folders,
    metrics_file,
)

if TYPE_CHECKING:
    from s3prl_speaker_upstreams.superb.work import Work

__all__ = ["TASK"]

_DEV = ("p226", "p287")  # speakers that s3prl validates on
_CONDITIONS = ("clean", "noisy")


class _Enhancement(Task):
    def layout(self, root: Path) -> Layout:
        folders = [f"{kind}_{part}_wav_16k" for part in ("trainset_28spk", "testset") for kind in _CONDITIONS]
        need(root, *folders)
        found = {folder: audio(root / folder, ".wav") for folder in folders}
        for part in ("trainset_28spk", "testset"):
            clean, noisy = ({file.name for file in found[f"{kind}_{part}_wav_16k"]} for kind in _CONDITIONS)
            if clean != noisy:
                odd = sorted(clean ^ noisy)[0]
                raise CorpusError(f"{root}: {odd} of {part} is there only {'clean' if odd in clean else 'noisy'}")
        if not any(file.name.startswith(_DEV) for file in found["clean_trainset_28spk_wav_16k"]):
            raise CorpusError(f"{root}: no recording of p226 or p287, the speakers that make up the dev part")
        return Layout(found)

    def settings(self, data: Path, prepared: Path) -> dict[str, Any]:
        return loader_folders(prepared)

    def prepare(self, data: Path, out: Path, s3prl_root: Path | None) -> None:
        no_blanks(data)
        for condition in _CONDITIONS:
            train = {file.stem: file for file in audio(data / f"{condition}_trainset_28spk_wav_16k", ".wav")}
            dev = {name: file for name, file in train.items() if name.startswith(_DEV)}
            write_tables(out / "train", condition, {name: file for name, file in train.items() if name not in dev})
            write_tables(out / "dev", condition, dev)
            test = {file.stem: file for file in audio(data / f"{condition}_testset_wav_16k", ".wav")}
            write_tables(out / "test", condition, test)

    def read_score(self, work: Work, expdir: Path) -> tuple[dict[str, float], dict[str, Any]]:
        return metrics_file(work, self, expdir), {}


TASK = _Enhancement(
    name="SE",
    title="speech enhancement",
    order=110,
    downstream="enhancement_stft",
    corpus="VoiceBank-DEMAND at 16 kHz (clean_ and noisy_ trainset_28spk_wav_16k and testset_wav_16k)",
    packages=(TENSORBOARD, H5PY, Package("asteroid", "asteroid"), LIBROSA),
    metrics=(
        Metric(
            *("PESQ", "pesq", 1.0, True, "SE_pesq_public", (2.55, 2.64)),
            {
                "FBANK": 2.55,
                "wav2vec 2.0 Base": 2.55,
                "wav2vec 2.0 Large": 2.52,
                "HuBERT Base": 2.58,
                "HuBERT Large": 2.64,
            },
        ),
        Metric(
            *("STOI", "stoi", 100.0, True, "SE_stoi_public", (93.6, 94.2)),
            {
                "FBANK": 93.6,
                "wav2vec 2.0 Base": 93.9,
                "wav2vec 2.0 Large": 94,
                "HuBERT Base": 93.9,
                "HuBERT Large": 94.2,
            },
        ),
    ),
    smoke=STFT_STEPS,
    workers="downstream_expert.loaderrc.num_workers",
    distributed=False,  # each process would draw the same utterances
    best="best-states-dev.ckpt",
    paper=False,
    predictions=(("test_metrics.txt", "se_public/metrics.txt"),),
    counts={
        f"{kind}_{part}_wav_16k": count
        for part, count in (("trainset_28spk", 11572), ("testset", 824))
        for kind in _CONDITIONS
    },
    checkpoint_mb=800,
)
