"""Fixtures of the cka tests: recordings made up on the spot."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def wavs(tmp_path_factory):
    """Folder of 24 noisy tones of different lengths, one of them at 8 kHz and stereo."""
    import soundfile

    folder = tmp_path_factory.mktemp("wavs")
    rng = np.random.default_rng(0)
    for i in range(24):
        rate = 8000 if i == 3 else 16000
        t = np.arange(int(rate * (0.4 + 0.05 * (i % 7)))) / rate
        x = 0.3 * np.sin(2 * np.pi * (150 + 40 * i) * t * (1 + 0.2 * t)) + 0.05 * rng.standard_normal(len(t))
        soundfile.write(folder / f"utt{i:02d}.wav", np.stack([x, x], 1) if i == 3 else x, rate)
    return folder
