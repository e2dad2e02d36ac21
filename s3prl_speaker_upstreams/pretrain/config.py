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

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..common.config import apply_overrides, build, to_dict
from ..data.augment import AugmentConfig
from ..errors import ConfigError
from .schedules import duration_steps

__all__ = [
    "AamConfig",
    "CollapseConfig",
    "DataConfig",
    "DinoConfig",
    "EvalConfig",
    "ModelConfig",
    "OptimConfig",
    "PretrainConfig",
    "ProjectorConfig",
    "RunConfig",
    "SimclrConfig",
    "VicregConfig",
    "differences",
    "flat",
    "load",
    "read_yaml",
]


@dataclass
class ModelConfig:
    """The network: a dialect of :mod:`s3prl_speaker_upstreams.ecapa` and fields that differ from its defaults.

    With ``init`` the network and the front-end are those of the checkpoint: ``ecapa`` and ``frontend`` then are changes
    to them, and a ``dialect`` other than "native" replaces the front-end by its own.
    """

    dialect: str = "native"
    ecapa: dict = field(default_factory=dict)  # fields of EcapaConfig, e.g. channels: 512
    frontend: dict = field(default_factory=dict)  # fields of FrontendConfig
    # Start from weights: a name of the registry, a file or folder of any readable format, or a run's folder, step_N.pt
    # or average.pt (then also its head, where objective and speakers are the same; otherwise a new one).
    init: str | None = None

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
    # single: one segment of an utterance (supervised); multi: the global and local crops (all others); auto: which of
    # the two the objective is usually trained on
    crops: Literal["auto", "single", "multi"] = "auto"
    speeds: tuple[float, ...] = (1.0, 0.9, 1.1)  # single crops: each speed but 1.0 makes new speakers of every speaker
    speed_classes: int | None = None  # classes of each speaker; None: one per speed
    view_speeds: tuple[float, ...] = (1.0,)  # multi crops: every utterance is played at one of these, all crops alike
    trim_db: float | None = None  # crops come from frames less than so many dB under the loudest (35, say)
    balance_speakers: bool = False  # every speaker equally often
    # multi crops: where every second global crop comes from, see data/positives.py. All but same_utterance and clusters
    # need speakers (an oracle). clusters: SSPS, arXiv 2505.14561
    positives: Literal["same_utterance", "same_speaker", "other_session", "same_session", "clusters"] = "same_utterance"
    clusters: int = 0  # how many; fewer than recordings, more than speakers
    cluster_nearest: int = 0  # 0: positives from the own cluster; else from one of so many nearest ones
    cluster_start: str = "80%"  # until then positives come from the same recording
    cluster_every: str = "1 epoch"  # new clusters
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
    """Self-distillation without labels: Caron et al. 2021, arXiv 2104.14294; with the fields at the end RDINO, SDPN."""

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
    # paper: divided by the embedding's dimension (512 there); code: by the number of prototypes (65,536), as the
    # authors' published code does, which makes the term 128 times weaker
    covariance_scale: Literal["paper", "code"] = "paper"
    regularisation_weight: float = 0.2  # multiplies variance and covariance at the end of their warm-up
    regularisation_start: float = 0.05
    regularisation_warmup: str = "10 epochs"
    # SDPN (arXiv 2308.02774): teacher and student share the student's prototypes, and the mean assignment is kept flat.
    # Its recipe: prototypes=1024 targets=sinkhorn teacher_temp=0.025 me_max=1 koleo=0.1, 1 global and 4 local crops.
    shared_prototypes: bool = False
    me_max: float = 0.0  # weight
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

    loss: Literal["aam", "softmax"] = "aam"  # softmax: plain, over a linear layer; the fields below mean nothing then

    scale: float = 32.0
    margin: float = 0.2
    initial_margin: float = 0.0
    margin_start: str = "20 epochs"  # the margin rises from here ...
    margin_end: str = "40 epochs"  # ... to here
    margin_shape: Literal["exp", "linear"] = "exp"
    sub_centres: int = 1


@dataclass
class ProjectorConfig:
    """The layers between embedding and loss: linear, BatchNorm and ReLU; dropped after training."""

    layers: int = 2
    hidden: int = 2048
    dim: int = 512


@dataclass
class SimclrConfig:
    """SimCLR: Chen et al. 2020, arXiv 2002.05709."""

    temperature: float = 0.1
    head: ProjectorConfig = field(default_factory=ProjectorConfig)

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"simclr.temperature: got {self.temperature}, expected above 0")


@dataclass
class VicregConfig:
    """VICReg: Bardes et al. 2022, arXiv 2105.04906; the weights are the paper's."""

    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0
    head: ProjectorConfig = field(default_factory=lambda: ProjectorConfig(layers=3, hidden=2048, dim=2048))


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
    # Micro-batches whose gradients are added up for one step. Not the same as a larger batch: BatchNorm, DINO's centre,
    # Sinkhorn-Knopp, KoLeo, negatives and covariances see each micro-batch alone. More processes see the global batch.
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
    compile: bool = False  # the encoder through torch.compile: faster steps after some minutes of compiling


@dataclass
class PretrainConfig:
    """One pre-training run."""

    method: Literal["dino", "supervised", "simclr", "vicreg"] = "dino"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    aam: AamConfig = field(default_factory=AamConfig)
    simclr: SimclrConfig = field(default_factory=SimclrConfig)
    vicreg: VicregConfig = field(default_factory=VicregConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    # What was asked for and cannot be done as it stands, such as noise without recordings: a new run refuses to begin.
    missing: list[str] = field(default_factory=list, init=False, compare=False, repr=False)

    @property
    def multi_crop(self) -> bool:
        """Whether a batch holds the global and local crops of each utterance, or one segment."""
        return self.data.crops == "multi" or (self.data.crops == "auto" and self.method != "supervised")

    def __post_init__(self) -> None:
        if self.run.batch < 1 or self.run.accumulate < 1:
            raise ConfigError(
                f"run: batch ({self.run.batch}) and accumulate ({self.run.accumulate}) must be at least 1"
            )
        if self.method != "supervised":
            if self.data.global_crops < 2 and self.data.local_crops < 1:
                raise ConfigError(
                    f"data: {self.method} compares different views; global_crops >= 2 or local_crops >= 1 is needed"
                )
            if not self.multi_crop:
                raise ConfigError(f"data.crops=single: {self.method} compares several crops; use auto or multi")
        if self.data.positives != "same_utterance" and (not self.multi_crop or self.method == "supervised"):
            raise ConfigError(
                f"data.positives={self.data.positives} is for self-supervised training on several crops, not for "
                f"method={self.method}, data.crops={self.data.crops}"
            )
        if self.data.feature_versions and len(self.data.view_speeds) > 1:
            raise ConfigError("data.view_speeds: cached features (data.feature_versions) have one speed")
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
            ("data.cluster_start", self.data.cluster_start),
            ("data.cluster_every", self.data.cluster_every),
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


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping; ConfigError if the file is missing or holds something else."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror or error}; expected a YAML file of settings (presets: --preset NAME)"
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


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys.

    >>> flat({"optim": {"lr": 0.1, "betas": (0.9, 0.99)}})
    {'optim.lr': 0.1, 'optim.betas': [0.9, 0.99]}
    """
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = list(value) if isinstance(value, tuple) else value
    return out


def differences(a: PretrainConfig, b: PretrainConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two configurations differ, with both values.

    >>> differences(load("matched_dino"), load("matched_supervised"))
    {'method': ('dino', 'supervised')}
    """
    one, two = flat(a.to_dict()), flat(b.to_dict())
    return {k: (one.get(k), two.get(k)) for k in (*one, *(k for k in two if k not in one)) if one.get(k) != two.get(k)}


def _missing(config: PretrainConfig, values: dict[str, Any]) -> list[str]:
    """What ``values`` say explicitly and nothing stands behind."""
    out, asked = [], values.get("data", {}).get("augment", {})
    for probability, source, option in (("noise_p", "noise", "--noise"), ("rir_p", "rirs", "--rirs")):
        augment = config.data.augment
        if probability in asked and getattr(augment, probability) > 0 and not getattr(augment, source):
            out.append(
                f"data.augment.{probability}={getattr(augment, probability):g}, but no recordings: pass {option} "
                f"FOLDER, or train without: --set data.augment.{probability}=0"
            )
    if config.method == "supervised" and config.aam.initial_margin >= 0.4 and not config.model.init:
        out.append(
            f"aam.initial_margin={config.aam.initial_margin:g} is for fine-tuning, an untrained network does not learn "
            "with it: set model.init=CHECKPOINT (the average.pt of a supervised run), or aam.initial_margin=0"
        )
    return out


def load(
    preset: str | None = None,
    *,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    given: dict[str, Any] | None = None,
) -> PretrainConfig:
    """The configuration of a run: preset, then YAML file, then ``key=value`` overrides, then ``given``, later winning.

    Where file, overrides or ``given`` (nested dictionaries) set ``model.init``, the preset's ``model`` section does not
    hold: network and front-end are the checkpoint's, but for what they say themselves.

    Raises ConfigError if the preset or a key is unknown, or a value is of the wrong type or out of range.
    """
    from .presets import PRESETS

    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"preset {preset!r} is unknown; valid presets: {', '.join(PRESETS)}")
    told = read_yaml(file) if file is not None else {}
    told = _merge(apply_overrides(told, overrides), given or {})
    values = _merge(PRESETS[preset] if preset else {}, told)
    if isinstance(told.get("model"), dict) and told["model"].get("init"):
        values["model"] = told["model"]
    config = PretrainConfig.from_dict(values)
    config.missing = _missing(config, values)
    return config
