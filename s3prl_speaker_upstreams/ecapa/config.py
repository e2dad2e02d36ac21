"""Every difference between the public ECAPA-TDNN implementations, as named fields.

"ECAPA-TDNN" (arXiv 2005.07143) is a different network, behind a different front-end, in SpeechBrain, WeSpeaker,
3D-Speaker, sslsv and TaoRuijie's repository. Here there is one model (:mod:`.model`) and one front-end
(:mod:`.frontend`); an :class:`EcapaConfig` and a :class:`FrontendConfig` say which of them is meant, and
:data:`DIALECTS` holds the values of each project.

>>> DIALECTS["wespeaker"].ecapa["padding"], DIALECTS["wespeaker"].frontend.scale
('zeros', 32768.0)
>>> EcapaConfig.from_dict({"chanels": 512})
Traceback (most recent call last):
...
s3prl_speaker_upstreams.errors.ConfigError: EcapaConfig: unknown key 'chanels'; did you mean 'channels'?
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from ..common.audio import SAMPLE_RATE
from ..common.config import to_dict
from ..common.hints import did_you_mean
from ..errors import ConfigError

__all__ = ["DIALECTS", "SAMPLE_RATE", "Dialect", "EcapaConfig", "FrontendConfig"]

T = TypeVar("T", bound="_Config")


class _Config:
    """Dictionary conversion and value checks shared by both configurations."""

    _choices: Mapping[str, tuple]
    _positive: tuple[str, ...]

    def __post_init__(self) -> None:
        name = type(self).__name__
        for key, allowed in self._choices.items():
            if getattr(self, key) not in allowed:
                raise ConfigError(f"{name}: got {key}={getattr(self, key)!r}, expected one of {list(allowed)}")
        for key in self._positive:
            value = getattr(self, key)
            values = value if isinstance(value, tuple) else (value,)
            if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values):
                raise ConfigError(f"{name}: got {key}={value!r}, expected whole numbers of at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain values (tuples as lists), fit for JSON; the inverse of :meth:`from_dict`."""
        return to_dict(self)

    @classmethod
    def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
        """Configuration from a mapping; missing keys take their defaults.

        Raises ConfigError if a key is unknown (naming the nearest known one) or a value is out of range.
        """
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                raise ConfigError(f"{cls.__name__}: unknown key {key!r}; {did_you_mean(key, known)}")
        return cls(**{k: tuple(v) if type(v) is list else v for k, v in values.items()})

    def replace(self: T, **changes: Any) -> T:
        """Copy with some fields changed; unknown names raise ConfigError like :meth:`from_dict`."""
        return self.from_dict({**self.to_dict(), **changes})


@dataclass(frozen=True)
class EcapaConfig(_Config):
    """Shape and wiring of one ECAPA-TDNN; the defaults are SpeechBrain's published model.

    n_mels : features per frame that enter the first convolution
    channels : width C of ``block_1`` .. ``block_4`` (the hidden states)
    mfa_channels : width M of the multi-layer feature aggregation; pooling gives 2M
    embedding_dim : D of the utterance embedding
    kernel_size, stride : of the first convolution. Stride 2 halves the time axis: hidden states every 320 samples
    dilations : of the three SE-Res2 blocks (kernel 3)
    res2_scale : chunks of a Res2 convolution (one passes unchanged, the others are convolved)
    se_channels, attention_channels : bottlenecks of squeeze-excitation and of the attention of the pooling
    padding : what every convolution sees beyond an utterance's ends: its own reflection, or zeros
    res2_identity : which chunk passes unchanged. "first": convolution j works on chunk j + 1; "last": on chunk j
    block_wiring : input of a block. "sequential": the last output; "cumulative": b(x), b(x + x1), b(x + x1 + x2)
    mfa_norm : batch normalisation after the MFA's ReLU
    attention_context : the attention sees [x, mean, deviation] of the utterance instead of x alone
    attention_hidden : between the two attention layers, "relu_norm_tanh" or "tanh"
    context_var_unbiased, context_var_floor, context_var_floor_mode : variance of that context: divided by n - 1 or n;
        "clamp"ed from below by the floor, or the floor is "add"ed. A single frame has variance 0 before the floor,
        also where n - 1 = 0
    pool_var, pool_var_floor : weighted variance, clamped by the floor. The original forms it "centred", as
        sum a (x - mean)^2, or from "moments", sum a x^2 - mean^2; these are equal, and both are evaluated centred:
        the cancellation of the moments would amplify rounding a hundredfold
    embedding_norm : batch normalisation of the embedding

    >>> EcapaConfig(channels=512).replace(stride=2).downsample
    2
    """

    n_mels: int = 80
    channels: int = 1024
    mfa_channels: int = 3072
    embedding_dim: int = 192
    kernel_size: int = 5
    stride: int = 1
    dilations: tuple[int, ...] = (2, 3, 4)
    res2_scale: int = 8
    se_channels: int = 128
    attention_channels: int = 128
    padding: str = "reflect"
    res2_identity: str = "first"
    block_wiring: str = "sequential"
    mfa_norm: bool = True
    attention_context: bool = True
    attention_hidden: str = "relu_norm_tanh"
    context_var_unbiased: bool = False
    context_var_floor: float = 1e-12
    context_var_floor_mode: str = "clamp"
    pool_var: str = "centred"
    pool_var_floor: float = 1e-12
    embedding_norm: bool = False

    _choices = MappingProxyType(
        {
            "padding": ("reflect", "zeros"),
            "res2_identity": ("first", "last"),
            "block_wiring": ("sequential", "cumulative"),
            "attention_hidden": ("relu_norm_tanh", "tanh"),
            "context_var_floor_mode": ("clamp", "add"),
            "pool_var": ("centred", "moments"),
            "mfa_norm": (True, False),
            "attention_context": (True, False),
            "context_var_unbiased": (True, False),
            "embedding_norm": (True, False),
        }
    )
    _positive = (
        *("n_mels", "channels", "mfa_channels", "embedding_dim", "kernel_size", "stride", "dilations"),
        *("res2_scale", "se_channels", "attention_channels"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels % self.res2_scale or self.res2_scale < 2:
            raise ConfigError(
                f"EcapaConfig: got channels={self.channels}, res2_scale={self.res2_scale}; expected a scale of "
                "at least 2 that divides channels"
            )
        if self.kernel_size % 2 == 0:
            raise ConfigError(f"EcapaConfig: got kernel_size={self.kernel_size}, expected an odd number")
        if len(self.dilations) != 3:
            raise ConfigError(f"EcapaConfig: got dilations={self.dilations}, expected one for each of the three blocks")

    @property
    def downsample(self) -> int:
        """Feature frames per hidden-state frame."""
        return self.stride


@dataclass(frozen=True)
class FrontendConfig(_Config):
    """From 16 kHz waveforms in +-1 to normalised features; the defaults are SpeechBrain's.

    kind : "log_mel"; "mfcc", the cosine transform of the log-mel bands; or "wave", a filter bank on samples that is
        trained with the network (:mod:`.wave`), on which mel, window, n_fft, pre-emphasis and ``remove_dc`` have no
        bearing
    n_mels : number of mel bands, or of filters on samples
    n_mfcc, lifter, deltas : of "mfcc": coefficients kept (orthonormal DCT-II, the zeroth included); coefficient i is
        multiplied by 1 + lifter / 2 sin(pi i / lifter), 0 for none; differences of up to this order (0 to 2) appended
    wave_stride : of "wave": samples from one squared modulus to the next
    scale : factor on the waveform first (32768 where a project works on integer samples)
    win_length, hop_length : samples
    n_fft : points of the Fourier transform; a shorter window stands in its middle if ``center``, at its start otherwise
    window, window_periodic : "hamming", "hann" or "povey" (hann ** 0.85); periodic or symmetric
    center : frame t is centred on sample t * hop (1 + N // hop frames); otherwise frames lie within the samples, as
        Kaldi's ``snip_edges`` (1 + (N - win_length) // hop frames, one if there are fewer samples)
    center_pad : beyond the ends, "zeros" or "reflect" (only with ``center``)
    preemphasis : "none"; "waveform": y[t] = x[t] - 0.97 x[t - 1] with x[-1] = x[1] before framing; "frame": the same
        within each frame with x[-1] = x[0]
    remove_dc : subtract each frame's mean before pre-emphasis
    mel : "htk" (triangles in Hz), "speechbrain" (left bandwidth on both sides), "kaldi" (triangles in mel)
    fmin, fmax : Hz, ends of the mel bands
    log, log_floor, log_floor_mode : "ln" or "db" (10 log10) of the power, from below "clamp"ed or with the floor
        "add"ed
    top_db : nothing lies further below the utterance's loudest value (dB); None for no limit
    normalisation : per utterance and band, "mean", "mean_var" (biased variance plus ``norm_eps``) or "none"

    >>> FrontendConfig().replace(center=False).to_dict()["center"]
    False
    >>> FrontendConfig(kind="mfcc", n_mfcc=20, deltas=2).width
    60
    """

    kind: str = "log_mel"
    n_mels: int = 80
    n_mfcc: int = 40
    lifter: float = 0.0
    deltas: int = 0
    wave_stride: int = 8
    scale: float = 1.0
    win_length: int = 400
    hop_length: int = 160
    n_fft: int = 400
    window: str = "hamming"
    window_periodic: bool = True
    center: bool = True
    center_pad: str = "zeros"
    preemphasis: str = "none"
    remove_dc: bool = False
    mel: str = "speechbrain"
    fmin: float = 0.0
    fmax: float = 8000.0
    log: str = "db"
    log_floor: float = 1e-10
    log_floor_mode: str = "clamp"
    top_db: float | None = 80.0
    normalisation: str = "mean"
    norm_eps: float = 1e-5

    _choices = MappingProxyType(
        {
            "kind": ("log_mel", "mfcc", "wave"),
            "deltas": (0, 1, 2),
            "window": ("hamming", "hann", "povey"),
            "window_periodic": (True, False),
            "center": (True, False),
            "center_pad": ("zeros", "reflect"),
            "preemphasis": ("none", "waveform", "frame"),
            "remove_dc": (True, False),
            "mel": ("htk", "speechbrain", "kaldi"),
            "log": ("ln", "db"),
            "log_floor_mode": ("clamp", "add"),
            "normalisation": ("mean", "mean_var", "none"),
        }
    )
    _positive = ("n_mels", "n_mfcc", "wave_stride", "win_length", "hop_length", "n_fft")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_fft < self.win_length:
            raise ConfigError(f"FrontendConfig: got n_fft={self.n_fft}, expected at least win_length={self.win_length}")
        if not 0 <= self.fmin < self.fmax <= SAMPLE_RATE / 2:
            raise ConfigError(
                f"FrontendConfig: got fmin={self.fmin}, fmax={self.fmax}, expected 0 <= fmin < fmax <= 8000"
            )
        if self.kind == "mfcc" and self.n_mfcc > self.n_mels:
            raise ConfigError(
                f"FrontendConfig: got n_mfcc={self.n_mfcc}, expected at most one for each of n_mels={self.n_mels}"
            )
        if self.lifter < 0:
            raise ConfigError(f"FrontendConfig: got lifter={self.lifter}, expected 0 (none) or more, such as 22")

    @property
    def width(self) -> int:
        """Features per frame: what the network's ``n_mels`` must be."""
        return self.n_mfcc * (1 + self.deltas) if self.kind == "mfcc" else self.n_mels


@dataclass(frozen=True)
class Dialect:
    """One project's front-end and its values of :class:`EcapaConfig` (widths are its usual ones; files decide).

    >>> Dialect(FrontendConfig(), {"channels": 512}).ecapa_config(embedding_dim=256).embedding_dim
    256
    """

    frontend: FrontendConfig
    ecapa: Mapping[str, Any] = field(default_factory=dict)

    def ecapa_config(self, **changes: Any) -> EcapaConfig:
        """EcapaConfig of the dialect, some fields (such as widths read from a file) changed."""
        return EcapaConfig.from_dict({**self.ecapa, **changes})


# Facts below are the originals' code: speechbrain lobes/features.py, wespeaker dataset/processor.py and
# models/ecapa_tdnn.py, 3D-Speaker speakerlab/process, sslsv encoders/ECAPATDNN.py, TaoRuijie/ECAPA-TDNN model.py.
_KALDI = FrontendConfig(
    n_fft=512,
    window="povey",
    window_periodic=False,
    center=False,
    preemphasis="frame",
    remove_dc=True,
    mel="kaldi",
    fmin=20.0,
    log="ln",
    log_floor=1.1920928955078125e-07,
    top_db=None,
)
_TORCHAUDIO = FrontendConfig(
    n_fft=512,
    window="hann",
    center_pad="reflect",
    mel="htk",
    log="ln",
    log_floor=1e-6,
    log_floor_mode="add",
    top_db=None,
    normalisation="mean_var",
)
_SELF_SUPERVISED = {"embedding_dim": 512}

DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        "speechbrain": Dialect(FrontendConfig()),
        "wespeaker": Dialect(
            _KALDI.replace(scale=32768.0, window="hamming"),
            {
                "mfa_channels": 1536,
                "padding": "zeros",
                "res2_identity": "last",
                "mfa_norm": False,
                "attention_hidden": "tanh",
                "context_var_unbiased": True,
                "context_var_floor": 1e-7,
                "context_var_floor_mode": "add",
                "pool_var": "moments",
                "pool_var_floor": 1e-7,
            },
        ),
        "3dspeaker": Dialect(_KALDI),
        "rdino": Dialect(_TORCHAUDIO, _SELF_SUPERVISED),
        "modelscope": Dialect(_KALDI, _SELF_SUPERVISED),
        "sslsv": Dialect(_TORCHAUDIO.replace(window="hamming"), _SELF_SUPERVISED),
        "sslsv_hann": Dialect(_TORCHAUDIO, _SELF_SUPERVISED),
        "taoruijie": Dialect(
            _TORCHAUDIO.replace(window="hamming", preemphasis="waveform", fmin=20.0, fmax=7600.0, normalisation="mean"),
            {
                "mfa_channels": 1536,
                "attention_channels": 256,
                "padding": "zeros",
                "res2_identity": "last",
                "block_wiring": "cumulative",
                "mfa_norm": False,
                "context_var_unbiased": True,
                "context_var_floor": 1e-4,
                "pool_var": "moments",
                "pool_var_floor": 1e-4,
                "embedding_norm": True,
            },
        ),
        "native": Dialect(FrontendConfig()),
    }
)
