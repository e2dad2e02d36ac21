"""Reading any public ECAPA-TDNN checkpoint: find the file, detect its format, port every tensor, check all of it.

:func:`read_checkpoint` is the whole story, top to bottom; the key maps it goes by are in :mod:`.layouts`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ecapa.config import DIALECTS, EcapaConfig, FrontendConfig
from ..errors import CheckpointMismatch, CheckpointUnreadable, ConfigError
from . import sidecars
from .files import LoadedFile, load_file
from .layouts import LAYOUTS, OPTIONAL_MODULES, TRAINER_ENTRIES, Layout, canonical_tensors

__all__ = [
    "FORMATS",
    "ROLES",
    "Checkpoint",
    "detect_format",
    "expected_shapes",
    "find_file",
    "load_encoder",
    "read_checkpoint",
]

logger = logging.getLogger(__name__)

FORMATS = (*LAYOUTS, "native")
ROLES = ("teacher", "student", "supervised", "untrained")

# Formats whose files have the same keys and shapes: (what decides between them is not in the file).
_SAME_KEYS = {"speechbrain": "3dspeaker", "3dspeaker": "speechbrain"}
# The two public front-ends of RDINO and SDPN files.
_TWO_FRONTENDS = ("rdino", "modelscope")
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass
class Checkpoint:
    """One ECAPA-TDNN read from a file, in this package's names.

    ecapa, frontend : configurations
    state : name -> float32 Tensor (``num_batches_tracked``: int64), of :class:`~s3prl_speaker_upstreams.ecapa.Ecapa`
    format : which layout the file had, one of FORMATS
    role : "teacher" or "student" of a self-supervised pair, "supervised" (one network), or "untrained"
    provenance : where it came from, plain values
    frontend_buffers : ``window`` (win_length,) and ``mel`` (n_fft / 2 + 1, n_mels) where the file carries them

    >>> Checkpoint(EcapaConfig(), FrontendConfig(), {}, "speechbrain", "supervised").provenance
    {}
    """

    ecapa: EcapaConfig
    frontend: FrontendConfig
    state: dict[str, Tensor]
    format: str
    role: str
    provenance: dict[str, Any] = field(default_factory=dict)
    frontend_buffers: dict[str, Tensor] = field(default_factory=dict)


def read_checkpoint(
    path: str | os.PathLike,
    *,
    format: str | None = None,
    frontend: str | Mapping[str, Any] | FrontendConfig | None = None,
    role: str | None = None,
    allow_pickle: bool = False,
    **overrides: Any,
) -> Checkpoint:
    """Read a checkpoint of any supported format.

    path : the file, or the folder that holds it as its project lays it out
    format : one of FORMATS; by default detected from the file (and the folder's other files). SpeechBrain's and
        3D-Speaker's supervised files are identical in form but want different front-ends: when nothing tells them
        apart SpeechBrain is taken and a warning says so
    frontend : a name in ``ecapa.DIALECTS`` (for RDINO and SDPN: "rdino", their authors' own and the default, or
        "modelscope"), a FrontendConfig, or its fields as a mapping; by default the format's
    role : "teacher" (default) or "student" of a self-supervised checkpoint
    allow_pickle : open files that need more than the safe loader (they can run code); off by default
    overrides : fields of EcapaConfig or FrontendConfig to replace, such as ``dilations=(2, 3, 4)``

    Loading is strict: every tensor of the network must be there in the right shape, and every other tensor of the file
    must be known to belong to the training (heads, losses, optimizers).

    Raises CheckpointUnreadable if the file is missing, damaged or unsafe; CheckpointMismatch if its tensors are not
    those of the format, naming the likeliest other; ConfigError for unknown options.

    >>> import tempfile, torch
    >>> from s3prl_speaker_upstreams.ecapa import Ecapa, EcapaConfig
    >>> from s3prl_speaker_upstreams.checkpoints import save_native
    >>> config = EcapaConfig(channels=16, mfa_channels=24, embedding_dim=8, se_channels=4, attention_channels=4)
    >>> path = f"{tempfile.mkdtemp()}/tiny.safetensors"
    >>> _ = save_native(Checkpoint(config, FrontendConfig(), Ecapa(config).state_dict(), "native", "supervised"), path)
    >>> read_checkpoint(path).ecapa.channels
    16
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"got format={format!r}, expected one of {', '.join(FORMATS)}")
    if role is not None and role not in ROLES:
        raise ConfigError(f"got role={role!r}, expected one of {', '.join(ROLES)}")
    ecapa_changes, frontend_changes = _split_overrides(overrides)

    from .native import is_native, read_native

    file = find_file(path, format=format, role=role)
    loaded = load_file(file, allow_pickle=allow_pickle)
    if is_native(loaded):
        checkpoint = read_native(file, loaded)
        if format not in (None, "native"):
            logger.warning("%s: is a native checkpoint, which says itself what it is: format=%s not used", file, format)
        if role is not None and role != checkpoint.role:
            raise CheckpointMismatch(
                f"{file}: got a native checkpoint of the {checkpoint.role}, expected the {role}; "
                f"convert the original again with --role {role}"
            )
        checkpoint.frontend = _frontend(checkpoint.frontend, frontend, frontend_changes, checkpoint)
        checkpoint.ecapa = checkpoint.ecapa.replace(**ecapa_changes)
    else:
        checkpoint = _read_original(
            file, Path(path), loaded, format=format, frontend=frontend, role=role,
            ecapa_changes=ecapa_changes, frontend_changes=frontend_changes,
        )  # fmt: skip
    _check_shapes(checkpoint, file)
    return checkpoint


def load_encoder(path: str | os.PathLike, **options: Any):
    """Read a checkpoint of any supported format into a ready :class:`~s3prl_speaker_upstreams.ecapa.SpeakerEncoder`.

    path, options : as :func:`read_checkpoint`

    Returns the encoder on the CPU in float32 and in eval mode.

    >>> import tempfile, torch
    >>> from s3prl_speaker_upstreams.checkpoints import save_native
    >>> from s3prl_speaker_upstreams.ecapa import EcapaConfig, SpeakerEncoder
    >>> config = EcapaConfig(channels=16, mfa_channels=24, embedding_dim=8, se_channels=4, attention_channels=4)
    >>> folder = tempfile.mkdtemp()
    >>> _ = save_native(SpeakerEncoder(config, FrontendConfig()), folder)
    >>> encoder = load_encoder(folder)
    >>> with torch.no_grad():
    ...     encoder([torch.zeros(16000)], outputs=("embedding",))["embedding"].shape
    torch.Size([1, 8])
    """
    return build_encoder(read_checkpoint(path, **options))


def build_encoder(checkpoint: Checkpoint, dtype: str | None = None):
    """SpeakerEncoder with a checkpoint's weights and front-end, in eval mode.

    dtype : arithmetic of the network, "float32" (default) or "bfloat16"; parameters and outputs stay float32

    >>> from s3prl_speaker_upstreams.checkpoints import untrained
    >>> build_encoder(untrained(channels=16, mfa_channels=24)).hidden_size
    16
    """
    from ..ecapa import SpeakerEncoder

    precision = {} if dtype is None else {"dtype": dtype}
    encoder = SpeakerEncoder(checkpoint.ecapa, checkpoint.frontend, **precision, **checkpoint.frontend_buffers)
    encoder.ecapa.load_state_dict(checkpoint.state, strict=True)
    return encoder.eval()


def detect_format(path: str | os.PathLike, *, allow_pickle: bool = False) -> str:
    """Format of a checkpoint file or folder, one of FORMATS.

    Where only the user can know (SpeechBrain or 3D-Speaker supervised) this answers "speechbrain" and logs a warning.

    Raises CheckpointUnreadable as :func:`read_checkpoint`; CheckpointMismatch if it is no format that is known.

    >>> import tempfile
    >>> from s3prl_speaker_upstreams.checkpoints import save_native
    >>> from s3prl_speaker_upstreams.ecapa import EcapaConfig, SpeakerEncoder
    >>> folder = tempfile.mkdtemp()
    >>> _ = save_native(SpeakerEncoder(EcapaConfig(channels=16, mfa_channels=24), FrontendConfig()), folder)
    >>> detect_format(folder)
    'native'
    """
    from .native import is_native

    file = find_file(path)
    loaded = load_file(file, allow_pickle=allow_pickle)
    if is_native(loaded):
        return "native"
    return _detect(_top(loaded, file), file, Path(path))


def expected_shapes(config: EcapaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of an Ecapa with this configuration, by name; needs no memory for the model itself.

    >>> expected_shapes(EcapaConfig())["embedding.weight"]
    (192, 6144)
    """
    c, m, d = config.channels, config.mfa_channels, config.embedding_dim
    r, width = config.res2_scale, config.channels // config.res2_scale
    conv = {
        "block_1.conv": (c, config.n_mels, config.kernel_size),
        "tdnn1.conv": (c, c, 1),
        "tdnn2.conv": (c, c, 1),
        "res2": (width, width, 3),
        "se.conv1": (config.se_channels, c, 1),
        "se.conv2": (c, config.se_channels, 1),
        "mfa.conv": (m, 3 * c, 1),
        "pool.conv1": (config.attention_channels, 3 * m if config.attention_context else m, 1),
        "pool.conv2": (m, config.attention_channels, 1),
        "embedding": (d, 2 * m),
    }
    norm = {"mfa.norm": m, "pool.norm": config.attention_channels, "pool_norm": 2 * m, "embedding_norm": d}
    present = {
        "mfa.norm": config.mfa_norm,
        "pool.norm": config.attention_hidden == "relu_norm_tanh",
        "embedding_norm": config.embedding_norm,
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name in canonical_tensors(r - 1, frozenset(k for k, there in present.items() if not there)):
        module, leaf = name.rsplit(".", 1)
        inner = module.split(".", 1)[1] if module.startswith("block_") else module
        if leaf == "num_batches_tracked":
            shapes[name] = ()
        elif module.endswith("norm"):
            channels = norm.get(module, width if inner.startswith("res2.") else c)
            shapes[name] = (channels,)
        else:
            key = module if module in conv else "res2" if inner.startswith("res2.") else inner
            shapes[name] = conv[key] if leaf == "weight" else conv[key][:1]
    return shapes


# --- finding the file ------------------------------------------------------------------------------------------------


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
    layouts = [LAYOUTS[format]] if format in LAYOUTS else list(LAYOUTS.values())
    if format in (None, "native"):
        native = sorted(path.glob("*.safetensors"))
        if len(native) == 1:
            return native[0]
        if len(native) > 1:
            names = ", ".join(p.name for p in native[:4])
            raise CheckpointUnreadable(f"{path}: holds {len(native)} safetensors files ({names}); pass one of them")
    names = list(dict.fromkeys(name for layout in layouts for name in layout.folder_files))
    found = [path / name for name in names if (path / name).is_file()]
    raw = sorted(
        (p for folder in (path, path / "models", path / "checkpoints") for p in folder.glob("model_*.pt")),
        key=lambda p: (sum(int(d) for d in "".join(c if c.isdigit() else " " for c in p.stem).split()[-1:]), p.name),
    )
    raw = [p for p in raw if p not in found]
    if raw and not found:
        found = raw[-1:]
    elif raw and role == "student" and found[0].name == "avg_model.pt":
        # WeSpeaker's average holds the teacher alone; its epochs hold both.
        found = raw[-1:]
    if not found:
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        raise CheckpointUnreadable(
            f"{path}: the folder holds {inside}; expected one of {', '.join(names[:8])} or one .safetensors file; "
            "pass the weights file itself"
        )
    if len(found) > 1:
        others = ", ".join(str(p.relative_to(path)) for p in found[1:])
        logger.info("%s: reading %s (%s is there too; pass the file to read that)", path, found[0].name, others)
    return found[0]


# --- the formats -----------------------------------------------------------------------------------------------------


def _read_original(
    file: Path,
    given: Path,
    loaded: LoadedFile,
    *,
    format: str | None,
    frontend: str | Mapping[str, Any] | FrontendConfig | None,
    role: str | None,
    ecapa_changes: dict[str, Any],
    frontend_changes: dict[str, Any],
) -> Checkpoint:
    top = _top(loaded, file)
    if format == "native":
        raise CheckpointMismatch(
            f"{file}: got another program's file, expected a native checkpoint (.safetensors, of `convert`); "
            f"{_likely(top, file)} or convert it first"
        )
    if format is None:
        format = _detect(top, file, given)
    layout = LAYOUTS[format]
    selected = _select(layout, top, role, file)
    state, absent = _port(layout, selected, top, file)

    hints = sidecars.read(file, layout.name)
    widths = _widths(state, absent)
    for key, value in hints.ecapa.items():
        if key in widths and widths[key] != value:
            raise CheckpointMismatch(
                f"{file}: got {key}={widths[key]} by its tensors, expected {value} as {hints.source} says; "
                "the two are not of one model: move the file out of the folder to read it alone"
            )
    config = DIALECTS[layout.dialect].ecapa_config(**{**widths, **hints.ecapa, **ecapa_changes})

    checkpoint = Checkpoint(
        ecapa=config,
        frontend=DIALECTS[layout.dialect].frontend,
        state=state,
        format=format,
        role=selected.role,
        provenance={"file": file.name, "format": format, "bytes": file.stat().st_size},
        frontend_buffers=_buffers(layout, selected.state, file),
    )
    base = _frontend_from_buffers(checkpoint, file).replace(n_mels=config.n_mels, **hints.frontend)
    if layout.name in ("rdino", "sdpn") and frontend is None:
        logger.warning(
            "%s: %s files have two public front-ends, which the file cannot tell apart; taking its authors' own "
            "(frontend=rdino: log-mel with instance normalisation). For the ModelScope library's (Kaldi fbank, mean "
            "normalisation) pass frontend=modelscope (command line: --frontend modelscope)",
            file, layout.title,
        )  # fmt: skip
    checkpoint.frontend = _frontend(base, frontend, frontend_changes, checkpoint)
    return checkpoint


@dataclass
class _Selected:
    """The network that a role names: its tensors (prefix taken off), its role, and the prefix."""

    state: dict[str, Tensor]
    role: str
    where: str
    ignored: int = 0


def _top(loaded: LoadedFile, file: Path) -> dict[str, Any]:
    """The file's top-level mapping; NeMo's is refused by name here, before anything else is tried."""
    data = loaded.data
    if isinstance(data, torch.nn.Module):
        data = data.state_dict()
    if not isinstance(data, Mapping):
        raise CheckpointMismatch(
            f"{file}: got a saved {type(data).__name__}, expected a mapping of names to tensors (a state dict)"
        )
    top = {str(k): v for k, v in data.items()}
    keys = _flat_keys(top)
    if any(".group_tdnn_block." in k or ".mconv." in k or k.startswith("encoder.feature_agg.") for k in keys):
        raise CheckpointMismatch(
            f"{file}: is a NeMo speaker model (key {next(k for k in keys if 'encoder.' in k)!r}). NeMo's ecapa_tdnn "
            "uses group convolutions in place of Res2 and TitaNet is another network: neither can be loaded as "
            "ECAPA-TDNN. Use a checkpoint of another project, for example the entry ecapa_tdnn (SpeechBrain)"
        )
    return top


def _flat_keys(top: Mapping[str, Any]) -> list[str]:
    keys: list[str] = []
    for name, value in top.items():
        if isinstance(value, Mapping):
            keys.extend(str(k) for k, v in value.items() if isinstance(v, Tensor))
        elif isinstance(value, Tensor):
            keys.append(name)
    return keys


def _tensors(mapping: Mapping[str, Any]) -> dict[str, Tensor]:
    return {str(k): v for k, v in mapping.items() if isinstance(v, Tensor)}


def _unwrap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off what DistributedDataParallel and torch.compile put before every name."""
    for prefix in _WRAPPERS:
        if state and all(k.startswith(prefix) for k in state):
            return _unwrap({k[len(prefix) :]: v for k, v in state.items()})
    return state


def _network(top: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a plain state dict, also one under "model" or "state_dict"."""
    for name in ("model", "state_dict"):
        if isinstance(top.get(name), Mapping):
            return _unwrap(_tensors(top[name]))
    return _unwrap(_tensors(top))


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def _networks(layout: Layout, top: Mapping[str, Any]) -> tuple[dict[str, _Selected], str]:
    """Every network that a file of this layout holds, by role, and which of them its project uses."""
    found: dict[str, _Selected] = {}
    default = "supervised"

    def add(role: str, state: dict[str, Tensor], where: str) -> None:
        if state:
            found[role] = _Selected(state, role, where)

    if layout.name in ("rdino", "sdpn"):
        for role in ("teacher", "student"):
            value = top.get(role)
            if isinstance(value, Mapping):
                add(role, _under(_unwrap(_tensors(value)), "backbone."), f"{role}: backbone.")
        if not found:
            add("teacher", _under(_network(top), "backbone."), "backbone.")
        default = "teacher"
    elif layout.name == "sslsv":
        state = _network(top)
        momentum, encoder = _under(state, "encoder_momentum."), _under(state, "encoder.")
        add("teacher", momentum, "encoder_momentum.")
        add("student" if momentum else "supervised", encoder, "encoder.")
        # DINO is the method with a momentum head; sslsv embeds with DINO's momentum encoder, with MoCo's, BYOL's and
        # every other method's plain encoder.
        default = (
            "teacher" if any(k.startswith("head_momentum.") for k in state) else "student" if momentum else default
        )
    elif layout.name == "wespeaker":
        state = _network(top)
        pairs = (("t_model.", "s_model.", "teacher"), ("encoder_k.", "encoder_q.", "student"))
        for teacher, student, used in pairs:
            add("teacher", _under(state, teacher), teacher)
            add("student", _under(state, student), student)
            if found:
                default = used
                break
        else:
            add("supervised", _under(state, "encoder."), "encoder.")
            if not found:
                # The average of a DINO training is its teacher, head and all; that of a classifier has "projection".
                ssl = any(k.startswith("projection_head.") for k in state)
                default = "teacher" if ssl else "supervised"
                add(default, state, "")
    elif layout.name == "taoruijie":
        add("supervised", _under(_network(top), "speaker_encoder."), "speaker_encoder.")
    else:
        add("supervised", _network(top), "")
    return found, default


def _select(layout: Layout, top: Mapping[str, Any], role: str | None, file: Path) -> _Selected:
    found, default = _networks(layout, top)
    if not found:
        raise CheckpointMismatch(
            f"{file}: got {_describe(top)}, expected {layout.title} ({layout.name}); {_likely(top, file)}"
        )
    wanted = role or (default if default in found else next(iter(found)))
    if wanted not in found:
        raise CheckpointMismatch(
            f"{file}: got a {layout.title} file with {' and '.join(f'the {r} network' for r in found)}, expected the "
            f"{wanted}; leave role out, or pass role={next(iter(found))}"
            + (" (WeSpeaker's models/model_N.pt hold both)" if layout.name == "wespeaker" and role == "student" else "")
        )
    if len(found) > 1 and role is None:
        logger.info("%s: reading the %s (%s); for the other pass role=", file, wanted, found[wanted].where)
    return found[wanted]


def _port(
    layout: Layout, selected: _Selected, top: Mapping[str, Any], file: Path
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Our names for the file's tensors; every tensor must be used or known to belong to the training."""
    source = dict(selected.state)
    res2 = layout.count_res2(source)
    buffers = set(layout.buffers.values())
    absent = frozenset(
        module
        for _, original, module in layout.tensors(res2)
        if module in OPTIONAL_MODULES and original.endswith(".weight") and original not in source
    ) | (OPTIONAL_MODULES - set(layout.modules))
    wanted = {ours: theirs for ours, theirs, module in layout.tensors(res2) if module not in absent}
    missing = [theirs for theirs in wanted.values() if theirs not in source]
    used = set(wanted.values()) | buffers
    unused = [k for k in source if k not in used and not layout.is_ignored(k)]
    unused += _unknown_entries(layout, top)
    if missing or unused or not res2:
        total = len(source)
        parts = []
        if missing:
            parts.append(f"{len(missing)} of {len(wanted)} expected keys are not there, first {missing[0]!r}")
        if unused:
            parts.append(f"{len(unused)} of {total} keys unmatched, first {unused[0]!r}")
        raise CheckpointMismatch(
            f"{file}: {'; '.join(parts) or 'no Res2 convolutions'} (read as {layout.title}, {layout.name}); "
            f"{_likely(top, file, besides=layout.name)}"
        )
    state = {}
    for ours, theirs in wanted.items():
        state[ours] = _convert(ours, source[theirs], f"{selected.where}{theirs}", file)
    return state, absent


def _unknown_entries(layout: Layout, top: Mapping[str, Any]) -> list[str]:
    """Tensors elsewhere in the file that nothing accounts for."""
    unknown: list[str] = []
    if layout.name in ("rdino", "sdpn"):
        known = {"teacher", "student", "model", "state_dict"}
        unknown += [k for k in top if k not in known | TRAINER_ENTRIES and not k.startswith(("module.", "backbone."))]
        unknown += [k for k in _network(top) if not k.startswith("backbone.") and not layout.is_ignored(k)
                    and k not in TRAINER_ENTRIES]  # fmt: skip
        return list(dict.fromkeys(unknown))
    state = _network(top)
    holder = next((n for n in ("model", "state_dict") if isinstance(top.get(n), Mapping)), None)
    if holder is not None:
        unknown += [k for k in top if k != holder and k not in TRAINER_ENTRIES]
    else:
        unknown += [k for k, v in top.items() if not isinstance(v, Tensor) and k not in TRAINER_ENTRIES]
    prefixes = {
        "sslsv": ("encoder.", "encoder_momentum."),
        "wespeaker": ("t_model.", "s_model.", "encoder_q.", "encoder_k.", "encoder."),
        "taoruijie": ("speaker_encoder.",),
    }.get(layout.name, ())
    if any(k.startswith(prefixes) for k in state) if prefixes else False:
        unknown += [k for k in state if not k.startswith(prefixes) and not layout.is_ignored(k)]
    return unknown


def _convert(name: str, tensor: Tensor, original: str, file: Path) -> Tensor:
    """A tensor as this package keeps it: float32 and contiguous, 1x1 convolutions and linear layers in one shape."""
    if name.endswith("num_batches_tracked"):
        # Averaged checkpoints hold it as a float.
        return tensor.detach().round().to(torch.int64).reshape(()).clone()
    if not tensor.is_floating_point():
        raise CheckpointMismatch(f"{file}: {original!r} holds {tensor.dtype}, expected floating point")
    tensor = tensor.detach().to(torch.float32, copy=True).contiguous()
    if not torch.isfinite(tensor).all():
        raise CheckpointMismatch(
            f"{file}: {original!r} holds NaN or infinite values; the training diverged or the file is damaged: "
            "take an earlier epoch or fetch it again"
        )
    if name == "embedding.weight":
        return tensor.squeeze(-1) if tensor.dim() == 3 and tensor.shape[-1] == 1 else tensor
    if name.endswith((".se.conv1.weight", ".se.conv2.weight")) and tensor.dim() == 2:
        return tensor.unsqueeze(-1)
    return tensor


def _widths(state: Mapping[str, Tensor], absent: frozenset[str]) -> dict[str, Any]:
    """Every field of EcapaConfig that the tensors' shapes tell."""
    first = state["block_1.conv.weight"]
    attention, mfa = state["pool.conv1.weight"], state["mfa.conv.weight"]
    scale = 1
    while f"block_2.res2.{scale - 1}.conv.weight" in state:
        scale += 1
    return {
        "n_mels": _size(first, 1),
        "channels": _size(first, 0),
        "kernel_size": _size(first, 2),
        "res2_scale": scale,
        "se_channels": _size(state["block_2.se.conv1.weight"], 0),
        "mfa_channels": _size(mfa, 0),
        "mfa_norm": "mfa.norm" not in absent,
        "attention_channels": _size(attention, 0),
        # With context the attention sees three times the MFA's width.
        "attention_context": _size(attention, 1) != _size(mfa, 0),
        "attention_hidden": "tanh" if "pool.norm" in absent else "relu_norm_tanh",
        "embedding_dim": _size(state["embedding.weight"], 0),
        "embedding_norm": "embedding_norm" not in absent,
    }


def _size(tensor: Tensor, axis: int) -> int:
    # A tensor of too few axes is reported by the shape check that follows, with its name.
    return tensor.shape[axis] if tensor.dim() > axis else 1


def _check_shapes(checkpoint: Checkpoint, file: Path) -> None:
    expected = expected_shapes(checkpoint.ecapa)
    state = checkpoint.state
    wrong = [name for name in expected if name in state and tuple(state[name].shape) != expected[name]]
    missing = [name for name in expected if name not in state]
    extra = [name for name in state if name not in expected]
    if wrong:
        name = wrong[0]
        raise CheckpointMismatch(
            f"{file}: {len(wrong)} of {len(expected)} tensors have another shape, first {name!r}: got "
            f"{tuple(state[name].shape)}, expected {expected[name]} (channels={checkpoint.ecapa.channels}, "
            f"mfa_channels={checkpoint.ecapa.mfa_channels}); blocks of unequal width are not supported, and a width "
            "given as an option must be the file's: leave it out"
        )
    if missing or extra:
        raise CheckpointMismatch(
            f"{file}: {len(missing)} tensors are missing and {len(extra)} left over, first {(missing + extra)[0]!r}, "
            f"for the configuration {checkpoint.ecapa.to_dict()}; leave out options that change the model's layers"
        )


# --- front-ends ------------------------------------------------------------------------------------------------------


def _buffers(layout: Layout, state: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    found = {name: state[key] for name, key in layout.buffers.items() if key in state}
    coefficient = found.pop("preemphasis", None)
    if coefficient is not None:
        values = coefficient.flatten().tolist()
        if len(values) != 2 or abs(values[0] + 0.97) > 1e-6 or abs(values[1] - 1.0) > 1e-6:
            raise CheckpointMismatch(f"{file}: got the pre-emphasis filter {values}, expected [-0.97, 1.0]")
    return {name: tensor.detach().to(torch.float32, copy=True).contiguous() for name, tensor in found.items()}


def _frontend_from_buffers(checkpoint: Checkpoint, file: Path) -> FrontendConfig:
    """The format's front-end, with the sizes and the kind of window that the file's own buffers show."""
    config, buffers = checkpoint.frontend, checkpoint.frontend_buffers
    if "mel" in buffers:
        bins, mels = buffers["mel"].shape
        config = config.replace(n_fft=2 * (bins - 1), n_mels=mels)
    if "window" in buffers:
        window = buffers["window"]
        config = config.replace(win_length=window.numel())
        for kind, make in (("hamming", torch.hamming_window), ("hann", torch.hann_window)):
            if torch.allclose(window, make(window.numel(), periodic=True), atol=1e-5):
                return config.replace(window=kind, window_periodic=True)
        logger.warning("%s: its window is neither hamming nor hann; the file's own is used as it is", file)
    return config


def _frontend(
    base: FrontendConfig,
    chosen: str | Mapping[str, Any] | FrontendConfig | None,
    changes: Mapping[str, Any],
    checkpoint: Checkpoint,
) -> FrontendConfig:
    if chosen is None:
        config = base
    elif isinstance(chosen, FrontendConfig):
        config = chosen
    elif isinstance(chosen, Mapping):
        config = base.replace(**chosen)
    elif chosen in DIALECTS:
        config = DIALECTS[chosen].frontend
    else:
        raise ConfigError(
            f"got frontend={chosen!r}, expected one of {', '.join(sorted(DIALECTS))}, or the fields of FrontendConfig"
        )
    config = config.replace(**changes)
    if config.n_mels != checkpoint.ecapa.n_mels:
        raise ConfigError(
            f"got a front-end of {config.n_mels} mels, expected {checkpoint.ecapa.n_mels} as the model's first "
            "convolution has"
        )
    if config != base and checkpoint.frontend_buffers:
        logger.warning("the front-end is set by option: the window and mel filters in the file are not used")
        checkpoint.frontend_buffers = {}
    return config


def _split_overrides(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    ecapa_fields = {f.name for f in dataclasses.fields(EcapaConfig)}
    frontend_fields = {f.name for f in dataclasses.fields(FrontendConfig)}
    for key in overrides:
        if key not in ecapa_fields | frontend_fields:
            raise ConfigError(
                f"unknown option {key!r}; expected format, frontend, role, allow_pickle, or a field of EcapaConfig "
                f"({', '.join(sorted(ecapa_fields))}) or FrontendConfig ({', '.join(sorted(frontend_fields))})"
            )
    return (
        {k: v for k, v in overrides.items() if k in ecapa_fields},
        {k: v for k, v in overrides.items() if k in frontend_fields},
    )


# --- detection -------------------------------------------------------------------------------------------------------


def _scores(top: Mapping[str, Any]) -> dict[str, float]:
    """For each format, the fraction of its network's keys that the file has."""
    scores = {}
    for name, layout in LAYOUTS.items():
        networks, _ = _networks(layout, top)
        best = 0.0
        for selected in networks.values():
            wanted = [theirs for _, theirs, module in layout.tensors(7) if module not in OPTIONAL_MODULES]
            best = max(best, sum(key in selected.state for key in wanted) / len(wanted))
        scores[name] = best
    return scores


def _detect(top: Mapping[str, Any], file: Path, given: Path) -> str:
    scores = _scores(top)
    best = max(scores.values())
    names = [name for name, score in scores.items() if score == best]
    if best < 0.5:
        raise CheckpointMismatch(
            f"{file}: got {_describe(top)}, expected an ECAPA-TDNN in one of the formats {', '.join(FORMATS)}"
            + _canonical_hint(top)
        )
    if set(names) == {"rdino", "sdpn"}:
        return "sdpn" if {"prototypes", "sdpn_loss", "keleo_loss"} & set(top) else "rdino"
    if set(names) == set(_SAME_KEYS):
        return _speechbrain_or_3dspeaker(file, given)
    return names[0]


def _speechbrain_or_3dspeaker(file: Path, given: Path) -> str:
    told = sidecars.speechbrain_or_3dspeaker(file)
    if told is not None:
        name, because = told
        logger.info("%s: taken as %s (%s)", file, LAYOUTS[name].title, because)
        return name
    name = "3dspeaker" if file.name in ("ecapa_tdnn.bin", "ecapa-tdnn.ckpt") else "speechbrain"
    logger.warning(
        "%s: SpeechBrain's and 3D-Speaker's supervised checkpoints have the same keys and shapes but different "
        "front-ends, and nothing beside the file tells which it is; taken as %s%s. To choose pass format=speechbrain "
        "or format=3dspeaker (command line: --format)",
        file, LAYOUTS[name].title, f" by its name {file.name}" if name == "3dspeaker" else "",
    )  # fmt: skip
    return name


def _likely(top: Mapping[str, Any], file: Path, besides: str | None = None) -> str:
    scores = {k: v for k, v in _scores(top).items() if k != besides and k != _SAME_KEYS.get(besides or "")}
    best = max(scores, key=lambda k: scores[k])
    if scores[best] >= 0.5:
        return f"the file looks like {LAYOUTS[best].title}, pass --format {best} (format={best!r})"
    if besides is not None and _scores(top)[besides] >= 0.5:
        return "it is near that format but not it: a changed model, or a damaged file"
    return f"the file looks like none of the known formats ({', '.join(FORMATS)}){_canonical_hint(top)}"


def _canonical_hint(top: Mapping[str, Any]) -> str:
    if any("block_1.conv.weight" in k for k in _flat_keys(top)):
        return "; it has this package's own names but no configuration: save it with checkpoints.save_native"
    return ""


def _describe(top: Mapping[str, Any]) -> str:
    keys = _flat_keys(top)
    if not keys:
        return f"no tensors (entries {', '.join(map(repr, list(top)[:4])) or 'none'})"
    return f"{len(keys)} tensors, first {keys[0]!r}"
