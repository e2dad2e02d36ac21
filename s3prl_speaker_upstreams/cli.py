"""The command ``s3prl-speaker``: one door to everything in the package.

Each command names the module that knows its options; only the module of the command that was asked for is imported, and
nothing heavy before it runs, so that help appears at once.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from s3prl_speaker_upstreams import __version__
from s3prl_speaker_upstreams.errors import SpeakerUpstreamError

__all__ = ["COMMANDS", "main"]

PACKAGE = __package__ or "s3prl_speaker_upstreams"  # __name__ is "__main__" under python -m


@dataclass(frozen=True)
class Command:
    """One command.

    help : its line in the list of commands
    modules : where its options are, below this package: each has ``add_parsers(subparsers)``, which sets every verb's
        ``func``, or, for a command with ``own_options``, ``main(argv, prog=...)``
    verbs : those of a group, in the order of its help; empty: the command is itself the verb of that name
    """

    help: str
    modules: tuple[str, ...]
    verbs: tuple[str, ...] = ()
    own_options: bool = False


COMMANDS = {
    "superb": Command(
        "SUPERB tasks through s3prl's own runner: run, collect, pack, tasks", ("superb",), own_options=True
    ),
    "pretrain": Command("train a speaker model (DINO or AAM-softmax) from a folder of speech", ("pretrain.cli",)),
    "evaluate": Command("EER and minDCF of a model on a trial list", ("pretrain.cli",)),
    "weights": Command("public checkpoints: list, info, fetch", ("weights.cli",), ("list", "info", "fetch")),
    "checkpoint": Command(
        "checkpoint files: info, convert, init, export, average",
        ("weights.cli", "pretrain.cli"),
        ("info", "convert", "init", "export", "average"),
    ),
    "compat": Command(
        "stand-ins for what current packages removed: list them, or run a script with them",
        ("compat",),
        own_options=True,
    ),
    "doctor": Command("say what is installed and active, and what to do about each problem", ("doctor",)),
    "demo": Command(
        "demonstration corpora, from real or synthetic speech: corpus, speech, summary",
        ("demo.corpora", "demo.speech"),
        ("corpus", "speech", "summary"),
    ),
}

# Verbs that stood alone before there were groups -> their group; they go on working.
ALONE = {verb: group for group in ("checkpoint", "weights") for verb in COMMANDS[group].verbs}


class _Chosen:
    """Subparsers that keep only some verbs of what ``add_parsers`` offers."""

    def __init__(self, subparsers: Any, verbs: Sequence[str]) -> None:
        self.subparsers, self.verbs = subparsers, verbs

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser:
        if name in self.verbs:
            return self.subparsers.add_parser(name, **options)
        options.pop("help", None)
        return argparse.ArgumentParser(prog=name, **options)


def _add(subparsers: Any, command: Command, verbs: Sequence[str]) -> None:
    chosen = _Chosen(subparsers, verbs)
    for module in command.modules:
        importlib.import_module(f"{PACKAGE}.{module}").add_parsers(chosen)


def _parser(asked: str | None = None) -> argparse.ArgumentParser:
    """The parser, with the options of the command ``asked`` for only, or of all with None."""
    parser = argparse.ArgumentParser(
        prog="s3prl-speaker",
        description="ECAPA-TDNN and DINO-ECAPA-TDNN upstreams for s3prl: run SUPERB on them, look after weights, "
        "train new ones, and find out why something does not work.",
        epilog="s3prl-speaker COMMAND --help tells a command's options. list, info, fetch, convert, init, export and "
        "average also work without `weights` or `checkpoint` before them. Beside it: cka-addon --help",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("-q", "--quiet", action="store_true", help="only warnings and errors")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        if command.own_options or asked not in (None, name):
            commands.add_parser(name, help=command.help)
        elif command.verbs:
            group = commands.add_parser(name, help=command.help, description=command.help)
            _add(group.add_subparsers(dest="verb", required=True, metavar="VERB"), command, command.verbs)
        else:
            _add(commands, command, [name])
    for verb, name in ALONE.items():
        if asked in (None, verb):
            _add(commands, COMMANDS[name], [verb])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status (0 done, 1 failed with a message, 2 wrong usage).

    >>> main(["checkpoint", "info", "no/such/file.pt"])
    1
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    place = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv))
    name = argv[place] if place < len(argv) else ""
    command = COMMANDS.get(name)
    if command is not None and command.own_options:
        if _parser(name).parse_args([*argv[:place], name]).quiet:
            logging.disable(logging.INFO)
        return _guarded(name, lambda: _own_main(command)(argv[place + 1 :], prog=f"s3prl-speaker {name}"))
    args = _parser(name).parse_args(argv)
    logging.basicConfig(level=logging.WARNING if args.quiet else logging.INFO, format="%(levelname)s %(message)s")
    return _guarded(name, lambda: args.func(args))


def _own_main(command: Command) -> Callable[..., int]:
    """``main`` of what ``python -m`` runs for the command's module."""
    module = importlib.import_module(f"{PACKAGE}.{command.modules[0]}")
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{module.__name__}.__main__")
    return module.main


def _guarded(name: str, run: Callable[[], int | None]) -> int:
    """What a command returns; errors that a user can mend are one message, not a traceback."""
    try:
        return run() or 0
    except SpeakerUpstreamError as error:
        sys.stderr.write(f"s3prl-speaker {name}: {type(error).__name__}: {error}\n")
        return 1
    except BrokenPipeError:  # the reader (head, less) has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; what was finished is kept, the same command goes on from there\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
