"""WeSpeaker: supervised, DINO, MoCo and SimCLR models, ``config.yaml``, and the folder of a training.

A training writes ``exp/NAME/config.yaml`` and, below ``exp/NAME/models``, ``model_N.pt`` for epochs and the average
``avg_model.pt``; ``init.zip`` there is a TorchScript program. A published model is ``avg_model.pt`` beside
``config.yaml``. The average of a DINO training is its teacher alone; the epochs hold both networks.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...errors import CheckpointMismatch
from ..format import Format
from ..sidecars import Settings, arguments, expect, read_yaml

__all__ = ["FORMATS", "WeSpeaker"]

_FEATURES = "the model wants other features than Kaldi's filter bank at 16 kHz, which cannot be had from its file"


class WeSpeaker(Format):
    """WeSpeaker's ECAPA_TDNN and ECAPA_TDNN_GLOB.

    >>> WeSpeaker().modules["pool_norm"]
    'bn'
    """

    name = "wespeaker"
    title = "WeSpeaker"
    dialects = ("wespeaker",)
    pairs = True
    teacher_used = "t_model"  # DINO's; MoCo is used by its query encoder, which is the trained one
    teacher_head = "projection_head."  # that of a classifier is "projection"
    modules = {
        "block_1.conv": "layer1.conv",
        "block_1.norm": "layer1.bn",
        "block_{b}.tdnn1.conv": "layer{b}.se_res2block.0.conv",
        "block_{b}.tdnn1.norm": "layer{b}.se_res2block.0.bn",
        "block_{b}.res2.{j}.conv": "layer{b}.se_res2block.1.convs.{j}",
        "block_{b}.res2.{j}.norm": "layer{b}.se_res2block.1.bns.{j}",
        "block_{b}.tdnn2.conv": "layer{b}.se_res2block.2.conv",
        "block_{b}.tdnn2.norm": "layer{b}.se_res2block.2.bn",
        "block_{b}.se.conv1": "layer{b}.se_res2block.3.linear1",
        "block_{b}.se.conv2": "layer{b}.se_res2block.3.linear2",
        "mfa.conv": "conv",
        "pool.conv1": "pool.linear1",
        "pool.conv2": "pool.linear2",
        "pool_norm": "bn",
        "embedding": "linear",
        "embedding_norm": "bn2",
    }
    ignored = (r"projection(_head)?\.", r"mlp\.", r"dino_loss_calculator\.", r"queue(_ptr)?$")
    folder_files = (
        "avg_model.pt",
        "models/avg_model.pt",
        "final_model.pt",
        "models/final_model.pt",
        "model_[0-9]*.pt",
        "models/model_[0-9]*.pt",
    )
    configuration = "config.yaml"
    levels = {"models": 1}

    def find(self, folder: Path, role: str | None = None) -> list[Path]:
        found = super().find(folder, role)
        if role == "student":  # which an average does not hold
            found.sort(key=lambda path: not path.name.startswith("model_"))
        return found

    def _where_else(self, role: str) -> str:
        return " (WeSpeaker's models/model_N.pt hold both)" if role == "student" else ""

    def settings(self, path: Path, source: Path | None) -> Settings:
        data = read_yaml(source) if source is not None else {}
        if source is None or not data:
            return Settings()
        ecapa: dict[str, Any] = {}
        model = data.get("model")
        if isinstance(model, str):
            if not model.startswith("ECAPA_TDNN"):
                raise CheckpointMismatch(f"{source}: got model={model!r}, expected an ECAPA_TDNN; pass one of those")
            width = re.search(r"_c(\d+)$", model)
            ecapa = {"attention_context": "GLOB" in model, **({"channels": int(width.group(1))} if width else {})}
        ecapa |= arguments(
            source, "model_args", data.get("model_args"),
            ours={
                "feat_dim": "n_mels",
                "embed_dim": "embedding_dim",
                "emb_bn": "embedding_norm",
                "channels": "channels",
                "global_context_att": "attention_context",
            },
            fixed={"pooling_func": "ASTP"},
        )  # fmt: skip
        dataset = data.get("dataset_args")
        dataset = dataset if isinstance(dataset, dict) else {}
        expect(source, "dataset_args.frontend", dataset.get("frontend", "fbank"), "fbank", _FEATURES)
        expect(source, "dataset_args.resample_rate", dataset.get("resample_rate", 16000), 16000, _FEATURES)
        bank = arguments(
            source, "fbank_args", dataset.get("fbank_args"),
            ours={"num_mel_bins": "n_mels"}, fixed={"frame_shift": 10, "frame_length": 25}, ignored=("dither",),
        )  # fmt: skip
        if "n_mels" in ecapa and "n_mels" in bank:
            expect(source, "fbank_args.num_mel_bins", bank["n_mels"], ecapa["n_mels"], "they do not fit")
        normalise = arguments(
            source, "cmvn_args", dataset.get("cmvn_args"), ours={"norm_mean": "mean"}, fixed={"norm_var": False}
        )
        plain = dataset.get("cmvn", True) is False or normalise.get("mean", True) is False
        return Settings(ecapa, {"normalisation": "none"} if plain else {}, str(source))


FORMATS = (WeSpeaker(),)
