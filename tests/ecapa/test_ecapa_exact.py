"""The promise: an utterance gets the same result alone and in any batch, along both ways through the network."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s3prl_speaker_upstreams.ecapa import DIALECTS, Ragged

pytestmark = pytest.mark.compat

OUTPUTS = ("hidden_states", "mfa", "pooled", "embedding", "fbank")
LIMIT = 1e-5


def results(encoder, wavs: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Every output of every utterance."""
    out = encoder(wavs, OUTPUTS)
    frames = {"fbank": out["fbank"], "mfa": out["mfa"]}
    frames |= {f"block_{i}": h for i, h in enumerate(out["hidden_states"], start=1)}
    split = {name: value.split() for name, value in frames.items()}
    return [
        {name: value[i].detach() for name, value in (split | {k: out[k] for k in ("pooled", "embedding")}).items()}
        for i in range(len(wavs))
    ]


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], note: object = "") -> None:
    for name, value in expected.items():
        assert got[name].shape == value.shape, (name, note)
        assert (got[name] - value).abs().max() <= LIMIT * value.abs().max().clamp(min=1e-30), (name, note)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "differentiable"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_alone_and_in_any_batch(dialect, gradients, build, speechlike):
    encoder = build(dialect)
    # From one sample to 40 x 1600; two of equal length beside each other run as one grid.
    wavs = [speechlike(n, seed=i) for i, n in enumerate((1, 100, 500, 800, 1600, 5600, 5600, 64000))]
    with torch.set_grad_enabled(gradients):
        alone = [results(encoder, [wav])[0] for wav in wavs]
        for seed in range(3):
            order = random.Random(seed).sample(range(len(wavs)), len(wavs))
            for place, got in zip(order, results(encoder, [wavs[i] for i in order]), strict=True):
                assert_same(got, alone[place], len(wavs[place]))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.one_of(st.integers(1, 2000), st.integers(1, 24000)), min_size=2, max_size=5),
    dialect=st.sampled_from(sorted(DIALECTS)),
    stride=st.sampled_from([1, 1, 2]),
    gradients=st.booleans(),
)
def test_random_lengths(lengths, dialect, stride, gradients, build, speechlike):
    encoder = build(dialect, stride=stride)
    wavs = [speechlike(n, seed=i) for i, n in enumerate(lengths)]
    with torch.set_grad_enabled(gradients):
        for wav, got in zip(wavs, results(encoder, wavs), strict=True):
            assert_same(got, results(encoder, [wav])[0], len(wav))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_both_ways_through_the_network_agree(dialect, stride, build, speechlike):
    encoder = build(dialect, stride=stride)
    wavs = [speechlike(n, seed=n) for n in (1, 900, 30000, 8000)]
    differentiable = results(encoder, wavs)
    with torch.no_grad():
        for got, expected in zip(results(encoder, wavs), differentiable, strict=True):
            assert_same(got, expected)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_both_ways_are_close_to_double_precision(dialect, build):
    model = build(dialect).ecapa
    features = Ragged(torch.randn(160, 80), [100, 1, 59])
    names = ("hidden_states", "mfa", "pooled", "embedding")
    with torch.no_grad():
        fast = model(features, names)
    recorded = model(features, names)
    exact = model.double()(Ragged(features.data.double(), features.lengths), names)
    assert exact["embedding"].dtype == torch.float64
    for got in (fast, recorded):
        for x, y in zip((*got["hidden_states"], got["mfa"]), (*exact["hidden_states"], exact["mfa"]), strict=True):
            assert (x.data - y.data).abs().max() <= LIMIT * y.data.abs().max()
        for name in ("pooled", "embedding"):
            assert (got[name] - exact[name]).abs().max() <= LIMIT * exact[name].abs().max()


def test_packs_do_not_show(build, speechlike, monkeypatch):
    """Many packs and one give the same."""
    encoder = build("speechbrain")
    wavs = [speechlike(n, seed=n) for n in (3000, 20000, 1, 9000, 16000)]
    with torch.no_grad():
        one = results(encoder, wavs)
        monkeypatch.setattr("s3prl_speaker_upstreams.ecapa.inference.PACK", 60)
        for got, expected in zip(results(encoder, wavs), one, strict=True):
            assert_same(got, expected)


def test_padding_costs_nothing(build):
    """Products done for a batch are those of its utterances alone, but for the gaps of the Res2 convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    encoder = build("speechbrain")
    wavs = [torch.randn(n) for n in (4000, 64000, 8000)]

    def work(batch: list[torch.Tensor]) -> int:
        with FlopCounterMode(display=False) as counter:
            encoder(batch)
        return counter.get_total_flops()

    alone = sum(work([wav]) for wav in wavs)
    assert alone > 0
    assert work(wavs) <= 1.01 * alone
