"""Differences of similarities, what minibatches add, and trajectories over checkpoints."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cka_toy import Toy
from test_cka_intervals import World, result_of

from cka_addon import compare, trajectory
from cka_addon.cli import main
from cka_addon.errors import SpecError
from cka_addon.models import Model
from cka_addon.result import CKAResult
from cka_addon.run import compute
from cka_addon.uncertainty import LeftOut

pytestmark = pytest.mark.compat
FULL = {"mode": "full", "form": "stream"}


def test_a_planted_difference_is_found_and_pairing_sharpens_it():
    """Layer 0 is nearer to layer 1 than to layer 3 by construction."""
    result = result_of(World(1, 60), **FULL)
    (found,) = compare.differences(result, result, [((0, 1), (0, 3))])
    assert found.paired and found.value == pytest.approx(result.values[0, 1] - result.values[0, 3])
    assert found.lower > 0 and found.p < 1e-4 and "larger" in str(found)
    alone = result.left_out.spread()
    other = result_of(World(2, 60), **FULL)
    other.left_out.units = [f"x{i}" for i in range(60)]
    (apart,) = compare.differences(result, other, [((0, 1), (0, 1))])
    assert not apart.paired and apart.error == pytest.approx(
        np.hypot(alone[0, 1], other.left_out.spread()[0, 1]), rel=1e-6
    )
    assert apart.lower < 0 < apart.upper and "no difference shown" in str(apart)


def test_intervals_of_differences_hold_the_true_one_and_no_difference_is_rarely_called_one():
    truth = result_of(World(10_000, 2500), mode="full", form="stream", interval="none").values
    want, inside = truth[0, 2] - truth[1, 3], 0
    for seed in range(40):
        result = result_of(World(seed, 25), **FULL, blocks=2)
        (found,) = compare.differences(result, result, [((0, 2), (1, 3))])
        inside += found.lower <= want <= found.upper
    assert 34 <= inside <= 40


def test_several_p_values_are_corrected_for_their_number():
    rng = np.random.default_rng(0)
    left = LeftOut([str(i) for i in range(30)], rng.normal(0.5, 0.001, (30, 4, 4)), 30)
    base = result_of(World(1, 30), **FULL)
    result = CKAResult(base.models, base.values, base.mask, None, None, None, base.hsic, base.details, left)
    pairs = [((0, 1), (0, 2)), ((0, 1), (0, 3)), ((0, 1), (1, 2))]
    together = compare.differences(result, result, pairs)
    alone = [compare.differences(result, result, [p])[0].p for p in pairs]
    # Holm by hand: the smallest times 3, the next times 2, the last as it is, never falling, at most 1.
    small, middle, large = np.argsort(alone)
    want = {small: 3 * alone[small]}
    want[middle] = max(want[small], 2 * alone[middle])
    want[large] = max(want[middle], alone[large])
    assert [d.p for d in together] == pytest.approx([min(1.0, want[i]) for i in range(3)])


def test_minibatch_bias_is_named():
    world = World(3, 64)
    full, mini = result_of(world, **FULL), result_of(world, mode="minibatch", batch_size=64, mix=4, blocks=16)
    text = compare.bias_of_minibatches(mini, full)
    assert "against all examples" in text and "of the pairs in a minibatch are of one utterance" in text
    off = np.triu_indices(4, 1)
    assert f"{(mini.values - full.values)[off].mean():+.4f} on average" in text
    with pytest.raises(SpecError, match="one of --mode minibatch and one of --mode full"):
        compare.bias_of_minibatches(full, mini)
    assert len(compare.every_pair(full, full)) == 6


def test_command_compares(tmp_path, capsys, wavs):
    path = tmp_path / "r.json"
    result_of(World(1, 40), **FULL).save(path)
    result_of(World(1, 40), mode="minibatch", batch_size=64, mix=4).save(tmp_path / "mini.json")
    assert main(["-q", "compare", str(path), "m/0,m/1", "m/0,m/layer_3", "-o", str(tmp_path / "d.csv")]) == 0
    assert "m/layer_0,m/layer_1 - m/layer_0,m/layer_3" in capsys.readouterr().out and (tmp_path / "d.csv").exists()
    assert main(["-q", "compare", str(tmp_path / "mini.json"), str(path)]) == 0
    assert capsys.readouterr().out.startswith("minibatches give ")
    assert main(["-q", "compare", str(path), str(path)]) == 0
    assert capsys.readouterr().out.count("p = 1 (paired): no difference shown") == 6
    assert main(["-q", "compare", str(path), "m/0,m/1"]) == 1
    (tmp_path / "r.units.npz").unlink()
    assert main(["-q", "compare", str(path), "m/0,m/1", "m/0,m/2"]) == 1


class Step(Toy):
    """The toy model part of the way from one projection to another: a training run."""

    def __init__(self, progress):
        super().__init__()
        with torch.no_grad():
            other = torch.randn(self.projections[0].shape, generator=torch.Generator().manual_seed(1)) / 20
            self.projections[0].lerp_(other, float(progress))


def build(ckpt):
    return Step(Path(ckpt).read_text())


def test_trajectory_over_checkpoints(tmp_path, wavs, monkeypatch):
    monkeypatch.setitem(sys.modules, "cka_step", sys.modules[__name__])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for step, progress in ((1, 0.0), (20, 0.4), (3, 0.2), (100, 1.0)):
        (tmp_path / f"step_{step}.pt").write_text(str(progress))
    files = [str(p) for p in sorted(tmp_path.glob("step_*.pt"))]
    out = tmp_path / "out"
    template = "py:cka_step:build ckpt={} layers=0"
    arguments = ["-q", "trajectory", template, *files, "-a", str(wavs), "-o", str(out), "--mode", "full"]
    assert main([*arguments, "--formats", "png"]) == 0
    result = CKAResult.load(out / "trajectory.json")
    assert result.names == ["step_1", "step_3", "step_20", "step_100"]
    data = trajectory.table(result)
    assert data["to_last"].is_monotonic_increasing and data["to_first"].is_monotonic_decreasing
    assert data["to_last"].iloc[-1] == 1 and (out / "trajectory.png").exists() and (out / "trajectory.csv").exists()
    with pytest.raises(SpecError, match="where the checkpoint goes"):
        trajectory.specifications("fbank", files)


def test_speakers_as_units_from_paths_and_from_the_list(wavs, tmp_path):
    lines = [f"s{i % 8}\t{path}\n" for i, path in enumerate(sorted(wavs.glob("*.wav")))]
    (tmp_path / "list.txt").write_text("".join(lines))
    result = compute([Model(Toy(), "toy")], tmp_path / "list.txt", mode="full", unit="speaker", progress=False)
    assert result.details["interval"] == "jackknife over 8 speakers, 95%"
    table = "utterance\tspeaker\n" + "".join(f"{p.stem}\ts{i % 12}\n" for i, p in enumerate(sorted(wavs.glob("*.wav"))))
    (tmp_path / "labels.tsv").write_text(table)
    options = {"mode": "full", "unit": "speaker", "labels": f"{tmp_path / 'labels.tsv'}:speaker", "progress": False}
    again = compute([Model(Toy(), "toy")], wavs, **options)
    assert again.details["interval"] == "jackknife over 12 speakers, 95%"
    assert sorted(again.left_out.units) == sorted(f"s{i}" for i in range(12))
