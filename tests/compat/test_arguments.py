"""The rank, ``-k`` and ``-l`` as s3prl's documentation has them, through the stock program."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import types

import pytest

from s3prl_speaker_upstreams.compat import arguments

pytestmark = pytest.mark.compat


@pytest.mark.parametrize(
    ("given", "world", "expected"),
    [
        (["--local-rank=1", "-m", "train"], "2", ["--local_rank=1", "-m", "train"]),
        (["-m", "train", "--local-rank", "1"], "2", ["--local_rank=1", "-m", "train"]),
        (["-m", "train"], "2", ["--local_rank=1", "-m", "train"]),
        (["-m", "train"], "1", None),
        (["-m", "train", "--local_rank=1"], "2", None),
    ],
)
def test_the_rank_reaches_s3prls_parser(monkeypatch, given, world, expected):
    monkeypatch.setattr(sys, "argv", ["/somewhere/s3prl/run_downstream.py", *given])
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", world)
    assert arguments.rank_is_unread(sys) == (expected is not None)
    if expected:
        arguments.spell_local_rank()
        assert sys.argv[1:] == expected


def test_other_programs_and_processes_without_a_rank_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/other.py", "--local-rank=1"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not arguments.rank_is_unread(sys)
    monkeypatch.setattr(sys, "argv", ["run_downstream.py", "--local-rank=1"])
    monkeypatch.delenv("LOCAL_RANK")
    assert not arguments.rank_is_unread(sys)


@pytest.mark.parametrize("launcher", ["torch.distributed.launch", "torch.distributed.run"])
def test_launchers_as_s3prl_documents_them(tmp_path, launcher):
    """Both processes get past the parser, and to the backend (none such, here) with their own rank."""
    (tmp_path / "config.yaml").write_text("runner: {total_steps: 1}\n")
    command = [
        sys.executable,
        "-m",
        launcher,
        "--nproc_per_node=2",
        "--master_port=29577",
        "-m",
        "s3prl.run_downstream",
    ]
    task = ["-m", "train", "-u", "fbank", "-d", "example", "-c", "config.yaml", "-p", "out", "--backend", "none_such"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *task], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    assert "unrecognized arguments" not in done.stderr
    assert "torch.cuda.set_device(args.local_rank)" in done.stderr, done.stderr[-2000:]


def test_experiments_keep_full_paths(tmp_path, monkeypatch):
    seen = []

    class Runner:
        def __init__(self, args, config):
            seen.append(vars(args).copy())
            self.upstream = types.SimpleNamespace(model=types.SimpleNamespace(layer_names=("block_1", "block_2")))

    arguments.keep_full_paths(types.SimpleNamespace(Runner=Runner))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"")
    for given in ("model.pt", str(tmp_path / "model.pt"), "http://host/model.pt", "nowhere.pt", None):
        Runner(argparse.Namespace(upstream_ckpt=given, upstream_model_config=None), {})
    Runner(args := argparse.Namespace(upstream_ckpt=None, upstream_model_config=None), {})
    assert args.upstream_layer_names == ["block_1", "block_2"]
    full = str(tmp_path / "model.pt")
    assert [args["upstream_ckpt"] for args in seen] == [full, full, "http://host/model.pt", "nowhere.pt", None, None]


def test_s3prl_problem_can_be_imported():
    code = (
        "import s3prl.hub, pandas\n"
        "from s3prl.problem import SuperbSID\n"
        "from s3prl.dataio.corpus.base import Corpus\n"
        "table = pandas.DataFrame({'id': ['a', 'b'], 'n': [1, 2]})\n"
        "print(Corpus.dataframe_to_datapoints(table, lambda row: row['id'])['b']['n'])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[0] == "2"


def test_torchaudio_beside_a_later_torch(caplog):
    """What refuses to be imported (torchaudio 2.11 beside torch 2.15) logs it; the same release is left alone."""
    import torch
    import torchaudio

    from s3prl_speaker_upstreams.compat import cuda_versions

    def refuse():
        raise RuntimeError("Detected that PyTorch and TorchAudio were compiled with different CUDA versions.")

    module = types.SimpleNamespace(_check_cuda_version=refuse)
    same = torch.__version__.split(".")[:2] == torchaudio.__version__.split(".")[:2]
    assert not (same and cuda_versions.checks_the_release(module))
    cuda_versions.warn_instead(module)
    with caplog.at_level("INFO"):
        assert module._check_cuda_version() is None
    assert "different CUDA versions" in caplog.text
