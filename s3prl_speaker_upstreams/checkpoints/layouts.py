"""Where every project keeps each tensor of ECAPA-TDNN: one declarative key map per checkpoint format.

A map goes from this package's module names to the original's. ``{b}`` runs over blocks 2 to 4, ``{n}`` is ``b - 1`` and
``{j}`` runs over the Res2 convolutions; the leaves (weight, bias, running statistics) are the same everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

__all__ = ["LAYOUTS", "OPTIONAL_MODULES", "TRAINER_ENTRIES", "Layout", "canonical_tensors"]

CONV_LEAVES = ("weight", "bias")
NORM_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

# Present or absent by design: the file decides, and the configuration follows.
OPTIONAL_MODULES = frozenset({"mfa.norm", "pool.norm", "embedding_norm"})

# What trainers put beside the model at the top level of a file; none of it is part of the network.
TRAINER_ENTRIES = frozenset(
    """optimizer optimizers optimizer_state optimizer_state_dict scheduler lr_scheduler scheduler_state_dict scaler
    fp16_scaler amp epoch epochs step global_step iteration best_metric best_loss args config hparams dino_loss
    sdpn_loss keleo_loss prototypes loss metrics""".split()
)

_SPEECHBRAIN = {
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

# sslsv has SpeechBrain's modules, with BatchNorm not wrapped in a module of its own.
_SSLSV = {
    ours: theirs.removesuffix(".norm") if theirs.endswith((".norm.norm", "asp_bn.norm")) else theirs
    for ours, theirs in _SPEECHBRAIN.items()
}

_WESPEAKER = {
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

_TAORUIJIE = {
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


@dataclass(frozen=True)
class Layout:
    """One checkpoint format.

    name : what `format=` takes
    title : what people call it
    dialect : key of ``ecapa.DIALECTS`` with the project's front-end and model options
    modules : this package's module names to the original's
    ignored : regular expressions (matched at the start) of tensors that belong to the training, not to the network
    buffers : front-end tensors that the file carries, ``{"window": key, "mel": key, "preemphasis": key}``
    folder_files : the names under which the project's folders hold the file, best first

    >>> dict((ours, theirs) for ours, theirs, _ in LAYOUTS["wespeaker"].tensors(7))["block_2.res2.0.norm.bias"]
    'layer2.se_res2block.1.bns.0.bias'
    """

    name: str
    title: str
    dialect: str
    modules: Mapping[str, str]
    ignored: tuple[str, ...] = ()
    buffers: Mapping[str, str] = field(default_factory=dict)
    folder_files: tuple[str, ...] = ()

    def is_ignored(self, key: str) -> bool:
        return any(re.match(pattern, key) for pattern in self.ignored)

    def tensors(self, res2_convs: int) -> Iterator[tuple[str, str, str]]:
        """Triples of (this package's tensor name, the original's, our module's name) for so many Res2 convolutions."""
        for ours, theirs in self.modules.items():
            for module, original in _expand(ours, theirs, res2_convs):
                for leaf in leaves(module):
                    yield f"{module}.{leaf}", f"{original}.{leaf}", module

    def count_res2(self, keys: set[str] | Mapping) -> int:
        """How many Res2 convolutions block 2 has in a file with these keys (the scale less one)."""
        theirs = self.modules["block_{b}.res2.{j}.conv"]
        count = 0
        while f"{theirs.format(b=2, n=1, j=count)}.weight" in keys:
            count += 1
        return count


def leaves(module: str) -> tuple[str, ...]:
    """Tensors of one of our modules: BatchNorm's five, or weight and bias.

    >>> leaves("mfa.conv")
    ('weight', 'bias')
    """
    return NORM_LEAVES if module.endswith("norm") else CONV_LEAVES


def _expand(ours: str, theirs: str, res2_convs: int) -> Iterator[tuple[str, str]]:
    blocks = (2, 3, 4) if "{b}" in ours else (None,)
    convs = range(res2_convs) if "{j}" in ours else (None,)
    for b in blocks:
        for j in convs:
            values = {"b": b, "n": None if b is None else b - 1, "j": j}
            yield ours.format(**values), theirs.format(**values)


def canonical_tensors(res2_convs: int, absent: frozenset[str] = frozenset()) -> list[str]:
    """Names of every tensor of this package's ECAPA-TDNN, less the optional modules in `absent`.

    >>> names = canonical_tensors(7)
    >>> names[0], len(names)
    ('block_1.conv.weight', 236)
    """
    every = {**_SPEECHBRAIN, "embedding_norm": ""}
    return [
        f"{module}.{leaf}"
        for ours in every
        for module, _ in _expand(ours, "", res2_convs)
        if module not in absent
        for leaf in leaves(module)
    ]


_SSL_HEADS = (r"module\.head\.", r"head\.")

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "speechbrain",
            "SpeechBrain",
            "speechbrain",
            _SPEECHBRAIN,
            folder_files=("embedding_model.ckpt",),
        ),
        Layout(
            "3dspeaker",
            "3D-Speaker supervised",
            "3dspeaker",
            _SPEECHBRAIN,
            folder_files=("ecapa_tdnn.bin", "ecapa-tdnn.ckpt", "embedding_model.ckpt"),
        ),
        Layout(
            "wespeaker",
            "WeSpeaker",
            "wespeaker",
            _WESPEAKER,
            ignored=(r"projection(_head)?\.", r"mlp\.", r"dino_loss_calculator\.", r"queue(_ptr)?$"),
            folder_files=("avg_model.pt", "models/avg_model.pt", "final_model.pt", "models/final_model.pt"),
        ),
        Layout(
            "rdino",
            "RDINO (3D-Speaker)",
            "rdino",
            _SPEECHBRAIN,
            ignored=_SSL_HEADS,
            folder_files=("pretrained_rdino.pth", "rdino.pth"),
        ),
        Layout(
            "sdpn",
            "SDPN (3D-Speaker)",
            "rdino",
            _SPEECHBRAIN,
            ignored=_SSL_HEADS,
            folder_files=("sdpn.pth",),
        ),
        Layout(
            "sslsv",
            "sslsv",
            "sslsv",
            _SSLSV,
            ignored=(
                r"(head|projector|predictor)(_momentum)?\.",
                r"(classifier|loss_fn|aggregator|aggregator_r|discriminator|ssps|bn_ssps)\.",
                r"(prototypes|queue|queue_ptr|queue_labels|queue_labels_ptr|indices|labels|embeddings|assignments)(\.|$)",
            ),
            buffers={
                "window": "features_extractor.0.spectrogram.window",
                "mel": "features_extractor.0.mel_scale.fb",
            },
            folder_files=("checkpoints/model_avg.pt", "checkpoints/model_latest.pt", "model_avg.pt", "model_latest.pt"),
        ),
        Layout(
            "taoruijie",
            "TaoRuijie",
            "taoruijie",
            _TAORUIJIE,
            ignored=(r"speaker_loss\.",),
            buffers={
                "preemphasis": "torchfbank.0.flipped_filter",
                "window": "torchfbank.1.spectrogram.window",
                "mel": "torchfbank.1.mel_scale.fb",
            },
            folder_files=("exps/pretrain.model", "pretrain.model"),
        ),
    )
}
