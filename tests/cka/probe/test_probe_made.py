"""Made labels: seeded, speech stays, loudness does not tell; computed numbers are what they say."""

import numpy as np
import pytest

from cka_addon.probe import made
from cka_addon.probe.errors import LabelError

RATE = 16000


def speechlike(seconds=1.2, pitch=140.0, seed=0):
    """Harmonics with a syllable-like envelope: 4 bursts a second."""
    t = np.arange(int(seconds * RATE)) / RATE
    x = sum(np.sin(2 * np.pi * pitch * k * t) / k for k in range(1, 12))
    x = x * (0.05 + np.sin(np.pi * 4 * t) ** 4) + 0.003 * np.random.default_rng(seed).standard_normal(len(t))
    return (0.1 * x).astype(np.float32)


def each(kind):
    """One utterance name per condition."""
    found = {}
    for i in range(400):
        found.setdefault(made.condition(kind, f"u{i}", 0), f"u{i}")
    assert set(found) == set(made.CONDITIONS[kind])
    return found


def rms(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@pytest.mark.parametrize("kind", sorted(made.CONDITIONS))
def test_conditions_are_seeded_keep_loudness_and_length(kind):
    if kind in ("tempo", "pitch"):
        pytest.importorskip("pytsmod")
    wav = speechlike()
    for name, utterance in each(kind).items():
        changed = made.change(wav, kind, utterance, 0)
        assert np.array_equal(changed, made.change(wav, kind, utterance, 0)) and np.isfinite(changed).all()
        wanted = len(wav) / float(name) if kind == "tempo" else len(wav)
        assert abs(len(changed) - wanted) <= 300, name
        level = rms(changed) / rms(wav)
        assert level == pytest.approx(10 ** (float(name.split()[0]) / 20) if kind == "level" else 1.0, rel=1e-3), name
    counts = [made.condition(kind, f"u{i}", 5) for i in range(700)]
    share = 700 / len(made.CONDITIONS[kind])
    assert all(0.6 * share < counts.count(c) < 1.4 * share for c in made.CONDITIONS[kind])


def test_channels_do_what_they_say():
    wav = speechlike()
    noise = (0.1 * np.random.default_rng(0).standard_normal(RATE)).astype(np.float32)
    names = each("channel")
    assert np.array_equal(made.change(wav, "channel", names["clean"], 0), wav)
    phone = np.abs(np.fft.rfft(made.change(noise, "channel", names["telephone"], 0)))
    hertz = np.fft.rfftfreq(RATE, 1 / RATE)
    inside = np.median(phone[(hertz > 500) & (hertz < 3000)])
    assert np.median(phone[hertz > 4500]) < 0.02 * inside and np.median(phone[hertz < 100]) < 0.2 * inside
    for name in ("mp3", "vorbis", "gsm"):
        coded = made.change(wav, "channel", names[name], 0)
        # The delay of the codec is taken away: labels with times keep their place.
        assert np.corrcoef(wav, coded)[0, 1] > 0.9 and not np.array_equal(coded, wav), name


def test_noise_is_as_loud_as_it_says():
    wav = speechlike()
    for name, utterance in each("snr").items():
        changed = made.change(wav, "snr", utterance, 0).astype(np.float64)
        scale = float(changed @ wav) / float(wav.astype(np.float64) @ wav)
        found = 20 * np.log10(rms(scale * wav) / rms(changed - scale * wav))
        assert found == pytest.approx(float(name.split()[0]), abs=1.0)


def test_tempo_keeps_pitch_and_pitch_keeps_tempo():
    pytest.importorskip("pytsmod")
    wav = speechlike()

    def pitch(x):
        spectrum = np.abs(np.fft.rfft(x * np.hanning(len(x)), 1 << 17))
        hertz = np.fft.rfftfreq(1 << 17, 1 / RATE)
        near = (hertz > 90) & (hertz < 220)
        return float(hertz[near][spectrum[near].argmax()])

    fast = made.change(wav, "tempo", each("tempo")["1.25"], 0)
    assert pitch(fast) == pytest.approx(140, rel=0.03)
    assert made.compute_number(fast, "speaking_rate")[1][0] > 1.1 * made.compute_number(wav, "speaking_rate")[1][0]
    high = made.change(wav, "pitch", each("pitch")["4"], 0)
    assert len(high) == len(wav) and pitch(high) == pytest.approx(140 * 2 ** (4 / 12), rel=0.03)


def test_recorded_material_is_used(tmp_path):
    import soundfile

    soundfile.write(tmp_path / "n.wav", np.sin(np.arange(8000) * 2.0), RATE)
    wav, utterance = speechlike(), each("snr")["0 dB"]
    changed = made.change(wav, "snr", utterance, 0, made.Material(noise=str(tmp_path)))
    spectrum, hertz = np.abs(np.fft.rfft(changed)), np.fft.rfftfreq(len(wav), 1 / RATE)
    high = hertz > 4000  # the tone of the noise lies above the harmonics of the speech
    assert abs(hertz[high][spectrum[high].argmax()] - 2.0 * RATE / 2 / np.pi) < 20


def test_computed_numbers():
    wav = speechlike(pitch=200.0)
    times, octaves = made.compute_number(wav, "f0")
    assert 2 ** float(np.nanmedian(octaves)) == pytest.approx(200, rel=0.01)
    times, level = made.compute_number(np.concatenate([np.zeros(8000, np.float32), wav]), "energy")
    assert level[times < 0.45].max() < -90 and np.median(level[times > 0.6]) > -50
    times, place = made.compute_number(wav, "position")
    assert place[0] < 0.01 and place[-1] > 0.99
    assert made.compute_number(wav, "speaking_rate")[1][0] > 3
    with pytest.raises(LabelError, match="computed: and one of f0, energy"):
        made.compute_number(wav, "jitter")
