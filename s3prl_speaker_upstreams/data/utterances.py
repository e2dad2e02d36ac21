"""Pieces of recordings at one sample rate, and what is done about recordings that turn out unusable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from s3prl_speaker_upstreams.common.audio import read_audio, resample
from s3prl_speaker_upstreams.data.manifest import Manifest, Utterance
from s3prl_speaker_upstreams.data.trim import speech_span
from s3prl_speaker_upstreams.errors import BadAudio, BadWaveform, ConfigError, DamagedAudio, SpeakerUpstreamError

__all__ = ["DataError", "Fault", "Silent", "Utterances", "fault_of", "place"]

T = TypeVar("T")

# Crops of one utterance are read in one go where less than this lies between them: a seek costs more than the reading.
_BRIDGE_SECONDS = 1.0
_TRIES = 50


class DataError(SpeakerUpstreamError, OSError):
    """Many utterances in a row cannot be used: the disk is gone, or the manifest is that of another folder."""


class Fault(NamedTuple):
    """An utterance that could not be used: ``kind`` is ``unreadable``, ``damaged`` (cut off, not finite) or
    ``silent``."""

    kind: str
    path: str
    why: str


class Utterances:
    """Pieces of a manifest's recordings at one sample rate.

    Parameters
    ----------
    manifest : Manifest
    sample_rate : int
        Rate of the pieces in Hz.
    cache_mb : float
        Recordings are kept decoded (16-bit) up to this many MB.
    silence_db : float
        Pieces that all stay below this peak (dB of full scale) count as silent.
    trim_db : float, optional
        Pieces come from the speech only, see :func:`.trim.speech_span`. A recording is decoded whole when it is first
        met, to find where that is; then only the place is kept.
    """

    def __init__(
        self,
        manifest: Manifest,
        sample_rate: int,
        cache_mb: float = 0.0,
        silence_db: float = -70.0,
        trim_db: float | None = None,
    ):
        if not len(manifest):
            raise ConfigError("got an empty manifest, expected at least one utterance")
        self.manifest = manifest
        self.sample_rate = int(sample_rate)
        self.quietest = 10 ** (silence_db / 20)
        self.trim_db = trim_db
        self.decoded: dict[int, np.ndarray] = {}
        self._spans: dict[int, tuple[int, int]] = {}
        # Which recordings are kept must not depend on the order they are met in: resampling a whole recording or a
        # piece of it differs in the last bits. So it is as many as fit from the first on.
        seconds = np.cumsum(manifest.durations)
        self.kept = int(np.searchsorted(seconds * 2 * self.sample_rate, cache_mb * 2**20, side="right"))

    def length(self, index: int, speed: float = 1.0) -> int:
        """Samples that utterance ``index`` has at our rate, played ``speed`` times as fast."""
        manifest = self.manifest
        first, last = self.span(index)
        return max(1, int((last - first) * self.sample_rate / (manifest.sample_rates[index] * speed)))

    def span(self, index: int) -> tuple[int, int]:
        """First and one past the last sample that is used of utterance ``index``, at the file's own rate."""
        if self.trim_db is None:
            return 0, int(self.manifest.samples[index])
        span = self._spans.get(index)
        if span is None:
            wav, rate = read_audio(self.manifest[index].path, sample_rate=None)
            span = self._spans[index] = speech_span(wav, rate, self.trim_db)
        return span

    def pieces(self, index: int, starts: Sequence[int], lengths: Sequence[int], speed: float = 1.0) -> list[np.ndarray]:
        """Pieces [start, start + length) at our rate; where the utterance ends before, it begins again.

        Raises OSError or BadWaveform if they cannot be read or all of them are silent.
        """
        item = self.manifest[index]
        total = self.length(index, speed)
        ends = [start + size for start, size in zip(starts, lengths, strict=True)]
        spans = [(0, total) if end > total else (start, end) for start, end in zip(starts, ends, strict=True)]
        merged: list[list[int]] = []
        for low, high in sorted(spans):
            if merged and low - merged[-1][1] <= _BRIDGE_SECONDS * self.sample_rate:
                merged[-1][1] = max(merged[-1][1], high)
            else:
                merged.append([low, high])
        first, last = self.span(index)
        skip = int(first * self.sample_rate / (item.sample_rate * speed))
        # What lies behind the speech is read on with: only at the file's own end is there nothing more to ask for.
        end = skip + total if last == item.samples else skip + total + 1
        read = [self._read(item, index, low + skip, high + skip, end, speed) for low, high in merged]
        if max(float(np.abs(part).max(initial=0)) for part in read) < self.quietest:
            raise Silent(f"{item.path}: silence")
        out = []
        for start, size, (low, _) in zip(starts, lengths, spans, strict=True):
            number = next(k for k, (first, last) in enumerate(merged) if first <= low < last)
            first = merged[number][0]
            if start + size <= total:
                out.append(read[number][start - first : start - first + size])
            else:
                out.append(np.take(read[number], np.arange(start, start + size) % total))
        return out

    def _read(self, item: Utterance, index: int, low: int, high: int, total: int, speed: float) -> np.ndarray:
        whole = self.whole(index) if index < self.kept else None
        own_rate = item.sample_rate if whole is None else self.sample_rate
        available = item.samples if whole is None else len(whole)
        rate = own_rate * speed / self.sample_rate  # samples there per sample here
        # Some context on both sides, so that the filter of the resampler has settled where the piece begins.
        margin = 0 if rate == 1 else min(int(low * rate), 256)
        first = int(low * rate) - margin
        last = available if high == total else min(available, first + margin + int(np.ceil((high - low) * rate)) + 256)
        if rate == 1:
            last = min(high, available)
        wav = (
            read_audio(item.path, first, last - first, sample_rate=None)[0]
            if whole is None
            else _float(whole[first:last])
        )
        return _fit(resample(wav, own_rate * speed, self.sample_rate)[int(round(margin / rate)) :], high - low)

    def whole(self, index: int) -> np.ndarray:
        """The whole recording at our rate, (samples,) int16, kept for the next time."""
        whole = self.decoded.get(index)
        if whole is None:
            item = self.manifest[index]
            wav = read_audio(item.path, 0, item.samples, sample_rate=self.sample_rate)[0]
            whole = np.clip(np.rint(wav * 32768), -32768, 32767).astype(np.int16)
            self.decoded[index] = whole
        return whole

    def first_usable(self, index: int, work: Callable[[int, str], T]) -> tuple[T, int, tuple[Fault, ...]]:
        """``work(i, tag)`` for the first utterance from ``index`` on for which it does not fail; what failed before.

        The tag goes into the random numbers: an utterance that stands in for another must not give the crops that it
        gives for itself, perhaps in the same batch. Raises DataError after 50 failures in a row.
        """
        faults: list[Fault] = []
        for step in range(min(_TRIES, len(self.manifest))):
            candidate = (index + step) % len(self.manifest)
            try:
                tag = f" instead of {self.manifest[index].id}" if step else ""
                return work(candidate, tag), candidate, tuple(faults)
            except (BadWaveform, OSError) as problem:
                faults.append(fault_of(problem, self.manifest[candidate].path))
        shown = "\n  ".join(fault.why for fault in faults[:5])
        raise DataError(
            f"{len(faults)} utterances in a row cannot be used, from {self.manifest[index].path} on; is the disk "
            f"there, and is the manifest of this folder?\n  {shown}"
        )


def fault_of(problem: BaseException, path: str) -> Fault:
    """What kind of fault an error is that reading ``path`` raised."""
    if isinstance(problem, Silent):
        kind = "silent"
    elif isinstance(problem, BadAudio):
        kind = "damaged" if isinstance(problem, DamagedAudio) else "unreadable"
    else:
        kind = "damaged" if isinstance(problem, BadWaveform) else "unreadable"
    return Fault(kind, path, str(problem))


class Silent(BadWaveform):
    """All that was read of an utterance is silence."""


def _float(wav: np.ndarray) -> np.ndarray:
    return wav.astype(np.float32) * np.float32(1 / 32768)


def _fit(wav: np.ndarray, samples: int) -> np.ndarray:
    """Cut to ``samples``, or repeat the last few: resamplers round lengths."""
    return wav[:samples] if len(wav) >= samples else np.pad(wav, (0, samples - len(wav)), mode="edge")


def place(rng: np.random.Generator, total: int, size: int) -> int:
    """Where a crop of ``size`` of ``total`` samples begins; in a shorter utterance anywhere, since it goes round."""
    return int(rng.integers(total - size + 1)) if total >= size else int(rng.integers(total))
