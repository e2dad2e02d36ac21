"""From recordings or stores to a matrix: one pass, shards, processes, intervals, errors."""

import socket
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from cka_toy import Toy

import cka_addon as cka
from cka_addon import audio
from cka_addon.align import align, take
from cka_addon.errors import AudioError, ConstantLayer, MergeError, NonFinite, SpecError, TooFewExamples
from cka_addon.estimators import Reference
from cka_addon.finish import finish
from cka_addon.models import Model
from cka_addon.options import Options
from cka_addon.run import compute, gather, make_blocks, merge
from cka_addon.sources import examples_of
from cka_addon.state import State
from cka_addon.store_writer import dump
from cka_addon.utterances import Utterance

pytestmark = pytest.mark.compat


def models():
    return [Model(Toy(), "slow"), Model(Toy(160), "fast", layers=[0, 2])]


@pytest.fixture(scope="module")
def stores(wavs, tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    return [dump([m], wavs, root / m.name, progress=False) for m in models()]


def run(*args, **kwargs):
    return compute(*args, progress=False, **kwargs)


def everything(wavs):
    """All aligned frames of all recordings in memory: per layer (frames, width), float64."""
    pair = models()
    columns = [[] for _ in range(5)]
    for recording in audio.find_recordings(wavs):
        wav, _ = audio.load(recording)
        layers = [m(wav) for m in pair]
        ranges = align([len(x[0]) for x in layers], [m.info.clock for m in pair])
        flat = [take(x, *r) for r, m in zip(ranges, layers, strict=True) for x in m]
        for column, x in zip(columns, flat, strict=True):
            column.append(x.double())
    return [torch.cat(c).numpy() for c in columns]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", ["gram", "stream"])
def test_full_streamed_is_the_definition_in_memory(wavs, form, biased):
    data = everything(wavs)
    result = run(models(), wavs, mode="full", form=form, biased=biased)
    want = [[Reference.cka(a, b, biased=biased) for b in data] for a in data]
    assert np.abs(result.values - want).max() < 1e-6
    assert result.details["counts"]["examples"] == len(data[0])
    assert ("HSIC_0" if biased else "HSIC_1") in result.details["estimator"]


@pytest.mark.parametrize("mode", ["minibatch", "full"])
@pytest.mark.parametrize("examples", ["frames", "sampled", "means"])
def test_from_stores_is_on_the_fly(wavs, stores, mode, examples):
    kwargs = {"mode": mode, "examples": examples, "frames": 6, "batch_size": 8, "blocks": 3, "interval": "none"}
    live = run(models(), wavs, **kwargs)
    stored = run(stores=stores, **kwargs)
    assert np.array_equal(live.values, stored.values)
    assert live.details["counts"] == stored.details["counts"]


def test_sampled_stores_of_two_clocks_hold_the_same_moments(wavs, tmp_path):
    two = [dump([m], wavs, tmp_path / m.name, keep="sampled", frames=6, progress=False) for m in models()]
    stored = run(stores=two, examples="sampled", frames=6, mode="full", interval="none")
    live = run(models(), wavs, examples="sampled", frames=6, mode="full", interval="none")
    assert np.allclose(stored.values, live.values, atol=1e-12)
    # The fast model's first layer at the slow model's instants is the slow model's: CKA 1.
    assert stored.values[0, 3] == pytest.approx(1, abs=1e-6)


def test_two_clocks_are_brought_together_by_time(wavs):
    result = run(models(), wavs, mode="full", interval="none")
    assert result.values[0, 3] == pytest.approx(1, abs=1e-6)
    assert result.details["alignment"]["reference_shift_ms"] == 20
    pooled = run(models(), wavs, mode="full", align="pool", interval="none")
    assert pooled.values[0, 3] < 0.999 and "mean" in pooled.details["alignment"]["rule"]


def test_minibatch_is_the_average_before_the_division(wavs):
    """One block, no shuffling: the minibatches can be cut by hand."""
    options = {"mode": "minibatch", "batch_size": 50, "mix": 1, "blocks": 1, "interval": "none", "seed": 5}
    result = run([Model(Toy(), "toy")], wavs, **options)
    model, frames = Model(Toy(), "toy"), []
    recordings = {r.id: r for r in audio.find_recordings(wavs)}
    for name in make_blocks(sorted(recordings), 1, 5)[0]:
        frames.append([x.double() for x in model(audio.load(recordings[name])[0])])
    data = [torch.cat(c).numpy() for c in zip(*frames, strict=True)]
    cuts = [slice(i, i + 50) for i in range(0, len(data[0]), 50)]
    cuts = [c for c in cuts if len(data[0][c]) >= 25]
    h = np.array([[np.mean([Reference.hsic(a[c], b[c]) for c in cuts]) for b in data] for a in data])
    want = h / np.sqrt(np.outer(np.diag(h), np.diag(h)))
    assert np.abs(result.values - want).max() < 1e-6
    assert result.details["counts"]["minibatches"] == len(cuts)


def test_mixed_minibatches_come_near_the_full_value(wavs):
    full = run(models(), wavs, mode="full", interval="none").values
    mixed = run(models(), wavs, batch_size=40, mix=24, blocks=1, interval="none").values
    in_order = run(models(), wavs, batch_size=20, mix=1, blocks=1, interval="none").values
    assert np.abs(mixed - full).max() < 0.5 * np.abs(in_order - full).max()


@pytest.mark.parametrize("mode, form", [("minibatch", "auto"), ("full", "stream"), ("full", "gram")])
def test_shards_merged_are_the_whole(wavs, stores, tmp_path, mode, form):
    kwargs = {"mode": mode, "form": form, "batch_size": 16, "mix": 3, "blocks": 7, "permutations": 1}
    whole = run(stores=stores, **kwargs)
    for n in (2, 3):
        files = []
        for i in range(1, n + 1):
            state = gather(stores=stores, shard=f"{i}/{n}", progress=False, **kwargs)
            files.append(state.save(tmp_path / f"{n}-{i}.safetensors"))
        joined = merge(list(reversed(files)))
        for what in ("values", "lower", "upper", "baseline"):
            assert np.abs(getattr(joined, what) - getattr(whole, what)).max() < 1e-9
        with pytest.raises(MergeError, match="blocks are missing"):
            merge(files[:-1])
        with pytest.raises(MergeError, match="in two shards"):
            merge([*files, files[0]])
    other = gather(stores=stores, shard="1/3", progress=False, **{**kwargs, "seed": 1})
    with pytest.raises(MergeError, match="differ in options"):
        State.load(files[1]).merge(other)


_PROCESS = """
import os, sys
import numpy as np, torch, torch.distributed as dist
from cka_addon.run import compute
torch.set_num_threads(1)
rank, world, port, out, *stores = sys.argv[1:]
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
dist.init_process_group("gloo", rank=int(rank), world_size=int(world))
for mode, form in (("minibatch", "auto"), ("full", "stream"), ("full", "gram")):
    r = compute(stores=stores, mode=mode, form=form, batch_size=16, mix=3, blocks=7, permutations=1, progress=False)
    np.save(f"{out}/{mode}-{form}-{world}-{rank}.npy", np.stack([r.values, r.lower, r.upper, r.baseline]))
dist.destroy_process_group()
"""


def test_one_two_and_three_processes_give_the_same(stores, tmp_path):
    for world in (2, 3):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        arguments = [str(world), str(port), str(tmp_path), *map(str, stores)]
        processes = [subprocess.Popen([sys.executable, "-c", _PROCESS, str(r), *arguments]) for r in range(world)]
        assert [p.wait(timeout=200) for p in processes] == [0] * world
    for mode, form in (("minibatch", "auto"), ("full", "stream"), ("full", "gram")):
        whole = run(stores=stores, mode=mode, form=form, batch_size=16, mix=3, blocks=7, permutations=1)
        want = np.stack([whole.values, whole.lower, whole.upper, whole.baseline])
        for world in (2, 3):
            for rank in range(world):
                assert np.abs(np.load(tmp_path / f"{mode}-{form}-{world}-{rank}.npy") - want).max() < 1e-9


def test_pairs(wavs):
    everything_ = run(models(), wavs, mode="full", form="stream", interval="none")
    for kind in ("within", "across"):
        for mode in ("full", "minibatch"):
            part = run(models(), wavs, mode=mode, form="stream", pairs=kind, interval="none", batch_size=64, blocks=2)
            assert np.isnan(part.values[~part.mask]).all() and np.isfinite(part.values[part.mask]).all()
            if mode == "full":
                assert np.allclose(part.values[part.mask], everything_.values[part.mask], atol=1e-12)
    with pytest.raises(SpecError, match="was not computed"):
        part.between("slow")
    assert part.between("slow", "fast").shape == (3, 2)


def test_permutation_baseline_is_near_zero_unless_biased(wavs):
    result = run(models(), wavs, mode="full", permutations=3, interval="none")
    off = ~np.eye(5, dtype=bool)
    assert np.abs(result.baseline[off]).max() < 0.02 < result.values[off].min()
    small = {"batch_size": 8, "permutations": 3, "interval": "none"}
    assert run(models(), wavs, biased=True, **small).baseline[off].mean() > 0.1


def test_errors_name_layer_and_utterance(wavs, tmp_path):
    class Broken(Toy):
        def __init__(self, what):
            super().__init__()
            self.what = what

        def forward(self, wavs):
            out = super().forward(wavs)
            h = out["hidden_states"]
            if self.what == "constant":
                h[1] = torch.full_like(h[1], 3.7)
            elif len(wavs[0]) == 6400:
                h[2][0, 1, 2] = float("inf")
            return out

    for mode in ("minibatch", "full"):
        with pytest.raises(ConstantLayer, match="layer bad/layer_1 is constant over all 24 utterances"):
            run([Model(Broken("constant"), "bad")], wavs, mode=mode, batch_size=32, blocks=2)
        with pytest.raises(NonFinite, match="layer bad/layer_2 in utterance 'utt(00|07|14|21)'"):
            run([Model(Broken("inf"), "bad")], wavs, mode=mode, batch_size=32, blocks=2)
    result = run([Model(Broken("inf"), "bad")], wavs, mode="full", skip_unreadable=True)
    assert result.details["counts"]["left_out"] == 4 and np.isfinite(result.values).all()
    with pytest.raises(TooFewExamples, match="got 3 examples of 3 utterances"):
        run(models(), wavs, limit=3, examples="means", mode="full")
    with pytest.raises(TooFewExamples, match="no minibatch of 512 examples"):
        run(models(), wavs, limit=2, batch_size=512)


def test_unreadable_recordings_are_told_at_the_start(tmp_path):
    for i in range(6):
        soundfile.write(tmp_path / f"{i}.wav", np.random.default_rng(i).standard_normal(16000) * 0.1, 16000)
    (tmp_path / "x.flac").write_bytes(b"nothing")
    with pytest.raises(AudioError, match="1 of 7 recordings cannot be read"):
        run(models(), tmp_path, mode="full")
    result = run(models(), tmp_path, mode="full", skip_unreadable=True)
    assert result.details["counts"]["left_out"] == 1 and "x" in result.details["left_out"]


def test_wrong_options():
    for bad, message in (
        ({"mode": "exact"}, "minibatch, full"),
        ({"batch_size": 3}, "at least 4"),
        ({"confidence": 1.5}, "between 0 and 1"),
    ):
        with pytest.raises(SpecError, match=message):
            Options(**bad)
    with pytest.raises(SpecError, match="neither stores nor models"):
        compute()


def test_more_workers_than_blocks_is_refused(stores):
    with pytest.raises(SpecError, match="raise --blocks, lower --mix"):
        gather(stores=stores, shard="1/9", blocks=4, progress=False)


def test_few_utterance_means_are_not_taken_for_constant(wavs):
    """As many blocks as utterances: no block varies in itself, the layers do."""
    result = run(models(), wavs, limit=12, examples="means", mode="full")
    assert np.isfinite(result.values).all() and result.details["counts"]["blocks"] == 12
    assert result.lower is not None and (result.upper - result.lower)[0, 1] > 0


def test_notebook_in_five_lines(wavs, tmp_path):
    result = cka.compute([Toy(), Model(Toy(160), "fast")], wavs, mode="full", progress=False)
    figure, axes = cka.plot_heatmap(result, "Toy", "fast")
    cka.plot_lines(result, to="fast/0")
    path = result.to_csv(tmp_path / "cka.csv")
    assert path.exists() and result.names == ["Toy", "fast"]


def test_examples_of_frames_are_aligned_per_utterance():
    infos = [m.info for m in models()]
    slow = [torch.arange(5.0)[:, None]] * 3
    fast = [torch.arange(8.0)[:, None]] * 2
    layers = examples_of(Utterance("u", [slow, fast], 0.1, [None, None]), infos, Options())
    assert layers[0][:, 0].tolist() == [0, 1, 2, 3] and layers[3][:, 0].tolist() == [0, 2, 4, 6]


def test_finish_checks_for_missing_blocks(stores):
    state = gather(stores=stores, shard="1/2", progress=False, mode="full")
    with pytest.raises(MergeError, match="merge them"):
        finish(state)
