"""Command line of the SUPERB recipes: ``python -m s3prl_speaker_upstreams.superb --help``."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from s3prl_speaker_upstreams.errors import ConfigError, SpeakerUpstreamError
from s3prl_speaker_upstreams.superb import collect, elements, stages
from s3prl_speaker_upstreams.superb.configuration import CONF
from s3prl_speaker_upstreams.superb.run import DEFAULT_SEED
from s3prl_speaker_upstreams.superb.tasks import SWEEP, TASKS, find_task

__all__ = ["add_verbs", "main"]


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers above 0 such as 1e-3 or 1e-3,1e-4")
    return value


def _rates(text: str) -> tuple[float, ...]:
    if text == "stock":
        return ()
    if text == "sweep":
        return SWEEP
    try:
        return tuple(dict.fromkeys(_rate(part) for part in text.split(",")))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or stock, or sweep") from error


def _fields(text: str) -> tuple[str, ...]:
    names = tuple(part for part in text.split(",") if part)
    strange = sorted(set(names) - {"stack", "s3prl"})
    if strange:
        raise argparse.ArgumentTypeError(f"got {strange[0]!r}, expected stack, s3prl or both")
    return names


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of processes above 0")
    return int(text)


def _add_run(verbs: argparse._SubParsersAction) -> None:
    run = verbs.add_parser("run", help="run stages of one task with one upstream")
    run.add_argument("task")
    run.add_argument("upstream", help="name as s3prl's -u takes it")
    run.add_argument("--stages", default=",".join(stages.STAGES), help="comma-separated, of %(default)s")
    run.add_argument("--data", type=Path, help="root of the corpus")
    run.add_argument("--exp", type=Path, default=Path("exp/superb"), help="where runs are kept (default %(default)s)")
    run.add_argument("--conf", type=Path, help=f"folder of the yaml files (default: the package's own, {CONF})")
    run.add_argument("--ckpt", help="checkpoint for *_local and *_url upstreams (s3prl's -k)")
    run.add_argument("--model-config", help="s3prl's -g")
    run.add_argument("--feature", default="hidden_states", help="s3prl's -s (default %(default)s)")
    run.add_argument("--normalize", action="store_true", help="layer-normalise features before the weighted sum")
    run.add_argument("--tag", help="name of the upstream in folders and tables (default: its own)")
    run.add_argument("--device", default="cuda", help="default %(default)s")
    run.add_argument(
        "--seed", type=int, default=DEFAULT_SEED, help="default %(default)s, as s3prl's; tables give means over seeds"
    )
    run.add_argument("--workers", type=int, help="loader processes (default: the yaml's)")
    run.add_argument(
        "--lr",
        type=_rates,
        default=(),
        metavar="stock|sweep|A,B,...",
        help="learning rates to train with, the best on dev is taken; all that SUPERB lets be tuned",
    )
    run.add_argument("--only-lr", type=_rate, metavar="A", help="train this one of --lr only (an array element)")
    run.add_argument("--only-fold", metavar="FOLD", help="train this fold only (an array element)")
    run.add_argument("--s3prl-root", type=Path, help="a checkout of s3prl to use instead of the installed package")
    run.add_argument("--nproc", type=_count, default=1, help="GPUs for training, through torchrun")
    run.add_argument("--smoke", action="store_true", help="a few updates on a small corpus, generated without --data")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a hyperparameter, for example runner.total_steps=1000; the result is then marked as not stock",
    )
    run.add_argument("--force", action="store_true", help="repeat finished stages; training then starts anew")
    run.add_argument(
        "--accept",
        type=_fields,
        default=(),
        metavar="stack,s3prl",
        help="go on with work that other package versions made; the result says so",
    )
    run.add_argument("--verbose", action="store_true", help="show the output of s3prl's runner, not only log it")
    run.set_defaults(func=_run)


def _add_elements(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "elements",
        help="what a job array has to do: one line of `run` options for each element",
        description="Prints the options of `run`, one array element a line. Train elements may run at once; a join "
        "element (choose, evaluate, score) needs those of its task, upstream and seed finished.",
    )
    verb.add_argument("--part", choices=elements.PARTS, default="all", help="default: %(default)s")
    verb.add_argument("--tasks", required=True, help="names, separated by blanks or commas")
    verb.add_argument("--upstreams", required=True, help="names, separated by blanks or commas")
    verb.add_argument("--seeds", default=str(DEFAULT_SEED), help="default: %(default)s")
    verb.add_argument("--lr", type=_rates, default=(), metavar="stock|sweep|A,B,...", help="as `run` takes it")
    verb.set_defaults(func=_elements)


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """Add ``run``, ``collect``, ``pack``, ``elements`` and ``tasks``, each with the default ``func(args) -> int``."""
    _add_run(verbs)
    for name, text in (("collect", "one table of all runs"), ("pack", "predictions for the SUPERB leaderboard")):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("--exp", type=Path, default=Path("exp/superb"), help="where runs are kept")
        verb.add_argument("--out", type=Path, help="folder to write into (default: EXP/tables, EXP/submission)")
        if name == "pack":
            verb.add_argument("upstream", help="whose predictions (its folder below EXP)")
            verb.add_argument("--seed", type=int, help="of which seed, where there are several")
            verb.set_defaults(func=_pack)
        else:
            verb.add_argument("--no-reference", action="store_true", help="leave the published rows out")
            verb.set_defaults(func=_collect)
    _add_elements(verbs)
    verbs.add_parser("tasks", help="list the tasks, one a line").set_defaults(func=_tasks)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="SUPERB tasks with s3prl's own runner and hyperparameters, resumable stage by stage.",
        epilog=f"tasks: {', '.join(f'{task.name} ({task.title})' for task in TASKS.values())}",
    )
    add_verbs(parser.add_subparsers(dest="verb", required=True))
    return parser


def _settings(pairs: Sequence[str]) -> dict[str, object]:
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair!r}: expected KEY=VALUE, for example runner.total_steps=1000")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {pair!r}: {value!r} is no yaml value; write a list as [a, b]") from error
    return settings


def _tasks(args: argparse.Namespace) -> int:
    sys.stdout.write("".join(f"{name}\n" for name in TASKS))
    return 0


def _collect(args: argparse.Namespace) -> int:
    collect.collect(args.exp, args.out or args.exp / "tables", reference=not args.no_reference)
    return 0


def _pack(args: argparse.Namespace) -> int:
    collect.pack(args.exp, args.upstream, args.out or args.exp / "submission" / args.upstream, seed=args.seed)
    return 0


def _elements(args: argparse.Namespace) -> int:
    names = {name: getattr(args, name).replace(",", " ").split() for name in ("tasks", "upstreams", "seeds")}
    odd = [seed for seed in names["seeds"] if not seed.isdecimal()]
    if odd:
        raise ConfigError(f"--seeds: got {odd[0]!r}, expected whole numbers")
    found = elements.elements(
        args.part,
        [find_task(name) for name in names["tasks"]],
        names["upstreams"],
        seeds=[int(seed) for seed in names["seeds"]],
        lrs=args.lr,
    )
    sys.stdout.write("".join(f"{' '.join(options)}\n" for options in found))
    return 0


def _run(args: argparse.Namespace) -> int:
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
        only_lr=args.only_lr,
        only_fold=args.only_fold,
        s3prl_root=args.s3prl_root,
        smoke=args.smoke,
        nproc=args.nproc,
        force=args.force,
        verbose=args.verbose,
        settings=_settings(args.set),
        accept=args.accept,
    )
    stages.run_stages(run, [stage for stage in args.stages.split(",") if stage])
    return 0


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m s3prl_speaker_upstreams.superb") -> int:
    """Run the command line; errors that a user can mend are shown without a traceback, with code 1."""
    args = _parser(prog).parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return args.func(args)
    except SpeakerUpstreamError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    except OSError as error:
        if error.errno not in (28, 122):  # ENOSPC, EDQUOT
            raise
        sys.stderr.write(f"NoSpaceLeft: {error}; make room and start again, finished stages are kept\n")
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
