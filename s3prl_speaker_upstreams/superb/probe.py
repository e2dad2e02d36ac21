"""Try an upstream before a run: does s3prl know it, does it load, how many layers has it.

Runs as a process of its own (``python -m s3prl_speaker_upstreams.superb.probe``), since importing s3prl takes seconds
and changes the interpreter; prints one line of JSON.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print {"layers", "dim", "rate"}, or {"error", "known"}, as the last line of stdout."""
    parser = argparse.ArgumentParser(description="Load one upstream and run it on a second of noise.")
    parser.add_argument("upstream")
    parser.add_argument("--ckpt")
    parser.add_argument("--model-config")
    parser.add_argument("--feature", default="hidden_states")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)

    import torch
    from s3prl import hub
    from s3prl.upstream.interfaces import Featurizer

    entries = {name: getattr(hub, name) for name in dir(hub) if not name.startswith("_")}
    known = sorted(n for n, entry in entries.items() if callable(entry) and not inspect.isclass(entry))
    if args.upstream not in known:
        answer = {"error": "unknown", "known": known}
    else:
        model = (
            entries[args.upstream](ckpt=args.ckpt, model_config=args.model_config, refresh=False).to(args.device).eval()
        )
        with torch.no_grad():
            features = model([torch.randn(16000, device=args.device)])
        chosen = features.get(args.feature, features.get("hidden_states"))
        if isinstance(chosen, dict):
            chosen = list(chosen.values())
        layers = len(chosen) if isinstance(chosen, list | tuple) else 1
        featurizer = Featurizer(model, feature_selection=args.feature, upstream_device=args.device)
        answer = {"layers": layers, "dim": featurizer.output_dim, "rate": featurizer.downsample_rate}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
