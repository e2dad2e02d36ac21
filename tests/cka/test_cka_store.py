"""The feature store: what is in it, and that it is whole or says so."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from cka_toy import Toy

from cka_addon import audio, store_writer
from cka_addon.errors import AudioError, MergeError, NonFinite, SpecError, StoreError
from cka_addon.models import Model, load_model, parse_spec
from cka_addon.options import DumpOptions
from cka_addon.store import FeatureStore
from cka_addon.store_writer import dump

pytestmark = pytest.mark.compat


def toy(name="toy", **kwargs):
    return Model(Toy(), name, **kwargs)


def contents(path):
    return {u.id: [x for m in u.layers for x in m] for u in FeatureStore(path)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, y) for k in a for x, y in zip(a[k], b[k], strict=True))


def test_model_measures_its_clock_and_names_its_layers():
    model = toy(keys=("hidden_states", "embedding"))
    assert model.info.clock.shift == 0.02 and model.info.clock.first_center == pytest.approx(0.0125)
    assert model.info.layers == ("layer_0", "layer_1", "layer_2", "embedding") and model.info.dims == (12, 9, 15, 15)
    assert toy(layers="0,-1").info.layers == ("layer_0", "layer_2")
    centred = Model(lambda w: {"hidden_states": [torch.ones(1, len(w[0]) // 160 + 1, 3)]}, "c")
    assert (centred.info.clock.shift, centred.info.clock.first_center) == (0.01, 0.0)
    with pytest.raises(SpecError, match="got layer '7'; expected 0 to 2"):
        toy(layers="7")


def test_specifications():
    spec = parse_spec("fast=py:cka_toy:build hop=160 layers=1")
    model = load_model(spec)
    assert model.info.clock.shift == 0.01 and model.info.layers == ("layer_1",)
    assert model.info.provenance["weights_sha256"] and model.info.provenance["source_sha256"]
    for bad, message in {
        "x=tf:y": "kind 'tf'",
        "": "empty",
        "py:nothing:x": "cannot be imported",
        "a b": "option=value",
    }.items():
        with pytest.raises(SpecError, match=message):
            load_model(bad)


def test_store_holds_what_the_model_gave(wavs, tmp_path):
    model = toy()
    path = dump([model], wavs, tmp_path / "s", progress=False)
    s = FeatureStore(path)
    assert len(s) == 24 and s.complete and not s.skipped
    for recording in audio.find_recordings(wavs)[:5]:
        want = model(audio.load(recording)[0])
        got = s.read(recording.id).layers[0]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    info = s.info()
    assert info["resampled"] == 1 and s.entries["utt03"]["sample_rate"] == 8000 and s.entries["utt03"]["channels"] == 2
    assert info["models"][0]["weights_sha256"] == model.info.provenance["weights_sha256"]
    assert info["provenance"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert s.verify(progress=False) == []


def test_size_is_told_before_writing(wavs, tmp_path):
    said = []
    path = dump([toy()], wavs, tmp_path / "s", progress=False, announce=said.append, dtype="float16")
    estimate = store_writer.estimate([toy().info], audio.find_recordings(wavs), DumpOptions(dtype="float16"))
    real = FeatureStore(path).info()["bytes"]
    assert "24 utterances" in said[0] and abs(estimate.bytes - real) < 0.3 * real


def test_keep_sampled_and_means(wavs, tmp_path):
    full = contents(dump([toy()], wavs, tmp_path / "f", progress=False))
    sampled = FeatureStore(dump([toy()], wavs, tmp_path / "r", keep="sampled", frames=7, seed=3, progress=False))
    again = dump([toy()], wavs, tmp_path / "r2", keep="sampled", frames=7, seed=3, progress=False)
    other = dump([toy()], wavs, tmp_path / "r3", keep="sampled", frames=7, seed=4, progress=False)
    assert same(contents(sampled.path), contents(again)) and not same(contents(sampled.path), contents(other))
    for u in sampled:
        rows = torch.tensor(np.round((u.instants[0] - 0.0125) / 0.02).astype(int))
        assert len(rows) == 7 and torch.equal(u.layers[0][0], full[u.id][0][rows])
    means = contents(dump([toy()], wavs, tmp_path / "m", keep="means", progress=False))
    assert all(torch.allclose(means[k][1][0], full[k][1].mean(0), atol=1e-6) for k in full)


def test_resumed_is_uninterrupted(wavs, tmp_path, monkeypatch):
    whole = contents(dump([toy()], wavs, tmp_path / "whole", progress=False))
    model, seen = toy(), []
    real = Model.__call__

    def stop(self, wav, utterance=""):
        if len(seen) == 10:
            raise KeyboardInterrupt
        seen.append(utterance)
        return real(self, wav, utterance)

    monkeypatch.setattr(store_writer, "load_models", lambda specs, device: list(specs))
    monkeypatch.setattr(Model, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        dump([model], wavs, tmp_path / "s", progress=False)
    with pytest.raises(StoreError, match="not complete"):
        FeatureStore(tmp_path / "s")
    assert len(FeatureStore(tmp_path / "s", allow_incomplete=True)) == 10
    monkeypatch.setattr(Model, "__call__", real)
    dump([model], wavs, tmp_path / "s", progress=False)
    assert same(contents(tmp_path / "s"), whole)


def test_killed_writer_leaves_no_complete_store(wavs, tmp_path):
    """SIGKILL in the middle of real work; then the same command again."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[3])\n"
        "from cka_toy import Toy\nfrom cka_addon.models import Model\nfrom cka_addon import store_writer as store\n"
        "class Slow(Toy):\n"
        "    def forward(self, wavs):\n        time.sleep(0.1)\n        return super().forward(wavs)\n"
        "store.dump([Model(Slow(), 'toy')], sys.argv[1], sys.argv[2], progress=False, shard_mib=0)\n"
    )
    out = tmp_path / "s"
    process = subprocess.Popen([sys.executable, "-c", code, str(wavs), str(out), str(Path(__file__).parent)])
    deadline = time.time() + 60
    while len(list(out.glob("data/*.safetensors"))) < 3 and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (out / "data" / ".part-001-of-001-00099.123.tmp.safetensors").write_bytes(b"half a shard")
    with pytest.raises(StoreError, match="not complete"):
        FeatureStore(out)
    assert 3 <= len(FeatureStore(out, allow_incomplete=True)) < 24
    dump([toy()], wavs, out, progress=False)
    assert same(contents(out), contents(dump([toy()], wavs, tmp_path / "whole", progress=False)))
    assert FeatureStore(out).verify(progress=False) == [] and not list(out.glob("data/.*"))


def test_parts_in_one_folder_and_merged_from_several(wavs, tmp_path):
    whole = contents(dump([toy()], wavs, tmp_path / "whole", progress=False))
    for i in (1, 3, 2):
        dump([toy()], wavs, tmp_path / "one", shard=f"{i}/3", progress=False)
        dump([toy()], wavs, tmp_path / f"p{i}", shard=f"{i}/3", progress=False)
        assert (tmp_path / "one" / "complete.json").exists() == (i == 2)
    assert same(contents(tmp_path / "one"), whole)
    parts = [tmp_path / f"p{i}" for i in (1, 2, 3)]
    assert same(contents(store_writer.merge_stores(parts, tmp_path / "joined")), whole)
    with pytest.raises(MergeError, match="1 of 3 parts are missing"):
        store_writer.merge_stores(parts[:2], tmp_path / "x")
    with pytest.raises(MergeError, match="expected it once"):
        store_writer.merge_stores([parts[0], *parts], tmp_path / "y")
    other = dump([Model(Toy(160), "toy")], wavs, tmp_path / "other", shard="3/3", progress=False)
    with pytest.raises(MergeError, match="other models or layers"):
        store_writer.merge_stores([*parts[:2], other], tmp_path / "z")


def test_unreadable_recordings(tmp_path):
    folder = tmp_path / "w"
    folder.mkdir()
    for i in range(8):
        soundfile.write(folder / f"{i}.wav", np.random.default_rng(i).standard_normal(8000) * 0.1, 16000)
    (folder / "bad.wav").write_bytes(b"this is no wave file")
    with pytest.raises(AudioError, match="1 of 9 recordings cannot be read.*bad.wav.*--skip-unreadable"):
        dump([toy()], folder, tmp_path / "s", progress=False)
    assert not (tmp_path / "s" / "data").exists()  # told before any work is done
    s = FeatureStore(dump([toy()], folder, tmp_path / "s", progress=False, skip_unreadable=True))
    assert len(s) == 8 and list(s.skipped) == ["bad"] and s.verify(progress=False) == []


def test_a_failure_on_the_way_is_counted_and_not_fatal(tmp_path, wavs):
    class Picky(Toy):
        def forward(self, wavs):
            out = super().forward(wavs)
            if len(wavs[0]) == 6400:  # utt00, 07, 14, 21: 0.4 s
                out["hidden_states"][1][0, 0, 0] = float("nan")
            return out

    with pytest.raises(StoreError, match="4 recordings failed.*layer toy/layer_1 in utterance 'utt00'"):
        dump([Model(Picky(), "toy")], wavs, tmp_path / "s", progress=False)
    assert len(FeatureStore(tmp_path / "s", allow_incomplete=True)) == 20
    s = FeatureStore(dump([Model(Picky(), "toy")], wavs, tmp_path / "s", progress=False, skip_unreadable=True))
    assert len(s) == 20 and len(s.skipped) == 4


def test_float16_overflow_is_refused(wavs, tmp_path):
    class Loud(Toy):
        def forward(self, wavs):
            return {"hidden_states": [h * 1e7 for h in super().forward(wavs)["hidden_states"]]}

    with pytest.raises(StoreError, match="do not fit float16; dump with --dtype float32"):
        dump([Model(Loud(), "loud")], wavs, tmp_path / "s", dtype="float16", progress=False)
    assert issubclass(NonFinite, ValueError)


def test_resuming_with_other_options_or_weights_is_refused(wavs, tmp_path):
    dump([toy()], wavs, tmp_path / "s", progress=False)
    with pytest.raises(StoreError, match="begun with options"):
        dump([toy()], wavs, tmp_path / "s", progress=False, dtype="float16")
    changed = Toy()
    with torch.no_grad():
        changed.projections[0][0, 0] += 1
    with pytest.raises(StoreError, match="other weights"):
        dump([Model(changed, "toy")], wavs, tmp_path / "s", progress=False)


def test_verify_finds_a_flipped_byte(wavs, tmp_path):
    path = dump([toy()], wavs, tmp_path / "s", progress=False)
    file = next((path / "data").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert "SHA-256" in FeatureStore(path).verify(progress=False)[0]


def test_lists_of_recordings(wavs, tmp_path):
    (tmp_path / "list.txt").write_text(f"# a comment\nfirst\t{wavs}/utt01.wav\n{wavs}/utt02.wav\n")
    assert [r.id for r in audio.find_recordings(tmp_path / "list.txt")][1] == "first"
    (tmp_path / "bad.txt").write_text("nowhere.wav\n")
    with pytest.raises(AudioError, match="bad.txt:1: .*nowhere.wav does not exist"):
        audio.find_recordings(tmp_path / "bad.txt")
    with pytest.raises(AudioError, match="does not exist"):
        audio.find_recordings(tmp_path / "nothing")
    assert json.dumps(audio.load(audio.find_recordings(wavs)[3])[1])
