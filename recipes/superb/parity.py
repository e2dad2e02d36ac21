#!/usr/bin/env python
"""Do two package stacks give the same SUPERB numbers? Legacy without our stand-ins against current with them.

    python recipes/superb/parity.py --legacy-python OLD/bin/python --s3prl-root CHECKOUT --exp exp/parity

Trains and tests every task on the same generated corpora with the same seed and updates: with the interpreter given by
--legacy-python, on a private copy of a checkout of s3prl and with this project's start-up switched off
(S3PRL_SPEAKER_UPSTREAMS=0), and with the interpreter that runs this script, on its installed s3prl. Prints a row for
each metric: both values and the largest difference between the chosen checkpoints' tensors. Writes EXP/parity.md and
EXP/parity.csv. Exit code 1 if a metric differs by more than --tolerance.

The legacy side needs catalyst for KS (pip install --no-deps --target DIR catalyst==22.4; --legacy-path DIR). ASV calls
.cuda() on every machine, so on CPU the legacy side gets a torch.Tensor.cuda that returns its tensor, and nothing else.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from s3prl_speaker_upstreams.demo.corpora import generate
from s3prl_speaker_upstreams.demo.voices import KINDS
from s3prl_speaker_upstreams.superb.tasks import TASKS as TABLE

TASKS = ("KS", "SID", "ASV", "PR", "IC", "ER", "SD", "QbE")
CONF = Path(__file__).resolve().parent / "conf"
CPU_CUDA = "import torch\ntorch.Tensor.cuda = lambda self, *args, **kwargs: self\n"
COMPARE = """
import argparse, json, sys, torch
def load(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)
worst = 0.0
for first, second in zip(json.loads(sys.argv[1]), json.loads(sys.argv[2]), strict=True):
    first, second = load(first), load(second)
    for part in ("Featurizer", "Downstream"):
        assert first[part].keys() == second[part].keys(), part
        for name, tensor in first[part].items():
            worst = max(worst, (tensor.double() - second[part][name].double()).abs().max().item())
print(worst)
"""


def _side(name: str, python: str, task: str, args: argparse.Namespace, environment: dict[str, str]) -> dict:
    exp = args.exp / name
    command = [python, "-m", "s3prl_speaker_upstreams.superb", "run", task, "fbank", "--smoke", "--device", "cpu"]
    command += ["--exp", str(exp), "--data", str(args.exp / "data" / task), "--conf", str(CONF)]
    if task != "QbE":
        for key, value in (
            ("total_steps", args.updates),
            ("eval_step", args.updates // 2),
            ("save_step", args.updates),
        ):
            command += ["--set", f"runner.{key}={value}"]
    if args.lr and task != "QbE":
        command += ["--lr", args.lr]
    if name == "legacy":
        command += ["--s3prl-root", str(args.exp / "checkout")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    (args.exp / f"{name}-{task}.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise SystemExit(f"{name} {task} failed:\n{done.stderr[-3000:]}")
    return json.loads((exp / "fbank" / task / "result.json").read_text())


def _predictions(task: str, legacy: dict, current: dict) -> str:
    """How the prediction files compare: "same", or how many lines (of text files) differ."""
    verdicts = []
    for source, _ in TABLE[task].predictions:
        first, second = (Path(side["predictions"]) / source for side in (legacy, current))
        if first.is_dir():
            continue  # SD's HDF5 files hold dates; its DER is made from what they hold
        pairs = [sorted(file.read_text().splitlines()) for file in (first, second)]
        different = sum(a != b for a, b in zip(*pairs, strict=True))
        verdicts.append("same" if not different else f"{different} of {len(pairs[0])} lines differ")
    return verdicts[0] if len(set(verdicts)) == 1 else "; ".join(verdicts)


def _environments(args: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    base = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    base.pop("S3PRL_SPEAKER_UPSTREAMS", None)
    legacy = {**base, "S3PRL_SPEAKER_UPSTREAMS": "0"}
    legacy["PYTHONPATH"] = os.pathsep.join(map(str, [*args.legacy_path, Path(__file__).resolve().parents[2]]))
    return legacy, base


def main() -> int:
    """Run both sides of every task and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--legacy-python", required=True)
    parser.add_argument("--s3prl-root", type=Path, required=True, help="checkout of s3prl that the legacy side runs")
    parser.add_argument(
        "--legacy-path", type=Path, action="append", default=[], help="more import folders, legacy side"
    )
    parser.add_argument("--exp", type=Path, default=Path("exp/parity"))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--voices", default="tones", choices=KINDS, help="of the generated corpora")
    parser.add_argument("--lr", help="another learning rate than the stock one, so that few updates learn something")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="of metrics, in the table's units")
    args = parser.parse_args()
    args.exp = args.exp.absolute()
    args.exp.mkdir(parents=True, exist_ok=True)
    if not (args.exp / "checkout").is_dir():
        # a private copy: the recipes write caches beside their code, keyed by split only
        shutil.copytree(
            args.s3prl_root / "s3prl", args.exp / "checkout" / "s3prl", ignore=shutil.ignore_patterns("*.pkl")
        )
        (args.exp / "cpu").mkdir(exist_ok=True)
        (args.exp / "cpu" / "sitecustomize.py").write_text(CPU_CUDA)
    legacy_environment, environment = _environments(args)
    rows = []
    for task in args.tasks.split(","):
        if not (args.exp / "data" / task).is_dir():
            generate(task, args.exp / "data" / task, voices=args.voices)
        old = dict(legacy_environment)
        if task == "ASV":
            old["PYTHONPATH"] = os.pathsep.join([str(args.exp / "cpu"), old["PYTHONPATH"]])
        legacy = _side("legacy", args.legacy_python, task, args, old)
        current = _side("current", sys.executable, task, args, environment)
        pair = [json.dumps(side["checkpoints"]) for side in (legacy, current)]
        weights = subprocess.run([sys.executable, "-c", COMPARE, *pair], capture_output=True, text=True, check=True)
        for metric, value in legacy["metrics"].items():
            same = _predictions(task, legacy, current)
            rows.append([task, metric, value, current["metrics"][metric], same, float(weights.stdout)])
            sys.stdout.write(
                f"{task:4} {metric:8} {value:12.6f} {rows[-1][3]:12.6f}  {same}, tensors {rows[-1][5]:.1e}\n"
            )
            sys.stdout.flush()
    versions = [
        f"{name}: torch {side['versions']['torch']}" for name, side in (("legacy", legacy), ("current", current))
    ]
    head = ["task", "metric", "legacy", "current", "predictions", "largest difference of trained tensors"]
    with open(args.exp / "parity.csv", "w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {t} | {m} | {a:.6g} | {b:.6g} | {p} | {'-' if t == 'QbE' else f'{w:.1e}'} |" for t, m, a, b, p, w in rows
    ]
    lines += ["", f"{args.updates} updates, {'; '.join(versions)}"]
    (args.exp / "parity.md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")
    return int(any(abs(a - b) > args.tolerance for _, _, a, b, _, _ in rows))


if __name__ == "__main__":
    raise SystemExit(main())
