"""TaoRuijie/ECAPA-TDNN: one file with network, front-end and classifier, and the folder of a training.

A training writes ``exps/NAME/model/model_NNNN.model`` beside ``exps/NAME/score.txt``; there is no configuration. The
files carry the pre-emphasis filter, window and mel filters of their front-end.
"""

from __future__ import annotations

from ..format import Format

__all__ = ["FORMATS", "TaoRuijie"]


class TaoRuijie(Format):
    """TaoRuijie's ECAPA-TDNN.

    >>> TaoRuijie().modules["embedding"]
    'fc6'
    """

    name = "taoruijie"
    title = "TaoRuijie"
    dialects = ("taoruijie",)
    modules = {
        "block_1.conv": "conv1",
        "block_1.norm": "bn1",
        "block_{b}.tdnn1.conv": "layer{n}.conv1",
        "block_{b}.tdnn1.norm": "layer{n}.bn1",
        "block_{b}.res2.{j}.conv": "layer{n}.convs.{j}",
        "block_{b}.res2.{j}.norm": "layer{n}.bns.{j}",
        "block_{b}.tdnn2.conv": "layer{n}.conv3",
        "block_{b}.tdnn2.norm": "layer{n}.bn3",
        "block_{b}.se.conv1": "layer{n}.se.se.1",
        "block_{b}.se.conv2": "layer{n}.se.se.3",
        "mfa.conv": "layer4",
        "pool.conv1": "attention.0",
        "pool.norm": "attention.2",
        "pool.conv2": "attention.4",
        "pool_norm": "bn5",
        "embedding": "fc6",
        "embedding_norm": "bn6",
    }
    ignored = (r"speaker_loss\.",)
    buffers = {
        "preemphasis": "torchfbank.0.flipped_filter",
        "window": "torchfbank.1.spectrogram.window",
        "mel": "torchfbank.1.mel_scale.fb",
    }
    folder_files = ("exps/pretrain.model", "pretrain.model", "model/model_*.model", "model_*.model")


FORMATS = (TaoRuijie(),)
