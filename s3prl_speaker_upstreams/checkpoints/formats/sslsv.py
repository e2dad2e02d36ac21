"""sslsv: DINO, MoCo, SimCLR, ... and supervised models, ``config.yml``, and the folder of a training.

A training writes ``models/.../NAME/config.yml`` and, below it, ``checkpoints/model_latest.pt``, ``model_epoch-N.pt``
and the average ``model_avg.pt``. The files carry window and mel filters of their front-end. BatchNorm is not wrapped in
a module of its own; everything else has SpeechBrain's names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..format import Format
from ..sidecars import Settings, arguments, expect, layer_widths, read_yaml
from .speechbrain import MODULES

__all__ = ["FORMATS", "Sslsv"]


class Sslsv(Format):
    """sslsv's ECAPA-TDNN.

    >>> Sslsv().modules["mfa.norm"], Sslsv().modules["pool_norm"]
    ('mfa.norm', 'asp_bn')
    """

    name = "sslsv"
    title = "sslsv"
    dialects = ("sslsv",)
    pairs = True
    # DINO is the method with a momentum head; sslsv embeds with DINO's momentum encoder, with MoCo's, BYOL's and every
    # other method's plain encoder.
    teacher_used = "head_momentum"
    modules = {
        ours: theirs.removesuffix(".norm") if theirs.endswith((".norm.norm", "asp_bn.norm")) else theirs
        for ours, theirs in MODULES.items()
    }
    ignored = (
        r"(head|projector|predictor)(_momentum)?\.",
        r"(classifier|loss_fn|aggregator|aggregator_r|discriminator|ssps|bn_ssps)\.",
        r"(prototypes|queue|queue_ptr|queue_labels|queue_labels_ptr|indices|labels|embeddings|assignments)(\.|$)",
    )
    buffers = {"window": "features_extractor.0.spectrogram.window", "mel": "features_extractor.0.mel_scale.fb"}
    folder_files = (
        "checkpoints/model_avg.pt",
        "checkpoints/model_latest.pt",
        "model_avg.pt",
        "model_latest.pt",
        "checkpoints/model_epoch-*.pt",
        "model_epoch-*.pt",
    )
    configuration = "config.yml"
    levels = {"checkpoints": 1}

    def settings(self, path: Path, source: Path | None) -> Settings:
        encoder = read_yaml(source).get("encoder") if source is not None else None
        if source is None or not isinstance(encoder, dict):
            return Settings()
        kind = str(encoder.get("type", "ecapatdnn")).lower().replace("_", "").replace("-", "")
        expect(source, "encoder.type", kind, "ecapatdnn", "pass an ECAPA-TDNN")
        told = arguments(
            source, "encoder", encoder,
            ours={
                "mel_n_mels": "n_mels",
                "encoder_dim": "embedding_dim",
                "attention_channels": "attention_channels",
                "res2net_scale": "res2_scale",
                "se_channels": "se_channels",
                "global_context": "attention_context",
                "mel_n_fft": "n_fft",
                "mel_win_fn": "window",
                "mel_win_length": "win_length",
            },
            fixed={"pooling": True, "extract_mel_features": True, "mel_hop_length": 160, "mel_sample_rate": 16000},
            ignored=("type", "channels", "kernel_sizes", "dilations", "groups"),
        )  # fmt: skip
        features = ("n_fft", "window", "win_length")
        frontend: dict[str, Any] = {key: told[key] for key in features if key in told}
        return Settings(
            {**{key: told[key] for key in told if key not in features}, **layer_widths(source, "encoder", encoder)},
            frontend,
            str(source),
        )


FORMATS = (Sslsv(),)
