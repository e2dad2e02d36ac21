"""Published and tried settings by name, with the source of their numbers."""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS"]

# WeSpeaker examples/voxceleb/v3/dino/conf/ecapa_tdnn.yaml and ssl/bin/train_dino.py at commit
# dfa741957e5c11f477623b6e583d67d0af25ee88: ECAPA C=512 with global-context attention and BatchNorm behind the
# embedding, Vox1-O 3.016 % EER. 2 GPUs x 64; lr 0.2 and min_lr 5e-5 per 256 utterances; 150 epochs, 20 warm-up; SGD,
# momentum 0.9, no Nesterov; clip 3 per parameter; last layer frozen for one epoch; teacher temperature 0.04 to 0.07
# over 20 % of the run; centre momentum 0.9; teacher momentum 0.996 to 1; crops 2 x 300 and 4 x 200 frames; every crop
# gets either reverberation or MUSAN noise (here each with probability 0.5: some get both and some neither).
_VOXCELEB2_DINO: dict[str, Any] = {
    "method": "dino",
    "model": {"dialect": "wespeaker", "ecapa": {"channels": 512, "attention_context": True, "embedding_norm": True}},
    "data": {
        "workers": 12,
        "augment": {"noise_p": 0.5, "rir_p": 0.5},
    },
    "optim": {"lr": 0.2, "min_lr": 5e-5, "warmup": "20 epochs", "weight_decay": 5e-5, "weight_decay_end": 5e-5},
    "run": {"epochs": 150, "batch": 64},
}

# WeSpeaker examples/voxceleb/v2/conf/ecapa_tdnn.yaml, utils/schedulers.py, same commit: ECAPA C=512, Vox1-O 1.069 %
# EER (0.957 with AS-norm). Segments of 200 frames, noise or reverberation with probability 0.6, speeds 0.9 / 1.0 / 1.1
# as three times the speakers; SGD with Nesterov, weight decay 1e-4 on every parameter, lr 0.1 to 5e-5 exponentially
# with 6 warm-up epochs, scaled by global batch / 64; scale 32, margin 0 to 0.2 between epochs 20 and 40.
# Compare 3D-Speaker egs/voxceleb/sv-ecapa/conf/ecapa_tdnn.yaml (commit 09e7806729ed412d3f216316a552a30c8e9e37fa):
# C=1024, 3 s, augmentation 0.8, lr 0.2 cosine to 5e-5 over 70 epochs at batch 256, margin 0.3 between epochs 20 and 50.
_VOXCELEB2_SUPERVISED: dict[str, Any] = {
    "method": "supervised",
    "model": {"dialect": "wespeaker", "ecapa": {"channels": 512, "attention_context": True}},
    "data": {"seconds": 2.015, "workers": 16, "augment": {"noise_p": 0.3, "rir_p": 0.3}},
    "aam": {"scale": 32.0, "margin": 0.2, "margin_start": "19 epochs", "margin_end": "39 epochs"},
    "optim": {
        "lr": 0.1,
        "min_lr": 5e-5,
        "lr_reference_batch": 64,
        "schedule": "exponential",
        "warmup": "6 epochs",
        "nesterov": True,
        "weight_decay": 1e-4,
        "weight_decay_end": 1e-4,
        "decay_norm_and_bias": True,
        "clip": 0.0,
    },
    "run": {"epochs": 150, "batch": 128},
}

# Large-margin fine-tuning, WeSpeaker examples/voxceleb/v2/conf/*_lm.yaml: 6 s segments, margin fixed at 0.5, 5 epochs,
# lr 1e-4 to 2.5e-5 after one warm-up epoch, batch 64. Speed perturbation is off and the classifier keeps the three
# classes of each speaker (bin/train.py: "No speed perturb while doing large margin fine-tuning"). It starts from the
# average of the supervised run: s3prl-speaker average RUN average.pt, then model.init=average.pt.
_VOXCELEB2_LARGE_MARGIN: dict[str, Any] = {
    **_VOXCELEB2_SUPERVISED,
    "data": {**_VOXCELEB2_SUPERVISED["data"], "seconds": 6.015, "speeds": [1.0], "speed_classes": 3},
    "aam": {"scale": 32.0, "margin": 0.5, "initial_margin": 0.5, "margin_start": "0 epochs", "margin_end": "0 epochs"},
    "optim": {**_VOXCELEB2_SUPERVISED["optim"], "lr": 1e-4, "min_lr": 2.5e-5, "warmup": "1 epoch"},
    "run": {"epochs": 5, "batch": 64},
}

# The recipe found by experiment on an hour of unlabelled commands (one CPU thread, minutes): Sinkhorn-Knopp targets and
# KoLeo, because plain centring collapses on so little data; a small network with stride 2; crops of 2 and 1 seconds;
# light noise, no reverberation. Give it speech whose silent ends were cut off (recipes/pretrain/trim_silence.py): crops
# that are mostly silence have nothing in common. The front-end ends at 4 kHz (60 bands, as dense as 80 up to 8 kHz):
# the test set (digits) has nothing above, and a network that never looks there behaves the same on telephone and on
# wide-band speech. Single precision: processors with bfloat16 arithmetic are 1.65 times faster with run.precision=bf16,
# those without it 15 times slower.
_SMALL_DINO: dict[str, Any] = {
    "method": "dino",
    "model": {
        "ecapa": {"n_mels": 60, "channels": 128, "mfa_channels": 384, "stride": 2, "embedding_dim": 128},
        "frontend": {
            "n_mels": 60,
            "fmax": 4000.0,
            "n_fft": 512,
            "window": "hann",
            "center_pad": "reflect",
            "mel": "htk",
            "log": "ln",
            "log_floor": 1e-6,
            "log_floor_mode": "add",
            "top_db": None,
        },
    },
    "data": {
        "global_seconds": 2.0,
        "local_seconds": 1.0,
        "feature_versions": 8,
        "augment": {"noise_p": 0.5, "snr_db": [15.0, 30.0], "rir_p": 0.0},
    },
    "dino": {
        "prototypes": 2048,
        "head_hidden": 512,
        "bottleneck": 128,
        "head_norm": False,
        "targets": "sinkhorn",
        "koleo": 0.3,
        "teacher_temp": 0.04,
        "momentum": 0.98,
        "momentum_end": 0.998,
        "freeze_last_layer": "1 epoch",
    },
    "optim": {
        "name": "adamw",
        "lr": 1e-3,
        "min_lr": 1e-5,
        "lr_reference_batch": None,
        "warmup": "40 steps",
        "weight_decay": 1e-4,
        "weight_decay_end": 1e-4,
        "clip": 3.0,
        "clip_mode": "global",
    },
    "run": {"steps": 240, "batch": 32, "log_every": 10, "save_every": "50 steps", "seed": 1},
}

_SMALL_SUPERVISED: dict[str, Any] = {
    "method": "supervised",
    "model": _SMALL_DINO["model"],
    "data": {
        "seconds": 2.0,
        "min_seconds": 1.0,
        "speeds": [1.0],
        "augment": {"noise_p": 0.5, "snr_db": [10.0, 30.0], "rir_p": 0.2},
    },
    "aam": {"margin": 0.2, "margin_start": "20%", "margin_end": "50%"},
    "optim": {**_SMALL_DINO["optim"], "weight_decay": 1e-3, "weight_decay_end": 1e-3},
    "run": {"steps": 400, "batch": 64, "log_every": 10, "save_every": "50 steps", "seed": 1},
}

# A matched pair: the same crops of the same utterances in the same order, augmentation, network, front-end, optimizer
# and length; only ``method`` differs (`pretrain --show --diff matched_dino matched_supervised`). The supervised one
# classifies every crop that DINO's student sees. Optimizer and crops are the DINO recipe's, the margin is the
# supervised one's; neither was tuned for the other objective.
_MATCHED: dict[str, Any] = {
    **_VOXCELEB2_DINO,
    "data": {**_VOXCELEB2_DINO["data"], "crops": "multi", "speeds": [1.0]},
    "aam": {"scale": 32.0, "margin": 0.2, "margin_start": "19 epochs", "margin_end": "39 epochs"},
}
_MATCHED_SMALL: dict[str, Any] = {
    **_SMALL_DINO,
    "data": {**_SMALL_DINO["data"], "crops": "multi", "speeds": [1.0]},
    "aam": {"margin": 0.2, "margin_start": "20%", "margin_end": "50%"},
}

# Seconds, not minutes: that a machine can train at all, and what the tests run.
_SMOKE: dict[str, Any] = {
    "method": "dino",
    "model": {
        "ecapa": {
            "channels": 32,
            "mfa_channels": 48,
            "embedding_dim": 24,
            "se_channels": 16,
            "attention_channels": 16,
            "stride": 2,
        }
    },
    "data": {"global_seconds": 0.8, "local_seconds": 0.5, "local_crops": 2, "min_seconds": 0.4, "seconds": 0.6},
    "simclr": {"head": {"hidden": 32, "dim": 16}},
    "vicreg": {"head": {"layers": 2, "hidden": 32, "dim": 32}},
    "dino": {
        "prototypes": 64,
        "head_hidden": 32,
        "bottleneck": 16,
        "head_norm": False,
        "targets": "sinkhorn",
        "koleo": 0.1,
        "teacher_temp": 0.04,
        "momentum": 0.9,
        "freeze_last_layer": "2 steps",
        "collapse": {"action": "warn"},
    },
    "aam": {"margin_start": "20%", "margin_end": "60%"},
    "optim": {
        "name": "adamw",
        "lr": 1e-3,
        "min_lr": 1e-4,
        "lr_reference_batch": None,
        "warmup": "3 steps",
        "weight_decay": 1e-4,
        "weight_decay_end": 1e-4,
    },
    "run": {"steps": 20, "batch": 8, "log_every": 1, "save_every": "5 steps", "tensorboard": False, "seed": 0},
}

PRESETS: dict[str, dict[str, Any]] = {
    "voxceleb2_dino": _VOXCELEB2_DINO,
    "voxceleb2_supervised": _VOXCELEB2_SUPERVISED,
    "voxceleb2_large_margin": _VOXCELEB2_LARGE_MARGIN,
    "small_dino": _SMALL_DINO,
    "small_supervised": _SMALL_SUPERVISED,
    "matched_dino": _MATCHED,
    "matched_supervised": {**_MATCHED, "method": "supervised"},
    "matched_small_dino": _MATCHED_SMALL,
    "matched_small_supervised": {**_MATCHED_SMALL, "method": "supervised"},
    "smoke": _SMOKE,
}
