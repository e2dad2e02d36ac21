"""MFCC and the learned filter bank: equal to the references, alone as in any batch, saved, trained."""

from __future__ import annotations

import pytest
import torch

from s3prl_speaker_upstreams import checkpoints
from s3prl_speaker_upstreams.ecapa import DIALECTS, EcapaConfig, Frontend, FrontendConfig, SpeakerEncoder
from s3prl_speaker_upstreams.ecapa.wave import FILTERS, GaborBank
from s3prl_speaker_upstreams.errors import ConfigError

pytestmark = pytest.mark.compat

SMALL = {"channels": 32, "mfa_channels": 48, "embedding_dim": 8, "attention_channels": 8, "se_channels": 8}
KINDS = {
    "mfcc": {"kind": "mfcc", "n_mfcc": 20, "deltas": 2},
    "wave": {"kind": "wave", "n_mels": 40, "log_floor": 1e-6, "log_floor_mode": "add", "top_db": None},
}


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def test_mfcc_equals_kaldis(speechlike):
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    cfg = DIALECTS["3dspeaker"].frontend.replace(
        kind="mfcc", n_mels=23, n_mfcc=13, lifter=22.0, normalisation="none", scale=32768.0
    )
    for samples in (400, 7777, 16000):
        wav = speechlike(samples, seed=samples)
        expected = kaldi.mfcc(wav[None] * 32768, num_mel_bins=23, num_ceps=13, cepstral_lifter=22.0, dither=0.0)
        assert relative(Frontend(cfg)([wav]).data, expected) <= 1e-4


def test_mfcc_and_its_differences_equal_torchaudios(speechlike):
    torchaudio = pytest.importorskip("torchaudio")
    wav = speechlike(16000, seed=1)
    cfg = DIALECTS["rdino"].frontend.replace(kind="mfcc", n_mfcc=40, deltas=2, normalisation="none")
    made = torchaudio.transforms.MFCC(
        n_mfcc=40,
        log_mels=True,  # log(x + 1e-6)
        melkwargs={"n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": 80},
    )
    first = made(wav)
    slopes = torchaudio.functional.compute_deltas(first)
    expected = torch.cat([first, slopes, torchaudio.functional.compute_deltas(slopes)]).t()
    got = Frontend(cfg)([wav]).data
    assert got.shape == expected.shape == (101, 120)
    for order in range(3):
        columns = slice(40 * order, 40 * order + 40)
        assert relative(got[:, columns], expected[:, columns]) <= 1e-4


def encoder(kind: str, dialect: str = "speechbrain", **fields) -> SpeakerEncoder:
    return checkpoints.build_encoder(checkpoints.untrained(dialect, seed=2, **SMALL, **KINDS[kind], **fields))


@pytest.mark.parametrize("dialect", ["speechbrain", "3dspeaker", "sslsv"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradients", [False, True])
def test_alone_and_in_any_batch(kind, dialect, gradients, speechlike):
    model = encoder(kind, dialect)
    assert model.ecapa.cfg.n_mels == model.frontend.cfg.width == {"mfcc": 60, "wave": 40}[kind]
    wavs = [speechlike(n, seed=i) for i, n in enumerate((1, 100, 399, 5600, 5600, 801, 32000))]
    with torch.set_grad_enabled(gradients):
        together = model(wavs, ("hidden_states", "embedding", "fbank"))
        for i, wav in enumerate(wavs):
            alone = model([wav], ("hidden_states", "embedding", "fbank"))
            assert relative(together["fbank"].split()[i], alone["fbank"].data) <= 1e-5
            assert alone["fbank"].lengths == [model.frontend.frames(len(wav))]
            assert relative(together["hidden_states"][3].split()[i], alone["hidden_states"][3].data) <= 1e-5
            assert relative(together["embedding"][i], alone["embedding"][0]) <= 1e-5


def test_filters_start_on_the_mel_filters(speechlike):
    """Energies of a tone are largest in the filter whose mel band holds it; envelopes are as wide as the bands."""
    cfg = FrontendConfig(**KINDS["wave"], normalisation="none", log="ln")
    t = torch.arange(16000) / 16000
    mels = Frontend(FrontendConfig(n_mels=40, n_fft=512, mel="htk", normalisation="none", top_db=None))
    for hz in (300.0, 1000.0, 2500.0, 6000.0):
        wav = torch.sin(2 * torch.pi * hz * t)
        filters, bands = (int(f([wav]).data[50].argmax()) for f in (Frontend(cfg), mels))
        assert abs(filters - bands) <= 1


def test_the_energy_of_a_filter_by_hand():
    """A frame's energy is the low-passed squared modulus of the convolution, computed here sample by sample."""
    cfg = FrontendConfig(kind="wave", n_mels=6)
    bank, wav = GaborBank(cfg), torch.randn(2000, generator=torch.Generator().manual_seed(0))
    filters, windows = (x.detach() for x in bank.kernels())
    padded = torch.nn.functional.pad(wav, (200, 200))
    moduli = torch.stack([(filters[:, 0] * padded[n : n + 401]).sum(1).square() for n in range(0, 2000, 8)])
    moduli = moduli[:, :6] + moduli[:, 6:]
    frame = 5  # centred on sample 800, which is modulus 100; the window reaches 25 to each side
    expected = (moduli[75:126] * windows[:, 0].t()).sum(0)
    torch.testing.assert_close(bank([wav])[0][frame], expected, atol=1e-7, rtol=1e-4)


def test_gradients_reach_the_filters_and_move_them(speechlike):
    model = encoder("wave").train()
    wavs = [speechlike(n, seed=n) for n in (8000, 8000, 5000)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = {name: getattr(model.frontend.bank, name).detach().clone() for name in FILTERS}
    model(wavs, ("embedding",))["embedding"].square().sum().backward()
    for name in FILTERS:
        grad = getattr(model.frontend.bank, name).grad
        assert grad is not None and grad.isfinite().all() and grad.abs().max() > 0, name
    optimizer.step()
    assert all(not torch.equal(getattr(model.frontend.bank, name), before[name]) for name in FILTERS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_native_format_keeps_it(kind, speechlike, tmp_path):
    model = encoder(kind)
    if kind == "wave":
        with torch.no_grad():
            model.frontend.bank.center.mul_(1.01)
            model.frontend.bank.pooling.mul_(0.9)
    path = checkpoints.save_native(model, tmp_path / "model.safetensors")
    read = checkpoints.load_encoder(path)
    wavs = [speechlike(9000, seed=1)]
    with torch.no_grad():
        for got, expected in zip(read(wavs)["hidden_states"], model(wavs)["hidden_states"], strict=True):
            assert torch.equal(got.data, expected.data)
    if kind == "wave":
        assert all(torch.equal(getattr(read.frontend.bank, n), getattr(model.frontend.bank, n)) for n in FILTERS)


@pytest.mark.parametrize("kind", KINDS)
def test_upstream_entry_and_fine_tuning(kind, tmp_path, speechlike):
    import s3prl.hub as hub

    path = checkpoints.save_native(checkpoints.untrained(seed=2, **SMALL, **KINDS[kind]), tmp_path / "m.safetensors")
    upstream = hub.ecapa_tdnn_local(ckpt=str(path))
    wavs = [speechlike(8000, seed=1), speechlike(3000, seed=2)]
    with torch.no_grad():
        out = upstream(wavs)
        assert out["fbank"].shape == (2, 51, {"mfcc": 60, "wave": 40}[kind])
        half = hub.ecapa_tdnn_local(ckpt=str(path)).bfloat16()(wavs)
    assert (half["block_4"].float() - out["block_4"]).norm() <= 0.03 * out["block_4"].norm()
    (options := tmp_path / "o.yaml").write_text("dtype: bfloat16\n")
    with torch.no_grad():
        low = hub.ecapa_tdnn_local(ckpt=str(path), model_config=str(options))(wavs)
    assert (low["block_4"] - out["block_4"]).norm() <= 0.03 * out["block_4"].norm()
    sum(h.square().mean() for h in upstream.train()(wavs)["hidden_states"]).backward()
    named = {n: p for n, p in upstream.named_parameters() if n.startswith("encoder.frontend.")}
    assert len(named) == {"mfcc": 0, "wave": 3}[kind]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in named.values())


def test_init_writes_them(tmp_path):
    from s3prl_speaker_upstreams.cli import main

    arguments = ["--channels", "16", "--set", "kind=mfcc", "n_mfcc=20", "deltas=1"]
    assert main(["init", str(tmp_path / "m.safetensors"), *arguments]) == 0
    assert checkpoints.load_encoder(tmp_path / "m.safetensors").frontend.cfg.width == 40
    assert main(["init", str(tmp_path / "bad.safetensors"), "--set", "kind=mfc"]) == 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="got n_mfcc=41, expected at most one for each of n_mels=40"):
        FrontendConfig(kind="mfcc", n_mels=40, n_mfcc=41)
    with pytest.raises(ConfigError, match="got kind='fbank', expected one of"):
        FrontendConfig(kind="fbank")
    with pytest.raises(ConfigError, match="got wave_stride=7, expected a divisor of hop_length=160"):
        Frontend(FrontendConfig(kind="wave", wave_stride=7))
    with pytest.raises(ConfigError, match="got 60 features per frame and a network for n_mels=80"):
        SpeakerEncoder(EcapaConfig(**SMALL), FrontendConfig(**KINDS["mfcc"]))
    with pytest.raises(ConfigError, match="got center of shape"):
        Frontend(FrontendConfig(**KINDS["wave"]), center=torch.zeros(80))
    with pytest.raises(ConfigError, match="expected one of window, mel"):
        Frontend(FrontendConfig(), center=torch.zeros(80))
