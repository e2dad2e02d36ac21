#!/usr/bin/env python3
"""Write the small DINO model as the file that the package ships, with its model card.

python recipes/pretrain/small_ship.py RUN --train FOLDER --results FOLDER --out FILE.safetensors
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch

from s3prl_speaker_upstreams.pretrain.checkpointing import CheckpointStore
from s3prl_speaker_upstreams.pretrain.config import PretrainConfig
from s3prl_speaker_upstreams.pretrain.export import export, find_checkpoint, model_card

sys.path.insert(0, str(Path(__file__).parent))
from small_evaluate import calibration_crops

LICENCE = "Apache-2.0"
DATA = (
    "Picovoice speech-to-intent-benchmark (470 spoken coffee orders, 67 minutes, 27 without the silence at their ends, "
    "16 kHz, more than 50 speakers, Apache-2.0), without any label. Noise: 5 recordings of SpeechBrain's test samples "
    "(Apache-2.0)."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of the run whose last checkpoint is shipped")
    parser.add_argument("--train", required=True, help="the training speech, to measure BatchNorm statistics on")
    parser.add_argument("--results", required=True, type=Path, help="folder that small_evaluate.py wrote")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    state = CheckpointStore.load(find_checkpoint(args.run))
    config = PretrainConfig.from_dict(state["config"])
    config.data.train = [args.train]
    with open(args.results / "digits_summary.csv") as stream:
        rows = list(csv.DictReader(stream))
    measured = {f"{r['name']}/{r['test']}/{r['scoring']}": float(r["eer_mean"]) for r in rows}
    extra = {"licence": LICENCE, "data": DATA, "digits_eer_percent_mean_over_seeds": measured}
    written = export(args.run, args.out, calibration=calibration_crops(config), fp16=True, extra=extra)

    lines = ["| network | test | scoring | EER %, mean (range) over seeds |", "|---|---|---|---|"]
    for r in rows:
        low_high = f" ({r['eer_lowest']} to {r['eer_highest']})" if int(r["seeds"]) > 1 else ""
        lines.append(f"| {r['name']} | {r['test']} | {r['scoring']} | {float(r['eer_mean']):.1f}{low_high} |")
    ecapa, front = config.model.ecapa, config.model.frontend
    card = model_card(
        written,
        title="ecapa_dino_small",
        sections={
            "What it is": (
                f"A small ECAPA-TDNN (C={ecapa['channels']}, MFA {ecapa['mfa_channels']}, stride {ecapa['stride']}: "
                f"hidden states every 20 ms, embedding {ecapa['embedding_dim']}), trained by DINO self-distillation "
                f"without labels. {front['n_mels']} log-mel bands up to {front['fmax']:.0f} Hz. The file holds the "
                f"teacher in half precision ({written.stat().st_size / 1e6:.2f} MB)."
            ),
            "Data": DATA,
            "Licence": f"{LICENCE}, as the data.",
            "Training": (
                f"Preset `small_dino`, seed {config.run.seed}, {state['step']} steps of {config.run.batch} utterances, "
                f"{config.run.precision}, one CPU thread: Sinkhorn-Knopp targets, KoLeo {config.dino.koleo}, "
                f"{config.dino.prototypes} prototypes. The settings were found by experiments measured on the same "
                "test speakers as below, so the figures are somewhat optimistic; the number of steps, the checkpoint "
                "(the last) and the shipped seed were fixed before the reported runs were compared. BatchNorm "
                "statistics were measured anew on 14 x 32 training crops. Repeat it with `recipes/pretrain/small.sh "
                "trim train evaluate ship`."
            ),
            "Measured": (
                "Free Spoken Digit Dataset (6 speakers unseen in training, 8 kHz; clips joined to 3 s; all pairs), "
                "equal error rate. `clean`: as recorded; `channel`: each recording through a random room, equaliser, "
                "band and noise. `untrained` is the same network with random weights, `fbank` mean and deviation of "
                "its log-mel features; all networks under the same BatchNorm policy.\n\n" + "\n".join(lines)
            ),
            "Limits": (
                "Made so that a machine without network access has a real model from the first minute: not a speaker "
                "recogniser to rely on. Half an hour of one kind of English speech; six test speakers, each with one "
                "microphone, so that the clean test also rewards recognising the recording. Everything above 4 kHz is "
                "ignored. For results worth publishing use the public checkpoints (`ecapa_tdnn`, `ecapa_dino`)."
            ),
        },
    )
    sys.stdout.write(f"{written}\n{card}\n")


if __name__ == "__main__":
    main()
