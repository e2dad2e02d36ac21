"""Voices for generated corpora: deterministic tones that carry speaker and text, or eSpeak NG.

Tone voices need nothing but numpy. Each letter is 55 ms of a harmonic tone whose two resonances tell the letter and
whose pitch, tilt and tempo tell the speaker, so every SUPERB task can learn something from them. They are no speech.
"""

from __future__ import annotations

import numpy as np

from s3prl_speaker_upstreams.common.audio import SAMPLE_RATE
from s3prl_speaker_upstreams.demo import espeak
from s3prl_speaker_upstreams.errors import ConfigError

__all__ = ["KINDS", "Voices"]

KINDS = ("tones", "espeak")
_LETTERS = "abcdefghijklmnopqrstuvwxyz'0123456789"
_LETTER_SECONDS = 0.055


class Voices:
    """Say texts as numbered speakers.

    Parameters
    ----------
    kind : "tones" (synthetic, deterministic anywhere) or "espeak" (eSpeak NG; see :mod:`.espeak` on determinism)
    seed : of the tones' small variations

    Examples
    --------
    >>> voices = Voices("tones", seed=3)
    >>> a, b = voices.say("yes", speaker=0), voices.say("yes", speaker=1)
    >>> a.dtype, bool(len(a) > 1600), np.array_equal(a, Voices("tones", seed=3).say("yes", speaker=0))
    (dtype('float32'), True, True)
    """

    def __init__(self, kind: str = "tones", seed: int = 0) -> None:
        if kind not in KINDS:
            raise ConfigError(f"voices: got {kind!r}, expected one of {', '.join(KINDS)}")
        self.kind = kind
        self.noise = np.random.default_rng(seed)

    def say(self, text: str, speaker: int, *, mood: float = 0.0) -> np.ndarray:
        """(samples,) float32 at 16 kHz; `mood` in +-1 raises pitch and tempo (emotions of ER)."""
        if self.kind == "espeak":
            voice = espeak.VOICES[speaker % len(espeak.VOICES)]
            return espeak.speak(text, voice, rate=int(160 + 40 * mood), pitch=int(50 + 35 * mood))
        return self._tones(text.lower(), speaker, mood)

    def _tones(self, text: str, speaker: int, mood: float) -> np.ndarray:
        traits = np.random.default_rng(10_000 + speaker)
        pitch = traits.uniform(85, 240) * 2 ** (0.4 * mood)
        tilt = traits.uniform(0.4, 1.2)
        stretch = traits.uniform(0.9, 1.15) * 2 ** (-0.3 * mood)
        shift = traits.uniform(0.85, 1.2)  # length of the vocal tract: moves all resonances
        samples = int(_LETTER_SECONDS * stretch * SAMPLE_RATE)
        pieces = [self._breath(samples)]
        for letter in text:
            index = _LETTERS.find(letter)
            if index < 0:
                pieces.append(self._breath(samples))
                continue
            time = np.arange(samples) / SAMPLE_RATE
            resonances = shift * np.array([300 + 70 * (index % 7), 900 + 190 * (index // 7) + 90 * (index % 7)])
            harmonics = np.arange(1, 30)[:, None] * pitch * self.noise.uniform(0.97, 1.03)
            near = np.exp(-(((harmonics - resonances) / 180.0) ** 2)).sum(1) + 0.03
            weights = near / np.arange(1, 30) ** (tilt * 0.5)
            tone = (weights[:, None] * np.sin(2 * np.pi * harmonics * time)).sum(0)
            pieces.append(tone * np.hanning(samples) ** 0.3)
        pieces.append(self._breath(samples))
        signal = np.concatenate(pieces)
        signal = 0.35 * signal / max(np.abs(signal).max(), 1e-6)
        return (signal + 0.002 * self.noise.standard_normal(len(signal))).astype(np.float32)

    def _breath(self, samples: int) -> np.ndarray:
        return 0.02 * self.noise.standard_normal(samples)
