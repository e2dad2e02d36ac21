"""This package's own checkpoint format: one ``.safetensors`` file that says itself what it is.

The tensors have the names of :class:`~s3prl_speaker_upstreams.ecapa.Ecapa`; front-end buffers taken over from an
original are ``frontend.window`` and ``frontend.mel``. The file's metadata holds JSON: both configurations, the role,
the original format, the provenance and the version of the format. A folder with one such file in it is read as well.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..ecapa.config import EcapaConfig, FrontendConfig
from ..errors import CheckpointMismatch, CheckpointUnreadable, ConfigError, MissingPackage
from .files import LoadedFile
from .readers import ROLES, Checkpoint, expected_shapes

__all__ = ["FILE_NAME", "FORMAT_VERSION", "is_native", "read_native", "save_native"]

FORMAT_NAME = "s3prl_speaker_upstreams"
FORMAT_VERSION = 1
FILE_NAME = "ecapa.safetensors"
_BUFFERS = ("window", "mel")


def save_native(
    model: Any,
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
    >>> from s3prl_speaker_upstreams.ecapa import EcapaConfig, SpeakerEncoder
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
    expected = expected_shapes(checkpoint.ecapa)
    if {k: tuple(v.shape) for k, v in tensors.items()} != expected:
        raise CheckpointMismatch("the tensors to save are not those of their configuration; was the model changed?")
    if fp16:
        for name, tensor in tensors.items():
            # Running variances span many decades: they stay exact, and are a thousandth of the file.
            if tensor.is_floating_point() and "running_" not in name:
                if tensor.abs().max() > torch.finfo(torch.float16).max:
                    raise ConfigError(f"{name} holds values beyond half precision's 65504; save without fp16")
                tensors[name] = tensor.to(torch.float16)
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
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    try:
        save_file(tensors, beside, metadata={"format": FORMAT_NAME, "config": text})
        # mkstemp makes files private; a checkpoint has the permissions of any other new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(beside, 0o666 & ~mask)
        os.replace(beside, target)
    finally:
        if os.path.exists(beside):
            os.unlink(beside)
    return target


def is_native(loaded: LoadedFile) -> bool:
    """Whether a loaded file is one that :func:`save_native` wrote, and not another program's safetensors.

    >>> is_native(LoadedFile({}, {"format": "pt"})), is_native(LoadedFile({}, {"format": FORMAT_NAME}))
    (False, True)
    """
    return (loaded.metadata or {}).get("format") == FORMAT_NAME


def read_native(file: Path, loaded: LoadedFile) -> Checkpoint:
    """Checkpoint of a loaded file of ours.

    Raises CheckpointUnreadable if its description is damaged or of a later version.

    >>> read_native(Path("x.safetensors"), LoadedFile({}, {"format": FORMAT_NAME}))
    Traceback (most recent call last):
    ...
    s3prl_speaker_upstreams.errors.CheckpointUnreadable: x.safetensors: the description in its metadata is damaged \
(KeyError: 'config'); convert the original checkpoint again
    """
    metadata = loaded.metadata or {}
    try:
        description = json.loads(metadata["config"])
        version = description["format_version"]
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise CheckpointUnreadable(
                f"{file}: is of format version {version}, this package reads up to {FORMAT_VERSION}; "
                "update s3prl-speaker-upstreams"
            )
        role = description["role"]
        if role not in ROLES:
            raise ValueError(f"role {role!r} is none of {', '.join(ROLES)}")
        checkpoint = Checkpoint(
            ecapa=EcapaConfig.from_dict(description["ecapa"]),
            frontend=FrontendConfig.from_dict(description["frontend"]),
            state={},
            format="native",
            role=role,
            provenance=dict(description["provenance"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointUnreadable(
            f"{file}: the description in its metadata is damaged ({type(error).__name__}: {error}); "
            "convert the original checkpoint again"
        ) from error
    checkpoint.provenance.setdefault("original_format", description.get("original_format"))
    for name, tensor in loaded.data.items():
        if name.startswith("frontend.") and name.removeprefix("frontend.") in _BUFFERS:
            checkpoint.frontend_buffers[name.removeprefix("frontend.")] = tensor
        else:
            checkpoint.state[name] = tensor.float() if tensor.is_floating_point() else tensor
    return checkpoint


def _checkpoint_of(encoder: Any) -> Checkpoint:
    ecapa, frontend = getattr(encoder, "ecapa", None), getattr(encoder, "frontend", None)
    if ecapa is None or frontend is None:
        raise ConfigError(f"got a {type(encoder).__name__}, expected a SpeakerEncoder or a Checkpoint")
    checkpoint = Checkpoint(ecapa.cfg, frontend.cfg, ecapa.state_dict(), "native", "supervised")
    checkpoint.frontend_buffers = _given_buffers(frontend)
    return checkpoint


def _given_buffers(frontend: Any) -> dict[str, torch.Tensor]:
    """Window and mel filters of a front-end, where they are not those that its configuration makes."""
    made = type(frontend)(frontend.cfg)
    given = {name: getattr(frontend, name) for name in _BUFFERS}
    return {name: tensor for name, tensor in given.items() if not torch.equal(tensor.cpu(), getattr(made, name).cpu())}
