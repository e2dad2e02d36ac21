"""Where features come from: models run over recordings, or feature stores. One way to walk through both.

    source = open_source(["wavlm_base", "fbank"], "wavs/")                # run the models
    source = open_source(stores=["store/"])                               # or read what `cka-addon dump` wrote
    for utterance in iterate(source, progress=True, shard="1/4", skip=True):
        utterance.id, utterance.seconds
        utterance.layers[m][k]     # (frames, width) float32, layer k of model m
        utterance.times[m]         # (frames,) seconds, centres of the frames of model m
    source.infos                   # per model: name, layer names, widths, clock, provenance
    source.left_out                # {id: reason} of what could not be read or gave NaN

`iterate(..., waveforms=True)` also gives `utterance.wav`, (samples,) float32 mono at 16 kHz; a store needs to be told
where the recordings are (`open_source(stores=..., recordings=...)`). To run changed audio through the models, take
`source.waveform(id)`, change it, and call `source.run(id, wav)`: only sources of models can. Layers of models on
different clocks are brought together by `examples_of`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cka_addon import align, audio
from cka_addon.errors import AudioError, NonFinite, SpecError, StoreError
from cka_addon.estimators import check_finite
from cka_addon.models import Model, ModelInfo, check_names, load_models
from cka_addon.options import Options
from cka_addon.store import FeatureStore, parse_shard
from cka_addon.utterances import Utterance, reduce_utterance

logger = logging.getLogger(__name__)

GIVE_UP_AFTER = 20  # failures in a row: then it is the model or the folder, not a file


class Source(Protocol):
    """What the rest of the package asks of a source."""

    infos: list[ModelInfo]
    ids: list[str]
    left_out: dict[str, str]
    failures: int  # in a row, up to now

    def seconds(self, utterance: str) -> float:
        """Length of an utterance."""

    def count(self, utterance: str) -> int:
        """Frames on the slowest clock, known without computing anything."""

    def read(self, utterance: str) -> Utterance:
        """Features of one utterance."""

    def waveform(self, utterance: str) -> Tensor:
        """Samples of one utterance, (samples,) float32 at 16 kHz."""


class LiveSource:
    """Features straight from the models: every recording is read once and run through all of them."""

    def __init__(
        self, models: Sequence[Model], recordings: Sequence[audio.Recording], *, skip_unreadable: bool
    ) -> None:
        unreadable = [r for r in recordings if r.problem]
        if unreadable and not skip_unreadable:
            raise AudioError(
                f"{len(unreadable)} of {len(recordings)} recordings cannot be read, first {unreadable[0].path}: "
                f"{unreadable[0].problem}; repair them or pass --skip-unreadable (they are then left out and counted)"
            )
        self.models = list(models)
        self.infos = [m.info for m in self.models]
        self._recordings = {r.id: r for r in recordings}
        self.ids = sorted(self._recordings)
        self.left_out: dict[str, str] = {}
        self.failures = 0
        self.speakers = {r.id: r.speaker for r in recordings if r.speaker is not None}

    def seconds(self, utterance: str) -> float:
        """Length of an utterance, from the header of its file."""
        return self._recordings[utterance].seconds or 0.0

    def path(self, utterance: str) -> Path:
        """File of an utterance."""
        return self._recordings[utterance].path

    def waveform(self, utterance: str) -> Tensor:
        """Samples of one recording, (samples,) float32 at 16 kHz. Raises AudioError."""
        return audio.load(self._recordings[utterance])[0]

    def run(self, utterance: str, wav: Tensor) -> Utterance:
        """Features of any samples, under the name of an utterance."""
        layers = [model(wav, utterance) for model in self.models]
        clocks = [info.clock for info in self.infos]
        return Utterance(utterance, layers, len(wav) / audio.SAMPLE_RATE, [None] * len(layers), clocks, wav)

    def read(self, utterance: str) -> Utterance:
        """Features of one recording."""
        return self.run(utterance, self.waveform(utterance))

    def count(self, utterance: str) -> int:
        """Frames on the slowest clock, from the header."""
        slowest = max(info.clock.shift for info in self.infos)
        return max(1, int(self.seconds(utterance) / slowest)) if slowest else 1


class StoreSource:
    """Features from one or more stores; the utterances they have in common.

    recordings : where the audio is, for those who ask for waveforms
    """

    def __init__(
        self,
        stores: Sequence[FeatureStore],
        names: Sequence[str] | None = None,
        recordings: Sequence[audio.Recording] = (),
    ) -> None:
        self.stores = list(stores)
        self.infos = [info for store in self.stores for info in store.infos]
        if names is not None:
            if len(names) != len(self.infos):
                raise SpecError(f"got {len(names)} names; expected {len(self.infos)}, one per model")
            self.infos = [replace(info, name=name) for info, name in zip(self.infos, names, strict=True)]
        check_names([info.name for info in self.infos])
        self._recordings = {r.id: r for r in recordings}
        self.failures = 0
        common = set(self.stores[0].ids).intersection(*(s.ids for s in self.stores[1:]))
        if not common:
            raise SpecError(
                f"the stores have no utterance in common: {', '.join(f'{s.path} {s.ids[:2]}' for s in self.stores)}; "
                "expected stores of the same recordings, found from the same folder or list"
            )
        self.ids = sorted(common)
        self._same_recordings()
        everything = set[str]().union(*(s.ids for s in self.stores))
        self.left_out = {name: "not in every store" for name in sorted(everything - common)}
        for store in self.stores:
            self.left_out.update({name: problem for name, problem in store.skipped.items() if name not in common})
        self.overlap: str | None = None
        if everything - common:
            sizes = ", ".join(f"{len(store.ids)} in {store.path}" for store in self.stores)
            self.overlap = (
                f"{len(common)} of {len(everything)} utterances are in every store ({sizes}); the rest is left out"
            )

    def _same_recordings(self) -> None:
        """Raise StoreError where stores hold different recordings under the same names."""
        first = self.stores[0]
        for store in self.stores[1:]:
            found = [(name, how) for name in self.ids if (how := first.differs(store, name))]
            if found:
                raise StoreError(
                    f"{len(found)} of {len(self.ids)} utterances are different recordings in {first.path} and "
                    f"{store.path}, first '{found[0][0]}': {found[0][1]}; expected stores of the same recordings: dump "
                    "them from one folder or list, with ids that tell them apart"
                )

    def seconds(self, utterance: str) -> float:
        """Length of an utterance."""
        return self.stores[0].seconds(utterance)

    def waveform(self, utterance: str) -> Tensor:
        """Samples of one utterance. Raises SpecError where the source was opened without recordings."""
        if utterance not in self._recordings:
            raise SpecError(
                f"no recording of '{utterance}' is known: a feature store holds no audio; give the recordings too (-a)"
            )
        return audio.load(self._recordings[utterance])[0]

    def read(self, utterance: str) -> Utterance:
        """Features of one utterance from all stores."""
        parts = [store.read(utterance) for store in self.stores]
        return Utterance(
            utterance,
            [layers for part in parts for layers in part.layers],
            parts[0].seconds,
            [instants for part in parts for instants in part.instants],
            [info.clock for info in self.infos],
            power=np.concatenate([part.frame_power() for part in parts]) if parts[0].power is not None else None,
        )

    def count(self, utterance: str) -> int:
        """Frames of the model that has the fewest."""
        return min(n for store in self.stores for n in store.frames(utterance))


def open_source(
    models: Sequence | str | Callable | None = None,
    recordings: str | Path | Sequence | None = None,
    *,
    stores: Sequence | str | Path | FeatureStore | None = None,
    limit: int | None = None,
    skip_unreadable: bool = False,
    device: str = "cpu",
    names: Sequence[str] | None = None,
) -> LiveSource | StoreSource:
    """Models and recordings, or stores (with recordings where waveforms are wanted), as one source of features.

    models : specifications, callables or `Model`s;  recordings : folder, list file or list of paths
    stores : paths or `FeatureStore`s;  names : other names for the stores' models, in order
    limit : only the first so many utterances, sorted by id
    Raises SpecError, AudioError, StoreError.

    >>> import tempfile, soundfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> soundfile.write(folder / "a.wav", np.zeros(16000, "float32"), 16000)
    >>> model = Model(lambda wavs: {"hidden_states": [torch.ones(1, len(wavs[0]) // 320, 4)]}, "ones")
    >>> for u in iterate(open_source([model], folder)):
    ...     print(u.id, tuple(u.layers[0][0].shape), u.times[0][:2].tolist())
    a (50, 4) [0.01, 0.03]
    """
    if stores is not None:
        if models is not None:
            raise SpecError("got stores and models or recordings; expected either stores, or models and recordings")
        several = [stores] if isinstance(stores, (str, Path, FeatureStore)) else list(stores)
        opened = [s if isinstance(s, FeatureStore) else FeatureStore(s) for s in several]
        source = StoreSource(opened, names, audio.find_recordings(recordings) if recordings is not None else ())
        source.ids = source.ids[:limit]
        return source
    if models is None or recordings is None:
        raise SpecError("got neither stores nor models and recordings; expected one of the two")
    several = [models] if isinstance(models, (str, Model)) or callable(models) else list(models)
    loaded = load_models(several, device=device)
    found = audio.find_recordings(recordings, limit=limit)
    return LiveSource(loaded, found, skip_unreadable=skip_unreadable)


def iterate(
    source: Source,
    ids: Sequence[str] | None = None,
    *,
    shard: str | tuple[int, int] | None = None,
    progress: bool = False,
    desc: str = "features",
    skip: bool = False,
    waveforms: bool = False,
    tick: Callable[[], object] | None = None,
) -> Iterator[Utterance]:
    """Utterance after utterance; what cannot be read is left out, counted in `source.left_out` and logged.

    ids : which utterances, in this order (default: all);  shard : "i/n" takes every n-th of them
    skip : also leave out utterances with NaN or infinite features; without it they raise NonFinite
    waveforms : also give the samples;  tick : called after each utterance, used or not
    Raises SpecError after 20 failures in a row: then it is not the files.
    """
    index, count = parse_shard(shard)
    wanted = list(source.ids if ids is None else ids)[index - 1 :: count]
    names = [f"{info.name}/{layer}" for info in source.infos for layer in info.layers]
    with tqdm(total=len(wanted), desc=desc, unit="utt", disable=not progress) as bar:
        for name in wanted:
            try:
                utterance = source.read(name)
                if waveforms and utterance.wav is None:
                    utterance.wav = source.waveform(name)
                check_finite([x for model in utterance.layers for x in model], names, name)
            except (AudioError, RuntimeError, NonFinite) as error:
                if isinstance(error, NonFinite) and not skip:
                    raise
                source.left_out[name] = f"{type(error).__name__}: {error}"
                logger.warning("left out %s: %s", name, error)
                source.failures += 1
                if source.failures >= GIVE_UP_AFTER:
                    raise SpecError(
                        f"{source.failures} recordings in a row failed, last '{name}': {error}; "
                        "check the model and the recordings"
                    ) from error
                continue
            finally:
                bar.update()
                if tick is not None:
                    tick()
            source.failures = 0
            yield utterance


def examples_of(utterance: Utterance, infos: Sequence[ModelInfo], options: Options) -> list[Tensor]:
    """Examples of one utterance: for all layers of all models, (examples, width), the same moments in each."""
    if options.examples == "means":
        return [x.double().mean(0, keepdim=True).to(options.dtype) for model in utterance.layers for x in model]
    stored = [instants for instants in utterance.instants if instants is not None]
    if stored:
        if len(stored) < len(utterance.instants):
            raise SpecError("some stores hold sampled frames and others all frames; expected one kind: dump them alike")
        common = stored[0]
        for instants in stored[1:]:
            common = np.intersect1d(common, instants)
        if options.examples == "sampled":
            common = common[: options.frames]
        picks = [torch.from_numpy(np.flatnonzero(np.isin(instants, common))) for instants in stored]
        return [x[pick].to(options.dtype) for pick, model in zip(picks, utterance.layers, strict=True) for x in model]
    layers = utterance.layers
    if options.examples == "sampled":
        layers, _ = reduce_utterance(
            layers, infos, utterance.id, utterance.seconds, keep="sampled", frames=options.frames, seed=options.seed
        )
        return [x.to(options.dtype) for model in layers for x in model]
    ranges = align.align([len(m[0]) for m in layers], [i.clock for i in infos], rule=options.align)
    return [
        align.take(x.to(options.dtype), first, last)
        for (first, last), model in zip(ranges, layers, strict=True)
        for x in model
    ]


def check_examples(source: Source, options: Options) -> None:
    """Raise SpecError where the source cannot give the examples that were asked for."""
    if isinstance(source, StoreSource):
        kinds = set()
        for store in source.stores:
            keep = store.options["keep"]
            fits = {"frames": ("frames", "sampled", "means"), "sampled": ("frames", "sampled"), "means": ("means",)}
            if options.examples not in fits[keep]:
                raise SpecError(
                    f"{store.path}: holds {keep}, asked for examples={options.examples}; "
                    f"expected {' or '.join(fits[keep])}"
                )
            kinds.add((keep, store.options["seed"] if keep == "sampled" else 0))
        if len(kinds) > 1:
            raise SpecError("the stores keep different things or were sampled with different seeds; dump them alike")
    if options.examples == "frames":
        for info in source.infos:
            if not info.clock.shift:
                raise SpecError(f"{info.name}: gives one vector per utterance; compare with examples='means'")
