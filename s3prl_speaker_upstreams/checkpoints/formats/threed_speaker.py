"""3D-Speaker: its supervised model, RDINO and SDPN, and the folders of their trainings.

All three have SpeechBrain's tensors. A training writes ``exp/NAME/config.yaml``; below ``exp/NAME/models`` a supervised
one keeps ``CKPT-EPOCH-N-00/embedding_model.ckpt`` with ``epoch_counter.ckpt`` beside it, RDINO and SDPN
``checkpoint.pth`` and ``checkpointNNNN.pth``. ModelScope publishes one weights file beside ``configuration.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import CheckpointMismatch
from ..format import Format
from ..sidecars import Settings, arguments, expect, layer_widths, read_json, read_yaml
from .speechbrain import MODULES

__all__ = ["FORMATS", "Rdino", "Sdpn", "Supervised"]

# Arguments of speakerlab's ECAPA_TDNN classes; RDINO's takes the logarithm and normalises itself.
_MODEL: dict[str, Any] = {
    "ours": {
        "input_size": "n_mels",
        "lin_neurons": "embedding_dim",
        "attention_channels": "attention_channels",
        "se_channels": "se_channels",
        "res2net_scale": "res2_scale",
        "global_context": "attention_context",
    },
    "fixed": {"log_input": True, "activation": "torch.nn.ReLU"},
    "ignored": ("channels", "kernel_sizes", "dilations", "groups", "device", "n_mels"),
}


class _ThreeDSpeaker(Format):
    """What the three have in common: key map, the shape of the configuration."""

    modules = MODULES
    configuration = "config.yaml"
    levels = {r"CKPT-.*": 2, "models": 1}
    component: str  # of the configuration, the network that is used

    def settings(self, path: Path, source: Path | None) -> Settings:
        published = path.parent / "configuration.json"
        model = read_json(published).get("model")
        told = model.get("model_config") if isinstance(model, dict) else None
        if isinstance(told, dict):
            expect(published, "sample_rate", told.get("sample_rate", 16000), 16000)
        data = read_yaml(source) if source is not None else {}
        model = data.get(self.component)
        if source is None or not isinstance(model, dict) or "obj" not in model:
            return Settings()
        expect(source, "sample_rate", data.get("sample_rate", 16000), 16000)
        if not str(model["obj"]).endswith("ECAPA_TDNN"):
            raise CheckpointMismatch(f"{source}: got {self.component} {model['obj']}, expected an ECAPA_TDNN")
        given = model.get("args")
        ecapa = {
            **arguments(source, self.component, given, **_MODEL),
            **layer_widths(source, self.component, given),
        }
        return Settings(ecapa, self.features(data, source), str(source))

    def features(self, data: dict[str, Any], source: Path) -> dict[str, Any]:
        """Fields of FrontendConfig that a training's configuration states."""
        return {}


class Supervised(_ThreeDSpeaker):
    """3D-Speaker's supervised ECAPA-TDNN.

    >>> Supervised().told_by_folder
    'CKPT-EPOCH-'
    """

    name = "3dspeaker"
    title = "3D-Speaker supervised"
    dialects = ("3dspeaker",)
    component = "embedding_model"
    folder_files = (
        "ecapa_tdnn.bin",
        "ecapa-tdnn.ckpt",
        "embedding_model.ckpt",
        "CKPT-*/embedding_model.ckpt",
        "models/CKPT-*/embedding_model.ckpt",
    )
    told_by = (
        ("config.yaml", r"speakerlab\.models\.ecapa_tdnn"),
        ("epoch_counter.ckpt", ""),
        # ModelScope's, of any of the three
        ("configuration.json", r'^(?!.*(?:rdino|sdpn))(?=.*"framework").*"task"'),
    )
    told_by_folder = "CKPT-EPOCH-"
    told_by_name = r"^ecapa_tdnn\.bin$|^ecapa-tdnn\.ckpt$"

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
    """RDINO: student and teacher, each a backbone and a head. A backbone by itself was taken out of the teacher.

    >>> Rdino().dialects
    ('rdino', 'modelscope')
    """

    name = "rdino"
    title = "RDINO (3D-Speaker)"
    dialects = ("rdino", "modelscope")
    pairs, alone = True, "teacher"
    component = "teacher_ecapa"
    folder_files: tuple[str, ...] = (
        "pretrained_rdino.pth",
        "rdino.pth",
        "checkpoint.pth",
        "models/checkpoint.pth",
        "checkpoint[0-9]*.pth",
        "models/checkpoint[0-9]*.pth",
    )
    within = "backbone."
    own_entries = frozenset({"dino_loss"})
    told_by: tuple[tuple[str, str], ...] = (
        ("config.yaml", r"speakerlab\.models\.rdino\.(?:RDINO_Head|combiner)"),
        ("configuration.json", "rdino"),
    )
    told_by_name = "(?i)rdino"
    told_by_width = 512  # 192 or 256 in every recipe of SpeechBrain's and of 3D-Speaker's supervised models


class Sdpn(Rdino):
    """SDPN: RDINO's networks, trained with prototypes.

    >>> Sdpn().folder_files[0]
    'sdpn.pth'
    """

    name = "sdpn"
    title = "SDPN (3D-Speaker)"
    folder_files = ("sdpn.pth", *Rdino.folder_files[2:])
    own_entries = frozenset({"prototypes", "sdpn_loss", "keleo_loss"})
    told_by = (("config.yaml", r"speakerlab\.models\.sdpn"), ("configuration.json", "sdpn"))
    told_by_name = "(?i)sdpn"
    told_by_width = 0


FORMATS = (Supervised(), Rdino(), Sdpn())
