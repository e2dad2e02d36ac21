"""Command line of pre-training: ``pretrain``, ``evaluate``, ``export``, ``average``; hooked in by the package's CLI."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["add_parsers"]

logger = logging.getLogger(__name__)


def _pretrain(args: argparse.Namespace) -> int:
    import yaml

    from .config import load

    overrides = list(args.set)
    config = load(args.preset, file=args.config, overrides=overrides)
    if args.data:
        config.data.train = list(args.data)
    given = {key: value for key, value in (("noise", args.noise), ("rirs", args.rirs)) if value}
    config.data.augment = dataclasses.replace(config.data.augment, **given)
    if args.trials:
        config.eval.trials, config.eval.root = args.trials, args.trials_root
    if args.show:
        sys.stdout.write(yaml.safe_dump(config.to_dict(), sort_keys=False))
        return 0
    from ..errors import ConfigError
    from .assemble import build_trainer
    from .checkpointing import rng_state
    from .distributed import is_main
    from .export import export_state

    if args.out is None:
        raise ConfigError("--out FOLDER is needed: checkpoints, logs and the exported model go there")
    trainer = build_trainer(config, args.out, changed_config=args.changed_config)
    if is_main():
        sys.stderr.write(trainer.describe() + "\n")
    trainer.run(stop_after=args.stop_after)
    trainer.loader.close()
    if trainer.stopped:  # 143 after SIGTERM, 130 after Ctrl-C: no script takes a half-trained model for a trained one
        return 128 + trainer.stopped
    if not trainer.finished:
        sys.stderr.write(f"stopped after step {trainer.step} of {trainer.last_step}, as --stop-after says\n")
        return 0
    if not is_main():
        return 0
    path = Path(args.out) / "checkpoints" / f"step_{trainer.step:08d}.pt"
    try:  # what is in memory: the disk may not have taken the last checkpoint
        written = export_state(trainer.state(rng=[rng_state()]), path, Path(args.out) / "model.safetensors")
    except OSError as error:
        raise ConfigError(f"trained, but the model could not be written: {error}; free space and run again") from error
    sys.stderr.write(f"trained: {written}\nuse it:  -u {_entry(config.method)} -k {written}\n")
    if not trainer.saved:
        raise ConfigError(
            f"{written} is the trained model, but the checkpoint of step {trainer.step} could not be written: the run "
            "cannot be averaged or continued from there. Free space and run the same command again"
        )
    return 0


def _entry(method: str) -> str:
    return "ecapa_dino_local" if method == "dino" else "ecapa_tdnn_local"


def _open_run(source: str, which: str, role: str | None) -> Any:
    """Encoder of a run's folder or checkpoint; None if ``source`` is something else."""
    path = Path(source)
    if not ((path / "checkpoints").is_dir() or (path.name.startswith("step_") and path.suffix == ".pt")):
        return None
    from .checkpointing import CheckpointStore
    from .export import encoder_of, find_checkpoint

    return encoder_of(CheckpointStore.load(find_checkpoint(path, which)), role)[0]


def _export(args: argparse.Namespace) -> int:
    from .export import export

    calibration = None
    if args.calibrate_on:
        calibration = list(_calibration(args.calibrate_on, args.calibrate_batches))
    written = export(
        args.run, args.destination, which=args.which, role=args.role, calibration=calibration, fp16=args.fp16
    )
    sys.stdout.write(f"{written}\n")
    return 0


def _calibration(source: str, batches: int, rows: int = 32, seconds: float = 3.0) -> Iterator[list[Tensor]]:
    """Unaugmented segments: ``batches`` lists of ``rows`` waveforms of ``seconds``, spread over the data."""
    import numpy as np
    import torch

    from ..data.datasets import MultiCropDataset
    from ..data.manifest import build_manifest

    manifest = build_manifest(source)
    dataset = MultiCropDataset(manifest, n_global=1, n_local=0, global_seconds=seconds)
    picks = np.linspace(0, len(manifest) - 1, batches * rows).astype(int)
    for start in range(0, len(picks), rows):
        yield [torch.from_numpy(dataset[(start, int(i))].global_crops[0]) for i in picks[start : start + rows]]


def _average(args: argparse.Namespace) -> int:
    from .export import average_checkpoints

    written = average_checkpoints(args.sources, args.destination, last=args.last, role=args.role, fp16=args.fp16)
    sys.stdout.write(f"{written}\n")
    return 0


def add_parsers(subparsers: Any) -> None:
    """Add this area's verbs to ``argparse`` subparsers; each sets ``func(args) -> exit code``."""
    from ..verification import cli as verification_cli
    from .config import PRESETS

    formatter = argparse.RawDescriptionHelpFormatter

    p = subparsers.add_parser(
        "pretrain",
        help="train a speaker model (DINO or AAM-softmax) from a folder of speech; goes on where it was stopped",
        description="Train ECAPA-TDNN from a folder of wav or flac. Run the same line again to go on after any stop.\n"
        "Many GPUs: torchrun --nproc_per_node=8 -m s3prl_speaker_upstreams.cli pretrain ...",
        epilog="examples:\n  s3prl-speaker pretrain --preset small_dino --data speech/ --noise noise/ --out exp/small\n"
        "  s3prl-speaker pretrain --preset voxceleb2_dino --data vox2/dev/wav --noise musan --rirs RIRS_NOISES "
        "--out exp/dino --set run.batch=32 run.precision=bf16\n"
        "  s3prl-speaker pretrain --preset voxceleb2_dino --show      # print the whole configuration",
        formatter_class=formatter,
    )
    p.add_argument("--preset", choices=sorted(PRESETS), help="published or tried settings to start from")
    p.add_argument("--config", metavar="YAML", help="settings in a file; they win over the preset")
    p.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="e.g. optim.lr=0.1; wins over both"
    )
    p.add_argument("--data", nargs="+", metavar="FOLDER|LIST", help="speech to train on (data.train)")
    p.add_argument("--noise", metavar="FOLDER", help="noise recordings or MUSAN (data.augment.noise)")
    p.add_argument("--rirs", metavar="FOLDER", help="room impulse responses or RIRS_NOISES (data.augment.rirs)")
    p.add_argument("--trials", metavar="LIST", help="trial list for the EER during training: 'label enrol test' a line")
    p.add_argument("--trials-root", metavar="FOLDER", help="folder that the trial list's files are relative to")
    p.add_argument("--out", metavar="FOLDER", help="checkpoints, logs and the exported model")
    p.add_argument("--stop-after", type=int, metavar="STEP", help="stop (resumable) after this optimizer step")
    p.add_argument("--changed-config", action="store_true", help="go on although the configuration was changed")
    p.add_argument("--show", action="store_true", help="print the effective configuration as YAML and stop")
    p.set_defaults(func=_pretrain)

    verification_cli.add_parsers(subparsers, _open_run)

    p = subparsers.add_parser(
        "export",
        help="write a run's encoder as one file for -u ecapa_dino_local -k FILE",
        description="Write the teacher (DINO) or the network (supervised) of a run with its provenance.",
        formatter_class=formatter,
    )
    p.add_argument("run", help="the --out folder of a `pretrain` run, or one of its step_N.pt")
    p.add_argument("destination", help="a .safetensors file or a folder")
    p.add_argument("--which", default="newest", help="newest, best or a step")
    p.add_argument("--role", choices=("teacher", "student", "supervised"))
    p.add_argument("--fp16", action="store_true", help="half the size")
    p.add_argument("--calibrate-on", metavar="FOLDER", help="measure BatchNorm statistics anew on this clean speech")
    p.add_argument("--calibrate-batches", type=int, default=12)
    p.set_defaults(func=_export)

    p = subparsers.add_parser(
        "average", help="average checkpoints of one run into one model", formatter_class=formatter,
        description="Average the last checkpoints of a run, or the given checkpoints, parameter by parameter.",
    )  # fmt: skip
    p.add_argument("sources", nargs="+", help="a run's folder, or checkpoints")
    p.add_argument("destination", help="a .safetensors file or a folder")
    p.add_argument(
        "--last", type=int, metavar="N",
        help="how many of a run's newest checkpoints; more than there are is an error (default: 5, or all of fewer)",
    )  # fmt: skip
    p.add_argument("--role", choices=("teacher", "student", "supervised"))
    p.add_argument("--fp16", action="store_true", help="half the size")
    p.set_defaults(func=_average)
