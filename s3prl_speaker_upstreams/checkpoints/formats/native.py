"""This package's own checkpoint format: one ``.safetensors`` file that says itself what it is.

The tensors have the names of :class:`~s3prl_speaker_upstreams.ecapa.Ecapa`; front-end buffers taken over from an
original are ``frontend.window`` and ``frontend.mel``. The file's metadata holds JSON: both configurations, the role,
the original format, the provenance and the version of the format. A folder with one such file in it is read as well.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...common.files import write_whole
from ...ecapa import SpeakerEncoder
from ...ecapa.config import EcapaConfig, FrontendConfig
from ...ecapa.wave import FILTERS
from ...errors import CheckpointMismatch, CheckpointUnreadable, ConfigError, MissingPackage
from ..checkpoint import ROLES, Checkpoint, expected_shapes
from ..files import File
from ..format import Format

__all__ = ["FILE_NAME", "FORMATS", "FORMAT_VERSION", "Native", "save_native"]

FORMAT_NAME = "s3prl_speaker_upstreams"
FORMAT_VERSION = 1
FILE_NAME = "ecapa.safetensors"
_BUFFERS = ("window", "mel", *FILTERS)


def save_native(
    model: SpeakerEncoder | Checkpoint,
    path: str | os.PathLike,
    provenance: dict[str, Any] | None = None,
    *,
    role: str | None = None,
    fp16: bool = False,
) -> Path:
    """Write a model in this package's own format; the file appears whole or not at all.

    model : a SpeakerEncoder or a Checkpoint
    path : a file ending in ``.safetensors``, or a folder, in which ``ecapa.safetensors`` is written
    provenance : plain values (JSON) kept with the weights: where from, licence, training data, figures
    role : "teacher", "student" or "supervised"; by default the Checkpoint's, for a SpeakerEncoder "supervised"
    fp16 : halve the file by storing the weights in half precision; they are read back as float32

    Returns the path of the file. Raises ConfigError if `provenance` is not plain values, `role` is unknown, or a
    weight is too large for half precision.

    >>> import tempfile
    >>> encoder = SpeakerEncoder(EcapaConfig(channels=16, mfa_channels=24), FrontendConfig())
    >>> save_native(encoder, tempfile.mkdtemp(), {"licence": "Apache-2.0"}, role="teacher").name
    'ecapa.safetensors'
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise MissingPackage("the native format needs safetensors; run: pip install safetensors") from error
    checkpoint = model if isinstance(model, Checkpoint) else _checkpoint_of(model)
    role = role or checkpoint.role
    if role not in ROLES:
        raise ConfigError(f"got role={role!r}, expected one of {', '.join(ROLES)}")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in checkpoint.state.items()}
    if {k: tuple(v.shape) for k, v in tensors.items()} != expected_shapes(checkpoint.ecapa):
        raise CheckpointMismatch("the tensors to save are not those of their configuration; was the model changed?")
    if fp16:
        tensors = {name: _halved(name, tensor) for name, tensor in tensors.items()}
    for name, tensor in checkpoint.frontend_buffers.items():
        tensors[f"frontend.{name}"] = tensor.detach().cpu().to(torch.float32).contiguous()
    description = {
        "format_version": FORMAT_VERSION,
        "written_by": f"s3prl_speaker_upstreams {__version__}",
        "original_format": checkpoint.format,
        "role": role,
        "ecapa": checkpoint.ecapa.to_dict(),
        "frontend": checkpoint.frontend.to_dict(),
        "provenance": {**checkpoint.provenance, **(provenance or {})},
    }
    try:
        text = json.dumps(description, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"provenance must be plain JSON values: {error}") from error

    path = Path(path).expanduser()
    target = path if path.suffix == ".safetensors" else path / FILE_NAME
    write_whole(target, lambda beside: save_file(tensors, beside, metadata={"format": FORMAT_NAME, "config": text}))
    return target


def _halved(name: str, tensor: torch.Tensor) -> torch.Tensor:
    # Running variances span many decades: they stay exact, and are a thousandth of the file.
    if not tensor.is_floating_point() or "running_" in name:
        return tensor
    if tensor.abs().max() > torch.finfo(torch.float16).max:
        raise ConfigError(f"{name} holds values beyond half precision's 65504; save without fp16")
    return tensor.to(torch.float16)


def _checkpoint_of(encoder: Any) -> Checkpoint:
    ecapa, frontend = getattr(encoder, "ecapa", None), getattr(encoder, "frontend", None)
    if ecapa is None or frontend is None:
        raise ConfigError(f"got a {type(encoder).__name__}, expected a SpeakerEncoder or a Checkpoint")
    return Checkpoint(
        ecapa.cfg, frontend.cfg, ecapa.state_dict(), "native", "supervised", frontend_buffers=frontend.own_tensors()
    )


class Native(Format):
    """Files that :func:`save_native` wrote.

    >>> Native().find(Path("/nowhere"))
    []
    """

    name = "native"
    title = "this package's own"
    dialects = ("native",)
    metadata_format = FORMAT_NAME

    def find(self, folder: Path, role: str | None = None) -> list[Path]:
        found = sorted(folder.glob("*.safetensors"))
        if len(found) > 1:
            names = ", ".join(p.name for p in found[:4])
            raise CheckpointUnreadable(f"{folder}: holds {len(found)} safetensors files ({names}); pass one of them")
        return found

    def read(self, file: File, *, role: str | None = None, copy: str | None = None) -> Checkpoint:
        """Checkpoint of a file of ours.

        Raises CheckpointUnreadable if its description is damaged or of a later version.

        >>> Native().read(File(Path("x.safetensors"), {}, metadata={"format": FORMAT_NAME}))
        Traceback (most recent call last):
        ...
        s3prl_speaker_upstreams.errors.CheckpointUnreadable: x.safetensors: the description in its metadata is damaged \
(KeyError: 'config'); convert the original checkpoint again
        """
        try:
            description = json.loads((file.metadata or {})["config"])
            version = description["format_version"]
            if not isinstance(version, int) or version > FORMAT_VERSION:
                raise CheckpointUnreadable(
                    f"{file.path}: is of format version {version}, this package reads up to {FORMAT_VERSION}; "
                    "update s3prl-speaker-upstreams"
                )
            saved = description["role"]
            if saved not in ROLES:
                raise ValueError(f"role {saved!r} is none of {', '.join(ROLES)}")
            ecapa = EcapaConfig.from_dict(description["ecapa"])
            frontend = FrontendConfig.from_dict(description["frontend"])
            provenance = {"original_format": description.get("original_format"), **description["provenance"]}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointUnreadable(
                f"{file.path}: the description in its metadata is damaged ({type(error).__name__}: {error}); "
                "convert the original checkpoint again"
            ) from error
        for what, wanted, there in (("role", role, saved), ("copy", copy, provenance.get("copy", "raw"))):
            if wanted is not None and wanted != there:
                raise CheckpointMismatch(
                    f"{file.path}: got a native checkpoint of the {there}, expected the {wanted}; "
                    f"convert the original again with --{what} {wanted}"
                )
        buffers = {name: file.tensors[f"frontend.{name}"] for name in _BUFFERS if f"frontend.{name}" in file.tensors}
        state = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in file.tensors.items()
            if name.removeprefix("frontend.") not in buffers
        }
        return Checkpoint(ecapa, frontend, state, "native", saved, provenance, buffers)


FORMATS = (Native(),)
