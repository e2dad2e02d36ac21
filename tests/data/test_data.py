"""Data: items depend on seed, epoch and utterance alone; order and position survive processes, workers and restarts."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from s3prl_speaker_upstreams.data import loader as loader_module
from s3prl_speaker_upstreams.data import utterances
from s3prl_speaker_upstreams.data.augment import AugmentConfig, Augmenter
from s3prl_speaker_upstreams.data.cached import CachedFeatureDataset
from s3prl_speaker_upstreams.data.datasets import LabelledCropDataset, MultiCropDataset
from s3prl_speaker_upstreams.data.keyed import random_for
from s3prl_speaker_upstreams.data.loader import Loader, measure_loader
from s3prl_speaker_upstreams.data.manifest import Manifest, build_manifest
from s3prl_speaker_upstreams.data.sampler import BalancedBatchSampler, BatchSampler
from s3prl_speaker_upstreams.data.utterances import DataError
from s3prl_speaker_upstreams.errors import ConfigError

RATE = 16000


def write(path: Path, wav: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav, rate, subtype=subtype)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Manifest:
    """12 utterances of 3 speakers, noise of 1.2 to 3.4 s."""
    root = tmp_path_factory.mktemp("corpus")
    for number in range(12):
        wav = np.random.default_rng(number).normal(0, 0.1, int((1.2 + 0.2 * number) * RATE))
        write(root / f"s{number % 3}" / f"{number:02}.flac", wav)
    return build_manifest(root, cache=False, progress=False)


def small(manifest: Manifest, **options) -> MultiCropDataset:
    return MultiCropDataset(manifest, **{"global_seconds": 0.5, "local_seconds": 0.25, "n_local": 3, **options})


def bytes_of(batches) -> list[bytes]:
    return [b"".join(crop.numpy().tobytes() for crop in batch.global_crops + batch.local_crops) for batch in batches]


def take(loader: Loader, count: int) -> list:
    return list(itertools.islice(loader, count))


# ------------------------------------------------------------------------------------------------ items
def test_crops_are_pieces_of_the_utterance(tmp_path):
    ramp = np.arange(40000) / 40000
    write(tmp_path / "ramp.wav", ramp, subtype="FLOAT")
    dataset = small(build_manifest(tmp_path, cache=False, progress=False))
    starts = set()
    for epoch in range(20):
        item = dataset[(epoch, 0)]
        assert item.global_crops.shape == (2, 8000) and item.local_crops.shape == (3, 4000)
        for crop in [*item.global_crops, *item.local_crops]:
            assert crop.dtype == np.float32
            first = round(float(crop[0]) * 40000)
            np.testing.assert_allclose(crop, ramp[first : first + len(crop)], atol=1e-6)
            starts.add(first)
    assert len(starts) > 90 and min(starts) < 3000 and max(starts) > 31000


def test_short_utterance_goes_round(tmp_path):
    wav = np.random.default_rng(0).normal(0, 0.1, 5000).astype(np.float32)
    write(tmp_path / "a.wav", wav, subtype="FLOAT")
    dataset = small(build_manifest(tmp_path, min_seconds=0.1, cache=False, progress=False))
    for crop in [*dataset[(0, 0)].global_crops, *dataset[(1, 0)].global_crops]:
        first = int(np.argmin(np.abs(wav - crop[0])))
        np.testing.assert_array_equal(crop, np.take(wav, np.arange(first, first + 8000) % 5000))


def test_only_the_needed_piece_of_a_long_file_is_read(tmp_path, monkeypatch):
    write(tmp_path / "long.wav", np.random.default_rng(0).normal(0, 0.1, 120 * RATE))
    read = []
    original = utterances.read_audio
    monkeypatch.setattr(utterances, "read_audio", lambda *a, **k: (read.append(a), original(*a, **k))[1])
    dataset = small(build_manifest(tmp_path, cache=False, progress=False))
    for epoch in range(5):
        dataset[(epoch, 0)]
        assert sum(samples for _, _, samples in read) < 12 * RATE
        read.clear()


def test_item_depends_on_seed_epoch_and_utterance_only(corpus):
    augment = Augmenter(AugmentConfig(equaliser_p=0.5, gain_p=0.5))
    one, other = small(corpus, augment=augment, seed=3), small(corpus, augment=augment, seed=3)
    for index in reversed(range(12)):
        other[(1, index)]
    for index in (0, 5):
        np.testing.assert_array_equal(one[(2, index)].global_crops, other[(2, index)].global_crops)
        assert not np.array_equal(one[(2, index)].global_crops, one[(3, index)].global_crops)
        assert not np.array_equal(one[(2, index)].global_crops, small(corpus, seed=4)[(2, index)].global_crops)
    # The same utterance of a larger corpus, and with fewer local crops, gives the same global crops.
    part = small(corpus.subset([5, 0]), augment=augment, seed=3, n_local=1)
    np.testing.assert_array_equal(part[(2, 0)].global_crops, one[(2, 5)].global_crops)


def test_crops_of_one_utterance_are_augmented_independently(tmp_path):
    write(tmp_path / "a.wav", np.full(4000, 0.25))
    augment = Augmenter(AugmentConfig(gain_p=1.0))
    manifest = build_manifest(tmp_path, min_seconds=0.1, cache=False, progress=False)
    dataset = MultiCropDataset(manifest, global_seconds=0.25, local_seconds=0.25, augment=augment)
    item = dataset[(0, 0)]
    assert len({float(crop[0]) for crop in [*item.global_crops, *item.local_crops]}) == 6


@pytest.mark.parametrize("cache_mb", [0.2, 100])
def test_cache_changes_no_number(corpus, cache_mb):
    bare, cached = small(corpus), small(corpus, cache_mb=cache_mb)
    assert 0 < cached.source.kept <= 12
    for _ in range(2):
        for index in range(12):
            np.testing.assert_array_equal(bare[(0, index)].local_crops, cached[(0, index)].local_crops)
    assert len(cached.source.decoded) == cached.source.kept


@pytest.mark.parametrize(("rate", "cache_mb"), [(8000, 0), (8000, 10), (44100, 0)])
def test_other_rates_are_resampled(tmp_path, rate, cache_mb):
    time = np.arange(4 * rate) / rate
    write(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 1000 * time), rate)
    manifest = build_manifest(tmp_path, cache=False, progress=False)
    for epoch in range(4):
        for crop in small(manifest, cache_mb=cache_mb)[(epoch, 0)].global_crops:
            spectrum = np.abs(np.fft.rfft(crop * np.hanning(8000)))
            assert spectrum.argmax() == 500  # 1000 Hz in bins of 2 Hz
            assert np.sqrt((crop[:400] ** 2).mean()) == pytest.approx(0.5 / np.sqrt(2), rel=0.02)  # no soft edge


def test_speeds_are_new_speakers(tmp_path):
    time = np.arange(5 * RATE) / RATE
    for speaker, hertz in (("ann", 600.0), ("bob", 1000.0)):
        write(tmp_path / speaker / "1.wav", 0.5 * np.sin(2 * np.pi * hertz * time))
    manifest = build_manifest(tmp_path, cache=False, progress=False)
    dataset = LabelledCropDataset(manifest, seconds=1.0, speeds=(1.0, 0.9, 1.1))
    assert dataset.n_classes == 6
    seen = {}
    for epoch in range(30):
        for index in range(2):
            item = dataset[(epoch, index)]
            assert item.wav.shape == (RATE,)
            seen.setdefault(item.label, set()).add(int(np.abs(np.fft.rfft(item.wav * np.hanning(RATE))).argmax()))
    # class = speaker + speed number * 2
    assert seen == {0: {600}, 1: {1000}, 2: {540}, 3: {900}, 4: {660}, 5: {1100}}


def test_all_crops_of_an_utterance_have_one_speed(tmp_path):
    time = np.arange(5 * RATE) / RATE
    write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 1000.0 * time))
    manifest = build_manifest(tmp_path, cache=False, progress=False)
    dataset = small(manifest, speeds=(1.0, 0.9, 1.1), local_seconds=0.5)
    seen = set()
    for epoch in range(12):
        item = dataset[(epoch, 0)]
        peaks = {2 * int(np.abs(np.fft.rfft(c * np.hanning(8000))).argmax())
                 for c in [*item.global_crops, *item.local_crops]}  # fmt: skip
        assert len(peaks) == 1
        seen |= peaks
    assert seen == {1000, 900, 1100}
    np.testing.assert_array_equal(
        small(manifest)[(0, 0)].global_crops, small(manifest, speeds=(1.0,))[(0, 0)].global_crops
    )


@pytest.mark.parametrize(("rate", "cache_mb"), [(16000, 0), (8000, 0), (8000, 5)])
def test_crops_come_from_the_speech_where_silence_is_trimmed(tmp_path, rate, cache_mb):
    hush, speech = np.full(2 * rate, 1e-4), 0.3 * np.random.default_rng(0).choice([-1, 1], 2 * rate)
    write(tmp_path / "a.wav", np.concatenate([hush, speech, hush]), rate)
    manifest = build_manifest(tmp_path, cache=False, progress=False)
    trimmed = small(manifest, trim_db=35.0, cache_mb=cache_mb)
    assert trimmed.source.length(0) == pytest.approx(2.2 * 16000, abs=800)
    quiet, whole = 0, small(manifest, silence_db=-100)
    for epoch in range(30):
        for crop in trimmed[(epoch, 0)].global_crops:
            assert (np.abs(crop) > 0.1).mean() > 0.45  # but for the margins, and zero crossings
        quiet += sum((np.abs(crop) > 0.1).mean() < 0.1 for crop in whole[(epoch, 0)].global_crops)
    assert quiet > 10


def test_labelled_needs_speakers(corpus):
    unlabelled = Manifest(["a"], [RATE], [RATE])
    with pytest.raises(ConfigError, match="1 of 1 utterances without a speaker"):
        LabelledCropDataset(unlabelled)
    with pytest.raises(ConfigError, match="first is 1"):
        LabelledCropDataset(corpus, speeds=(0.9, 1.0))


# ------------------------------------------------------------------------------------------------ faults
@pytest.fixture
def damaged(tmp_path) -> Manifest:
    for number in range(5):
        write(tmp_path / f"{number}.wav", np.random.default_rng(number).normal(0, 0.1, 20000))
    write(tmp_path / "3.wav", np.zeros(20000))
    manifest = build_manifest(tmp_path, cache=False, progress=False)
    (tmp_path / "0.wav").unlink()
    content = (tmp_path / "1.wav").read_bytes()
    (tmp_path / "1.wav").write_bytes(content[:3000])
    return manifest


def test_bad_utterances_are_replaced_by_the_next_and_counted_once(damaged, caplog):
    dataset = small(damaged)
    assert [dataset[(0, index)].index for index in range(5)] == [2, 2, 2, 4, 4]
    assert [fault.kind for fault in dataset[(0, 0)].faults] == ["unreadable", "damaged"]
    crops = [dataset[(0, index)].global_crops for index in (0, 0, 1, 2)]
    np.testing.assert_array_equal(crops[0], crops[1])
    # The stand-in gives other crops than for itself: equal rows in a batch would be nearest neighbours at distance 0.
    assert not np.array_equal(crops[0], crops[2]) and not np.array_equal(crops[0], crops[3])
    for workers in (0, 2):
        caplog.clear()
        loader = Loader(dataset, BatchSampler(5, 5), workers=workers)
        batches = take(loader, 3)
        assert loader.faults == {"unreadable": 1, "damaged": 1, "silent": 1}
        assert caplog.text.count("replaced") == 3
        assert sorted(batches[0].indices.tolist()) == [2, 2, 2, 4, 4]
        assert all(name in ("2.wav", "4.wav") for name in batches[0].ids)
        loader.close()


def test_a_disk_that_is_gone_is_fatal(damaged):
    for item in damaged:
        Path(item.path).unlink(missing_ok=True)
    with pytest.raises(DataError, match="5 utterances in a row.*is the disk there"):
        small(damaged)[(0, 0)]


def test_values_that_are_not_finite(tmp_path):
    bad = np.random.default_rng(0).normal(0, 0.1, 20000).astype(np.float32)
    bad[::50] = np.nan
    write(tmp_path / "a.wav", bad, subtype="FLOAT")
    write(tmp_path / "b.wav", np.random.default_rng(0).normal(0, 0.1, 20000))
    item = small(build_manifest(tmp_path, cache=False, progress=False))[(0, 0)]
    assert item.index == 1 and item.faults[0].kind == "damaged" and "finite" in item.faults[0].why


# ------------------------------------------------------------------------------------------------ order
def test_every_utterance_once_an_epoch_in_another_order():
    sampler = BatchSampler(13, 4, seed=1)
    assert sampler.batches_per_epoch == 3
    epochs = [[key[1] for b in range(3) for key in sampler.batch(epoch, b)] for epoch in range(4)]
    assert all(len(set(epoch)) == 12 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != [key[1] for b in range(3) for key in BatchSampler(13, 4, seed=2).batch(0, b)]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("n", [13, 3])
def test_slices_of_processes_make_the_batch_of_one(n, world_size):
    one = BatchSampler(n, 8, seed=5)
    many = [BatchSampler(n, 8, seed=5, rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch, batch in itertools.product(range(3), range(one.batches_per_epoch)):
        assert one.batch(epoch, batch) == sum((sampler.batch(epoch, batch) for sampler in many), [])


def test_fewer_utterances_than_a_batch_come_several_times_with_other_crops(corpus):
    sampler = BatchSampler(2, 5)
    keys = sampler.batch(0, 0)
    assert len(set(keys)) == 5 and {key[1] for key in keys} == {0, 1} and sampler.batches_per_epoch == 1
    crops = [small(corpus)[key].global_crops.tobytes() for key in keys]
    assert len(set(crops)) == 5


def test_sampler_refuses_what_cannot_be():
    with pytest.raises(ConfigError, match="not divisible by 2"):
        BatchSampler(10, 5, world_size=2)
    with pytest.raises(ConfigError, match="rank 2"):
        BatchSampler(10, 4, rank=2, world_size=2)


def test_speakers_come_equally_often_in_balanced_batches():
    labels = np.array([0] * 20 + [1] * 6 + [2] * 4)
    sampler = BalancedBatchSampler(labels, 6, seed=2)
    assert sampler.batches_per_epoch == 5
    for epoch in range(3):
        keys = [key for b in range(5) for key in sampler.batch(epoch, b)]
        assert np.bincount(labels[[key[1] for key in keys]]).tolist() == [10, 10, 10]
        assert len(set(keys)) == 30  # an utterance that comes again gives other crops
        for b in range(5):
            assert np.bincount(labels[[key[1] for key in sampler.batch(epoch, b)]]).tolist() == [2, 2, 2]
    assert {key[1] for epoch in range(20) for b in range(5) for key in sampler.batch(epoch, b)} == set(range(30))
    many = [BalancedBatchSampler(labels, 6, seed=2, rank=rank, world_size=2) for rank in (0, 1)]
    assert sampler.batch(4, 1) == many[0].batch(4, 1) + many[1].batch(4, 1)
    with pytest.raises(ConfigError, match="1 of 2 utterances without a speaker"):
        BalancedBatchSampler(np.array([0, -1]), 2)


# ------------------------------------------------------------------------------------------------ loader
def test_workers_change_nothing_and_batches_of_processes_join(corpus):
    dataset = small(corpus, augment=Augmenter(AugmentConfig(equaliser_p=0.5)), cache_mb=0.3)
    alone = take(Loader(dataset, BatchSampler(12, 4)), 7)
    assert [(batch.epoch, batch.batch) for batch in alone] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    loader = Loader(dataset, BatchSampler(12, 4), workers=2)
    assert bytes_of(take(loader, 7)) == bytes_of(alone)
    loader.close()
    halves = [take(Loader(dataset, BatchSampler(12, 4, rank=rank, world_size=2)), 7) for rank in (0, 1)]
    for whole, first, second in zip(alone, *halves, strict=True):
        for crop, a, b in zip(whole.global_crops, first.global_crops, second.global_crops, strict=True):
            assert torch.equal(crop, torch.cat([a, b]))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_goes_on_with_the_next_batch(corpus, workers):
    dataset = small(corpus)
    whole = bytes_of(take(Loader(dataset, BatchSampler(12, 4)), 9))
    for stop in (1, 3, 5):
        loader = Loader(dataset, BatchSampler(12, 4), workers=workers)
        begun = bytes_of(take(loader, stop))
        state = loader.state_dict()
        loader.close()
        again = Loader(dataset, BatchSampler(12, 4), workers=workers)
        again.load_state_dict(state)
        assert begun + bytes_of(take(again, 9 - stop)) == whole
        again.close()


def test_position_of_something_else_is_refused(corpus):
    state = Loader(small(corpus), BatchSampler(12, 4)).state_dict()
    for loader in (
        Loader(small(corpus), BatchSampler(12, 6)),
        Loader(small(corpus), BatchSampler(12, 4, seed=1)),
        Loader(small(corpus, seed=1), BatchSampler(12, 4)),
        Loader(small(corpus.subset(range(11))), BatchSampler(11, 4)),
    ):
        with pytest.raises(ConfigError, match="the saved run had"):
            loader.load_state_dict(state)
    other_ranks = Loader(small(corpus), BatchSampler(12, 4, rank=1, world_size=2), workers=0)
    other_ranks.load_state_dict({**state, "epoch": 1, "batch": 2})
    assert (next(other_ranks).epoch, other_ranks.epoch) == (1, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_state_of_torch_is_untouched(corpus, workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loader = Loader(small(corpus), BatchSampler(12, 4), workers=workers)
    take(loader, 4)
    loader.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_labelled_batches(corpus):
    loader = Loader(LabelledCropDataset(corpus, seconds=0.5), BatchSampler(12, 6))
    batch = next(loader)
    assert batch.wavs.shape == (6, 8000) and batch.labels.dtype == torch.int64 and batch.labels.max() < 9
    speakers = torch.tensor([corpus.labels[i] for i in batch.indices])
    assert torch.equal(batch.labels % 3, speakers)


def test_waiting_is_measured(corpus, monkeypatch):
    dataset = small(corpus)
    result = measure_loader(Loader(dataset, BatchSampler(12, 4)), 3, step=0.05)
    assert result["step_seconds"] >= 0.05  # sleep takes at least as long; on a busy machine longer
    total = result["waited_per_batch"] + result["step_seconds"]
    assert result["seconds_per_batch"] == pytest.approx(total, rel=0.2)
    assert result["waiting_fraction"] == pytest.approx(result["waited_per_batch"] / result["seconds_per_batch"])
    slow = type(dataset).__getitem__
    monkeypatch.setattr(
        type(dataset), "__getitem__", lambda self, key: (loader_module.time.sleep(0.03), slow(self, key))[1]
    )
    assert measure_loader(Loader(dataset, BatchSampler(12, 4)), 3, step=0.0)["waited_per_batch"] > 0.12


# ------------------------------------------------------------------------------------------------ cached features
def levels(wavs):
    return [np.log(np.square(w[: len(w) // 160 * 160].reshape(-1, 160, 1) + 1e-6).mean(1)) for w in wavs]


def cached(manifest: Manifest, **options) -> CachedFeatureDataset:
    settings = {"features": levels, "hop": 160, "versions": 3, "global_seconds": 0.5, "local_seconds": 0.25}
    return CachedFeatureDataset(manifest, **{**settings, **options})


def test_cached_features_are_pieces_of_seeded_versions(corpus):
    augment = Augmenter(AugmentConfig(gain_p=1.0))
    dataset, eager = cached(corpus, augment=augment), cached(corpus, augment=augment)
    eager.preload(progress=False)
    for index in reversed(range(12)):
        item = dataset[(4, index)]
        assert item.global_crops.shape == (2, 50, 1) and item.local_crops.shape == (4, 25, 1)
        np.testing.assert_array_equal(item.local_crops, eager[(4, index)].local_crops)
        versions = [dataset.version(index, number).astype(np.float32)[:, 0] for number in range(3)]
        assert not np.array_equal(versions[0], versions[1])
        used = []
        for crop in item.global_crops:
            matches = [
                number
                for number, whole in enumerate(versions)
                if any(np.array_equal(whole[s : s + 50], crop[:, 0]) for s in range(len(whole) - 49))
            ]
            assert len(matches) == 1
            used += matches
        assert len(set(used)) == 2  # not the same version while there are others
    loaders = [Loader(cached(corpus, augment=augment), BatchSampler(12, 4), workers=workers) for workers in (0, 2)]
    assert bytes_of(take(loaders[0], 5)) == bytes_of(take(loaders[1], 5))
    loaders[1].close()


def test_cached_features_say_when_they_do_not_fit(corpus):
    with pytest.raises(ConfigError, match="3 versions.*MB.*MultiCropDataset"):
        cached(corpus, max_mb=0.001)[(0, 0)]
    with pytest.raises(ConfigError, match="expected \\(frames, n_mels\\)"):
        cached(corpus, features=lambda wavs: [wavs[0]])[(0, 0)]


def test_cached_features_replace_bad_utterances(damaged):
    item = cached(damaged)[(0, 0)]
    assert item.index == 2 and [fault.kind for fault in item.faults] == ["unreadable", "damaged"]


def test_random_numbers_are_the_same_everywhere():
    # Written down once: a change would silently break the resumption of runs that are under way.
    assert random_for(0, 1, "id00012/a/1.wav", "crop 0").integers(0, 10**6, 3).tolist() == [313250, 166437, 176358]
    assert random_for(0, 1, "a", "b").integers(10**9) != random_for(0, 1, "a\0b").integers(10**9)


def test_neither_torch_nor_s3prl_is_needed_to_import():
    modules = (
        "data.manifest",
        "data.augment",
        "data.datasets",
        "verification.scoring",
        "verification.evaluate",
        "verification.digits",
    )
    modules += ("verification.plots", "common.audio", "common.config", "common.digests", "common.files")
    names = ", ".join(f"s3prl_speaker_upstreams.{name}" for name in modules)
    heavy = "('torch', 's3prl', 'sklearn', 'matplotlib')"
    code = f"import sys, {names}; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
