"""The command ``s3prl-speaker``: weights, checkpoints, pre-training, and a doctor."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from s3prl_speaker_upstreams import __version__
from s3prl_speaker_upstreams.errors import SpeakerUpstreamError

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    from s3prl_speaker_upstreams import doctor
    from s3prl_speaker_upstreams.pretrain import cli as pretrain_cli
    from s3prl_speaker_upstreams.weights import cli as weights_cli

    parser = argparse.ArgumentParser(
        prog="s3prl-speaker",
        description="ECAPA-TDNN and DINO-ECAPA-TDNN upstreams for s3prl: look after weights, pre-train new ones, "
        "and find out why something does not work.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("-q", "--quiet", action="store_true", help="only warnings and errors")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor.add_parsers(commands)
    weights_cli.add_parsers(commands)
    pretrain_cli.add_parsers(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status (0 done, 1 failed with a message, 2 wrong usage)."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING if args.quiet else logging.INFO, format="%(levelname)s %(message)s")
    try:
        return args.func(args) or 0
    except SpeakerUpstreamError as error:
        sys.stderr.write(f"s3prl-speaker {args.command}: {type(error).__name__}: {error}\n")
        return 1
    except BrokenPipeError:  # the reader (head, less) has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; what was finished is kept, the same command goes on from there\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
