"""What a probe's number is held against: the same network untrained, plain filter banks, and random labels of types."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cka_addon.align import Clock
from cka_addon.audio import SAMPLE_RATE
from cka_addon.errors import SpecError
from cka_addon.models import Model

logger = logging.getLogger(__name__)

FBANK = "FBANK"
UNTRAINED = "untrained"


class _Filterbank:
    """80 log mel bands of 25 ms every 10 ms with first and second differences, as s3prl's `fbank`: 240 numbers."""

    frame_shift, first_center = 0.01, 0.0125
    layer_names = ("fbank",)

    def __call__(self, wavs: list[Tensor]) -> dict[str, list[Tensor]]:
        from torchaudio.compliance import kaldi
        from torchaudio.functional import compute_deltas

        wav = wavs[0].detach().cpu()[None]
        if wav.shape[1] < 400:
            wav = torch.nn.functional.pad(wav, (0, 400 - wav.shape[1]))
        bands = kaldi.fbank(
            wav, num_mel_bins=80, frame_length=25, frame_shift=10, dither=0.0, sample_frequency=SAMPLE_RATE
        )
        first = compute_deltas(bands.T)
        whole = torch.cat([bands.T, first, compute_deltas(first)]).T
        return {"hidden_states": [whole[None]]}


def filterbank() -> Model:
    """The control that every representation should beat.

    >>> filterbank().info.dims, filterbank().info.clock.shift
    ((240,), 0.01)
    """
    return Model(
        _Filterbank(), FBANK, provenance={"kind": "control", "features": "80 log mel bands and two differences"}
    )


def untrained(model: Model, seed: int = 0) -> Model | None:
    """The model's twin with fresh weights, or None for one that has none (FBANK). Its name is NAME-untrained.

    Every module that knows how to begin (`reset_parameters`) does so; parameters of no such module are drawn anew with
    the mean and spread that the trained ones have. Both numbers are recorded. Raises SpecError where the model is no
    torch module: its twin must then be given as a model.

    >>> net = torch.nn.Linear(4, 3)
    >>> class Net(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = net
    ...     def forward(self, wavs):
    ...         return {"hidden_states": [self.net(wavs[0][: len(wavs[0]) // 160 * 160].view(1, -1, 160)[..., :4])]}
    >>> twin = untrained(Model(Net(), "net"))
    >>> twin.name, bool((twin._forward.net.weight == net.weight).any())
    ('net-untrained', False)
    """
    forward = model._forward
    if not isinstance(forward, torch.nn.Module):
        raise SpecError(
            f"{model.name}: is no torch module, so its untrained twin cannot be made; give the twin as a model: "
            f'--baseline "{model.name}=py:MODULE:NAME"'
        )
    if not any(p.numel() for p in forward.parameters()):
        return None
    twin = copy.deepcopy(forward)
    reset: set[int] = set()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in twin.modules():
            begin = getattr(module, "reset_parameters", None)
            if callable(begin) and not _tied(module):
                before = {id(p) for p in module.parameters(recurse=False)}
                begin()
                reset |= before
        fresh = drawn = 0
        with torch.no_grad():
            for parameter in twin.parameters():
                if id(parameter) in reset:
                    fresh += parameter.numel()
                    continue
                drawn += parameter.numel()
                spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
                parameter.copy_(float(parameter.mean()) + spread * torch.randn(parameter.shape))
    logger.info(
        "%s: untrained twin, %d parameters begun anew, %d drawn like the trained ones", model.name, fresh, drawn
    )
    about = {"kind": "control", "twin_of": model.info.provenance.get("weights_sha256"), "seed": seed}
    about |= {"reset_parameters": fresh, "drawn_with_mean_and_spread": drawn}
    return Model(
        twin,
        f"{model.name}-{UNTRAINED}",
        keys=model.keys,
        layers=list(model.info.layers),
        clock=model.info.clock,
        device=model.device,
        provenance=about,
    )


def _tied(module: torch.nn.Module) -> bool:
    """Whether the parameters are computed from others (weight norm), so that reset_parameters would be lost."""
    return hasattr(module, "weight_g") or hasattr(module, "parametrizations")


def control_labels(types: Sequence[str], values: np.ndarray, seed: int) -> np.ndarray:
    """Hewitt and Liang's control task (2019): each type gets one random value, drawn as often as values occur.

    types : (examples,) what an example is an instance of (a word, a phone between its neighbours, an utterance)
    A probe that does well on these has memorised types; accuracy less control accuracy is the selectivity.

    >>> made = control_labels(["a", "b", "a"], np.array([0, 1, 2]), seed=0)
    >>> bool(made[0] == made[2])
    True
    """
    _, which = np.unique(np.asarray(types, dtype=object).astype(str), return_inverse=True)
    rng = np.random.default_rng([seed, 6])
    drawn = values[rng.integers(len(values), size=int(which.max()) + 1 if len(which) else 0)]
    return drawn[which]


def check_clock(clock: Clock, name: str, unit: str) -> None:
    """Raise SpecError where frames are asked of a model that gives one vector per utterance."""
    if unit == "frame" and not clock.shift:
        raise SpecError(f"{name}: gives one vector per utterance; expected frames: probe it with @utterance labels")
