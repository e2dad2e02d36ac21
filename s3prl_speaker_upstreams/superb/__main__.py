"""Command line of the SUPERB recipes: ``python -m s3prl_speaker_upstreams.superb --help``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from s3prl_speaker_upstreams.errors import ConfigError, SpeakerUpstreamError
from s3prl_speaker_upstreams.superb import collect, stages
from s3prl_speaker_upstreams.superb.tasks import SWEEP, TASKS, find_task

__all__ = ["main"]


def _rates(text: str) -> tuple[float, ...]:
    if text == "stock":
        return ()
    if text == "sweep":
        return SWEEP
    return tuple(float(part) for part in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m s3prl_speaker_upstreams.superb",
        description="SUPERB tasks with s3prl's own runner and hyperparameters, resumable stage by stage.",
        epilog=f"tasks: {', '.join(f'{task.name} ({task.title})' for task in TASKS.values())}",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run stages of one task with one upstream")
    run.add_argument("task")
    run.add_argument("upstream", help="name as s3prl's -u takes it")
    run.add_argument("--stages", default=",".join(stages.STAGES), help="comma-separated, of %(default)s")
    run.add_argument("--data", type=Path, help="root of the corpus")
    run.add_argument("--exp", type=Path, default=Path("exp/superb"), help="where runs are kept (default %(default)s)")
    run.add_argument("--conf", type=Path, default=stages.CONF, help="folder of the yaml files (default %(default)s)")
    run.add_argument("--ckpt", help="checkpoint for *_local and *_url upstreams (s3prl's -k)")
    run.add_argument("--model-config", help="s3prl's -g")
    run.add_argument("--feature", default="hidden_states", help="s3prl's -s (default %(default)s)")
    run.add_argument("--normalize", action="store_true", help="layer-normalise features before the weighted sum")
    run.add_argument("--tag", help="name of the upstream in folders and tables (default: its own)")
    run.add_argument("--device", default="cuda", help="default %(default)s")
    run.add_argument("--seed", type=int, default=1337, help="default %(default)s, as s3prl's")
    run.add_argument("--workers", type=int, help="loader processes (default: the yaml's)")
    run.add_argument(
        "--lr",
        type=_rates,
        default=(),
        metavar="stock|sweep|A,B,...",
        help="learning rates to train with, the best on dev is taken; all that SUPERB lets be tuned",
    )
    run.add_argument("--s3prl-root", type=Path, help="a checkout of s3prl to use instead of the installed package")
    run.add_argument("--nproc", type=int, default=1, help="GPUs for training, through torchrun")
    run.add_argument("--smoke", action="store_true", help="a few updates on a small corpus, generated without --data")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a hyperparameter, for example runner.total_steps=1000; the result is then marked as not stock",
    )
    run.add_argument("--force", action="store_true", help="repeat finished stages")
    run.add_argument("--verbose", action="store_true", help="show the output of s3prl's runner, not only log it")
    for name, text in (("collect", "one table of all runs"), ("pack", "predictions for the SUPERB leaderboard")):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("--exp", type=Path, default=Path("exp/superb"), help="where runs are kept")
        verb.add_argument("--out", type=Path, help="folder to write into (default: EXP/tables, EXP/submission)")
        if name == "pack":
            verb.add_argument("upstream", help="whose predictions (its folder below EXP)")
        else:
            verb.add_argument("--no-reference", action="store_true", help="leave the published rows out")
    verbs.add_parser("tasks", help="list the tasks, one a line")
    return parser


def _settings(pairs: Sequence[str]) -> dict[str, object]:
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair!r}: expected KEY=VALUE, for example runner.total_steps=1000")
        settings[key] = yaml.safe_load(value)
    return settings


def _execute(args: argparse.Namespace) -> None:
    if args.verb == "tasks":
        sys.stdout.write("".join(f"{name}\n" for name in TASKS))
    elif args.verb == "collect":
        collect.collect(args.exp, args.out or args.exp / "tables", reference=not args.no_reference)
    elif args.verb == "pack":
        collect.pack(args.exp, args.upstream, args.out or args.exp / "submission" / args.upstream)
    else:
        run = stages.Run(
            task=find_task(args.task),
            upstream=args.upstream,
            exp=args.exp,
            data=args.data,
            conf=args.conf,
            ckpt=args.ckpt,
            model_config=args.model_config,
            feature=args.feature,
            normalize=args.normalize,
            tag=args.tag,
            device=args.device,
            seed=args.seed,
            workers=args.workers,
            lrs=args.lr,
            s3prl_root=args.s3prl_root,
            smoke=args.smoke,
            nproc=args.nproc,
            force=args.force,
            verbose=args.verbose,
            settings=_settings(args.set),
        )
        stages.run_stages(run, [stage for stage in args.stages.split(",") if stage])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; errors that a user can mend are shown without a traceback, with code 1."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        _execute(args)
    except SpeakerUpstreamError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    except OSError as error:
        if error.errno not in (28, 122):  # ENOSPC, EDQUOT
            raise
        sys.stderr.write(f"NoSpaceLeft: {error}; make room and start again, finished stages are kept\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
