"""A few seconds of made speech, and runs of seconds on it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile

from s3prl_speaker_upstreams.pretrain import assemble
from s3prl_speaker_upstreams.pretrain.config import load


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """12 "speakers" (each its own resonances) x 3 utterances of about a second."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for speaker in range(12):
        formants = rng.uniform(200, 3500, 3)
        (folder / f"spk{speaker:02d}").mkdir()
        for number in range(3):
            t = np.arange(int(16000 * rng.uniform(1.0, 1.4))) / 16000
            wav = sum(np.sin(2 * np.pi * f * t * rng.uniform(0.97, 1.03)) for f in formants)
            wav = 0.1 * wav * (1 + np.sin(2 * np.pi * rng.uniform(2, 5) * t)) + rng.normal(0, 0.01, len(t))
            soundfile.write(folder / f"spk{speaker:02d}" / f"{number}.wav", wav, 16000)
    return folder


def _configuration(corpus, *overrides):
    fixed = [f"data.train=[{corpus}]", "data.layout=speaker", "run.threads=1"]
    return load("smoke", overrides=[*fixed, *overrides])


@pytest.fixture(scope="session")
def configuration():
    """``configuration(corpus, *overrides)`` : the preset "smoke" on the corpus."""
    return _configuration


@pytest.fixture(scope="session")
def make():
    """``make(corpus, out, *overrides, **kwargs)`` : a trainer of it."""

    def make(corpus, out, *overrides, **kwargs):
        return assemble.build_trainer(_configuration(corpus, *overrides), out, **kwargs)

    return make


@pytest.fixture(scope="session")
def log():
    """``log(out)`` : the lines of a run's metrics.jsonl."""
    return lambda out: [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
