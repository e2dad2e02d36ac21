"""Models behind one face: a recording in, one (frames, width) tensor per layer out, with a clock and a fingerprint.

Three kinds: s3prl upstreams (any name of `s3prl.hub`), models of the transformers library, and any callable
`wavs -> {"hidden_states": [(batch, frames, width), ...]}`.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cka_addon.align import Clock
from cka_addon.audio import SAMPLE_RATE
from cka_addon.errors import CkaError, SpecError, require
from cka_addon.estimators import check_finite
from cka_addon.provenance import file_sha256, weights_sha256
from cka_addon.spec import SPEC_HELP, Spec, parse_spec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model without running it: also what a feature store keeps.

    name : unique in a run;  layers : names;  dims : widths;  clock : when frames are;  provenance : what it was
    """

    name: str
    layers: tuple[str, ...]
    dims: tuple[int, ...]
    clock: Clock
    provenance: dict = field(default_factory=dict, compare=False)

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping) -> ModelInfo:
        """Inverse of `to_dict`."""
        clock = Clock(**data["clock"])
        return cls(data["name"], tuple(data["layers"]), tuple(data["dims"]), clock, dict(data["provenance"]))


class Model:
    """A model whose layers can be dumped or compared.

    forward : callable, list of (samples,) float tensors at 16 kHz -> dict with the keys asked for; a value is a list or
        tuple of (batch, frames, width), a stacked (layers, batch, frames, width) tensor, or one (batch, frames, width)
        or (batch, width) tensor
    name : short name used in files and plots
    keys : which values to take;  layers : which layers to keep, positions or names
    clock : when frames are; measured from the number of frames when it is not given

    Utterances are run one at a time: no padding, so results do not depend on what else was in the batch.

    >>> model = Model(lambda wavs: {"hidden_states": [torch.ones(1, len(wavs[0]) // 320, 4)] * 2}, "ones")
    >>> model.info.layers, model.info.dims, model.info.clock.shift
    (('layer_0', 'layer_1'), (4, 4), 0.02)
    >>> [tuple(x.shape) for x in model(torch.zeros(16000))]
    [(50, 4), (50, 4)]
    """

    def __init__(
        self,
        forward: Callable[[list[Tensor]], Mapping],
        name: str,
        *,
        keys: Sequence[str] = ("hidden_states",),
        layers: Sequence[int | str] | str | None = None,
        clock: Clock | None = None,
        device: str | torch.device = "cpu",
        provenance: Mapping | None = None,
    ) -> None:
        if not callable(forward):
            raise SpecError(
                f"{name}: got {type(forward).__name__}; expected a callable wavs -> {{'hidden_states': ...}}"
            )
        self.name, self.keys, self.device = name, tuple(keys), torch.device(device)
        self._forward = forward
        if isinstance(forward, torch.nn.Module):
            forward.eval().to(self.device)
        self._select: list[int] | None = None
        probe = self._outputs(_noise(SAMPLE_RATE).to(self.device))
        names = [label for label, _ in probe]
        self._select = _choose(layers, names, self.name)
        kept = [probe[i] for i in self._select]
        self._names = [label for label, _ in kept]
        source = dict(provenance or {})
        if isinstance(forward, torch.nn.Module) and forward.state_dict():
            source.setdefault("weights_sha256", weights_sha256(forward))
        source.setdefault(
            "class", f"{type(forward).__module__}.{getattr(forward, '__qualname__', type(forward).__qualname__)}"
        )
        source["keys"], source["layers_of_model"] = list(self.keys), len(names)
        clock = clock or self._given_clock() or self._measure_clock()
        self.info = ModelInfo(name, tuple(self._names), tuple(int(x.shape[-1]) for _, x in kept), clock, source)

    def __call__(self, wav: Tensor, utterance: str = "") -> list[Tensor]:
        """Layers of one recording: wav (samples,) -> list of (frames, width) float32, all of the same length.

        Raises NonFinite naming layer and utterance.
        """
        found = self._outputs(wav.to(self.device))
        layers = [x for _, x in (found if self._select is None else [found[i] for i in self._select])]
        check_finite(layers, [f"{self.name}/{label}" for label in self._names], utterance)
        return layers

    def _outputs(self, wav: Tensor) -> list[tuple[str, Tensor]]:
        with torch.inference_mode():
            output = self._forward([wav])
        if not isinstance(output, Mapping):
            raise SpecError(f"{self.name}: got {type(output).__name__} from the model; expected a dict of layers")
        found: list[tuple[str, Tensor]] = []
        for key in self.keys:
            if key not in output:
                raise SpecError(
                    f"{self.name}: the model gives no '{key}'; expected one of {', '.join(map(str, output))}: set keys="
                )
            found += self._name_layers(key, output[key])
        lengths = [x.shape[0] for _, x in found if x.ndim == 2]
        if not lengths:
            return [(label, x[None]) for label, x in found]
        frames = min(lengths)
        if max(lengths) - frames > 2:
            raise SpecError(
                f"{self.name}: layers have {frames} to {max(lengths)} frames; expected one clock for all: "
                "make one model entry per clock with layers= or keys="
            )
        # (width,) is an utterance-level vector: the same at every frame.
        return [(n, (x[:frames] if x.ndim == 2 else x.expand(frames, -1)).float()) for n, x in found]

    def _name_layers(self, key: str, value: object) -> list[tuple[str, Tensor]]:
        if isinstance(value, Mapping):
            return [(str(k), _single(v, f"{self.name}: {key}[{k}]")) for k, v in value.items()]
        if isinstance(value, Tensor) and value.ndim != 4:
            return [(key, _single(value, f"{self.name}: {key}"))]
        if not isinstance(value, (list, tuple, Tensor)):
            raise SpecError(f"{self.name}: got {type(value).__name__} under '{key}'; expected tensors")
        values = [_single(v, f"{self.name}: {key}[{i}]") for i, v in enumerate(value)]
        given = getattr(self._forward, "layer_names", None) if key == "hidden_states" else None
        if given is not None and not callable(given) and len(given) == len(values):
            return list(zip(map(str, given), values, strict=True))
        prefix = "layer" if key == "hidden_states" else key
        return [(f"{prefix}_{i}", v) for i, v in enumerate(values)]

    def _given_clock(self) -> Clock | None:
        """Clock of a model that tells when its frames are: attributes `frame_shift` and `first_center`, in seconds."""
        shift, center = getattr(self._forward, "frame_shift", None), getattr(self._forward, "first_center", None)
        if isinstance(shift, (int, float)) and isinstance(center, (int, float)):
            return Clock(float(shift), float(center), "the model's frame_shift and first_center")
        return None

    def _frames(self, samples: int) -> int:
        found = self._outputs(_noise(samples).to(self.device))
        return int(found[0][1].shape[0])

    def _measure_clock(self) -> Clock:
        """Shift and first centre from how the number of frames grows with the length.

        T frames need W + (T - 1) hop samples, where W is the window less the padding of both sides, so the length at
        which a frame is added gives W, and the first frame's centre is W / 2: 0 for a centred STFT, 12.5 ms for an
        uncentred 25 ms window or a wav2vec 2.0-style CNN.
        """
        rate = getattr(self._forward, "get_downsample_rates", None)
        one = SAMPLE_RATE
        base, longer = self._frames(one), self._frames(2 * one)
        if longer <= base:
            if base == longer == 1:
                return Clock(0.0, 0.0, "one vector per utterance")
            raise SpecError(
                f"{self.name}: got {base} frames for 1 s and {longer} for 2 s; expected frames that follow the audio: "
                "give shift= and first_center="
            )
        hop = int(rate(self.keys[0])) if callable(rate) else round(one / (longer - base))
        if abs((longer - base) * hop - one) > 2 * hop:
            raise SpecError(
                f"{self.name}: got {longer - base} frames per second, but one every {hop} samples; expected the two "
                "to agree: give shift= and first_center= in seconds"
            )
        low, high = one, one + hop + hop // 2
        if self._frames(high) <= base:
            raise SpecError(
                f"{self.name}: {high} samples give no more frames than {one}; expected one frame every {hop} samples: "
                "give shift= and first_center= in seconds"
            )
        while high - low > 1:
            middle = (low + high) // 2
            if self._frames(middle) > base:
                high = middle
            else:
                low = middle
        window = high - base * hop
        return Clock(hop / SAMPLE_RATE, round(window / 2 / SAMPLE_RATE, 6), "measured from the number of frames")


def _noise(samples: int) -> Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(0))


def _single(value: object, where: str) -> Tensor:
    """Drop the batch dimension of a batch of one: (frames, width) or (width,)."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
        value = value[None] if isinstance(value, Tensor) and value.ndim == 2 else value
    if not isinstance(value, Tensor) or value.ndim not in (2, 3) or value.shape[0] != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise SpecError(f"{where}: got {got}; expected (1, frames, width) or (1, width) for one recording")
    return value[0].detach()


def _choose(layers: Sequence[int | str] | str | None, names: list[str], model: str) -> list[int]:
    """Positions of the wanted layers; "0-4,8,-1", names, or a list of either."""
    if layers is None or layers == "all":
        return list(range(len(names)))
    items = layers.split(",") if isinstance(layers, str) else list(layers)
    chosen: list[int] = []
    for item in items:
        text = str(item).strip()
        span = re.fullmatch(r"(\d+)-(\d+)", text)
        if text in names:
            chosen.append(names.index(text))
        elif span and int(span.group(1)) <= int(span.group(2)) < len(names):
            chosen += range(int(span.group(1)), int(span.group(2)) + 1)
        elif re.fullmatch(r"-?\d+", text) and -len(names) <= int(text) < len(names):
            chosen.append(int(text) % len(names))
        else:
            raise SpecError(f"{model}: got layer '{text}'; expected 0 to {len(names) - 1} or one of {', '.join(names)}")
    if len(set(chosen)) != len(chosen):
        raise SpecError(f"{model}: got layers '{layers}' with one of them twice; expected each once")
    return chosen


def load_model(spec: str | Spec | Model | Callable, *, device: str | torch.device = "cpu") -> Model:
    """Build a model from its specification (see `SPEC_HELP`), or wrap a callable.

    Raises SpecError where the specification cannot be used, MissingPackage where its library is absent.

    >>> load_model(Model(lambda wavs: {"hidden_states": [torch.ones(1, len(wavs[0]) // 160, 4)]}, "ones")).name
    'ones'
    """
    if isinstance(spec, Model):
        return spec
    if not isinstance(spec, (str, Spec)):
        return Model(spec, getattr(spec, "__name__", type(spec).__name__), device=device)
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    options = dict(spec.options)
    keys = options.pop("keys", "hidden_states").split(",")
    layers = options.pop("layers", None)
    clock = None
    if "shift" in options or "first_center" in options:
        try:
            clock = Clock(float(options.pop("shift")), float(options.pop("first_center")), "given")
        except (KeyError, ValueError) as error:
            raise SpecError(
                f"{spec.name}: got only part of a clock; expected shift= and first_center=, seconds"
            ) from error
    build = {"s3prl": _s3prl, "hf": _transformers, "py": _callable}[spec.kind]
    forward, provenance = build(spec, options)
    provenance = {"kind": spec.kind, "target": spec.target, "options": spec.options, **provenance}
    return Model(forward, spec.name, keys=keys, layers=layers, clock=clock, device=device, provenance=provenance)


def load_models(specs: Sequence, *, device: str | torch.device = "cpu") -> list[Model]:
    """`load_model` for several, with different names."""
    models = [load_model(spec, device=device) for spec in specs]
    check_names([m.name for m in models])
    return models


def check_names(names: Sequence[str]) -> None:
    """Raise SpecError where two models share a name or there is none."""
    if not names:
        raise SpecError(f"got no model; expected at least one.\n{SPEC_HELP}")
    for name in names:
        if list(names).count(name) > 1:
            raise SpecError(f"two models are called '{name}'; expected different names: write NAME=KIND:TARGET")
        if "/" in name:
            raise SpecError(f"got model name '{name}'; expected one without '/'")


def _s3prl(spec: Spec, options: dict[str, str]) -> tuple[Callable, dict]:
    hub = require(
        "s3prl.hub", "pip install s3prl (and import s3prl_speaker_upstreams on torch 2.9+)", "an s3prl upstream"
    )
    entry = getattr(hub, spec.target, None)
    if entry is None or not callable(entry):
        near = difflib.get_close_matches(spec.target, hub.options(), n=5, cutoff=0.5)
        raise SpecError(f"s3prl has no upstream '{spec.target}'; the nearest names are {', '.join(near) or 'none'}")
    provenance: dict[str, object] = {"upstream": spec.target}
    for key in ("ckpt", "model_config"):
        if key == "ckpt" and getattr(entry, "ckpt_can_be_names", False) and not Path(options.get(key, "")).is_file():
            continue
        if key in options and not options[key].startswith(("http://", "https://")):
            if not Path(options[key]).expanduser().exists():
                raise SpecError(f"{spec.name}: {key}={options[key]} does not exist")
            options[key] = str(Path(options[key]).expanduser())
            if Path(options[key]).is_file():
                provenance[f"{key}_sha256"] = file_sha256(options[key])
    return entry(**options), provenance


class _TransformersForward(torch.nn.Module):
    """A transformers model as `wavs -> {"hidden_states": ...}`."""

    def __init__(self, model: torch.nn.Module, normalize: bool) -> None:
        super().__init__()
        self.model, self.normalize = model, normalize

    def forward(self, wavs: list[Tensor]) -> dict[str, object]:
        wav = wavs[0]
        if self.normalize:
            # What Wav2Vec2FeatureExtractor does: zero mean, unit variance with 1e-7 under the root.
            wav = (wav - wav.mean()) / torch.sqrt(wav.var(unbiased=False) + 1e-7)
        output = self.model(wav[None], output_hidden_states=True)
        return {"hidden_states": output.hidden_states, "last_hidden_state": output.last_hidden_state}


def _transformers(spec: Spec, options: dict[str, str]) -> tuple[Callable, dict]:
    transformers = require("transformers", "pip install transformers", "a model of the transformers library")
    if options:
        raise SpecError(f"{spec.name}: got options {sorted(options)}; expected keys, layers, shift, first_center only")
    try:
        model = transformers.AutoModel.from_pretrained(spec.target)
    except (OSError, ValueError) as error:
        raise SpecError(f"{spec.name}: transformers cannot load '{spec.target}': {error}") from error
    normalize, why = False, "no feature extractor was found"
    try:
        extractor = transformers.AutoFeatureExtractor.from_pretrained(spec.target)
        normalize, why = bool(getattr(extractor, "do_normalize", False)), "the model's feature extractor"
        if getattr(extractor, "sampling_rate", SAMPLE_RATE) != SAMPLE_RATE:
            raise SpecError(f"{spec.name}: works at {extractor.sampling_rate} Hz; expected {SAMPLE_RATE} Hz")
    except (OSError, ValueError) as error:
        if isinstance(error, CkaError):
            raise
        logger.warning("%s: no feature extractor beside the model, the waveform goes in as it is", spec.name)
    provenance = {"upstream": spec.target, "normalize": normalize, "normalize_from": why}
    return _TransformersForward(model, normalize), provenance


def _callable(spec: Spec, options: dict[str, str]) -> tuple[Callable, dict]:
    import importlib

    module, colon, attribute = spec.target.partition(":")
    if not colon:
        raise SpecError(f"got 'py:{spec.target}'; expected py:MODULE:NAME")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SpecError(
            f"py:{spec.target} cannot be imported: {error}; expected MODULE on the path, NAME in it"
        ) from error
    source = getattr(importlib.import_module(module), "__file__", None)
    provenance: dict[str, object] = {"upstream": spec.target}
    if source:
        provenance["source_sha256"] = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    return (found(**options) if options else found), provenance
