#!/usr/bin/env python3
"""Copies of recordings without the silence before and after the speech.

    python recipes/pretrain/trim_silence.py SOURCE DESTINATION [--below 35]

A recording's speech spans its first to last 25 ms frame less than ``--below`` dB under its loudest one, and 0.1 s more
on both sides. DINO takes crops of one recording for two views of one speaker: where more than half of a recording is
silence, as in spoken commands, most pairs of crops have nothing in common and training learns little.
Channels are averaged; files that exist are skipped, unusable ones named. Prints how many minutes were kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from s3prl_speaker_upstreams.common.audio import find_audio, read_audio, write_audio
from s3prl_speaker_upstreams.data.trim import speech_span
from s3prl_speaker_upstreams.errors import BadAudio


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
    targets = [(args.destination / path.relative_to(args.source)).with_suffix(".flac") for path in files]
    if len(set(targets)) < len(targets):
        double = next(t for n, t in enumerate(targets) if t in targets[:n])
        sys.exit(f"{args.source}: two recordings would become {double}; they differ in their ending only")
    before = after = 0.0
    unusable = []
    for path, target in tqdm(list(zip(files, targets, strict=True)), desc="trimming", unit="file", delay=2):
        try:
            wav, rate = read_audio(path, sample_rate=None)
        except BadAudio as error:
            unusable.append(str(error))
            continue
        start, end = speech_span(wav, rate, args.below)
        before, after = before + len(wav) / rate, after + (end - start) / rate
        if not target.exists():
            write_audio(target, wav[start:end], rate)
    for line in unusable:
        sys.stderr.write(f"unusable: {line}\n")
    kept = len(files) - len(unusable)
    sys.stdout.write(f"{kept} files, {after / 60:.1f} of {before / 60:.1f} minutes kept in {args.destination}\n")


if __name__ == "__main__":
    main()
