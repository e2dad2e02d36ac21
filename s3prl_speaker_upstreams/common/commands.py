"""What every command line does around its work."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from s3prl_speaker_upstreams.errors import SpeakerUpstreamError

__all__ = ["run_command"]


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Parse ``argv``, call ``func(args)``, return its exit status; 1 and a message for an error that a user can mend.

    >>> parser = argparse.ArgumentParser()
    >>> parser.set_defaults(func=lambda args: 3)
    >>> run_command(parser, [])
    3
    """
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return args.func(args)
    except SpeakerUpstreamError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
