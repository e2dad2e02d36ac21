"""The network: short input, training, batch norm over real frames, pooling by hand, folded weights that stay fresh."""

from __future__ import annotations

import copy
import doctest
import importlib
import pickle

import pytest
import torch
import torch.nn.functional as F

from s3prl_speaker_upstreams.ecapa import DIALECTS, Ecapa, EcapaConfig, Ragged
from s3prl_speaker_upstreams.ecapa.layers import _Statistics
from s3prl_speaker_upstreams.errors import ConfigError

pytestmark = pytest.mark.compat

OUTPUTS = ("hidden_states", "mfa", "pooled", "embedding")


@pytest.mark.parametrize("name", ["config", "frontend", "inference", "layers", "model", "ragged"])
def test_examples_in_the_docstrings_run(name):
    module = importlib.import_module(f"s3prl_speaker_upstreams.ecapa.{name}")
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0 or name == "inference"


def total(out: dict) -> torch.Tensor:
    """A number that depends on everything."""
    return sum(h.data.square().mean() for h in out["hidden_states"]) + out["embedding"].square().mean()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_any_length_forward_and_backward_alone_and_beside_others(dialect, mode, build, speechlike):
    encoder = build(dialect).train(mode == "train")
    with torch.autograd.set_detect_anomaly(True):
        for batch in ([1], [160], [399], [1, 1], [1, 800, 5600]):
            encoder.zero_grad()
            out = encoder([speechlike(n, seed=n) for n in batch], OUTPUTS)
            total(out).backward()
            for name, parameter in encoder.named_parameters():
                assert parameter.grad is not None and parameter.grad.isfinite().all(), (name, batch)
    assert all(b.isfinite().all() for b in encoder.buffers())


@pytest.mark.parametrize("lengths", [[9600, 9600, 9600], [4000, 9600, 800]], ids=["equal", "ragged"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_gradients_reach_every_parameter(dialect, lengths, build, speechlike):
    encoder = build(dialect).train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.weight.data.uniform_(0.5, 1.5)
    total(encoder([speechlike(n, seed=i) for i, n in enumerate(lengths)], OUTPUTS)).backward()
    for name, parameter in encoder.named_parameters():
        # The last bias of the attention shifts all of a softmax alike: it has no gradient in any implementation.
        if name != "ecapa.pool.conv2.bias":
            assert parameter.grad.abs().max() > 0, name


def plain_convolution(x: torch.Tensor, conv: torch.nn.Conv1d, padding: str) -> torch.Tensor:
    """(frames, in) of one utterance -> (frames, out) by PyTorch's own padding."""
    pad = conv.kernel_size[0] // 2
    x = F.pad(x.t()[None], (pad, pad), mode="reflect" if padding == "reflect" else "constant")
    return F.conv1d(x, conv.weight, conv.bias)[0].t()


@pytest.mark.parametrize("lengths", [[30, 50, 20], [40, 40]], ids=["ragged", "equal"])
@pytest.mark.parametrize("padding", ["reflect", "zeros"])
def test_batch_norm_takes_its_statistics_over_real_frames(padding, lengths):
    torch.manual_seed(0)
    model = Ecapa(EcapaConfig(channels=16, mfa_channels=24, padding=padding)).train()
    features = Ragged(torch.randn(sum(lengths), 80), lengths)
    before = copy.deepcopy(model)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0].detach()))
    out = model(features, OUTPUTS)

    # By hand, utterance by utterance with PyTorch's own padding, then over all real frames.
    conv = before.block_1.conv
    x = torch.cat([F.relu(plain_convolution(u, conv, padding)) for u in features.split()])
    mean, var = x.mean(0), x.var(0, unbiased=False)
    torch.testing.assert_close(out["hidden_states"][0].data, (x - mean) / (var + 1e-5).sqrt(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.block_1.norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(model.block_1.norm.running_var, 0.9 + 0.1 * x.var(0, unbiased=True))
    assert model.block_1.norm.num_batches_tracked == 1

    # Every other batch norm of the frame level also saw exactly the real frames, and kept their mean.
    for name, x in seen.items():
        rows = len(lengths) if name in ("pool_norm",) else sum(lengths)
        assert x.shape[0] == rows, name
        torch.testing.assert_close(model.get_submodule(name).running_mean, 0.1 * x.mean(0), msg=name)
    assert len(seen) == 1 + 3 * 9 + 3


def test_a_training_step_does_not_depend_on_how_equal_crops_are_laid_out():
    """Equal crops take the grid, others the gapped layout: same batch statistics, same gradients."""
    torch.manual_seed(0)
    for padding in ("reflect", "zeros"):
        model = Ecapa(EcapaConfig(channels=16, mfa_channels=24, padding=padding)).train()
        a, b, c = torch.randn(30, 80), torch.randn(30, 80), torch.randn(1, 80)
        grads = []
        for order in ((a, b, c), (a, c, b)):  # [30, 30, 1] and [30, 1, 30]
            model.zero_grad()
            out = model(Ragged(torch.cat(order), [len(u) for u in order]), OUTPUTS)
            total(out).backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        equal = Ragged(torch.cat([a, b]), [30, 30])
        for first, second in zip(*grads, strict=True):
            torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-3)
        # The gapped layout, forced on equal crops by a third one that is dropped from the comparison, in eval mode.
        model.eval()
        together = model(equal)["hidden_states"][3].data
        with_third = model(Ragged(torch.cat([a, b, c]), [30, 30, 1]))["hidden_states"][3].data[:60]
        torch.testing.assert_close(together, with_third, atol=1e-5, rtol=1e-4)


def pooling(dialect: str, x: torch.Tensor, **changes) -> torch.Tensor:
    """Pooled statistics of one utterance under equal weights (the attention's last layer is zero)."""
    model = Ecapa(DIALECTS[dialect].ecapa_config(channels=16, mfa_channels=x.shape[1], **changes)).eval()
    torch.nn.init.zeros_(model.pool.conv2.weight)
    return model.pool(Ragged(x, [len(x)]))[0].detach()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_pooling_by_hand(dialect):
    pooled = pooling(dialect, torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    floor = {"wespeaker": 1e-7, "taoruijie": 1e-4}.get(dialect, 1e-12)
    torch.testing.assert_close(pooled, torch.tensor([2.0, 2.0, 1.0, floor**0.5]))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_pooling_of_a_single_frame_is_the_frame_and_the_floor(dialect):
    pooled = pooling(dialect, torch.tensor([[0.5, -2.0]]))
    floor = {"wespeaker": 1e-7, "taoruijie": 1e-4}.get(dialect, 1e-12)
    torch.testing.assert_close(pooled, torch.tensor([0.5, -2.0, floor**0.5, floor**0.5]))


def test_context_deviation_by_hand():
    x = torch.tensor([[[1.0], [2.0], [6.0]]])  # mean 3, squares 4 + 1 + 9
    for dialect, expected in (("speechbrain", 14 / 3), ("wespeaker", 7 + 1e-7), ("taoruijie", 7.0)):
        pool = Ecapa(DIALECTS[dialect].ecapa_config(channels=16, mfa_channels=1)).pool
        torch.testing.assert_close(pool._context(x)[0], torch.tensor([3.0, expected**0.5]))
        # One frame: no deviation, whatever the divisor.
        floor = pool._context(x[:, :1])[0, 1]
        torch.testing.assert_close(floor, torch.tensor(DIALECTS[dialect].ecapa_config().context_var_floor ** 0.5))


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_the_statistics(weighted):
    """The written-out backward pass against recorded operations in double precision."""
    torch.manual_seed(0)
    x, scores = (torch.randn(2, 7, 3, requires_grad=True) for _ in range(2))
    to_mean, to_var = torch.randn(2, 3), torch.randn(2, 3)
    mean, var = _Statistics.apply(x, scores if weighted else None)
    ((mean * to_mean).sum() + (var * to_var).sum()).backward()

    y, s = (t.detach().double().requires_grad_() for t in (x, scores))
    weights = s.softmax(1) if weighted else torch.full_like(s, 1 / 7)
    expected_mean = (weights * y).sum(1)
    expected_var = (weights * y.square()).sum(1) - expected_mean.square()
    ((expected_mean * to_mean).sum() + (expected_var * to_var).sum()).backward()
    torch.testing.assert_close(mean, expected_mean.float())
    torch.testing.assert_close(var, expected_var.float())
    torch.testing.assert_close(x.grad, y.grad.float())
    if weighted:
        torch.testing.assert_close(scores.grad, s.grad.float())


def test_no_further_than_asked(build, speechlike):
    model = build("wespeaker").ecapa
    features = Ragged(torch.randn(50, 80), [50])
    called = []
    for name in ("mfa", "pool", "embedding"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    for outputs, expected in (
        (("hidden_states",), []),
        (("mfa",), ["mfa"]),
        (("pooled",), ["mfa", "pool"]),
        (("embedding", "hidden_states"), ["mfa", "pool", "embedding"]),
    ):
        called.clear()
        assert tuple(model(features, outputs)) == outputs
        assert called == expected


@pytest.mark.parametrize("gradients", [False, True])
def test_head_continues_from_the_hidden_states(build, gradients):
    model = build("taoruijie").ecapa
    features = Ragged(torch.randn(70, 80), [50, 20])
    with torch.set_grad_enabled(gradients):
        whole = model(features, OUTPUTS)
        rest = model.head(model(features)["hidden_states"], ("mfa", "pooled", "embedding"))
    torch.testing.assert_close(rest["mfa"].data, whole["mfa"].data)
    for name in ("pooled", "embedding"):
        torch.testing.assert_close(rest[name], whole[name])


def test_unknown_outputs_are_refused(build):
    model = build("speechbrain").ecapa
    features = Ragged(torch.randn(5, 80), [5])
    with pytest.raises(ConfigError, match=r"got outputs=\['block_1'\], expected some of"):
        model(features, ("block_1",))
    with pytest.raises(ConfigError, match="expected some of"):
        model.head(model(features)["hidden_states"], ("hidden_states",))
    with pytest.raises(ConfigError, match="got dtype='fp8'"):
        Ecapa(EcapaConfig(channels=16), dtype="fp8")


def embedding(encoder) -> torch.Tensor:
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        return encoder([torch.randn(4000, generator=generator)], ("embedding",))["embedding"]


@pytest.mark.parametrize("change", ["in place", "through data", "load", "optimizer", "buffer"])
def test_folded_weights_follow_every_change(build, change):
    encoder, other = build("speechbrain"), build("speechbrain", seed=1)
    before = embedding(encoder)
    if change == "load":
        encoder.load_state_dict(other.state_dict())
    elif change == "optimizer":
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
        encoder([torch.randn(4000)], ("embedding",))["embedding"].square().sum().backward()
        optimizer.step()
    elif change == "buffer":
        encoder.ecapa.block_3.res2[2].norm.running_mean.add_(1.0)
    else:
        with torch.no_grad():
            for mine, its in zip(encoder.parameters(), other.parameters(), strict=True):
                (mine if change == "in place" else mine.data).lerp_(its, 0.01)
    after = embedding(encoder)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, embedding(copy.deepcopy(encoder)))


def test_copies_and_pickles_after_use(build):
    encoder = build("speechbrain")
    expected = embedding(encoder)
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        torch.testing.assert_close(embedding(twin), expected)


@pytest.mark.parametrize("dialect", ["speechbrain", "wespeaker", "taoruijie"])
def test_bf16_stays_within_two_percent(dialect, build, speechlike):
    half, full = (build(dialect, dtype=d, channels=128, mfa_channels=192) for d in ("bf16", "float32"))
    wavs = [speechlike(n, seed=n) for n in (800, 16000, 40000)]
    with torch.no_grad():
        got, expected = half(wavs, OUTPUTS), full(wavs, OUTPUTS)
    for x, y in zip((*got["hidden_states"], got["mfa"]), (*expected["hidden_states"], expected["mfa"]), strict=True):
        assert x.data.dtype == torch.float32
        assert 0 < (x.data - y.data).norm() <= 0.02 * y.data.norm()


def test_autocast_outside_does_not_change_inference(build):
    encoder = build("wespeaker")
    expected = embedding(encoder)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        states = encoder([torch.randn(4000, generator=generator)])["hidden_states"]
    with torch.no_grad():
        got = encoder.ecapa.head(states, ("embedding",))["embedding"]
    torch.testing.assert_close(got, expected)


def test_training_under_autocast_in_bf16(build, speechlike):
    encoder = build("speechbrain").train()
    for lengths in ([8000, 8000], [8000, 3000]):
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = encoder([speechlike(n, seed=n) for n in lengths], OUTPUTS)
        total(out).backward()
        assert out["hidden_states"][3].data.dtype == torch.bfloat16
        assert out["pooled"].dtype == torch.float32
        assert all(p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("lengths", [[40, 40], [40, 25]], ids=["equal", "ragged"])
def test_compiles_in_one_graph(lengths, build):
    if not hasattr(torch, "compile"):
        pytest.skip("this torch has no compiler")
    model = build("wespeaker" if lengths[0] == lengths[1] else "speechbrain").ecapa
    features = Ragged(torch.randn(sum(lengths), 80), lengths)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(features, ("hidden_states", "mfa"))
        got = compiled(features, ("hidden_states", "mfa"))
    torch.testing.assert_close(got["mfa"].data, expected["mfa"].data, atol=1e-5, rtol=1e-4)
