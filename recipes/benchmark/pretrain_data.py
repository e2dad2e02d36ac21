"""Cost of the pre-training data: microseconds per augmented crop, share of a training step, waiting of the loader.

    python recipes/benchmark/pretrain_data.py --speech FOLDER

The step it is compared with is forward and backward of the student and forward of the teacher (C=512, batch 4, 2 x 3 s
and 4 x 2 s) on one thread, without head, loss and optimizer: a real step takes longer, so the shares are upper bounds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from results import add_output, write_result

from s3prl_speaker_upstreams.data.augment import AugmentConfig, Augmenter
from s3prl_speaker_upstreams.data.datasets import MultiCropDataset
from s3prl_speaker_upstreams.data.loader import Loader, measure_loader
from s3prl_speaker_upstreams.data.manifest import build_manifest
from s3prl_speaker_upstreams.data.sampler import BatchSampler
from s3prl_speaker_upstreams.ecapa import DIALECTS, SpeakerEncoder
from s3prl_speaker_upstreams.verification.metrics import eer


def median_us(work, repeats: int = 200) -> float:
    """Median microseconds of processor time: other work on the machine does not count."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return float(np.median(times) * 1e6)


def augmentation(speech: Path) -> dict[str, float]:
    """Median microseconds per crop of one thing at a time, and the mean of what training does (p 0.5 each)."""
    sources = {"noise": str(speech / "noise"), "rirs": str(speech / "rirs")}
    kinds = {
        "reverberation": {"rir_p": 1.0, "noise_p": 0.0},
        "noise, decoded in memory": {"rir_p": 0.0, "noise_p": 1.0},
        "noise, slices read from flac": {"rir_p": 0.0, "noise_p": 1.0, "cache_mb": 0.0},
        "band limit": {"rir_p": 0.0, "noise_p": 0.0, "band_limit_hz": 4000.0},
        "reverberation without cached spectra": {"rir_p": 1.0, "noise_p": 0.0, "cache_mb": 0.0},
    }
    out = {}
    for seconds in (2, 3):
        wav = np.random.default_rng(0).normal(0, 0.1, 16000 * seconds).astype(np.float32)
        rng = np.random.default_rng(0)
        for name, settings in kinds.items():
            augmenter = Augmenter(AugmentConfig(**sources, **settings))
            out[f"{name}, {seconds} s"] = median_us(lambda a=augmenter, w=wav, r=rng: a(w, r))
        both = Augmenter(AugmentConfig(**sources))
        begin = time.process_time()
        for _ in range(300):
            both(wav, rng)
        out[f"training mixture, {seconds} s"] = (time.process_time() - begin) / 300 * 1e6
        channel = Augmenter(AugmentConfig.channel_randomised(**sources))
        out[f"random channel, {seconds} s"] = median_us(lambda a=channel, w=wav, r=rng: a(w, r))
    return out


def step_of(channels: int):
    """Student forward and backward on all crops, teacher forward on the global ones."""
    torch.manual_seed(0)
    dialect = DIALECTS["native"]
    student, teacher = (
        SpeakerEncoder(dialect.ecapa_config(channels=channels, mfa_channels=3 * channels), dialect.frontend).train()
        for _ in range(2)
    )

    def step(batch) -> None:
        with torch.no_grad():
            for crop in batch.global_crops:
                teacher(list(crop), outputs=("embedding",))
        for crops in (batch.global_crops, batch.local_crops):
            out = student([wav for crop in crops for wav in crop], outputs=("embedding",))["embedding"]
            out.square().mean().backward()
        for parameter in student.parameters():
            parameter.grad = None

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speech", type=Path, required=True, help="folder with commands/, noise/ and rirs/")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1], help="numbers of loader processes to measure")
    parser.add_argument("--batches", type=int, default=6, help="steps measured for each")
    add_output(parser, "data.loader")
    options = parser.parse_args()
    torch.set_num_threads(1)

    begin = time.perf_counter()
    manifest = build_manifest(options.speech / "keywords", layout="none", cache=False, progress=False)
    scan = (time.perf_counter() - begin) / manifest.report.found * 1e6
    manifest = build_manifest(options.speech / "commands", cache=False, progress=False)

    result: dict = {"us per header read": scan, "us per crop": augmentation(options.speech)}
    augment = Augmenter(AugmentConfig(noise=str(options.speech / "noise"), rirs=str(options.speech / "rirs")))
    step = step_of(512)
    for workers in options.workers:
        loader = Loader(MultiCropDataset(manifest, augment=augment), BatchSampler(len(manifest), 4), workers=workers)
        result[f"loader, {workers} workers, C=512 step, batch 4"] = measure_loader(
            loader, options.batches, step=step, warm_up=1
        )
        loader.close()
    alone = Loader(MultiCropDataset(manifest, augment=augment), BatchSampler(len(manifest), 4))
    result["loader alone"] = measure_loader(alone, 40)
    batch = next(alone)
    seconds = median_us(lambda: step(batch), 1) / 1e6
    costs = result["us per crop"]
    crops = (8 * costs["training mixture, 3 s"] + 16 * costs["training mixture, 2 s"]) / 1e6
    result["augmentation per step"] = {"seconds": crops, "step": seconds, "share of the step": crops / seconds}
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=600_000), rng.random(600_000) < 0.5
    result["seconds for the EER of 600,000 trials"] = median_us(lambda: eer(scores, labels), 5) / 1e6
    share = result["augmentation per step"]
    waits = {k: v for k, v in result.items() if k.startswith("loader")}
    write_result(
        options.out,
        title="Pre-training data: augmentation and loader",
        about="One thread. Processor time for the costs of a crop and of the step, wall time for the loader; medians, "
        "except the mixture, which is a mean (noise and reverberation with probability one half each).",
        tables=[
            {"title": "", "columns": ["per crop", "microseconds"], "rows": [list(item) for item in costs.items()]},
            {
                "title": "Loader",
                "columns": ["what", "measured", "value"],
                "rows": [[name, key, value] for name, found in waits.items() for key, value in _flat(found)],
            },
            {
                "title": "One step and other costs",
                "columns": ["what", "figure"],
                "rows": [
                    ["student forward and backward, teacher forward, C=512, batch 4; seconds", share["step"]],
                    ["augmentation of its 24 crops, seconds", share["seconds"]],
                    ["share of the step", f"{100 * share['share of the step']:.2f} %"],
                    ["microseconds per header read", scan],
                    ["EER of 600,000 trials, seconds", result["seconds for the EER of 600,000 trials"]],
                ],
            },
        ],
        summary=[["augmentation, share of a DINO step", f"{100 * share['share of the step']:.2f} %", ""]],
        data=result,
    )


def _flat(found: object) -> list[tuple[str, object]]:
    return list(found.items()) if isinstance(found, dict) else [("", found)]


if __name__ == "__main__":
    main()
