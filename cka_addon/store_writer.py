"""Writing feature stores: `cka-addon dump`, its resuming, and the joining of stores written in parts."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cka_addon import audio, provenance
from cka_addon.config import build
from cka_addon.errors import AudioError, MergeError, NonFinite, StoreError
from cka_addon.models import Model, ModelInfo, check_names, load_models
from cka_addon.options import DumpOptions
from cka_addon.store import DTYPES, FORMAT, complete_if_done, format_bytes, parse_shard, read_index
from cka_addon.utterances import frame_power, reduce_utterance

logger = logging.getLogger(__name__)

GIVE_UP_AFTER = 5  # failures in a row from the start: then it is the model or the folder, not a file


@dataclass
class Estimate:
    """What a dump will write."""

    utterances: int
    hours: float
    bytes: int
    unreadable: list[audio.Recording] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.utterances} utterances, {self.hours:.2f} h of audio, {format_bytes(self.bytes)} of features"
        return text + (f", {len(self.unreadable)} unreadable files" if self.unreadable else "")


def estimate(infos: Sequence[ModelInfo], recordings: Sequence[audio.Recording], options: DumpOptions) -> Estimate:
    """Size of a dump from the recordings' headers, before anything is run."""
    lengths = [r.seconds for r in recordings if r.seconds is not None]
    size = 0.0
    width = DTYPES[options.dtype].itemsize
    for info in infos:
        per_frame = sum(info.dims) * width
        for seconds in lengths:
            frames = max(1.0, seconds / info.clock.shift) if info.clock.shift else 1.0
            kept = {"frames": frames, "sampled": min(options.frames, frames), "means": 1}
            size += per_frame * kept[options.keep]
    return Estimate(len(lengths), sum(lengths) / 3600, int(size), [r for r in recordings if r.seconds is None])


def dump(
    models: Sequence,
    recordings: str | Path | Sequence,
    out: str | Path,
    *,
    options: DumpOptions | None = None,
    shard: str | tuple[int, int] | None = None,
    limit: int | None = None,
    skip_unreadable: bool = False,
    device: str = "cpu",
    progress: bool = True,
    announce: Callable[[str], None] = logger.info,
    **settings: Any,
) -> Path:
    """Write the layers of one or more models for a list of recordings to a feature store; resumes where it was stopped.

    models : specifications, callables or `Model`s;  recordings : folder, list file or list of paths
    settings : fields of `DumpOptions`, e.g. dtype="float16", keep="means"; or `options` itself
    shard : "i/n" writes every n-th utterance; when all n are there the store is complete
    skip_unreadable : accept recordings that cannot be read; without it their number is found before any work is done
    Returns the store's path. Raises AudioError, StoreError, NonFinite.

    >>> import tempfile, soundfile
    >>> from cka_addon.models import Model
    >>> folder = Path(tempfile.mkdtemp())
    >>> soundfile.write(folder / "a.wav", np.zeros(16000, "float32"), 16000)
    >>> model = Model(lambda wavs: {"hidden_states": [torch.ones(1, len(wavs[0]) // 320, 4)]}, "ones")
    >>> from cka_addon.store import FeatureStore
    >>> FeatureStore(dump([model], folder, folder / "store", progress=False)).ids
    ['a']
    """
    options = build(DumpOptions, settings, options)
    index, count = parse_shard(shard)
    out = Path(out)
    loaded = load_models(models, device=device)
    infos = [m.info for m in loaded]
    found = audio.find_recordings(recordings, limit=limit)
    mine = found[index - 1 :: count]
    size = estimate(infos, mine, options)
    announce(f"{out}: {size}" + (f" (part {index} of {count})" if count > 1 else ""))
    if size.unreadable and not skip_unreadable:
        listed = "; ".join(f"{r.path}: {r.problem}" for r in size.unreadable[:3])
        raise AudioError(
            f"{len(size.unreadable)} of {len(mine)} recordings cannot be read, first {listed}; "
            "repair them or pass --skip-unreadable (they are then left out and counted)"
        )
    header = {
        "format": FORMAT,
        "models": [info.to_dict() for info in infos],
        "options": {
            "dtype": options.dtype,
            "keep": options.keep,
            "frames": options.frames if options.keep == "sampled" else None,
            "seed": options.seed,
        },
        "recordings": len(found),
        "ids_sha256": hashlib.sha256("\n".join(r.id for r in found).encode()).hexdigest(),
        "parts": count,
        "provenance": provenance.collect(audio=str(recordings) if isinstance(recordings, (str, Path)) else "list"),
    }
    writer = _Writer(out, header, index, count, options.dtype, options.shard_mib << 20)
    with writer:
        done = writer.done
        if done:
            announce(f"{out}: resuming, {len(done)} of {len(mine)} utterances are there")
            writer.check_recordings(mine)
        left = [r for r in mine if r.id not in done]
        free = shutil.disk_usage(out).free
        if left and size.bytes * len(left) / max(1, len(mine)) > free:
            raise StoreError(
                f"{out}: needs about {format_bytes(size.bytes)}, the disk has {format_bytes(free)} left; "
                "keep fewer layers, use --dtype float16, --keep sampled or --keep means"
            )
        _fill(writer, loaded, left, progress, options)
        writer.finish(skip_unreadable)
    return out


def _fill(
    writer: _Writer,
    models: Sequence[Model],
    recordings: Sequence[audio.Recording],
    progress: bool,
    options: DumpOptions,
) -> None:
    infos = [m.info for m in models]
    written = 0
    for recording in tqdm(recordings, desc="dump", unit="utt", disable=not progress):
        try:
            wav, about = audio.load(recording)
            layers = [model(wav, recording.id) for model in models]
            kept, instants = reduce_utterance(
                layers,
                infos,
                recording.id,
                about["seconds"],
                keep=options.keep,
                frames=options.frames,
                seed=options.seed,
            )
            power = frame_power(layers) if options.keep == "means" else None
            writer.add(recording.id, kept, about, instants, power)
            written += 1
        except (AudioError, NonFinite, RuntimeError) as error:
            # One bad file must not end hours of work; it is counted, and without the option the store stays incomplete.
            writer.skip(recording.id, f"{type(error).__name__}: {error}")
            logger.warning("left out %s: %s", recording.id, error)
            if written == 0 and len(writer.skipped_now) >= GIVE_UP_AFTER:
                raise StoreError(
                    f"the first {GIVE_UP_AFTER} recordings all failed, last: {error}; "
                    "expected at most single bad files: check the model and the recordings"
                ) from error


class _Writer:
    """One part of a store being written."""

    def __init__(self, out: Path, header: dict, index: int, count: int, dtype: str, shard_bytes: int) -> None:
        self.out, self.header, self.dtype, self.shard_bytes = out, header, DTYPES[dtype], shard_bytes
        self.part = f"part-{index:03d}-of-{count:03d}"
        self.names = [f"{m['name']}/{layer}" for m in header["models"] for layer in m["layers"]]
        self.widths = [len(m["layers"]) for m in header["models"]]
        self.done: set[str] = set()
        self.lengths: dict[str, float] = {}
        self.skipped: dict[str, str] = {}
        self.skipped_now: list[str] = []
        self._clear()

    def _clear(self) -> None:
        self.buffer: list[list[Tensor]] = []
        self.index: list[dict] = []
        self.pending_skips: dict[str, str] = {}
        self.size = 0

    def __enter__(self) -> _Writer:
        from filelock import FileLock, Timeout

        for folder in ("data", "parts"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.out / "parts" / f".{self.part}.lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise StoreError(f"{self.out}: another process writes {self.part}; wait for it or stop it") from error
        try:
            with FileLock(self.out / "parts" / ".header.lock"):
                self._header()
            for path in (self.out / "data").glob(f".{self.part}-*.tmp*"):
                path.unlink()
            self.files = sorted((self.out / "data").glob(f"{self.part}-*.safetensors"))
            for path in self.files:
                shard = read_index(path)
                self.done |= {u["id"] for u in shard["utterances"]}
                self.lengths.update({u["id"]: float(u["seconds"]) for u in shard["utterances"]})
                self.skipped.update(shard["skipped"])
        except BaseException:
            self.lock.release()
            raise
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            # What was computed before an error is worth keeping; a kill loses at most one shard's worth.
            if kind is not None and self.index:
                self._flush()
        finally:
            self.lock.release()

    def _header(self) -> None:
        path = self.out / "store.json"
        if not path.exists():
            provenance.write_json(path, self.header)
            return
        there = json.loads(path.read_text(encoding="utf-8"))
        # Stores of older versions have no digest of the ids.
        for key in ("format", "options", "parts", "recordings", *(["ids_sha256"] if "ids_sha256" in there else [])):
            if there.get(key) != self.header[key]:
                raise StoreError(
                    f"{self.out}: was begun with {key} = {there.get(key)}, now {self.header[key]}; "
                    "use the same options and recordings to resume, or another folder"
                )
        for old, new in zip(there["models"], self.header["models"], strict=False):
            for key in ("name", "layers", "dims", "clock"):
                if json.loads(json.dumps(new[key])) != old[key]:
                    raise StoreError(
                        f"{self.out}: model {old['name']} was begun with {key} = {old[key]}, now {new[key]}"
                    )
            before, now = (m["provenance"].get("weights_sha256") for m in (old, new))
            if before != now:
                raise StoreError(f"{self.out}: model {old['name']} had other weights ({before}, now {now})")
        if len(there["models"]) != len(self.header["models"]):
            raise StoreError(
                f"{self.out}: was begun with {len(there['models'])} models, now {len(self.header['models'])}"
            )

    def add(
        self,
        name: str,
        layers: list[list[Tensor]],
        about: audio.About,
        instants: np.ndarray | None,
        power: np.ndarray | None = None,
    ) -> None:
        """One utterance; power : mean square of a frame of every layer, where only the mean is kept."""
        flat = [x.detach().to("cpu", self.dtype) for model in layers for x in model]
        if self.dtype == torch.float16:
            for label, x in zip(self.names, flat, strict=True):
                if not bool(torch.isfinite(x).all()):
                    raise NonFinite(
                        f"layer {label} in utterance '{name}': values beyond 65504 do not fit float16; "
                        "dump with --dtype float32"
                    )
        # A sum of finite values can still be NaN-free and huge; float32 features are checked by the model itself.
        entry: dict[str, object] = {"id": name, "frames": [len(model[0]) for model in layers], **about}
        if power is not None:
            entry["frame_power"] = [float(f"{v:.6g}") for v in power]
        if instants is not None:
            entry["instants"] = [round(float(t), 6) for t in instants]
        self.buffer.append(flat)
        self.index.append(entry)
        self.done.add(name)
        self.size += sum(x.numel() * x.element_size() for x in flat)
        if self.size >= self.shard_bytes:
            self._flush()

    def check_recordings(self, recordings: Sequence[audio.Recording]) -> None:
        """Raise StoreError where what is stored was made from recordings of another length than the ones given now."""
        for r in recordings:
            stored = self.lengths.get(r.id)
            # The length in the header of an mp3 is an estimate.
            if stored is None or r.seconds is None or r.path.suffix.lower() == ".mp3":
                continue
            if abs(stored - r.seconds) > 2e-3:
                raise StoreError(
                    f"{self.out}: holds '{r.id}' of {stored:.3f} s, {r.path} has {r.seconds:.3f} s; "
                    "expected the recordings the store was begun with: use them, or another folder"
                )

    def skip(self, name: str, problem: str) -> None:
        self.pending_skips[name] = self.skipped[name] = problem
        self.skipped_now.append(name)

    def _flush(self) -> None:
        from safetensors.torch import save_file

        tensors = (
            {n: torch.cat([row[i] for row in self.buffer]) for i, n in enumerate(self.names)} if self.buffer else {}
        )
        # safetensors wants at least something to hold; a shard of nothing but skipped files has one empty tensor.
        tensors = tensors or {"empty": torch.zeros(0)}
        metadata = {"index": json.dumps({"utterances": self.index, "skipped": self.pending_skips})}
        path = self.out / "data" / f"{self.part}-{len(self.files):05d}.safetensors"
        provenance.write_atomically(path, lambda temporary: save_file(tensors, str(temporary), metadata=metadata))
        self.files.append(path)
        self._clear()

    def finish(self, accept_skipped: bool) -> None:
        if self.index or self.pending_skips:
            self._flush()
        still = {k: v for k, v in self.skipped.items() if k not in self.done}
        if still and not accept_skipped:
            name, problem = next(iter(still.items()))
            raise StoreError(
                f"{self.out}: {len(still)} recordings failed and were left out, first '{name}': {problem}; the rest is "
                "stored. Run again to try them again, or with --skip-unreadable to go on without them"
            )
        manifest = {
            "files": {p.name: provenance.file_sha256(p) for p in self.files},
            "utterances": len(self.done),
            "skipped": still,
        }
        provenance.write_json(self.out / "parts" / f"{self.part}.json", manifest)
        complete_if_done(self.out)


def merge_stores(parts: Sequence[str | Path], out: str | Path) -> Path:
    """Join the parts of one dump that were written to different folders (array jobs without a shared disk).

    The shards are hard-linked where they can be, else copied. Raises MergeError where parts are missing, double or do
    not belong together.
    """
    out = Path(out)
    headers = []
    for part in map(Path, parts):
        if not (part / "store.json").is_file():
            raise MergeError(f"{part}: no store.json; expected a feature store made by 'cka-addon dump --shard i/n'")
        headers.append(json.loads((part / "store.json").read_text(encoding="utf-8")))
    first = headers[0]
    for path, header in zip(parts, headers, strict=True):
        check_names([m["name"] for m in header["models"]])
        for key in ("format", "options", "parts", "recordings", "ids_sha256"):
            if header.get(key) != first.get(key):
                raise MergeError(
                    f"{path}: {key} is {header.get(key)}, in {parts[0]} it is {first.get(key)}; expected the same"
                )
        same = [{k: m[k] for k in ("name", "layers", "dims", "clock")} for m in header["models"]]
        if same != [{k: m[k] for k in ("name", "layers", "dims", "clock")} for m in first["models"]]:
            raise MergeError(f"{path}: other models or layers than {parts[0]}; expected parts of one dump")
        hashes = [m["provenance"].get("weights_sha256") for m in header["models"]]
        if hashes != [m["provenance"].get("weights_sha256") for m in first["models"]]:
            raise MergeError(f"{path}: other weights than {parts[0]}; expected parts of one dump")
    manifests: dict[str, Path] = {}
    for part in map(Path, parts):
        for manifest in sorted((part / "parts").glob("part-*.json")):
            if manifest.name in manifests:
                raise MergeError(
                    f"{manifest.stem} is in {manifests[manifest.name].parent.parent} and in {part}; expected it once"
                )
            manifests[manifest.name] = manifest
    wanted = {f"part-{i:03d}-of-{first['parts']:03d}.json" for i in range(1, first["parts"] + 1)}
    if missing := sorted(wanted - set(manifests)):
        raise MergeError(
            f"{len(missing)} of {first['parts']} parts are missing or not finished, first {missing[0][:-5]}"
        )
    for folder in ("data", "parts"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    provenance.write_json(out / "store.json", first)
    for name, manifest in manifests.items():
        for file in json.loads(manifest.read_text(encoding="utf-8"))["files"]:
            source, target = manifest.parent.parent / "data" / file, out / "data" / file
            if not target.exists():
                provenance.write_atomically(target, functools.partial(_link, source))
        if not (out / "parts" / name).exists():
            provenance.write_atomically(out / "parts" / name, functools.partial(shutil.copyfile, manifest))
    complete_if_done(out)
    return out


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
