"""Toy models for the tests of cka_addon: importable as a `py:` target too."""

import torch

_G = torch.Generator().manual_seed(7)
_PROJECT = [torch.randn(400, 12, generator=_G) / 20, torch.randn(12, 9, generator=_G), torch.randn(9, 15, generator=_G)]


class Toy(torch.nn.Module):
    """Uncentred windows of 25 ms, three layers; shift in samples."""

    def __init__(self, shift=320):
        super().__init__()
        self.shift = int(shift)
        self.projections = torch.nn.ParameterList([torch.nn.Parameter(p.clone()) for p in _PROJECT])

    def forward(self, wavs):
        x = wavs[0].unfold(0, 400, self.shift) @ self.projections[0]
        layers = [x, torch.tanh(x @ self.projections[1])]
        layers.append(torch.relu(layers[1] @ self.projections[2]) + 0.1)
        return {"hidden_states": [h[None] for h in layers], "embedding": layers[2].mean(0)[None]}

    def get_downsample_rates(self, key):
        return self.shift


def build(hop="320"):
    """Factory, for `py:cka_toy:build hop=160`."""
    return Toy(hop)
