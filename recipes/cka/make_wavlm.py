#!/usr/bin/env python3
"""Small untrained WavLM checkpoints in the format of Microsoft's files, for trying the recipe without downloads.

    python make_wavlm.py base small_base.pt          then: wavlm_local with ckpt=small_base.pt

The file is {"cfg": {...}, "model": state dict} with the keys and settings of the real ones: BASE and BASE+ have group
norm in the first convolution, LARGE has layer norms everywhere and normalises the waveform. Only widths and depth are
smaller. Needs s3prl, whose WavLM class gives the keys. The values are random: results say nothing about WavLM.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

COMMON = {
    "activation_fn": "gelu",
    "conv_bias": False,
    "conv_pos": 32,
    "conv_pos_groups": 4,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "relative_position_embedding": True,
    "num_buckets": 320,
    "max_distance": 800,
    "gru_rel_pos": True,
}
SMALL_BASE = {
    "extractor_mode": "default",
    "conv_feature_layers": "[(64,10,5)] + [(64,3,2)] * 4 + [(64,2,2)] * 2",
    "encoder_layers": 12,
    "encoder_embed_dim": 96,
    "encoder_ffn_embed_dim": 192,
    "encoder_attention_heads": 4,
    "layer_norm_first": False,
    "normalize": False,
}
SMALL_LARGE = {
    **SMALL_BASE,
    "extractor_mode": "layer_norm",
    "encoder_layers": 24,
    "encoder_embed_dim": 128,
    "encoder_ffn_embed_dim": 256,
    "layer_norm_first": True,
    "normalize": True,
}
KINDS = {"base": (SMALL_BASE, 1), "base_plus": (SMALL_BASE, 2), "large": (SMALL_LARGE, 3)}


def make(kind: str, path: str | Path) -> Path:
    """Write one checkpoint; kind : base, base_plus or large."""
    from s3prl.upstream.wavlm.WavLM import WavLM, WavLMConfig

    settings, seed = KINDS[kind]
    cfg = {**COMMON, **settings}
    torch.manual_seed(seed)
    model = WavLM(WavLMConfig(cfg))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Freshly initialised blocks hardly change their input; larger weights make layers that differ.
            if ".layers." in name and weight.ndim == 2 and "grep" not in name and "relative" not in name:
                weight.mul_(4.0)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    torch.save({"cfg": cfg, "model": model.state_dict()}, temporary)
    os.replace(temporary, path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("path")
    arguments = parser.parse_args()
    make(arguments.kind, arguments.path)
