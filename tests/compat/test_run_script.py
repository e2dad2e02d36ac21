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
