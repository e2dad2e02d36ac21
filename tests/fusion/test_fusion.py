"""``-u fusion``: layers of several upstreams on one clock, side by side, each with the values that it has alone."""

from __future__ import annotations

import logging
import socket

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s3prl_speaker_upstreams import checkpoints
from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.fusion import FusionConfig, Member, parse

pytestmark = pytest.mark.compat


def noise(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(n, generator=generator) for n in lengths]


def make_toy(window: int, hop: int, width: int = 6, layers: int = 3, over_padding: bool = False):
    """A wav2vec2-like upstream: framed without centring, in a zero-padded batch (``over_padding``: normalised over)."""
    from s3prl.upstream.interfaces import UpstreamBase

    class Toy(UpstreamBase):
        def __init__(self, **kwargs):
            super().__init__()
            torch.manual_seed(window + hop)
            self.frame = nn.Conv1d(1, width, window, stride=hop)
            self.more = nn.ModuleList(nn.Linear(width, width) for _ in range(layers - 1))

        def get_downsample_rates(self, key):
            return hop

        def forward(self, wavs):
            x = nn.utils.rnn.pad_sequence(wavs, batch_first=True)
            if over_padding:
                x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
            states = [self.frame(x[:, None]).transpose(1, 2)]
            for layer in self.more:
                states.append(torch.tanh(layer(states[-1])))
            return {"hidden_states": states, "last_hidden_state": states[-1]}

    return lambda ckpt=None, model_config=None, refresh=False, **kwargs: Toy(**kwargs)


def make_clock(window: int, hop: int):
    """An upstream whose only layer holds the time, in seconds, of each frame's centre."""
    from s3prl.upstream.interfaces import UpstreamBase

    class Times(UpstreamBase):
        def get_downsample_rates(self, key):
            return hop

        def forward(self, wavs):
            frames = [1 + max(0, len(wav) - window) // hop for wav in wavs]
            times = (window / 2 + hop * torch.arange(max(frames)))[None, :, None] / 16000
            return {"hidden_states": [times.expand(len(wavs), -1, -1).float()]}

    return lambda ckpt=None, model_config=None, refresh=False, **kwargs: Times()


@pytest.fixture
def hub(monkeypatch):
    import s3prl.hub as hub

    made = {
        "toy": make_toy(400, 320),
        "wide": make_toy(400, 320, width=10, layers=2, over_padding=True),
        "clock10": make_clock(0, 160),
        "clock10framed": make_clock(400, 160),
        "clock20": make_clock(400, 320),
        "clock20centred": make_clock(0, 320),
    }
    for name, entry in made.items():
        monkeypatch.setattr(hub, name, entry, raising=False)
    return hub


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    path = tmp_path_factory.mktemp("fusion") / "speaker.safetensors"
    fields = {"channels": 32, "mfa_channels": 48, "embedding_dim": 8, "attention_channels": 8, "se_channels": 8}
    return checkpoints.save_native(checkpoints.untrained("speechbrain", seed=1, **fields), path)


def members(speaker) -> list:
    return ["toy", {"upstream": "ecapa_tdnn_local", "ckpt": str(speaker), "name": "speaker"}, "fbank"]


def test_weighted_sum_is_the_members_weighted_sums_side_by_side(hub, speaker):
    """s3prl's own featurizers, unchanged, on three members of three widths and two rates."""
    from s3prl.nn import Featurizer, S3PRLUpstream
    from s3prl.upstream.interfaces import Featurizer as Classic

    model = S3PRLUpstream("fusion", extra_conf={"members": members(speaker)}).eval()
    assert (model.num_layers, set(model.hidden_sizes), set(model.downsample_rates)) == (8, {6 + 32 + 240}, {320})
    featurizer = Featurizer(model)
    nn.init.normal_(featurizer.weights)
    wavs = noise(16000, 9000)
    with torch.no_grad():
        hidden, lengths = model(nn.utils.rnn.pad_sequence(wavs, True), torch.tensor([16000, 9000]))
        fused, kept = featurizer(hidden, lengths)
        assert kept.tolist() == [50, 29]
        out = model.upstream(wavs)
        weights, expected, start = featurizer.weights.softmax(0), [], 0
        for name in ("toy", "speaker", "fbank"):
            layers = out[name]
            part = weights[start : start + len(layers)]
            expected.append(sum(w * layer for w, layer in zip(part, layers, strict=True)))
            start += len(layers)
        expected = torch.cat(expected, -1)
        assert (fused - expected).abs().max() <= 1e-6 * expected.abs().max()
        classic = Classic(model.upstream, "hidden_states", upstream_device="cpu")
        classic.weights.data.copy_(featurizer.weights)
        for i, got in enumerate(classic(wavs, out)):
            assert (got - expected[i, : len(got)]).abs().max() <= 1e-6 * expected.abs().max()


def test_every_layer_stands_in_its_members_slot(hub, speaker):
    upstream = hub.fusion(members=members(speaker)).eval()
    assert upstream.slots == {"toy": slice(0, 6), "speaker": slice(6, 38), "fbank": slice(38, 278)}
    assert upstream.layer_names[2:5] == ("toy:layer_2", "speaker:block_1", "speaker:block_2")
    with torch.no_grad():
        out = upstream(noise(8000))
    for name, layer in zip(upstream.layer_names, out["hidden_states"], strict=True):
        slot = upstream.slots[name.split(":")[0]]
        assert layer[..., slot].any() and not layer[..., : slot.start].any() and not layer[..., slot.stop :].any()
    padded = hub.fusion(members=members(speaker), layout="pad").eval()
    with torch.no_grad():
        states = padded(noise(8000))["hidden_states"]
    assert {x.shape[-1] for x in states} == {240}
    assert torch.equal(states[0][..., :6], out["toy"][0]) and not states[0][..., 6:].any()


@pytest.mark.parametrize("one_by_one", [False, True])
def test_each_members_values_are_those_it_gives_alone(hub, speaker, one_by_one, caplog):
    wavs = noise(16000, 9000, 12345)
    listed = ["wide", {"upstream": "ecapa_tdnn_local", "ckpt": str(speaker), "name": "speaker"}]
    with caplog.at_level(logging.INFO):
        upstream = hub.fusion(members=listed, one_by_one=one_by_one).eval()
    assert "speaker: 4 layers of 32, every 160 samples from 0.0 ms on, exact in any batch" in caplog.text
    assert "wide: 2 layers of 10, every 320 samples from 12.5 ms on, NOT the same in a batch" in caplog.text
    wide, single = hub.wide().eval(), hub.ecapa_tdnn_local(ckpt=str(speaker)).eval()
    torch_states = upstream.members[0].upstream.state_dict()
    wide.load_state_dict(torch_states)
    with torch.no_grad():
        together = upstream(wavs)
        errors = []
        for i, wav in enumerate(wavs):
            alone = wide([wav])["hidden_states"]
            frames = alone[0].shape[1]
            errors += [float((together["wide"][k][i, :frames] - alone[k][0]).abs().max()) for k in range(2)]
            # moments of the coarser member: 12.5 ms + 20 ms j, in the middle of the 10 ms frames 2j, 2j+1 and 2j+2
            blocks = single([wav])["hidden_states"]
            first = torch.arange(frames) * 2 + 1
            for k in range(4):
                mean = (blocks[k][0, first] + blocks[k][0, (first + 1).clamp(max=len(wav) // 160)]) / 2
                got = together["speaker"][k][i, : frames - 1]
                assert (got - mean[: frames - 1]).abs().max() <= 1e-5 * mean.abs().max()
    assert (max(errors) <= 1e-5) == one_by_one


LENGTHS = (1, 159, 400, 800, 801, 4321, 16000, 80123, 960000)


@pytest.mark.parametrize("align", ["mean", "nearest"])
@pytest.mark.parametrize("rate", ["coarsest", "finest", 240])
@pytest.mark.parametrize("pair", ["clock20+clock10", "clock10framed+clock20centred", "clock20centred+clock20+clock10"])
def test_no_frame_is_off_by_more_than_half_a_frame(hub, pair, rate, align):
    upstream = hub.fusion(ckpt=pair, rate=rate, align=align).eval()
    for length in LENGTHS:
        with torch.no_grad():
            out = upstream([torch.zeros(length)])
        frames = out["hidden_states"][0].shape[1]
        assert frames == max(1, -(-length // upstream.rate))
        moments = torch.from_numpy(upstream.clock.times(frames))
        for member in upstream.members:
            times = out[member.config.name][0][0, :, 0].double()
            # where the member has frames: beyond its first and last, that one stands
            begin = member.clock.first_center
            end = begin + member.clock.shift * (member.frames(max(length, 800)) - 1)
            target = moments.clamp(begin, end)
            assert (times - target).abs().max() <= member.clock.shift / 2 + 1e-4, (member.config.name, length)


def test_frame_counts_satisfy_both_interfaces(hub, speaker):
    from s3prl.nn import S3PRLUpstream
    from s3prl.upstream.interfaces import Featurizer as Classic

    for rate in ("coarsest", "finest"):
        model = S3PRLUpstream("fusion", extra_conf={"members": members(speaker), "rate": rate}).eval()
        classic = Classic(model.upstream, "hidden_states", upstream_device="cpu")
        for lengths in ((1,), (800, 1), (16000, 5600, 399), (15999,), (16001,)):
            wavs = noise(*lengths)
            with torch.no_grad():
                hidden, kept = model(nn.utils.rnn.pad_sequence(wavs, True), torch.tensor(lengths))
                assert all(torch.isfinite(h).all() for h in hidden)
                features = classic(wavs, model.upstream(wavs))
            step = model.upstream.rate
            assert kept[0].tolist() == [(n - 1) // step + 1 for n in lengths]
            assert [len(f) for f in features] == [round(n / step) for n in lengths]


@pytest.mark.parametrize("how", ["layer_norm", "rms"])
def test_normalisation_is_over_a_members_own_width(hub, speaker, how):
    upstream = hub.fusion(members=members(speaker), normalize=how).eval()
    plain = hub.fusion(members=members(speaker)).eval()
    plain.load_state_dict(upstream.state_dict())
    with torch.no_grad():
        got, raw = upstream(noise(8000)), plain(noise(8000))
    for name in ("toy", "speaker", "fbank"):
        for x, y in zip(got[name], raw[name], strict=True):
            expected = (
                F.layer_norm(y, y.shape[-1:]) if how == "layer_norm" else y * (y.square().mean(-1, True) + 1e-5).rsqrt()
            )
            assert torch.allclose(x, expected, atol=1e-5)


def test_s3prls_own_normalisation_option_does_the_right_thing(hub, speaker, caplog):
    """``--upstream_feature_normalize`` would normalise over the zeros of the other slots."""
    from s3prl.nn import S3PRLUpstream
    from s3prl.upstream.interfaces import Featurizer as Classic

    wavs = noise(8000)
    expected = hub.fusion(members=["toy", "fbank"], normalize="layer_norm").eval()
    upstream = hub.fusion(members=["toy", "fbank"]).eval()
    classic = Classic(upstream, "hidden_states", upstream_device="cpu", normalize=True)
    assert "normalised over its own width" in caplog.text and upstream.normalize == "layer_norm"
    model = S3PRLUpstream("fusion", path_or_url="toy+fbank", normalize=True).eval()
    with torch.no_grad():
        reference = Classic(expected, "hidden_states", upstream_device="cpu")(wavs, expected(wavs))[0]
        assert torch.equal(classic(wavs, upstream(wavs))[0], reference)
        hidden, _ = model(torch.stack(wavs), torch.tensor([8000]))
        for x, y in zip(hidden, expected(wavs)["hidden_states"], strict=True):
            assert torch.equal(x[:, : y.shape[1]], y)


def test_fine_tuning_reaches_the_named_members_only(hub, speaker):
    upstream = hub.fusion(members=members(speaker), trainable=["speaker"]).train()
    assert upstream.members[1].training and not upstream.members[0].training
    before = {name: value.clone() for name, value in upstream.members[0].state_dict().items()}
    sum(h.square().mean() for h in upstream(noise(8000, 6000))["hidden_states"]).backward()
    blocks = [p.grad for n, p in upstream.members[1].named_parameters() if ".block_" in n]
    assert blocks and all(grad is not None and torch.isfinite(grad).all() for grad in blocks)
    assert all(p.grad is None for p in upstream.members[0].parameters())
    everything = hub.fusion(members=members(speaker)).train()
    sum(h.square().mean() for h in everything(noise(8000))["hidden_states"]).backward()
    assert all(p.grad is not None for p in everything.members[0].parameters())
    assert all(torch.equal(value, before[name]) for name, value in upstream.members[0].state_dict().items())


def test_every_choice_of_features_trains_under_ddp(hub, speaker, tmp_path):
    import torch.distributed as dist
    from s3prl.upstream.interfaces import Featurizer as Classic

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for key in ("hidden_states", "last_hidden_state", "hidden_state_1", "speaker"):
            upstream = hub.fusion(members=members(speaker))
            featurizer = Classic(upstream, key, upstream_device="cpu")
            model = nn.parallel.DistributedDataParallel(upstream.train(), find_unused_parameters=True)
            for _ in range(3):
                (features,) = featurizer(noise(6000), model(noise(6000)))
                features.square().mean().backward()
    finally:
        dist.destroy_process_group()


def test_layers_are_chosen_by_number_and_name(hub, speaker):
    chosen = [
        {"upstream": "toy", "layers": [0, -1]},
        {"upstream": "ecapa_tdnn_local", "ckpt": str(speaker), "layers": ["block_4", 0], "name": "s"},
    ]
    upstream = hub.fusion(members=chosen).eval()
    assert upstream.layer_names == ("toy:layer_0", "toy:layer_2", "s:block_4", "s:block_1")
    embedding = {"upstream": "ecapa_tdnn_local", "ckpt": str(speaker), "key": "embedding"}
    assert hub.fusion(members=["toy", embedding]).layer_names[-1] == "ecapa_tdnn_local:embedding"


def test_a_yaml_file_by_k_or_by_g(hub, speaker, tmp_path):
    (tmp_path / "speaker.safetensors").write_bytes(speaker.read_bytes())
    (tmp_path / "fusion.yaml").write_text(
        "members:\n- toy\n- upstream: ecapa_tdnn_local\n  ckpt: speaker.safetensors\nrate: finest\nalign: nearest\n"
    )
    for arguments in ({"ckpt": tmp_path / "fusion.yaml"}, {"model_config": str(tmp_path / "fusion.yaml")}):
        upstream = hub.fusion(**arguments)
        assert upstream.rate == 160 and upstream.config.align == "nearest" and len(upstream.layer_names) == 7
    (tmp_path / "rate.yaml").write_text("rate: 640\n")
    assert hub.fusion(ckpt="toy+fbank", model_config=str(tmp_path / "rate.yaml")).rate == 640


BAD = {
    "unknown member": ({"ckpt": "toy+ecapa_dinos"}, "no upstream 'ecapa_dinos'; did you mean 'ecapa_dino'"),
    "no members": ({}, "got no members"),
    "empty name": ({"ckpt": "toy+"}, "got the member ''"),
    "unknown option": ({"ckpt": "toy", "ratte": 1}, "fusion.ratte"),
    "unknown option of a member": ({"members": [{"upstream": "toy", "layer": [0]}]}, "layer"),
    "rate": ({"ckpt": "toy", "rate": "fine"}, "got rate='fine'"),
    "layout": ({"ckpt": "toy", "layout": "slot"}, "slots"),
    "itself": ({"ckpt": "toy+fusion"}, "its own member"),
    "layers of ours": (
        {"members": [{"upstream": "ecapa_dino", "layers": [4]}]},
        "got layer 4, expected 0 .. 3 or block_1",
    ),
    "trainable": ({"ckpt": "toy", "trainable": ["fbank"]}, "got trainable 'fbank'"),
    "members twice": ({"ckpt": "toy", "members": ["fbank"]}, "in two places"),
    "no file": ({"ckpt": "nowhere.yaml"}, "nowhere.yaml: cannot be read"),
}


@pytest.mark.parametrize("what", sorted(BAD))
def test_bad_input_is_refused_before_anything_is_loaded(hub, what, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(socket, "create_connection", refuse)
    for name in ("toy", "fbank", "ecapa_dino"):
        entry = getattr(hub, name)
        monkeypatch.setattr(
            hub, name, type("Entry", (), {"__call__": refuse, "layer_names": getattr(entry, "layer_names", None)})()
        )
    arguments, message = BAD[what]
    with pytest.raises(ConfigError, match=message):
        hub.fusion(**arguments)


def test_what_can_only_be_seen_once_loaded(hub):
    with pytest.raises(ConfigError, match="toy: got layer 3, expected 0 .. 2 or layer_0"):
        hub.fusion(members=[{"upstream": "toy", "layers": [3]}])
    with pytest.raises(ConfigError, match="got rate=1281, expected at most 1280"):
        hub.fusion(ckpt="toy+fbank", rate=1281)


def test_names_are_unique():
    config = FusionConfig((Member("fbank"), Member("fbank"), Member("mfcc", name="x")))
    assert [member.name for member in config.members] == ["fbank", "fbank_2", "x"]
    with pytest.raises(ConfigError, match="two members are called 'x'"):
        parse(members=[{"upstream": "a", "name": "x"}, {"upstream": "b", "name": "x"}])


def test_cka_addon_takes_it_as_any_upstream(hub, speaker):
    from cka_addon.models import load_model

    model = load_model("fused=s3prl:fusion ckpt=toy+fbank")
    assert model.info.layers == ("toy:layer_0", "toy:layer_1", "toy:layer_2", "fbank:layer_0")
    assert (model.info.clock.shift, model.info.clock.first_center) == (0.02, 0.0125)
    assert len(model(noise(16000)[0])) == 4


def test_layer_weights_are_shown_by_member(hub, tmp_path):
    import argparse

    import pandas

    from cka_addon.cli import main

    names = ["toy:layer_0", "toy:layer_1", "toy:layer_2", "fbank:layer_0"]
    arguments = argparse.Namespace(upstream="fusion", downstream="sid", upstream_layer_names=names)
    state = {"Featurizer": {"weights": torch.tensor([0.0, 0.0, 0.0, 3.0]).log1p()}, "Args": arguments, "Step": 1}
    torch.save(state, tmp_path / "states-1.ckpt")
    assert main(["layer-weights", str(tmp_path / "states-1.ckpt"), "-o", str(tmp_path / "out")]) == 0
    shares = pandas.read_csv(tmp_path / "out" / "member_weights.csv")
    assert shares["member"].tolist() == ["toy", "fbank"] and shares["layers"].tolist() == [3, 1]
    assert shares["weight"].tolist() == pytest.approx([3 / 7, 4 / 7])
    layers = pandas.read_csv(tmp_path / "out" / "layer_weights.csv")
    assert layers["layer_name"].tolist() == names


def test_memory_of_the_slots_is_said(hub, caplog):
    with caplog.at_level(logging.INFO):
        hub.fusion(ckpt="toy+fbank")
    # 4 hidden states x 246 columns x 50 frames x 4 bytes
    assert "4 hidden states of width 246 every 320 samples: 0.2 MiB per second of speech" in caplog.text
