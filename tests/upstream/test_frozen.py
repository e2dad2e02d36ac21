"""A frozen upstream computes what its checkpoint says, whatever mode it was left in; a trained one is trained."""

from __future__ import annotations

import contextlib

import pytest
import torch

from s3prl_speaker_upstreams import checkpoints

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Weights whose running statistics are far from those of any batch of noise."""
    checkpoint = checkpoints.untrained("speechbrain", seed=1, channels=32, mfa_channels=48, embedding_dim=8)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in checkpoint.state.items():
        if name.endswith("running_mean"):
            tensor.normal_(generator=generator)
        elif name.endswith("running_var"):
            tensor.uniform_(0.1, 4.0, generator=generator)
    target = tmp_path_factory.mktemp("frozen") / "model.safetensors"
    return str(checkpoints.save_native(checkpoint, target))


def noise(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(n, generator=generator) for n in lengths]


def layers(model, wavs: list[torch.Tensor]) -> list[torch.Tensor]:
    hidden, _ = model(torch.nn.utils.rnn.pad_sequence(wavs, True), torch.tensor([len(wav) for wav in wavs]))
    return [h.detach() for h in hidden]


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_as_s3prl_leaves_it_under_no_grad(path):
    """README's own snippet: ``S3PRLUpstream(name)`` ends in train mode, and nobody calls eval."""
    from s3prl.nn import S3PRLUpstream

    model = S3PRLUpstream("ecapa_tdnn_local", path_or_url=path)
    assert model.training and model.upstream.training
    before, wavs = snapshot(model), noise(16000, 9000, 700)
    with torch.no_grad():
        together = layers(model, wavs)
        alone = layers(model, wavs[1:2])
        assert same_state(model, before)
        for got, expected in zip(together, layers(model.eval(), wavs), strict=True):
            assert torch.equal(got, expected)
    for batch, one in zip(together, alone, strict=True):
        frames = 9000 // 160 + 1
        assert (batch[1, :frames] - one[0, :frames]).abs().max() <= 1e-5 * one.abs().max()


def test_a_head_on_parameters_that_need_no_gradients(path):
    from s3prl.nn import S3PRLUpstream

    model = S3PRLUpstream("ecapa_tdnn_local", path_or_url=path).train().requires_grad_(False)
    head = torch.nn.Linear(32, 3)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    before, wavs = snapshot(model), noise(8000, 12000)
    first = layers(model, wavs)
    weight = head.weight.detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        hidden, _ = model(
            torch.nn.utils.rnn.pad_sequence(noise(8000, 12000, seed=step), True), torch.tensor([8000, 12000])
        )
        head(hidden[3]).square().mean().backward()
        optimizer.step()
    assert not torch.equal(head.weight, weight) and same_state(model, before)
    with torch.no_grad():
        for got, expected in zip(first, layers(model.eval(), wavs), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("how", ["bfloat16", "autocast", "compiled", "half", "double", "gradients of the waveform"])
def test_train_mode_is_eval_mode_while_frozen(path, how):
    dtype = "bfloat16" if how == "bfloat16" else None
    encoder = checkpoints.build_encoder(checkpoints.read_checkpoint(path), dtype=dtype).requires_grad_(False)
    if how in ("half", "double"):
        encoder = getattr(encoder, how)()
    run = encoder.ecapa
    if how == "compiled":
        torch._dynamo.reset()
        run = torch.compile(run, backend="eager")
    features = encoder.frontend(noise(8000, 3000))
    if how == "gradients of the waveform":
        features.data.requires_grad_()
    before = snapshot(encoder)
    with torch.autocast("cpu", torch.bfloat16) if how == "autocast" else contextlib.nullcontext():
        encoder.train()
        got = run(features, ("hidden_states", "embedding"))
        encoder.eval()
        expected = run(features, ("hidden_states", "embedding"))
    assert torch.equal(got["embedding"], expected["embedding"])
    for one, other in zip(got["hidden_states"], expected["hidden_states"], strict=True):
        assert torch.equal(one.data, other.data)
    assert same_state(encoder, before)


def test_only_norms_that_are_trained_take_the_statistics_of_the_batch(path):
    """Frozen norms between trained convolutions: running statistics, as they are; the others as ever."""
    encoder = checkpoints.load_encoder(path).train()
    frozen = encoder.ecapa.block_2.tdnn1.norm.requires_grad_(False)
    before = snapshot(encoder)
    out = encoder(noise(8000, 6000))["hidden_states"]
    sum(h.data.square().mean() for h in out).backward()
    after = encoder.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert "ecapa.block_2.tdnn2.norm.running_mean" in moved and "ecapa.block_1.norm.num_batches_tracked" in moved
    assert not [name for name in moved if name.startswith("ecapa.block_2.tdnn1.norm.")]
    assert frozen.weight.grad is None and encoder.ecapa.block_2.tdnn1.conv.weight.grad.abs().max() > 0


def test_fine_tuning_takes_the_statistics_of_the_batch(path):
    encoder = checkpoints.load_encoder(path).train()
    block_1 = encoder(noise(16000, 9000))["hidden_states"][0].data
    norm = encoder.ecapa.block_1.norm
    assert (block_1.mean(0) - norm.bias).abs().max() < 1e-4
    assert ((block_1.var(0, unbiased=False) - norm.weight.square()).abs() < 1e-2).float().mean() > 0.9
    assert int(norm.num_batches_tracked) == 1
