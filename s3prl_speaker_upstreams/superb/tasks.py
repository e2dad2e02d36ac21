"""The twelve SUPERB tasks as data: downstream, corpus, packages, configuration paths, checkpoint rule, metrics.

Everything that differs between tasks stands here; :mod:`.stages` is the same for all of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s3prl_speaker_upstreams.superb.errors import UnknownTask

__all__ = ["FOLDS", "SWEEP", "TASKS", "Metric", "Package", "Task", "find_task"]

FOLDS = ("fold1", "fold2", "fold3", "fold4", "fold5")
"""ER's folds: each IEMOCAP session is the test set once; the score is their mean."""

SWEEP = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
"""Learning rates of ``--lr sweep``: the powers of ten that the SUPERB paper (arXiv 2105.01051, section 4) searches."""


@dataclass(frozen=True)
class Metric:
    """One number of a task.

    name : column in tables, for example "PER"
    key : what the runner prints before the number in ``test.log`` (after the split's name), or "" if scored by us
    scale : factor from the printed number to the table's unit (100 for shares given as per cent)
    higher : whether more is better
    leaderboard : the column of SUPERB's leaderboard, whose reference points define the SUPERB score
    """

    name: str
    key: str
    scale: float
    higher: bool
    leaderboard: str


@dataclass(frozen=True)
class Package:
    """An import that a task's s3prl code needs beyond s3prl's own requirements, and how pip calls it."""

    module: str
    pip: str


@dataclass(frozen=True)
class Task:
    """What :mod:`.stages` has to know of one task; see the field comments.

    Paths are relative to the corpus root (``data``) or to the folder of prepared files (``prepared``).
    """

    name: str
    title: str
    downstream: str  # s3prl's -d
    corpus: str  # what to download, and from where
    extra: str  # the extra of setup.cfg that installs `packages`
    packages: tuple[Package, ...]
    metrics: tuple[Metric, ...]
    settings: Callable[[Path, Path], dict[str, Any]]  # (data, prepared) -> dotted config keys
    smoke: dict[str, Any]  # dotted config keys that make a run take seconds
    workers: str = "downstream_expert.datarc.num_workers"
    best: str = "dev-best.ckpt"  # the checkpoint that training marks as best on dev
    best_is_higher: bool = True  # of best_score in that checkpoint
    test_split: str = "test"
    dev_split: str = "dev"
    folds: tuple[str, ...] = ()
    trained: bool = True  # QbE is not
    predictions: tuple[tuple[str, str], ...] = ()  # (file in the run, place in the leaderboard's archive)
    counts: dict[str, int] = field(default_factory=dict)  # utterances of the full corpus, where published
    checkpoint_mb: int = 100  # upper estimate of one checkpoint, for the free space a run needs


def _ks(data: Path, prepared: Path) -> dict[str, Any]:
    return {
        "downstream_expert.datarc.speech_commands_root": str(data / "train"),
        "downstream_expert.datarc.speech_commands_test_root": str(data / "test"),
    }


def _sid(data: Path, prepared: Path) -> dict[str, Any]:
    return {
        "downstream_expert.datarc.file_path": str(data),
        "downstream_expert.datarc.meta_data": str(prepared / "veri_test_class.txt"),
    }


def _asv(data: Path, prepared: Path) -> dict[str, Any]:
    return {
        "downstream_expert.datarc.file_path": str(data),
        "downstream_expert.datarc.train_meta_data": str(prepared / "dev_speaker_ids.txt"),
        "downstream_expert.datarc.dev_meta_data": str(prepared / "dev_meta_data.txt"),
        "downstream_expert.datarc.test_meta_data": str(prepared / "voxceleb1_test_v2.txt"),
    }


def _pr(data: Path, prepared: Path) -> dict[str, Any]:
    return {
        "downstream_expert.corpus.path": str(data),
        "downstream_expert.corpus.lexicon": sorted(map(str, (prepared / "lexicon").glob("*.txt"))),
        "downstream_expert.text.vocab_file": str(prepared / "phoneme.txt"),
    }


def _asr(data: Path, prepared: Path) -> dict[str, Any]:
    return {
        "downstream_expert.datarc.libri_root": str(data),
        "downstream_expert.datarc.bucket_file": str(prepared / "len_for_bucket"),
        "downstream_expert.datarc.dict_path": str(prepared / "char.dict"),
    }


def _ic(data: Path, prepared: Path) -> dict[str, Any]:
    return {"downstream_expert.datarc.file_path": str(data)}


def _er(data: Path, prepared: Path) -> dict[str, Any]:
    return {
        "downstream_expert.datarc.root": str(data),
        "downstream_expert.datarc.meta_data": str(prepared / "meta_data"),
    }


def _sf(data: Path, prepared: Path) -> dict[str, Any]:
    return {
        "downstream_expert.corpus.path": str(data),
        "downstream_expert.text.vocab_file": str(prepared / "character.txt"),
        "downstream_expert.text.slots_file": str(data / "slots.txt"),
    }


def _qbe(data: Path, prepared: Path) -> dict[str, Any]:
    return {"downstream_expert.datarc.dataset_root": str(data)}


def _loaders(folder: Callable[[Path, Path], Path]) -> Callable[[Path, Path], dict[str, Any]]:
    def settings(data: Path, prepared: Path) -> dict[str, Any]:
        root = folder(data, prepared)
        return {f"downstream_expert.loaderrc.{part}_dir": str(root / part) for part in ("train", "dev", "test")}

    return settings


_STEPS = {"runner.total_steps": 4, "runner.log_step": 2, "runner.eval_step": 2, "runner.save_step": 2}
_SMALL_RNN = {"dim": [32], "dropout": [0.0], "layer_norm": [False], "proj": [False], "sample_rate": [1]}


def _small_rnn(where: str) -> dict[str, Any]:
    return {f"{where}.project_dim": 32, **{f"{where}.RNNs.{key}": value for key, value in _SMALL_RNN.items()}}


_EDIT = Package("editdistance", "editdistance")
_H5 = Package("h5py", "h5py")
_BOARD = Package("tensorboardX", "tensorboardX")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="PR",
            title="phoneme recognition",
            downstream="ctc",
            corpus="LibriSpeech train-clean-100, dev-clean, test-clean (openslr.org/12), and the two files "
            "librispeech-lexicon-*-g2p.txt of s3prl's repository (s3prl/downstream/ctc/lexicon) in DATA/lexicon",
            extra="pr",
            packages=(_BOARD, _EDIT),
            metrics=(Metric("PER", "per", 100.0, False, "PR_per_public"),),
            settings=_pr,
            smoke={**_STEPS, "downstream_expert.corpus.batch_size": 2, "runner.gradient_accumulate_steps": 1},
            workers="downstream_expert.corpus.num_workers",
            best_is_higher=False,
            predictions=(("test-hyp.ark", "pr_public/predict.ark"),),
            counts={"train-clean-100": 28539, "dev-clean": 2703, "test-clean": 2620},
            checkpoint_mb=10,
        ),
        Task(
            name="ASR",
            title="speech recognition",
            downstream="asr",
            corpus="LibriSpeech train-clean-100, dev-clean, test-clean (openslr.org/12)",
            extra="asr",
            packages=(_BOARD, _EDIT),
            metrics=(Metric("WER", "wer", 1.0, False, "ASR_wer_public"),),
            settings=_asr,
            smoke={
                **_STEPS,
                "downstream_expert.datarc.batch_size": 2,
                "downstream_expert.datarc.train_batch_size": 2,
                **_small_rnn("downstream_expert.modelrc"),
            },
            best="dev-clean-best.ckpt",
            best_is_higher=False,
            test_split="test-clean",
            dev_split="dev-clean",
            predictions=(("test-clean-noLM-hyp.ark", "asr_public/predict.ark"),),
            counts={"train-clean-100": 28539, "dev-clean": 2703, "test-clean": 2620},
            checkpoint_mb=550,
        ),
        Task(
            name="KS",
            title="keyword spotting",
            downstream="speech_commands",
            corpus="Speech Commands v0.01 unpacked in DATA/train and its test set in DATA/test "
            "(download.tensorflow.org/data/speech_commands_v0.01.tar.gz and speech_commands_test_set_v0.01.tar.gz)",
            extra="ks",
            packages=(_BOARD,),
            metrics=(Metric("KS acc", "acc", 100.0, True, "KS_acc_public"),),
            settings=_ks,
            smoke={**_STEPS, "downstream_expert.datarc.batch_size": 4},
            predictions=(("test_predict.txt", "ks_public/predict.txt"),),
            checkpoint_mb=10,
        ),
        Task(
            name="QbE",
            title="query by example",
            downstream="quesst14_dtw",
            corpus="QUESST 2014 (speech.fit.vutbr.cz/files/quesst14Database.tgz)",
            extra="qbe",
            packages=(_BOARD, Package("lxml", "lxml"), Package("dtw", "dtw-python")),
            metrics=(Metric("MTWV", "", 100.0, True, "QbE_mtwv_public"),),
            settings=_qbe,
            smoke={"downstream_expert.max_workers": 1},
            trained=False,
            predictions=(("benchmark.stdlist.xml", "qbe_public/benchmark.stdlist.xml"),),
            checkpoint_mb=0,
        ),
        Task(
            name="SID",
            title="speaker identification",
            downstream="voxceleb1",
            corpus="VoxCeleb1 (dev/wav and test/wav; robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html) and its list "
            "iden_split.txt in DATA",
            extra="sid",
            packages=(_BOARD, Package("librosa", "librosa")),
            metrics=(Metric("SID acc", "acc", 100.0, True, "SID_acc_public"),),
            settings=_sid,
            smoke={
                **_STEPS,
                "runner.gradient_accumulate_steps": 1,
                "downstream_expert.datarc.train_batch_size": 4,
                "downstream_expert.datarc.max_timestep": 32000,
            },
            predictions=(("test_predict.txt", "sid_public/predict.txt"),),
            checkpoint_mb=20,
        ),
        Task(
            name="ASV",
            title="speaker verification",
            downstream="sv_voxceleb1",
            corpus="VoxCeleb1 (dev/wav and test/wav; robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html) and its trial list "
            "veri_test2.txt in DATA",
            extra="asv",
            packages=(_BOARD, Package("sox", "sox"), Package("librosa", "librosa"), Package("sklearn", "scikit-learn")),
            metrics=(Metric("EER", "EER", 100.0, False, "SV_eer_public"),),
            settings=_asv,
            smoke={
                **_STEPS,
                "runner.gradient_accumulate_steps": 1,
                "downstream_expert.datarc.train_batch_size": 4,
            },
            best="",
            predictions=(("test_predict.txt", "sv_public/predict.txt"),),
            checkpoint_mb=120,
        ),
        Task(
            name="SD",
            title="speaker diarization",
            downstream="diarization",
            corpus="Libri2Mix for diarization as Kaldi folders DATA/train, DATA/dev, DATA/test, made by "
            "github.com/s3prl/LibriMix: generate_librimix_sd.sh, then scripts/prepare_diarization.py",
            extra="sd",
            packages=(_BOARD, _H5),
            metrics=(Metric("DER", "", 100.0, False, "SD_der_public"),),
            settings=_loaders(lambda data, prepared: data),
            smoke={
                **_STEPS,
                "runner.gradient_accumulate_steps": 1,
                "downstream_expert.loaderrc.train_batchsize": 2,
                "downstream_expert.modelrc.hidden_size": 32,
            },
            workers="downstream_expert.loaderrc.num_workers",
            best="best-states-dev.ckpt",
            predictions=(
                ("scoring/predictions", "sd_public/scoring/predictions"),
                ("frame_shift", "sd_public/frame_shift"),
            ),
            checkpoint_mb=60,
        ),
        Task(
            name="IC",
            title="intent classification",
            downstream="fluent_commands",
            corpus="Fluent Speech Commands (wavs/ and data/*.csv; fluent.ai)",
            extra="ic",
            packages=(_BOARD,),
            metrics=(Metric("IC acc", "acc", 100.0, True, "IC_acc_public"),),
            settings=_ic,
            smoke={
                **_STEPS,
                "downstream_expert.datarc.train_batch_size": 4,
                "downstream_expert.datarc.eval_batch_size": 4,
            },
            predictions=(("test_predict.csv", "ic_public/predict.csv"),),
            checkpoint_mb=10,
        ),
        Task(
            name="SF",
            title="slot filling",
            downstream="ctc",
            corpus="Audio SNIPS, linked from s3prl's docs (train/, valid/, test/, all.iob.snips.txt, slots.txt)",
            extra="sf",
            packages=(_BOARD, _EDIT),
            metrics=(
                Metric("Slot-F1", "slot_type_f1", 100.0, True, "SF_f1_public"),
                Metric("Slot-CER", "slot_value_cer", 100.0, False, "SF_cer_public"),
            ),
            settings=_sf,
            smoke={
                **_STEPS,
                "downstream_expert.corpus.batch_size": 2,
                **_small_rnn("downstream_expert.model"),
            },
            workers="downstream_expert.corpus.num_workers",
            predictions=(("test-hyp.ark", "sf_public/predict.ark"),),
            checkpoint_mb=550,
        ),
        Task(
            name="ER",
            title="emotion recognition",
            downstream="emotion",
            corpus="IEMOCAP (Session1 to Session5; by form from sail.usc.edu/iemocap)",
            extra="er",
            packages=(_BOARD,),
            metrics=(Metric("ER acc", "acc", 100.0, True, "ER_acc_public"),),
            settings=_er,
            smoke={**_STEPS, "runner.gradient_accumulate_steps": 1},
            folds=FOLDS,
            predictions=tuple((f"{fold}/test_{fold}_predict.txt", f"er_{fold}_public/predict.txt") for fold in FOLDS),
            checkpoint_mb=10,
        ),
        Task(
            name="SE",
            title="speech enhancement",
            downstream="enhancement_stft",
            corpus="VoiceBank-DEMAND at 16 kHz (clean_ and noisy_ trainset_28spk_wav_16k and testset_wav_16k)",
            extra="se",
            packages=(_BOARD, _H5, Package("asteroid", "asteroid"), Package("librosa", "librosa")),
            metrics=(
                Metric("PESQ", "pesq", 1.0, True, "SE_pesq_public"),
                Metric("STOI", "stoi", 100.0, True, "SE_stoi_public"),
            ),
            settings=_loaders(lambda data, prepared: prepared),
            smoke={
                **_STEPS,
                "downstream_expert.loaderrc.train_batchsize": 2,
                "runner.max_keep": 1,
                "downstream_expert.modelrc.hidden_size": 32,
                "downstream_expert.modelrc.rnn_layers": 1,
                "downstream_expert.modelrc.dropout": 0.0,
            },
            workers="downstream_expert.loaderrc.num_workers",
            best="best-states-dev.ckpt",
            predictions=(("test_metrics.txt", "se_public/metrics.txt"),),
            checkpoint_mb=800,
        ),
        Task(
            name="SS",
            title="source separation",
            downstream="separation_stft",
            corpus="Libri2Mix wav16k/min train-100, dev, test (github.com/s3prl/LibriMix: generate_librimix_ss.sh)",
            extra="ss",
            packages=(_BOARD, _H5, Package("asteroid", "asteroid"), Package("librosa", "librosa")),
            metrics=(Metric("SI-SDRi", "si_sdr", 1.0, True, "SS_sisdri_public"),),
            settings=_loaders(lambda data, prepared: prepared),
            smoke={
                **_STEPS,
                "downstream_expert.loaderrc.train_batchsize": 2,
                "runner.max_keep": 1,
                "downstream_expert.modelrc.hidden_size": 32,
                "downstream_expert.modelrc.rnn_layers": 1,
                "downstream_expert.modelrc.dropout": 0.0,
            },
            workers="downstream_expert.loaderrc.num_workers",
            best="best-states-dev.ckpt",
            predictions=(("test_metrics.txt", "ss_public/metrics.txt"),),
            checkpoint_mb=800,
        ),
    )
}
"""Name -> task, in the order of SUPERB's tables."""


def find_task(name: str) -> Task:
    """The task called `name`, whatever its case.

    Raises UnknownTask, with the nearest name and the list of all.

    Examples
    --------
    >>> find_task("qbe").downstream
    'quesst14_dtw'
    """
    folded = {task.lower(): task for task in TASKS}
    if name.lower() in folded:
        return TASKS[folded[name.lower()]]
    near = difflib.get_close_matches(name.lower(), folded, n=1)
    hint = f"; did you mean {folded[near[0]]}?" if near else ""
    raise UnknownTask(f"unknown task {name!r}{hint} The tasks are {', '.join(TASKS)}")
