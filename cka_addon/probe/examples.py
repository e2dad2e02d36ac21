"""From recordings or stores to examples on disk: one pass over the models for all properties, in blocks that resume.

    OUT/examples/PROPERTY/block-00003.safetensors    tensors "model/layer" (examples, width) and, in the metadata, what
                                                     each example is: utterance, value, type, time

The utterances are put in a seeded random order and cut into blocks; a block does not depend on which process makes it,
so a run that was stopped goes on, and shards give the same files as one process. Probes then read layer by layer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cka_addon import align, audio, provenance
from cka_addon.errors import AudioError, NonFinite, SpecError
from cka_addon.estimators import check_finite
from cka_addon.models import Model, ModelInfo
from cka_addon.probe import controls, made, units
from cka_addon.probe.errors import ProbeError
from cka_addon.probe.labels import Labels, Segment
from cka_addon.store import FeatureStore, format_bytes

logger = logging.getLogger(__name__)

BLOCK = 16  # utterances
NO_TYPE = "examples without a type for the control task"
GIVE_UP_AFTER = 20  # failures in a row: then it is the model or the folder, not a file


@dataclass
class Property:
    """One question: labels, matched to recordings, and what an example is.

    names : recording -> the labels' own name of it;  change : kind of made label, or None
    number : kind of computed label, or None;  types : recording -> type for the control task, or labels with times
    """

    name: str
    unit: str
    kind: str
    labels: Labels
    names: dict[str, str]
    change: str | None = None
    number: str | None = None
    types: dict[str, str] | Labels | None = None
    type_names: dict[str, str] = field(default_factory=dict)
    about: dict = field(default_factory=dict)

    def folder(self) -> str:
        """Name of its folder."""
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in self.name)
        return f"{safe}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}" if safe != self.name else safe


@dataclass
class Rows:
    """What the examples of a property are, all blocks together, in order.

    utterances, values, types : (examples,) str (values: float64 for numbers);  times : (examples,) seconds
    """

    utterances: np.ndarray
    values: np.ndarray
    types: np.ndarray
    times: np.ndarray
    counts: dict[str, int]
    left_out: dict[str, str]

    def __len__(self) -> int:
        return len(self.utterances)


class Reader:
    """Features of utterances, from models (and changed recordings) or from stores, controls included.

    Every item is, per model, its layers: a list of (frames, width) tensors.
    """

    def __init__(
        self,
        models: Sequence[Model],
        stores: Sequence[FeatureStore],
        recordings: Sequence[audio.Recording],
        material: made.Material,
        seed: int,
    ) -> None:
        self.models, self.stores, self.material, self.seed = list(models), list(stores), material, seed
        self.recordings = {r.id: r for r in recordings}
        self.infos: list[ModelInfo] = [i for s in self.stores for i in s.infos] + [m.info for m in self.models]
        if self.stores:
            common = set(self.stores[0].ids).intersection(*(s.ids for s in self.stores[1:]))
            if self.models:
                common &= set(self.recordings)
            if not common:
                raise SpecError(
                    "the stores and the recordings have no utterance in common; expected the same recordings"
                )
            self.ids = sorted(common)
        else:
            self.ids = sorted(self.recordings)

    def seconds(self, utterance: str) -> float:
        """Length of an utterance."""
        if self.stores:
            return self.stores[0].seconds(utterance)
        return float(self.recordings[utterance].seconds or 0.0)

    def wav(self, utterance: str) -> np.ndarray:
        """Samples, (samples,) float32 at 16 kHz."""
        if utterance not in self.recordings:
            raise SpecError(f"'{utterance}' has features but no recording; give the recordings: --audio")
        return audio.load(self.recordings[utterance])[0].numpy()

    def read(self, utterance: str, change: str | None) -> tuple[list[list[Tensor]], float]:
        """(layers per model, seconds), of the recording as it is or in its condition of kind `change`."""
        layers: list[list[Tensor]] = []
        seconds = self.seconds(utterance)
        for store in self.stores:
            found = store.read(utterance)
            layers += found.layers
        if self.models:
            wav = self.wav(utterance)
            if change is not None:
                wav = made.change(wav, change, utterance, self.seed, self.material)
            seconds = len(wav) / audio.SAMPLE_RATE
            tensor = torch.from_numpy(np.ascontiguousarray(wav, dtype=np.float32))
            layers += [model(tensor, utterance) for model in self.models]
        names = [f"{i.name}/{layer}" for i in self.infos for layer in i.layers]
        check_finite([x for model in layers for x in model], names, utterance)
        return layers, seconds


def blocks_of(ids: Sequence[str], seed: int) -> list[list[str]]:
    """Utterances in a seeded random order, cut into blocks of about 16.

    >>> [len(b) for b in blocks_of([str(i) for i in range(40)], seed=0)]
    [14, 13, 13]
    """
    order = np.random.default_rng([seed, 0]).permutation(len(ids))
    return [[ids[i] for i in part] for part in np.array_split(order, -(-len(ids) // BLOCK))]


@dataclass
class _Picked:
    """Examples of one utterance: values, types, times and how to take the features of each model."""

    values: list[str | float]
    types: list[str]
    times: np.ndarray
    take: Callable[[int, list[Tensor]], list[Tensor]]


def pick(
    prop: Property,
    utterance: str,
    infos: Sequence[ModelInfo],
    frames: Sequence[int],
    seconds: float,
    wav: Callable[[], np.ndarray],
    *,
    per_utterance: int | None,
    seed: int,
    counts: units.Counts,
) -> _Picked | None:
    """The examples that an utterance gives to a property; None where it gives none."""
    rows: list[Segment] = []
    value: str | float | None = None
    numbers: tuple[np.ndarray, np.ndarray] | None = None
    if prop.number is not None:
        numbers = made.compute_number(wav(), prop.number) if prop.number != "position" else (np.zeros(0), np.zeros(0))
        if prop.unit == "utterance":
            value = float(np.nanmean(numbers[1])) if np.isfinite(numbers[1]).any() else None
            if value is None:
                counts.add("utterances without a value")
                return None
    elif prop.change is not None:
        value = made.condition(prop.change, utterance, seed)
    elif prop.labels.segments:
        rows = units.usable_segments(prop.labels.segments[prop.names[utterance]], seconds, counts)
        if not rows:
            counts.add("utterances without a usable segment")
            return None
    else:
        value = prop.labels.utterances[prop.names[utterance]]
    rng = np.random.default_rng(
        int.from_bytes(hashlib.sha256(f"{seed}|{utterance}|{prop.name}".encode()).digest()[:8], "little")
    )

    def thin(candidates: np.ndarray) -> np.ndarray:
        if per_utterance is None or len(candidates) <= per_utterance:
            return candidates
        return np.sort(rng.permutation(candidates)[:per_utterance])

    if prop.unit == "utterance":
        values: list[str | float] = [_value(prop, value)]
        times = np.array([seconds / 2])
        types = _types(prop, utterance, [], np.array([-1]), times)
        if not types[0]:
            counts.add(NO_TYPE)
            return None
        return _Picked(
            values,
            types,
            times,
            lambda m, layers: [x.mean(0, keepdim=True, dtype=torch.float64).float() for x in layers],
        )
    if prop.unit == "segment":
        starts, ends = np.array([r.start for r in rows]), np.array([r.end for r in rows])
        spans = [units.frames_of(i.clock, n, starts, ends) for i, n in zip(infos, frames, strict=True)]
        valid = np.all([last > first for first, last in spans], axis=0)
        counts.add("segments without a frame", int((~valid).sum()))
        chosen = thin(np.flatnonzero(valid))
        middle = (starts + ends) / 2
        types = _types(prop, utterance, rows, chosen, middle[chosen])
        keep = [i for i, t in zip(chosen.tolist(), types, strict=True) if t]
        types = [t for t in types if t]
        counts.add(NO_TYPE, len(chosen) - len(keep))
        if not keep:
            return None

        def take(m: int, layers: list[Tensor]) -> list[Tensor]:
            first, last = spans[m]
            return [units.means(x, first[keep], last[keep]) for x in layers]

        return _Picked([_value(prop, rows[i].value) for i in keep], types, middle[keep], take)
    ranges = align.align(list(frames), [i.clock for i in infos], rule="nearest")
    slowest = align.reference_clock([i.clock for i in infos])
    moments = infos[slowest].clock.times(frames[slowest])[ranges[slowest][0]]
    if numbers is not None:
        found = moments / seconds if prop.number == "position" else _nearest(numbers, moments)
        where = thin(np.flatnonzero(np.isfinite(found)))
        values = [float(v) for v in found[where]]
        owner = np.full(len(where), -1)
    elif prop.labels.segments:
        index = units.at_times(rows, moments)
        where = thin(np.flatnonzero(index >= 0))
        owner = index[where]
        values = [_value(prop, rows[i].value) for i in owner]
    else:
        where = thin(np.arange(len(moments)))
        values, owner = [_value(prop, value)] * len(where), np.full(len(where), -1)
    if not len(where):
        counts.add("utterances without a labelled frame")
        return None
    types = _types(prop, utterance, rows, owner, moments[where])
    if prop.number is not None and prop.types is None:
        types = [f"{utterance}@{t:.4f}" for t in moments[where]]
    if not all(types):
        typed = np.array([bool(t) for t in types])
        counts.add(NO_TYPE, int((~typed).sum()))
        where = where[typed]
        values, types = [v for v, t in zip(values, types, strict=True) if t], [t for t in types if t]
        if not values:
            return None

    def take_frames(m: int, layers: list[Tensor]) -> list[Tensor]:
        first, last = ranges[m]
        return [align.take(x, first[where], last[where]) for x in layers]

    return _Picked(values, types, moments[where], take_frames)


def _value(prop: Property, value: str | float | None) -> str | float:
    return float(value) if prop.kind == "number" else str(value)  # type: ignore[arg-type]


def _nearest(numbers: tuple[np.ndarray, np.ndarray], moments: np.ndarray) -> np.ndarray:
    times, values = numbers
    index = np.clip(np.searchsorted(times, moments), 1, max(1, len(times) - 1))
    if len(times) < 2:
        return np.full(len(moments), values[0] if len(values) else np.nan)
    index -= moments - times[index - 1] < times[index] - moments
    return values[index]


def _types(prop: Property, utterance: str, rows: list[Segment], owner: np.ndarray, times: np.ndarray) -> list[str]:
    """What each example is an instance of, for the control task; "" drops it (no type there)."""
    if isinstance(prop.types, Labels):
        name = prop.type_names.get(utterance)
        if name is None:
            return ["" for _ in times]
        if not prop.types.segments:
            return [prop.types.utterances[name]] * len(times)
        spans = sorted(prop.types.segments[name], key=lambda s: s.start)
        return [spans[i].value if i >= 0 else "" for i in units.at_times(spans, times).tolist()]
    if not rows:
        return [utterance] * len(times)
    context = ["#", *(r.value for r in rows), "#"]
    return ["|".join(context[i : i + 3]) for i in owner.tolist()]


@dataclass
class Gathered:
    """The examples of one property on disk."""

    prop: Property
    folder: Path
    infos: list[ModelInfo]
    files: list[Path]

    @property
    def columns(self) -> list[tuple[str, str, int]]:
        """(model, layer, width) of every layer."""
        return [(i.name, layer, d) for i in self.infos for layer, d in zip(i.layers, i.dims, strict=True)]

    def rows(self) -> Rows:
        """What the examples are."""
        parts = [_metadata(f) for f in self.files]
        number = self.prop.kind == "number"
        values = [v for p in parts for v in p["values"]]
        counts = units.Counts()
        left_out: dict[str, str] = {}
        for p in parts:
            counts.found.update(p["counts"])
            left_out.update(p["left_out"])
        return Rows(
            np.array([u for p in parts for u in p["utterances"]], dtype=str),
            np.array(values, dtype=np.float64) if number else np.array(values, dtype=str),
            np.array([t for p in parts for t in p["types"]], dtype=str),
            np.array([t for p in parts for t in p["times"]], dtype=np.float64),
            dict(counts.found),
            left_out,
        )

    def parts(self, model: str, layer: str) -> Iterator[tuple[Tensor, np.ndarray]]:
        """(features, positions among all examples) block by block, of one layer."""
        from safetensors import safe_open

        start = 0
        for file in self.files:
            with safe_open(str(file), "pt") as handle:
                key = f"{model}/{layer}"
                if key not in handle.keys():
                    continue
                x = handle.get_tensor(key)
            yield x, np.arange(start, start + len(x))
            start += len(x)

    def layer(self, model: str, layer: str) -> Tensor:
        """All examples of one layer, (examples, width)."""
        return torch.cat([x for x, _ in self.parts(model, layer)])


def _metadata(file: Path) -> dict:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as handle:
            return json.loads(handle.metadata()["probe"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ProbeError(f"{file}: damaged ({error}); expected a block of examples: delete it and run again") from error


def estimate(properties: Sequence[Property], reader: Reader, per_utterance: int | None) -> int:
    """Bytes that the examples will need on disk, from lengths and label counts."""
    width = 4 * sum(d for i in reader.infos for d in i.dims)
    slowest = max((i.clock.shift for i in reader.infos), default=0.0)
    total = 0
    for prop in properties:
        for name in prop.names:
            count = 1
            if prop.unit == "segment":
                count = len(prop.labels.segments[prop.names[name]])
            elif prop.unit == "frame":
                count = int(reader.seconds(name) / slowest) if slowest else 1
            total += width * min(count, per_utterance or count)
    return total


def gather(
    properties: Sequence[Property],
    reader: Reader,
    out: Path,
    *,
    per_utterance: int | None,
    seed: int,
    shard: tuple[int, int] = (1, 1),
    skip: bool = False,
    progress: bool = True,
    announce: Callable[[str], None] = logger.info,
) -> dict[str, Gathered] | None:
    """Write the blocks of this shard that are not there yet; the examples of all properties, or None while other shards
    are missing."""
    need = estimate(properties, reader, per_utterance)
    announce(f"examples: about {format_bytes(need)} in {out / 'examples'}")
    (out / "examples").mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    done: dict[str, list[Path]] = {}
    todo: dict[str | None, list[tuple[int, list[str], list[tuple[Property, Path]]]]] = {}
    complete = True
    for change in dict.fromkeys(p.change for p in properties):
        group = [p for p in properties if p.change == change]
        ids = sorted(set().union(*(p.names for p in group)))
        for number, block in enumerate(blocks_of(ids, seed)):
            missing = []
            for prop in group:
                path = out / "examples" / prop.folder() / f"block-{number:05d}.safetensors"
                done.setdefault(prop.name, []).append(path)
                if not path.is_file():
                    missing.append((prop, path))
            if missing and number % shard[1] == shard[0] - 1:
                todo.setdefault(change, []).append((number, block, missing))
            elif missing:
                complete = False
    left = sum(len(block) for work in todo.values() for _, block, _ in work)
    if left and need > free:
        raise ProbeError(
            f"{out}: the examples need about {format_bytes(need)}, the disk has {format_bytes(free)} left; use "
            "--per-utterance N, fewer layers (layers= in the model) or another folder"
        )
    failures = 0
    with tqdm(total=left, desc="examples", unit="utt", disable=not progress or not left) as bar:
        for change, work in todo.items():
            for _, block, missing in work:
                failures = _block(block, missing, change, reader, per_utterance, seed, skip, failures, bar.update)
    if not complete:
        return None
    infos = reader.infos
    return {p.name: Gathered(p, out / "examples" / p.folder(), infos, done[p.name]) for p in properties}


@dataclass
class _Held:
    """Examples of one property in one block, until they are written."""

    layers: list[list[Tensor]] = field(default_factory=list)
    utterances: list[str] = field(default_factory=list)
    values: list[str | float] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    counts: units.Counts = field(default_factory=units.Counts)

    def save(self, path: Path, names: Sequence[str]) -> None:
        """Write the block; one without examples has an empty tensor, safetensors wants something to hold."""
        from safetensors.torch import save_file

        tensors = {"empty": torch.zeros(0)}
        if self.layers:
            tensors = {n: torch.cat([row[i] for row in self.layers]).cpu() for i, n in enumerate(names)}
        about = {k: getattr(self, k) for k in ("utterances", "values", "types", "times", "left_out")}
        save_file(tensors, str(path), metadata={"probe": json.dumps({**about, "counts": dict(self.counts.found)})})


def _block(
    block: Sequence[str],
    missing: Sequence[tuple[Property, Path]],
    change: str | None,
    reader: Reader,
    per_utterance: int | None,
    seed: int,
    skip: bool,
    failures: int,
    tick: Callable[[], object],
) -> int:
    """Make the missing files of one block; the number of recordings that failed in a row, which it goes on counting."""
    infos = reader.infos
    names = [f"{i.name}/{layer}" for i in infos for layer in i.layers]
    held = {p.name: _Held() for p, _ in missing}
    for utterance in block:
        wanted = [p for p, _ in missing if utterance in p.names]
        picked: dict[str, _Picked | None] = {}
        try:
            layers, seconds = reader.read(utterance, change) if wanted else ([], 0.0)
            for prop in wanted:
                picked[prop.name] = pick(
                    prop,
                    utterance,
                    infos,
                    [len(model[0]) for model in layers],
                    seconds,
                    partial(reader.wav, utterance),
                    per_utterance=per_utterance,
                    seed=seed,
                    counts=held[prop.name].counts,
                )
        except (AudioError, NonFinite) as error:
            if not skip:
                raise
            failures += 1
            if failures >= GIVE_UP_AFTER:
                raise ProbeError(
                    f"{failures} recordings failed in a row, last '{utterance}': {error}; check the model and the audio"
                ) from error
            logger.warning("left out %s: %s", utterance, error)
            for prop in wanted:
                held[prop.name].left_out[utterance] = f"{type(error).__name__}: {error}"
            continue
        finally:
            tick()
        failures = 0
        for prop in wanted:
            chosen, mine = picked[prop.name], held[prop.name]
            if chosen is None:
                continue
            mine.layers.append([x for m, model in enumerate(layers) for x in chosen.take(m, model)])
            mine.utterances += [utterance] * len(chosen.values)
            mine.values += chosen.values
            mine.types += chosen.types
            mine.times += [round(float(t), 6) for t in chosen.times]
    for prop, path in missing:
        provenance.write_atomically(path, partial(held[prop.name].save, names=names))
    return failures


def check_units(properties: Sequence[Property], infos: Sequence[ModelInfo], stores: Sequence[FeatureStore]) -> None:
    """Raise where models or stores cannot give what a property asks for."""
    for prop in properties:
        for info in infos:
            controls.check_clock(info.clock, info.name, prop.unit)
        for store in stores:
            keep = store.options["keep"]
            if keep == "sampled" or (keep == "means" and prop.unit != "utterance"):
                raise SpecError(
                    f"{store.path}: holds {keep}, {prop.name} is asked per {prop.unit}; expected a store of all frames "
                    "(dump with --keep frames)"
                    + (" or probe @utterance of a store of means" if keep == "sampled" else "")
                )
        if stores and (prop.change is not None):
            raise SpecError(
                f"made:{prop.change} changes the recordings, a store holds features of unchanged ones; expected models "
                "and recordings: -m MODEL -a AUDIO"
            )
