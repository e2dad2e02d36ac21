"""Tiny checkpoints in every project's own layout, written by rules of their own, not by the readers' key maps."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from s3prl_speaker_upstreams.ecapa import DIALECTS, Ecapa

TINY = {"channels": 16, "mfa_channels": 24, "embedding_dim": 10, "se_channels": 6, "attention_channels": 5}
# format -> dialect whose options the tiny model has
DIALECT = {
    "speechbrain": "speechbrain",
    "3dspeaker": "3dspeaker",
    "wespeaker": "wespeaker",
    "rdino": "rdino",
    "sdpn": "rdino",
    "sslsv": "sslsv",
    "taoruijie": "taoruijie",
}


def tiny_state(format: str, seed: int = 0, **changes) -> dict[str, torch.Tensor]:
    """Random canonical tensors with batch normalisation statistics that are not the initial ones."""
    config = DIALECTS[DIALECT[format]].ecapa_config(**{**TINY, **changes})
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in Ecapa(config).state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1000 + seed)
        elif name.endswith("running_var"):
            state[name] = torch.rand(tensor.shape, generator=generator) + 0.5
        else:
            state[name] = torch.randn(tensor.shape, generator=generator) / math.sqrt(max(tensor[0].numel(), 4))
    return state


def _speechbrain_name(name: str) -> str:
    name = re.sub(r"^block_(\d)", lambda m: f"blocks.{int(m[1]) - 1}", name)
    name = name.replace(".res2.", ".res2net_block.blocks.").replace(".se.", ".se_block.")
    name = name.replace("pool.conv1", "asp.tdnn.conv").replace("pool.norm", "asp.tdnn.norm")
    name = name.replace("pool.conv2", "asp.conv").replace("pool_norm", "asp_bn.norm").replace("embedding", "fc.conv")
    if name.startswith(("asp_bn", "fc")):
        return name
    return re.sub(r"\.(conv\d?|norm)\.(\w+)$", lambda m: f".{m[1]}.{'norm' if m[1] == 'norm' else 'conv'}.{m[2]}", name)


def _wespeaker_name(name: str) -> str:
    place = {"tdnn1": "0", "res2": "1", "tdnn2": "2", "se": "3"}
    name = re.sub(r"^block_1\.(\w+)", lambda m: "layer1." + {"conv": "conv", "norm": "bn"}[m[1]], name)
    name = re.sub(r"^block_(\d)\.(\w+)\.", lambda m: f"layer{m[1]}.se_res2block.{place[m[2]]}.", name)
    name = re.sub(r"\.1\.(\d)\.(conv|norm)", lambda m: f".1.{m[2].replace('norm', 'bn')}s.{m[1]}", name)
    name = re.sub(r"\.3\.conv(\d)", r".3.linear\1", name)
    name = re.sub(r"\.(0|2)\.norm", r".\1.bn", name)
    name = name.replace("mfa.conv", "conv").replace("pool.conv", "pool.linear").replace("pool_norm", "bn")
    return name.replace("embedding_norm", "bn2").replace("embedding", "linear")


def _taoruijie_name(name: str) -> str:
    name = name.replace("block_1.conv", "conv1").replace("block_1.norm", "bn1")
    name = re.sub(r"^block_(\d)", lambda m: f"layer{int(m[1]) - 1}", name)
    name = re.sub(r"\.res2\.(\d)\.(conv|norm)", lambda m: f".{m[2].replace('norm', 'bn')}s.{m[1]}", name)
    name = name.replace(".tdnn1.conv", ".conv1").replace(".tdnn1.norm", ".bn1")
    name = name.replace(".tdnn2.conv", ".conv3").replace(".tdnn2.norm", ".bn3")
    name = name.replace(".se.conv1", ".se.se.1").replace(".se.conv2", ".se.se.3").replace("mfa.conv", "layer4")
    name = name.replace("pool.conv1", "attention.0").replace("pool.norm", "attention.2")
    name = name.replace("pool.conv2", "attention.4").replace("pool_norm", "bn5")
    return name.replace("embedding_norm", "bn6").replace("embedding", "fc6")


def original_state(format: str, state: dict[str, torch.Tensor], prefix: str = "") -> OrderedDict:
    """Canonical tensors under the names and in the shapes of a project."""
    out = OrderedDict()
    for name, tensor in state.items():
        if format == "wespeaker":
            key = _wespeaker_name(name)
            tensor = tensor.squeeze(-1) if ".3.linear" in key and tensor.dim() == 3 else tensor
        elif format == "taoruijie":
            key = _taoruijie_name(name)
        else:
            key = _speechbrain_name(name)
            tensor = tensor.unsqueeze(-1) if key == "fc.conv.weight" else tensor
            if format == "sslsv":
                key = key.replace("norm.norm", "norm").replace("asp_bn.norm", "asp_bn")
        out[prefix + key] = tensor.clone()
    return out


def head(prefix: str, width: int = 10) -> dict[str, torch.Tensor]:
    """A projection head as the self-supervised projects keep it."""
    return {
        f"{prefix}mlp.0.weight": torch.randn(7, width),
        f"{prefix}mlp.0.bias": torch.randn(7),
        f"{prefix}last_layer.weight_g": torch.ones(9, 1),
        f"{prefix}last_layer.weight_v": torch.randn(9, 7),
    }


def optimizer() -> dict:
    """An optimizer's state with what real ones hold and the plain safe loader refuses: numpy numbers."""
    groups = [{"lr": np.float64(0.2), "weight_decay": np.float32(5e-5), "params": [0]}]
    return {"state": {0: {"momentum_buffer": torch.randn(3)}}, "param_groups": groups}


def frontend_buffers(window: str = "hamming", prefix: str = "") -> dict[str, torch.Tensor]:
    make = {"hamming": torch.hamming_window, "hann": torch.hann_window}[window]
    return {
        f"{prefix}spectrogram.window": make(400, periodic=True),
        f"{prefix}mel_scale.fb": torch.rand(257, 80),
    }


def write(format: str, path: Path, **options) -> dict[str, dict[str, torch.Tensor]]:
    """Write a tiny checkpoint of a format as its project does; returns the canonical tensors of each role in it."""
    teacher, student = tiny_state(format, 1, **options), tiny_state(format, 2, **options)
    averaged = {k: v.float() if v.dtype == torch.int64 else v for k, v in teacher.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    if format in ("speechbrain", "3dspeaker"):
        torch.save(original_state(format, teacher), path)
        return {"supervised": teacher}
    if format == "wespeaker":
        state = original_state(format, averaged)
        state["projection.weight"] = torch.randn(12, 10)
        torch.save(state, path)
        return {"supervised": teacher}
    if format in ("rdino", "sdpn"):
        data = {
            role: {**original_state(format, state, "module.backbone."), **head("module.head.")}
            for role, state in (("student", student), ("teacher", teacher))
        }
        extra = {"dino_loss": {"center": torch.zeros(1, 9)}} if format == "rdino" else {
            "prototypes": torch.randn(9, 7), "sdpn_loss": {}, "keleo_loss": {}}  # fmt: skip
        torch.save({**data, "optimizer": optimizer(), "epoch": 150, **extra}, path)
        return {"teacher": teacher, "student": student}
    if format == "sslsv":
        model = {
            **frontend_buffers("hann", "encoder.features_extractor.0."),
            **original_state(format, student, "encoder."),
            **frontend_buffers("hann", "encoder_momentum.features_extractor.0."),
            **original_state(format, teacher, "encoder_momentum."),
            **head("head."),
            **head("head_momentum."),
            "loss_fn.center": torch.zeros(1, 9),
        }
        torch.save({"epoch": 80, "best_metric": np.float64(2.8), "model": model, "optimizer": optimizer()}, path)
        return {"teacher": teacher, "student": student}
    if format == "taoruijie":
        state = original_state(format, teacher, "speaker_encoder.")
        state["speaker_encoder.torchfbank.0.flipped_filter"] = torch.tensor([[[-0.97, 1.0]]])
        state.update(frontend_buffers("hamming", "speaker_encoder.torchfbank.1."))
        state["speaker_loss.weight"] = torch.randn(12, 10)
        torch.save(state, path)
        return {"supervised": teacher}
    raise AssertionError(format)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These models are so small that a second thread only waits, long where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(tmp_path):
    """Writes a tiny checkpoint: ``path, networks = tiny("wespeaker")``; `networks` is role -> canonical tensors."""

    def make(format: str, name: str | None = None, **options):
        names = {
            "speechbrain": "embedding_model.ckpt",
            "3dspeaker": "ecapa_tdnn.bin",
            "wespeaker": "avg_model.pt",
            "rdino": "pretrained_rdino.pth",
            "sdpn": "sdpn.pth",
            "sslsv": "checkpoints/model_latest.pt",
            "taoruijie": "exps/pretrain.model",
        }
        path = tmp_path / format / (name or names[format])
        return path, write(format, path, **options)

    make.original_state, make.state, make.head, make.optimizer = original_state, tiny_state, head, optimizer
    make.frontend_buffers = frontend_buffers
    return make
