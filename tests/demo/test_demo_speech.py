"""What the quickstart is made of: where speech comes from, in which order, and what is said about it."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

from s3prl_speaker_upstreams.demo import espeak
from s3prl_speaker_upstreams.demo import speech as demo
from s3prl_speaker_upstreams.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def write_speakers(folder: Path, speakers: int = 2, recordings: int = 4, seconds: float = 0.5) -> Path:
    draw = np.random.default_rng(0)
    for speaker in range(speakers):
        for recording in range(recordings):
            path = folder / f"speaker{speaker}" / "chapter" / f"{recording}.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, draw.uniform(-0.1, 0.1, int(16000 * seconds)), 16000)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(demo, "CORPUS_URL", "http://127.0.0.1:9/corpus.tar.gz")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The public corpus's stand-in on a loopback server: a tar with the real one's layout."""
    folder = write_speakers(tmp_path / "made" / "LibriSpeech" / "dev-clean-2", seconds=4)
    (tmp_path / "www").mkdir()
    archive = tmp_path / "www" / "corpus.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname="LibriSpeech/dev-clean-2")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(demo, "CORPUS_URL", f"http://127.0.0.1:{server.server_port}/corpus.tar.gz")
    monkeypatch.setattr(demo, "CORPUS_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    yield archive
    server.shutdown()


def speech(tmp_path: Path, *more: str) -> int:
    return demo.main(["speech", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), *more])


def test_given_folder_is_laid_out_once(tmp_path, capsys):
    given = write_speakers(tmp_path / "given", recordings=60)
    assert speech(tmp_path, "--speech", str(given), "--seconds", "15") == 0
    first = capsys.readouterr().out
    assert first.startswith("real speech from") and "2 speakers" in first
    listing = (tmp_path / "out" / "veri_test_class.txt").read_text().splitlines()
    assert {line.split()[0] for line in listing} == {"1", "2", "3"} and len(listing) == 10  # 15 s in pieces of 3 s
    before = (tmp_path / "out" / "veri_test_class.txt").stat().st_mtime_ns
    assert speech(tmp_path, "--speech", str(given), "--seconds", "15") == 0
    assert capsys.readouterr().out == first
    assert (tmp_path / "out" / "veri_test_class.txt").stat().st_mtime_ns == before


def test_other_speech_never_mixes_with_the_old(tmp_path, capsys):
    speech(tmp_path, "--speech", str(write_speakers(tmp_path / "one", seconds=4)))
    assert speech(tmp_path, "--speech", str(write_speakers(tmp_path / "two", seconds=4))) == 1
    assert "remove that folder or set another WORK" in capsys.readouterr().err


def test_interrupted_layout_is_made_again(tmp_path, capsys):
    (tmp_path / "out" / "dev" / "wav").mkdir(parents=True)
    (tmp_path / "out" / "left_over").write_text("x")
    assert speech(tmp_path, "--speech", str(write_speakers(tmp_path / "given", seconds=4))) == 0
    assert not (tmp_path / "out" / "left_over").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", "no such folder"),
        (lambda folder: write_speakers(folder, speakers=1), "got 1 sub-folders"),
        (lambda folder: write_speakers(folder, recordings=2), "got 0 sub-folders"),
    ],
)
def test_unusable_folder_is_refused(tmp_path, make, message):
    with pytest.raises(ConfigError, match=message):
        demo.speakers_in(make(tmp_path / "given"))


def test_broken_recording_is_named(tmp_path, capsys):
    given = write_speakers(tmp_path / "given")
    (given / "speaker0" / "chapter" / "0.flac").write_bytes(b"not audio")
    assert speech(tmp_path, "--speech", str(given)) == 1
    assert "0.flac" in capsys.readouterr().err and not (tmp_path / "out" / "demo.json").exists()


def test_public_corpus_is_downloaded_once(tmp_path, served, capsys):
    assert speech(tmp_path) == 0
    assert "Mini LibriSpeech" in capsys.readouterr().out
    served.unlink()
    assert demo.main(["speech", "--out", str(tmp_path / "again"), "--cache", str(tmp_path / "cache")]) == 0


def test_damaged_download_falls_back_to_synthetic_speech_and_says_so(tmp_path, served, monkeypatch, capsys, caplog):
    if not espeak.available():
        pytest.skip("espeakng-loader is not installed")
    monkeypatch.setattr(demo, "CORPUS_MD5", "0" * 32)
    assert speech(tmp_path) == 0
    assert "SYNTHETIC" in capsys.readouterr().out and "expected 0000" in caplog.text
    assert not list((tmp_path / "cache").rglob("*.tar.gz"))


def test_without_network_and_voices_it_says_what_to_do(tmp_path, no_network, monkeypatch, capsys):
    def no_voices(*_):
        raise demo.MissingPackage("pip install espeakng-loader")

    monkeypatch.setattr(demo, "espeak_speakers", no_voices)
    assert speech(tmp_path) == 1
    assert "Set SPEECH to a folder" in capsys.readouterr().err


def test_accuracy_is_the_last_logged(tmp_path):
    with pytest.raises(ConfigError, match="evaluate the experiment first"):
        demo.accuracy(tmp_path)
    (tmp_path / "log.log").write_text(
        "train at step 4: 0.9\ntest at step 0: 0.25\ndev at step 0: 1.0\ntest at step 0: 0.5\n"
    )
    assert demo.accuracy(tmp_path) == 0.5


@pytest.mark.e2e
def test_quickstart_from_speech_to_pictures(tmp_path):
    """The script itself in this environment, on a few seconds of noise: every stage, then nothing left to do."""
    given = write_speakers(tmp_path / "given", recordings=8, seconds=4)
    env = {
        **os.environ,
        **{"SKIP_SETUP": "1", "VENV": sys.prefix, "WORK": str(tmp_path / "work"), "SPEECH": str(given)},
        **{"STEPS": "4", "DEVICE": "cpu", "OMP_NUM_THREADS": "1"},
    }
    done = subprocess.run(
        [str(ROOT / "recipes" / "quickstart.sh")], capture_output=True, text=True, env=env, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "real speech from" in done.stdout
    assert done.stdout.count("test accuracy") >= 2 and "untrained" in done.stdout and "(chance)" in done.stdout
    (results,) = (tmp_path / "work" / "results").iterdir()
    assert (results / "accuracy.txt").is_file() and (results / "layer_weights.csv").is_file()
    assert (results / "layer_weights.png").read_bytes().startswith(b"\x89PNG")
    assert (results / "cka.json").is_file() and "block_4" in (results / "report.html").read_text()
    again = subprocess.run(
        [str(ROOT / "recipes" / "quickstart.sh")], capture_output=True, text=True, env=env, timeout=900
    )
    assert again.returncode == 0 and "[Runner]" not in again.stdout, "finished stages must be skipped"
    assert json.loads((tmp_path / "work" / "speech-given" / "demo.json").read_text())["said"] in again.stdout
