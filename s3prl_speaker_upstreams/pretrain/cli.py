"""Command line of pre-training: ``pretrain``, ``evaluate``, ``export``, ``average``; hooked in by the package's CLI."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..common.config import add_arguments, build, option, values_of
from ..errors import ConfigError
from .config import PretrainConfig, differences, load
from .presets import PRESETS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["add_parsers"]

logger = logging.getLogger(__name__)

PRESET_NAMES = ", ".join(PRESETS)


@dataclasses.dataclass
class PretrainOptions:
    """Options of ``pretrain``."""

    preset: str | None = option(None, metavar="NAME", help="published or tried settings to start from: " + PRESET_NAMES)
    config: str | None = option(None, metavar="YAML", help="settings in a file; they win over the preset")
    data: list[str] = option([], metavar="FOLDER|LIST", help="speech to train on (data.train)")
    noise: str | None = option(None, metavar="FOLDER", help="noise recordings or MUSAN (data.augment.noise)")
    rirs: str | None = option(None, metavar="FOLDER", help="room impulse responses or RIRS_NOISES (data.augment.rirs)")
    trials: str | None = option(
        None, metavar="LIST", help="trial list for the EER during training: 'label enrol test' a line"
    )
    trials_root: str | None = option(
        None, metavar="FOLDER", help="folder that the trial list's files are relative to (default: the list's)"
    )
    out: str | None = option(None, metavar="FOLDER", help="checkpoints, logs and the exported model")
    stop_after: int | None = option(None, metavar="STEP", help="stop (resumable) after this optimizer step")
    changed_config: bool = option(
        False, help="go on although settings, batch, data or number of processes were changed, from the same epoch"
    )
    show: bool = option(False, help="print the effective configuration as YAML and stop")
    diff: list[str] = option(
        [], metavar="PRESET|YAML", help="with --show and two presets or files: print where they differ and stop"
    )

    def __post_init__(self) -> None:
        if self.diff and len(self.diff) != 2:
            raise ConfigError(f"--diff: got {len(self.diff)} configurations, expected two presets or YAML files")

    def settings(self, overrides: Sequence[str]) -> PretrainConfig:
        """The run's configuration with ``key=value`` ``overrides`` and what the other options say."""
        given: dict[str, Any] = {}
        if self.data:
            given["data"] = {"train": list(self.data)}
        augment = {key: value for key, value in (("noise", self.noise), ("rirs", self.rirs)) if value}
        if augment:
            given.setdefault("data", {})["augment"] = augment
        if self.trials:
            given["eval"] = {"trials": self.trials, "root": self.trials_root}
        return load(self.preset, file=self.config, overrides=overrides, given=given)


@dataclasses.dataclass
class ExportOptions:
    """Options of ``export``."""

    which: str = option("newest", help="newest, best or a step")
    role: Literal["teacher", "student", "supervised"] | None = option(None, help="which network; default: the teacher")
    fp16: bool = option(False, help="half the size")
    calibrate_on: str | None = option(
        None, metavar="FOLDER", help="measure BatchNorm statistics anew on this clean speech"
    )
    calibrate_batches: int = option(12, help="batches of 32 segments to measure them on")


@dataclasses.dataclass
class AverageOptions:
    """Options of ``average``."""

    last: int | None = option(
        None, help="how many of a run's newest checkpoints; more than there are is an error (default: 5, or all)"
    )
    role: Literal["teacher", "student", "supervised"] | None = option(None, help="which network; default: the teacher")
    fp16: bool = option(False, help="half the size")


def _pretrain(args: argparse.Namespace) -> int:
    import yaml

    options = build(PretrainOptions, values_of(args, PretrainOptions))
    if options.diff:
        one, two = (load(x) if x in PRESETS else load(file=x) for x in options.diff)
        lines = [f"{key}: {a!r} | {b!r}" for key, (a, b) in differences(one, two).items()]
        sys.stdout.write("\n".join(lines or ["no difference"]) + "\n")
        return 0
    config = options.settings(args.set)
    if options.show:
        from .start import adopted

        config.model = adopted(config.model, options.out)[0]
        sys.stdout.write(yaml.safe_dump(config.to_dict(), sort_keys=False))
        for line in config.missing:
            sys.stderr.write(f"note: {line}\n")
        return 0
    from .assemble import build_trainer
    from .checkpointing import rng_state
    from .export import export_state
    from .ranks import is_main

    if options.out is None:
        raise ConfigError("--out FOLDER is needed: checkpoints, logs and the exported model go there")
    out = Path(options.out)
    trainer = build_trainer(config, out, changed_config=options.changed_config)
    trainer.run(stop_after=options.stop_after)
    trainer.loader.close()
    if trainer.stopped:  # 143 after SIGTERM, 130 after Ctrl-C: no script takes a half-trained model for a trained one
        return 128 + trainer.stopped
    if not is_main():
        return 0
    if not trainer.finished:
        sys.stderr.write(f"stopped after step {trainer.step} of {trainer.last_step}, as --stop-after says\n")
        return 0
    path = out / "checkpoints" / f"step_{trainer.step:08d}.pt"
    try:  # what is in memory: the disk may not have taken the last checkpoint
        written = export_state(trainer.state(rng=[rng_state()]), path, out / "model.safetensors")
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
    from .checkpointing import CheckpointStore, is_run_checkpoint
    from .export import encoder_of, find_checkpoint

    if not ((path / "checkpoints").is_dir() or is_run_checkpoint(path)):
        return None
    return encoder_of(CheckpointStore.load(find_checkpoint(path, which)), role)[0]


def _export(args: argparse.Namespace) -> int:
    from .export import export

    o = build(ExportOptions, values_of(args, ExportOptions))
    calibration = list(_calibration(o.calibrate_on, o.calibrate_batches)) if o.calibrate_on else None
    written = export(args.run, args.destination, which=o.which, role=o.role, calibration=calibration, fp16=o.fp16)
    sys.stdout.write(f"{written}\n")
    return 0


def _calibration(source: str, batches: int, rows: int = 32, seconds: float = 3.0) -> Iterator[list[Tensor]]:
    """Unaugmented segments: ``batches`` lists of ``rows`` waveforms of ``seconds``, spread over the data."""
    import numpy as np
    import torch

    from ..data.datasets import MultiCropDataset
    from ..data.manifest import build_manifest

    manifest = build_manifest(source, layout="none")
    dataset = MultiCropDataset(manifest, n_global=1, n_local=0, global_seconds=seconds)
    picks = np.linspace(0, len(manifest) - 1, batches * rows).astype(int)
    for start in range(0, len(picks), rows):
        yield [torch.from_numpy(dataset[(start, int(i))].global_crops[0]) for i in picks[start : start + rows]]


def _average(args: argparse.Namespace) -> int:
    from .export import average_checkpoints

    o = build(AverageOptions, values_of(args, AverageOptions))
    written = average_checkpoints(args.sources, args.destination, last=o.last, role=o.role, fp16=o.fp16)
    sys.stdout.write(f"{written}\n")
    return 0


def add_parsers(subparsers: Any) -> None:
    """Add this area's verbs to ``argparse`` subparsers; each sets ``func(args) -> exit code``."""
    from ..verification import cli as verification_cli

    formatter = argparse.RawDescriptionHelpFormatter

    p = subparsers.add_parser(
        "pretrain",
        help="train a speaker model (DINO or AAM-softmax) from a folder of speech; goes on where it was stopped",
        description="Train ECAPA-TDNN from a folder of wav or flac. Run the same line again to go on after any stop.\n"
        "Many GPUs: torchrun --nproc_per_node=8 -m s3prl_speaker_upstreams.cli pretrain ...",
        epilog="examples:\n  s3prl-speaker pretrain --preset small_dino --data speech/ --noise noise/ --out exp/small\n"
        "  s3prl-speaker pretrain --preset voxceleb2_dino --data vox2/dev/wav --noise musan --rirs RIRS_NOISES "
        "--out exp/dino --set run.batch=32 run.precision=bf16\n"
        "  s3prl-speaker pretrain --preset voxceleb2_dino --show      # print the whole configuration\n"
        "  s3prl-speaker pretrain --show --diff matched_dino matched_supervised\n\n"
        "exit codes: 0 done, 1 an error (its last whole step is saved), 143 stopped by SIGTERM, 130 by Ctrl-C\n"
        "run.accumulate=N is not run.batch times N: batch statistics see each micro-batch alone (pretrain/README.md)",
        formatter_class=formatter,
    )
    add_arguments(p, PretrainOptions)
    p.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="e.g. optim.lr=0.1; wins over both"
    )
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
    add_arguments(p, ExportOptions)
    p.set_defaults(func=_export)

    p = subparsers.add_parser(
        "average", help="average checkpoints of one run into one model", formatter_class=formatter,
        description="Average the last checkpoints of a run, or the given checkpoints, parameter by parameter.",
    )  # fmt: skip
    p.add_argument("sources", nargs="+", help="a run's folder, or checkpoints")
    p.add_argument(
        "destination", help="a .safetensors file or a folder: the encoder; a .pt file: all weights, for model.init"
    )
    add_arguments(p, AverageOptions)
    p.set_defaults(func=_average)
