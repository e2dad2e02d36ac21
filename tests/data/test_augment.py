"""Augmentation: levels, alignment and signal-to-noise ratios are what they claim, and nothing depends on caches."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scipy.signal import fftconvolve

from s3prl_speaker_upstreams.data.augment import CODECS, AugmentConfig, Augmenter, channel_response, through_codec
from s3prl_speaker_upstreams.data.banks import NoiseBank, RirBank
from s3prl_speaker_upstreams.data.masking import mask_features
from s3prl_speaker_upstreams.errors import ConfigError

RATE = 16000


def noise(seed: int, samples: int, level: float = 0.1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, level, samples).astype(np.float32)


def write(path: Path, wav: np.ndarray, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav, rate, subtype="FLOAT")
    return path


@pytest.fixture
def room(tmp_path) -> Path:
    """Two impulse responses, one a hundredth of the other's level, direct path after 50 ms and 3 ms of something."""
    for name, level, delay in (("loud", 1.0, 800), ("soft", 0.01, 0)):
        tail = noise(len(name) + delay, 6000, 1.0) * np.exp(-np.arange(6000) / 900) * 0.2
        response = np.concatenate([np.zeros(delay), noise(1, 48, 0.05), [1.5], tail])
        write(tmp_path / "rirs" / f"{name}.wav", (response * level).astype(np.float32))
    return tmp_path / "rirs"


def test_reverberation_is_the_convolution_without_its_delay(room):
    wav = noise(0, 20000)
    bank = RirBank(str(room), RATE, max_seconds=1.0)
    for index in range(2):
        response, _ = soundfile.read(bank.files[index].path, dtype="float32")
        direct = int(np.abs(response).argmax())
        full = fftconvolve(wav, response)[direct : direct + len(wav)]
        expected = full * np.sqrt((wav**2).sum() / (full**2).sum())
        out = bank.convolve(wav, index)
        assert out.dtype == np.float32 and out.shape == wav.shape
        np.testing.assert_allclose(out, expected, atol=2e-5)
        lag = np.argmax(fftconvolve(out, wav[::-1])) - (len(wav) - 1)
        assert lag == 0


def test_levels_are_kept_whatever_the_level_of_the_response(room):
    wav = noise(0, 16000)
    for seed in range(4):
        out = Augmenter(AugmentConfig(rirs=str(room), rir_p=1.0))(wav, np.random.default_rng(seed))
        assert np.sqrt((out**2).mean()) == pytest.approx(np.sqrt((wav**2).mean()), rel=1e-4)


def test_length_of_the_response_is_limited(room):
    impulse = np.zeros(8000, dtype=np.float32)
    impulse[0] = 1
    out = RirBank(str(room), RATE, max_seconds=0.1).convolve(impulse, 0)
    assert np.abs(out[1600:]).max() < 1e-6 * np.abs(out).max() and np.abs(out[1500:1600]).max() > 0


@pytest.mark.parametrize("cache_mb", [0, 64])
def test_noise_has_the_drawn_ratio(tmp_path, cache_mb):
    write(tmp_path / "n" / "long.wav", noise(1, 50000, 0.3))
    write(tmp_path / "n" / "short.wav", noise(2, 3000, 0.001))
    wav = noise(0, 20000)
    config = AugmentConfig(noise=str(tmp_path / "n"), noise_p=1.0, snr_db=(7.0, 7.0), cache_mb=cache_mb)
    augmenter, used = Augmenter(config), set()
    for seed in range(8):
        added = augmenter(wav, np.random.default_rng(seed)) - wav
        assert 10 * np.log10((wav**2).sum() / (added**2).sum()) == pytest.approx(7.0, abs=0.01)
        used.add(bool(np.allclose(added[:3000], added[3000:6000], atol=1e-5)))
    assert used == {True, False}  # the short recording goes round


def test_result_does_not_depend_on_caches_or_history(tmp_path, room):
    for number in range(3):
        write(tmp_path / "n" / f"{number}.wav", noise(number, 40000))
    wav = noise(9, 16000)
    settings = {"noise": str(tmp_path / "n"), "rirs": str(room), "equaliser_p": 0.5, "band_p": 0.5, "gain_p": 0.5}
    cached, bare = (Augmenter(AugmentConfig(**settings, cache_mb=size)) for size in (64, 0))
    first = [cached(wav, np.random.default_rng(seed)) for seed in range(12)]
    copy = pickle.loads(pickle.dumps(cached))
    for seed in reversed(range(12)):
        for other in (cached, bare, copy):
            np.testing.assert_array_equal(other(wav, np.random.default_rng(seed)), first[seed])
    assert len({out.tobytes() for out in first}) > 8


def test_one_switch_leaves_other_decisions_alone(tmp_path):
    write(tmp_path / "n" / "a.wav", noise(1, 90000))
    wav, noise_only = noise(0, 8000), {"noise": str(tmp_path / "n"), "noise_p": 1.0}
    plain = Augmenter(AugmentConfig(**noise_only))
    louder = Augmenter(AugmentConfig(**noise_only, gain_p=1.0))
    for seed in range(3):
        one, other = plain(wav, np.random.default_rng(seed)), louder(wav, np.random.default_rng(seed))
        np.testing.assert_allclose(one / np.linalg.norm(one), other / np.linalg.norm(other), atol=1e-6)
        assert not np.allclose(one, other)


def test_input_is_left_alone_and_probability_zero_changes_nothing(room):
    wav = noise(0, 4000)
    before = wav.copy()
    out = Augmenter(AugmentConfig(rirs=str(room), rir_p=0.0))(wav, np.random.default_rng(0))
    np.testing.assert_array_equal(out, wav)
    assert out is not wav
    Augmenter(AugmentConfig.channel_randomised(None, str(room)))(wav, np.random.default_rng(0))
    np.testing.assert_array_equal(wav, before)


def test_musan_categories_and_their_ratios(tmp_path):
    for kind, level in (("noise", 0.1), ("music", 0.2), ("speech", 0.05)):
        for number in range(3):
            write(tmp_path / "musan" / kind / "corpus" / f"{number}.wav", noise(10 * len(kind) + number, 30000, level))
    ratios = {"snr_db": (0.0, 0.0), "music_snr_db": (20.0, 20.0), "speech_snr_db": (40.0, 40.0)}
    config = AugmentConfig(noise=str(tmp_path / "musan"), noise_p=1.0, **ratios)
    bank = NoiseBank(config, RATE)
    assert {kind: len(members) for kind, members in bank.categories.items()} == {"noise": 3, "music": 3, "speech": 3}
    wav, found = noise(0, 10000), set()
    for seed in range(30):
        added = bank.add(wav, np.random.default_rng(seed)) - wav
        found.add(round(float(10 * np.log10((wav**2).sum() / (added**2).sum()))))
    assert found == {0, 20, 40}


def test_rirs_noises_layout(tmp_path):
    root = tmp_path / "RIRS_NOISES"
    click = np.eye(1, 100, dtype=np.float32)[0]
    write(root / "simulated_rirs" / "smallroom" / "Room001" / "Room001-00001.wav", click)
    write(root / "real_rirs_isotropic_noises" / "RVB2014_type1_rir_largeroom1_far_angla.wav", click)
    write(root / "real_rirs_isotropic_noises" / "RVB2014_type1_noise_largeroom1_1.wav", noise(0, 4000))
    write(root / "pointsource_noises" / "noise-free-sound-0000.wav", noise(1, 4000))
    assert len(RirBank(str(root), RATE)) == 2
    bank = NoiseBank(AugmentConfig(noise=str(root)), RATE)
    assert [Path(item.path).name for item in bank.files] == ["noise-free-sound-0000.wav"]


def test_other_rates_and_channels_of_noise_and_responses(tmp_path):
    write(tmp_path / "n.wav", np.stack([noise(0, 90000), np.zeros(90000, np.float32)], 1), 44100)
    response = np.zeros(400, dtype=np.float32)
    response[[20, 220]] = 1.0, 0.5
    write(tmp_path / "r.wav", response, 8000)
    wav = noise(3, 8000)
    out = Augmenter(AugmentConfig(noise=[str(tmp_path / "n.wav")], noise_p=1.0, cache_mb=0))(
        wav, np.random.default_rng(0)
    )
    assert out.shape == wav.shape and not np.allclose(out, wav)
    impulse = np.zeros(2000, dtype=np.float32)
    impulse[100] = 1
    echoed = np.abs(RirBank([str(tmp_path / "r.wav")], RATE).convolve(impulse, 0))
    assert echoed.argmax() == 100 and echoed[300:].argmax() + 300 == 500  # 200 samples at 8 kHz are 400 at 16


def test_file_that_vanishes_while_running_is_counted(tmp_path, caplog):
    path = write(tmp_path / "n.wav", noise(0, 8000))
    augmenter = Augmenter(AugmentConfig(noise=[str(path)], noise_p=1.0))
    path.unlink()
    wav = noise(1, 4000)
    for seed in range(3):
        np.testing.assert_array_equal(augmenter(wav, np.random.default_rng(seed)), wav)
    assert sum(augmenter.faults.values()) == 3 and caplog.text.count("left out") == 1


def test_band_limit_and_channel_response():
    wav = noise(0, 32000)
    out = Augmenter(AugmentConfig(band_limit_hz=4000.0))(wav, np.random.default_rng(0))
    power = np.abs(np.fft.rfft(out)) ** 2
    hertz = np.fft.rfftfreq(len(out), 1 / RATE)
    assert power[hertz > 4050].mean() < 1e-4 * power[hertz < 3600].mean()
    np.testing.assert_array_equal(Augmenter(AugmentConfig(band_limit_hz=8000.0))(wav, np.random.default_rng(0)), wav)

    response = channel_response(RATE, low_hz=400, high_hz=2000, bins=8001)
    assert 20 * np.log10(response[[400, 2000]]) == pytest.approx([-3.01, -3.01], abs=0.2)
    assert response[100] < 0.01 and response[4000] < 0.01 and response[1000] == pytest.approx(1, abs=0.01)
    flat = channel_response(RATE, equaliser_db=[6.0] * 8, bins=100)
    np.testing.assert_allclose(20 * np.log10(flat), 6.0, atol=1e-4)


def test_channel_randomisation_differs_by_utterance_and_hides_the_spectrum(speech):
    config = AugmentConfig.channel_randomised(str(speech / "noise"), str(speech / "rirs"))
    augmenter, wav = Augmenter(config), noise(0, 48000)
    spectra = []
    for seed in range(10):
        out = augmenter(wav, np.random.default_rng(seed))
        power = (np.abs(np.fft.rfft(out)[1200:7200]) ** 2).reshape(20, -1).mean(1)  # 400 to 2400 Hz
        spectra.append(10 * np.log10(power))
    assert np.std(spectra, axis=0).mean() > 3  # dB


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rir_p": 1.5}, "rir_p: got 1.5"),
        ({"snr_db": (15, 0)}, "snr_db: got .* smaller one first"),
        ({"snr": 3}, "unknown augmentation key 'snr'; known: noise, rirs"),
        ({"max_rir_seconds": 0}, "max_rir_seconds"),
    ],
)
def test_bad_configuration(values, message):
    with pytest.raises(ConfigError, match=message):
        AugmentConfig.from_dict(values)


def test_configuration_round_trip_and_missing_folder(tmp_path):
    config = AugmentConfig(noise="somewhere", snr_db=[3, 9], rirs=[Path("a.wav"), "b.wav"])
    assert AugmentConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="expected a folder or list of noise files"):
        Augmenter(AugmentConfig(noise=str(tmp_path / "absent")))


# ------------------------------------------------------------------------------------------------ codecs and masks
@pytest.mark.parametrize("codec", CODECS)
def test_codecs_keep_length_place_and_level(codec):
    rng = np.random.default_rng(0)
    time = np.arange(16001) / 16000
    wav = (3.0 * np.sin(2 * np.pi * 400 * time * (1 + time)) * (time > 0.3)).astype(np.float32)  # beyond +-1
    coded = through_codec(wav + 1e-3 * rng.normal(size=len(wav)).astype(np.float32), codec, 16000)
    assert coded.shape == wav.shape and coded.dtype == np.float32
    assert np.abs(coded[:4000]).max() < 0.5 < np.abs(coded[6000:]).max()
    correlation = float(np.dot(wav, coded) / np.linalg.norm(wav) / np.linalg.norm(coded))
    assert correlation > 0.95 and np.linalg.norm(coded) == pytest.approx(np.linalg.norm(wav), rel=0.15)
    assert not np.array_equal(coded, wav)
    assert not through_codec(np.zeros(100, dtype=np.float32), codec, 16000).any()


def test_a_codec_changes_nothing_else_and_is_drawn():
    wav = np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32)
    plain, coded = (
        Augmenter(AugmentConfig(gain_p=1.0)),
        Augmenter(AugmentConfig(gain_p=1.0, codec_p=1.0, codecs="ulaw")),
    )
    one, other = (augment(wav, np.random.default_rng(3)) for augment in (plain, coded))
    np.testing.assert_allclose(other, through_codec(one, "ulaw", 16000))
    some = Augmenter(AugmentConfig(codec_p=0.5, codecs=("ulaw",)))
    changed = [not np.array_equal(some(wav, np.random.default_rng(seed)), wav) for seed in range(60)]
    assert 15 < sum(changed) < 45
    with pytest.raises(ConfigError, match="codecs: got .'wma'.*ulaw"):
        AugmentConfig(codecs=("wma",))


def test_masks_depend_on_the_utterance_alone_and_hide_spans():
    import torch

    config = AugmentConfig(mask_p=1.0, time_masks=2, time_frames=12, mel_masks=1, mel_bands=6)
    x = torch.ones(50, 100, 40)
    ids = [f"u{number}" for number in range(50)]
    masked = mask_features(x, config, ids=ids, epoch=1, seed=0, purpose="crop 0")
    part = mask_features(x[:7], config, ids=ids[20:27], epoch=1, seed=0, purpose="crop 0")
    assert torch.equal(masked[20:27], part) and x.min() == 1
    frames, bands = (masked == 0).all(2).sum(1), (masked == 0).all(1).sum(1)
    assert 0 < frames.float().mean() < 13 and frames.max() <= 24 and bands.max() <= 6
    other = mask_features(x, config, ids=ids, epoch=2, seed=0, purpose="crop 0")
    assert not torch.equal(masked, other)
    rare = mask_features(x, AugmentConfig(mask_p=0.2), ids=ids, epoch=0, seed=0)
    assert 2 < int((rare == 0).any(2).any(1).sum()) < 20
