"""Labels that any corpus can have: known changes made to every recording, and numbers computed from it.

A change (`made:KIND`) is drawn by (seed, utterance, kind), so it is the same in every process, whatever else is probed;
each keeps the words and the speaker. The probe must name the condition:

    channel   clean, telephone (300 to 3,400 Hz, 8 kHz, mu-law), room (an exponentially decaying response of 0.3 to
              0.8 s, or a recorded one), equaliser (three random bands of up to 12 dB), mp3, vorbis, gsm (soundfile)
    snr       noise at 0, 10, 20 or 30 dB below the speech (pink, or recorded noise)
    tempo     0.8, 0.9, 1, 1.1 or 1.25 times as fast, pitch kept (WSOLA)
    pitch     -4, -2, 0, 2 or 4 semitones, tempo kept (WSOLA, then resampling: formants move along)
    level     0, 10, 20 or 30 dB quieter

Except for `level` the loudness (RMS) stays as it was: it must not give the condition away.

A computed number (`computed:KIND`) needs no change: `f0` (octaves above 1 Hz, voiced frames), `energy` (dB of 25 ms),
`speaking_rate` (syllable nuclei per second of speech), `position` (0 at the begin, 1 at the end of the utterance).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from cka_addon.audio import SAMPLE_RATE
from cka_addon.errors import require
from cka_addon.probe.errors import LabelError

CONDITIONS: dict[str, tuple[str, ...]] = {
    "channel": ("clean", "telephone", "room", "equaliser", "mp3", "vorbis", "gsm"),
    "snr": ("0 dB", "10 dB", "20 dB", "30 dB"),
    "tempo": ("0.8", "0.9", "1", "1.1", "1.25"),
    "pitch": ("-4", "-2", "0", "2", "4"),
    "level": ("0 dB", "-10 dB", "-20 dB", "-30 dB"),
}
COMPUTED = {"f0": "frame", "energy": "frame", "speaking_rate": "utterance", "position": "frame"}
_CODECS = {"mp3": ("MP3", "MPEG_LAYER_III", 16000), "vorbis": ("OGG", "VORBIS", 16000), "gsm": ("WAV", "GSM610", 8000)}
_STEP = 0.01  # seconds between computed values


@dataclass(frozen=True)
class Material:
    """Recorded noises and room responses to use instead of made ones. noise, rooms : folders, or None."""

    noise: str | None = None
    rooms: str | None = None


def _rng(seed: int, utterance: str, kind: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}|{utterance}|{kind}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def check_kind(kind: str | None, table: Sequence[str] | dict, prefix: str) -> str:
    """The kind, or LabelError naming the ones there are."""
    if kind is None or kind not in table:
        raise LabelError(f"got labels '{prefix}:{kind}'; expected {prefix}: and one of {', '.join(table)}")
    return kind


def condition(kind: str, utterance: str, seed: int) -> str:
    """The condition of an utterance.

    >>> condition("tempo", "a", 0) == condition("tempo", "a", 0)
    True
    """
    names = CONDITIONS[check_kind(kind, CONDITIONS, "made")]
    return names[int(_rng(seed, utterance, kind).integers(len(names)))]


def change(wav: np.ndarray, kind: str, utterance: str, seed: int, material: Material | None = None) -> np.ndarray:
    """The recording in its condition. wav : (samples,) float32 at 16 kHz -> (samples,) float32.

    >>> wav = np.random.default_rng(0).standard_normal(16000).astype("float32") / 10
    >>> loud = [float(np.sqrt(np.mean(change(wav, "snr", name, seed=0) ** 2))) for name in "abc"]
    >>> bool(np.allclose(loud, np.sqrt(np.mean(wav**2)), rtol=0.001))
    True
    """
    name = condition(kind, utterance, seed)
    rng = _rng(seed, utterance, kind)
    rng.integers(len(CONDITIONS[kind]))  # the draw of the condition itself
    material = material or Material()
    x = wav.astype(np.float64)
    if kind == "level":
        return (x * 10 ** (float(name.split()[0]) / 20)).astype(np.float32)
    y: np.ndarray
    if kind == "channel":
        y = _CHANNELS[name](x, rng, material)
    elif kind == "snr":
        noise = _recorded(material.noise, len(x), rng) if material.noise else _pink(len(x), rng)
        y = x + noise * (_rms(x) / _rms(noise)) * 10 ** (-float(name.split()[0]) / 20)
    elif kind == "tempo":
        y = _wsola(x, 1 / float(name))
    else:
        y = _pitch(x, float(name))
    y = y * (_rms(x) / max(_rms(y), 1e-12))
    return y.astype(np.float32)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) + 1e-12


def _pink(n: int, rng: np.random.Generator) -> np.ndarray:
    spectrum = np.fft.rfft(rng.standard_normal(n))
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1))
    spectrum[0] = 0
    return np.fft.irfft(spectrum, n)


@cache
def _files(folder: str) -> tuple[tuple[str, str], ...]:
    from cka_addon import audio

    return tuple((name, str(path)) for name, path in audio.list_paths(folder))


def _read(folder: str, rng: np.random.Generator) -> np.ndarray:
    from cka_addon import audio

    names = _files(folder)
    name, path = names[int(rng.integers(len(names)))]
    return audio.load(audio.Recording(name, Path(path)))[0].double().numpy()


def _recorded(folder: str, n: int, rng: np.random.Generator) -> np.ndarray:
    noise = _read(folder, rng)
    noise = np.tile(noise, -(-(n + 1) // len(noise)))
    start = int(rng.integers(len(noise) - n + 1))
    return noise[start : start + n]


def _clean(x: np.ndarray, rng: np.random.Generator, material: Material) -> np.ndarray:
    return x


def _telephone(x: np.ndarray, rng: np.random.Generator, material: Material) -> np.ndarray:
    import soxr
    from scipy.signal import butter, sosfiltfilt

    low = soxr.resample(x, SAMPLE_RATE, 8000)
    low = sosfiltfilt(butter(4, [300, 3400], "bandpass", fs=8000, output="sos"), low)
    peak = np.abs(low).max() + 1e-12
    squeezed = np.sign(low) * np.log1p(255 * np.abs(low) / peak) / np.log(256)
    squeezed = np.round(squeezed * 127) / 127
    wide = np.sign(squeezed) * np.expm1(np.abs(squeezed) * np.log(256)) / 255 * peak
    return _same_length(soxr.resample(wide, 8000, SAMPLE_RATE), len(x))


def _room(x: np.ndarray, rng: np.random.Generator, material: Material) -> np.ndarray:
    from scipy.signal import fftconvolve

    if material.rooms:
        response = _read(material.rooms, rng)
        response = response[int(np.abs(response).argmax()) :]
    else:
        decay = float(rng.uniform(0.3, 0.8))
        t = np.arange(int(decay * SAMPLE_RATE)) / SAMPLE_RATE
        response = 0.05 * rng.standard_normal(len(t)) * 10 ** (-3 * t / decay)
        response[: int(0.002 * SAMPLE_RATE)] = 0
        response[0] = 1.0
    return fftconvolve(x, response)[: len(x)]


def _equaliser(x: np.ndarray, rng: np.random.Generator, material: Material) -> np.ndarray:
    spectrum = np.fft.rfft(x)
    octave = np.log2(np.maximum(np.fft.rfftfreq(len(x), 1 / SAMPLE_RATE), 20.0))
    gain = np.zeros(len(octave))
    for _ in range(3):
        centre = rng.uniform(np.log2(100), np.log2(7000))
        height = rng.choice([-1, 1]) * rng.uniform(6, 12)
        gain += height * np.exp(-0.5 * ((octave - centre) / rng.uniform(0.3, 0.8)) ** 2)
    return np.fft.irfft(spectrum * 10 ** (gain / 20), len(x))


def _codec(name: str) -> Callable[[np.ndarray, np.random.Generator, Material], np.ndarray]:
    sort, subtype, rate = _CODECS[name]

    def run(x: np.ndarray, rng: np.random.Generator, material: Material) -> np.ndarray:
        import soundfile
        import soxr

        if sort not in soundfile.available_formats() or subtype not in soundfile.available_subtypes(sort):
            raise LabelError(
                f"made:channel needs the codec {name}, which this soundfile (libsndfile "
                f"{soundfile.__libsndfile_version__}) has not; expected 1.1 or newer: pip install -U soundfile"
            )
        y = soxr.resample(x, SAMPLE_RATE, rate) if rate != SAMPLE_RATE else x
        peak = np.abs(y).max() + 1e-12
        file = io.BytesIO()
        soundfile.write(file, y / peak * 0.5, rate, format=sort, subtype=subtype)
        file.seek(0)
        back, _ = soundfile.read(file, dtype="float64")
        back = soxr.resample(back, rate, SAMPLE_RATE) if rate != SAMPLE_RATE else back
        return _realign(back * peak * 2, x)

    return run


_CHANNELS: dict[str, Callable[[np.ndarray, np.random.Generator, Material], np.ndarray]] = {
    "clean": _clean,
    "telephone": _telephone,
    "room": _room,
    "equaliser": _equaliser,
    **{name: _codec(name) for name in _CODECS},
}


def _same_length(y: np.ndarray, n: int) -> np.ndarray:
    return np.pad(y, (0, max(0, n - len(y))))[:n]


def _realign(y: np.ndarray, x: np.ndarray, most: int = 4000) -> np.ndarray:
    """Take a codec's delay away: the shift of up to `most` samples at which it is most like the original."""
    from scipy.signal import correlate

    y = _same_length(y, len(x) + most)
    lag = int(correlate(y, x, mode="full", method="fft")[len(x) - 1 : len(x) - 1 + most].argmax())
    return y[lag : lag + len(x)]


def _wsola(x: np.ndarray, stretch: float) -> np.ndarray:
    """`stretch` times as long, pitch kept: windows of 32 ms, moved by up to 10 ms to fit the one before."""
    tsm = require("pytsmod", "pip install pytsmod", "made:tempo and made:pitch")
    return np.asarray(tsm.wsola(x, stretch, win_size=512, syn_hop_size=256, tolerance=160), np.float64).reshape(-1)


def _pitch(x: np.ndarray, semitones: float) -> np.ndarray:
    import soxr

    ratio = 2 ** (semitones / 12)
    return _same_length(soxr.resample(_wsola(x, ratio), SAMPLE_RATE * ratio, SAMPLE_RATE), len(x))


# -- computed numbers ------------------------------------------------------------------------------------------------
def compute_number(wav: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Values of one recording: (times in seconds, values), NaN where there is none; one value for `speaking_rate`.

    >>> tone = np.sin(2 * np.pi * 200 * np.arange(16000) / 16000).astype("float32")
    >>> times, values = compute_number(tone, "energy")
    >>> len(times), round(float(np.median(values)), 2)
    (100, -3.01)
    """
    check_kind(kind, COMPUTED, "computed")
    seconds = len(wav) / SAMPLE_RATE
    times = np.arange(max(1, int(seconds / _STEP))) * _STEP + _STEP / 2
    if kind == "position":
        return times, times / seconds
    if kind == "energy":
        return times, _energy(wav, times)
    if kind == "f0":
        return _f0(wav)
    return np.array([seconds / 2]), np.array([_speaking_rate(wav)])


def _energy(wav: np.ndarray, times: np.ndarray, window: float = 0.025) -> np.ndarray:
    total = np.concatenate([[0.0], np.cumsum(np.square(wav, dtype=np.float64))])
    half = window / 2
    first = np.clip(((times - half) * SAMPLE_RATE).astype(int), 0, len(wav))
    last = np.clip(((times + half) * SAMPLE_RATE).astype(int), 0, len(wav))
    power = (total[last] - total[first]) / np.maximum(last - first, 1)
    return 10 * np.log10(np.maximum(power, 1e-10))


def _f0(wav: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import librosa

    hop = int(_STEP * SAMPLE_RATE)
    f0, voiced, _ = librosa.pyin(
        wav.astype(np.float64), fmin=60, fmax=500, sr=SAMPLE_RATE, frame_length=1024, hop_length=hop, resolution=0.1
    )
    # Frames are centred (pyin pads by half a frame).
    return np.arange(len(f0)) * _STEP, np.where(voiced, np.log2(np.maximum(f0, 1e-6)), np.nan)


def _speaking_rate(wav: np.ndarray) -> float:
    """Syllable nuclei per second of speech: peaks of the energy between 300 and 3,000 Hz (de Jong and Wempe, 2009)."""
    from scipy.signal import butter, find_peaks, sosfiltfilt

    band = sosfiltfilt(butter(2, [300, 3000], "bandpass", fs=SAMPLE_RATE, output="sos"), wav.astype(np.float64))
    times = np.arange(max(1, int(len(wav) / SAMPLE_RATE / _STEP))) * _STEP
    level = _energy(band, times, window=0.064)
    loud = level > np.quantile(level, 0.95) - 25
    peaks, _ = find_peaks(level, prominence=2.0, distance=6)
    speech = max(float(loud.sum()) * _STEP, _STEP)
    return float(loud[peaks].sum()) / speech
