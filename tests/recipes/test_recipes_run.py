"""Every stage of every recipe is run on toy data, with the commands that it really calls.

The quickstart and the CKA recipe are run by ``tests/demo`` and ``tests/cka``, each task of ``superb/run.sh`` by
``tests/superb``.
"""

from __future__ import annotations

import json
import shutil

import pytest

pytestmark = [pytest.mark.e2e]

TINY = (
    'model.ecapa={"channels":16,"mfa_channels":24} data.workers=0 run.batch=4 run.epochs=2 run.device=cpu '
    "run.precision=fp32 run.tensorboard=false"
)
TINY_DINO = f"{TINY} dino.prototypes=32 dino.head_hidden=16 dino.bottleneck=8 dino.collapse.action=warn"


@pytest.fixture(autouse=True)
def tools():
    for tool in ("unzip", "curl", "tar"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def check_results(out) -> None:
    """Three trial lists with the same content: the same figures, of all pairs, with the cohort's."""
    figures = []
    for name in "OEH":
        found = json.loads((out / f"vox1_{name}.json").read_text())
        assert (found["n_trials"], found["n_targets"]) == (15, 3)
        figures.append([found[key] for key in ("eer", "mean_eer", "asnorm_eer")])
    assert figures[0] == figures[1] == figures[2]


@pytest.mark.xdist_group("voxceleb")
def test_dino_on_voxceleb_from_the_archives_to_the_last_stage(recipe, voxceleb, tmp_path):
    out = tmp_path / "dino"
    told = recipe("pretrain/voxceleb2_dino.sh", **voxceleb, OUT=out, GPUS=1, NUM_AVERAGE=2, EXTRA=TINY_DINO)
    assert "16 of 16 converted; 0 failed" in told
    check_results(out)
    assert (out / "average.safetensors").is_file() and (out / "last.safetensors").is_file()
    # all done: nothing is trained, averaged or scored again
    before = {path: path.stat().st_mtime_ns for path in out.glob("vox1_*.json")}
    recipe("pretrain/voxceleb2_dino.sh", "average", "evaluate", **voxceleb, OUT=out, GPUS=1, NUM_AVERAGE=2)
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.xdist_group("voxceleb")
def test_supervised_on_voxceleb_by_two_processes(recipe, voxceleb, tmp_path):
    """Training, large-margin fine-tuning of its result, both evaluated."""
    out = tmp_path / "aam"
    settings = {
        **voxceleb,
        "OUT": out,
        "GPUS": 2,
        "NUM_AVERAGE": 2,
        "EXTRA": TINY.replace("run.batch=4", "run.batch=2"),
    }
    recipe("pretrain/voxceleb2_supervised.sh", **settings)
    for folder in (out, tmp_path / "aam-large-margin"):
        check_results(folder)
        assert (folder / "average.safetensors").is_file()
    assert (tmp_path / "aam-large-margin" / "last.safetensors").is_file()


def test_small_model_of_two_seeds_with_its_evaluation_and_shipping(recipe, speech, tmp_path):
    shipped = tmp_path / "ship" / "ecapa_dino_small.safetensors"
    shipped.parent.mkdir()
    settings = {"SPEECH": speech, "OUT": tmp_path / "small", "SEEDS": "2 3", "SHIP": shipped}
    few = 'run.steps=3 run.batch=8 model.ecapa={"channels":16,"mfa_channels":24} run.tensorboard=false'
    told = recipe("pretrain/small.sh", "trim", "train", "evaluate", "ship", **settings, SET=few)
    assert "untrained" in told and "fbank" in told
    assert shipped.is_file() and "EER" in shipped.with_suffix(".md").read_text()


def test_accuracy_on_real_speech(recipe, speech, tmp_path):
    settings = {"SPEECH": speech, "EXP": tmp_path / "exp", "UPDATES": 4, "RATES": "1e-2", "LIMIT": 12}
    recipe("superb/accuracy.sh", "fbank", **settings)
    table = (tmp_path / "exp" / "tables" / "superb.md").read_text()
    assert "fbank" in table and "SID" in table and "KS" in table


def test_all_tasks_of_a_list_and_one_element_of_an_array(recipe, tmp_path):
    settings = {"TASKS": "KS SID", "EXP": tmp_path / "exp"}
    assert recipe("superb/all.sh", "fbank", "--", "--smoke", **settings, COUNT=1).split()[-1] == "2"
    recipe("superb/all.sh", "fbank", "--", "--smoke", "--device", "cpu", **settings, ELEMENT=1)
    assert "SID" in (tmp_path / "exp" / "tables" / "superb.md").read_text()
