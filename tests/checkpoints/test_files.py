"""Damaged, foreign and dangerous files: each is recognised, none runs, all get a remedy."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from s3prl_speaker_upstreams.checkpoints import load_encoder, read_checkpoint
from s3prl_speaker_upstreams.checkpoints.files import open_file, sniff
from s3prl_speaker_upstreams.errors import CheckpointUnreadable

pytestmark = pytest.mark.compat


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"", "empty", "0 bytes.*fetch it again"),
        (b"<!DOCTYPE html><html><title>404</title>", "html", "web page.*'resolve' link"),
        (b"\n <HTML>", "html", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs", "git lfs pull"),
        (b'{"Code": 404, "Message": "not found"}', "json", "JSON text"),
        ("Umlaut: \u00e4".encode(), "text", "plain text.*weights file"),
        (b"\x1f\x8b\x08\x00rest", "gzip", "gzip archive; unpack"),
        (b"\x00\x01\x02\x03" * 100, "unknown", "neither a PyTorch nor a safetensors"),
        (b"PK\x03\x04 truncated", "zip", "truncated or damaged .*fetch it again"),
        (b"\x80\x02}q\x00(X\x01\x00\x00", "pickle", "a Python pickle that torch.save did not write"),
        ((40).to_bytes(8, "little") + b'{"a":{"dtype":"F32","sha', "safetensors", "truncated or damaged safetensors"),
    ],
)
def test_no_checkpoint(tmp_path, content, kind, message):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    assert sniff(path) == kind
    with pytest.raises(CheckpointUnreadable, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("format", ["speechbrain", "rdino", "sslsv"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.95, 0.999])
def test_truncated(tiny, format, part):
    path, _ = tiny(format)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(CheckpointUnreadable, match="truncated or damaged"):
        read_checkpoint(path)


def test_a_zip_that_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("voxceleb/avg_model.pt", b"...")
    with pytest.raises(CheckpointUnreadable, match=r"zip archive \(holding voxceleb/avg_model\.pt\).*unpack"):
        read_checkpoint(tmp_path / "x.zip")


@pytest.mark.parametrize(("member", "message"), [("model_config.yaml", "NeMo"), ("notes.txt", "tar archive")])
def test_tar(tmp_path, member, message):
    with tarfile.open(tmp_path / "ecapa_tdnn.nemo", "w") as tar:
        info = tarfile.TarInfo(f"./{member}")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(CheckpointUnreadable, match=message):
        read_checkpoint(tmp_path / "ecapa_tdnn.nemo")


class Bomb:
    """Unpickling this makes a file: what a hostile checkpoint could do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_is_not_run_without_the_flag(tiny, tmp_path):
    path, networks = tiny("speechbrain")
    marker = tmp_path / "executed"
    state = torch.load(path, weights_only=True)
    torch.save({"model": dict(state), "args": Bomb(marker)}, path)
    with pytest.raises(
        CheckpointUnreadable,
        match=r"open.*refused.*--allow-pickle \(allow_pickle=True; for run_downstream.py.*`allow_pickle: true`.*-g\)",
    ):
        read_checkpoint(path)
    assert not marker.exists()
    checkpoint = read_checkpoint(path, allow_pickle=True)
    assert marker.exists()
    assert torch.equal(checkpoint.state["mfa.conv.bias"], networks["supervised"]["mfa.conv.bias"])


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_numpy_numbers_need_no_flag(tmp_path, zipped):
    data = {
        "w": torch.ones(2),
        "eer": np.float64(2.5),
        "lr": np.float32(0.5),
        "n": np.int64(3),
        "dtype": np.dtype("f8"),
    }
    torch.save(data, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    file = open_file(tmp_path / "x.pt")
    assert file.entries == set(data) and set(file.tensors) == {"w"}
    assert torch.equal(file.tensors["w"], torch.ones(2))


def test_numpy_names_of_both_generations(tmp_path):
    """A file pickled by numpy 1 names numpy.core, one by numpy 2 numpy._core: either must be read on either."""
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        buffer = io.BytesIO()
        torch.save({"eer": np.float64(2.5), "w": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)
        content = buffer.getvalue()
        own = b"numpy._core.multiarray" if b"numpy._core.multiarray" in content else b"numpy.core.multiarray"
        (tmp_path / "x.pt").write_bytes(content.replace(b"c" + own + b"\n", b"c" + module.encode() + b"\n"))
        assert open_file(tmp_path / "x.pt").entries == {"eer", "w"}


def test_numpy_object_scalars_stay_refused(tmp_path):
    marker = tmp_path / "executed"
    array = np.empty((), dtype=object)
    array[()] = Bomb(marker)
    torch.save({"eer": array}, tmp_path / "x.pt")
    with pytest.raises(CheckpointUnreadable):
        open_file(tmp_path / "x.pt")
    assert not marker.exists()


def test_saved_on_a_gpu(tiny, monkeypatch):
    """Tensors tagged cuda:0 are read on a machine without one."""
    path, _ = tiny("speechbrain")
    state = torch.load(path, weights_only=True)
    import torch.serialization as serialization

    monkeypatch.setattr(serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(state, path)
    monkeypatch.undo()
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        assert b"cuda:0" in archive.read(name)
    assert read_checkpoint(path).state["mfa.conv.weight"].device.type == "cpu"


def test_old_container(tiny):
    path, networks = tiny("wespeaker")
    state = torch.load(path, weights_only=True)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert sniff(path) == "pickle"
    assert torch.equal(read_checkpoint(path).state["mfa.conv.weight"], networks["supervised"]["mfa.conv.weight"])


def test_the_file_can_go_once_it_is_read(tiny):
    path, networks = tiny("rdino")
    checkpoint = read_checkpoint(path)
    path.write_bytes(b"\0" * path.stat().st_size)  # a memory map would now read zeros
    assert torch.equal(checkpoint.state["mfa.conv.weight"], networks["teacher"]["mfa.conv.weight"])


def test_a_file_system_that_cannot_map_files(tiny, monkeypatch):
    path, networks = tiny("wespeaker")
    real = torch.load

    def without_mmap(*args, mmap=None, **kwargs):
        if mmap:
            raise RuntimeError("unable to mmap 123 bytes: No such device (19)")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", without_mmap)
    assert torch.equal(read_checkpoint(path).state["mfa.conv.weight"], networks["supervised"]["mfa.conv.weight"])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_is_not_torchs(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointUnreadable, match="a Python pickle that torch.save did not write"):
        read_checkpoint(tmp_path / "x.pkl")


def test_a_path_never_touches_the_network(tiny, monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for format in ("speechbrain", "wespeaker", "rdino", "sslsv", "taoruijie"):
        path, _ = tiny(format)
        load_encoder(path, format=format)
