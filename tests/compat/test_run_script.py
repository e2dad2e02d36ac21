"""Scripts beside s3prl that never import it, through ``python -m s3prl_speaker_upstreams.compat``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import soundfile

pytestmark = pytest.mark.compat

# what s3prl/preprocess/generate_len_for_bucket.py:44-46,64 does, in its own names
SCRIPT = """
import sys
import torchaudio
from joblib import Parallel, delayed


def extract_length(input_file):
    torchaudio.set_audio_backend("sox_io")
    return torchaudio.info(input_file).num_frames


print(Parallel(n_jobs=-1)(delayed(extract_length)(path) for path in sys.argv[1:]), __name__)
"""


def compat(*arguments, **options):
    command = [sys.executable, "-W", "ignore", "-m", "s3prl_speaker_upstreams.compat", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def write(path: Path, samples: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(samples), 16000)
    return path


def test_lengths_in_parallel(tmp_path):
    (tmp_path / "lengths.py").write_text(SCRIPT)
    done = compat(tmp_path / "lengths.py", write(tmp_path / "a.flac", 1000), write(tmp_path / "b.flac", 2000))
    assert done.stdout.strip() == "[1000, 2000] __main__", done.stderr


def test_help_and_wrong_options():
    assert "generate_len_for_bucket.py" in compat("--help").stdout
    assert compat("--frobnicate").returncode == 2


@pytest.mark.e2e
def test_the_checkouts_own_script(tmp_path):
    script = Path(__file__).resolve().parents[3] / "peers/s3prl/s3prl/preprocess/generate_len_for_bucket.py"
    if not script.is_file():
        pytest.skip(f"no checkout of s3prl: {script} does not exist")
    for number, samples in enumerate((1000, 3000, 2000)):
        write(tmp_path / "LibriSpeech" / "dev-clean" / "1" / "2" / f"1-2-{number:04d}.flac", samples)
    done = compat(script, "-i", tmp_path / "LibriSpeech", "-o", tmp_path / "out", input="3\n")
    assert done.returncode == 0, done.stderr
    table = pandas.read_csv(tmp_path / "out" / "len_for_bucket" / "dev-clean.csv")
    assert table["length"].tolist() == [3000, 2000, 1000]
    assert table["file_path"][0] == "dev-clean/1/2/1-2-0001.flac"


# what s3prl/utility/print_settings.py and visualize_weight.py do: experiment checkpoints read with torch's defaults
READER = """
import sys
import torch

ckpt = torch.load(sys.argv[1], map_location="cpu")
print(ckpt["Args"].upstream, ckpt["Config"]["runner"]["total_steps"], ckpt["Featurizer"]["weights"].tolist())
"""


def test_utilities_that_read_experiment_checkpoints(tmp_path):
    import argparse

    import torch

    experiment = {
        "Args": argparse.Namespace(upstream="ecapa_dino"),
        "Config": {"runner": {"total_steps": 7}},
        "Featurizer": {"weights": torch.zeros(2)},
    }
    torch.save(experiment, tmp_path / "states-7.ckpt")
    (tmp_path / "read.py").write_text(READER)
    done = compat(tmp_path / "read.py", tmp_path / "states-7.ckpt")
    assert done.stdout.strip() == "ecapa_dino 7 [0.0, 0.0]", done.stderr


@pytest.mark.parametrize("name", ["visualize_weight.py --ckpt", "print_settings.py"])
def test_s3prls_own_utilities(tmp_path, name):
    import argparse
    import importlib.util

    import torch

    script, *option = name.split()
    path = Path(importlib.util.find_spec("s3prl").origin).parent / "utility" / script
    experiment = {
        "Args": argparse.Namespace(upstream="ecapa_dino"),
        "Config": {"runner": {"total_steps": 7}},
        "Featurizer": {"weights": torch.zeros(2)},
    }
    torch.save(experiment, tmp_path / "states-7.ckpt")
    more = [] if option else ["config.runner.total_steps"]
    done = compat(path, *option, tmp_path / "states-7.ckpt", *more)
    assert done.returncode == 0, done.stderr
    assert ("[0.5, 0.5]" if option else "7\n") in done.stdout
    assert (tmp_path / "visualize_weight.png").is_file() == bool(option)
