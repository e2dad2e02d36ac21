"""What the files beside a checkpoint tell about it: configurations, read as data and never executed."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import CheckpointMismatch

__all__ = ["Hints", "read", "read_yaml", "speechbrain_or_3dspeaker"]

logger = logging.getLogger(__name__)


@dataclass
class Hints:
    """Fields of EcapaConfig and FrontendConfig that a project's configuration file states, and its name.

    >>> Hints(ecapa={"dilations": (2, 3, 4)}).frontend
    {}
    """

    ecapa: dict[str, Any] = field(default_factory=dict)
    frontend: dict[str, Any] = field(default_factory=dict)
    source: str = ""


class _DataLoader(yaml.SafeLoader):
    """Plain YAML; a tagged node (``!new:package.Class``, ``!ref <key>``) becomes its content with the tag beside it."""


def _tagged(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    tag = node.tag
    if isinstance(node, yaml.MappingNode):
        return {"!": tag, **loader.construct_mapping(node, deep=True)}
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return {"!": tag, "value": loader.construct_scalar(node)}


_DataLoader.add_multi_constructor("!", _tagged)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as plain data. Tags are kept as the key ``"!"`` and run nothing; ``!ref <key>`` is looked up.

    Returns {} (and logs why) if the file is not a YAML mapping.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "hyperparams.yaml"
    >>> _ = path.write_text("n: 80\\nmodel: !new:os.system\\n    command: !ref <n>\\n")
    >>> read_yaml(path)["model"]
    {'!': '!new:os.system', 'command': 80}
    """
    try:
        with open(path, encoding="utf-8") as file:
            data = yaml.load(file, Loader=_DataLoader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        logger.warning("%s: not readable as YAML, not used: %s", path, str(error).splitlines()[0])
        return {}
    if not isinstance(data, dict):
        return {}
    done: dict[int, Any] = {}
    return {key: _resolve(value, data, done) for key, value in data.items()}


def _resolve(value: Any, root: Mapping[str, Any], done: dict[int, Any]) -> Any:
    if not isinstance(value, (dict, list)):
        return value
    if id(value) not in done:
        # Aliases make one node appear many times, or within itself: each is looked at once.
        done[id(value)] = value
        done[id(value)] = _resolved(value, root, done)
    return done[id(value)]


def _resolved(value: dict | list, root: Mapping[str, Any], done: dict[int, Any]) -> Any:
    if isinstance(value, dict):
        if value.get("!") == "!ref" and isinstance(value.get("value"), str):
            whole = re.fullmatch(r"<([\w-]+)>", value["value"].strip())
            if whole and whole.group(1) in root and not isinstance(root[whole.group(1)], dict):
                return _resolve(root[whole.group(1)], root, done)
            return value
        return {k: _resolve(v, root, done) for k, v in value.items()}
    return [_resolve(v, root, done) for v in value]


def speechbrain_or_3dspeaker(file: Path) -> tuple[str, str] | None:
    """Which of the two a file's neighbours show it to be, with the reason, or None.

    >>> speechbrain_or_3dspeaker(Path("/nowhere/embedding_model.ckpt")) is None
    True
    """
    folder = file.parent
    hyperparams = folder / "hyperparams.yaml"
    if hyperparams.is_file():
        try:
            if "speechbrain." in hyperparams.read_text(encoding="utf-8", errors="replace"):
                return "speechbrain", "hyperparams.yaml beside it is SpeechBrain's"
        except OSError:
            pass
    for name in ("mean_var_norm_emb.ckpt", "label_encoder.txt", "label_encoder.ckpt"):
        if (folder / name).is_file():
            return "speechbrain", f"{name} beside it is SpeechBrain's"
    configuration = folder / "configuration.json"
    if configuration.is_file():
        try:
            data = json.loads(configuration.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            data = {}
        if isinstance(data, dict) and "framework" in data and "task" in data:
            return "3dspeaker", "configuration.json beside it is ModelScope's"
    return None


def read(file: Path, format: str) -> Hints:
    """What the project's own configuration beside a file states.

    Raises CheckpointMismatch if it describes a model or front-end that cannot be had from this file.

    >>> read(Path("/nowhere/embedding_model.ckpt"), "speechbrain").ecapa
    {}
    """
    reader = {"speechbrain": _speechbrain, "wespeaker": _wespeaker, "sslsv": _sslsv}.get(format)
    if reader is None:
        return Hints()
    names = {"speechbrain": ("hyperparams.yaml",), "wespeaker": ("config.yaml",), "sslsv": ("config.yml",)}[format]
    # A project's experiment keeps its weights one folder down; anything else's parent folder is none of its business.
    inside = file.parent.name in ("models", "checkpoints", "exps")
    for folder in (file.parent, file.parent.parent) if inside else (file.parent,):
        for name in names:
            path = folder / name
            if path.is_file():
                data = read_yaml(path)
                return reader(data, path) if data else Hints()
    return Hints()


def _expect(path: Path, what: str, got: Any, expected: Any, remedy: str = "this model cannot be loaded") -> None:
    if got != expected:
        raise CheckpointMismatch(f"{path}: got {what}={got!r}, expected {expected!r}; {remedy}")


def _speechbrain(data: dict[str, Any], path: Path) -> Hints:
    hints = Hints(source=str(path))
    model = data.get("embedding_model")
    if isinstance(model, dict) and model.get("!"):
        if "ECAPA_TDNN" not in model["!"]:
            raise CheckpointMismatch(
                f"{path}: got embedding_model {model['!']}, expected speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN; "
                "pass an ECAPA-TDNN"
            )
        channels, kernels, dilations = (model.get(k) for k in ("channels", "kernel_sizes", "dilations"))
        if isinstance(channels, list) and len(channels) == 5 and all(isinstance(c, int) for c in channels):
            if len(set(channels[:4])) != 1:
                raise CheckpointMismatch(
                    f"{path}: got channels={channels}, expected four equal ones: blocks of unequal width are not "
                    "supported"
                )
            hints.ecapa.update(channels=channels[0], mfa_channels=channels[4])
        if isinstance(kernels, list) and len(kernels) == 5:
            _expect(path, "kernel_sizes[1:]", kernels[1:], [3, 3, 3, 1])
        if isinstance(dilations, list) and len(dilations) == 5 and all(isinstance(d, int) for d in dilations):
            _expect(path, "dilations[0] and [4]", [dilations[0], dilations[4]], [1, 1])
            hints.ecapa["dilations"] = tuple(dilations[1:4])
        groups = model.get("groups")
        if isinstance(groups, list):
            _expect(path, "groups", set(groups), {1})
        for ours, theirs in (
            ("embedding_dim", "lin_neurons"),
            ("attention_channels", "attention_channels"),
            ("se_channels", "se_channels"),
            ("res2_scale", "res2net_scale"),
            ("n_mels", "input_size"),
            ("attention_context", "global_context"),
        ):
            if isinstance(model.get(theirs), (int, bool)):
                hints.ecapa[ours] = model[theirs]
    features = data.get("compute_features")
    if isinstance(features, dict):
        _expect(path, "compute_features.deltas", features.get("deltas", False), False)
        _expect(path, "compute_features.context", features.get("context", False), False)
        _expect(path, "compute_features.requires_grad", features.get("requires_grad", False), False)
        for ours, theirs in (("fmin", "f_min"), ("fmax", "f_max"), ("n_fft", "n_fft"), ("n_mels", "n_mels")):
            if isinstance(features.get(theirs), (int, float)):
                hints.frontend[ours] = features[theirs]
        _expect(path, "compute_features.sample_rate", features.get("sample_rate", 16000), 16000)
        _expect(path, "compute_features.hop_length", features.get("hop_length", 10), 10)
        _expect(path, "compute_features.win_length", features.get("win_length", 25), 25)
    normalise = data.get("mean_var_norm")  # SpeechBrain's own defaults, where it says nothing, are not this model's
    if isinstance(normalise, dict):
        _expect(path, "mean_var_norm.norm_type", normalise.get("norm_type", "global"), "sentence")
        _expect(path, "mean_var_norm.std_norm", normalise.get("std_norm", True), False)
    hints.frontend.pop("n_mels", None)
    return hints


def _wespeaker(data: dict[str, Any], path: Path) -> Hints:
    hints = Hints(source=str(path))
    model = data.get("model")
    if isinstance(model, str):
        if not model.startswith("ECAPA_TDNN"):
            raise CheckpointMismatch(f"{path}: got model={model!r}, expected an ECAPA_TDNN; pass one of those")
        hints.ecapa["attention_context"] = "GLOB" in model
        width = re.search(r"_c(\d+)$", model)
        if width:
            hints.ecapa["channels"] = int(width.group(1))
    arguments = data.get("model_args")
    if isinstance(arguments, dict):
        _expect(path, "model_args.pooling_func", arguments.get("pooling_func", "ASTP"), "ASTP")
        for ours, theirs in (("n_mels", "feat_dim"), ("embedding_dim", "embed_dim"), ("embedding_norm", "emb_bn")):
            if isinstance(arguments.get(theirs), (int, bool)):
                hints.ecapa[ours] = arguments[theirs]
    dataset = data.get("dataset_args")
    if isinstance(dataset, dict):
        remedy = "the model wants other features than Kaldi's filter bank at 16 kHz, which cannot be had from its file"
        _expect(path, "dataset_args.frontend", dataset.get("frontend", "fbank"), "fbank", remedy)
        _expect(path, "dataset_args.resample_rate", dataset.get("resample_rate", 16000), 16000, remedy)
        bank = dataset.get("fbank_args")
        if isinstance(bank, dict):
            _expect(path, "fbank_args.frame_shift", bank.get("frame_shift", 10), 10, remedy)
            _expect(path, "fbank_args.frame_length", bank.get("frame_length", 25), 25, remedy)
        if dataset.get("cmvn", True) is False:
            hints.frontend["normalisation"] = "none"
        cmvn = dataset.get("cmvn_args")
        if isinstance(cmvn, dict):
            _expect(path, "cmvn_args.norm_var", cmvn.get("norm_var", False), False, remedy)
            if cmvn.get("norm_mean", True) is False:
                hints.frontend["normalisation"] = "none"
    return hints


def _sslsv(data: dict[str, Any], path: Path) -> Hints:
    hints = Hints(source=str(path))
    encoder = data.get("encoder")
    if isinstance(encoder, dict):
        kind = encoder.get("type", "ecapatdnn")
        _expect(path, "encoder.type", str(kind).lower().replace("_", "").replace("-", ""), "ecapatdnn", "pass an ECAPA")
        channels = encoder.get("channels")
        if isinstance(channels, list) and len(channels) == 5:
            hints.ecapa.update(channels=channels[0], mfa_channels=channels[4])
        dilations = encoder.get("dilations")
        if isinstance(dilations, list) and len(dilations) == 5:
            hints.ecapa["dilations"] = tuple(dilations[1:4])
        for ours, theirs in (("n_mels", "mel_n_mels"), ("embedding_dim", "encoder_dim")):
            if isinstance(encoder.get(theirs), int):
                hints.ecapa[ours] = encoder[theirs]
    return hints
