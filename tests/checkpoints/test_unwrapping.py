"""Whatever a trainer put around the network: the tensors that come out are the network's, and the right copy's."""

from __future__ import annotations

import logging
import random
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import s3prl_speaker_upstreams
from s3prl_speaker_upstreams.checkpoints import read_checkpoint
from s3prl_speaker_upstreams.errors import CheckpointMismatch, CheckpointUnreadable

pytestmark = pytest.mark.compat


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


HEAD = {"weight": torch.randn(12, 10), "bias": torch.randn(12)}

# what a trainer saved, from the trained weights and their averaged copy; where the average is, it is what is read
WRAPPINGS = {
    "timm": lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema, "epoch": 3, "metric": 0.5, "version": 2},
    "model_ema": lambda raw, ema: {"model": raw, "model_ema": under("module.", ema), "lr_scheduler": {"a": 1}},
    "ema": lambda raw, ema: {"model": raw, "ema": ema, "ema_decay": torch.tensor(0.999)},
    "swa": lambda raw, ema: {"n_averaged": torch.tensor(7), **under("module.", ema)},
    "swa beside": lambda raw, ema: {"model": raw, "swa": {"n_averaged": torch.tensor(7), **under("module.", ema)}},
    "ema_pytorch": lambda raw, ema: {
        "ema": {"initted": torch.tensor(True), "step": torch.tensor(9), **under("ema_model.", ema),
                **under("online_model.", raw)}
    },
    "lightning": lambda raw, ema: {
        "state_dict": {**under("model.", raw), **under("classifier.", HEAD), "train_acc.total": torch.tensor(3)},
        "callbacks": {"EarlyStopping": {"best_score": torch.tensor(0.1)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "loops": {}, "hyper_parameters": {"lr": 0.1}, "pytorch-lightning_version": "2.2.0",
    },
    "lightning, encoder": lambda raw, ema: {"state_dict": {**under("encoder.", raw), **under("loss_fn.", HEAD)}},
    "lightning, embedding_model": lambda raw, ema: {"state_dict": under("embedding_model.", raw)},
    "data parallel behind a sub-module": lambda raw, ema: {
        "model": {**under("encoder.module._orig_mod.", raw), **under("projector.0.", HEAD)}
    },
    "compiled": lambda raw, ema: under("_orig_mod.module.", raw),
    "model_state_dict": lambda raw, ema: {"model_state_dict": raw, "optimizer_state_dict": {"x": torch.zeros(1)}},
    "net": lambda raw, ema: {"net": raw, "best_eer": 2.1, "rng_state": torch.zeros(9, dtype=torch.uint8)},
    "heads in the same dict": lambda raw, ema: {**raw, **under("classifier.", HEAD), "aam.weight": torch.randn(12, 10)},
    "Sequential with the classifier": lambda raw, ema: {**under("0.", raw), **under("1.", HEAD)},
    "saved twice under two names": lambda raw, ema: {"state_dict": {**under("model.", raw), **under("encoder.", raw)}},
    "without counters": lambda raw, ema: {k: v for k, v in raw.items() if not k.endswith("num_batches_tracked")},
}  # fmt: skip
AVERAGED = ("timm", "model_ema", "ema", "swa", "swa beside", "ema_pytorch")
BOTH = tuple(name for name in AVERAGED if name != "swa")


@pytest.fixture
def wrapped(tiny, tmp_path):
    def make(name: str, format: str = "speechbrain"):
        raw, ema = tiny.state(format, 1), tiny.state(format, 2)
        path = tmp_path / "model.pt"
        torch.save(WRAPPINGS[name](*(dict(tiny.original_state(format, state)) for state in (raw, ema))), path)
        return path, raw, ema

    return make


@pytest.mark.parametrize(
    ("name", "format"),
    [*((name, "speechbrain") for name in WRAPPINGS), *((name, format) for name in ("timm", "heads in the same dict",
     "data parallel behind a sub-module", "without counters") for format in ("wespeaker", "taoruijie", "sslsv"))],
)  # fmt: skip
def test_the_network_is_found(wrapped, name, format):
    path, raw, ema = wrapped(name, format)
    expected = ema if name in AVERAGED else raw
    checkpoint = read_checkpoint(path)
    assert (checkpoint.format, checkpoint.role) == (format, "supervised")
    assert set(checkpoint.state) == set(expected)
    for key, tensor in checkpoint.state.items():
        assert tensor.dtype == expected[key].dtype
        if name != "without counters" or not key.endswith("num_batches_tracked"):
            assert torch.equal(tensor, expected[key]), key
    assert checkpoint.provenance.get("copy") == ("ema" if name in AVERAGED else None)


@pytest.mark.parametrize("name", BOTH)
def test_which_copy_is_said_and_chosen(wrapped, name, caplog):
    path, raw, ema = wrapped(name)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(read_checkpoint(path).state["mfa.conv.bias"], ema["mfa.conv.bias"])
    assert "reading the average" in caplog.text and "--copy raw (copy='raw'" in caplog.text
    for copy, expected in (("raw", raw), ("ema", ema)):
        caplog.clear()
        assert torch.equal(read_checkpoint(path, copy=copy).state["mfa.conv.bias"], expected["mfa.conv.bias"])
        assert "average" not in caplog.text


def test_a_copy_that_is_not_there(wrapped):
    for name, copy in (("swa", "raw"), ("lightning", "ema")):
        with pytest.raises(CheckpointMismatch, match=f"expected the {copy} one"):
            read_checkpoint(wrapped(name)[0], copy=copy)


def test_averages_without_names_are_not_passed_over_silently(tiny, tmp_path, caplog):
    state = tiny.state("speechbrain")
    raw = tiny.original_state("speechbrain", state)
    for ema in ({"shadow_params": [torch.zeros(3)], "decay": 0.99}, {"blocks0convconvweight": torch.zeros(3)}):
        torch.save({"model": raw, "model_ema": ema}, tmp_path / "model.pt")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert torch.equal(read_checkpoint(tmp_path / "model.pt").state["mfa.conv.bias"], state["mfa.conv.bias"])
        assert "averaged weights under names that are not the network's" in caplog.text


def test_two_networks_that_nothing_tells_apart_are_refused(tiny, tmp_path):
    first, second = (dict(tiny.original_state("speechbrain", tiny.state("speechbrain", seed))) for seed in (1, 2))
    torch.save({"model": first, "net": second}, tmp_path / "model.pt")
    with pytest.raises(CheckpointMismatch, match=r"2 different SpeechBrain networks \('model.', 'net.'\)"):
        read_checkpoint(tmp_path / "model.pt")


def test_student_and_teacher_of_somebody_s_own_training(tiny, tmp_path, caplog):
    student, teacher = tiny.state("speechbrain", 1), tiny.state("speechbrain", 2)
    states = {
        name: dict(tiny.original_state("speechbrain", s)) for name, s in (("student", student), ("teacher", teacher))
    }
    torch.save({"state_dict": {k: v for name, s in states.items() for k, v in under(f"{name}.net.", s).items()}},
               tmp_path / "model.pt")  # fmt: skip
    with caplog.at_level(logging.WARNING):
        checkpoint = read_checkpoint(tmp_path / "model.pt", format="speechbrain")
    assert checkpoint.role == "teacher" and "reading the teacher" in caplog.text
    assert torch.equal(checkpoint.state["mfa.conv.bias"], teacher["mfa.conv.bias"])
    other = read_checkpoint(tmp_path / "model.pt", format="speechbrain", role="student")
    assert torch.equal(other.state["mfa.conv.bias"], student["mfa.conv.bias"])


@pytest.mark.parametrize("extra", ["adapter.weight", "frontend.conv.weight", "model.spectrogram.window", "blocks.9.x"])
def test_what_could_change_an_embedding_is_not_taken_for_a_head(tiny, tmp_path, extra):
    state = dict(tiny.original_state("speechbrain", tiny.state("speechbrain")))
    torch.save({**under("model.", state), extra: torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointMismatch, match=f"1 of .* keys unmatched, first '{extra}'"):
        read_checkpoint(tmp_path / "model.pt")
    # ... nor is what comes before the network in a Sequential
    torch.save({**under("1.", state), "0.weight": torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointMismatch, match="first '0.weight'"):
        read_checkpoint(tmp_path / "model.pt")


def test_the_nearest_format_and_the_first_difference(tiny, tmp_path):
    state = dict(tiny.original_state("wespeaker", tiny.state("wespeaker")))
    few = {k: v for k, v in state.items() if k.startswith(("layer1", "layer2", "bn", "linear"))}
    torch.save(few, tmp_path / "model.pt")
    with pytest.raises(
        CheckpointMismatch, match=r"nearest is WeSpeaker \(\d\d% of its names\), first without 'layer3"
    ) as e:
        read_checkpoint(tmp_path / "model.pt")
    assert "damaged" not in str(e.value)
    del state["layer3.se_res2block.0.conv.bias"]
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointMismatch, match="first 'layer3.se_res2block.0.conv.bias'.*WeSpeaker") as e:
        read_checkpoint(tmp_path / "model.pt")
    assert "damaged" not in str(e.value)


# --- files that are no checkpoints, and damaged ones -----------------------------------------------------------------


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(2, 2, 3)

    def forward(self, x):
        return self.conv(x)


def test_torchscript_is_named(tmp_path):
    torch.jit.script(Encoder()).save(str(tmp_path / "init.zip"))
    with pytest.raises(CheckpointUnreadable, match="is a TorchScript program"):
        read_checkpoint(tmp_path / "init.zip")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_is_named(tmp_path, zipped):
    torch.save(Encoder(), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointUnreadable, match=r"whole pickled module \(.*Encoder\).*state_dict.*run_downstream.py"
    ) as e:
        read_checkpoint(tmp_path / "x.pt")
    assert "damaged" not in str(e.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0:\x90\x01", "ONNX"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (b"\x93NUMPY\x01\x00v\x00{'descr'", "NumPy"),
    ],
)
def test_other_programs_files_are_named(tmp_path, content, message):
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(CheckpointUnreadable, match=message):
        read_checkpoint(tmp_path / "model.bin")


def test_a_flipped_bit_is_never_read(tiny):
    """Of 30 single flipped bits anywhere in a file, none gives other weights: an error, or a bit that nothing uses."""
    path, networks = tiny("speechbrain")
    content, expected = path.read_bytes(), read_checkpoint(path).state
    rng, refused = random.Random(0), 0
    for _ in range(30):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            state = read_checkpoint(path).state
        except (CheckpointUnreadable, CheckpointMismatch):
            refused += 1
        else:
            assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert refused > 10


def test_a_flipped_bit_of_a_weight_is_called_damage(tiny):
    path, _ = tiny("speechbrain")
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        content = archive.read(largest)
    whole = path.read_bytes()
    at = whole.index(content) + len(content) // 2
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(CheckpointUnreadable, match="damaged.*checksum.*fetch it again"):
        read_checkpoint(path)


def test_files_saved_without_checksums_are_read(tiny, tmp_path):
    path, networks = tiny("speechbrain")
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this torch always writes checksums")
    state = torch.load(path, weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_checkpoint(path).state["mfa.conv.bias"], networks["supervised"]["mfa.conv.bias"])


@pytest.mark.parametrize("format", ["taoruijie", "sslsv"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_front_end_rounded_with_the_weights_is_had_exactly(tiny, format, dtype):
    """Window and filters of a file in half precision are those that the project makes, not their roundings."""
    from s3prl_speaker_upstreams.checkpoints import build_encoder
    from s3prl_speaker_upstreams.ecapa import DIALECTS, Frontend

    path, _ = tiny(format)
    dialect = {"taoruijie": "taoruijie", "sslsv": "sslsv_hann"}[format]
    made = Frontend(DIALECTS[dialect].frontend)
    saved = torch.load(path, weights_only=False)
    state = saved.get("model", saved)
    for name in state:
        if name.endswith("mel_scale.fb"):
            state[name] = made.mel
    halved = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    torch.save({**saved, "model": halved} if "model" in saved else halved, path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.frontend == DIALECTS[dialect].frontend and not checkpoint.frontend_buffers
    wav = torch.randn(8000) * 0.1
    with torch.no_grad():
        found = build_encoder(checkpoint)([wav], outputs=("fbank",))["fbank"].data
    assert torch.equal(found, made([wav]).data)
    assert torch.equal(checkpoint.state["mfa.conv.weight"], halved[next(n for n in halved if "layer4.w" in n or
                       "encoder_momentum.mfa.conv.conv.w" in n)].float())  # fmt: skip


# --- the house -------------------------------------------------------------------------------------------------------

README = Path(s3prl_speaker_upstreams.__file__).parent / "checkpoints" / "README.md"


def test_adding_a_format_is_adding_one_file(tiny, tmp_path):
    package = Path(s3prl_speaker_upstreams.__file__).parent
    copy = tmp_path / "site" / package.name
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("files", "__pycache__", "superb", "pretrain"))
    # the one file is the README's own
    toy = re.search(r"# checkpoints/formats/toy.py\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert toy
    (copy / "checkpoints" / "formats" / "toy.py").write_text(toy.group(1))
    torch.save(tiny.original_state("speechbrain", tiny.state("speechbrain"), "toy."), tmp_path / "toy.pt")
    command = [sys.executable, "-S", "-c", (
        f"import sys; sys.path[:0] = [{str(copy.parent)!r}]; sys.path += {[p for p in sys.path if p]!r}\n"
        "import argparse; from s3prl_speaker_upstreams.weights import cli\n"
        "parser = argparse.ArgumentParser(); cli.add_parsers(parser.add_subparsers())\n"
        f"args = parser.parse_args(['info', {str(tmp_path)!r}, '--format', 'toy']); sys.exit(args.func(args))"
    )]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "format: toy" in result.stdout and "scale: 32768.0" in result.stdout
