"""Front-ends against the originals' features, at every length, and on bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from s3prl_speaker_upstreams.ecapa import DIALECTS, Frontend
from s3prl_speaker_upstreams.errors import BadWaveform, ConfigError

pytestmark = pytest.mark.compat

GOLDENS = {
    "speechbrain_ecapa": "speechbrain",
    "3dspeaker_sup": "3dspeaker",
    "3dspeaker_rdino": "rdino",
    "3dspeaker_sdpn": "rdino",
    "sslsv_dino_hamming": "sslsv",
    "sslsv_dino_hann": "sslsv_hann",
    "tao": "taoruijie",
    "wespeaker_dino_avg": "wespeaker",
    "wespeaker_native_mfa1536": "wespeaker",
    "wespeaker_sup": "wespeaker",
    "wespeaker_sup_noglob": "wespeaker",
}


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", GOLDENS)
def test_features_are_those_of_the_original(goldens, name):
    cases = torch.load(goldens / f"{name}.golden.pt", weights_only=True)["cases"]
    frontend = Frontend(DIALECTS[GOLDENS[name]].frontend)
    wavs = [case["wave_int16"].float() / 32768 for case in cases]
    raw, features = frontend.log_mel(wavs).split(), frontend(wavs).split()
    compared = 0
    for i, case in enumerate(cases):
        for key, got in (("features_raw", raw[i]), ("features", features[i])):
            if key in case:
                assert got.shape == case[key].shape
                # The limits of the goldens are 3e-4 (Kaldi) and 2e-5; the originals' order of operations does better.
                assert relative(got, case[key]) <= 1e-5, (key, case["name"])
                compared += 1
    assert compared >= 4


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("samples", [1, 2, 100, 159, 160, 200, 201, 256, 257, 399, 400, 401, 559, 560, 800, 16000])
def test_every_length_gives_finite_features_of_the_announced_size(dialect, samples, speechlike):
    frontend = Frontend(DIALECTS[dialect].frontend)
    features = frontend([speechlike(samples)])
    assert features.lengths == [len(features.data)] == [frontend.frames(samples)]
    assert features.data.isfinite().all()


def expected_by_s3prl(samples: int, rate: int) -> tuple[int, int]:
    """Frames that s3prl wants: (classic Featurizer, S3PRLUpstream)."""
    return round(samples / rate), math.ceil(samples / rate)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("stride", [1, 2])
def test_frame_counts_pass_s3prls_checks_at_every_length(dialect, stride):
    frontend = Frontend(DIALECTS[dialect].frontend)
    rate = 160 * stride
    for samples in range(1, 16001):
        frames = -(-frontend.frames(samples) // stride)
        classic, wanted = expected_by_s3prl(samples, rate)
        assert abs(frames - classic) < 5, samples
        # The expert repeats last frames up to the classic count; S3PRLUpstream pads its input to 800 samples before.
        frames = max(frames, classic)
        if samples >= 800:
            assert max(frames, wanted) // min(frames, wanted) == 1, samples


def test_framed_dialects_complete_short_input_with_zeros(speechlike):
    frontend = Frontend(DIALECTS["wespeaker"].frontend)
    wav = speechlike(350)
    completed = torch.nn.functional.pad(wav, (0, 50))
    assert torch.equal(frontend.log_mel([wav]).data, frontend.log_mel([completed]).data)


@pytest.mark.parametrize("samples", [1, 2, 3, 57, 199, 200])
def test_centred_dialects_fold_the_reflection_back(samples, speechlike):
    frontend = Frontend(DIALECTS["rdino"].frontend)
    wav = speechlike(samples, seed=3) + 0.01
    padded = np.pad(wav.numpy(), 256, mode="reflect" if samples > 1 else "edge")
    spectrum = torch.stft(torch.from_numpy(padded), 512, 160, 400, frontend.window, center=False, return_complex=True)
    expected = ((spectrum.abs() ** 2).t() @ frontend.mel + 1e-6).log()
    assert relative(frontend.log_mel([wav]).data, expected) < 1e-5


def test_utterances_do_not_touch_each_other(speechlike):
    for dialect in DIALECTS:
        frontend = Frontend(DIALECTS[dialect].frontend)
        wavs = [speechlike(n, seed=n) for n in (1, 291, 700, 64000, 16000)]
        together = frontend(wavs).split()
        for wav, features in zip(wavs, together, strict=True):
            alone = frontend([wav]).data
            assert (features - alone).abs().max() <= 1e-6 * alone.abs().max().clamp(min=1e-30), (dialect, len(wav))


def test_buffers_of_a_checkpoint_replace_the_computed_ones():
    cfg = DIALECTS["sslsv"].frontend
    own = Frontend(cfg)
    assert not own.state_dict()
    given = Frontend(cfg, window=own.window * 2, mel=own.mel)
    assert set(given.state_dict()) == {"window", "mel"}
    wav = torch.randn(4000)
    difference = given.log_mel([wav]).data - own.log_mel([wav]).data
    torch.testing.assert_close(difference, torch.full_like(difference, math.log(4)), atol=1e-3, rtol=0)
    with pytest.raises(ConfigError, match=r"got window of shape \(512,\), expected \(400,\)"):
        Frontend(cfg, window=torch.ones(512))


@pytest.mark.parametrize(
    "wavs",
    [[], [torch.zeros(0)], [torch.zeros(2, 100)], [torch.zeros(100, dtype=torch.int16)], [torch.tensor(0.0)]],
)
def test_bad_waveforms_are_refused(wavs):
    with pytest.raises(BadWaveform, match=r"got .*, expected"):
        Frontend(DIALECTS["speechbrain"].frontend)(wavs)
