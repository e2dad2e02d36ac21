"""The upstream's contract with s3prl, and what it refuses."""

from __future__ import annotations

import logging
from collections import OrderedDict

import pytest
import torch

pytestmark = pytest.mark.compat

KEYS = ["hidden_states", "last_hidden_state", "block_1", "block_2", "block_3", "block_4", "mfa", "embedding", "fbank"]
RATE = 160


def noise(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(n, generator=generator) for n in lengths]


@pytest.fixture(scope="module")
def hub():
    import s3prl.hub

    return s3prl.hub


@pytest.fixture(scope="module")
def upstream(hub, untrained):
    return hub.ecapa_tdnn_local(ckpt=str(untrained), model_config=None, refresh=False).eval()


def test_hidden_states_are_the_four_blocks(upstream):
    with torch.no_grad():
        out = upstream(noise(16000, 8000))
    assert isinstance(out["hidden_states"], list) and len(out["hidden_states"]) == 4
    assert {tuple(h.shape) for h in out["hidden_states"]} == {(2, 101, 32)}
    assert list(out) == KEYS and len(out) == len(KEYS)
    assert out["mfa"].shape == (2, 101, 96)
    assert out["embedding"].shape == (2, 101, 24)
    assert out["fbank"].shape == (2, 101, 80)
    assert torch.equal(out["last_hidden_state"], out["hidden_states"][3])
    assert torch.equal(out["block_2"], out["hidden_states"][1])
    # zero behind the shorter utterance's end, in every key
    for key in KEYS[1:]:
        assert not out[key][1, 51:].any() and out[key][1, :51].any(), key
    assert torch.equal(out["embedding"][0, 0], out["embedding"][0, -1])
    assert all(isinstance(upstream.get_downsample_rates(key), int) for key in KEYS)


def test_lazy_keys_keep_the_gradient_mode(upstream):
    with torch.no_grad():
        out = upstream(noise(8000))
    assert not out["mfa"].requires_grad
    assert out["mfa"] is out["mfa"]
    assert upstream(noise(8000))["embedding"].requires_grad


def test_every_key_is_the_same_alone_and_in_any_batch(upstream):
    wavs = noise(700, 5600, 16000, 64000, 9999)
    with torch.no_grad():
        together = {order: upstream([wavs[i] for i in order]) for order in [(0, 1, 2, 3, 4), (3, 0, 4, 2, 1)]}
        for i, wav in enumerate(wavs):
            alone = upstream([wav])
            for order, batch in together.items():
                for key in KEYS[1:]:
                    reference = alone[key][0]
                    there = batch[key][order.index(i)][: len(reference)]
                    assert (there - reference).abs().max() <= 1e-5 * reference.abs().max(), (i, key)


def test_classic_featurizer_and_s3prl_upstream(hub, untrained):
    from s3prl.nn import Featurizer, S3PRLUpstream
    from s3prl.upstream.interfaces import Featurizer as Classic

    upstream = hub.ecapa_dino_local(ckpt=str(untrained), model_config=None, refresh=False).eval()
    wavs = noise(24000, 9000)
    for key in KEYS:
        classic = Classic(upstream, key, upstream_device="cpu")
        with torch.no_grad():
            features = classic(wavs, upstream(wavs))
        assert [len(f) for f in features] == [150, round(9000 / RATE)]
    model = S3PRLUpstream("ecapa_tdnn_local", path_or_url=str(untrained)).eval()
    assert (model.num_layers, set(model.hidden_sizes), set(model.downsample_rates)) == (4, {32}, {RATE})
    hidden, lengths = model(torch.nn.utils.rnn.pad_sequence(wavs, True), torch.tensor([24000, 9000]))
    weighted, kept = Featurizer(model)(hidden, lengths)
    assert weighted.shape == (2, 150, 32) and kept.tolist() == [150, 57]


@pytest.mark.parametrize("lengths", [(1,), (159,), (160,), (800,), (800, 1), (399, 16000)])
def test_extra_short_input_forward_and_backward(untrained, lengths):
    from s3prl.nn import S3PRLUpstream

    model = S3PRLUpstream("ecapa_tdnn_local", path_or_url=str(untrained)).train()
    wavs = [wav.requires_grad_() for wav in noise(*lengths)]
    hidden, _ = model(torch.nn.utils.rnn.pad_sequence(wavs, True), torch.tensor(lengths))
    sum(h.sum() for h in hidden).backward()
    assert all(wav.grad is not None and torch.isfinite(wav.grad).all() for wav in wavs)


def test_fine_tuning_reaches_every_block(hub, untrained):
    upstream = hub.ecapa_tdnn_local(ckpt=str(untrained)).train()
    out = upstream(noise(16000, 12000))
    sum((h**2).mean() for h in out["hidden_states"]).backward()
    names = [f"block_{i}" for i in (1, 2, 3, 4)]
    for name in names:
        grads = [p.grad for n, p in upstream.named_parameters() if f".{name}." in n]
        assert grads and all(g is not None and torch.isfinite(g).all() for g in grads), name
        assert any(g.abs().max() > 0 for g in grads), name


def test_frozen_upstream_is_deterministic_and_leaves_its_buffers_alone(upstream):
    before = {name: value.clone() for name, value in upstream.state_dict().items()}
    with torch.no_grad():
        first, second = upstream(noise(16000))["hidden_states"], upstream(noise(16000))["hidden_states"]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in upstream.state_dict().items())


def test_uncentred_front_ends_give_what_s3prl_keeps(hub, tmp_path):
    """(N-400)//160+1 frames are fewer than round(N/160): the last is repeated, alone as in a batch."""
    from s3prl_speaker_upstreams import checkpoints

    path = tmp_path / "wespeaker.safetensors"
    checkpoints.save_native(checkpoints.untrained("wespeaker", channels=16, mfa_channels=48, embedding_dim=8), path)
    upstream = hub.ecapa_tdnn_local(ckpt=str(path)).eval()
    wavs = noise(16000, 8000)
    with torch.no_grad():
        alone, batch = upstream(wavs[1:])["hidden_states"][3], upstream(wavs)["hidden_states"][3]
    assert alone.shape[1] == 50 and torch.equal(alone[0, -1], alone[0, 47])
    assert (batch[1, :50] - alone[0]).abs().max() <= 1e-5 * alone.abs().max()
    assert not batch[1, 50:].any()
    assert (upstream.frame_shift, upstream.first_center) == (0.01, 0.0125)


def test_clock_and_layer_names(upstream):
    assert (upstream.frame_shift, upstream.first_center) == (0.01, 0.0)
    assert upstream.layer_names == ("block_1", "block_2", "block_3", "block_4")


def test_untrained_weights_say_so(hub, untrained, caplog):
    with caplog.at_level(logging.WARNING):
        hub.ecapa_dino_local(ckpt=str(untrained))
    assert "UNTRAINED" in caplog.text


def test_options_file_wins(hub, untrained, tmp_path):
    options = tmp_path / "options.yaml"
    options.write_text("role: student\n")
    with pytest.raises(ValueError, match="of the untrained, expected the student"):
        hub.ecapa_tdnn_local(ckpt=str(untrained), model_config=str(options), role="untrained")
    options.write_text("dtype: bfloat16\n")
    upstreams = [hub.ecapa_tdnn_local(ckpt=str(untrained), model_config=g).eval() for g in (None, str(options))]
    with torch.no_grad():
        exact, rounded = (upstream(noise(16000))["hidden_states"][3] for upstream in upstreams)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()
    options.write_text("no_such_option: 1\n")
    with pytest.raises(ValueError, match="no_such_option"):
        hub.ecapa_tdnn_local(ckpt=str(untrained), model_config=str(options))
    options.write_text("[1, 2\n")
    with pytest.raises(ValueError, match="not yaml"):
        hub.ecapa_tdnn_local(ckpt=str(untrained), model_config=str(options))


BAD_WAVS = {
    "no wavs": ([], "empty list"),
    "padded batch": (torch.zeros(2, 16000), r"shape \(2, 16000\), expected a list"),
    "two-dimensional": ([torch.zeros(1, 16000)], r"wavs\[0\]: got shape \(1, 16000\)"),
    "empty": ([torch.zeros(100), torch.zeros(0)], r"wavs\[1\]: got no samples"),
    "integer": ([torch.zeros(16000, dtype=torch.int16)], "torch.int16.*divide 16-bit samples by 32768"),
    "nan": ([torch.zeros(100), torch.tensor([0.0, float("nan")])], r"wavs\[1\]: got 1 NaN or infinite of 2"),
    "infinite": ([torch.tensor([float("inf"), 0.0])], "infinite"),
    "numpy": ([torch.zeros(4).numpy()], "ndarray.*from_numpy"),
}


@pytest.mark.parametrize("name", sorted(BAD_WAVS))
def test_bad_waveforms_are_refused(upstream, name):
    from s3prl_speaker_upstreams.errors import BadWaveform

    wavs, message = BAD_WAVS[name]
    with pytest.raises(BadWaveform, match=message):
        upstream(wavs)


def test_unknown_feature_selection_is_refused(upstream):
    from s3prl.upstream.interfaces import Featurizer

    with pytest.raises(ValueError, match="'mfaa', expected one of hidden_states.*change -s"):
        Featurizer(upstream, "mfaa", upstream_device="cpu")


def test_s3prls_names_of_single_layers(upstream):
    """``-s hidden_state_3`` is one layer, as of s3prl's own upstreams, not the weighted sum of all."""
    from s3prl.upstream.interfaces import Featurizer

    wavs = noise(8000, 5000)
    with torch.no_grad():
        out = upstream(wavs)
        for number in range(4):
            featurizer = Featurizer(upstream, f"hidden_state_{number}", upstream_device="cpu")
            assert not list(featurizer.parameters())
            for got, expected in zip(featurizer(wavs, out), out["hidden_states"][number], strict=True):
                assert torch.equal(got, expected[: len(got)])
    assert list(out) == KEYS
    with pytest.raises(ValueError, match="'hidden_state_4', expected one of hidden_states.*or hidden_state_0"):
        Featurizer(upstream, "hidden_state_4", upstream_device="cpu")


def test_layers_by_number_count_from_zero(upstream, hub, untrained, caplog):
    from s3prl.upstream.interfaces import Featurizer

    wavs = noise(8000)
    with torch.no_grad():
        out = upstream(wavs)
        with caplog.at_level(logging.INFO):
            (picked,) = Featurizer(upstream, "hidden_states", upstream_device="cpu", layer_selection=2)(wavs, out)
        assert "-l 2 is block_3" in caplog.text
    assert torch.equal(picked, out["block_3"][0, : len(picked)])
    with pytest.raises(ValueError, match=r"-l 4.*expected 0 .. 3 \(block_1 .. block_4\)"):
        Featurizer(upstream, "hidden_states", upstream_device="cpu", layer_selection=4)
    with caplog.at_level(logging.INFO):
        hub.ecapa_tdnn_local(ckpt=str(untrained))
    assert "2 block_3" in caplog.text and "-l counts from 0" in caplog.text


@pytest.mark.parametrize("gradients", [False, True])
def test_outputs_can_be_saved_and_pickled(upstream, tmp_path, gradients):
    import pickle

    with torch.set_grad_enabled(gradients):
        out = upstream(noise(6000, 4000))
    torch.save(out, tmp_path / "features.pt")
    torch.save(out["hidden_states"], tmp_path / "layers.pt")
    for read in (torch.load(tmp_path / "features.pt", weights_only=True), pickle.loads(pickle.dumps(out)), out.copy()):
        assert type(read) in (dict, OrderedDict) and list(read) == KEYS and len(read["hidden_states"]) == 4
        assert all(torch.equal(read[key], out[key]) for key in KEYS[1:])
    layers = torch.load(tmp_path / "layers.pt", weights_only=True)
    assert type(layers) is list and torch.equal(layers[3], out["block_4"])


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_in_another_precision(hub, untrained, precision):
    exact = hub.ecapa_tdnn_local(ckpt=str(untrained))
    converted = hub.ecapa_tdnn_local(ckpt=str(untrained)).to(precision)
    wavs = noise(16000, 700)
    with torch.no_grad():
        got, expected = converted([wav.to(precision) for wav in wavs]), exact(wavs)
    limit = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-5}[precision]
    for key in KEYS[2:-1]:
        assert got[key].dtype == (torch.float32 if got[key].dtype != precision else precision)
        assert (got[key].double() - expected[key]).norm() <= limit * expected[key].norm(), key
    assert got["hidden_states"][0].dtype == precision
    assert converted.float().encoder.frontend.window.dtype == torch.float32


def test_a_relative_path_seen_from_another_folder(hub, untrained, tmp_path, monkeypatch):
    monkeypatch.chdir(untrained.parent)
    assert hub.ecapa_tdnn_local(ckpt=untrained.name) is not None
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=f"relative path {untrained.name}.*below {tmp_path}.*args.upstream_ckpt="):
        hub.ecapa_tdnn_local(ckpt=untrained.name)
    with pytest.raises(ValueError, match=f"options.yaml: cannot be read below {tmp_path}"):
        hub.ecapa_tdnn_local(ckpt=str(untrained), model_config="options.yaml")


def test_bad_checkpoints_are_refused(hub, untrained, tmp_path):
    with pytest.raises(OSError, match="nowhere.ckpt"):
        hub.ecapa_tdnn_local(ckpt=str(tmp_path / "nowhere.ckpt"))
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(untrained.read_bytes()[:20000])
    with pytest.raises(OSError, match="truncated"):
        hub.ecapa_tdnn_local(ckpt=str(truncated))
    foreign = tmp_path / "foreign.pt"
    torch.save({"encoder.weight": torch.zeros(3)}, foreign)
    with pytest.raises(ValueError, match="foreign.pt"):
        hub.ecapa_tdnn_local(ckpt=str(foreign))
    with pytest.raises(OSError, match="pass -k"):
        hub.ecapa_tdnn_local()
    with pytest.raises(OSError, match="ecapa_tdnn_url"):
        hub.ecapa_tdnn_local(ckpt="https://example.invalid/model.ckpt")
    with pytest.raises(OSError, match="ecapa_dino_local"):
        hub.ecapa_dino_url(ckpt="/some/path")


def test_unreachable_download_leaves_nothing_behind(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("S3PRL_SPEAKER_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="-k"):
        hub.ecapa_tdnn_url(ckpt="http://127.0.0.1:9/model.ckpt")
    left = [path.name for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    assert not left
