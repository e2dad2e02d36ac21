"""SID's and ASV's caches: in the experiment's folder, keyed by corpus, whole, and never in the installed package."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from s3prl_speaker_upstreams import compat
from s3prl_speaker_upstreams.compat import recipe_caches

pytestmark = pytest.mark.compat


def corpus(root: Path, speakers, seconds=0.1) -> Path:
    """VoxCeleb1's layout with one utterance of each speaker in each split of SID."""
    lines = []
    for speaker in speakers:
        for split in (1, 2, 3):
            name = f"id{10000 + speaker}/video/{split:05d}.wav"
            for part in ("dev", "test"):
                path = root / part / "wav" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = np.random.default_rng(speaker).uniform(-0.5, 0.5, int(16000 * seconds))
                soundfile.write(path, noise, 16000)
            lines.append(f"{split} {name}\n")
    (root / "split.txt").write_text("".join(lines))
    (root / "trials.txt").write_text(f"1 {lines[0].split()[1]} {lines[1].split()[1]}\n")
    return root


@pytest.fixture(scope="module")
def sid():
    compat.install()
    from s3prl.downstream.voxceleb1 import expert

    return expert


@pytest.fixture(scope="module")
def asv():
    compat.install()
    from s3prl.downstream.sv_voxceleb1 import expert

    return expert


def sid_expert(module, root, expdir):
    datarc = {"file_path": str(root), "meta_data": str(root / "split.txt"), "max_timestep": 16000}
    modelrc = {"projector_dim": 4, "select": "UtteranceLevel", "UtteranceLevel": {"pooling": "MeanPooling"}}
    return module.DownstreamExpert(
        upstream_dim=3, upstream_rate=160, downstream_expert={"datarc": datarc, "modelrc": modelrc}, expdir=str(expdir)
    )


def test_second_corpus_in_one_experiment_is_read_anew(sid, tmp_path):
    first, second = corpus(tmp_path / "a", (1, 2)), corpus(tmp_path / "b", (3, 4, 5))
    package = Path(sid.__file__).parent
    before = sorted(package.rglob("*.pkl"))
    assert len(sid_expert(sid, first, tmp_path / "exp").train_dataset) == 2
    assert len(sid_expert(sid, second, tmp_path / "exp").train_dataset) == 3
    again = sid_expert(sid, first, tmp_path / "exp")
    assert [len(again.train_dataset), len(again.dev_dataset), len(again.test_dataset)] == [2 * 1, 2, 2]
    assert again.train_dataset.label == [0, 1]
    kept = sorted((tmp_path / "exp" / "s3prl_cache" / "voxceleb1").rglob("*.pkl"))
    assert len(kept) == 6 and len({path.parent for path in kept}) == 2
    assert sorted(package.rglob("*.pkl")) == before


def test_cache_is_used(sid, tmp_path):
    root = corpus(tmp_path / "a", (1, 2))
    sid_expert(sid, root, tmp_path / "exp")
    (cached,) = (tmp_path / "exp").rglob("train.pkl")
    cached.write_bytes(pickle.dumps([str(root / "dev/wav/id10002/video/00001.wav")]))
    assert sid_expert(sid, root, tmp_path / "exp").train_dataset.label == [1]


def test_changed_lists_are_another_corpus(sid, tmp_path):
    root = corpus(tmp_path / "a", (1, 2))
    sid_expert(sid, root, tmp_path / "exp")
    split = root / "split.txt"
    split.write_text(split.read_text().replace("2 id10002", "1 id10002"))
    assert len(sid_expert(sid, root, tmp_path / "exp").train_dataset) == 3


def test_a_failing_search_leaves_no_cache(sid, tmp_path):
    root = corpus(tmp_path / "a", (1, 2))
    (root / "split.txt").write_text("1 id10009/video/00001.wav\n")
    with pytest.raises(IndexError):
        sid_expert(sid, root, tmp_path / "exp")
    assert [path for path in (tmp_path / "exp").rglob("*") if path.is_file()] == []


def lengths(module, root, expdir, n_jobs=1):
    token = recipe_caches._expdir.set(str(expdir))
    try:
        return module.SpeakerVerifi_train(
            {"min_sec": 0}, ["Voxceleb1"], [root / "dev" / "wav"], None, None, n_jobs=n_jobs
        )
    finally:
        recipe_caches._expdir.reset(token)


def test_lengths_follow_the_files(asv, tmp_path):
    module = asv.SpeakerVerifi_train.__init__.__globals__  # the wrapper's own
    assert module["__name__"] == recipe_caches.__name__
    from s3prl.downstream.sv_voxceleb1 import dataset

    root = corpus(tmp_path / "a", (1, 2), seconds=0.5)
    assert len(lengths(dataset, root, tmp_path / "exp", n_jobs=2)) == 6  # real loky children
    (cached,) = (tmp_path / "exp").rglob("Voxceleb1_length.pt")
    tags, numbers = torch.load(cached)
    assert len(tags) == 6 and all(7000 < number <= 8000 for number in numbers)
    # the second time from the cache: sentinel lengths of 0 leave no utterance
    torch.save([tags, [-1] * 6], cached)
    assert len(lengths(dataset, root, tmp_path / "exp")) == 0
    # the same folder with other files is another corpus
    corpus(root, (3,), seconds=0.7)
    assert len(lengths(dataset, root, tmp_path / "exp")) == 9
    assert not list(Path(dataset.__file__).parent.glob(".wav_lengths"))


def test_expert_hands_its_experiment_on(asv, tmp_path, monkeypatch):
    from s3prl.downstream.sv_voxceleb1 import dataset

    real = dataset.Parallel
    monkeypatch.setattr(dataset, "Parallel", lambda n_jobs: real(n_jobs=1))  # not 12 children here
    root = corpus(tmp_path / "a", (1, 2), seconds=2.5)
    lists = {name: str(root / "trials.txt") for name in ("train_meta_data", "dev_meta_data", "test_meta_data")}
    asv.DownstreamExpert(
        upstream_dim=3,
        expdir=str(tmp_path / "exp"),
        downstream_expert={
            "datarc": {"file_path": str(root), "vad_config": {"min_sec": 32000}, "max_timestep": 32000, **lists},
            "modelrc": {
                "input_dim": 8,
                "agg_module": "SP",
                "module": "XVector",
                "utter_module": "UtteranceExtractor",
                "ObjectiveLoss": "AMSoftmaxLoss",
                "module_config": {"XVector": {"agg_dim": 1500, "dropout_p": 0.0, "batch_norm": False}},
                "LossConfig": {"AMSoftmaxLoss": {"s": 30, "m": 0.4}},
            },
        },
    )
    assert len(list((tmp_path / "exp" / "s3prl_cache" / "sv_voxceleb1").rglob("Voxceleb1_length.pt"))) == 1
    assert recipe_caches._expdir.get() is None


def test_key_depends_on_place_lists_and_files(tmp_path, monkeypatch):
    key = recipe_caches.corpus_key
    assert key(tmp_path, b"x") == key(tmp_path, b"x") != key(tmp_path, b"y") != key(tmp_path / "b", b"y")
    assert key("", b"ab", b"c") != key("", b"a", b"bc")
    assert key("", files=[("a", 1)]) != key("", files=[("a", 2)])
    relative = key("corpus")
    monkeypatch.chdir(tmp_path)
    assert key("corpus") != relative


def test_outside_an_experiment_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert recipe_caches.cache_folder("voxceleb1", "k") == tmp_path / "s3prl_speaker_upstreams/s3prl_cache/voxceleb1/k"
