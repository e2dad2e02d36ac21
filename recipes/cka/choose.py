#!/usr/bin/env python3
"""A seeded choice of recordings as a list file (id <tab> path) for cka-addon.

python choose.py /corpora/VoxCeleb1/dev/wav recordings.txt --limit 2000 --seed 0
"""

from __future__ import annotations

import argparse
import random

from cka_addon import audio, provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of recordings, or a list file, which is then thinned out")
    parser.add_argument("out", help="list file to write")
    parser.add_argument("--limit", type=int, help="how many (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = [(name, path.resolve()) for name, path in audio.list_paths(args.source)]
    random.Random(args.seed).shuffle(found)
    text = "".join(f"{name}\t{path}\n" for name, path in sorted(found[: args.limit]))
    provenance.write_atomically(args.out, lambda temporary: temporary.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
