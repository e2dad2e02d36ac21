"""3D-Speaker: its supervised model, RDINO and SDPN, and the folders of their trainings.

All three have SpeechBrain's tensors. A training writes ``exp/NAME/config.yaml``; below ``exp/NAME/models`` a supervised
one keeps ``CKPT-EPOCH-N-00/embedding_model.ckpt`` with ``epoch_counter.ckpt`` beside it, RDINO and SDPN
``checkpoint.pth`` and ``checkpointNNNN.pth``. ModelScope publishes one weights file beside ``configuration.json``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ...errors import CheckpointMismatch
from ..files import File
from ..format import INSIDE, NAMED, SPECIFIC, STATED, Claim, Format
from ..networks import Network
from ..sidecars import Settings, arguments, expect, layer_widths, mentions, read_json, read_yaml
from .speechbrain import MODULES

__all__ = ["FORMATS", "Rdino", "Sdpn", "Supervised"]

_MODEL: dict[str, Any] = {
    "ours": {
        "input_size": "n_mels",
        "lin_neurons": "embedding_dim",
        "attention_channels": "attention_channels",
        "se_channels": "se_channels",
        "res2net_scale": "res2_scale",
        "global_context": "attention_context",
    },
    "ignored": ("channels", "kernel_sizes", "dilations", "groups", "device", "n_mels"),
}


def _configuration(path: Path) -> Path | None:
    """``config.yaml`` of a weights file: beside it, or at the top of its training's folder."""
    folders = [path.parent]
    if path.parent.name.startswith("CKPT-"):
        folders += [path.parent.parent, path.parent.parent.parent]
    elif path.parent.name == "models":
        folders += [path.parent.parent]
    return next((folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()), None)


class _ThreeDSpeaker(Format):
    """What the three have in common: key map, published configuration."""

    modules = MODULES
    component: str  # of the training's config.yaml
    kind: str

    def stated(self, file: File) -> str:
        """What the neighbours say it is: the sentence, "" for nothing."""
        configuration = _configuration(file.path)
        if configuration is not None and mentions(configuration, "speakerlab."):
            kind = next((k for k in ("sdpn", "rdino") if mentions(configuration, f"speakerlab.models.{k}")), "ecapa_tdnn")
            return f"{configuration} is of 3D-Speaker" if kind == self.kind else ""
        published = file.path.parent / "configuration.json"
        data = read_json(published)
        if "framework" in data and "task" in data:
            told = str(data.get("model", "")) + file.path.name
            kind = next((k for k in ("sdpn", "rdino") if k in told), "ecapa_tdnn")
            return f"{published} is ModelScope's" if kind == self.kind else ""
        return ""

    def settings(self, path: Path) -> Settings:
        published = read_json(path.parent / "configuration.json").get("model")
        told = published.get("model_config") if isinstance(published, dict) else None
        if isinstance(told, dict):
            expect(path.parent / "configuration.json", "sample_rate", told.get("sample_rate", 16000), 16000)
        source = _configuration(path)
        data = read_yaml(source) if source is not None else {}
        model = data.get(self.component)
        if source is None or not isinstance(model, dict) or "obj" not in model:
            return Settings()
        if not str(model["obj"]).endswith("ECAPA_TDNN"):
            raise CheckpointMismatch(f"{source}: got {self.component} {model['obj']}, expected an ECAPA_TDNN")
        given = model.get("args")
        fixed = {"log_input": True, "activation": "torch.nn.ReLU"}
        ecapa = {
            **arguments(source, self.component, given, fixed=fixed, **_MODEL),
            **layer_widths(source, self.component, given),
        }
        return Settings(ecapa, self.features(data, source), str(source))

    def features(self, data: dict[str, Any], source: Path) -> dict[str, Any]:
        """Fields of FrontendConfig that a training's configuration states."""
        return {}


class Supervised(_ThreeDSpeaker):
    """3D-Speaker's supervised ECAPA-TDNN.

    >>> Supervised().claim(File(Path("/nowhere/ecapa_tdnn.bin"), {})).strength == NAMED
    True
    """

    name = "3dspeaker"
    title = "3D-Speaker supervised"
    dialects = ("3dspeaker",)
    component, kind = "embedding_model", "ecapa_tdnn"
    folder_files = (
        "ecapa_tdnn.bin",
        "ecapa-tdnn.ckpt",
        "embedding_model.ckpt",
        "CKPT-*/embedding_model.ckpt",
        "models/CKPT-*/embedding_model.ckpt",
    )

    def claim(self, file: File) -> Claim:
        told = self.stated(file)
        if told:
            return Claim(STATED, told)
        folder = file.path.parent
        if folder.name.startswith("CKPT-EPOCH-"):
            return Claim(STATED, f"the folder {folder.name} is of a 3D-Speaker training")
        if (folder / "epoch_counter.ckpt").is_file():
            return Claim(STATED, "epoch_counter.ckpt beside it is 3D-Speaker's")
        if file.path.name in ("ecapa_tdnn.bin", "ecapa-tdnn.ckpt"):
            return Claim(NAMED, f"its name {file.path.name}")
        return Claim()

    def features(self, data: dict[str, Any], source: Path) -> dict[str, Any]:
        extractor = data.get("feature_extractor")
        given = extractor.get("args") if isinstance(extractor, dict) else None
        if not isinstance(extractor, dict) or not isinstance(given, dict):
            return {}
        if not str(extractor.get("obj", "FBank")).endswith("FBank"):
            raise CheckpointMismatch(f"{source}: got feature_extractor {extractor['obj']}, expected 3D-Speaker's FBank")
        told = arguments(
            source, "feature_extractor", given,
            ours={"n_mels": "n_mels", "mean_nor": "mean"}, fixed={"sample_rate": 16000},
        )  # fmt: skip
        # FBank subtracts no mean unless it is told to.
        return {} if told.get("mean", False) else {"normalisation": "none"}


class Rdino(_ThreeDSpeaker):
    """RDINO: student and teacher, each a backbone and a head.

    >>> Rdino().dialects
    ('rdino', 'modelscope')
    """

    name = "rdino"
    title = "RDINO (3D-Speaker)"
    dialects = ("rdino", "modelscope")
    pairs = True
    component, kind = "teacher_ecapa", "rdino"
    own_entries = frozenset({"dino_loss"})
    folder_files = (
        "pretrained_rdino.pth",
        "rdino.pth",
        "checkpoint.pth",
        "models/checkpoint.pth",
        "checkpoint[0-9]*.pth",
        "models/checkpoint[0-9]*.pth",
    )

    def networks(self, file: File) -> list[Network]:
        networks = super().networks(file)
        # A backbone by itself was taken out of the teacher, which is the network that is used.
        return [dataclasses.replace(n, role="teacher") if n.role == "supervised" else n for n in networks]

    def claim(self, file: File) -> Claim:
        networks = self.networks(file)
        wrapped = [network for network in networks if network.where.endswith("backbone.")]
        heads = [network for network in wrapped if any(name.startswith("head.") for name in _beside(file, network))]
        if heads or wrapped and {"teacher", "student"} & file.entries:
            return Claim(SPECIFIC if self.own_entries & file.entries else INSIDE, "its backbones with heads")
        told = self.stated(file)
        if told:
            return Claim(STATED, told)
        if self.kind in file.path.name.lower():
            return Claim(NAMED, f"its name {file.path.name}")
        if self.kind != "rdino":
            return Claim()
        if wrapped:
            return Claim(NAMED, "its tensors' beginning, backbone.")
        # No recipe of SpeechBrain's or of 3D-Speaker's supervised models embeds in that many numbers.
        if any(network.state["fc.conv.weight"].shape[0] == 512 for network in networks if "fc.conv.weight" in network.state):
            return Claim(NAMED, "the width of its embedding, 512")
        return Claim()


def _beside(file: File, network: Network) -> list[str]:
    """Names of what stands beside a network's backbone."""
    above = network.where.removesuffix("backbone.")
    plain = (path.replace("module.", "").replace("_orig_mod.", "") for path in file.tensors)
    return [path.removeprefix(above) for path in plain if path.startswith(above)]


class Sdpn(Rdino):
    """SDPN: RDINO's networks, trained with prototypes.

    >>> Sdpn().folder_files[0]
    'sdpn.pth'
    """

    name = "sdpn"
    title = "SDPN (3D-Speaker)"
    kind = "sdpn"
    own_entries = frozenset({"prototypes", "sdpn_loss", "keleo_loss"})
    folder_files = ("sdpn.pth", *(p for p in Rdino.folder_files if p.startswith(("checkpoint", "models"))))


FORMATS = (Supervised(), Rdino(), Sdpn())
