"""``python -m s3prl_speaker_upstreams.run_downstream``: s3prl's own ``run_downstream``, with our entries for certain.

Takes the same arguments and runs the same code as ``python -m s3prl.run_downstream``; the one difference is that the
registration is explicit, so it also works where Python's start-up files are not run or are switched off.
"""

from __future__ import annotations

import runpy

import s3prl_speaker_upstreams

__all__ = ["main"]


def main() -> None:
    """Register our entries, then run ``s3prl.run_downstream`` as ``__main__`` with this process's arguments."""
    s3prl_speaker_upstreams.register()
    runpy.run_module("s3prl.run_downstream", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
