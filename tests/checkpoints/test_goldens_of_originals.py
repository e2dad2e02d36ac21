"""The original implementations' activations, computed from files in their released layout.

Two sets: the full one beside the checkout (skipped where it is absent) and a reduced one that travels with the tests.
Limits, of max |difference| / max |reference|: features 3e-4 for Kaldi's front-end and 2e-5 for the others; blocks, mfa,
pooled and embedding 1e-5, from the original's own features and end to end from the waveform.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from s3prl_speaker_upstreams.checkpoints import load_encoder, read_checkpoint
from s3prl_speaker_upstreams.ecapa import Ragged

pytestmark = pytest.mark.compat
DATA = Path(__file__).parent / "data"
OUTPUTS = ("hidden_states", "mfa", "pooled", "embedding")
KALDI = ("wespeaker", "3dspeaker")
NAMES = (
    "speechbrain_ecapa", "wespeaker_sup", "wespeaker_sup_noglob", "wespeaker_native_mfa1536", "wespeaker_dino_avg",
    "wespeaker_dino_raw", "3dspeaker_sup", "3dspeaker_rdino", "3dspeaker_sdpn", "sslsv_dino_hamming",
    "sslsv_dino_hann", "tao",
)  # fmt: skip
FORMAT = {
    "speechbrain_ecapa": "speechbrain", "3dspeaker_sup": "3dspeaker", "3dspeaker_rdino": "rdino",
    "3dspeaker_sdpn": "sdpn", "tao": "taoruijie",
}  # fmt: skip


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    assert found.shape == reference.shape
    return ((found - reference).abs().max() / reference.abs().max()).item()


def named(out: dict) -> dict[str, torch.Tensor]:
    """Our outputs under the goldens' names and in their shapes."""
    found = {f"block{i}": h.data.T for i, h in enumerate(out["hidden_states"])}
    return {**found, "mfa": out["mfa"].data.T, "pooled": out["pooled"][0], "embedding": out["embedding"][0]}


def check(path: Path, cases: list[dict], format: str) -> None:
    encoder = load_encoder(path, format=format)
    limit = 3e-4 if format in KALDI else 2e-5
    compared = set()
    for case in cases:
        wav = case["wave_int16"].float() / 32768
        with torch.no_grad():
            features = encoder([wav], outputs=("fbank",))["fbank"].data
            whole = named(encoder([wav], outputs=OUTPUTS))
            if "features" in case:
                assert error(features, case["features"]) <= limit, case["name"]
                compared.add("features")
                features = case["features"]
            network = named(encoder.ecapa(Ragged(features, [len(features)]), outputs=OUTPUTS))
        for name in network:
            if name in case:
                compared.add(name)
                assert error(network[name], case[name]) <= 1e-5, (case["name"], name)
                assert error(whole[name], case[name]) <= 1e-5, (case["name"], name, "end to end")
    assert compared == {"features", "block0", "block1", "block2", "block3", "mfa", "pooled", "embedding"}


def test_every_golden_is_listed(goldens):
    listed = {entry["file"].removesuffix(".golden.pt") for entry in json.loads((goldens / "MANIFEST.json").read_text())}
    assert listed == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_golden(goldens, name):
    golden = torch.load(goldens / f"{name}.golden.pt", weights_only=True)
    format = FORMAT.get(name, name.split("_")[0])
    check(goldens / golden["meta"]["checkpoint"], golden["cases"], format)


@pytest.mark.parametrize("name", NAMES)
def test_golden_format_and_role_are_detected(goldens, name):
    golden = torch.load(goldens / f"{name}.golden.pt", weights_only=True)
    checkpoint = read_checkpoint(goldens / golden["meta"]["checkpoint"])
    assert checkpoint.format == FORMAT.get(name, name.split("_")[0])
    teacher = any(word in name for word in ("dino", "sdpn"))
    assert checkpoint.role == ("teacher" if teacher else "supervised")
    window = {"sslsv_dino_hamming": "hamming", "sslsv_dino_hann": "hann"}.get(name)
    assert window is None or checkpoint.frontend.window == window


@pytest.mark.parametrize("format", ["speechbrain", "wespeaker", "taoruijie"])
def test_reduced_golden(format):
    golden = torch.load(DATA / f"{format}.golden.pt", weights_only=True)
    check(DATA / golden["meta"]["checkpoint"], golden["cases"], format)
