"""torch.load of what s3prl's runners save, and of nothing else."""

from __future__ import annotations

import argparse
import collections
import fractions
import io
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch

from s3prl_speaker_upstreams.compat import torch_load

pytestmark = pytest.mark.compat

EXPERIMENT = {
    "Optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]},
    "Step": 4,
    "Epoch": 0,
    "Args": argparse.Namespace(mode="train", upstream="fbank", local_rank=None, seed=1337),
    "Config": {"runner": {"total_steps": 4}, "optimizer": {"name": "TorchOptim"}},
    "Featurizer": collections.OrderedDict(weights=torch.arange(3.0)),
}

refused = pytest.mark.skipif(
    not torch_load.namespaces_are_refused(), reason=f"torch {torch.__version__} loads argparse.Namespace by default"
)


@pytest.fixture
def load():
    """The stand-in around this torch's own torch.load, without putting it in place."""
    return torch_load.NamespaceLoader(torch.load)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("source", ["path", "Path", "stream"])
def test_an_experiment_is_loaded(tmp_path, load, new_format, source):
    path = tmp_path / "states-4.ckpt"
    torch.save(EXPERIMENT, path, _use_new_zipfile_serialization=new_format)
    file = {"path": str(path), "Path": path, "stream": io.BytesIO(path.read_bytes())}[source]
    loaded = load(file, map_location="cpu")
    assert loaded["Args"] == EXPERIMENT["Args"] and loaded["Config"] == EXPERIMENT["Config"]
    assert torch.equal(loaded["Featurizer"]["weights"], torch.arange(3.0))


def test_older_layout_of_pretrained_upstreams(tmp_path, load):
    path = tmp_path / "states-1000.ckpt"
    settings = {"Config": {"transformer": {"hidden_size": 8}}, "Paras": argparse.Namespace(upstream="tera")}
    torch.save({"Settings": settings, "Transformer": {"w": torch.zeros(2)}}, path)
    assert load(path)["Settings"]["Paras"].upstream == "tera"


@refused
def test_foreign_files_stay_refused(tmp_path, load):
    for content in ({"args": argparse.Namespace(a=1)}, {"Args": argparse.Namespace(), "weights": torch.zeros(1)}):
        torch.save(content, tmp_path / "foreign.pt")
        with pytest.raises(pickle.UnpicklingError, match="argparse.Namespace"):
            load(tmp_path / "foreign.pt")


@refused
def test_explicit_weights_only_is_respected(tmp_path, load):
    torch.save(EXPERIMENT, tmp_path / "states-4.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="argparse.Namespace"):
        load(tmp_path / "states-4.ckpt", weights_only=True)


@refused
def test_other_classes_stay_refused_in_an_experiment(tmp_path, load):
    torch.save({**EXPERIMENT, "Extra": fractions.Fraction(1, 3)}, tmp_path / "states-1.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="fractions.Fraction"):
        load(tmp_path / "states-1.ckpt")


class Payload:
    """Makes a folder when it is unpickled by an unrestricted reader."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (self.folder,))


@refused
def test_code_in_an_experiment_does_not_run(tmp_path, load):
    payload = Payload(str(tmp_path / "made"))
    torch.save({**EXPERIMENT, "Args": argparse.Namespace(x=payload)}, tmp_path / "states-1.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        load(tmp_path / "states-1.ckpt")
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "states-1.ckpt", weights_only=False)
    assert (tmp_path / "made").exists()  # the payload is a real one


@refused
def test_namespace_is_refused_again_afterwards(tmp_path, load):
    torch.save(EXPERIMENT, tmp_path / "states-4.ckpt")
    load(tmp_path / "states-4.ckpt")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    assert torch_load.namespaces_are_refused()


def test_explicit_arguments_and_errors_pass_through(tmp_path, load):
    torch.save({"w": torch.ones(2)}, tmp_path / "plain.pt")
    assert torch.equal(load(tmp_path / "plain.pt", "cpu", weights_only=True)["w"], torch.ones(2))
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.pt")
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 cut short")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((RuntimeError, pickle.UnpicklingError, EOFError)):
            load(tmp_path / "cut.ckpt")


@refused
def test_in_place_through_the_hook(tmp_path):
    """A fresh process: s3prl.downstream.runner is imported, then plain torch.load reads the experiment."""
    torch.save(EXPERIMENT, tmp_path / "states-4.ckpt")
    code = (
        "import sys, torch; from s3prl_speaker_upstreams import compat; compat.install();"
        "before = torch.load; import s3prl.downstream.runner;"
        "print(before is torch.load, torch.load(sys.argv[1])['Args'].upstream)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "states-4.ckpt")], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False fbank"
