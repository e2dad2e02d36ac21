"""This package's own format: bit-equal round trips, atomic writing, clear errors."""

from __future__ import annotations

import json
import stat

import pytest
import safetensors.torch
import torch

from s3prl_speaker_upstreams.checkpoints import detect_format, load_encoder, read_checkpoint, save_native
from s3prl_speaker_upstreams.ecapa import DIALECTS, EcapaConfig, SpeakerEncoder
from s3prl_speaker_upstreams.errors import CheckpointMismatch, CheckpointUnreadable, ConfigError

pytestmark = pytest.mark.compat
ORIGINALS = ("speechbrain", "3dspeaker", "wespeaker", "rdino", "sdpn", "sslsv", "taoruijie")


@pytest.mark.parametrize("format", ORIGINALS)
def test_round_trip_is_bit_equal(tiny, tmp_path, format):
    path, _ = tiny(format)
    original = read_checkpoint(path, format=format)
    target = save_native(original, tmp_path / "converted.safetensors", {"licence": "MIT"})
    again = read_checkpoint(target)
    assert (again.ecapa, again.frontend, again.role) == (original.ecapa, original.frontend, original.role)
    assert again.format == "native" and again.provenance["original_format"] == format
    assert again.provenance["licence"] == "MIT" and again.provenance["file"] == path.name
    for kind in ("state", "frontend_buffers"):
        first, second = getattr(original, kind), getattr(again, kind)
        assert set(first) == set(second)
        assert all(torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first)
    wav = [torch.randn(8000, generator=torch.Generator().manual_seed(0)) * 0.1]
    with torch.no_grad():
        outputs = [load_encoder(p, format=f)(wav, outputs=("embedding",)) for p, f in ((path, format), (target, None))]
    assert torch.equal(outputs[0]["embedding"], outputs[1]["embedding"])


@pytest.mark.parametrize("told", ["native", "wespeaker"])
def test_a_native_file_says_itself_what_it_is_whatever_is_told(tiny, tmp_path, told):
    """Named entries tell the format of their file, this package's own as well."""
    path, _ = tiny("speechbrain")
    target = save_native(read_checkpoint(path, format="speechbrain"), tmp_path / "converted.safetensors")
    with_word, without = read_checkpoint(target, format=told), read_checkpoint(target)
    assert with_word.format == "native" and with_word.frontend == without.frontend
    assert all(torch.equal(with_word.state[name], without.state[name]) for name in without.state)


def test_an_encoder_in_a_folder(tmp_path):
    config = DIALECTS["wespeaker"].ecapa_config(channels=16, mfa_channels=24, stride=2)
    encoder = SpeakerEncoder(config, DIALECTS["wespeaker"].frontend).eval()
    path = save_native(encoder, tmp_path / "model", role="teacher")
    assert path == tmp_path / "model" / "ecapa.safetensors"
    assert [p.name for p in path.parent.iterdir()] == ["ecapa.safetensors"]
    loaded = load_encoder(tmp_path / "model")
    assert loaded.ecapa.cfg == config and loaded.downsample_rate == 320
    assert read_checkpoint(tmp_path / "model").role == "teacher"
    assert all(torch.equal(v, loaded.ecapa.state_dict()[k]) for k, v in encoder.ecapa.state_dict().items())
    assert detect_format(tmp_path / "model") == "native"


def test_own_front_end_buffers_survive_an_encoder(tiny, tmp_path):
    path, _ = tiny("sslsv")
    encoder = load_encoder(path)
    again = load_encoder(save_native(encoder, tmp_path / "x.safetensors"))
    assert torch.equal(again.frontend.mel, encoder.frontend.mel)
    # What the configuration makes anyway is not stored.
    plain = SpeakerEncoder(EcapaConfig(channels=16, mfa_channels=24), DIALECTS["sslsv"].frontend)
    names = safetensors.torch.load_file(save_native(plain, tmp_path / "y.safetensors"))
    assert not any(name.startswith("frontend.") for name in names)


def test_half_precision(tiny, tmp_path):
    path, _ = tiny("speechbrain")
    full = save_native(read_checkpoint(path), tmp_path / "a.safetensors")
    half = save_native(read_checkpoint(path), tmp_path / "b.safetensors", fp16=True)
    assert half.stat().st_size < 0.8 * full.stat().st_size
    first, second = read_checkpoint(full).state, read_checkpoint(half).state
    for name, tensor in first.items():
        assert second[name].dtype == tensor.dtype
        expected = tensor if "running_" in name or tensor.dtype == torch.int64 else tensor.half().float()
        assert torch.equal(second[name], expected), name


def test_half_precision_that_cannot_hold_a_weight(tiny, tmp_path):
    checkpoint = read_checkpoint(tiny("speechbrain")[0])
    checkpoint.state["mfa.conv.bias"][0] = 1e6
    with pytest.raises(ConfigError, match="mfa.conv.bias.*65504"):
        save_native(checkpoint, tmp_path / "x.safetensors", fp16=True)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_failed_write_leaves_the_old_file(tiny, tmp_path, monkeypatch):
    checkpoint = read_checkpoint(tiny("speechbrain")[0])
    target = save_native(checkpoint, tmp_path / "out" / "x.safetensors")
    before = target.read_bytes()
    assert stat.S_IMODE(target.stat().st_mode) & 0o044  # as readable as any new file, not private

    def half_written(tensors, path, metadata=None):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half_written)
    with pytest.raises(OSError, match="no space"):
        save_native(checkpoint, target)
    assert target.read_bytes() == before
    assert [p.name for p in target.parent.iterdir()] == ["x.safetensors"]


def _rewrite(path, change):
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    change(metadata, tensors)
    safetensors.torch.save_file(tensors, path, metadata=metadata)


def _config(**changes):
    def change(metadata, tensors):
        metadata["config"] = json.dumps({**json.loads(metadata["config"]), **changes})

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m, t: m.update(config="{not json"), CheckpointUnreadable, "metadata is damaged"),
        (lambda m, t: m.pop("config"), CheckpointUnreadable, "damaged"),
        (lambda m, t: m.update(format="pt"), CheckpointMismatch, "own names but no configuration"),
        (_config(format_version=2), CheckpointUnreadable, "version 2.*update"),
        (_config(role="pupil"), CheckpointUnreadable, "damaged.*pupil"),
        (_config(ecapa={"chanels": 3}), CheckpointUnreadable, "damaged.*did you mean 'channels'"),
        (_config(ecapa=None), CheckpointUnreadable, "damaged"),
        (lambda m, t: t.pop("mfa.conv.weight"), CheckpointMismatch, "1 tensors are missing.*mfa.conv.weight"),
        (lambda m, t: t.update(x=torch.zeros(1)), CheckpointMismatch, "1 left over, first 'x'"),
        (lambda m, t: t.update({"mfa.conv.bias": torch.zeros(3)}), CheckpointMismatch, "another shape"),
    ],
    ids=["json", "no config", "foreign", "newer", "role", "unknown key", "no widths", "missing", "extra", "shape"],
)
def test_damaged_descriptions(tiny, tmp_path, change, error, message):
    path = save_native(read_checkpoint(tiny("speechbrain")[0]), tmp_path / "x.safetensors")
    _rewrite(path, change)
    with pytest.raises(error, match=message):
        read_checkpoint(path)


def test_truncated(tiny, tmp_path):
    path = save_native(read_checkpoint(tiny("speechbrain")[0]), tmp_path / "x.safetensors")
    content = path.read_bytes()
    for part in (0.01, 0.5, 0.99):
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(CheckpointUnreadable, match="truncated or damaged safetensors"):
            read_checkpoint(path)


def test_wrong_uses(tiny, tmp_path):
    checkpoint = read_checkpoint(tiny("speechbrain")[0])
    with pytest.raises(ConfigError, match="plain JSON"):
        save_native(checkpoint, tmp_path / "x.safetensors", {"when": object()})
    with pytest.raises(ConfigError, match="role='pupil'"):
        save_native(checkpoint, tmp_path / "x.safetensors", role="pupil")
    with pytest.raises(ConfigError, match="got a Linear, expected a SpeakerEncoder"):
        save_native(torch.nn.Linear(1, 1), tmp_path / "x.safetensors")
    path = save_native(checkpoint, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointMismatch, match="of the supervised, expected the teacher"):
        read_checkpoint(path, role="teacher")
    with pytest.raises(
        CheckpointMismatch,
        match=r"expected this package's own \(native\); the file looks like SpeechBrain, pass --format",
    ):
        read_checkpoint(tiny("speechbrain")[0], format="native")
    save_native(checkpoint, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointUnreadable, match=r"2 safetensors files \(x\.safetensors, y\.safetensors\)"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("format", ["speechbrain", "wespeaker", "sslsv", "taoruijie"])
def test_safetensors_of_another_program(tiny, tmp_path, format):
    """Some republish the originals as safetensors: the tensors have the original names, and nothing else is told."""
    path, networks = tiny(format)
    saved = torch.load(path, weights_only=False)
    tensors = {k: v.contiguous() for k, v in saved.get("model", saved).items()}
    target = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, target, metadata={"format": "pt"})
    checkpoint = read_checkpoint(target)
    assert checkpoint.format == detect_format(target) == format
    expected = networks.get("teacher", networks.get("supervised"))
    assert all(torch.equal(checkpoint.state[k], expected[k]) for k in expected)
    safetensors.torch.save_file({"x": torch.zeros(1)}, target)
    with pytest.raises(CheckpointMismatch, match="first 'x', expected an ECAPA-TDNN"):
        read_checkpoint(target)
