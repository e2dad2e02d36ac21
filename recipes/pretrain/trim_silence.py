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

import soundfile
from tqdm import tqdm

from s3prl_speaker_upstreams.common.audio import find_audio
from s3prl_speaker_upstreams.data.trim import speech_span


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument(
        "--below", type=float, default=35.0, help="dB under the loudest frame that still count as speech"
    )
    args = parser.parse_args()
    files = find_audio(args.source)
    if not files:
        sys.exit(f"{args.source}: no recordings there")
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
