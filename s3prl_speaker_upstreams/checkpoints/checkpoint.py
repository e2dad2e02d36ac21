"""What was read: one ECAPA-TDNN in this package's names, and the encoder that is built from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..ecapa import SpeakerEncoder
from ..ecapa.config import EcapaConfig, FrontendConfig
from ..errors import CheckpointMismatch

__all__ = ["ROLES", "Checkpoint", "build_encoder", "check_shapes", "expected_shapes"]

ROLES = ("teacher", "student", "supervised", "untrained")

NORM_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Checkpoint:
    """One ECAPA-TDNN read from a file, in this package's names.

    ecapa, frontend : configurations
    state : name -> float32 Tensor (``num_batches_tracked``: int64), of :class:`~s3prl_speaker_upstreams.ecapa.Ecapa`
    format : which project's layout the file had, one of ``checkpoints.FORMATS``
    role : "teacher" or "student" of a self-supervised pair, "supervised" (one network), or "untrained"
    provenance : where it came from, plain values
    frontend_buffers : ``window`` (win_length,) and ``mel`` (n_fft / 2 + 1, n_mels) where the file carries them

    >>> Checkpoint(EcapaConfig(), FrontendConfig(), {}, "speechbrain", "supervised").provenance
    {}
    """

    ecapa: EcapaConfig
    frontend: FrontendConfig
    state: Mapping[str, Tensor]
    format: str
    role: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    frontend_buffers: Mapping[str, Tensor] = field(default_factory=dict)


def build_encoder(checkpoint: Checkpoint, dtype: str | None = None) -> SpeakerEncoder:
    """SpeakerEncoder with a checkpoint's weights and front-end, on the CPU and in eval mode.

    dtype : arithmetic of the network, "float32" (default) or "bfloat16"; parameters and outputs stay float32

    >>> from s3prl_speaker_upstreams.checkpoints import untrained
    >>> build_encoder(untrained(channels=16, mfa_channels=24)).hidden_size
    16
    """
    encoder = SpeakerEncoder(checkpoint.ecapa, checkpoint.frontend, dtype or "float32", **checkpoint.frontend_buffers)
    encoder.ecapa.load_state_dict(dict(checkpoint.state), strict=True)
    return encoder.eval()


def expected_shapes(config: EcapaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of an Ecapa with this configuration, by name; needs no memory for the model itself.

    >>> shapes = expected_shapes(EcapaConfig())
    >>> shapes["embedding.weight"], len(shapes)
    ((192, 6144), 231)
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def norm(name: str, channels: int) -> None:
        for leaf in NORM_LEAVES:
            shapes[f"{name}.{leaf}"] = () if leaf == "num_batches_tracked" else (channels,)

    c, m, d, attention = config.channels, config.mfa_channels, config.embedding_dim, config.attention_channels
    width = c // config.res2_scale
    conv("block_1.conv", c, config.n_mels, config.kernel_size)
    norm("block_1.norm", c)
    for block in ("block_2", "block_3", "block_4"):
        conv(f"{block}.tdnn1.conv", c, c, 1)
        norm(f"{block}.tdnn1.norm", c)
        for j in range(config.res2_scale - 1):
            conv(f"{block}.res2.{j}.conv", width, width, 3)
            norm(f"{block}.res2.{j}.norm", width)
        conv(f"{block}.tdnn2.conv", c, c, 1)
        norm(f"{block}.tdnn2.norm", c)
        conv(f"{block}.se.conv1", config.se_channels, c, 1)
        conv(f"{block}.se.conv2", c, config.se_channels, 1)
    conv("mfa.conv", m, 3 * c, 1)
    if config.mfa_norm:
        norm("mfa.norm", m)
    conv("pool.conv1", attention, 3 * m if config.attention_context else m, 1)
    if config.attention_hidden == "relu_norm_tanh":
        norm("pool.norm", attention)
    conv("pool.conv2", m, attention, 1)
    norm("pool_norm", 2 * m)
    conv("embedding", d, 2 * m)
    if config.embedding_norm:
        norm("embedding_norm", d)
    return shapes


def check_shapes(checkpoint: Checkpoint, what: str) -> None:
    """Hold a checkpoint's tensors against its configuration.

    what : begins the message, the file's path

    Raises CheckpointMismatch naming the first tensor that is missing, left over or of another shape.

    >>> check_shapes(Checkpoint(EcapaConfig(), FrontendConfig(), {}, "native", "supervised"), "x.pt")
    Traceback (most recent call last):
    ...
    s3prl_speaker_upstreams.errors.CheckpointMismatch: x.pt: 231 tensors are missing and 0 left over, first \
'block_1.conv.weight', for a network of channels=1024, mfa_channels=3072; leave out options that change the \
model's layers
    """
    expected, state = expected_shapes(checkpoint.ecapa), checkpoint.state
    widths = f"channels={checkpoint.ecapa.channels}, mfa_channels={checkpoint.ecapa.mfa_channels}"
    wrong = [name for name in expected if name in state and tuple(state[name].shape) != expected[name]]
    if wrong:
        name = wrong[0]
        raise CheckpointMismatch(
            f"{what}: {len(wrong)} of {len(expected)} tensors have another shape, first {name!r}: got "
            f"{tuple(state[name].shape)}, expected {expected[name]} ({widths}); blocks of unequal width are not "
            "supported, and a width given as an option must be the file's: leave it out"
        )
    missing = [name for name in expected if name not in state]
    extra = [name for name in state if name not in expected]
    if missing or extra:
        raise CheckpointMismatch(
            f"{what}: {len(missing)} tensors are missing and {len(extra)} left over, first {(missing + extra)[0]!r}, "
            f"for a network of {widths}; leave out options that change the model's layers"
        )
