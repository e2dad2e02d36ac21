"""A toy world for recipes: speech of made-up speakers in the layouts that they read, and a stand-in for ffmpeg."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).resolve().parents[2]


def voice(speaker: int, take: int, seconds: float) -> np.ndarray:
    """A made-up speaker: resonances of its own, pulses, a little noise; (samples,) at 16 kHz."""
    formants = np.random.default_rng(speaker).uniform(200, 3500, 3)
    rng = np.random.default_rng(1000 * speaker + take)
    t = np.arange(int(16000 * seconds)) / 16000
    wav = sum(np.sin(2 * np.pi * f * t * rng.uniform(0.97, 1.03)) for f in formants)
    return (0.1 * wav * (1 + np.sin(2 * np.pi * rng.uniform(2, 5) * t)) + rng.normal(0, 0.01, len(t))).astype("float32")


def as_bytes(wav: np.ndarray, format: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wav, 16000, format=format)
    return file.getvalue()


def write(path: Path, wav: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav, 16000)
    return path


def noise(seed: int, seconds: float) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(16000 * seconds)).astype("float32")


def room(seed: int) -> np.ndarray:
    decay = np.exp(-np.arange(2400) / 400.0)
    response = np.random.default_rng(seed).normal(0, 0.1, 2400) * decay
    response[0] = 1.0
    return (0.5 * response).astype("float32")


@pytest.fixture(scope="session")
def toy() -> SimpleNamespace:
    """The makers of toy recordings: ``voice``, ``noise``, ``room``, ``write``."""
    return SimpleNamespace(voice=voice, noise=noise, room=room, write=write)


@pytest.fixture(scope="session")
def toy_speech(tmp_path_factory) -> Path:
    """commands/, noise/, rirs/, digits/<speaker>/, keywords/<word>/: what small.sh and accuracy.sh read."""
    folder = tmp_path_factory.mktemp("speech")
    labels = {}
    for i in range(16):
        name = f"command{i:02d}"
        write(folder / "commands" / f"{name}.wav", np.pad(voice(i % 8, i, 2.2), 8000))
        labels[name] = "on"
    (folder / "commands" / "labels.json").write_text(json.dumps(labels))
    for i in range(2):
        write(folder / "noise" / f"{i}.wav", noise(i, 4))
        write(folder / "rirs" / f"{i}.wav", room(i))
    for speaker in range(4):
        for take in range(12):
            write(folder / "digits" / f"speaker{speaker}" / f"{take:02d}.wav", voice(20 + speaker, take, 1.1))
    for number, word in enumerate(("alexa", "computer", "jarvis", "smart mirror")):
        for take in range(12):
            write(folder / "keywords" / word / f"{take:02d}.wav", voice(40 + number, take, 1.0))
    return folder


# Decodes what soundfile can, in place of the m4a that it cannot: takes -i SOURCE ... TARGET as the recipe calls it.
FFMPEG = """#!{python}
import sys, soundfile
wav, rate = soundfile.read(sys.argv[sys.argv.index("-i") + 1])
soundfile.write(sys.argv[-1], wav, rate, format="FLAC")
"""


@pytest.fixture(scope="session")
def voxceleb(tmp_path_factory) -> dict[str, str]:
    """Environment of the VoxCeleb recipes: archives as they are given out, trial lists, ffmpeg."""
    folder = tmp_path_factory.mktemp("voxceleb")
    downloads, meta, bin_ = folder / "downloads", folder / "meta", folder / "bin"
    for path in (downloads, meta, bin_):
        path.mkdir()
    with zipfile.ZipFile(downloads / "vox2_dev_aac.zip", "w") as archive:
        for speaker in range(4):
            for take in range(4):
                name = f"dev/aac/id0000{speaker}/video{take // 2}/0000{take}.m4a"
                archive.writestr(name, as_bytes(voice(speaker, take, 3.3), "FLAC"))
    names = [f"id1000{speaker}/video/0000{take}.wav" for speaker in range(3) for take in range(2)]
    for part, chosen in (("dev", names[:2]), ("test", names[2:])):
        with zipfile.ZipFile(downloads / f"vox1_{part}_wav.zip", "w") as archive:
            for name in chosen:
                archive.writestr(f"wav/{name}", as_bytes(voice(int(name[6]) + 10, int(name[-5]), 2.5)))
    with tarfile.open(downloads / "musan.tar.gz", "w:gz") as archive:
        for number, kind in enumerate(("noise", "music", "speech")):
            content = as_bytes(noise(number, 5))
            member = tarfile.TarInfo(f"musan/{kind}/a/{kind}.wav")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with zipfile.ZipFile(downloads / "rirs_noises.zip", "w") as archive:
        for i in range(2):
            archive.writestr(f"RIRS_NOISES/simulated_rirs/smallroom/Room001/{i}.wav", as_bytes(room(i)))
    trials = [f"{int(a[:7] == b[:7])} {a} {b}\n" for i, a in enumerate(names) for b in names[i + 1 :]]
    for name in ("veri_test2", "list_test_all2", "list_test_hard2"):
        (meta / f"{name}.txt").write_text("".join(trials))
    (bin_ / "ffmpeg").write_text(FFMPEG.format(python=sys.executable))
    (bin_ / "ffmpeg").chmod(stat.S_IRWXU)
    return {
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "DATA": str(folder / "data"),
        "DOWNLOADS": str(downloads),
        "META": meta.as_uri(),
    }


@pytest.fixture
def recipe(tmp_path):
    """``recipe(NAME, *arguments, **environment)``: runs recipes/NAME in an empty folder; its output, both streams."""

    def run(name: str, *arguments: object, **environment: object) -> str:
        env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        env |= {key: str(value) for key, value in environment.items()}
        line = [str(ROOT / "recipes" / name), *map(str, arguments)]
        done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{' '.join(line)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    return run
