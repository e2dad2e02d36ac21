"""Noise, reverberation and channel: what makes two crops of one utterance sound different.

Everything random comes from the generator that is passed in, and is drawn in a fixed order, so the result depends on
nothing but the waveform and the generator: not on caches, workers or the order of the utterances.

Speed comes from three things. A noise recording is not read whole, only the slice that is needed. A room impulse
response is transformed once per crop length and its spectrum kept. And equaliser, band and band limit are one
multiplication of one spectrum.

The signal path is that of a recording: speech in a room, noise added, then the channel.

>>> import numpy
>>> augmenter = Augmenter(AugmentConfig(band_limit_hz=4000.0))
>>> wav = numpy.random.default_rng(0).normal(0, 0.1, 16000).astype("float32")
>>> limited = augmenter(wav, numpy.random.default_rng(1))
>>> bool(abs(numpy.fft.rfft(limited))[4200:].max() < 1e-2 * abs(numpy.fft.rfft(limited))[:3600].max())
True
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import scipy  # its parts are loaded at first use

from s3prl_speaker_upstreams.common.audio import read_audio, resample
from s3prl_speaker_upstreams.data.bytecache import ByteCache
from s3prl_speaker_upstreams.data.manifest import Manifest, NoSpeech, build_manifest
from s3prl_speaker_upstreams.errors import BadWaveform, ConfigError

__all__ = ["AugmentConfig", "Augmenter", "NoiseBank", "RirBank", "channel_response"]

log = logging.getLogger(__name__)

_EPS = 1e-12
# The direct path is put at time zero; this much before it is kept, for rooms whose strongest echo is not the first.
_LEAD_SECONDS = 0.05


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
    cache_mb: float = 256.0

    def __post_init__(self):
        for name in ("noise_p", "rir_p", "band_limit_p", "equaliser_p", "band_p", "gain_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected a probability from 0 to 1")
        for name in ("snr_db", "music_snr_db", "speech_snr_db", "babble", "band_low_hz", "band_high_hz"):
            low_high = tuple(getattr(self, name))
            if len(low_high) != 2 or low_high[0] > low_high[1]:
                raise ConfigError(f"{name}: got {low_high}, expected two numbers, the smaller one first")
            object.__setattr__(self, name, low_high)
        if self.babble[0] < 1:
            raise ConfigError(f"babble: got {self.babble}, expected at least 1 recording")
        if self.max_rir_seconds <= 0:
            raise ConfigError(f"max_rir_seconds: got {self.max_rir_seconds}, expected more than 0")
        if self.band_limit_hz is not None and self.band_limit_hz <= 0:
            raise ConfigError(f"band_limit_hz: got {self.band_limit_hz}, expected more than 0, or None for no limit")
        for name in ("noise", "rirs"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                single = isinstance(value, os.PathLike)
                object.__setattr__(self, name, os.fspath(value) if single else tuple(os.fspath(item) for item in value))

    def to_dict(self) -> dict:
        """All fields as plain values that yaml and json can hold."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in ((field.name, getattr(self, field.name)) for field in fields(self))
        }

    @classmethod
    def from_dict(cls, values: Mapping) -> AugmentConfig:
        """Configuration from ``values``; unknown keys raise ConfigError."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"got unknown augmentation key {key!r}; known: {', '.join(known)}")
        return cls(**values)

    @classmethod
    def channel_randomised(
        cls, noise: str | Sequence[str] | None, rirs: str | Sequence[str] | None, **changes
    ) -> AugmentConfig:
        """Every utterance its own room, equaliser, band, noise and level: no cue to the recording is left.

        Bands end below 4 kHz, so that they also cut recordings made at 8 kHz.

        >>> AugmentConfig.channel_randomised(None, None).equaliser_p
        1.0
        """
        settings = {
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
        self.faults: Counter = Counter()

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
        return out.copy() if out is wav else out

    def _tried(self, work, wav: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        try:
            return work(wav, rng)
        except (OSError, BadWaveform) as problem:
            if str(problem) not in self.faults:
                log.warning("augmentation is left out where it needs this file: %s", problem)
            self.faults[str(problem)] += 1
            return wav

    def _channel(self, wav: np.ndarray, equaliser, band, limit: float | None) -> np.ndarray:
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
        return _at_level_of(wav, np.ascontiguousarray(out, dtype=np.float32))


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


def _at_level_of(wav: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """``changed`` with the energy of ``wav``, in place."""
    energy = float(np.dot(changed, changed))
    if energy > _EPS:
        changed *= np.float32(np.sqrt(float(np.dot(wav, wav)) / energy))
    return changed


# ---------------------------------------------------------------------------------------------- reverberation
_NOT_RIRS = re.compile(r"(?:^|/)pointsource_noises/|(?:^|/)real_rirs_isotropic_noises/[^/]*noise[^/]*$", re.I)


def _recordings(source, what: str) -> Manifest:
    try:
        return build_manifest(source, layout="none", min_seconds=0.0)
    except (NoSpeech, FileNotFoundError) as problem:
        raise ConfigError(f"{what}: got {source}, expected a folder or list of {what} files; {problem}") from problem


class RirBank:
    """Room impulse responses, their spectra kept per crop length.

    The direct path (the strongest sample) is moved to time zero, so reverberated speech is not delayed, and the result
    is brought to the level of what went in: impulse responses differ a hundredfold in level.

    Parameters
    ----------
    source : folder, list file or paths
    sample_rate : int
    max_seconds : float
        Length kept after the direct path.
    cache_bytes : int

    >>> import soundfile, tempfile
    >>> name = tempfile.mkstemp(suffix=".wav")[1]
    >>> soundfile.write(name, [0.0, 0.0, 0.01, 0.005], 16000, "FLOAT")  # direct path, echo of half size
    >>> out = RirBank([name], 16000, 1.0).convolve(np.array([1, 0, 0, 0], dtype=np.float32), 0)
    >>> (out / out[0]).round(3)
    array([1. , 0.5, 0. , 0. ], dtype=float32)
    """

    def __init__(self, source, sample_rate: int, max_seconds: float = 1.0, cache_bytes: int = 128 * 2**20):
        found = _recordings(source, "room impulse response")
        keep = [index for index, item in enumerate(found) if not _NOT_RIRS.search(item.path.replace(os.sep, "/"))]
        if not keep:
            raise ConfigError(f"room impulse responses: {source} holds noises only")
        self.files = found.subset(keep)
        self.sample_rate = sample_rate
        self.max_seconds = max_seconds
        self._spectra = ByteCache(cache_bytes)

    def __len__(self) -> int:
        return len(self.files)

    def impulse_response(self, index: int) -> tuple[np.ndarray, int]:
        """Response number ``index`` at unit energy, and where in it the direct path is: (samples,) float32, int."""
        wav, rate = read_audio(self.files[index].path, sample_rate=None)
        wav = resample(wav, rate, self.sample_rate)
        peak = int(np.abs(wav).argmax())
        first = max(0, peak - int(_LEAD_SECONDS * self.sample_rate))
        wav = wav[first : peak + max(1, int(self.max_seconds * self.sample_rate))]
        energy = float(np.dot(wav, wav))
        if energy < _EPS:
            raise BadWaveform(f"{self.files[index].path}: an impulse response of zeros")
        return wav / np.float32(np.sqrt(energy)), peak - first

    def spectrum(self, index: int, samples: int) -> tuple[np.ndarray, int]:
        """Spectrum of response ``index`` with its direct path at zero, for crops of ``samples``; and the FFT size."""
        longest = int((self.max_seconds + _LEAD_SECONDS) * self.sample_rate)
        item = self.files[index]
        length = min(int(np.ceil(item.samples * self.sample_rate / item.sample_rate)), longest)
        size = scipy.fft.next_fast_len(samples + length, real=True)
        spectrum = self._spectra.get((index, size))
        if spectrum is None:
            response, direct = self.impulse_response(index)
            padded = np.zeros(size, dtype=np.float32)
            padded[: len(response) - direct] = response[direct:]
            if direct:
                padded[-direct:] = response[:direct]  # what comes before the direct path is at negative times
            spectrum = scipy.fft.rfft(padded)
            self._spectra.put((index, size), spectrum)
        return spectrum, size

    def convolve(self, wav: np.ndarray, index: int) -> np.ndarray:
        """``wav`` (samples,) in room ``index``: (samples,) float32 of the same level."""
        spectrum, size = self.spectrum(index, len(wav))
        out = scipy.fft.irfft(scipy.fft.rfft(wav, size) * spectrum, size)[: len(wav)]
        return _at_level_of(wav, np.ascontiguousarray(out, dtype=np.float32))

    def reverberate(self, wav: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """``wav`` (samples,) in a room that ``rng`` draws."""
        return self.convolve(wav, int(rng.integers(len(self.files))))


# ---------------------------------------------------------------------------------------------- noise
_MUSAN = re.compile(r"(?:^|/)(noise|music|speech)/")


class NoiseBank:
    """Noise recordings by category, read as slices.

    A category is drawn first, then a recording, then a place in it; recordings that are shorter than the crop go round.

    Parameters
    ----------
    config : AugmentConfig
        ``noise`` and the SNR ranges are used.
    sample_rate : int
    cache_bytes : int
        Recordings are kept decoded if all of them fit in here; else slices are read from the files.

    >>> import numpy, soundfile, tempfile
    >>> name = tempfile.mkstemp(suffix=".wav")[1]
    >>> soundfile.write(name, numpy.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    >>> bank = NoiseBank(AugmentConfig(noise=[name], snr_db=(10, 10)), 16000)
    >>> wav = numpy.ones(4000, dtype="float32")
    >>> added = bank.add(wav, numpy.random.default_rng(1)) - wav
    >>> round(float(10 * numpy.log10(1 / (added**2).mean())), 3)  # dB
    10.0
    """

    def __init__(self, config: AugmentConfig, sample_rate: int, cache_bytes: int = 128 * 2**20):
        self.config = config
        self.sample_rate = sample_rate
        found = _recordings(config.noise, "noise")
        paths = [item.path.replace(os.sep, "/") for item in found]
        point = [index for index, path in enumerate(paths) if "/pointsource_noises/" in path]
        if point:  # a RIRS_NOISES folder: its impulse responses are no noises
            found, paths = found.subset(point), [paths[index] for index in point]
        self.files = found
        self.categories: dict[str, np.ndarray] = {"noise": np.arange(len(found))}
        matches = [_MUSAN.search(name.id if "/" in name.id else "") for name in found]
        if not point and all(matches) and len({match.group(1) for match in matches}) > 1:
            kinds = np.array([match.group(1) for match in matches])
            self.categories = {
                kind: np.flatnonzero(kinds == kind) for kind in ("noise", "music", "speech") if kind in kinds
            }
        self.snr_db = {"noise": config.snr_db, "music": config.music_snr_db, "speech": config.speech_snr_db}
        decoded = float(found.seconds) * sample_rate * 4
        self._decoded = ByteCache(cache_bytes) if decoded <= cache_bytes else None

    def __len__(self) -> int:
        return len(self.files)

    def slice(self, index: int, samples: int, rng: np.random.Generator) -> np.ndarray:
        """``samples`` samples of recording ``index`` from a place that ``rng`` draws: (samples,) float32."""
        item = self.files[index]
        place = rng.random()
        same = item.sample_rate == self.sample_rate
        needed = samples if same else int(np.ceil(samples * item.sample_rate / self.sample_rate)) + 1
        if self._decoded is None and item.samples > needed:
            start = int(place * (item.samples - needed + 1))
            wav, rate = read_audio(item.path, start, needed, sample_rate=None)
            wav = resample(wav, rate, self.sample_rate)
            return wav[:samples] if len(wav) >= samples else np.resize(wav, samples)
        wav = None if self._decoded is None else self._decoded.get(index)
        if wav is None:
            wav, rate = read_audio(item.path, sample_rate=None)
            wav = resample(wav, rate, self.sample_rate)
            if self._decoded is not None:
                self._decoded.put(index, wav)
        if len(wav) > samples:
            start = int(place * (len(wav) - samples + 1))
            return wav[start : start + samples]
        start = int(place * len(wav))
        return np.resize(np.concatenate([wav[start:], wav[:start]]), samples)

    def add(self, wav: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """``wav`` (samples,) plus noise at a drawn SNR: (samples,) float32. A silent slice or crop adds nothing."""
        names = list(self.categories)
        kind = names[int(rng.integers(len(names)))]
        snr = rng.uniform(*self.snr_db[kind])
        members = self.categories[kind]
        several = int(rng.integers(self.config.babble[0], self.config.babble[1] + 1)) if kind == "speech" else 1
        noise = self.slice(int(members[rng.integers(len(members))]), len(wav), rng)
        for _ in range(several - 1):
            other = self.slice(int(members[rng.integers(len(members))]), len(wav), rng)
            noise = noise + other
        power, speech = float(np.dot(noise, noise)), float(np.dot(wav, wav))
        if power < _EPS or speech < _EPS:
            return wav
        return wav + noise * np.float32(np.sqrt(speech / power * 10 ** (-snr / 10)))
