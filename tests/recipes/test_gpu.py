"""The GPU benchmark runs to its end on a CPU, with the packages that it says it needs and no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "benchmark" / "gpu.sh"

# run by every interpreter that finds it on its path: imports of these packages fail as if they were not installed
BLOCK = """
import sys
sys.modules.update(dict.fromkeys({names}))
"""
NOT_NEEDED = {
    "s3prl", "torchaudio", "soxr", "pandas", "matplotlib", "librosa", "tqdm", "filelock", "huggingface_hub",
    "threadpoolctl", "tensorboardX", "transformers", "sklearn", "speechbrain", "cka",
}  # fmt: skip


@pytest.mark.e2e
def test_every_part_runs_small_and_what_needs_more_is_skipped_by_name(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCK.format(names=sorted(NOT_NEEDED)))
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    out = tmp_path / "gpu.json"
    line = [SCRIPT, "--tiny", "--device", "cpu", "--out", out]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=540, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    correctness, speed, skipped, seconds = (table["rows"] for table in result["tables"])
    assert len(correctness) >= 15 and all(held is True for *_, held in correctness)
    assert {part for part, _ in seconds} >= {"goldens", "exact_batches", "resumed", "encoder_speed", "training_speed"}
    assert {row[0] for row in speed} >= {"matrix product", "CKA minibatch", "training step"}
    assert ["resumed_trainer", "needs tqdm"] in skipped
    assert any("speechbrain" in why for _, why in skipped) and any("pytorch-cka" in why for _, why in skipped)


def test_help_and_list_need_no_gpu():
    told = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, timeout=60)
    assert told.returncode == 0 and "--tiny" in told.stdout
