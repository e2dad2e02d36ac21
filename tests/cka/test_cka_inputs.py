"""Input that would give a wrong number: damaged and stereo recordings, lists, stores and checkpoints mixed up."""

import argparse
import json
import os

import numpy as np
import pytest
import soundfile
import torch
from cka_toy import Toy

from cka_addon import audio, layer_weights
from cka_addon.errors import AudioError, CheckpointError, ConstantLayer, MergeError, StoreError
from cka_addon.models import Model
from cka_addon.run import compute
from cka_addon.store import FeatureStore
from cka_addon.store_writer import dump, merge_stores

pytestmark = pytest.mark.compat


def noise(seed, seconds=0.5, rate=16000):
    return 0.1 * np.random.default_rng(seed).standard_normal(int(seconds * rate))


@pytest.fixture
def zoo(tmp_path):
    """A folder with every kind of file that is found, skipped or unusable."""
    root = tmp_path / "zoo"
    (root / "spk1").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for i, name in enumerate(("spk1/a.wav", "spk1/b.flac", "../elsewhere/c.wav")):
        soundfile.write(root / name, noise(i), 16000)
    soundfile.write(root / "stereo.wav", np.stack([noise(1), noise(2)], 1), 16000)
    soundfile.write(root / "eight.wav", noise(3, rate=8000), 8000)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "spk1" / "loop").symlink_to(root)
    (root / "._a.wav").write_bytes(b"\0\5\26\7AppleDouble")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "d.wav").write_bytes((root / "spk1/a.wav").read_bytes())
    (root / "notes.txt").write_text("nothing")
    whole = (root / "spk1/a.wav").read_bytes()
    (root / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (root / "empty.wav").write_bytes(b"")
    soundfile.write(root / "slow.wav", noise(4), 1)
    return root


UNUSABLE = {"cut", "empty", "slow"}


def test_found_and_read_as_the_speaker_package_does(zoo):
    """One rule in two copies: what is found, what is unusable, and the samples."""
    theirs = pytest.importorskip("s3prl_speaker_upstreams.common.audio")
    errors = pytest.importorskip("s3prl_speaker_upstreams.errors")
    assert audio.EXTENSIONS == theirs.AUDIO_SUFFIXES
    assert audio.find_audio(zoo) == theirs.find_audio(zoo)
    recordings = {r.id: r for r in audio.find_recordings(zoo)}
    assert set(recordings) == {"spk1/a", "spk1/b", "linked/c", "stereo", "eight"} | UNUSABLE
    for name, recording in recordings.items():
        if name in UNUSABLE:
            assert recording.problem and recording.seconds is None
            with pytest.raises(errors.BadAudio):
                theirs.read_audio(recording.path)
        else:
            assert recording.seconds == pytest.approx(theirs.probe(recording.path).seconds) == pytest.approx(0.5)
            assert np.array_equal(audio.load(recording)[0].numpy(), theirs.read_audio(recording.path)[0])


def test_stereo_is_the_mean_of_its_channels(zoo):
    wav, about = audio.load(next(r for r in audio.find_recordings(zoo) if r.id == "stereo"))
    assert np.abs(wav.numpy() - (noise(1) + noise(2)) / 2).max() < 1e-4 and about["channels"] == 2


def test_unusable_recordings_are_counted_and_named(zoo, tmp_path):
    model = Model(Toy(), "toy")
    with pytest.raises(AudioError, match="3 of 8 recordings cannot be read"):
        compute([model], zoo, progress=False)
    store = FeatureStore(dump([model], zoo, tmp_path / "s", skip_unreadable=True, progress=False))
    assert set(store.skipped) == UNUSABLE and len(store) == 5
    assert "cut off" in store.skipped["cut"] and "1 Hz" in store.skipped["slow"]


def test_a_file_that_ends_early_behind_a_whole_header(tmp_path):
    """FLAC tells its length in the header and does not note the loss: only decoding finds it."""
    soundfile.write(tmp_path / "a.flac", noise(0, 4), 16000)
    data = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(data[: len(data) // 2])
    with pytest.raises(AudioError):
        audio.load(audio.find_recordings(tmp_path)[0])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_in_every_form_and_encoding(tmp_path, encoding):
    for name in ("a b.wav", "c.wav", "é.wav"):
        soundfile.write(tmp_path / name, noise(0), 16000)
    forms = {
        "plain": ("a b.wav\n# comment\nc.wav\né.wav\n", [("a b", None), ("c", None), ("é", None)]),
        "tab": ("x\ta b.wav\ny\tc.wav\n", [("x", None), ("y", None)]),
        "scp": ("x c.wav\ny é.wav\n", [("x", None), ("y", None)]),
        "speakers": ("s1 c.wav\ns1 é.wav\ns2\ta b.wav\n", [("a b", "s2"), ("c", "s1"), ("é", "s1")]),
        "csv": ("ID,duration,wav,spk_id\nx,1.0,c.wav,s1\ny,2.0,é.wav,s1\n", [("x", "s1"), ("y", "s1")]),
        "raw": ('{"key": "x", "wav": "c.wav", "spk": "s1"}\n', [("x", "s1")]),
    }
    for form, (text, want) in forms.items():
        path = tmp_path / f"{form}.txt"
        path.write_text(text, encoding=encoding)
        assert [(r.id, r.speaker) for r in audio.find_recordings(path)] == want, form


def test_lists_that_cannot_be_read(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("a.wav\n说话.wav\n".encode("gbk"))
    with pytest.raises(AudioError, match=r"list.txt:2: got text that is not UTF-8.*iconv -f GBK"):
        audio.find_recordings(path)
    path.write_bytes("a.wav\n".encode("utf-16-le"))
    with pytest.raises(AudioError, match="UTF-16 without its mark"):
        audio.find_recordings(path)
    path.write_text("id,wav\nx,y,z\n")
    with pytest.raises(AudioError, match="list.txt:2: got 3 columns; expected 2"):
        audio.find_recordings(path)


@pytest.fixture
def twins(tmp_path):
    """Two folders with the same names; in the second, "1" is another recording of the same length, "3" is missing."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for i in range(8):
            if (folder, i) != ("two", 3):
                soundfile.write(tmp_path / folder / f"{i}.wav", noise(100 if (folder, i) == ("two", 1) else i), 16000)
    return tmp_path


def test_stores_of_other_recordings_under_the_same_names_are_refused(twins):
    one = dump([Model(Toy(), "a")], twins / "one", twins / "s1", progress=False)
    two = dump([Model(Toy(160), "b")], twins / "two", twins / "s2", progress=False)
    with pytest.raises(StoreError, match=r"1 of 7 utterances are different recordings.*first '1': other samples"):
        compute(stores=[one, two], progress=False)
    soundfile.write(twins / "two" / "1.wav", noise(1), 16000)
    said = []
    good = dump([Model(Toy(160), "b")], twins / "two", twins / "s3", progress=False)
    result = compute(stores=[one, good], mode="full", progress=False, announce=said.append)
    assert "7 of 8 utterances are in every store (8 in" in said[0]
    assert result.details["left_out"] == {"3": "not in every store"}


def test_stores_without_digests_are_told_apart_by_length(twins, monkeypatch):
    real = audio.load

    def old(recording):
        wav, about = real(recording)
        return wav, {k: v for k, v in about.items() if k != "samples_sha256"}

    with monkeypatch.context() as patch:
        patch.setattr(audio, "load", old)
        before = dump([Model(Toy(), "a")], twins / "one", twins / "s1", progress=False)
    soundfile.write(twins / "two" / "1.wav", noise(1), 16000)
    now = dump([Model(Toy(160), "b")], twins / "two", twins / "s2", progress=False)
    assert compute(stores=[before, now], mode="full", progress=False).values[0, 3] == pytest.approx(1, abs=1e-6)
    soundfile.write(twins / "two" / "2.wav", noise(2, 0.6), 16000)
    longer = dump([Model(Toy(160), "b")], twins / "two", twins / "s3", progress=False)
    with pytest.raises(StoreError, match="first '2': 0.500 s and 0.600 s long"):
        compute(stores=[before, longer], progress=False)


def test_a_store_is_not_resumed_or_joined_with_other_recordings(twins):
    soundfile.write(twins / "two" / "3.wav", noise(3), 16000)
    for i in range(8):
        soundfile.write(twins / "two" / f"{i}.wav", noise(i, 0.7), 16000)
    model = Model(Toy(), "toy")
    dump([model], twins / "one", twins / "s", shard="1/2", progress=False)
    with pytest.raises(StoreError, match="holds '0' of 0.500 s"):
        dump([model], twins / "two", twins / "s", shard="1/2", progress=False)
    (twins / "two" / "7.wav").rename(twins / "two" / "x.wav")
    other = dump([model], twins / "two", twins / "t", shard="2/2", progress=False)
    with pytest.raises(MergeError, match="ids_sha256"):
        merge_stores([twins / "s", other], twins / "joined")


class Normalised(Toy):
    """Layer 0 has mean 0 in every recording, as s3prl's fbank with cmvn has."""

    def forward(self, wavs):
        out = super().forward(wavs)
        first = out["hidden_states"][0]
        out["hidden_states"][0] = (first - first.mean(1, keepdim=True)) / first.std(1, keepdim=True)
        return out


@pytest.mark.parametrize("how", ["live", "frames", "float16", "means"])
def test_means_of_a_mean_normalised_layer_are_not_compared(wavs, tmp_path, how):
    """What is left of such means is rounding noise: three draws of it gave a CKA of 0.14, -0.20 and 0.56."""
    models = [Model(Normalised(), "fbank")]
    kwargs = {"examples": "means", "mode": "full", "progress": False}
    with pytest.raises(ConstantLayer, match="layer fbank/layer_0 has no utterance means.*rounding noise.*layers="):
        if how == "live":
            compute(models, wavs, **kwargs)
        else:
            options = {"keep": "means"} if how == "means" else {"dtype": "float16" if how == "float16" else "float32"}
            compute(stores=dump(models, wavs, tmp_path / "s", progress=False, **options), **kwargs)
    rest = compute([Model(Normalised(), "fbank", layers=[1, 2])], wavs, **kwargs)
    assert 0 < rest.values[0, 1] < 1


def run(path, weights, **args):
    values = {"upstream": "toy", "upstream_ckpt": None, "downstream": "ctc", "downstream_variant": None, **args}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"Featurizer": {"weights": torch.tensor(weights)}, "Args": argparse.Namespace(**values)}, path)
    return path


def test_layer_weights_are_corrected_with_their_own_model_only(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"weights")
    (tmp_path / "copy.pt").write_bytes(b"weights")
    (tmp_path / "b.pt").write_bytes(b"others")

    def weights(**args):
        return layer_weights.read_layer_weights(run(tmp_path / "states-1.ckpt", [0.0, 0.0], **args))

    def how(upstream="toy", ckpt=None):
        about = {"upstream": upstream, "ckpt": str(ckpt) if ckpt else None, "ckpt_sha256": None}
        return about | ({"ckpt_sha256": layer_weights.provenance.file_sha256(ckpt)} if ckpt else {})

    def correct(item, about, **kwargs):
        return layer_weights.correct(item, ["x", "y"], np.array([1.0, 3.0]), about, **kwargs).corrected.tolist()

    assert correct(weights(), how()) == [0.25, 0.75]
    with_file = {"upstream_ckpt": str(tmp_path / "a.pt")}
    assert correct(weights(**with_file), how(ckpt=tmp_path / "copy.pt")) == [0.25, 0.75]
    for item, about, message in (
        (weights(), how("other"), "trained on upstream toy, the norms are of other"),
        (weights(**with_file), how(ckpt=tmp_path / "b.pt"), "of another file"),
        (weights(**with_file), how(), "ckpt=None"),
        (weights(upstream_ckpt="/gone/a.pt"), how(ckpt=tmp_path / "a.pt"), "not here to compare"),
    ):
        with pytest.raises(CheckpointError, match=message):
            correct(item, about)
        assert correct(item, about, other_model=True) == [0.25, 0.75]


def test_norms_know_their_model(wavs):
    _, _, how = layer_weights.measure_norms("x=py:cka_toy:build hop=320", wavs, limit=2, progress=False)
    assert how["upstream"] == "cka_toy:build" and how["weights_sha256"]


def test_the_recipes_own_folder_gives_the_chosen_checkpoint(tmp_path):
    task = tmp_path / "exp" / "toy" / "SID"
    for lr, value in (("lr1e-03", 0.0), ("lr1e-02", 2.0)):
        run(task / lr / "dev-best.ckpt", [value, 0.0])
    with pytest.raises(CheckpointError, match="no choice.json.*choose stage"):
        layer_weights.read_many([task])
    (task / "choice.json").write_text(json.dumps({"checkpoints": {"": str(task / "lr1e-02" / "dev-best.ckpt")}}))
    assert layer_weights.read_many([f"SID={task}"])[0].weights[0] > 0.8
    moved = tmp_path / "elsewhere" / "toy" / "SID"
    moved.parent.mkdir(parents=True)
    os.rename(task, moved)
    assert layer_weights.read_many([moved])[0].details["checkpoint"] == str(moved / "lr1e-02" / "dev-best.ckpt")
    (moved / "choice.json").write_text('{"layer": 3}')
    with pytest.raises(CheckpointError, match="no layer weights"):
        layer_weights.read_many([moved])
