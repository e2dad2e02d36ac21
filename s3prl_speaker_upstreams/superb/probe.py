"""Try an upstream before a run: does s3prl know it, does it load, what does it give, and which weights are in it.

Runs as a process of its own (``python -m s3prl_speaker_upstreams.superb.probe``), since importing s3prl takes seconds
and changes the interpreter; prints one line of JSON.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["main"]

_SEED = 1337


def _layers(chosen: Any) -> list[Any]:
    if isinstance(chosen, dict):
        chosen = list(chosen.values())
    return list(chosen) if isinstance(chosen, list | tuple) else [chosen]


def _look(entry: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What one upstream gives for a second of noise, and digests of what it is."""
    import numpy as np
    import torch
    from s3prl.upstream.interfaces import Featurizer

    from s3prl_speaker_upstreams.common.digests import state_sha256

    # what an upstream draws at random (unused heads, whole untrained networks) must not tell equal weights apart; a
    # run's own seed is a field of its identity for itself
    random.seed(_SEED)
    np.random.seed(_SEED)  # noqa: NPY002 - upstreams use this one
    torch.manual_seed(_SEED)
    model = entry(ckpt=args.ckpt, model_config=args.model_config, refresh=False).to(args.device).eval()
    noise = torch.randn(16000, generator=torch.Generator().manual_seed(0)).to(args.device)
    with torch.no_grad():
        features = model([noise])
    if args.feature not in features:  # s3prl would take hidden_states, with a warning among a hundred lines
        names = sorted(name for name in features if not name.startswith("_"))
        return {"error": "feature", "known": names}
    layers = _layers(features[args.feature])
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    featurizer = Featurizer(model, feature_selection=args.feature, upstream_device=args.device)
    return {
        "layers": len(layers),
        "dim": featurizer.output_dim,
        "rate": featurizer.downsample_rate,
        "state": state_sha256(state) if state else None,
        # what a file beside the weights may change without touching them; compared with a tolerance
        "behaviour": [[float(f"{value:.4g}") for value in (x.float().mean(), x.float().std())] for x in layers],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print {"layers", "dim", "rate", "state", "behaviour"}, or {"error", "known"}, as the last line of stdout."""
    parser = argparse.ArgumentParser(description="Load one upstream and run it on a second of noise.")
    parser.add_argument("upstream")
    parser.add_argument("--ckpt")
    parser.add_argument("--model-config")
    parser.add_argument("--feature", default="hidden_states")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)

    from s3prl import hub

    entries = {name: getattr(hub, name) for name in dir(hub) if not name.startswith("_")}
    known = sorted(n for n, entry in entries.items() if callable(entry) and not inspect.isclass(entry))
    if args.upstream in known:
        answer = _look(entries[args.upstream], args)
    else:
        answer = {"error": "unknown", "known": known}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
