"""``python -m s3prl_speaker_upstreams.demo``: the speech of the quickstart, and its summary."""

from __future__ import annotations

import sys

from s3prl_speaker_upstreams.demo.speech import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
