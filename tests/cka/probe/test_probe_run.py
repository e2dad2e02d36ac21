"""Whole probes on planted features: rankings, chance, controls, resuming, shards, and what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import probe_toy as toy

import cka_addon as cka
from cka_addon import audio
from cka_addon.cli import main
from cka_addon.errors import NonFinite, SpecError
from cka_addon.models import Model
from cka_addon.probe import controls
from cka_addon.probe.errors import LabelError, ProbeError
from cka_addon.probe.result import ProbeResult


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return toy.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def ask(corpus, tmp_path):
    def run(labels=None, model=None, **options):
        options = {"fbank": False, "progress": False, "folds": 3, "resamples": 200, **options}
        labels = labels or f"{toy.table(tmp_path)}:class"
        return cka.probe([model or toy.model()], corpus, labels=labels, **options)

    return run


def values(result, name="class", model="planted"):
    return [r["value"] for r in result.curve(name, model)]


def test_planted_amounts_give_the_ranking_and_the_verdict(ask):
    result = ask()
    found = values(result)
    assert np.argsort(found).tolist() == np.argsort(toy.AMOUNTS).tolist()
    assert found[2] > 0.95 and found[0] < 0.55
    p = result.find("class")
    assert (p["by"], p["groups"], p["examples"]) == ("speaker", 12, 72)
    assert p["chance"]["value"] == pytest.approx(1 / 3, abs=0.05)
    assert p["rows"][2]["verdict"] in ("distinct, above all others", "as good as the best")
    assert p["rows"][0]["verdict"].startswith(("distinct, below", "below"))
    # Each recording is its own type here: the control task cannot be learned, so selectivity is the score over chance.
    assert p["rows"][2]["selectivity"] > 0.4


def test_frames_numbers_and_streams(ask, tmp_path):
    table = toy.table(tmp_path)
    specs = [f"frame={table}:class@frame", f"{table}:length", f"length_frame={table}:length@frame"]
    exact, stream = (ask(specs, solver=s, control=False, per_utterance=10) for s in ("exact", "stream"))
    for name in ("frame", "length_frame"):
        assert np.argmax(values(exact, name)) == 2
        np.testing.assert_allclose(values(exact, name), values(stream, name), atol=0.04)
    np.testing.assert_allclose(values(exact, "length"), values(stream, "length"), atol=0.06)
    assert exact.find("length")["metric"] == "R2" and values(exact, "length")[2] > values(exact, "length")[1] + 0.1
    assert exact.find("frame")["examples"] == 72 * 10


def test_random_features_give_chance_within_the_interval(ask):
    """40 layers without any label: the interval leaves chance out about as seldom as it says."""
    outside = 0
    for seed in range(10):
        result = ask(model=toy.model(amounts=(0.0,) * 4, seed=seed), control=False, seed=seed)
        outside += sum(not r["lower"] <= 1 / 3 <= r["upper"] for r in result.curve("class", "planted"))
    assert outside <= 7  # 2 of 40 by right; more than 7 has a chance below 0.2 %


def test_shuffled_labels_have_no_selectivity(ask, tmp_path):
    shuffled = np.random.default_rng(1).permutation([toy.label(i) for i in range(72)])
    p = ask(f"{toy.table(tmp_path, shuffled)}:class").find("class")
    for r in p["rows"]:
        assert r["selectivity_lower"] < 0 < r["selectivity_upper"] and abs(r["selectivity"]) < 0.25


def test_control_task_follows_types(ask, tmp_path):
    """Types that can be told from the features can be memorised: the control task finds that out."""
    table = toy.table(tmp_path)
    result = ask(f"{table}:half", control_types=f"{table}:class", seed=3)
    assert result.curve("half", "planted")[2]["control"] > 0.8
    made = controls.control_labels(["a", "b", "c"] * 50, np.arange(150), 0)
    assert len(set(made.tolist())) <= 3


def test_resumed_and_sharded_are_whole(ask, tmp_path, monkeypatch):
    table = toy.table(tmp_path)
    specs = [f"{table}:class", f"frame={table}:class@frame"]
    whole = ask(specs, out=tmp_path / "whole")
    assert not (tmp_path / "whole" / "examples").exists()
    assert ask(specs, out=tmp_path / "shards", shard="2/3") is None
    assert ask(specs, out=tmp_path / "shards", shard="1/3") is None
    sharded = ask(specs, out=tmp_path / "shards", shard="3/3")
    assert sharded.properties == whole.properties

    class Stopped(Exception):
        pass

    calls = []

    class Once(toy.Planted):
        def forward(self, wavs):
            calls.append(1)
            if len(calls) == 40:
                raise Stopped
            return super().forward(wavs)

    with pytest.raises(Stopped):
        ask(specs, model=Model(Once(), "planted"), out=tmp_path / "resumed")
    there = len(list((tmp_path / "resumed" / "examples").rglob("block-*")))
    assert there
    resumed = ask(specs, out=tmp_path / "resumed")
    assert resumed.properties == whole.properties
    with pytest.raises(ProbeError, match="begun with another properties"):
        ask(specs[:1], out=tmp_path / "resumed")


def test_store_gives_what_models_give(ask, corpus, tmp_path):
    store = cka.dump([toy.model()], corpus, tmp_path / "store", progress=False)
    table = toy.table(tmp_path)
    live = ask(f"{table}:class")
    stored = cka.probe(
        stores=store, labels=f"{table}:class", fbank=False, progress=False, folds=3, resamples=200, group="speaker"
    )
    assert values(stored) == pytest.approx(values(live), abs=1e-6)
    with pytest.raises(SpecError, match="made:level changes the recordings"):
        cka.probe(stores=store, labels="made:level", fbank=False, progress=False)
    with pytest.raises(LabelError, match="give them: --audio"):
        cka.probe(stores=store, labels="computed:energy", fbank=False, progress=False)
    position = cka.probe(stores=store, labels="computed:position", fbank=False, progress=False, folds=3)
    assert position.find("position")["rows"][0]["value"] < 0.05


def test_where_and_within(ask, tmp_path):
    table = toy.table(tmp_path)
    result = ask(f"{table}:class", where="half=a")
    assert result.find("class")["examples"] == 36
    with pytest.raises(LabelError, match="no recording has that value; expected one of a, b"):
        ask(f"{table}:class", where="half=x")

    class Speaking(toy.Planted):
        """The class is hidden behind a large offset of the speaker."""

        def forward(self, wavs):
            index = round(float(wavs[0][0]) * 1000) - 1
            offset = 30 * torch.randn(toy.WIDTH, generator=torch.Generator().manual_seed(index // toy.EACH))
            return {"hidden_states": [x + offset for x in super().forward(wavs)["hidden_states"]]}

    plain = ask(f"{table}:class", model=Model(Speaking(), "planted"), control=False)
    within = ask(f"{table}:class", model=Model(Speaking(), "planted"), control=False, within="speaker")
    streamed = ask(
        f"{table}:class@frame", model=Model(Speaking(), "planted"), control=False, within="speaker", solver="stream"
    )
    assert values(within)[2] > 0.9 > values(plain)[2] + 0.1
    assert values(streamed)[2] > 0.9


def test_speakers_are_asked_by_utterance(ask, tmp_path):
    p = ask(f"{toy.table(tmp_path)}:speaker").find("speaker")
    assert p["by"] == "utterance" and any("grouped by utterance, not by speaker" in w for w in p["warnings"])


def test_untrained_twin_and_bad_models(ask, corpus, tmp_path):
    class Net(torch.nn.Module):
        frame_shift, first_center = 0.02, 0.01

        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(320, 6)
            self.odd = torch.nn.Parameter(torch.full((6,), 3.0))

        def forward(self, wavs):
            return {"hidden_states": [self.net(wavs[0][: len(wavs[0]) // 320 * 320].view(1, -1, 320)) + self.odd]}

    result = ask(model=Model(Net(), "planted"), baseline=True, control=False)
    assert result.models("untrained") == ["planted-untrained"]
    assert [m["role"] for m in result.details["models"]] == ["model", "untrained"]
    with pytest.raises(SpecError, match="is no torch module"):
        controls.untrained(Model(lambda w: {"hidden_states": [torch.ones(1, len(w[0]) // 320, 2)]}, "f"))

    class Broken(toy.Planted):
        def forward(self, wavs):
            out = super().forward(wavs)
            out["hidden_states"][1][0, 3, 2] = float("nan") if round(float(wavs[0][0]) * 1000) == 5 else 0.0
            return out

    with pytest.raises(NonFinite, match="s00/4"):
        ask(model=Model(Broken(), "planted"))
    skipped = ask(model=Model(Broken(), "planted"), skip_unreadable=True, control=False).find("class")
    assert list(skipped["left_out"]) == ["s00/4"] and skipped["examples"] == 71


def test_labels_that_cannot_be_asked(ask, tmp_path):
    table = toy.table(tmp_path, [0] * 72)
    with pytest.raises(LabelError, match=r"one class only, \['c0'\]"):
        ask(f"{table}:class")
    other = tmp_path / "other.csv"
    other.write_text("utterance,class\nq1,a\nq2,b\n")
    with pytest.raises(LabelError, match="labels have 'q1', 'q2', the recordings are 's00/0'"):
        ask(f"{other}:class")
    ctm = tmp_path / "p.ctm"
    ctm.write_text("".join(f"s{s:02d}/{k} 1 {t} 5 x\n" for s in range(12) for k in range(6) for t in (7, 9)))
    with pytest.raises(LabelError, match="no example is left.*beyond the audio"):
        ask(f"{ctm}")
    ctm.write_text(
        "".join(f"s{s:02d}/{k} 1 {t} 100 x{t}\n" for s in range(12) for k in range(6) for t in (0, 100, 200))
    )
    with pytest.raises(LabelError, match="144 of 216 segments begin behind.*another unit"):
        ask(f"{ctm}")
    with pytest.raises(LabelError, match="expected made: and one of channel"):
        ask("made:loudness")
    with pytest.raises(LabelError, match="two labels are called 'class'"):
        ask([f"{toy.table(tmp_path)}:class"] * 2)


def test_online_code_and_network(ask):
    result = ask(mdl=True, probes=("linear", "mlp"), control=False)
    linear = result.curve("class", "planted")
    assert linear[2]["compression"] > 1.3 > linear[0]["compression"]
    assert result.curve("class", "planted", "mlp")[2]["value"] > 0.9
    with pytest.raises(ProbeError, match="works in memory only"):
        ask(probes=("mlp",), solver="stream")


def test_against_vectors(ask, tmp_path):
    """Values whose features were made from vectors are found to lie as those do, and only in that layer."""
    rng = np.random.default_rng(0)
    vectors = {f"w{i}": rng.standard_normal(5) for i in range(24)}
    (tmp_path / "glove.txt").write_text("\n".join(f"{n} " + " ".join(map(str, v)) for n, v in vectors.items()))
    np.savez(tmp_path / "v.npz", names=np.array(list(vectors)), vectors=np.stack(list(vectors.values())))
    rows = [f"s{i // 6:02d}/{i % 6},w{i % 24}" for i in range(72)]
    (tmp_path / "words.csv").write_text("\n".join(["utterance,word", *rows]))
    to = torch.tensor(np.stack(list(vectors.values())) @ rng.standard_normal((5, 12)), dtype=torch.float32)

    class Words(toy.Planted):
        def forward(self, wavs):
            out = super().forward(wavs)["hidden_states"]
            out[3] = 0.1 * out[3] + to[(round(float(wavs[0][0]) * 1000) - 1) % 24]
            return {"hidden_states": out}

    result = ask(
        f"{tmp_path}/words.csv:word",
        model=Model(Words(), "planted"),
        control=False,
        against=[f"word={tmp_path}/glove.txt", f"word={tmp_path}/v.npz", "word=one-hot"],
    )
    lines = result.find("word")["vectors"]
    text, npz, hot = (lines[4 * i : 4 * i + 4] for i in range(3))
    assert [v["cka"] for v in text] == pytest.approx([v["cka"] for v in npz])
    assert text[3]["cka"] > 0.7 > 0.3 > max(v["cka"] for v in text[:3])
    assert text[3]["lower"] > abs(text[3]["permuted"])
    assert hot[3]["cka"] > hot[0]["cka"]


def test_command_writes_everything(corpus, tmp_path, monkeypatch):
    table = toy.table(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    out = tmp_path / "out"
    arguments = ["probe", "-q", "-m", "planted=py:probe_toy:Planted seed=1", "-a", str(corpus), "-l", f"{table}:class"]
    monkeypatch.setattr(toy, "Planted", lambda seed="0", plain=toy.Planted: plain(seed=int(seed)))
    assert main([*arguments, "-l", f"{table}:length", "--folds", "3", "-o", str(out), "--formats", "png"]) == 0
    for name in ("probe.json", "probe.csv", "differences.csv", "report.html", "figures/curves_linear.png"):
        assert (out / name).stat().st_size > 500, name
    assert (out / "figures" / "map_linear_planted.png").is_file()
    result = ProbeResult.load(out / "probe.json")
    assert result.models("control") == ["FBANK"] and "majority class" in result.summary()
    assert len(result.to_frame()) == 2 * 5
    text = (out / "report.html").read_text()
    assert "What each layer knows" in text and "http://" not in text.replace("http://www.w3.org", "")
    assert json.loads((out / "probe.provenance.json").read_text())["made_by"]["versions"]["torch"]
    cka.compute([toy.model()], corpus, mode="full", progress=False).save(tmp_path / "cka.json")
    command = ["report", "-q", str(tmp_path / "cka.json"), "-o", str(tmp_path / "both.html")]
    assert main([*command, "--probes", str(out / "probe.json")]) == 0
    assert "Probes: what each layer knows" in (tmp_path / "both.html").read_text()
    assert main(["probe", "-q", "-m", "fbank", "-a", str(corpus), "-l", f"{table}:nothing", "-o", str(out)]) == 1


class Clocked(torch.nn.Module):
    """Features that are the centre of their frame, in seconds."""

    def __init__(self, shift, first_center):
        super().__init__()
        self.frame_shift, self.first_center = shift, first_center

    def forward(self, wavs):
        frames = int((len(wavs[0]) / 16000 - self.first_center) / self.frame_shift + 1e-6)
        times = self.first_center + self.frame_shift * torch.arange(frames)
        return {"hidden_states": [torch.stack([times, times**2], 1)[None]]}


def test_models_on_different_clocks_get_the_same_moments(corpus, tmp_path):
    """Every example of every model comes from the time that its label says."""
    models = [
        Model(Clocked(0.02, 0.0125), "slow"),
        Model(Clocked(0.01, 0.0), "fast"),
        Model(Clocked(0.01, 0.0125), "odd"),
    ]
    rows = [(f"s{i // 6:02d}/{i % 6}", k / 10 + 0.003, k / 10 + 0.09) for i in range(72) for k in range(9)]
    (tmp_path / "p.ctm").write_text(
        "".join(f"{u} 1 {a:.3f} {b - a:.3f} {'xyz'[int(a * 10) % 3]}\n" for u, a, b in rows)
    )
    from cka_addon.probe.examples import Reader, gather
    from cka_addon.probe.labels import Labels
    from cka_addon.probe.made import Material
    from cka_addon.probe.run import _property

    reader = Reader(models, [], audio.find_recordings(corpus), Material(), 0)
    wanted = [f"{tmp_path}/p.ctm", f"frame={tmp_path}/p.ctm@frame", "computed:position"]
    properties = [_property(w, reader, {}, [], lambda text: None) for w in wanted]
    assert isinstance(properties[0].labels, Labels)
    made = gather(properties, reader, tmp_path / "out", per_utterance=None, seed=0, progress=False)
    for name in ("frame", "position"):
        found = made[name].rows()
        assert len(found) > 2000
        for model, most in (("slow", 1e-6), ("fast", 0.0051), ("odd", 0.0051)):
            away = np.abs(made[name].layer(model, "layer_0")[:, 0].numpy() - found.times)
            assert away.max() <= most, (name, model)
    frame = made["frame"].rows()
    assert all("xyz"[int((t - 0.003) * 10) % 3] == v for t, v in zip(frame.times, frame.values, strict=True))
    segments = made["p"].rows()
    assert len(segments) == len(rows)
    for model, shift in (("slow", 0.02), ("fast", 0.01), ("odd", 0.01)):
        middle = made["p"].layer(model, "layer_0")[:, 0].numpy()
        assert np.abs(middle - segments.times).max() <= shift / 2 + 1e-6, model


def test_similarity_where_and_within(corpus, tmp_path):
    """Two models that share nothing but the speaker are alike until its mean is taken away."""
    table = toy.table(tmp_path)

    class Speaker(torch.nn.Module):
        frame_shift, first_center = 0.02, 0.01

        def __init__(self, seed):
            super().__init__()
            self.seed = seed

        def forward(self, wavs):
            index = round(float(wavs[0][0]) * 1000) - 1
            g = torch.Generator().manual_seed(977 * self.seed + index)
            offset = 3 * torch.randn(8, generator=torch.Generator().manual_seed(index // toy.EACH))
            return {"hidden_states": [(offset + torch.randn(50, 8, generator=g))[None]]}

    from cka_addon.finish import finish
    from cka_addon.probe.grouped import grouped
    from cka_addon.run import gather
    from cka_addon.sources import open_source

    def value(**options):
        source = open_source([Model(Speaker(1), "a"), Model(Speaker(2), "b")], corpus)
        source = grouped(source, progress=False, **options)
        result = finish(gather(source=source, mode="full", progress=False))
        assert result.details["made_by"][0]["options"].get("within") == options.get("within")
        return float(result.values[0, 1]), result.details["counts"]["utterances"]

    assert value()[0] > 0.7
    assert abs(value(within="path:speaker")[0]) < 0.05
    assert value(where=[f"{table}:half=a"])[1] == 36
    with pytest.raises(LabelError, match="no recording has that value"):
        value(where=[f"{table}:half=z"])
    arguments = ["compute", "-q", "-m", "fbank", "-a", str(corpus), "-o", str(tmp_path / "x.json")]
    assert main([*arguments, "--where", f"{table}:half", "--mode", "full"]) == 1
