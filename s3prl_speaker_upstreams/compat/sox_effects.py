"""``torchaudio.sox_effects`` for the four effects of s3prl's recipes: ``channels``, ``rate``, ``gain``, ``silence``.

torchaudio 2.9 removed the module, and before that it needs a ``libsox.so`` that few machines have. Where the sox
program is on the path it does what needs resampling or mixing, with the samples that torchaudio's libsox gave (dither
off). Everything else, and all where there is no program, is done here: in sox's 32-bit integers for channels, gain and
silence (bit-identical at 16 kHz), and for rate by soxr's high-quality resampler, sox's own design with slightly other
coefficients (recipes/benchmark/RESULTS.md has the measured differences). Any other effect or option raises.

>>> import torch
>>> wav, rate = apply_effects_tensor(torch.ones(2, 160) / 2, 16000, [["channels", "1"], ["gain", "-3.0"]])
>>> tuple(wav.shape), rate, round(float(wav[0, 0]), 6)
((1, 160), 16000, 0.353973)
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from s3prl_speaker_upstreams.compat import sox_program, torchaudio_io
from s3prl_speaker_upstreams.compat._errors import AudioUnreadable, UnsupportedEffect
from s3prl_speaker_upstreams.compat.silence import Period, trim_silence
from s3prl_speaker_upstreams.errors import MissingPackage

__all__ = ["apply_effects_file", "apply_effects_tensor", "effect_names"]

_SAMPLE_MAX, _SAMPLE_MIN = 2**31 - 1, -(2**31)
_KNOWN = ("channels", "gain", "rate", "silence")
_REMEDY = "supplied here are channels N, rate HZ, gain DB and silence; use torchaudio < 2.9 with libsox for more"

# bits that sox counts as significant for each kind of file (sox_precision)
_PRECISION = {"PCM_S8": 8, "PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32, "FLOAT": 25, "ULAW": 14, "ALAW": 13}


def effect_names() -> list[str]:
    """The effects that can be applied here."""
    return list(_KNOWN)


def apply_effects_file(
    path: str | os.PathLike,
    effects: Sequence[Sequence[str]],
    normalize: bool = True,
    channels_first: bool = True,
    format: str | None = None,
) -> tuple[torch.Tensor, int]:
    """Read an audio file through a chain of sox effects.

    effects : such as ``[["channels", "1"], ["rate", "16000"], ["gain", "-3.0"]]``
    Returns ``(channels, samples)`` float32 in +-1 (or transposed), samples per second.
    Raises UnsupportedEffect, AudioUnreadable.
    """
    _check(effects)
    if not normalize:
        raise UnsupportedEffect(
            f"apply_effects_file({path}): got normalize=False; expected True; convert the result instead"
        )
    if not os.path.isfile(path):
        raise AudioUnreadable(f"{path}: no such file; check the corpus root in the configuration")
    program = sox_program.find()
    if program and (format or not _equal_here(path, effects)):
        # an absolute path is never taken for an option or a command, and no-glob keeps [ and * in names literal
        source = ["--no-glob", *(["-t", format] if format else []), os.path.abspath(path)]
        done = sox_program.call(program, source, effects)
        if done.returncode != 0 and b"no handler for" in done.stderr:
            samples, rate, _ = _read(path)  # a format that this sox was built without
            done = sox_program.call(program, ["-t", "wav", "-"], effects, _wav(samples, rate))
        wav, rate = sox_program.result(done, str(path))
    else:
        samples, rate, precision = _read(path)
        wav, rate = _run(samples, rate, precision, effects)
    return torch.from_numpy(wav if not channels_first else np.ascontiguousarray(wav.T)), rate


def apply_effects_tensor(
    tensor: torch.Tensor, sample_rate: int, effects: Sequence[Sequence[str]], channels_first: bool = True
) -> tuple[torch.Tensor, int]:
    """Pass a waveform through a chain of sox effects.

    tensor : (channels, samples) float32 on the CPU (or transposed)
    Returns the same layout, samples per second. Raises UnsupportedEffect.
    """
    _check(effects)
    if tensor.ndim != 2 or tensor.dtype != torch.float32:
        raise UnsupportedEffect(
            f"apply_effects_tensor: got {tensor.dtype} of shape {tuple(tensor.shape)}; expected 2-D float32; "
            "convert it first"
        )
    samples = _from_float((tensor.t() if channels_first else tensor).detach().cpu().numpy().astype(np.float64))
    program = sox_program.find()
    if program and len(samples) and not (samples.shape[1] == 1 and _keeps_rate(sample_rate, effects)):
        done = sox_program.call(program, ["-t", "wav", "-"], effects, _wav(samples, sample_rate))
        wav, rate = sox_program.result(done, "tensor")
    else:
        wav, rate = _run(samples, int(sample_rate), 32, effects)
    return torch.from_numpy(np.ascontiguousarray(wav.T) if channels_first else wav), rate


# ---------------------------------------------------------------------------------------------- arguments


def _check(effects: Sequence[Sequence[str]]) -> None:
    """Raise UnsupportedEffect for anything that the two ways would not carry out alike."""
    for effect in effects:
        name, *arguments = effect
        if name not in _KNOWN:
            raise UnsupportedEffect(f"sox effect {name!r} in {list(effects)}: not supplied; {_REMEDY}")
        if name == "silence":
            _silence_halves(arguments, 16000)
            continue
        value = _number(arguments[0]) if len(arguments) == 1 else None
        if value is None or (name != "gain" and value <= 0):
            raise UnsupportedEffect(f"sox effect {' '.join(map(str, effect))!r}: expected one number; {_REMEDY}")


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _silence_halves(arguments: Sequence[str], rate: float) -> tuple[Period, Period, bool]:
    """``above duration threshold [below duration threshold]`` as two halves and whether trimming starts again."""
    shown = "silence " + " ".join(map(str, arguments))
    if len(arguments) not in (3, 6):
        raise UnsupportedEffect(
            f"sox effect {shown!r}: expected `silence COUNT DURATION THRESHOLD% [COUNT DURATION THRESHOLD%]`; {_REMEDY}"
        )
    wrong = f"sox effect {shown!r}: expected counts, seconds and thresholds in % or d; {_REMEDY}"
    halves = [Period(0, 0, 0.0, "%"), Period(0, 0, 0.0, "%")]
    restart = False
    for index in range(len(arguments) // 3):
        count, duration, threshold = (str(item) for item in arguments[3 * index : 3 * index + 3])
        unit = threshold[-1] if threshold[-1:] in ("%", "d") else "%"
        level, seconds, periods = _number(threshold.rstrip("%d")), _number(duration), _number(count)
        if level is None or seconds is None or periods is None or periods != int(periods) or seconds < 0:
            raise UnsupportedEffect(wrong)
        if index == 0 and periods < 1:
            raise UnsupportedEffect(wrong)
        if (unit == "%" and not 0 <= level <= 100) or (unit == "d" and level >= 0):
            raise UnsupportedEffect(
                f"sox effect {shown!r}: got threshold {threshold}; expected 0% to 100%, or below 0d"
            )
        restart = index == 1 and periods < 0
        halves[index] = Period(abs(int(periods)), int(seconds * rate + 0.5), level, unit)
    return halves[0], halves[1], restart


# ---------------------------------------------------------------------------------------------- without the program


def _keeps_rate(rate: float, effects: Sequence[Sequence[str]]) -> bool:
    return all(float(arguments[0]) == rate for name, *arguments in effects if name == "rate")


def _equal_here(path: str | os.PathLike, effects: Sequence[Sequence[str]]) -> bool:
    """Whether this module's own arithmetic gives the program's samples: a whole mono file, nothing to resample.

    Starting a program for every one-second clip costs more than training on it; at 16 kHz, the corpora's own rate, the
    samples are bit-identical (tests, and recipes/benchmark/RESULTS.md).
    """
    try:
        with torchaudio_io._open(path) as file:
            if file.channels != 1 or not _keeps_rate(file.samplerate, effects) or file.subtype.startswith("MPEG"):
                return False
        with open(path, "rb") as file:
            head = file.read(8)
        # the program says when a WAV is shorter than its header promises, soundfile does not
        return head[:4] != b"RIFF" or os.path.getsize(path) >= 8 + int.from_bytes(head[4:], "little")
    except AudioUnreadable:  # not for soundfile; sox may know the format
        return False


def _read(path: str | os.PathLike) -> tuple[np.ndarray, int, int]:
    """Samples (time, channels) as sox's 32-bit integers, rate, precision in bits."""
    with torchaudio_io._open(path) as file:
        subtype, rate = file.subtype, file.samplerate
        integers = subtype.startswith("PCM") or subtype in ("ULAW", "ALAW")
        try:
            samples = file.read(dtype="int32" if integers else "float64", always_2d=True)
        except RuntimeError as error:
            raise AudioUnreadable(f"{path}: damaged or truncated audio ({error}); fetch the file again") from error
    return (samples if integers else _from_float(samples)), rate, _PRECISION.get(subtype, 32)


def _from_float(samples: np.ndarray) -> np.ndarray:
    return _rounded(samples * 2.0**31)


def _rounded(values: np.ndarray) -> np.ndarray:
    """sox's rounding: halves away from zero, clipped to 32 bits."""
    away = np.trunc(values + np.copysign(0.5, values))
    return np.clip(away, _SAMPLE_MIN, _SAMPLE_MAX).astype(np.int32)


def _to_float(samples: np.ndarray) -> np.ndarray:
    """32-bit integers to float32 as sox writes them: rounded to 24 bits, then exact."""
    wide = samples.astype(np.int64)
    return np.where(wide > _SAMPLE_MAX - 64, 1.0, ((wide + 64) & ~127) / 2.0**31).astype(np.float32)


def _wav(samples: np.ndarray, rate: int) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, int(rate), subtype="PCM_32", format="WAV")
    return buffer.getvalue()


def _run(samples: np.ndarray, rate: int, precision: int, effects: Sequence[Sequence[str]]) -> tuple[np.ndarray, int]:
    """The chain on (time, channels) integers, ending in float32."""
    for name, *arguments in effects:
        before = samples
        if name == "channels":
            samples = _channels(samples, int(float(arguments[0])))
        elif name == "rate":
            samples, rate = _resampled(samples, rate, float(arguments[0])), int(float(arguments[0]))
        elif name == "gain":
            decibels = float(arguments[0])
            if decibels != 0:
                samples = _rounded(samples * math.exp(decibels * math.log(10) * 0.05))
        elif name == "silence":
            start, stop, restart = _silence_halves(arguments, rate)
            samples = trim_silence(samples, rate, start, stop, restart=restart, precision=precision)
            continue  # takes samples away without changing any: the precision stays
        if samples is not before:
            precision = 32
    return _to_float(samples), rate


def _channels(samples: np.ndarray, wanted: int) -> np.ndarray:
    """sox's ``channels``: each output is the mean of every `wanted`-th input, or a copy when there are too few."""
    count = samples.shape[1]
    if count == wanted:
        return samples
    outputs = []
    for index in range(wanted):
        group = samples[:, index::wanted] if index < count else samples[:, index % count][:, None]
        factor = 1.0 / group.shape[1]
        total = np.zeros(len(samples))
        for channel in group.T:
            total = total + channel * factor
        outputs.append(_rounded(total))
    return np.stack(outputs, axis=1)


def _resampled(samples: np.ndarray, rate: int, wanted: float) -> np.ndarray:
    if rate == wanted:
        return samples
    try:
        import soxr
    except ImportError as error:
        raise MissingPackage(
            f"resampling {rate} to {wanted:g} Hz: got neither the sox program nor soxr; pip install soxr"
        ) from error
    return _from_float(soxr.resample(samples / 2.0**31, rate, wanted, quality="HQ").reshape(-1, samples.shape[1]))
