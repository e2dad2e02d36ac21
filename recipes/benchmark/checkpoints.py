"""Measure checkpoint reading: time and memory at the released files' sizes, and errors against the goldens.

    python recipes/benchmark/checkpoints.py sizes
    python recipes/benchmark/checkpoints.py goldens FOLDER

`sizes` writes files of the released sizes (random weights, C = 1024) to a
temporary folder (about 0.75 GB) and reads each in a fresh process, whose peak memory is what Linux reports of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from results import FOLDER, write_result

READ = """
import sys, time
import torch
from s3prl_speaker_upstreams.checkpoints import load_encoder
from s3prl_speaker_upstreams.ecapa import Ecapa
torch.set_num_threads(1)

def kilobytes(what):  # VmHWM: the most memory held so far; VmRSS: held now
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))

before = kilobytes("VmRSS")
start = time.perf_counter()
if sys.argv[2] == "torch.load":
    held = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
else:
    held = load_encoder(sys.argv[1], format=sys.argv[2] or None, frontend=sys.argv[3] or None)
seconds = time.perf_counter() - start
print(seconds, (kilobytes("VmHWM") - before) * 1024 / 1e6)
"""


def speechbrain_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Canonical tensors under SpeechBrain's names, as the released files have them."""
    from s3prl_speaker_upstreams.checkpoints.formats import BY_NAME

    names = BY_NAME["speechbrain"].names(7)
    return {names[k]: v.unsqueeze(-1) if k == "embedding.weight" else v for k, v in state.items()}


def sizes(destination: Path | None) -> None:
    """Read files of the released sizes in fresh processes."""
    from s3prl_speaker_upstreams.checkpoints import read_checkpoint, save_native, untrained

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        state = untrained("speechbrain").state
        torch.save(speechbrain_names(state), root / "embedding_model.ckpt")
        wide = speechbrain_names(untrained("rdino").state)
        networks = {
            role: {**{f"module.backbone.{k}": v.clone() for k, v in wide.items()},
                   "module.head.mlp.0.weight": torch.randn(2048, 512),
                   "module.head.mlp.2.weight": torch.randn(2048, 2048),
                   "module.head.last_layer.weight_v": torch.randn(65536, 256)}
            for role in ("student", "teacher")
        }  # fmt: skip
        moments = {i: {"momentum_buffer": v.clone()} for i, v in enumerate(networks["student"].values())}
        whole = {**networks, "optimizer": {"state": moments, "param_groups": []}, "epoch": 1, "dino_loss": {}}
        torch.save(whole, root / "pretrained_rdino.pth")
        save_native(read_checkpoint(root / "embedding_model.ckpt", format="speechbrain"), root / "native.safetensors")
        fp16 = root / "native_fp16.safetensors"
        save_native(read_checkpoint(root / "embedding_model.ckpt", format="speechbrain"), fp16, fp16=True)

        rows = []
        for name, how in (
            ("embedding_model.ckpt", ("torch.load", "")),
            ("embedding_model.ckpt", ("speechbrain", "")),
            ("native.safetensors", ("native", "")),
            ("native_fp16.safetensors", ("native", "")),
            ("pretrained_rdino.pth", ("torch.load", "")),
            ("pretrained_rdino.pth", ("rdino", "rdino")),
        ):
            runs = []
            for _ in range(3):
                command = [sys.executable, "-c", READ, str(root / name), *how]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                runs.append(tuple(float(x) for x in out.split()))
            seconds, memory = min(r[0] for r in runs), min(r[1] for r in runs)
            reader = "plain torch.load, no model" if how[0] == "torch.load" else "load_encoder"
            rows.append([name, round((root / name).stat().st_size / 1e6), reader, seconds, round(memory)])
    write_result(
        destination or FOLDER / "checkpoints.sizes.json",
        title="Reading files of the released sizes",
        about="Random weights, C=1024, files in the page cache, one thread, each read by a fresh process; the best of "
        "three. The RDINO-like file holds student, teacher and optimizer: memory-mapped, what is not asked for costs "
        "nothing.",
        tables=[{"title": "", "columns": ["file", "MB", "read by", "seconds", "peak memory added, MB"], "rows": rows}],
        data=rows,
    )


def goldens(folder: Path, destination: Path | None) -> None:
    """Largest error, over all cases, against the original implementations' activations."""
    from s3prl_speaker_upstreams.checkpoints import load_encoder
    from s3prl_speaker_upstreams.ecapa import Ragged

    outputs = ("hidden_states", "mfa", "pooled", "embedding")
    columns = ("features", "blocks", "mfa", "pooled", "embedding", "embedding end to end")
    rows = []
    for item in json.loads((folder / "MANIFEST.json").read_text()):
        golden = torch.load(folder / item["file"], weights_only=True)
        encoder = load_encoder(folder / golden["meta"]["checkpoint"])
        worst: dict[str, float] = {}

        def compare(column: str, found: torch.Tensor, reference: torch.Tensor, worst: dict = worst) -> None:
            error = ((found - reference).abs().max() / reference.abs().max()).item()
            worst[column] = max(worst.get(column, 0.0), error)

        for case in golden["cases"]:
            wav = case["wave_int16"].float() / 32768
            with torch.no_grad():
                whole = encoder([wav], outputs=("fbank", "embedding"))
                features = case.get("features", whole["fbank"].data)
                out = encoder.ecapa(Ragged(features, [len(features)]), outputs=outputs)
            if "features" in case:
                compare("features", whole["fbank"].data, case["features"])
            for i, block in enumerate(out["hidden_states"]):
                if f"block{i}" in case:
                    compare("blocks", block.data.T, case[f"block{i}"])
            if "mfa" in case:
                compare("mfa", out["mfa"].data.T, case["mfa"])
            compare("pooled", out["pooled"][0], case["pooled"])
            compare("embedding", out["embedding"][0], case["embedding"])
            compare("embedding end to end", whole["embedding"][0], case["embedding"])
        rows.append([item["file"].removesuffix(".golden.pt"), *(worst[c] for c in columns)])
    largest = max(float(x) for row in rows for x in row[2:])
    write_result(
        destination or FOLDER / "checkpoints.goldens.json",
        title="Checkpoints against the original implementations",
        about="Largest max |difference| / max |reference| over all cases, float32, CPU, one thread; blocks to "
        "embedding from the original's own features, the last column from the waveform.",
        tables=[{"title": "", "columns": ["golden", *columns], "rows": rows}],
        summary=[[f"largest error against {len(rows)} originals, blocks to embedding", largest, "1e-5"]],
        data=rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("sizes", help="time and memory of reading files of the released sizes")
    verbs.add_parser("goldens", help="errors against the original implementations").add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, metavar="JSON", help="the result (default: in recipes/benchmark/results)")
    args = parser.parse_args()
    logging.getLogger("s3prl_speaker_upstreams").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if args.verb == "sizes":
        sizes(args.out)
    else:
        goldens(args.folder, args.out)


if __name__ == "__main__":
    main()
