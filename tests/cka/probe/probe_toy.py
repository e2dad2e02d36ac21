"""A corpus of nothing but ids, and a "model" whose layers hold a known amount of a label: no audio is computed on."""

import numpy as np
import soundfile
import torch

from cka_addon.models import Model

SPEAKERS, EACH, FRAMES, WIDTH = 12, 6, 50, 12
AMOUNTS = (0.0, 0.6, 3.0, 1.2)  # of the label in layers 0 to 3


def corpus(folder):
    """12 speakers with 6 recordings of 1 s; the first sample says which recording it is."""
    for s in range(SPEAKERS):
        (folder / f"s{s:02d}").mkdir(parents=True)
        for k in range(EACH):
            wav = np.full(16000, (s * EACH + k + 1) / 1000, dtype=np.float32)
            soundfile.write(folder / f"s{s:02d}" / f"{k}.wav", wav, 16000, subtype="FLOAT")
    return folder


def label(index):
    """Class of a recording: spread evenly over every speaker."""
    return index % 3


class Planted(torch.nn.Module):
    """Frames of noise about a class's own direction, `amount` of it; FRAMES frames of 20 ms."""

    frame_shift, first_center = 0.02, 0.01

    def __init__(self, amounts=AMOUNTS, seed=0):
        super().__init__()
        self.amounts, self.seed = amounts, seed
        self.centres = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(7))

    def forward(self, wavs):
        index = round(float(wavs[0][0]) * 1000) - 1
        g = torch.Generator().manual_seed(1000 * self.seed + index)
        frames = len(wavs[0]) // 320
        # One offset for the whole recording: utterance means keep their noise.
        layers = [
            a * self.centres[label(index)]
            + torch.randn(1, WIDTH, generator=g)
            + torch.randn(frames, WIDTH, generator=g)
            for a in self.amounts
        ]
        return {"hidden_states": [x[None] for x in layers]}


def model(**options):
    """The planted model."""
    return Model(Planted(**options), "planted")


def table(folder, values=None):
    """labels.csv with columns `class`, `speaker`, `half` and `length` (a number)."""
    rows = ["utterance,class,speaker,half,length"]
    for i in range(SPEAKERS * EACH):
        value = label(i) if values is None else values[i]
        rows.append(f"s{i // EACH:02d}/{i % EACH},c{value},s{i // EACH:02d},{'ab'[i % 2]},{value + 0.001 * i}")
    path = folder / "labels.csv"
    path.write_text("\n".join(rows))
    return path
