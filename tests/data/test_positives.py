"""Where positives come from: what a selection may take, that crops are of it, and that clusters find speakers."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from s3prl_speaker_upstreams.data.cached import CachedFeatureDataset
from s3prl_speaker_upstreams.data.datasets import MultiCropDataset
from s3prl_speaker_upstreams.data.loader import Loader
from s3prl_speaker_upstreams.data.manifest import Manifest, build_manifest
from s3prl_speaker_upstreams.data.positives import ClusterPositives, SpeakerPositives, kmeans, sessions
from s3prl_speaker_upstreams.data.sampler import BatchSampler
from s3prl_speaker_upstreams.errors import ConfigError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Manifest:
    """3 speakers x 2 sessions x 2 recordings, and a speaker of one recording; a recording is a constant level."""
    root = tmp_path_factory.mktemp("corpus")
    names = [f"id0000{s}/v{v}/{n}.wav" for s, v, n in itertools.product(range(3), range(2), range(2))]
    for number, name in enumerate([*names, "id00009/v0/0.wav"], 1):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name, np.full(20000, number / 32), 16000, subtype="FLOAT")
    return build_manifest(root, cache=False, progress=False)


def small(manifest: Manifest, **options) -> MultiCropDataset:
    return MultiCropDataset(manifest, **{"global_seconds": 0.25, "local_seconds": 0.1, "n_local": 3, **options})


def levels(crops: np.ndarray) -> list[int]:
    return [round(32 * float(crop.mean())) - 1 for crop in crops]


@pytest.mark.parametrize("selection", ["same_speaker", "other_session", "same_session"])
def test_every_second_global_crop_is_of_the_partner(corpus, selection):
    dataset = small(corpus, n_global=4, positives=SpeakerPositives(corpus, selection, seed=1))
    session, met = sessions(corpus), set()
    for epoch, index in itertools.product(range(12), range(len(corpus))):
        item = dataset[(epoch, index)]
        assert levels(item.global_crops) == [index, item.partner, index, item.partner]
        assert levels(item.local_crops) == [index] * 3
        assert corpus.labels[item.partner] == corpus.labels[index]
        if corpus[index].speaker == "id00009":
            assert item.partner == index  # there is no other
            continue
        assert item.partner != index
        same = session[item.partner] == session[index]
        assert {"same_speaker": True, "other_session": not same, "same_session": same}[selection]
        met.add((index, item.partner))
    assert len(met) == {"same_speaker": 36, "other_session": 24, "same_session": 12}[selection]  # all that are possible


def test_own_crops_are_those_without_a_selection(corpus):
    bare, chosen = small(corpus), small(corpus, positives=SpeakerPositives(corpus, "same_speaker"))
    for index in range(len(corpus)):
        one, other = bare[(3, index)], chosen[(3, index)]
        np.testing.assert_array_equal(one.global_crops[0], other.global_crops[0])
        np.testing.assert_array_equal(one.local_crops, other.local_crops)
        assert one.partner == one.index == index


def test_what_cannot_be_selected_is_said(corpus):
    with pytest.raises(ConfigError, match="needs the speaker of every utterance"):
        SpeakerPositives(Manifest(["a", "b"], [1, 1], [1, 1]), "same_speaker")
    with pytest.raises(ConfigError, match="no utterance has another one"):
        SpeakerPositives(Manifest(["a/1", "b/1"], [1, 1], [1, 1], ["a", "b"]), "same_speaker")
    with pytest.raises(ConfigError, match="at least 2 global crops"):
        small(corpus, n_global=1, positives=SpeakerPositives(corpus, "same_speaker"))


def test_pairs_are_counted(corpus):
    dataset = small(corpus, positives=SpeakerPositives(corpus, "other_session"))
    loader = Loader(dataset, BatchSampler(len(corpus), len(corpus)))
    batch = next(loader)
    assert batch.partners.tolist() == [dataset[(0, i)].partner for i in batch.indices.tolist()]
    assert loader.positives == {"pairs": 13, "same_recording": 1, "same_session": 1, "same_speaker": 13}
    plain = Loader(small(corpus), BatchSampler(len(corpus), 13))
    assert torch.equal(
        next(plain).partners, plain.dataset and next(Loader(small(corpus), BatchSampler(13, 13))).indices
    )
    assert not plain.positives


def test_an_unusable_partner_is_replaced_by_the_utterance_itself(tmp_path):
    for name in ("ann/v1/0.wav", "ann/v2/1.wav"):
        (tmp_path / name).parent.mkdir(parents=True)
        soundfile.write(tmp_path / name, np.full(20000, 0.25), 16000)
    manifest = build_manifest(tmp_path, cache=False, progress=False)
    (tmp_path / "ann/v2/1.wav").unlink()
    item = small(manifest, positives=SpeakerPositives(manifest, "same_speaker"))[(0, 0)]
    assert item.partner == item.index == 0 and [fault.kind for fault in item.faults] == ["unreadable"]


def test_cached_features_take_a_partner_too(corpus):
    def mean_level(wavs):
        return [wav[: len(wav) // 160 * 160].reshape(-1, 160).mean(1, keepdims=True) for wav in wavs]

    dataset = CachedFeatureDataset(
        corpus, features=mean_level, hop=160, versions=2, global_seconds=0.25, local_seconds=0.1,
        positives=SpeakerPositives(corpus, "same_speaker"),
    )  # fmt: skip
    for index in range(len(corpus)):
        item = dataset[(0, index)]
        assert levels(item.global_crops) == [index, item.partner] and levels(item.local_crops) == [index] * 4


# ---------------------------------------------------------------------------------------------- clusters
def test_kmeans_finds_directions_whatever_their_length():
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(5), 40)
    x = (np.eye(5)[truth] * 4 + rng.normal(size=(200, 5)) * 0.3) * rng.uniform(0.1, 10, (200, 1))
    for seed in range(3):
        assignments, centroids = kmeans(torch.from_numpy(x), 20, seed=seed)
        assert all(len(set(truth[assignments == cluster])) <= 1 for cluster in range(20))
        np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    again = kmeans(torch.from_numpy(x), 20, seed=2, block=7)
    np.testing.assert_array_equal(again[0], assignments)
    with pytest.raises(ConfigError, match="expected 1 to 200"):
        kmeans(torch.from_numpy(x), 201)


def test_no_cluster_stays_empty_while_rows_differ():
    x = torch.cat([torch.eye(4)[:1].repeat(50, 1), torch.eye(4)])
    assert len(set(kmeans(x, 4, seed=0)[0].tolist())) == 4


@pytest.mark.parametrize("nearest", [0, 2])
def test_partners_come_from_the_own_or_the_nearest_clusters(nearest):
    manifest = Manifest([str(i) for i in range(40)], [1] * 40, [1] * 40)
    positives = ClusterPositives(manifest, nearest=nearest, seed=3)
    assert [positives.partner(0, i) for i in range(40)] == list(range(40))  # before there are clusters
    clusters = np.arange(40) % 8
    angles = np.arange(8) * np.pi / 8
    positives.update(clusters, np.stack([np.cos(angles), np.sin(angles)], 1))
    for index in range(40):
        drawn = {positives.partner(epoch, index) for epoch in range(300)}
        own = clusters[index]
        if nearest == 0:
            allowed = {own}
        else:
            allowed = {0: {1, 2}, 7: {6, 5}}.get(own, {own - 1, own + 1})
        assert {clusters[partner] for partner in drawn} == allowed and index not in drawn
    other = ClusterPositives(manifest, nearest=nearest, seed=3)
    other.load_state_dict(positives.state_dict())
    assert [other.partner(5, i) for i in range(40)] == [positives.partner(5, i) for i in range(40)]
    with pytest.raises(ConfigError, match="expected 40"):
        positives.update([0, 1], np.eye(2))


@pytest.mark.parametrize("workers", [0, 2])
def test_new_clusters_are_used_from_the_next_batch_on_and_survive_a_restart(corpus, workers):
    def begin():
        return Loader(small(corpus, positives=ClusterPositives(corpus)), BatchSampler(len(corpus), 4), workers=workers)

    loader = begin()
    first = [next(loader) for _ in range(2)]
    assert all(torch.equal(batch.partners, batch.indices) for batch in first)
    loader.dataset.positives.update(corpus.labels, np.eye(len(corpus.speakers)))
    loader.restart()
    state = loader.state_dict()
    rest = [next(loader) for _ in range(4)]
    loader.close()
    assert (rest[0].epoch, rest[0].batch) == (0, 2)
    labels = torch.from_numpy(corpus.labels)
    for batch in rest:
        alone = labels[batch.indices] == corpus.speakers.index("id00009")
        assert torch.equal(labels[batch.partners], labels[batch.indices])
        assert torch.equal(batch.partners != batch.indices, ~alone)
    again = begin()
    again.load_state_dict(state)
    assert all(torch.equal(next(again).partners, batch.partners) for batch in rest)
    again.close()


def test_sessions_are_folders(tmp_path):
    manifest = Manifest(["a/1", "a/2", "b/1"], [1] * 3, [1] * 3, root=str(Path("/data")))
    assert sessions(manifest).tolist() == [0, 0, 1]
