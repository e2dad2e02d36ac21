"""numpy's old names, catalyst's sampler, ASV's device, the unused sox package, and survival of hack_isinstance."""

from __future__ import annotations

import argparse
import builtins
import contextlib
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from torch.utils.data import SequentialSampler, WeightedRandomSampler

from s3prl_speaker_upstreams.compat import devices, numpy_names, placeholders, samplers, sox_effects, torchaudio_io
from s3prl_speaker_upstreams.compat._errors import RemovedApi
from s3prl_speaker_upstreams.errors import MissingPackage

pytestmark = pytest.mark.compat


def test_numpy_with_old_names():
    assert np.array_equal(numpy_names.full(3, 2.7).astype(numpy_names.int), [2, 2, 2])
    assert numpy_names.zeros(1, dtype=numpy_names.complex).dtype == np.complex128
    assert numpy_names.ndarray is np.ndarray and numpy_names.random is np.random
    with pytest.raises(AttributeError):
        getattr(numpy_names, "bool_of_old")  # noqa: B009
    assert pickle.loads(pickle.dumps(numpy_names.int)) is builtins.int


def test_masks_of_an_upstream_that_says_np_int():
    """s3prl/upstream/wavlm/WavLM.py:126, the line that numpy 1.24 broke."""
    from s3prl_speaker_upstreams import compat

    compat.install()
    from s3prl.upstream.wavlm.WavLM import compute_mask_indices

    mask = compute_mask_indices((2, 100), None, 0.5, 10, mask_type="static", min_masks=2)
    assert mask.shape == (2, 100) and 0 < mask.sum() < 200
    assert not hasattr(np, "int")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_draw_reaches_one_process(world):
    def drawn(epoch):
        shares = []
        for rank in range(world):
            torch.manual_seed(epoch)  # s3prl seeds all processes alike
            base = WeightedRandomSampler([1.0, 2.0, 3.0, 4.0], num_samples=12)
            sampler = samplers.DistributedSamplerWrapper(base, num_replicas=world, rank=rank)
            sampler.set_epoch(epoch)
            shares.append(list(sampler))
            assert len(sampler) == len(shares[-1]) == 12 // world
        return shares

    torch.manual_seed(0)
    expected = list(WeightedRandomSampler([1.0, 2.0, 3.0, 4.0], num_samples=12))
    shares = drawn(0)
    assert sorted(sum(shares, [])) == sorted(expected)
    assert drawn(1) != shares


def test_uneven_length_is_padded_like_torchs_sampler():
    sampler = samplers.DistributedSamplerWrapper(SequentialSampler(range(5)), num_replicas=2, rank=1, shuffle=False)
    assert list(sampler) == [1, 3, 0]


def test_nothing_else_of_catalyst():
    with pytest.raises(RemovedApi, match="no-deps catalyst"):
        getattr(samplers, "BalanceClassSampler")  # noqa: B009
    with pytest.raises(MissingPackage, match="pip install sox"):
        placeholders.Transformer()


class Expert:
    """Like s3prl's ASV expert: ``mask.cuda()`` whatever the device of the features."""

    def forward(self, mode, features, labels=None, **kwargs):
        mask = (1.0 - torch.ones(3)) * -100000.0
        return (features[0] + mask.cuda()).device, kwargs


def expert():
    module = types.SimpleNamespace(DownstreamExpert=type("DownstreamExpert", (Expert,), {"forward": Expert.forward}))
    devices.follow_the_features(module)
    return module.DownstreamExpert()


@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
def test_mask_goes_where_the_features_are(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    got, kwargs = expert().forward("train", [torch.zeros(3, device=device)], [1], records={})
    assert got.type == device and kwargs == {"records": {}}


def test_cuda_means_cuda_again_afterwards():
    with devices.CudaMeans(torch.device("cpu")):
        assert torch.zeros(1).cuda().device.type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            torch.zeros(1).cuda()


def test_evaluation_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch):
    """s3prl/downstream/runner.py:446: ``if is_available(): with torch.cuda.device(args.device): empty_cache()``."""

    class Runner:
        def __init__(self, device):
            self.args = types.SimpleNamespace(device=device)

        def evaluate(self, split=None):
            with torch.cuda.device(self.args.device):
                return split

    module = types.SimpleNamespace(Runner=type("Runner", (Runner,), {"evaluate": Runner.evaluate}))
    with pytest.raises(ValueError, match="Expected a cuda device"):
        module.Runner("cpu").evaluate("dev")
    assert devices.cuda_device_refuses_cpu(module)
    devices.evaluate_on_cpu(module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    real = torch.cuda.device
    assert module.Runner("cpu").evaluate("dev") == "dev"
    assert torch.cuda.device is real
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or contextlib.nullcontext())
    assert module.Runner("cuda:0").evaluate("test") == "test" and entered == ["cuda:0"]


def test_masking_tasks_use_the_device_they_are_given(monkeypatch):
    """s3prl/downstream/enhancement_stft/{expert,loss}.py: one ``device`` per module, cuda:0 wherever CUDA exists."""
    loss = types.ModuleType("compat_probe_task.loss")
    module = types.ModuleType("compat_probe_task.expert")
    module.device = loss.device = torch.device("cuda:0")
    monkeypatch.setitem(sys.modules, loss.__name__, loss)

    class DownstreamExpert:
        def __init__(self, upstream_dim, expdir, **kwargs):
            self.target = torch.zeros(2).to(module.device)
            self.window = torch.zeros(2).cuda()

    module.DownstreamExpert = DownstreamExpert
    devices.follow_the_argument(module)
    for device in ("cpu", "meta"):
        expert = module.DownstreamExpert(upstream_dim=3, expdir="exp", device=device, seed=1)
        assert expert.target.device.type == expert.window.device.type == device
        assert module.device == loss.device == torch.device(device)


def test_survives_hack_isinstance(monkeypatch, tmp_path):
    """s3prl's runner replaces builtins.isinstance by one that fails on tuples of classes for defaultdicts."""
    from collections import defaultdict

    real = builtins.isinstance

    def hacked(obj, cls):
        if real(obj, defaultdict):
            return real(obj, cls) and issubclass(cls, defaultdict)
        return real(obj, cls)

    monkeypatch.setattr(builtins, "isinstance", hacked)
    path = str(tmp_path / "a.wav")
    torchaudio_io.save(path, torch.rand(1, 3200) - 0.5, 16000)
    assert torchaudio_io.load(path)[1] == 16000
    assert sox_effects.apply_effects_file(path, [["channels", "1"], ["rate", "16000"], ["gain", "-3.0"]])[0].shape == (
        1,
        3200,
    )
    from s3prl_speaker_upstreams.compat import torch_load

    torch.save({"Args": argparse.Namespace(seed=1), "Config": {"runner": {}}}, tmp_path / "a.ckpt")
    assert torch_load.NamespaceLoader(torch.load)(tmp_path / "a.ckpt")["Args"].seed == 1
    assert torchaudio_io.load(path)[0].shape == (1, 3200)


@pytest.mark.parametrize("rank", [0, 1])
def test_equals_catalysts_own_sampler(rank):
    catalyst = pytest.importorskip(
        "catalyst.data.sampler", reason="catalyst is not installed (pip install --no-deps catalyst)"
    )
    drawn = []
    for kind in (catalyst.DistributedSamplerWrapper, samplers.DistributedSamplerWrapper):
        torch.manual_seed(3)
        sampler = kind(WeightedRandomSampler([1.0, 2.0, 3.0], num_samples=13), num_replicas=2, rank=rank)
        sampler.set_epoch(2)
        drawn.append([len(sampler), *sampler])
    assert drawn[0] == drawn[1]
