"""Training on MFCC and on waveforms through filters that are trained with the network."""

import pytest
import torch

from s3prl_speaker_upstreams.checkpoints import load_encoder
from s3prl_speaker_upstreams.ecapa.wave import FILTERS, GaborBank
from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.pretrain.export import average_checkpoints, export

MFCC = ("model.frontend.kind=mfcc", "model.frontend.n_mfcc=20", "model.frontend.deltas=1", "model.ecapa.n_mels=40")
WAVE = ("model.frontend.kind=wave",)


@pytest.mark.parametrize("method", ["dino", "supervised"])
@pytest.mark.parametrize("kind", ["mfcc", "wave"])
def test_a_run_trains_exports_and_goes_on(corpus, tmp_path, make, kind, method):
    extra = {"mfcc": MFCC, "wave": WAVE}[kind]
    extra = (*extra, f"method={method}", *(["data.crops=single"] if method == "supervised" else []))
    trainer = make(corpus, tmp_path / "run", *extra)
    trainer.run(stop_after=4)
    make(corpus, tmp_path / "run", *extra).run(stop_after=6)  # resumed
    path = export(tmp_path / "run", tmp_path / "model.safetensors")
    encoder = load_encoder(path)
    assert encoder.frontend.cfg.kind == kind and encoder.ecapa.cfg.n_mels == encoder.frontend.cfg.width
    wav = [0.1 * torch.randn(9000, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        expected = make(corpus, tmp_path / "run", *extra)
        expected.run(stop_after=6)
        told = expected.encoder()(wav, ("embedding",))["embedding"]
        assert torch.equal(encoder(wav, ("embedding",))["embedding"], told)
    if kind == "wave":
        start = GaborBank(encoder.frontend.cfg)
        bank = encoder.frontend.bank
        moved = [name for name in FILTERS if not torch.equal(getattr(bank, name), getattr(start, name))]
        assert moved == list(FILTERS), "the filters were trained, and exported as trained"
        started = make(corpus, tmp_path / "next", f"method={method}", *extra[2:], f"model.init={path}")
        started.run(stop_after=0)
        assert torch.equal(started.encoder().frontend.bank.center, encoder.frontend.bank.center)
    averaged = load_encoder(average_checkpoints([tmp_path / "run"], tmp_path / "mean.safetensors", last=2))
    assert averaged.frontend.cfg == encoder.frontend.cfg


def test_masks_of_features_are_refused_with_filters_that_are_trained(corpus, tmp_path, make):
    with pytest.raises(ConfigError, match="expected 0 with kind=wave"):
        make(corpus, tmp_path, *WAVE, "data.augment.mask_p=0.5")
