"""How near the stand-ins of torchaudio.sox_effects are to the sox program and, on torchaudio < 2.9, to its own libsox.

    python recipes/benchmark/compat.py --speech FOLDER --files 300

For each chain of s3prl's recipes and each sample rate: how many recordings come out with the same samples, and the
largest difference. The sox program must be on the path.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
from pathlib import Path

import soundfile
import torch
import torchaudio
from results import add_output, write_result
from tqdm import tqdm

from s3prl_speaker_upstreams.compat import sox_effects

BASE = [["channels", "1"], ["rate", "16000"], ["gain", "-3.0"]]
CHAINS = {
    "channels, rate, gain (KS, QbE)": BASE,
    "the same and silence (ASV)": [*BASE, ["silence", "1", "0.1", "0.1%", "-1", "0.1", "0.1%"]],
}


def libsox():
    """torchaudio's own functions, or None."""
    try:
        from torchaudio.sox_effects import sox_effects as real

        return real if real.sox_ext.apply_effects_file else None
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speech", type=Path, required=True, help="folder of wav or flac recordings")
    parser.add_argument("--files", type=int, default=300, help="how many, drawn with seed 5 (default %(default)s)")
    add_output(parser, "compat.sox")
    options = parser.parse_args()
    files = sorted(path for path in options.speech.rglob("*") if path.suffix in (".wav", ".flac"))
    if not files or shutil.which("sox") is None:
        parser.error(f"got {len(files)} recordings below {options.speech}, sox at {shutil.which('sox')}; need both")
    logging.disable(logging.WARNING)
    real = libsox()
    rows: dict[tuple[str, int], list] = {}
    for path in tqdm(random.Random(5).sample(files, min(options.files, len(files))), desc="recordings"):
        for name, chain in CHAINS.items():
            program, _ = sox_effects.apply_effects_file(path, chain)
            samples, rate, precision = sox_effects._read(path)
            own = torch.from_numpy(sox_effects._run(samples, rate, precision, chain)[0].T)
            row = rows.setdefault((name, rate), [0, 0, 0, 0, 0.0])
            row[0] += 1
            row[1] += bool(real) and torch.equal(real.apply_effects_file(str(path), chain)[0], program)
            row[2] += torch.equal(own, program)
            if own.shape != program.shape:
                row[3] += 1
            elif own.numel():
                row[4] = max(row[4], float((own - program).abs().max()))
    columns = [
        "chain",
        "Hz",
        "recordings",
        "libsox = program",
        "own = program",
        "other length",
        "own, largest difference",
    ]
    table = [
        [name, rate, count, same if real else "-", equal, lengths, worst]
        for (name, rate), (count, same, equal, lengths, worst) in sorted(rows.items())
    ]
    at_16k = [row for row in table if row[1] == 16000]
    write_result(
        options.out,
        title="Stand-ins of torchaudio.sox_effects against the sox program",
        about='Recordings through the effect chains of s3prl\'s recipes. "libsox = program" and "own = program" count '
        'those with exactly the same samples; "own" is the arithmetic that is used where there is no sox program; '
        "differences are of full scale.",
        tables=[{"title": "", "columns": columns, "rows": table}],
        summary=[
            [
                "sox effects at 16 kHz, recordings with the program's samples",
                f"{sum(r[4] for r in at_16k)} of {sum(r[2] for r in at_16k)}",
                "all",
            ]
        ],
        data={"torchaudio": torchaudio.__version__, "libsndfile": soundfile.__libsndfile_version__, "rows": table},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
