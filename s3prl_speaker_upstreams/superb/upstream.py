"""What a run must know of its upstream and of the device, before anything is done with them."""

from __future__ import annotations

import json
from typing import Any

from s3prl_speaker_upstreams.common.hints import nearest
from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.superb import stock
from s3prl_speaker_upstreams.superb.errors import UnknownUpstream
from s3prl_speaker_upstreams.superb.run import Run

__all__ = ["check_device", "probe"]


def check_device(device: str, nproc: int = 1) -> None:
    """Raise ConfigError, with the remedy, if torch has no such device here."""
    import torch

    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"--device {device}: torch knows no such device; give cuda, cuda:1 or cpu") from error
    if nproc > 1 and wanted.type != "cuda":
        raise ConfigError(f"--nproc {nproc} with --device {device}: s3prl trains in several processes on CUDA only")
    if wanted.type != "cuda":
        return
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise ConfigError(
            f"--device {device}: torch {torch.__version__} ({built}) finds no GPU here; give --device cpu, or start on "
            "a machine with one (nvidia-smi shows it)"
        )
    count = torch.cuda.device_count()
    if (wanted.index or 0) >= count or nproc > count:
        raise ConfigError(f"--device {device}{f' --nproc {nproc}' if nproc > 1 else ''}: there are {count} GPUs here")


def probe(run: Run) -> dict[str, Any]:
    """Load the upstream in a process of its own: layers, dimension, samples a frame, digests.

    Raises UnknownUpstream if s3prl does not know it or it gives no such feature; RunFailed if it does not load.
    """
    arguments = [run.upstream, "--feature", run.feature, "--device", run.device]
    for option, value in (("--ckpt", run.place(run.ckpt)), ("--model-config", run.place(run.model_config))):
        arguments += [option, value] if value else []
    text = stock.run_stock(run, arguments, run.folder / "check.log", module="s3prl_speaker_upstreams.superb.probe")
    answer = json.loads(text.strip().splitlines()[-1])
    if answer.get("error") == "feature":
        raise UnknownUpstream(
            f"--feature {run.feature}: {run.upstream} gives no such feature (s3prl would take hidden_states instead); "
            f"it gives {', '.join(answer['known'])}"
        )
    if "error" in answer:
        near = nearest(run.upstream, answer["known"], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "none of them is spelt like it"
        raise UnknownUpstream(
            f"s3prl knows no upstream {run.upstream!r} among its {len(answer['known'])}; {hint} All of them: "
            "python -c 'import s3prl.hub as h; print(*dir(h))'"
        )
    return answer
