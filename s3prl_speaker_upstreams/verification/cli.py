"""The command ``evaluate``: EER, minDCF and more of any encoder on a trial list."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from s3prl_speaker_upstreams.data.lists import LAYOUTS

__all__ = ["add_parsers"]

# (source, which checkpoint, role) -> encoder of a training run, or None if the source is no run.
OpenRun = Callable[[str, str, "str | None"], Any]


def add_parsers(subparsers: Any, open_run: OpenRun | None = None) -> None:
    """Add ``evaluate`` to ``argparse`` subparsers; ``func(args) -> exit code``.

    open_run : opens the folders that training writes, which this package does not know itself

    >>> parser = argparse.ArgumentParser()
    >>> add_parsers(parser.add_subparsers())
    >>> parser.parse_args(["evaluate", "ecapa_dino_small", "trials.txt"]).checkpoint
    'ecapa_dino_small'
    """
    p = subparsers.add_parser(
        "evaluate",
        help="EER and minDCF of a model on a trial list",
        description="Verification by cosine: plain; with --cohort also after its mean was subtracted (mean_...) and "
        "normalised by its nearest members (asnorm_...). The 95 % interval of the EER is by speaker.",
        epilog="examples:\n  s3prl-speaker evaluate exp/dino veri_test2.txt --root voxceleb1/wav --cohort vox2_dev\n"
        "  s3prl-speaker evaluate ecapa_dino_small trials.txt --root wav.scp --scores scores.tsv --out result.json\n"
        "  s3prl-speaker evaluate ecapa_tdnn test.txt --root wav/ --calibrate dev_scores.tsv",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("checkpoint", help="a training run's folder, a checkpoint of any readable format, or a public name")
    p.add_argument("trials", help="trial list: 'label enrol test' (1: same speaker) or 'enrol test target|nontarget'")
    p.add_argument(
        "--root", metavar="FOLDER|LIST",
        help="folder of the audio, or a list of 'name path' lines (wav.scp, raw.list, csv); default: the list's folder",
    )  # fmt: skip
    p.add_argument("--cohort", metavar="FOLDER|LIST", help="speech of other speakers, for mean subtraction and AS-norm")
    p.add_argument("--cohort-utterances", type=int, default=3000, metavar="N", help="at most so many (default: 3000)")
    p.add_argument(
        "--cohort-layout", choices=LAYOUTS, default="auto",
        help="where the cohort's speakers are: list, voxceleb, librispeech, speaker (folders), none (default: auto)",
    )  # fmt: skip
    p.add_argument("--top-n", type=int, default=300, metavar="N", help="nearest members for AS-norm (default: 300)")
    p.add_argument("--scores", metavar="TSV", help="write every trial's scores here")
    p.add_argument("--out", metavar="JSON", help="also write the result here")
    p.add_argument(
        "--calibrate", metavar="TSV", help="scores of other trials to calibrate on: adds Cllr and actual DCF"
    )
    p.add_argument("--intervals", type=int, default=200, metavar="N", help="draws of the bootstrap; 0: no interval")
    p.add_argument("--skip-unusable", action="store_true", help="leave out trials of missing or damaged recordings")
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    p.add_argument("--batch", type=int, default=16, help="utterances embedded at once (default: 16)")
    p.add_argument("--max-seconds", type=float, metavar="S", help="cut longer recordings")
    p.add_argument("--which", default="newest", help="newest, best or a step, of a training run (default: newest)")
    p.add_argument("--role", choices=("teacher", "student", "supervised"), help="default: teacher for DINO")
    p.add_argument("--format", help="what the checkpoint is, where it cannot tell")
    p.add_argument("--frontend", help="features to feed it, a dialect's name (default: the format's)")
    p.add_argument("--allow-pickle", action="store_true", help="open files that could run code when loaded")
    p.set_defaults(func=lambda args: _evaluate(args, open_run))


def _encoder(args: argparse.Namespace, open_run: OpenRun | None) -> Any:
    """The encoder that ``args.checkpoint`` names: a run, a file or folder, or an entry of the registry."""
    if open_run is not None and os.path.exists(args.checkpoint):
        run = open_run(args.checkpoint, args.which, args.role)
        if run is not None:
            return run
    from s3prl_speaker_upstreams.checkpoints import load_encoder

    options = {"format": args.format, "frontend": args.frontend, "role": args.role, "allow_pickle": args.allow_pickle}
    path = Path(args.checkpoint)
    if not path.exists() and len(path.parts) == 1 and not path.suffix:
        from s3prl_speaker_upstreams.weights import lookup, resolve

        entry = lookup(args.checkpoint)
        path = resolve(entry)
        options["format"] = options["format"] or entry.format
    return load_encoder(path, **{key: value for key, value in options.items() if value})


def _evaluate(args: argparse.Namespace, open_run: OpenRun | None) -> int:
    from s3prl_speaker_upstreams.common.files import write_json
    from s3prl_speaker_upstreams.common.provenance import collect
    from s3prl_speaker_upstreams.errors import ConfigError
    from s3prl_speaker_upstreams.verification.evaluate import verify
    from s3prl_speaker_upstreams.verification.trials import write_scores

    for what, place in (("trial list", args.trials), ("--root", args.root), ("--cohort", args.cohort)):
        if place is not None and not os.path.exists(place):
            raise ConfigError(f"{what}: there is no {place}")
    options = {
        "cohort": args.cohort,
        "cohort_utterances": args.cohort_utterances,
        "cohort_layout": args.cohort_layout,
        "top_n": args.top_n,
        "max_seconds": args.max_seconds,
        "bootstrap_samples": args.intervals,
        "calibrate": args.calibrate,
        "skip_unusable": args.skip_unusable,
    }
    root = args.root or Path(args.trials).parent
    outcome = verify(_encoder(args, open_run), args.trials, root, device=args.device, batch=args.batch, **options)
    numbers = {{"trials": "n_trials", "targets": "n_targets"}.get(k, k): v for k, v in outcome.numbers.items()}
    result = {"checkpoint": str(args.checkpoint), "trials": str(args.trials), **numbers, "notes": outcome.notes}
    if args.scores:
        write_scores(outcome.trials, outcome.scores, args.scores)
    if args.out:
        write_json(args.out, {**result, "made_by": collect(root=str(root), **options)})
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    for prefix in ("", "mean_", "asnorm_"):
        if f"{prefix}eer_low" in numbers:
            eer, low, high = (100 * numbers[f"{prefix}eer{end}"] for end in ("", "_low", "_high"))
            sys.stderr.write(f"{prefix}EER {eer:.2f} % ({low:.2f} to {high:.2f}, 95 %, by {numbers['interval_by']})\n")
    return 0
