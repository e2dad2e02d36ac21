"""Run a script of a s3prl checkout that never imports s3prl, with the stand-ins in place.

    python -m s3prl_speaker_upstreams.compat preprocess/generate_len_for_bucket.py -i LibriSpeech -o data

Such scripts are ``preprocess/generate_len_for_bucket.py``, and ``utility/visualize_weight.py`` or
``utility/print_settings.py``, which read an experiment's checkpoint. Where torchaudio's readers are stand-ins, joblib's
workers become threads: children would import plain torchaudio.
Without a script, lists the stand-ins.
"""

from __future__ import annotations

import runpy
import sys
from contextlib import nullcontext

from s3prl_speaker_upstreams import compat


def main(argv: list[str], *, prog: str = "python -m s3prl_speaker_upstreams.compat") -> int:
    """Run ``argv[0]`` with the rest as its arguments; without any, write the table."""
    compat.install()
    if not argv:
        for line in compat.report(probe=True):
            state = {True: "in place", False: "not needed", None: "not looked at"}[line.active]
            sys.stdout.write(f"{state:14s} {line.name}: {line.supplies} (gone: {line.removed_in})\n")
        return 0
    if argv[0].startswith("-"):
        sys.stdout.write((__doc__ or "").replace("python -m s3prl_speaker_upstreams.compat", prog))
        return 0 if argv[0] in ("-h", "--help") else 2
    import joblib
    import torchaudio

    from s3prl_speaker_upstreams.compat import torch_load

    if compat.enabled() and torch_load.namespaces_are_refused():
        torch_load.put_in_place()
    sys.argv = argv
    ours = torchaudio.info.__module__.startswith(compat.__name__)
    # torchaudio's own sox reader is not safe in threads, and needs none
    with joblib.parallel_config(backend="threading") if ours else nullcontext():
        runpy.run_path(argv[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
