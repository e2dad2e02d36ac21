"""Recordings of noise and room impulse responses, ready to be drawn from.

A noise recording is not read whole, only the slice that is needed. A room impulse response is transformed once per crop
length and its spectrum kept.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import scipy  # its parts are loaded at first use

from s3prl_speaker_upstreams.common.audio import read_audio, resample
from s3prl_speaker_upstreams.data.bytecache import ByteCache
from s3prl_speaker_upstreams.data.manifest import Manifest, NoSpeech, build_manifest
from s3prl_speaker_upstreams.errors import BadWaveform, ConfigError

__all__ = ["NoiseBank", "NoiseSettings", "RirBank", "at_level_of"]

_EPS = 1e-12
# The direct path is put at time zero; this much before it is kept, for rooms whose strongest echo is not the first.
_LEAD_SECONDS = 0.05


class NoiseSettings(Protocol):
    """What a :class:`NoiseBank` reads of the augmentation's configuration."""

    @property
    def noise(self) -> str | Sequence[str] | None: ...
    @property
    def snr_db(self) -> tuple[float, float]: ...
    @property
    def music_snr_db(self) -> tuple[float, float]: ...
    @property
    def speech_snr_db(self) -> tuple[float, float]: ...
    @property
    def babble(self) -> tuple[int, int]: ...


def at_level_of(wav: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """``changed`` with the energy of ``wav``, in place."""
    energy = float(np.dot(changed, changed))
    if energy > _EPS:
        changed *= np.float32(np.sqrt(float(np.dot(wav, wav)) / energy))
    return changed


_NOT_RIRS = re.compile(r"(?:^|/)pointsource_noises/|(?:^|/)real_rirs_isotropic_noises/[^/]*noise[^/]*$", re.I)


def _recordings(source: str | Sequence[str] | None, what: str) -> Manifest:
    try:
        return build_manifest(source or (), layout="none", min_seconds=0.0)
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

    def __init__(
        self, source: str | Sequence[str], sample_rate: int, max_seconds: float = 1.0, cache_bytes: int = 128 * 2**20
    ):
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
        return at_level_of(wav, np.ascontiguousarray(out, dtype=np.float32))

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
        ``noise``, ``babble`` and the SNR ranges are used.
    sample_rate : int
    cache_bytes : int
        Recordings are kept decoded if all of them fit in here; else slices are read from the files.

    >>> import numpy, soundfile, tempfile
    >>> name = tempfile.mkstemp(suffix=".wav")[1]
    >>> soundfile.write(name, numpy.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    >>> from s3prl_speaker_upstreams.data.augment import AugmentConfig
    >>> bank = NoiseBank(AugmentConfig(noise=[name], snr_db=(10, 10)), 16000)
    >>> wav = numpy.ones(4000, dtype="float32")
    >>> added = bank.add(wav, numpy.random.default_rng(1)) - wav
    >>> round(float(10 * numpy.log10(1 / (added**2).mean())), 3)  # dB
    10.0
    """

    def __init__(self, config: NoiseSettings, sample_rate: int, cache_bytes: int = 128 * 2**20):
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
        kinds = np.array([match.group(1) if match else "" for match in matches])
        if not point and "" not in kinds and len(set(kinds.tolist())) > 1:
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
        kept = None if self._decoded is None else self._decoded.get(index)
        if kept is not None:
            wav = kept
        else:
            wav = read_audio(item.path, sample_rate=self.sample_rate)[0]
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
