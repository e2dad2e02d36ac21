"""Checkpoints appear whole or not at all; damaged ones are recognised and the one before is used."""

import logging
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from s3prl_speaker_upstreams.errors import CheckpointUnreadable
from s3prl_speaker_upstreams.pretrain.checkpointing import CheckpointStore, load_rng, rng_state


def state(n):
    return {"step": n, "x": torch.full((100,), float(n)), "nested": {"list": [1, None, "a", 2.5, True]}}


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "run", keep_last=3)
    for n in (1, 2, 3):
        assert store.save(n, state(n)) is not None
    return store


def names(store):
    return [p.name for p in store.paths()]


def test_last_k_and_best_are_kept(store):
    store.mark_best(2, 0.07)
    for n in (4, 5, 6):
        store.save(n, state(n))
    assert names(store) == [f"step_{n:08d}.pt" for n in (2, 4, 5, 6)]
    assert store.best()[1] == 0.07 and store.best()[0].exists()
    assert not (store.folder / "step_00000001.pt.sha256").exists()


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_corrupt_newest_falls_back_and_says_so(store, damage, caplog):
    newest = store.paths()[-1]
    data = bytearray(newest.read_bytes())
    if damage == "truncate":
        data = data[: len(data) // 2]
    elif damage == "flip":
        data[len(data) // 2] ^= 1  # one bit inside a tensor: readable, but wrong
    else:
        data = b""
    newest.write_bytes(data)
    with caplog.at_level(logging.ERROR):
        loaded, path = store.load_newest()
    assert loaded["step"] == 2 and path.name == "step_00000002.pt"
    assert "step_00000003.pt" in caplog.text and "falling back" in caplog.text
    assert (store.folder / "step_00000003.pt.corrupt").exists()


def test_all_corrupt_is_an_error_and_none_is_none(store, tmp_path):
    for path in store.paths():
        path.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointUnreadable, match="none of 3"):
        store.load_newest()
    assert CheckpointStore(tmp_path / "other").load_newest() is None


def test_half_written_files_are_neither_read_nor_left(store):
    (store.folder / ".step_00000004.pt.part").write_bytes(b"killed while writing")
    assert store.load_newest()[0]["step"] == 3
    store.save(5, state(5))
    assert not list(store.folder.glob(".*.part"))


def test_a_full_disk_keeps_the_previous_checkpoint_and_says_so(tmp_path):
    """A real failing write: a process that may write files of 20 kB at most."""
    code = """
import logging, resource, sys, torch
from s3prl_speaker_upstreams.pretrain.checkpointing import CheckpointStore
logging.basicConfig(level=logging.ERROR)
store = CheckpointStore(sys.argv[1])
assert store.save(1, {"x": torch.zeros(10)}) is not None
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
assert store.save(2, {"x": torch.zeros(100000)}) is None
assert [p.name for p in store.paths()] == ["step_00000001.pt"]
assert store.load_newest()[0]["x"].shape == (10,)
assert not [p for p in store.folder.iterdir() if "part" in p.name or "00000002" in p.name]
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stderr and "step_00000001.pt is still whole" in done.stderr


def test_random_states_come_back_exactly(tmp_path):
    store = CheckpointStore(tmp_path)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    random.gauss(0, 1), np.random.normal(), torch.randn(3)  # noqa: NPY002
    store.save(1, {"rng": rng_state()})
    first = (random.random(), random.gauss(0, 1), np.random.rand(3).tolist(), torch.randn(3).tolist())  # noqa: NPY002
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    load_rng(store.load_newest()[0]["rng"])
    assert first == (random.random(), random.gauss(0, 1), np.random.rand(3).tolist(), torch.randn(3).tolist())  # noqa: NPY002
