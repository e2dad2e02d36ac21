"""SpeechBrain: ``embedding_model.ckpt``, its ``hyperparams.yaml``, and the folder of a training.

A published model is a folder with ``hyperparams.yaml`` beside the weights. A training writes
``results/NAME/SEED/hyperparams.yaml`` and, two folders below, ``save/CKPT+TIME+00/embedding_model.ckpt`` with
``CKPT.yaml`` (whether it ended an epoch), ``classifier.ckpt``, ``normalizer.ckpt`` and others beside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..format import Format
from ..sidecars import Settings, arguments, component, expect, layer_widths, mentions, read_yaml

__all__ = ["FORMATS", "MODULES", "SpeechBrain"]

MODULES = {
    "block_1.conv": "blocks.0.conv.conv",
    "block_1.norm": "blocks.0.norm.norm",
    "block_{b}.tdnn1.conv": "blocks.{n}.tdnn1.conv.conv",
    "block_{b}.tdnn1.norm": "blocks.{n}.tdnn1.norm.norm",
    "block_{b}.res2.{j}.conv": "blocks.{n}.res2net_block.blocks.{j}.conv.conv",
    "block_{b}.res2.{j}.norm": "blocks.{n}.res2net_block.blocks.{j}.norm.norm",
    "block_{b}.tdnn2.conv": "blocks.{n}.tdnn2.conv.conv",
    "block_{b}.tdnn2.norm": "blocks.{n}.tdnn2.norm.norm",
    "block_{b}.se.conv1": "blocks.{n}.se_block.conv1.conv",
    "block_{b}.se.conv2": "blocks.{n}.se_block.conv2.conv",
    "mfa.conv": "mfa.conv.conv",
    "mfa.norm": "mfa.norm.norm",
    "pool.conv1": "asp.tdnn.conv.conv",
    "pool.norm": "asp.tdnn.norm.norm",
    "pool.conv2": "asp.conv.conv",
    "pool_norm": "asp_bn.norm",
    "embedding": "fc.conv",
}

# Arguments of speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN; dropout acts in training only.
_MODEL: dict[str, Any] = {
    "ours": {
        "input_size": "n_mels",
        "lin_neurons": "embedding_dim",
        "attention_channels": "attention_channels",
        "se_channels": "se_channels",
        "res2net_scale": "res2_scale",
        "global_context": "attention_context",
    },
    "fixed": {},
    "ignored": ("channels", "kernel_sizes", "dilations", "groups", "activation", "device", "dropout"),
}
# Arguments of speechbrain.lobes.features.Fbank; the context's widths act only with context, the filters' noise only in
# training.
_FEATURES: dict[str, Any] = {
    "ours": {"f_min": "fmin", "f_max": "fmax", "n_fft": "n_fft", "n_mels": "n_mels"},
    "fixed": {
        "deltas": False,
        "context": False,
        "requires_grad": False,
        "sample_rate": 16000,
        "hop_length": 10,
        "win_length": 25,
        "filter_shape": "triangular",
    },
    "ignored": ("left_frames", "right_frames", "param_change_factor", "param_rand_factor"),
}
# Arguments of speechbrain.processing.features.InputNormalization; a sentence's own statistics have no history.
_NORMALISATION: dict[str, Any] = {
    "ours": {},
    "fixed": {"norm_type": "sentence", "std_norm": False, "mean_norm": True},
    "ignored": ("avg_factor", "length_dim", "update_until_epoch", "avoid_padding_norm", "epsilon", "device"),
}
_RELU = ("ReLU", "torch.nn.ReLU", "torch.nn.modules.activation.ReLU")


class SpeechBrain(Format):
    """SpeechBrain's ECAPA-TDNN.

    >>> SpeechBrain().settings(Path("/nowhere/embedding_model.ckpt"), None).ecapa
    {}
    """

    name = "speechbrain"
    title = "SpeechBrain"
    dialects = ("speechbrain",)
    modules = MODULES
    folder_files = (
        "embedding_model.ckpt",
        "CKPT+*/embedding_model.ckpt",
        "save/CKPT+*/embedding_model.ckpt",
        "save/embedding_model.ckpt",
    )
    configuration = "hyperparams.yaml"
    levels = {r"CKPT\+.*": 2, "save": 1}
    told_by = (
        ("hyperparams.yaml", r"speechbrain\."),
        ("mean_var_norm_emb.ckpt", ""),
        ("label_encoder.txt", ""),
        ("label_encoder.ckpt", ""),
        ("normalizer.ckpt", ""),
    )
    told_by_folder = r"CKPT\+"
    common = True

    def find(self, folder: Path, role: str | None = None) -> list[Path]:
        found = super().find(folder, role)
        # A training saves in the middle of epochs, too: what ended one comes before that.
        return sorted(found, key=lambda path: mentions(path.parent / "CKPT.yaml", "end-of-epoch: false"))

    def settings(self, path: Path, source: Path | None) -> Settings:
        data = read_yaml(source) if source is not None else {}
        if source is None or not data:
            return Settings()
        rate = data.get("sample_rate", 16000)
        expect(source, "sample_rate", rate, 16000, "the model was trained on recordings of another rate")
        model = component(source, data, "embedding_model", "ECAPA_TDNN.ECAPA_TDNN")
        ecapa = {
            **arguments(source, "embedding_model", model, **_MODEL),
            **layer_widths(source, "embedding_model", model),
        }
        activation = model.get("activation")
        name = activation.get("!", "") if isinstance(activation, dict) else activation
        if name is not None and str(name).split(":")[-1] not in _RELU:
            expect(source, "embedding_model.activation", str(name).split(":")[-1], "torch.nn.ReLU")
        features = component(source, data, "compute_features", "features.Fbank")
        frontend = arguments(source, "compute_features", features, **_FEATURES)
        if features and "n_mels" in ecapa:  # 40 is what Fbank makes where it is not told
            expect(source, "compute_features.n_mels", frontend.get("n_mels", 40), ecapa["n_mels"], "they do not fit")
        frontend.pop("n_mels", None)
        normalise = component(source, data, "mean_var_norm", "InputNormalization")
        if normalise:
            # Where it says nothing, InputNormalization's own values hold, which are not this model's.
            normalise = {"norm_type": "global", "std_norm": True, **normalise}
        arguments(source, "mean_var_norm", normalise, **_NORMALISATION)
        return Settings(ecapa, frontend, str(source))


FORMATS = (SpeechBrain(),)
