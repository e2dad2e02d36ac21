"""Whole runs with the real runner: every task, and two probes one after the other, each as it is when trained alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from s3prl_speaker_upstreams.demo import corpora
from s3prl_speaker_upstreams.superb import identity, saved, stages
from s3prl_speaker_upstreams.superb.errors import IdentityMismatch
from s3prl_speaker_upstreams.superb.run import Run
from s3prl_speaker_upstreams.superb.tasks import TASKS

torch = pytest.importorskip("torch")
pytest.importorskip("s3prl", reason="s3prl is not installed")

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from s3prl_speaker_upstreams.checkpoints import save_native, untrained

    folder = tmp_path_factory.mktemp("two-probes")
    small = {"channels": 64, "mfa_channels": 48, "se_channels": 8, "attention_channels": 8, "embedding_dim": 12}
    for seed, name in enumerate("ab"):
        save_native(untrained("speechbrain", seed=seed, **small), folder / f"{name}.safetensors")
    corpora.generate("SID", folder / "data", scale=2)
    return folder


def _probe(run: Run) -> tuple[dict, dict[str, torch.Tensor]]:
    """Result, and the tensors of the chosen probe."""
    result = json.loads((run.folder / "result.json").read_text())
    (checkpoint,) = result["checkpoints"]
    content = saved.read(Path(checkpoint))
    return result, {**content["Downstream"], **content["Featurizer"]}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_goes_from_check_to_a_result(task, server, tmp_path):
    run = Run(TASKS[task], "fbank", tmp_path, smoke=True, device="cpu")
    stages.run_stages(run)
    result = json.loads((run.folder / "result.json").read_text())
    assert set(result["metrics"]) == {metric.name for metric in run.task.metrics}
    assert all(math.isfinite(value) for value in result["metrics"].values())
    assert all((Path(result["predictions"]) / source).exists() for source, _ in run.task.predictions)
    assert result["stock"] is False and result["layers"] == 1
    commands = sum(file.read_text().count("$ ") for file in run.folder.rglob("*.log"))
    stages.run_stages(run)  # everything is done
    assert sum(file.read_text().count("$ ") for file in run.folder.rglob("*.log")) == commands


def test_each_probe_is_what_it_is_alone(server, files, tmp_path):
    first = Run(
        TASKS["SID"],
        "ecapa_tdnn_local",
        tmp_path / "shared",
        data=files / "data",
        ckpt=str(files / "a.safetensors"),
        device="cpu",
        smoke=True,
        lrs=(1e-2,),
    )
    stages.run_stages(first)
    a, tensors_a = _probe(first)
    others = {
        "ckpt": replace(first, ckpt=str(files / "b.safetensors")),
        "feature": replace(first, feature="block_2"),
        "normalize": replace(first, normalize=True),
        "seed": replace(first, seed=3),
    }
    for name, other in others.items():
        alone = replace(other, exp=tmp_path / f"alone-{name}")
        stages.run_stages(alone)
        expected, expected_tensors = _probe(alone)
        if name != "seed":  # the same folder would be A's: refused, and A's number stays A's
            with pytest.raises(IdentityMismatch, match=name):
                stages.run_stages(other)
            assert json.loads((first.folder / "result.json").read_text()) == a
            other = replace(other, tag=name)
        stages.run_stages(other)
        result, tensors = _probe(other)
        assert result["metrics"] == expected["metrics"]
        assert all(torch.equal(tensors[key], expected_tensors[key]) for key in expected_tensors)
        assert any(
            key not in tensors_a or tensors[key].shape != tensors_a[key].shape or not torch.equal(value, tensors_a[key])
            for key, value in tensors.items()
        ), f"another {name} gave the same probe"
        assert result["weights"]["state"] == expected["weights"]["state"]
        assert (result["weights"]["state"] != a["weights"]["state"]) == (name == "ckpt")
    assert _probe(first)[0] == a
    # forced, the folder becomes B's, and B's only
    forced = replace(others["ckpt"], force=True)
    stages.run_stages(forced)
    assert _probe(forced)[0]["weights"]["state"] != a["weights"]["state"]
    alone = _probe(replace(others["ckpt"], exp=tmp_path / "alone-ckpt"))[1]
    assert all(torch.equal(value, alone[key]) for key, value in _probe(forced)[1].items())


def test_a_training_goes_on_with_other_data_and_a_moved_checkpoint(server, files, tmp_path):
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes((files / "a.safetensors").read_bytes())
    run = Run(
        TASKS["SID"],
        "ecapa_tdnn_local",
        tmp_path / "exp",
        data=files / "data",
        ckpt=str(files / "a.safetensors"),
        device="cpu",
        smoke=True,
        settings={"runner.total_steps": 2},
    )
    stages.run_stages(run)
    longer = replace(run, ckpt=str(moved), settings={"runner.total_steps": 4})
    stages.run_stages(longer)
    result, _ = _probe(longer)
    args = vars(saved.read(longer.folder / "lr1e-04" / "states-4.ckpt")["Args"])
    assert args["seed"] == identity.resume_seed(1337, 2) and args["upstream_ckpt"] == str(moved)
    assert [one["step"] for one in next(iter(result["resumes"].values()))] == [2]


def test_an_upstream_without_the_feature_is_refused_by_the_real_probe(server, files, tmp_path):
    from s3prl_speaker_upstreams.superb.errors import UnknownUpstream

    run = Run(TASKS["SID"], "fbank", tmp_path, data=files / "data", device="cpu", feature="nosuch", smoke=True)
    with pytest.raises(UnknownUpstream, match="gives no such feature.*hidden_states"):
        stages.run_stages(run)
    with pytest.raises(UnknownUpstream, match="did you mean 'fbank'|did you mean fbank"):
        stages.run_stages(replace(run, upstream="fbnak"))
