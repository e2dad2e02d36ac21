"""What a pre-training run is: typed sections, presets with the source of their numbers, YAML and ``key=value``.

>>> config = load("small_dino", overrides=["dino.prototypes=512", "data.train=[/speech]"])
>>> config.dino.prototypes, config.data.train
(512, ['/speech'])
>>> load("small_dino", overrides=["dino.prototype=512"])
Traceback (most recent call last):
...
s3prl_speaker_upstreams.errors.ConfigError: unknown key 'dino.prototype'; did you mean 'dino.prototypes'?
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..common.config import apply_overrides, build, to_dict
from ..data.augment import AugmentConfig
from ..errors import ConfigError

__all__ = [
    "PRESETS",
    "AamConfig",
    "CollapseConfig",
    "DataConfig",
    "DinoConfig",
    "EvalConfig",
    "ModelConfig",
    "OptimConfig",
    "PretrainConfig",
    "RunConfig",
    "duration_steps",
    "load",
    "read_yaml",
]

_DURATION = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(epochs?|steps?|%)?\s*$")


def duration_steps(text: str | float, steps_per_epoch: int, total_steps: int) -> int:
    """Optimizer steps of a duration written as "20 epochs" (or plain 20), "40 steps" or "10%" of the run.

    >>> duration_steps("2 epochs", 100, 1000), duration_steps(0.5, 100, 1000), duration_steps("40 steps", 100, 1000)
    (200, 50, 40)
    >>> duration_steps("10%", 100, 1000)
    100
    """
    match = _DURATION.match(str(text))
    if match is None:
        raise ConfigError(f"duration {text!r}: expected '20 epochs', '40 steps' or '10%'")
    number, unit = float(match.group(1)), (match.group(2) or "epochs")
    if unit.startswith("epoch"):
        return round(number * steps_per_epoch)
    return round(number) if unit.startswith("step") else round(total_steps * number / 100)


@dataclass
class ModelConfig:
    """The network: a dialect of :mod:`s3prl_speaker_upstreams.ecapa` and fields that differ from its defaults."""

    dialect: str = "native"
    ecapa: dict = field(default_factory=dict)  # fields of EcapaConfig, e.g. channels: 512
    frontend: dict = field(default_factory=dict)  # fields of FrontendConfig
    init: str | None = (
        None  # start from a checkpoint: any readable format, or a run's step_N.pt (classifier and head too)
    )

    def __post_init__(self) -> None:
        if not isinstance(self.ecapa, dict) or not isinstance(self.frontend, dict):
            raise ConfigError("model.ecapa and model.frontend are mappings of field names to values")


@dataclass
class DataConfig:
    """Where the speech is and how it is cut."""

    train: list[str] = field(default_factory=list)  # folders or list files
    layout: Literal["auto", "list", "voxceleb", "librispeech", "speaker", "none"] = "auto"  # see data/lists.py
    min_seconds: float = 1.0
    silence_db: float | None = None  # None: silence is looked for when a segment is read, not when files are listed
    global_crops: int = 2
    global_seconds: float = 3.0
    local_crops: int = 4
    local_seconds: float = 2.0
    seconds: float = 3.0  # supervised training's segment
    speeds: tuple[float, ...] = (1.0, 0.9, 1.1)  # each speed but 1.0 makes new speakers of every speaker
    workers: int = 0
    prefetch: int = 4
    cache_mb: int = 0
    feature_versions: int = 0  # > 0: keep so many augmented log-mel versions of each utterance in memory (small data)
    manifest_cache: str | None = None  # folder of cached manifests; None: the user's cache folder
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class CollapseConfig:
    """When a DINO run has failed though its loss looks fine, and what to do."""

    action: Literal["stop", "warn", "off"] = "stop"
    grace: str = "15%"  # nothing is judged before: near ln(prototypes) is normal for the first 25 to 50 steps
    patience: int = 5  # log steps in a row that must look collapsed
    min_effective_dimension: float = 4.0  # plain centring on two hours of speech falls to 3
    min_marginal_fraction: float = 0.4  # of ln(prototypes); plain centring fell to 2.7 of 7.6 nats
    min_spread: float = 0.02  # standard deviation per dimension of unit embeddings, times sqrt(dimension); 1 is uniform
    max_entropy_fraction: float = 0.97  # of ln(prototypes), the teacher's: targets that say nothing
    min_below_lnk: float = 1e-3  # |loss - ln(prototypes)| below this: the output is uniform, nothing is learned


@dataclass
class DinoConfig:
    """Self-distillation without labels: Caron et al. 2021, arXiv 2104.14294."""

    prototypes: int = 65536
    head_layers: int = 3
    head_hidden: int = 2048
    bottleneck: int = 256
    head_norm: bool = True  # BatchNorm in the head; off is better on small batches
    targets: Literal["centring", "sinkhorn"] = "centring"
    center_momentum: float = 0.9
    sinkhorn_iterations: int = 3
    student_temp: float = 0.1
    teacher_temp: float = 0.07  # values above 0.07 are unstable (facebookresearch/dino)
    warmup_teacher_temp: float = 0.04
    teacher_temp_warmup: str = "20%"
    momentum: float = 0.996
    momentum_end: float = 1.0
    freeze_last_layer: str = "1 epoch"
    koleo: float = 0.0  # weight; Sablayrolles et al. 2019, arXiv 1806.03198, on the student's global embeddings
    variance: float = 0.0  # RDINO (arXiv 2211.04168): hinge on the deviation of each embedding dimension
    covariance: float = 0.0  # RDINO: squared covariance off the diagonal
    regularisation_weight: float = 0.2  # multiplies variance and covariance at the end of their warm-up
    regularisation_start: float = 0.05
    regularisation_warmup: str = "10 epochs"
    # How the teacher's BatchNorm is normalised while training, and what running statistics it keeps:
    # own:     by its batch; running statistics of its own batches (the original DINO, WeSpeaker)
    # student: by its batch; running statistics copied from the student after each step
    # running: by running statistics, which follow the student's with the teacher's momentum
    teacher_norm: Literal["own", "student", "running"] = "own"
    collapse: CollapseConfig = field(default_factory=CollapseConfig)

    def __post_init__(self) -> None:
        if self.prototypes < 2 or self.bottleneck < 1 or self.head_layers < 1:
            raise ConfigError("dino: prototypes >= 2, bottleneck >= 1 and head_layers >= 1 are needed")
        if min(self.student_temp, self.teacher_temp, self.warmup_teacher_temp) <= 0:
            raise ConfigError("dino: temperatures must be above 0")
        if not 0 <= self.momentum <= self.momentum_end <= 1:
            raise ConfigError(
                f"dino: 0 <= momentum ({self.momentum}) <= momentum_end ({self.momentum_end}) <= 1 is needed"
            )


@dataclass
class AamConfig:
    """Additive angular margin softmax: Deng et al., arXiv 1801.07698; sub-centres: Deng et al., ECCV 2020."""

    scale: float = 32.0
    margin: float = 0.2
    initial_margin: float = 0.0
    margin_start: str = "20 epochs"  # the margin rises from here ...
    margin_end: str = "40 epochs"  # ... to here
    margin_shape: Literal["exp", "linear"] = "exp"
    sub_centres: int = 1


@dataclass
class OptimConfig:
    """Optimizer and schedules; durations as "20 epochs", "40 steps" or "10%"."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.2
    min_lr: float = 5e-5
    lr_reference_batch: int | None = 256  # lr and min_lr are scaled by global batch / this; None: taken as they are
    schedule: Literal["cosine", "exponential", "constant"] = "cosine"
    warmup: str = "20 epochs"
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 5e-5
    weight_decay_end: float = 5e-5
    decay_norm_and_bias: bool = False
    clip: float = 3.0  # 0 switches clipping off
    clip_mode: Literal["per_parameter", "global"] = "per_parameter"


@dataclass
class EvalConfig:
    """Verification of the exported network on a trial list during training."""

    trials: str | None = None  # lines "label enrol test", label 1 for the same speaker
    root: str | None = None  # folder that the trial list's names are relative to
    every: str = "1 epoch"


@dataclass
class RunConfig:
    """How long, how many, where to."""

    epochs: float = 150.0
    steps: int | None = None  # instead of epochs
    batch: int = 64  # utterances per process and micro-batch
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "auto"
    seed: int = 42
    log_every: int = 100
    save_every: str = "1 epoch"
    keep_last: int = 3
    keep_best: bool = True  # lowest EER on the trial list
    tensorboard: bool = True
    threads: int | None = None


@dataclass
class PretrainConfig:
    """One pre-training run."""

    method: Literal["dino", "supervised"] = "dino"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    aam: AamConfig = field(default_factory=AamConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.run.batch < 1 or self.run.accumulate < 1:
            raise ConfigError(
                f"run: batch ({self.run.batch}) and accumulate ({self.run.accumulate}) must be at least 1"
            )
        if self.method == "dino" and self.data.global_crops < 2 and self.data.local_crops < 1:
            raise ConfigError("data: DINO compares different views; global_crops >= 2 or local_crops >= 1 is needed")
        if self.run.keep_last < 1:
            raise ConfigError("run.keep_last must be at least 1: a run that is stopped could not go on")
        for name, value in (
            ("run.log_every", self.run.log_every),
            ("run.steps", self.run.steps),
            ("run.threads", self.run.threads),
            ("data.prefetch", self.data.prefetch),
            ("optim.lr_reference_batch", self.optim.lr_reference_batch),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{name}: got {value}, expected at least 1")
        if self.run.epochs <= 0 or self.data.workers < 0:
            raise ConfigError(
                f"run.epochs ({self.run.epochs}) must be above 0, data.workers ({self.data.workers}) not below"
            )
        for name, text in (
            ("dino.teacher_temp_warmup", self.dino.teacher_temp_warmup),
            ("dino.freeze_last_layer", self.dino.freeze_last_layer),
            ("dino.regularisation_warmup", self.dino.regularisation_warmup),
            ("dino.collapse.grace", self.dino.collapse.grace),
            ("aam.margin_start", self.aam.margin_start),
            ("aam.margin_end", self.aam.margin_end),
            ("optim.warmup", self.optim.warmup),
            ("eval.every", self.eval.every),
            ("run.save_every", self.run.save_every),
        ):
            try:
                duration_steps(text, 1, 1)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from None
        for name, text in (("eval.every", self.eval.every), ("run.save_every", self.run.save_every)):
            if duration_steps(text, 10**9, 10**9) < 1:
                raise ConfigError(f"{name}: got {text!r}, expected more than 0")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, for YAML and checkpoints."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PretrainConfig:
        """From nested dictionaries; ConfigError names unknown keys and wrong types."""
        return build(cls, values)


# WeSpeaker examples/voxceleb/v3/dino/conf/ecapa_tdnn.yaml and ssl/bin/train_dino.py at commit
# dfa741957e5c11f477623b6e583d67d0af25ee88: ECAPA C=512 with global-context attention and BatchNorm behind the
# embedding, Vox1-O 3.016 % EER. 2 GPUs x 64; lr 0.2 and min_lr 5e-5 per 256 utterances; 150 epochs, 20 warm-up; SGD,
# momentum 0.9, no Nesterov; clip 3 per parameter; last layer frozen for one epoch; teacher temperature 0.04 to 0.07
# over 20 % of the run; centre momentum 0.9; teacher momentum 0.996 to 1; crops 2 x 300 and 4 x 200 frames; every crop
# gets either reverberation or MUSAN noise (here each with probability 0.5: some get both and some neither).
_VOXCELEB2_DINO: dict[str, Any] = {
    "method": "dino",
    "model": {"dialect": "wespeaker", "ecapa": {"channels": 512, "attention_context": True, "embedding_norm": True}},
    "data": {
        "workers": 12,
        "augment": {"noise_p": 0.5, "rir_p": 0.5},
    },
    "optim": {"lr": 0.2, "min_lr": 5e-5, "warmup": "20 epochs", "weight_decay": 5e-5, "weight_decay_end": 5e-5},
    "run": {"epochs": 150, "batch": 64},
}

# WeSpeaker examples/voxceleb/v2/conf/ecapa_tdnn.yaml, utils/schedulers.py, same commit: ECAPA C=512, Vox1-O 1.069 %
# EER (0.957 with AS-norm). Segments of 200 frames, noise or reverberation with probability 0.6, speeds 0.9 / 1.0 / 1.1
# as three times the speakers; SGD with Nesterov, weight decay 1e-4 on every parameter, lr 0.1 to 5e-5 exponentially
# with 6 warm-up epochs, scaled by global batch / 64; scale 32, margin 0 to 0.2 between epochs 20 and 40.
# Compare 3D-Speaker egs/voxceleb/sv-ecapa/conf/ecapa_tdnn.yaml (commit 09e7806729ed412d3f216316a552a30c8e9e37fa):
# C=1024, 3 s, augmentation 0.8, lr 0.2 cosine to 5e-5 over 70 epochs at batch 256, margin 0.3 between epochs 20 and 50.
_VOXCELEB2_SUPERVISED: dict[str, Any] = {
    "method": "supervised",
    "model": {"dialect": "wespeaker", "ecapa": {"channels": 512, "attention_context": True}},
    "data": {"seconds": 2.015, "workers": 16, "augment": {"noise_p": 0.3, "rir_p": 0.3}},
    "aam": {"scale": 32.0, "margin": 0.2, "margin_start": "19 epochs", "margin_end": "39 epochs"},
    "optim": {
        "lr": 0.1,
        "min_lr": 5e-5,
        "lr_reference_batch": 64,
        "schedule": "exponential",
        "warmup": "6 epochs",
        "nesterov": True,
        "weight_decay": 1e-4,
        "weight_decay_end": 1e-4,
        "decay_norm_and_bias": True,
        "clip": 0.0,
    },
    "run": {"epochs": 150, "batch": 128},
}

# Large-margin fine-tuning, WeSpeaker examples/voxceleb/v2/conf/*_lm.yaml: 6 s segments, margin fixed at 0.5, 5 epochs,
# lr 1e-4 to 2.5e-5 after one warm-up epoch, batch 64. Start it with model.init=<the supervised run's checkpoint>.
_VOXCELEB2_LARGE_MARGIN: dict[str, Any] = {
    **_VOXCELEB2_SUPERVISED,
    "data": {**_VOXCELEB2_SUPERVISED["data"], "seconds": 6.015},
    "aam": {"scale": 32.0, "margin": 0.5, "initial_margin": 0.5, "margin_start": "0 epochs", "margin_end": "0 epochs"},
    "optim": {**_VOXCELEB2_SUPERVISED["optim"], "lr": 1e-4, "min_lr": 2.5e-5, "warmup": "1 epoch"},
    "run": {"epochs": 5, "batch": 64},
}

# The recipe found by experiment on an hour of unlabelled commands (one CPU thread, minutes): Sinkhorn-Knopp targets and
# KoLeo, because plain centring collapses on so little data; a small network with stride 2; crops of 2 and 1 seconds;
# light noise, no reverberation. Give it speech whose silent ends were cut off (recipes/pretrain/trim_silence.py): crops
# that are mostly silence have nothing in common. The front-end ends at 4 kHz (60 bands, as dense as 80 up to 8 kHz):
# the test set (digits) has nothing above, and a network that never looks there behaves the same on telephone and on
# wide-band speech.
_SMALL_DINO: dict[str, Any] = {
    "method": "dino",
    "model": {
        "ecapa": {"n_mels": 60, "channels": 128, "mfa_channels": 384, "stride": 2, "embedding_dim": 128},
        "frontend": {
            "n_mels": 60,
            "fmax": 4000.0,
            "n_fft": 512,
            "window": "hann",
            "center_pad": "reflect",
            "mel": "htk",
            "log": "ln",
            "log_floor": 1e-6,
            "log_floor_mode": "add",
            "top_db": None,
        },
    },
    "data": {
        "global_seconds": 2.0,
        "local_seconds": 1.0,
        "feature_versions": 8,
        "augment": {"noise_p": 0.5, "snr_db": [15.0, 30.0], "rir_p": 0.0},
    },
    "dino": {
        "prototypes": 2048,
        "head_hidden": 512,
        "bottleneck": 128,
        "head_norm": False,
        "targets": "sinkhorn",
        "koleo": 0.3,
        "teacher_temp": 0.04,
        "momentum": 0.98,
        "momentum_end": 0.998,
        "freeze_last_layer": "1 epoch",
    },
    "optim": {
        "name": "adamw",
        "lr": 1e-3,
        "min_lr": 1e-5,
        "lr_reference_batch": None,
        "warmup": "40 steps",
        "weight_decay": 1e-4,
        "weight_decay_end": 1e-4,
        "clip": 3.0,
        "clip_mode": "global",
    },
    "run": {"steps": 240, "batch": 32, "precision": "bf16", "log_every": 10, "save_every": "50 steps", "seed": 1},
}

_SMALL_SUPERVISED: dict[str, Any] = {
    "method": "supervised",
    "model": _SMALL_DINO["model"],
    "data": {
        "seconds": 2.0,
        "min_seconds": 1.0,
        "speeds": [1.0],
        "augment": {"noise_p": 0.5, "snr_db": [10.0, 30.0], "rir_p": 0.2},
    },
    "aam": {"margin": 0.2, "margin_start": "20%", "margin_end": "50%"},
    "optim": {**_SMALL_DINO["optim"], "weight_decay": 1e-3, "weight_decay_end": 1e-3},
    "run": {"steps": 400, "batch": 64, "precision": "bf16", "log_every": 10, "save_every": "50 steps", "seed": 1},
}

# Seconds, not minutes: that a machine can train at all, and what the tests run.
_SMOKE: dict[str, Any] = {
    "method": "dino",
    "model": {
        "ecapa": {
            "channels": 32,
            "mfa_channels": 48,
            "embedding_dim": 24,
            "se_channels": 16,
            "attention_channels": 16,
            "stride": 2,
        }
    },
    "data": {"global_seconds": 0.8, "local_seconds": 0.5, "local_crops": 2, "min_seconds": 0.4, "seconds": 0.6},
    "dino": {
        "prototypes": 64,
        "head_hidden": 32,
        "bottleneck": 16,
        "head_norm": False,
        "targets": "sinkhorn",
        "koleo": 0.1,
        "teacher_temp": 0.04,
        "momentum": 0.9,
        "freeze_last_layer": "2 steps",
        "collapse": {"action": "warn"},
    },
    "aam": {"margin_start": "20%", "margin_end": "60%"},
    "optim": {
        "name": "adamw",
        "lr": 1e-3,
        "min_lr": 1e-4,
        "lr_reference_batch": None,
        "warmup": "3 steps",
        "weight_decay": 1e-4,
        "weight_decay_end": 1e-4,
    },
    "run": {"steps": 20, "batch": 8, "log_every": 1, "save_every": "5 steps", "tensorboard": False, "seed": 0},
}

PRESETS: dict[str, dict[str, Any]] = {
    "voxceleb2_dino": _VOXCELEB2_DINO,
    "voxceleb2_supervised": _VOXCELEB2_SUPERVISED,
    "voxceleb2_large_margin": _VOXCELEB2_LARGE_MARGIN,
    "small_dino": _SMALL_DINO,
    "small_supervised": _SMALL_SUPERVISED,
    "smoke": _SMOKE,
}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping; ConfigError if the file is missing or holds something else."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror or error}; pass --preset {{{', '.join(PRESETS)}}} instead?"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: got a {type(values).__name__}, expected a mapping of sections")
    return values


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        out[key] = _merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def load(preset: str | None = None, *, file: str | Path | None = None, overrides: Sequence[str] = ()) -> PretrainConfig:
    """The configuration of a run: preset, then YAML file, then ``key=value`` overrides, later ones winning.

    Raises ConfigError if the preset or a key is unknown, or a value is of the wrong type or out of range.
    """
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"preset {preset!r} is unknown; valid presets: {', '.join(PRESETS)}")
    values = _merge({}, PRESETS[preset]) if preset else {}
    if file is not None:
        values = _merge(values, read_yaml(file))
    return PretrainConfig.from_dict(apply_overrides(values, overrides))
