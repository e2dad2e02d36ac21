"""Noise, reverberation and channel: what makes two crops of one utterance sound different.

Everything random comes from the generator that is passed in, and is drawn in a fixed order, so the result depends on
nothing but the waveform and the generator: not on caches, workers or the order of the utterances.

Equaliser, band and band limit are one multiplication of one spectrum; noise and rooms come from :mod:`.banks`.

The signal path is that of a recording: speech in a room, noise added, then the channel, then a codec.

>>> import numpy
>>> augmenter = Augmenter(AugmentConfig(band_limit_hz=4000.0))
>>> wav = numpy.random.default_rng(0).normal(0, 0.1, 16000).astype("float32")
>>> limited = augmenter(wav, numpy.random.default_rng(1))
>>> bool(abs(numpy.fft.rfft(limited))[4200:].max() < 1e-2 * abs(numpy.fft.rfft(limited))[:3600].max())
True
"""

from __future__ import annotations

import io
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import scipy  # its parts are loaded at first use

from s3prl_speaker_upstreams.common.audio import resample
from s3prl_speaker_upstreams.data.banks import NoiseBank, RirBank, at_level_of
from s3prl_speaker_upstreams.errors import BadWaveform, ConfigError

__all__ = ["CODECS", "AugmentConfig", "Augmenter", "channel_response", "through_codec"]

log = logging.getLogger(__name__)

# Codecs that libsndfile writes and reads back without delay: container, coding, and the rate that they are used at.
CODECS = {
    "ulaw": ("WAV", "ULAW", 8000),
    "alaw": ("WAV", "ALAW", 8000),
    "gsm": ("WAV", "GSM610", 8000),
    "vorbis": ("OGG", "VORBIS", 16000),
    "opus": ("OGG", "OPUS", 16000),
    "mp3": ("MP3", "MPEG_LAYER_III", 16000),
}


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to a crop, and how often. Levels of the speech itself are kept unless ``gain_p`` says otherwise.

    Attributes
    ----------
    noise : folder, list file or paths, optional
        Recordings of noise. A MUSAN folder (``noise/``, ``music/``, ``speech/`` below it) is recognised and gets an SNR
        range per category; ``pointsource_noises`` of RIRS_NOISES as well; any other folder is all ``noise``.
    rirs : folder, list file or paths, optional
        Room impulse responses; of a RIRS_NOISES folder the noises are left aside.
    noise_p, rir_p : float
        How likely a crop gets noise; how likely it is reverberated.
    snr_db, music_snr_db, speech_snr_db : (float, float)
        Range of signal-to-noise ratios in dB, by category. ``snr_db`` holds for everything outside MUSAN. The defaults
        are those of the Kaldi x-vector recipes (babble 13 to 20, music 5 to 15, noise 0 to 15).
    babble : (int, int)
        How many recordings of the ``speech`` category are summed to babble.
    max_rir_seconds : float
        Impulse responses are cut there, counted from the direct path.
    band_limit_hz, band_limit_p : float or None, float
        Low-pass as a recording at twice this rate would have it (4000 Hz: telephone speech).
    equaliser_p, equaliser_db : float
        How likely, and the range +-dB of, a smooth random frequency response.
    band_p, band_low_hz, band_high_hz : float, (float, float), (float, float)
        How likely a random pass band, and the ranges its lower and upper edge are drawn from, in Hz.
    gain_p, gain_db : float
        How likely, and the range +-dB of, a change of level.
    codec_p, codecs : float, names in ``CODECS``
        How likely a crop is coded and decoded, and by which, drawn with equal chance: telephone (``ulaw``, ``alaw``,
        ``gsm``, at 8 kHz) or compressed files (``vorbis``, ``mp3``, and ``opus``, which takes ten times as long).
    mask_p, time_masks, time_frames, mel_masks, mel_bands : float, int
        How likely the features of a crop are masked (SpecAugment, arXiv 1904.08779), by how many masks of up to how
        many frames and mel bands; see :func:`.masking.mask_features`.
    cache_mb : float
        Memory for decoded noise and spectra of impulse responses, in each process.

    >>> AugmentConfig.from_dict({"noise_p": 0.3}).noise_p
    0.3
    >>> AugmentConfig.from_dict({"nosie_p": 0.3})
    Traceback (most recent call last):
    ...
    s3prl_speaker_upstreams.errors.ConfigError: got unknown augmentation key 'nosie_p'; known: noise, rirs, ...
    """

    noise: str | Sequence[str] | None = None
    rirs: str | Sequence[str] | None = None
    noise_p: float = 0.5
    rir_p: float = 0.5
    snr_db: tuple[float, float] = (0.0, 15.0)
    music_snr_db: tuple[float, float] = (5.0, 15.0)
    speech_snr_db: tuple[float, float] = (13.0, 20.0)
    babble: tuple[int, int] = (3, 7)
    max_rir_seconds: float = 1.0
    band_limit_hz: float | None = None
    band_limit_p: float = 1.0
    equaliser_p: float = 0.0
    equaliser_db: float = 6.0
    band_p: float = 0.0
    band_low_hz: tuple[float, float] = (50.0, 400.0)
    band_high_hz: tuple[float, float] = (3000.0, 7800.0)
    gain_p: float = 0.0
    gain_db: float = 10.0
    codec_p: float = 0.0
    codecs: tuple[str, ...] = ("ulaw", "gsm", "vorbis", "mp3")
    mask_p: float = 0.0
    time_masks: int = 1
    time_frames: int = 10
    mel_masks: int = 1
    mel_bands: int = 8
    cache_mb: float = 256.0

    def __post_init__(self) -> None:
        for name in ("noise_p", "rir_p", "band_limit_p", "equaliser_p", "band_p", "gain_p", "codec_p", "mask_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected a probability from 0 to 1")
        for name in ("snr_db", "music_snr_db", "speech_snr_db", "babble", "band_low_hz", "band_high_hz"):
            low_high = tuple(getattr(self, name))
            if len(low_high) != 2 or low_high[0] > low_high[1]:
                raise ConfigError(f"{name}: got {low_high}, expected two numbers, the smaller one first")
            object.__setattr__(self, name, low_high)
        if self.babble[0] < 1:
            raise ConfigError(f"babble: got {self.babble}, expected at least 1 recording")
        object.__setattr__(self, "codecs", (self.codecs,) if isinstance(self.codecs, str) else tuple(self.codecs))
        unknown = [name for name in self.codecs if name not in CODECS]
        if unknown or not self.codecs:
            raise ConfigError(f"codecs: got {unknown or 'none'}, expected some of {', '.join(CODECS)}")
        if min(self.time_masks, self.time_frames, self.mel_masks, self.mel_bands) < 0:
            raise ConfigError("time_masks, time_frames, mel_masks and mel_bands must not be negative")
        if self.max_rir_seconds <= 0:
            raise ConfigError(f"max_rir_seconds: got {self.max_rir_seconds}, expected more than 0")
        if self.band_limit_hz is not None and self.band_limit_hz <= 0:
            raise ConfigError(f"band_limit_hz: got {self.band_limit_hz}, expected more than 0, or None for no limit")
        for name in ("noise", "rirs"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                single = isinstance(value, os.PathLike)
                object.__setattr__(self, name, os.fspath(value) if single else tuple(os.fspath(item) for item in value))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values that yaml and json can hold."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in ((field.name, getattr(self, field.name)) for field in fields(self))
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AugmentConfig:
        """Configuration from ``values``; unknown keys raise ConfigError."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"got unknown augmentation key {key!r}; known: {', '.join(known)}")
        return cls(**values)

    @classmethod
    def channel_randomised(
        cls, noise: str | Sequence[str] | None, rirs: str | Sequence[str] | None, **changes: Any
    ) -> AugmentConfig:
        """Every utterance its own room, equaliser, band, noise and level: no cue to the recording is left.

        Bands end below 4 kHz, so that they also cut recordings made at 8 kHz.

        >>> AugmentConfig.channel_randomised(None, None).equaliser_p
        1.0
        """
        settings: dict[str, Any] = {
            "noise_p": 1.0,
            "rir_p": 1.0,
            "snr_db": (10.0, 25.0),
            "equaliser_p": 1.0,
            "equaliser_db": 9.0,
            "band_p": 1.0,
            "band_low_hz": (50.0, 400.0),
            "band_high_hz": (2500.0, 4000.0),
            "gain_p": 1.0,
        }
        return cls(noise=noise, rirs=rirs, **{**settings, **changes})


class Augmenter:
    """Callable that applies an :class:`AugmentConfig`.

    Parameters
    ----------
    config : AugmentConfig
    sample_rate : int
        Rate in Hz of the waveforms that will be given; noise and impulse responses are resampled to it.

    Raises ConfigError if a probability is above zero for a folder without usable files.

    Attributes
    ----------
    faults : Counter
        Noise and impulse response files that could not be read while running: those crops stayed without.

    >>> import numpy
    >>> wav = numpy.ones(8000, dtype="float32")
    >>> Augmenter(AugmentConfig(gain_p=1.0))(wav, numpy.random.default_rng(0)).shape
    (8000,)
    """

    def __init__(self, config: AugmentConfig, sample_rate: int = 16000):
        self.config = config
        self.sample_rate = int(sample_rate)
        half = int(config.cache_mb * 2**20 / 2)
        self.noise = NoiseBank(config, sample_rate, half) if config.noise and config.noise_p else None
        self.rirs = (
            RirBank(config.rirs, sample_rate, config.max_rir_seconds, half) if config.rirs and config.rir_p else None
        )
        self.faults: Counter[str] = Counter()

    def __call__(self, wav: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Augmented copy of ``wav``.

        Parameters
        ----------
        wav : (samples,) float32
        rng : numpy.random.Generator
            Source of every decision.

        Returns
        -------
        (samples,) float32, not delayed
        """
        config = self.config
        wav = np.asarray(wav, dtype=np.float32)
        # All decisions are drawn before anything is done, and always all of them: switching one part on or off by its
        # probability leaves the other parts' decisions as they were.
        use = rng.random(6)
        seeds = rng.integers(0, 2**63, 5)
        part = [np.random.Generator(np.random.Philox(key=int(seed))) if on else None for seed, on in zip(
            seeds, (use[0] < config.rir_p, use[1] < config.noise_p, use[2] < config.equaliser_p, use[3] < config.band_p,
                    use[4] < config.gain_p), strict=True)]  # fmt: skip
        room, noise, equaliser, band, gain = part
        out = wav
        if room is not None and self.rirs is not None:
            out = self._tried(self.rirs.reverberate, out, room)
        if noise is not None and self.noise is not None:
            out = self._tried(self.noise.add, out, noise)
        limit = config.band_limit_hz if use[5] < config.band_limit_p else None
        if limit is not None and limit >= self.sample_rate / 2:
            limit = None
        if equaliser is not None or band is not None or limit is not None:
            out = self._channel(out, equaliser, band, limit)
        if gain is not None:
            out = out * np.float32(10 ** (gain.uniform(-config.gain_db, config.gain_db) / 20))
        if config.codec_p and rng.random() < config.codec_p:  # drawn last: without it all is as it was before
            out = through_codec(out, config.codecs[int(rng.integers(len(config.codecs)))], self.sample_rate)
        return out.copy() if out is wav else out

    def _tried(
        self, work: Callable[[np.ndarray, np.random.Generator], np.ndarray], wav: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        try:
            return work(wav, rng)
        except (OSError, BadWaveform) as problem:
            if str(problem) not in self.faults:
                log.warning("augmentation is left out where it needs this file: %s", problem)
            self.faults[str(problem)] += 1
            return wav

    def _channel(
        self,
        wav: np.ndarray,
        equaliser: np.random.Generator | None,
        band: np.random.Generator | None,
        limit: float | None,
    ) -> np.ndarray:
        config, samples = self.config, len(wav)
        # These responses ring for a few milliseconds; a margin keeps the end of the crop from reaching its beginning.
        size = scipy.fft.next_fast_len(samples + self.sample_rate // 32, real=True)
        response = None if limit is None else _band_limit(size, self.sample_rate, float(limit))
        if equaliser is not None or band is not None:
            drawn = channel_response(
                self.sample_rate,
                equaliser_db=None
                if equaliser is None
                else equaliser.uniform(-config.equaliser_db, config.equaliser_db, _EQUALISER_POINTS),
                low_hz=None if band is None else band.uniform(*config.band_low_hz),
                high_hz=None if band is None else band.uniform(*config.band_high_hz),
                bins=size // 2 + 1,
            )
            response = drawn if response is None else response * drawn
        out = scipy.fft.irfft(scipy.fft.rfft(wav, size) * response, size)[:samples]
        # A fresh array of the crop's own length: keeping a view would keep the padded buffer alive.
        return at_level_of(wav, np.ascontiguousarray(out, dtype=np.float32))


# ---------------------------------------------------------------------------------------------- channel
_EQUALISER_POINTS = 8


def channel_response(
    sample_rate: int,
    *,
    equaliser_db: Sequence[float] | np.ndarray | None = None,
    low_hz: float | None = None,
    high_hz: float | None = None,
    bins: int = 513,
) -> np.ndarray:
    """Magnitudes (bins,) float32, from 0 to half the sample rate, of an equaliser and a pass band; phase is zero.

    ``equaliser_db`` are gains at points spread evenly over the logarithm of frequency from 60 Hz to half the rate. The
    band falls off like a Butterworth filter of 4th order at ``low_hz`` and of 8th order at ``high_hz`` (-3 dB there).

    >>> response = channel_response(16000, high_hz=2000.0, bins=9)
    >>> [round(float(gain), 3) for gain in response[[0, 1, 2, 4]]]
    [1.0, 1.0, 0.707, 0.004]
    """
    # Evaluated on a fine enough grid and interpolated: logarithms of 40,000 frequencies would cost more than the FFT.
    grid = min(bins, 1025)
    hertz = np.linspace(0, sample_rate / 2, grid)
    gain = np.ones(grid)
    if equaliser_db is not None:
        points = np.linspace(np.log(60), np.log(sample_rate / 2), len(equaliser_db))
        decibel = np.interp(np.log(np.maximum(hertz, 1)), points, np.asarray(equaliser_db, dtype=np.float64))
        gain *= 10 ** (decibel / 20)
    if low_hz is not None:
        gain /= np.sqrt(1 + (low_hz / np.maximum(hertz, 1e-3)) ** 8)
    if high_hz is not None:
        gain /= np.sqrt(1 + (hertz / high_hz) ** 16)
    if grid < bins:
        gain = np.interp(np.linspace(0, 1, bins), np.linspace(0, 1, grid), gain)
    return gain.astype(np.float32)


@lru_cache(maxsize=32)
def _band_limit(size: int, sample_rate: int, limit: float) -> np.ndarray:
    """Magnitudes (size // 2 + 1,): flat to 0.92 of ``limit``, nothing above it, as after a good resampler."""
    hertz = np.arange(size // 2 + 1) * (sample_rate / size)
    edge = np.clip((limit - hertz) / (0.08 * limit), 0, 1)
    return (0.5 - 0.5 * np.cos(np.pi * edge)).astype(np.float32)


# ---------------------------------------------------------------------------------------------- codecs
def through_codec(wav: np.ndarray, codec: str, sample_rate: int) -> np.ndarray:
    """``wav`` (samples,) after coding and decoding by one of ``CODECS``, at its own rate and of its own length.

    >>> wav = np.sin(np.arange(8000) / 10).astype("float32") / 4
    >>> coded = through_codec(wav, "ulaw", 16000)
    >>> coded.shape, bool(0 < abs(coded - wav)[100:-100].max() < 0.02)
    ((8000,), True)
    """
    import soundfile

    container, coding, rate = CODECS[codec]
    peak = float(np.abs(wav).max(initial=0.0))
    if peak == 0:
        return wav
    level = max(1.0, peak)  # coders clip at +-1
    file = io.BytesIO()
    soundfile.write(file, resample(wav / np.float32(level), sample_rate, rate), rate, format=container, subtype=coding)
    file.seek(0)
    coded = resample(soundfile.read(file, dtype="float32")[0], rate, sample_rate)[: len(wav)]
    return np.pad(coded, (0, len(wav) - len(coded))) * np.float32(level)
