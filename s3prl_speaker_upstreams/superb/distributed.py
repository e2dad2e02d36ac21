"""Start ``s3prl.run_downstream`` under torchrun, which hands the rank over in LOCAL_RANK, not as ``--local_rank``.

``torchrun --nproc_per_node=4 -m s3prl_speaker_upstreams.superb.distributed -m train ...`` is what s3prl's documentation
does with ``python -m torch.distributed.launch``, whose option is spelt ``--local-rank`` nowadays. s3prl itself asks for
CUDA in distributed runs.
"""

from __future__ import annotations

import os
import runpy
import sys

__all__ = ["main"]


def main() -> None:
    """Run the stock program as ``__main__`` with the rank as it expects it."""
    if "LOCAL_RANK" in os.environ:
        sys.argv.append(f"--local_rank={os.environ['LOCAL_RANK']}")
    runpy.run_module("s3prl.run_downstream", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
