"""The benchmark runs, and its contenders compute the same thing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "benchmark" / "ecapa.py"


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_ecapa", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(SCRIPT.parent))  # as for a script, whose neighbours can be imported
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)
    # SpeechBrain leaves lazy modules behind that fail when looked at, and hypothesis looks at every loaded module
    for name in [name for name in sys.modules if name.partition(".")[0] == "speechbrain"]:
        del sys.modules[name]


def test_it_runs_and_writes_what_it_measured(benchmark, tmp_path, capsys):
    small = ["--channels", "32", "--rounds", "1", "--batches", "1", "--cases", "short", "--threads", "1"]
    result = benchmark.main([*small, "--no-speechbrain", "--out", str(tmp_path / "out.json")])
    (case,) = result["cases"]
    assert set(case["seconds"]) == {"ours", "ours bf16", "our front-end"}
    assert all(0 < seconds < 60 for seconds in case["seconds"].values())
    assert case["gflop"] > 0 and case["gflops"] > 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["data"]["deviation"].keys() == result["deviation"].keys()
    assert "| ours |" in capsys.readouterr().out
    (row,) = [row for row in written["summary"] if row[0].startswith("encoder, bf16 over float32")]
    assert row[1] == f"{case['seconds']['ours'] / case['seconds']['ours bf16']:.2f}x"


def test_speechbrains_class_with_our_weights_gives_our_numbers(benchmark):
    pytest.importorskip("speechbrain")
    args = benchmark.parse(["--channels", "32"])
    with torch.no_grad():
        deviation = benchmark.deviations(benchmark.build(args, torch.device("cpu")), torch.device("cpu"))
    assert deviation["SpeechBrain"] < 1e-5


def test_work_is_counted_as_the_profiler_counts_it(benchmark):
    from torch.utils.flop_counter import FlopCounterMode

    cfg = benchmark.DIALECTS["speechbrain"].ecapa_config(channels=32, mfa_channels=96)
    model = benchmark.Ecapa(cfg).eval()
    features = benchmark.Ragged(torch.randn(1000, 80), [1000])
    with FlopCounterMode(display=False) as counter:
        model(features, ("mfa",))
    # Squeeze-excitation works once per utterance, the gaps add a little.
    assert counter.get_total_flops() / 1e9 == pytest.approx(1000 * benchmark.gflop_per_frame(model), rel=0.02)
