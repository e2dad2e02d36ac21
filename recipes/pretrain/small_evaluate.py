#!/usr/bin/env python3
"""Measure small_dino runs on joined digits beside the same network untrained and FBANK, all under one policy.

    python recipes/pretrain/small_evaluate.py RUN [RUN ...] --digits FOLDER --train FOLDER --noise FOLDER \\
        --rirs FOLDER --out FOLDER

Policy, the same for every network: the newest checkpoint of the run (the last step, fixed before training), BatchNorm
statistics measured anew on the same 14 x 32 crops of the training speech with the training augmentation, scores by
cosine after mean removal, whitening or WCCN fitted on unlabelled training speech. The untrained network has the trained
one's configuration and the run's seed. "fbank" is mean and deviation of the network's own log-mel features, "fbank
(native)" of the native dialect's.

Writes digits.{csv,json} (every row), digits_summary.csv (mean and range over seeds), curves.png and .csv.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from s3prl_speaker_upstreams.common.files import write_text
from s3prl_speaker_upstreams.data.datasets import MultiCropDataset
from s3prl_speaker_upstreams.ecapa import Frontend, SpeakerEncoder
from s3prl_speaker_upstreams.pretrain.assemble import make_augmenter, make_manifest
from s3prl_speaker_upstreams.pretrain.checkpointing import CheckpointStore
from s3prl_speaker_upstreams.pretrain.config import PretrainConfig
from s3prl_speaker_upstreams.pretrain.export import encoder_of, find_checkpoint, recalibrate_encoder
from s3prl_speaker_upstreams.pretrain.objective import model_configs
from s3prl_speaker_upstreams.verification.digits import digits_test, evaluate_digits
from s3prl_speaker_upstreams.verification.embedding import embed_with, fbank_statistics
from s3prl_speaker_upstreams.verification.plots import plot_training, save_plot
from s3prl_speaker_upstreams.verification.tables import table, write_rows

CURVES = ("loss", "kl", "teacher_entropy", "marginal_entropy", "effective_dimension", "embedding_spread")


def calibration_crops(config: PretrainConfig, batches: int = 14, rows: int = 32) -> list[list[torch.Tensor]]:
    """Waveforms as training sees them, drawn with a seed of their own."""
    manifest = make_manifest(config)
    dataset = MultiCropDataset(
        manifest,
        n_global=1,
        n_local=0,
        global_seconds=config.data.global_seconds,
        augment=make_augmenter(config.data.augment),
        seed=20_000,
    )
    picks = np.random.default_rng(0).permutation(len(manifest))[: batches * rows]
    wavs = [torch.from_numpy(dataset[(0, int(i))].global_crops[0]) for i in picks]
    return [wavs[i : i + rows] for i in range(0, len(wavs) - rows + 1, rows)]


def summary(rows: list[dict]) -> str:
    """Mean and range of the EER over seeds, one line per network, test and scoring, as CSV."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["name"].split("#")[0], row["test"], row["scoring"]), []).append(100 * row["eer"])
    lines = ["name,test,scoring,eer_mean,eer_lowest,eer_highest,seeds"]
    for (name, test, scoring), values in groups.items():
        lines.append(f"{name},{test},{scoring},{np.mean(values):.2f},{min(values):.2f},{max(values):.2f},{len(values)}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of `pretrain` runs that differ in their seed")
    parser.add_argument("--digits", required=True, help="<speaker>/<clip> files")
    parser.add_argument("--train", required=True, help="the training speech")
    parser.add_argument("--noise", required=True)
    parser.add_argument("--rirs", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)

    embeds, calibration, policy = {"fbank (native)": fbank_statistics()}, None, {}
    for run in args.runs:
        state = CheckpointStore.load(find_checkpoint(run))
        config = PretrainConfig.from_dict(state["config"])
        config.data.train = [args.train]
        if calibration is None:
            calibration = calibration_crops(config)
            embeds["fbank"] = fbank_statistics(Frontend(model_configs(config.model)[1]).log_mel)
        seed = config.run.seed
        trained, _ = encoder_of(state)
        torch.manual_seed(seed)
        untrained = SpeakerEncoder(*model_configs(config.model)).eval()
        for name, encoder in (("trained", trained), ("untrained", untrained)):
            recalibrate_encoder(encoder, calibration)
            embeds[f"{name}#{seed}"] = embed_with(encoder)
        policy[run.name] = {"step": state["step"], "seed": seed}
    rows = evaluate_digits(embeds, digits_test(args.digits), args.train, noise=args.noise, rirs=args.rirs)
    write_rows(rows, args.out / "digits", settings={"runs": policy, "norms": "recalibrated, 14 x 32 training crops"})
    write_text(args.out / "digits_summary.csv", summary(rows))
    figure, _ = plot_training({run.name: run / "metrics.jsonl" for run in args.runs}, keys=CURVES)
    save_plot(figure, args.out / "curves.png")
    sys.stdout.write(table(rows) + "\n\n" + summary(rows))


if __name__ == "__main__":
    main()
