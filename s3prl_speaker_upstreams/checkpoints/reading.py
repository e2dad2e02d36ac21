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
from ..errors import CheckpointMismatch, CheckpointUnreadable, ConfigError
from .checkpoint import ROLES, Checkpoint, build_encoder, check_shapes
from .files import File, open_file, option
from .format import INSIDE, NAMED, Format
from .formats import BY_NAME
from .networks import COPIES

__all__ = ["FORMATS", "detect", "detect_format", "find_file", "load_encoder", "read_checkpoint"]

logger = logging.getLogger(__name__)

FORMATS = tuple(BY_NAME)

# A file is taken for a format from this share of its tensors on.
_ENOUGH = 0.5


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
    kind = detect(file) if format is None else _as_told(BY_NAME[format], file)
    checkpoint = kind.read(file, role=role, copy=copy)
    if len(kind.dialects) > 1 and frontend is None:
        logger.warning(
            "%s: %s files have two public front-ends, which the file cannot tell apart; taking its authors' own "
            "(frontend=%s: log-mel with instance normalisation). For the ModelScope library's (Kaldi fbank, mean "
            "normalisation) pass %s", file.path, kind.title, *kind.dialects[:1], option("frontend", kind.dialects[1]),
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


def detect(file: File) -> Format:
    """The format of an opened file.

    Where only the user can know (SpeechBrain or 3D-Speaker supervised) this gives SpeechBrain and logs a warning.

    Raises CheckpointMismatch if it is no format that is known, naming the nearest and the first difference from it.

    >>> import torch
    >>> detect(File(Path("x.pt"), {"layer.weight": torch.zeros(2)}))
    Traceback (most recent call last):
    ...
    s3prl_speaker_upstreams.errors.CheckpointMismatch: x.pt: got 1 tensors, first 'layer.weight', expected an \
ECAPA-TDNN in one of the formats 3dspeaker, native, rdino, sdpn, speechbrain, sslsv, taoruijie, wespeaker
    """
    likeness = _likeness(file)
    best = max(share for share, _ in likeness.values())
    if best < _ENOUGH:
        raise CheckpointMismatch(
            f"{file.path}: got {_describe(file)}, expected an ECAPA-TDNN in one of the formats {', '.join(FORMATS)}"
            + _nearest(likeness)
            + _canonical_hint(file)
        )
    likely = [kind for kind in BY_NAME.values() if likeness[kind.name][0] == best]
    claims = {kind.name: kind.claim(file) for kind in likely}
    chosen = max(likely, key=lambda kind: claims[kind.name].strength)
    claim = claims[chosen.name]
    if len(likely) > 1 and claim.strength <= NAMED:
        logger.warning(
            "%s: the files of %s have the same keys and shapes but different front-ends, and nothing beside the file "
            "tells which it is; taken as %s by %s. To choose pass format=%s (%s)",
            file.path, " and ".join(kind.title for kind in likely), chosen.title, claim.why,
            " or format=".join(kind.name for kind in likely), option("format", chosen.name),
        )  # fmt: skip
    elif len(likely) > 1:
        logger.info("%s: taken as %s (%s)", file.path, chosen.title, claim.why)
    return chosen


def _as_told(told: Format, file: File) -> Format:
    """The format that the user names, unless the file's contents show it to be another one.

    A native file says itself what it is; the user's word on what it was before is not needed then.
    """
    likeness = _likeness(file)
    claims = {kind.name: kind.claim(file) for kind in BY_NAME.values() if likeness[kind.name][0] >= _ENOUGH}
    if "native" in claims and told.name != "native":
        logger.warning("%s: is a native checkpoint, which says itself what it is: format=%s not used", file.path, told.name)
        return BY_NAME["native"]
    own, _ = likeness[told.name]
    sure = own >= _ENOUGH and claims[told.name].strength >= INSIDE
    for name in sorted(claims, key=lambda name: (likeness[name][0], claims[name].strength), reverse=True):
        if name != told.name and not sure and (likeness[name][0] > own or claims[name].strength >= INSIDE):
            raise CheckpointMismatch(
                f"{file.path}: got {_describe(file)}, expected {told.title} ({told.name}); the file looks like "
                f"{BY_NAME[name].title}, pass {option('format', name)}"
            )
    if own < _ENOUGH:
        raise CheckpointMismatch(
            f"{file.path}: got {_describe(file)}, expected {told.title} ({told.name}); the file looks like none of the "
            f"known formats ({', '.join(FORMATS)}){_nearest(likeness)}{_canonical_hint(file)}"
        )
    return told


def _likeness(file: File) -> dict[str, tuple[float, str]]:
    """For each format the share of its tensors that a file has, and the first that it lacks; strangers by name."""
    group = next((name for name in file.tensors if ".group_tdnn_block." in name or ".mconv." in name), None)
    if group is not None or any(name.startswith("encoder.feature_agg.") for name in file.tensors):
        raise CheckpointMismatch(
            f"{file.path}: is a NeMo speaker model (key {group or 'encoder.feature_agg'!r}). NeMo's ecapa_tdnn uses "
            "group convolutions in place of Res2 and TitaNet is another network: neither can be loaded as ECAPA-TDNN. "
            "Use a checkpoint of another project, for example the entry ecapa_tdnn (SpeechBrain)"
        )
    return {name: kind.likeness(file) for name, kind in BY_NAME.items()}


def _describe(file: File) -> str:
    if not file.tensors:
        return f"no tensors (entries {', '.join(map(repr, sorted(file.entries)[:4])) or 'none'})"
    return f"{len(file.tensors)} tensors, first {next(iter(file.tensors))!r}"


def _nearest(likeness: Mapping[str, tuple[float, str]]) -> str:
    name = max(likeness, key=lambda name: likeness[name][0])
    share, lacking = likeness[name]
    # A few names such as "conv1.weight" are in any file.
    return f"; the nearest is {BY_NAME[name].title} ({share:.0%} of its names), first without {lacking!r}" * (share > 0.1)


def _canonical_hint(file: File) -> str:
    if any("block_1.conv.weight" in name for name in file.tensors):
        return "; it has this package's own names but no configuration: save it with checkpoints.save_native"
    return ""


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
    if chosen.n_mels != ecapa.n_mels:
        raise ConfigError(
            f"got a front-end of {chosen.n_mels} mels, expected {ecapa.n_mels} as the model's first convolution has"
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
