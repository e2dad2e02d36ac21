"""Speech for generated corpora from eSpeak NG, called through ctypes from the wheel ``espeakng-loader``.

No program and no system package is needed, only ``pip install espeakng-loader``. A voice is ``accent+variant``: the
variants of eSpeak NG (``f1`` .. ``f5``, ``m1`` .. ``m8``, ``klatt`` ...) differ in pitch, formants and breathiness and
serve as speakers.

Source: the C interface ``speak_lib.h`` of eSpeak NG 1.51 (function and constant names below are its own).
"""

from __future__ import annotations

import ctypes
import threading
from functools import lru_cache

import numpy as np
import soxr

from s3prl_speaker_upstreams.common.audio import SAMPLE_RATE
from s3prl_speaker_upstreams.errors import ConfigError, MissingPackage

__all__ = ["VOICES", "available", "speak"]

VOICES = tuple(
    f"{accent}+{variant}"
    for accent in ("en-us", "en-gb-scotland", "en-029", "en-gb-x-rp", "en-gb-x-gbcwmd")
    for variant in ("m1", "f1", "m3", "f2", "m7", "f4", "klatt2", "grandpa", "m5", "f5")
)
"""50 English voices that sound apart, in an order whose first ones differ most; use them as speakers."""

_RETRIEVAL = 1  # AUDIO_OUTPUT_RETRIEVAL: samples go to the callback, no sound device is opened
_CHARS_UTF8 = 1  # espeakCHARS_UTF8
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4  # espeak_PARAMETER
_LOCK = threading.Lock()  # the library keeps one global state per process
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class _Library:
    """The loaded library, its own sample rate, and the callback, which must outlive every call."""

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise MissingPackage(
                "espeak-ng speech needs the wheel espeakng-loader, which is absent: pip install espeakng-loader "
                "(or generate tone voices instead, --voices tones)"
            ) from error
        self.lib = ctypes.CDLL(espeakng_loader.get_library_path())
        self.chunks: list[np.ndarray] = []
        self.callback = _CALLBACK(self._collect)
        data = str(espeakng_loader.get_data_path()).encode()
        self.rate = self.lib.espeak_Initialize(_RETRIEVAL, 0, data, 0)
        if self.rate <= 0:
            raise MissingPackage(
                f"eSpeak NG did not start from {data.decode()} (code {self.rate}); reinstall it: "
                "pip install --force-reinstall espeakng-loader"
            )
        self.lib.espeak_SetSynthCallback(self.callback)
        self.lib.espeak_ng_SetRandSeed(ctypes.c_long(1))  # breath noise starts alike in every process

    def _collect(self, samples, count: int, _events) -> int:
        if samples and count > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # go on


@lru_cache(maxsize=1)
def _library() -> _Library:
    return _Library()


def available() -> bool:
    """Whether :func:`speak` works here."""
    try:
        _library()
    except (MissingPackage, OSError):
        return False
    return True


def speak(text: str, voice: str = "en-us+m1", *, rate: int = 160, pitch: int = 50, pitch_range: int = 50) -> np.ndarray:
    """Say `text`; the same calls in the same order give the same samples in every fresh process.

    (Vibrato and breath noise go on from one call to the next: a sentence said twice differs slightly, as people's do.)

    Parameters
    ----------
    text : what to say
    voice : accent, or accent+variant, as in :data:`VOICES`
    rate : words per minute, 80 to 450
    pitch, pitch_range : 0 to 100

    Returns
    -------
    (samples,) float32 in +-1 at 16 kHz

    Raises
    ------
    MissingPackage if espeakng-loader is not installed; ConfigError for an unknown voice or if nothing was said.

    Examples
    --------
    >>> if available():
    ...     assert len(speak("hello")) > 4000
    """
    with _LOCK:
        library = _library()
        if library.lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ConfigError(f"eSpeak NG has no voice {voice!r}; voices known to work: {', '.join(VOICES)}")
        for parameter, value in ((_RATE, rate), (_VOLUME, 80), (_PITCH, pitch), (_RANGE, pitch_range)):
            library.lib.espeak_SetParameter(parameter, int(value), 0)
        library.chunks.clear()
        data = text.encode("utf-8")
        code = library.lib.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 0, 0, _CHARS_UTF8, None, None)
        library.lib.espeak_Synchronize()
        if code != 0 or not library.chunks:
            raise ConfigError(f"eSpeak NG said nothing for {text!r} with voice {voice!r} (code {code})")
        samples = np.concatenate(library.chunks).astype(np.float32) / 32768.0
    return soxr.resample(samples, library.rate, SAMPLE_RATE, quality="HQ").astype(np.float32)
