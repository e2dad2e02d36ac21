"""recipes/fusion: the control has the fusion's shape, and verdicts say what the seeds can show."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from s3prl_speaker_upstreams import checkpoints
from s3prl_speaker_upstreams.fusion import parse

FILE = Path(__file__).resolve().parents[2] / "recipes" / "fusion" / "compare.py"


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_control_is_the_speaker_models_architecture_untrained(compare, tmp_path):
    compare.prepare("fbank", "ecapa_dino_small", tmp_path)
    control = parse(tmp_path / "control.yaml")
    assert [member.upstream for member in control.members] == ["fbank", "ecapa_tdnn_local"]
    random = checkpoints.read_checkpoint(control.members[1].ckpt)
    from s3prl_speaker_upstreams import weights

    trained = checkpoints.read_checkpoint(weights.resolve("ecapa_dino_small"))
    assert (random.role, random.ecapa, random.frontend) == ("untrained", trained.ecapa, trained.frontend)
    assert parse(tmp_path / "fused.yaml").members[1].upstream == "ecapa_dino_small"


def write(exp: Path, tag: str, accuracies: list[float]) -> None:
    for seed, accuracy in enumerate(accuracies):
        folder = exp / tag / "KS" / f"seed{seed}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"task": "KS", "seed": seed, "metrics": {"KS acc": accuracy}}))


@pytest.mark.parametrize(
    ("fused", "control", "said"),
    [
        ([90.0, 91.0, 92.0], [80.0, 81.0, 82.5], "the speaker model's knowledge helps"),
        ([90.0, 91.0, 92.0], [90.0, 92.0, 91.0], "the fusion helps, but so may its width alone"),
        ([80.0, 79.0, 81.0], [70.0, 71.0, 69.0], "not surely better than one model"),
        ([80.0, 79.0, 81.0], [80.0, 81.0, 79.0], "no gain that these seeds can show"),
    ],
)
def test_verdicts(compare, tmp_path, fused, control, said):
    for tag, values in (("speech", [80.0, 81.0, 79.0]), ("speaker", [60.0, 61.0, 62.0]), ("fused", fused)):
        write(tmp_path, tag, values)
    write(tmp_path, "control", control)
    compare.table(tmp_path)
    text = (tmp_path / "fusion.md").read_text()
    assert said in text and "the speech model alone" in text and "| 80.00 ± 2.48 | 61.00 ± 2.48 |" in text
    assert json.loads((tmp_path / "fusion.json").read_text())["KS"]["runs"]["fused"]["1"] == fused[1]


def test_interval_by_hand(compare):
    # deviation 1, three values: t(0.975, 2) = 4.3027, over the root of 3
    mean, half = compare.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-5))
    assert compare.interval([5.0]) == (5.0, None)
