"""Reading any public ECAPA-TDNN checkpoint: find the file, open it, detect its format, have that format read it.

:func:`read_checkpoint` is the whole story, top to bottom.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..ecapa import SpeakerEncoder
from ..ecapa.config import DIALECTS, EcapaConfig, FrontendConfig
from ..errors import CheckpointUnreadable, ConfigError
from .checkpoint import ROLES, Checkpoint, build_encoder, check_shapes
from .detection import FORMATS, as_told, detect
from .files import open_file, option
from .formats import BY_NAME
from .networks import COPIES

__all__ = ["detect_format", "find_file", "load_encoder", "read_checkpoint"]

logger = logging.getLogger(__name__)


def read_checkpoint(
    path: str | os.PathLike,
    *,
    format: str | None = None,
    frontend: str | Mapping[str, Any] | FrontendConfig | None = None,
    role: str | None = None,
    copy: str | None = None,
    allow_pickle: bool = False,
    **overrides: Any,
) -> Checkpoint:
    """Read a checkpoint of any supported format.

    path : the file, or the folder that holds it as its project lays it out
    format : one of FORMATS; by default detected from the file and its neighbours. SpeechBrain's and 3D-Speaker's
        supervised files (and RDINO's backbone by itself) are identical in form but want different front-ends: when
        nothing tells them apart SpeechBrain is taken and a warning says so
    frontend : a name in ``ecapa.DIALECTS`` (for RDINO and SDPN: "rdino", their authors' own and the default, or
        "modelscope"), a FrontendConfig, or its fields as a mapping; by default the format's
    role : "teacher" or "student" of a self-supervised checkpoint; by default the one that its project uses
    copy : "ema" or "raw" of a file that holds an averaged copy beside the trained weights; by default the average
    allow_pickle : open files that need more than the safe loader (they can run code); off by default
    overrides : fields of EcapaConfig or FrontendConfig to replace, such as ``dilations=(2, 3, 4)``

    Loading is strict: every tensor of the network must be there in the right shape, and every other tensor of the file
    must be known to belong to the training (heads, losses, optimizers).

    Raises CheckpointUnreadable if the file is missing, damaged or unsafe; CheckpointMismatch if its tensors are not
    those of the format, naming the likeliest other; ConfigError for unknown options.

    >>> import tempfile
    >>> from s3prl_speaker_upstreams.checkpoints import save_native, untrained
    >>> path = f"{tempfile.mkdtemp()}/tiny.safetensors"
    >>> _ = save_native(untrained(channels=16, mfa_channels=24), path)
    >>> read_checkpoint(path).ecapa.channels
    16
    """
    for name, value, known in (("format", format, FORMATS), ("role", role, ROLES), ("copy", copy, COPIES)):
        if value is not None and value not in known:
            raise ConfigError(f"got {name}={value!r}, expected one of {', '.join(known)}")
    file = open_file(find_file(path, format=format, role=role), allow_pickle=allow_pickle)
    kind = detect(file) if format is None else as_told(BY_NAME[format], file)
    checkpoint = kind.read(file, role=role, copy=copy)
    if len(kind.dialects) > 1 and frontend is None:
        logger.warning(
            "%s: %s files have two public front-ends, which the file cannot tell apart; taking its authors' own "
            "(frontend=%s: log-mel with instance normalisation). For the ModelScope library's (Kaldi fbank, mean "
            "normalisation) pass %s", file.path, kind.title, kind.dialects[0], option("frontend", kind.dialects[1]),
        )  # fmt: skip
    checkpoint = _with_options(checkpoint, frontend, overrides)
    check_shapes(checkpoint, str(file.path))
    return checkpoint


def load_encoder(path: str | os.PathLike, **options: Any) -> SpeakerEncoder:
    """Read a checkpoint of any supported format into a ready :class:`~s3prl_speaker_upstreams.ecapa.SpeakerEncoder`.

    path, options : as :func:`read_checkpoint`

    Returns the encoder on the CPU in float32 and in eval mode.

    >>> import tempfile, torch
    >>> from s3prl_speaker_upstreams.checkpoints import save_native, untrained
    >>> folder = tempfile.mkdtemp()
    >>> _ = save_native(untrained(channels=16, mfa_channels=24, embedding_dim=8), folder)
    >>> with torch.no_grad():
    ...     load_encoder(folder)([torch.zeros(16000)], outputs=("embedding",))["embedding"].shape
    torch.Size([1, 8])
    """
    return build_encoder(read_checkpoint(path, **options))


def find_file(path: str | os.PathLike, *, format: str | None = None, role: str | None = None) -> Path:
    """The weights file of a path: itself, or the one that a project's folder keeps.

    Raises CheckpointUnreadable if there is none.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "embedding_model.ckpt").write_bytes(b"...")
    >>> find_file(folder).name
    'embedding_model.ckpt'
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return path
    formats = [BY_NAME[format]] if format is not None else list(BY_NAME.values())
    # This package's own file is looked for first: it was converted from what lies beside it.
    formats.sort(key=lambda kind: kind.name != "native")
    found = list(dict.fromkeys(file for kind in formats for file in kind.find(path, role)))
    if not found:
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        names = [name for kind in formats for name in kind.folder_files[:1]]
        raise CheckpointUnreadable(
            f"{path}: the folder holds {inside}; expected one .safetensors file, or a project's own layout, such as "
            f"{', '.join(names)}; pass the weights file itself"
        )
    if len(found) > 1:
        others = ", ".join(str(p.relative_to(path)) for p in found[1:4])
        logger.info(
            "%s: reading %s (there too: %s; pass the file to read that)", path, found[0].relative_to(path), others
        )
    return found[0]


def detect_format(path: str | os.PathLike, *, allow_pickle: bool = False) -> str:
    """Format of a checkpoint file or folder, one of FORMATS; errors and warnings as :func:`detect`.

    >>> import tempfile
    >>> from s3prl_speaker_upstreams.checkpoints import save_native, untrained
    >>> folder = tempfile.mkdtemp()
    >>> _ = save_native(untrained(channels=16, mfa_channels=24), folder)
    >>> detect_format(folder)
    'native'
    """
    return detect(open_file(find_file(path), allow_pickle=allow_pickle)).name


# --- options ---------------------------------------------------------------------------------------------------------


def _with_options(
    checkpoint: Checkpoint, frontend: str | Mapping[str, Any] | FrontendConfig | None, overrides: Mapping[str, Any]
) -> Checkpoint:
    """A checkpoint with the user's choice of front-end, and fields of both configurations replaced."""
    ecapa_fields = {f.name for f in dataclasses.fields(EcapaConfig)}
    frontend_fields = {f.name for f in dataclasses.fields(FrontendConfig)}
    for key in overrides:
        if key not in ecapa_fields | frontend_fields:
            raise ConfigError(
                f"unknown option {key!r}; expected format, frontend, role, copy, allow_pickle, or a field of "
                f"EcapaConfig ({', '.join(sorted(ecapa_fields))}) or FrontendConfig "
                f"({', '.join(sorted(frontend_fields))})"
            )
    ecapa = checkpoint.ecapa.replace(**{k: v for k, v in overrides.items() if k in ecapa_fields})
    chosen = _chosen_frontend(checkpoint.frontend, frontend)
    chosen = chosen.replace(**{k: v for k, v in overrides.items() if k in frontend_fields})
    if chosen.width != ecapa.n_mels:
        raise ConfigError(
            f"got a front-end of {chosen.width} features per frame ({chosen.kind}, n_mels={chosen.n_mels}), expected "
            f"{ecapa.n_mels} as the model's first convolution has"
        )
    buffers = checkpoint.frontend_buffers
    if chosen != checkpoint.frontend and buffers:
        logger.warning("the front-end is set by option: the window and mel filters in the file are not used")
        buffers = {}
    return dataclasses.replace(checkpoint, ecapa=ecapa, frontend=chosen, frontend_buffers=buffers)


def _chosen_frontend(base: FrontendConfig, chosen: str | Mapping[str, Any] | FrontendConfig | None) -> FrontendConfig:
    if chosen is None:
        return base
    if isinstance(chosen, FrontendConfig):
        return chosen
    if isinstance(chosen, Mapping):
        return base.replace(**chosen)
    if chosen in DIALECTS:
        return DIALECTS[chosen].frontend
    raise ConfigError(
        f"got frontend={chosen!r}, expected one of {', '.join(sorted(DIALECTS))}, or the fields of FrontendConfig"
    )
