#!/usr/bin/env python3
"""Copies of recordings without the silence before and after the speech.

    python recipes/pretrain/trim_silence.py SOURCE DESTINATION [--below 35]

A recording's speech spans its first to last 25 ms frame less than ``--below`` dB under its loudest one, and 0.1 s more
on both sides. DINO takes crops of one recording for two views of one speaker: where more than half of a recording is
silence, as in spoken commands, most pairs of crops have nothing in common and training learns little.
Files that exist are skipped; prints how many seconds were kept.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

SUFFIXES = {".wav", ".flac", ".ogg"}
FRAME, MARGIN = 0.025, 0.1


def speech_span(wav: np.ndarray, rate: int, below: float) -> tuple[int, int]:
    """First and one past the last sample of the speech in ``wav`` (samples,).

    >>> quiet, loud = np.full(16000, 1e-5), np.tile([0.1, -0.1], 8000)
    >>> speech_span(np.concatenate([quiet, loud, quiet]), 16000, 35.0)
    (14400, 33600)
    """
    size = int(FRAME * rate)
    count = len(wav) // size
    if not count:
        return 0, len(wav)
    level = 10 * np.log10(np.square(wav[: count * size], dtype=np.float64).reshape(count, size).mean(1) + 1e-12)
    loud = np.flatnonzero(level > level.max() - below)
    margin = int(MARGIN * rate)
    return max(0, int(loud[0]) * size - margin), min(len(wav), (int(loud[-1]) + 1) * size + margin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument(
        "--below", type=float, default=35.0, help="dB under the loudest frame that still count as speech"
    )
    args = parser.parse_args()
    files = sorted(p for p in args.source.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        sys.exit(f"{args.source}: no wav, flac or ogg files there")
    before = after = 0.0
    for path in tqdm(files, desc="trimming", unit="file", delay=2):
        target = (args.destination / path.relative_to(args.source)).with_suffix(".flac")
        wav, rate = soundfile.read(path, dtype="float32")
        start, end = speech_span(wav if wav.ndim == 1 else wav.mean(1), rate, args.below)
        before, after = before + len(wav) / rate, after + (end - start) / rate
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.with_name(f".{target.name}.part")
            soundfile.write(beside, wav[start:end], rate, format="FLAC")
            os.replace(beside, target)
    sys.stdout.write(f"{len(files)} files, {after / 60:.1f} of {before / 60:.1f} minutes kept in {args.destination}\n")


if __name__ == "__main__":
    main()
