"""Every hub entry against what s3prl's own ``test/test_upstream.py`` asks of an upstream.

The named entries' weights cannot be downloaded here; each gets small random weights of its architecture and front-end
by ``ckpt``, which is what ``-k`` does.
"""

from __future__ import annotations

import pytest
import torch

from s3prl_speaker_upstreams import checkpoints, hubconf, weights

pytestmark = pytest.mark.compat

DIALECT = {"sdpn": "rdino", "native": "speechbrain"}
WIDTHS = {"channels": 16, "mfa_channels": 32, "embedding_dim": 8, "attention_channels": 8, "se_channels": 8}


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """Path of small weights in the dialect of an entry, made once per dialect."""
    folder, made = tmp_path_factory.mktemp("entries"), {}

    def path(name: str) -> str:
        known = weights.REGISTRY.get(name)
        kind = "speechbrain" if known is None else known.frontend or DIALECT.get(known.format, known.format)
        if kind not in made:
            made[kind] = checkpoints.save_native(checkpoints.untrained(kind, **WIDTHS), folder / f"{kind}.safetensors")
        return str(made[kind])

    return path


@pytest.fixture
def model(request, checkpoint_of, monkeypatch):
    from s3prl.nn import S3PRLUpstream

    name = request.param
    path = checkpoint_of(name)
    if name.endswith("_url"):  # the one kind that always goes to the network: its download is tested elsewhere
        monkeypatch.setattr(weights, "resolve", lambda *_, **__: path)
        return S3PRLUpstream(name, path_or_url="https://example.invalid/model.safetensors")
    return S3PRLUpstream(name, path_or_url=path)


def extract(model, seed: int = 0, **pseudo):
    from s3prl.util.pseudo_data import get_pseudo_wavs

    wavs, lengths = get_pseudo_wavs(seed=seed, padded=True, **pseudo)
    return model(wavs, lengths)[0]


@pytest.mark.parametrize("model", sorted(set(hubconf.entries()) - {"fusion"}), indirect=True)  # tests/fusion has it
def test_s3prls_own_checks(model):
    model.eval()
    with torch.no_grad():
        first, again = extract(model), extract(model)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "deterministic in eval mode"
        assert len(extract(model, seed=1)) == len(first) == 4
    model.train()
    assert len(extract(model, seed=2)) == 4
    for pseudo in (
        {"min_secs": 0.05, "max_secs": 0.05, "n": 1},
        {"min_secs": 0.05, "max_secs": 0.05, "n": 2},
        {"min_secs": 0.05, "max_secs": 1, "n": 3},
    ):
        with torch.autograd.set_detect_anomaly(True):
            sum(h.sum() for h in extract(model, **pseudo)).backward()
    grads = [p.grad for n, p in model.named_parameters() if ".block_1." in n]
    assert grads and all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("name", sorted(n for n, e in weights.REGISTRY.items() if not e.shipped))
def test_named_entry_with_a_path_never_touches_the_network(name, checkpoint_of, monkeypatch):
    import socket

    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert hubconf.entries()[name](ckpt=checkpoint_of(name)).get_downsample_rates("hidden_states") == 160


@pytest.mark.parametrize("name", sorted(n for n, e in weights.REGISTRY.items() if e.shipped))
def test_shipped_entry_needs_nothing(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    upstream = hubconf.entries()[name](ckpt=None, model_config=None, refresh=False).eval()
    with torch.no_grad():
        hidden = upstream([torch.randn(16000)])["hidden_states"]
    assert len(hidden) == 4 and torch.isfinite(torch.stack(hidden)).all()
    assert upstream.provenance["training_data"] and upstream.role in ("teacher", "supervised")
