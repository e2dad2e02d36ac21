"""SD: diarization of two-speaker LibriMix."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3prl_speaker_upstreams.superb.errors import CorpusError
from s3prl_speaker_upstreams.superb.layouts import Layout, lines, need
from s3prl_speaker_upstreams.superb.scoring import score_diarization
from s3prl_speaker_upstreams.superb.task import H5PY, STEPS, TENSORBOARD, Metric, Task, loader_folders

if TYPE_CHECKING:
    from s3prl_speaker_upstreams.superb.work import Work

__all__ = ["TASK"]

_TABLES = ("segments", "utt2spk", "spk2utt", "reco2dur")


class _Diarization(Task):
    def layout(self, root: Path) -> Layout:
        found, tables = {}, []
        for part in ("train", "dev", "test"):
            own = [*_TABLES, *(["rttm"] if part == "test" else [])]
            need(root, part)
            need(root / part, "wav.scp", *own)
            pairs = [line.split(None, 1) for line in lines(root / part / "wav.scp")]
            segmented = {line.split()[1] for line in lines(root / part / "segments")}
            bare = sorted({name for name, _ in pairs} - segmented)
            if bare:
                raise CorpusError(f"{root / part}/segments: no line for recording {bare[0]} ({len(bare)} such)")
            # a command ending in "|" is Kaldi's way to convert on the fly; it cannot be looked at
            found[part] = [Path(where.strip()) for _, where in pairs if not where.strip().endswith("|")]
            tables += [root / part / name for name in own]
        return Layout(found, tables)

    def settings(self, data: Path, prepared: Path) -> dict[str, Any]:
        return loader_folders(data)

    def read_score(self, work: Work, expdir: Path) -> tuple[dict[str, float], dict[str, Any]]:
        detail = score_diarization(expdir, work.run.corpus / "test" / "rttm")
        return {"DER": 100.0 * detail["DER"]}, detail


TASK = _Diarization(
    name="SD",
    title="speaker diarization",
    order=70,
    downstream="diarization",
    corpus="Libri2Mix for diarization as Kaldi folders DATA/train, DATA/dev, DATA/test, made by "
    "github.com/s3prl/LibriMix: generate_librimix_sd.sh, then scripts/prepare_diarization.py",
    packages=(TENSORBOARD, H5PY),
    metrics=(
        Metric(
            *("DER", "", 100.0, False, "SD_der_public", (10.05, 5.62)),
            {
                "FBANK": 10.05,
                "wav2vec 2.0 Base": 6.08,
                "wav2vec 2.0 Large": 5.62,
                "HuBERT Base": 5.88,
                "HuBERT Large": 5.75,
            },
        ),
    ),
    smoke={
        **STEPS,
        "runner.gradient_accumulate_steps": 1,
        "downstream_expert.loaderrc.train_batchsize": 2,
        "downstream_expert.modelrc.hidden_size": 32,
    },
    workers="downstream_expert.loaderrc.num_workers",
    batch="downstream_expert.loaderrc.train_batchsize",
    best="best-states-dev.ckpt",
    predictions=(
        ("scoring/predictions", "sd_public/scoring/predictions"),
        ("frame_shift", "sd_public/frame_shift"),
    ),
    counts={"train": 13900, "dev": 3000, "test": 3000},
    checkpoint_mb=60,
)
