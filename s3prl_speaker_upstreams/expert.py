"""The s3prl upstream: an ECAPA-TDNN checkpoint behind s3prl's ``UpstreamBase`` contract."""

from __future__ import annotations

import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import yaml
from s3prl.upstream.interfaces import UpstreamBase
from torch import Tensor, nn

from s3prl_speaker_upstreams.checkpoints import build_encoder, read_checkpoint
from s3prl_speaker_upstreams.common.audio import SAMPLE_RATE
from s3prl_speaker_upstreams.ecapa import Ragged
from s3prl_speaker_upstreams.errors import BadWaveform, ConfigError

__all__ = ["Outputs", "UpstreamExpert", "check_wavs", "read_options", "tie"]

logger = logging.getLogger(__name__)

BLOCKS = ("block_1", "block_2", "block_3", "block_4")
KEYS = ("hidden_states", "last_hidden_state", *BLOCKS, "mfa", "embedding", "fbank")
NUMBERED = tuple(f"hidden_state_{i}" for i in range(len(BLOCKS)))  # s3prl's names, counted from 0


def check_wavs(wavs: Sequence[Tensor]) -> None:
    """Refuse what is not a non-empty list of non-empty, finite, one-dimensional floating-point waveforms.

    Raises
    ------
    BadWaveform
        Naming the position of the first bad waveform, what it is, and what to do.

    >>> check_wavs([torch.zeros(16000)])
    >>> check_wavs([torch.zeros(16000, dtype=torch.int16)])
    Traceback (most recent call last):
    ...
    s3prl_speaker_upstreams.errors.BadWaveform: wavs[0]: got dtype torch.int16, expected floating point in [-1, 1]; \
divide 16-bit samples by 32768
    """
    if isinstance(wavs, Tensor) or not isinstance(wavs, (list, tuple)):
        shape = f" of shape {tuple(wavs.shape)}" if isinstance(wavs, Tensor) else ""
        raise BadWaveform(
            f"wavs: got a {type(wavs).__name__}{shape}, expected a list of unpadded 1-D tensors; "
            "pass [wav[:n] for wav, n in zip(wavs, lengths)]"
        )
    if not wavs:
        raise BadWaveform("wavs: got an empty list, expected at least one waveform")
    for i, wav in enumerate(wavs):
        if not isinstance(wav, Tensor):
            raise BadWaveform(f"wavs[{i}]: got {type(wav).__name__}, expected a torch.Tensor; use torch.from_numpy")
        if wav.dim() != 1:
            raise BadWaveform(
                f"wavs[{i}]: got shape {tuple(wav.shape)}, expected (samples,); average or select the channels first"
            )
        if not wav.is_floating_point():
            raise BadWaveform(
                f"wavs[{i}]: got dtype {wav.dtype}, expected floating point in [-1, 1]; divide 16-bit samples by 32768"
            )
        if wav.numel() == 0:
            raise BadWaveform(f"wavs[{i}]: got no samples, expected at least one; leave empty recordings out")
    # one synchronisation for the whole batch: a sum is non-finite if any sample is
    sums = torch.stack([wav.detach().sum(dtype=torch.float32) for wav in wavs])
    if not bool(torch.isfinite(sums).all()):
        i = int((~torch.isfinite(sums)).nonzero()[0])
        bad = int((~torch.isfinite(wavs[i])).sum())
        raise BadWaveform(
            f"wavs[{i}]: got {bad} NaN or infinite of {wavs[i].numel()} samples, expected finite ones; "
            "repair or leave out that recording"
        )


class Outputs(dict):
    """What an upstream returns: some values at once, others computed when first asked for.

    computed : values by key;  keys : all keys, in order;  compute : gives the value of any other key
    aliases : further names of values, which are not listed

    ``-s mfa`` and ``-s embedding`` cost more than the hidden states do, so they are computed on demand, in the
    gradient mode of the forward pass. Asking for a key that does not exist is an error that lists those that do;
    s3prl's Featurizer would otherwise fall back to ``hidden_states`` silently. Pickles and ``torch.save`` hold an
    ``OrderedDict`` of all values, which is read without this package.
    """

    def __init__(
        self,
        computed: dict[str, Any],
        keys: Sequence[str],
        compute: Callable[[str], Any],
        aliases: Sequence[str] = (),
    ) -> None:
        super().__init__(computed)
        self._keys, self._aliases = tuple(keys), frozenset(aliases)
        self._compute = compute
        self._grad = torch.is_grad_enabled()

    def _known(self, key: object) -> bool:
        return key in self._keys or key in self._aliases or super().__contains__(key)

    def __missing__(self, key: str) -> Any:
        if key not in self:
            raise KeyError(key)
        with torch.set_grad_enabled(self._grad):
            value = self._compute(key)
        if key not in self._aliases:
            self[key] = value
        return value

    def __contains__(self, key: object) -> bool:
        if self._known(key):
            return True
        if isinstance(key, str) and not key.startswith("_"):
            others = f" or {', '.join(sorted(self._aliases))}" if self._aliases else ""
            raise ConfigError(
                f"feature selection: got {key!r}, expected one of {', '.join(self._keys)}{others}; change -s"
            )
        return False

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if self._known(key) else default

    def __iter__(self) -> Iterator[str]:
        yield from self._keys
        yield from (key for key in super().__iter__() if key not in self._keys)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def keys(self):
        return list(self)

    def values(self):
        return [self[key] for key in self]

    def items(self):
        return [(key, self[key]) for key in self]

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def __reduce__(self) -> tuple:
        # a dictionary that torch.load(weights_only=True) can build from a call, as it cannot dict itself
        return OrderedDict, (), None, None, iter(self.items())


class _Tied(torch.autograd.Function):
    """``x`` unchanged; its backward pass also hands a zero gradient to each of ``parameters``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.like]
        return (grad, *zeros)


def tie(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What an output of ``module`` has to pass so that DistributedDataParallel can train on any choice of outputs.

    DDP waits for the gradient of every parameter that any returned output needs. A loss on some outputs leaves those
    of the others without one, and the second step raises "Expected to have finished reduction". After ``tie`` every
    output brings every parameter a gradient, zero where it does not depend on it. Outside distributed training, and
    where no gradients are recorded, outputs pass unchanged.
    """
    if not (torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return lambda x: x
    parameters = [p for p in module.parameters() if p.requires_grad]
    return (lambda x: _Tied.apply(x, *parameters)) if parameters else (lambda x: x)


class UpstreamExpert(UpstreamBase):
    """ECAPA-TDNN as an s3prl upstream.

    Parameters
    ----------
    ckpt : path
        Checkpoint file or folder in any format of :data:`s3prl_speaker_upstreams.checkpoints.FORMATS`.
    model_config : path, optional
        yaml file (s3prl's ``-g``) with any of the options below or fields of ``EcapaConfig`` / ``FrontendConfig``; it
        wins over every keyword.
    format : str, optional
        Which project's layout the file has; found from the file where it can be.
    frontend : str, optional
        Front-end dialect, where one file is used with several.
    role : {"teacher", "student"}, optional
        Which network of a self-distillation checkpoint; the teacher by default.
    dtype : {"float32", "bfloat16"}, optional
        Arithmetic of the encoder; hidden states always come as float32.
    allow_pickle : bool
        Load files that need full unpickling, which can run code hidden in them.

    The upstream takes ``wavs``, a list of unpadded (samples,) float tensors at 16 kHz in [-1, 1], and returns
    ``hidden_states``, a list of four (batch, frames, C) tensors, ``block_1`` .. ``block_4``, zero behind each
    utterance's end; by further keys ``last_hidden_state``, ``block_1`` .. ``block_4``, ``mfa`` (batch, frames, M),
    ``embedding`` (batch, frames, D; the utterance's embedding repeated over its frames) and ``fbank``, the normalised
    front-end features (batch, frames, n_mels); ``hidden_state_0`` .. ``hidden_state_3`` are s3prl's names of the
    blocks. Every utterance's values are those it has alone.

    In train mode BatchNorm takes the statistics of the batch only where gradients are recorded and its own parameters
    require them: a frozen upstream gives the same in train as in eval mode. After ``.half()`` or ``.bfloat16()`` the
    features are still computed in float32, and the hidden states come in the converted precision.

    Front-ends without centring give up to two frames fewer than s3prl keeps (``round(len / rate)``); the last frame is
    then repeated, so that what s3prl keeps of an utterance is also the same alone and in any batch.

    ``layer_names``, ``frame_shift`` (seconds between frames) and ``first_center`` (seconds from the first sample to the
    centre of the first frame's window) say what the hidden states are and when, for tools that compare models.

    Raises ``CheckpointUnreadable``, ``CheckpointMismatch``, ``ConfigError``, and ``BadWaveform`` at call.

    >>> expert = UpstreamExpert("ecapa.safetensors").eval()  # doctest: +SKIP
    >>> len(expert([torch.randn(16000)])["hidden_states"])  # doctest: +SKIP
    4
    """

    layer_names = BLOCKS
    exact_in_batch = True  # every utterance of at least one sample gets what it gets alone

    def __init__(
        self,
        ckpt: str | os.PathLike,
        model_config: str | os.PathLike | None = None,
        family: str | None = None,
        **options,
    ):
        super().__init__()
        if model_config is not None:
            options.update(read_options(model_config))
        dtype = options.pop("dtype", None)
        options.pop("refresh", None)
        checkpoint = read_checkpoint(ckpt, **options)
        self.checkpoint_format = checkpoint.format
        self.role = checkpoint.role
        self.provenance = checkpoint.provenance
        self._say_what_it_is(str(ckpt), family)
        self.encoder = build_encoder(checkpoint, dtype=dtype)
        self.frame_shift = self.encoder.downsample_rate / SAMPLE_RATE
        self.first_center = 0.0 if checkpoint.frontend.center else checkpoint.frontend.win_length / 2 / SAMPLE_RATE

    def _say_what_it_is(self, ckpt: str, family: str | None) -> None:
        logger.info("%s: format %s, role %s", ckpt, self.checkpoint_format, self.role)
        logger.info(
            "layers: %s. -l counts from 0; -s %s .. %s or %s .. %s gives one by its name",
            *(", ".join(f"{i} {name}" for i, name in enumerate(BLOCKS)), BLOCKS[0], BLOCKS[-1]),
            *(NUMBERED[0], NUMBERED[-1]),
        )
        if self.role == "untrained":
            logger.warning("%s holds UNTRAINED random weights: fit for testing only, not for results", ckpt)
        elif family == "dino" and self.role == "supervised":
            logger.warning("%s is a supervised model, read through an ecapa_dino entry", ckpt)
        elif family == "tdnn" and self.role in ("teacher", "student"):
            logger.warning("%s is a self-supervised model, read through an ecapa_tdnn entry", ckpt)

    def get_downsample_rates(self, key: str) -> int:
        """Samples per frame of feature ``key``."""
        if key == "fbank":
            return self.encoder.frontend.hop
        return self.encoder.downsample_rate

    def forward(self, wavs: Sequence[Tensor]) -> Outputs:
        check_wavs(wavs)
        samples = [wav.numel() for wav in wavs]
        # Where processes train together each must see all outputs of a forward pass within it.
        eager = torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized()
        wanted = ("fbank", "hidden_states", "mfa", "embedding") if eager else ("fbank", "hidden_states")
        out = self.encoder(wavs, outputs=wanted)
        tied = tie(self.encoder)
        rate, hop = self.encoder.downsample_rate, self.encoder.frontend.hop
        layers = [tied(_padded(layer, samples, rate)) for layer in out["hidden_states"]]

        def compute(key: str) -> Any:
            if key == "last_hidden_state":
                return layers[-1]
            if key in BLOCKS:
                return layers[BLOCKS.index(key)]
            if key in NUMBERED:
                return layers[NUMBERED.index(key)]
            if key == "fbank":
                return tied(_padded(out["fbank"], samples, hop))
            if key not in out:  # from the hidden states on; what was computed is not computed again
                out.update(self.encoder.ecapa.head(out["hidden_states"], outputs=("mfa", "embedding")))
            if key == "mfa":
                return tied(_padded(out["mfa"], samples, rate))
            return tied(_repeated(out["embedding"], out["hidden_states"][-1].lengths, samples, rate))

        outputs = Outputs({"hidden_states": layers}, KEYS, compute, NUMBERED)
        if eager:
            outputs.values()
        return outputs


def read_options(path: str | os.PathLike) -> dict[str, Any]:
    """Options of a ``-g`` yaml file, as a dictionary."""
    try:
        with open(path, encoding="utf-8") as file:
            options = yaml.safe_load(file)
    except OSError as error:
        where = "" if os.path.isabs(path) else f" below {os.getcwd()}"
        raise ConfigError(f"{path}: cannot be read{where} ({error}); -g takes a yaml file of options") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not yaml ({error}); -g takes lines such as `format: wespeaker`") from error
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise ConfigError(f"{path}: got a {type(options).__name__}, expected `key: value` lines")
    return options


def _kept(frames: Sequence[int], samples: Sequence[int], rate: int) -> list[int]:
    """Frames that each utterance fills: its own, or as many as s3prl keeps where those are more."""
    return [max(own, math.ceil(n / rate)) for own, n in zip(frames, samples, strict=True)]


def _padded(layer: Ragged, samples: Sequence[int], rate: int) -> Tensor:
    """(batch, frames, D): each utterance's frames, the last repeated up to what s3prl keeps, then zeros."""
    return layer.extend(_kept(layer.lengths, samples, rate)).pad()


def _repeated(embedding: Tensor, frames: Sequence[int], samples: Sequence[int], rate: int) -> Tensor:
    """(batch, frames, D) from (batch, D), zero behind each utterance's kept frames."""
    kept = torch.tensor(_kept(frames, samples, rate))
    inside = torch.arange(int(kept.max()))[None, :] < kept[:, None]
    return embedding[:, None, :] * inside[..., None].to(embedding)
