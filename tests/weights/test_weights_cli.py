"""The verbs list, info, fetch and convert, as a user types them."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from s3prl_speaker_upstreams import checkpoints
from s3prl_speaker_upstreams.weights import REGISTRY
from s3prl_speaker_upstreams.weights import cli as verbs

pytestmark = pytest.mark.compat


@pytest.fixture
def command():
    """Run a command line; returns the exit code."""

    def run(*words: str) -> int:
        parser = argparse.ArgumentParser(prog="s3prl-speaker")
        verbs.add_parsers(parser.add_subparsers(required=True))
        args = parser.parse_args([str(word) for word in words])
        return args.func(args)

    return run


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny checkpoint with a WeSpeaker file's keys."""
    from s3prl_speaker_upstreams.checkpoints import expected_shapes
    from s3prl_speaker_upstreams.checkpoints.formats import BY_NAME
    from s3prl_speaker_upstreams.ecapa import DIALECTS

    widths = {"channels": 16, "mfa_channels": 24, "embedding_dim": 10, "se_channels": 6, "attention_channels": 5}
    shapes = expected_shapes(DIALECTS["wespeaker"].ecapa_config(**widths))
    names = BY_NAME["wespeaker"].names(7)
    path = tmp_path / "avg_model.pt"
    state = {names[name]: torch.rand(shape) + 0.5 for name, shape in shapes.items()}
    torch.save(
        {k: v.squeeze(-1) if "linear" in k and "pool" not in k and v.dim() == 3 else v for k, v in state.items()}, path
    )
    return path


def test_choices_are_those_of_the_readers():
    assert verbs.COPIES == checkpoints.COPIES and verbs.ROLES == checkpoints.ROLES


def test_list(command, capsys, tmp_path):
    place = tmp_path / "s3prl" / "ecapa_dino_sslsv" / "model_avg.pt"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"x")
    assert command("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "FORMAT", "SIZE", "LICENCE", "EER", "%", "CACHED"]
    rows = {line.split()[0]: line for line in lines[1:]}
    assert set(rows) == set(REGISTRY)
    assert rows["ecapa_tdnn"].split() == ["ecapa_tdnn", "speechbrain", "83.3", "MB", "Apache-2.0", "0.90", "no"]
    assert rows["ecapa_dino_sslsv"].endswith("yes") and rows["ecapa_dino_sslsv_ssps"].endswith("by hand")
    assert command("list", "--json") == 0
    assert {e["name"] for e in json.loads(capsys.readouterr().out)} == set(REGISTRY)


@pytest.mark.parametrize("name", REGISTRY)
def test_info_of_every_entry(command, capsys, name):
    assert command("info", name, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["name"] == name and facts["licence"] == REGISTRY[name].licence
    assert REGISTRY[name].shipped or f"fetch {name}" in facts["cached"]


def test_info_of_a_file(command, capsys, checkpoint):
    assert command("info", checkpoint) == 0
    out = capsys.readouterr().out
    for line in ("format: wespeaker", "role: supervised", "  channels: 16", "  scale: 32768.0", "  file: avg_model.pt"):
        assert line in out.splitlines()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ecapa_tdn", "ConfigError: unknown checkpoint 'ecapa_tdn'; did you mean 'ecapa_tdnn'"),
        ("nothing/here.pt", "CheckpointUnreadable: nothing/here.pt: no such file"),
    ],
)
def test_info_of_nothing(command, capsys, name, message):
    assert command("info", name) == 1
    assert message in capsys.readouterr().err


def test_fetch(command, capsys, server, monkeypatch):
    content = b"weights" * 1000
    server.hub_file("Wespeaker/wespeaker-voxceleb-ecapa-tdnn512", "main", "avg_model.pt", content)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    assert command("fetch", "ecapa_tdnn_wespeaker_c512") == 0
    path = capsys.readouterr().out.split(": ", 1)[1].strip()
    assert open(path, "rb").read() == content
    # One that cannot be had does not keep the others from being fetched, and shows in the exit code.
    assert command("fetch", "ecapa_dino_sslsv", "ecapa_tdnn_wespeaker_c512") == 1
    out, err = capsys.readouterr()
    assert path in out and "no direct download link" in err


def test_convert(command, capsys, checkpoint, tmp_path):
    target = tmp_path / "converted.safetensors"
    assert command("convert", checkpoint, target) == 0
    assert str(target) in capsys.readouterr().out
    first, second = checkpoints.read_checkpoint(checkpoint), checkpoints.read_checkpoint(target)
    assert all(torch.equal(first.state[k], second.state[k]) for k in first.state)
    assert len(second.provenance["converted_from_sha256"]) == 64
    assert command("convert", checkpoint, tmp_path / "half", "--fp16", "--frontend", "3dspeaker") == 0
    half = checkpoints.read_checkpoint(tmp_path / "half")
    assert half.frontend.scale == 1.0 and half.frontend.mel == "kaldi"


def test_convert_of_an_entry_keeps_its_provenance(command, checkpoint, tmp_path):
    place = tmp_path / "s3prl" / "ecapa_dino_wespeaker" / "avg_model.pt"
    place.parent.mkdir(parents=True)
    place.write_bytes(checkpoint.read_bytes())
    assert command("convert", "ecapa_dino_wespeaker", tmp_path / "x.safetensors") == 0
    provenance = checkpoints.read_checkpoint(tmp_path / "x.safetensors").provenance
    assert (
        provenance["licence"] == "CC-BY-4.0"
        and provenance["eer"] == 3.02
        and provenance["name"] == "ecapa_dino_wespeaker"
    )


def test_convert_that_fails_writes_nothing(command, capsys, checkpoint, tmp_path):
    assert command("convert", checkpoint, tmp_path / "x.safetensors", "--format", "sslsv") == 1
    assert "pass --format wespeaker" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()
    (tmp_path / "file").write_text("")
    assert command("convert", checkpoint, tmp_path / "file" / "x.safetensors") == 1
    assert "cannot write" in capsys.readouterr().err


def test_init_says_that_it_is_untrained(command, capsys, tmp_path):
    words = ("init", tmp_path / "x.safetensors", "--dialect", "wespeaker", "--channels", "16", "--seed", "3")
    assert command(*words) == 0
    capsys.readouterr()
    first = checkpoints.read_checkpoint(tmp_path / "x.safetensors")
    assert first.role == "untrained" and "random" in first.provenance["training_data"]
    assert first.ecapa.channels == 16 and first.ecapa.padding == "zeros"
    assert command("init", tmp_path / "y.safetensors", *words[2:]) == 0
    again = checkpoints.read_checkpoint(tmp_path / "y.safetensors")
    assert all(torch.equal(first.state[k], again.state[k]) for k in first.state)
    assert command("info", tmp_path / "x.safetensors") == 0
    assert "role: untrained" in capsys.readouterr().out
