"""SS: separation of two-speaker LibriMix."""

from __future__ import annotations

import random
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

_KINDS = ("s1", "s2", "mix_clean")
_SUBSET, _SUBSET_SEED = 1000, 7  # dev utterances that the benchmark validates on, and the seed that draws them


class _Separation(Task):
    def layout(self, root: Path) -> Layout:
        base = root / "wav16k" / "min"
        need(root, "wav16k/min")
        found = {}
        for part in ("train-100", "dev", "test"):
            need(base, part)
            need(base / part, *_KINDS)
            names = {kind: {file.name for file in audio(base / part / kind, ".wav")} for kind in _KINDS}
            odd = sorted((names["s1"] | names["s2"]) ^ names["mix_clean"])
            if odd:
                raise CorpusError(f"{base / part}: {odd[0]} is not in all of s1, s2 and mix_clean")
            found[part] = [base / part / kind / name for kind in names for name in sorted(names[kind])]
        return Layout(found)

    def settings(self, data: Path, prepared: Path) -> dict[str, Any]:
        return loader_folders(prepared)

    def prepare(self, data: Path, out: Path, s3prl_root: Path | None) -> None:
        no_blanks(data)
        base = data / "wav16k" / "min"
        for part, folder in (("train", "train-100"), ("dev", "dev"), ("test", "test")):
            names = sorted(file.stem for file in audio(base / folder / "mix_clean", ".wav"))
            if part == "dev" and len(names) > _SUBSET:
                random.Random(_SUBSET_SEED).shuffle(names)
                names = sorted(names[:_SUBSET])
            for kind in _KINDS:
                write_tables(out / part, kind, {name: base / folder / kind / f"{name}.wav" for name in names})

    def read_score(self, work: Work, expdir: Path) -> tuple[dict[str, float], dict[str, Any]]:
        return metrics_file(work, self, expdir), {}


TASK = _Separation(
    name="SS",
    title="source separation",
    order=120,
    downstream="separation_stft",
    corpus="Libri2Mix wav16k/min train-100, dev, test (github.com/s3prl/LibriMix: generate_librimix_ss.sh)",
    packages=(TENSORBOARD, H5PY, Package("asteroid", "asteroid"), LIBROSA),
    metrics=(
        Metric(
            *("SI-SDRi", "si_sdr", 1.0, True, "SS_sisdri_public", (9.2341, 10.4514)),
            {
                "FBANK": 9.2341,
                "wav2vec 2.0 Base": 9.77,
                "wav2vec 2.0 Large": 10.02,
                "HuBERT Base": 9.36,
                "HuBERT Large": 10.45,
            },
        ),
    ),
    smoke=STFT_STEPS,
    workers="downstream_expert.loaderrc.num_workers",
    distributed=False,  # each process would draw the same utterances
    best="best-states-dev.ckpt",
    paper=False,
    predictions=(("test_metrics.txt", "ss_public/metrics.txt"),),
    counts={"train-100": 3 * 13900, "dev": 3 * 3000, "test": 3 * 3000},
    checkpoint_mb=800,
)
