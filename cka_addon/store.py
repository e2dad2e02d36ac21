"""Feature store: a folder of hidden states that appears complete only when it is.

    STORE/store.json                              models, layers, widths, clocks, options, provenance (written first)
    STORE/data/part-001-of-001-00000.safetensors  a shard: tensors "model/layer" of (frames, width) with the utterances
                                                  one behind the other; its metadata holds the index of them
    STORE/parts/part-001-of-001.json              one writer of n (`--shard 1/n`) is done: its files and their SHA-256
    STORE/complete.json                           every part is done (written last); readers want it

A shard is written beside and renamed, and it names its own utterances, so a killed writer leaves whole shards and at
most one temporary file; resuming goes on with the utterances that no shard holds.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cka_addon import align, audio, provenance
from cka_addon.errors import AudioError, MergeError, NonFinite, StoreError
from cka_addon.models import ModelInfo, check_names, load_models

logger = logging.getLogger(__name__)

FORMAT = 1
KEEP = ("frames", "sampled", "means")
DTYPES = {"float16": torch.float16, "float32": torch.float32}
GIVE_UP_AFTER = 5  # failures in a row from the start: then it is the model or the folder, not a file


@dataclass
class Utterance:
    """Features of one utterance: per model, the layers (frames, width); per model, the instants of sampled frames."""

    id: str
    layers: list[list[Tensor]]
    seconds: float
    instants: list[np.ndarray | None]


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


def format_bytes(size: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB" and size < 1024 * 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size / 1024:.1f} TiB"


def parse_shard(text: str | tuple[int, int] | None) -> tuple[int, int]:
    """ "2/8" -> (2, 8); None -> (1, 1).

    >>> parse_shard("2/8")
    (2, 8)
    """
    if text is None:
        return 1, 1
    try:
        index, count = (int(v) for v in (text.split("/") if isinstance(text, str) else text))
    except ValueError as error:
        raise StoreError(f"got shard '{text}'; expected i/n, e.g. 2/8") from error
    if not 1 <= index <= count:
        raise StoreError(f"got shard {index}/{count}; expected 1 <= i <= n")
    return index, count


def estimate(
    infos: Sequence[ModelInfo], recordings: Sequence[audio.Recording], *, keep: str, frames: int, dtype: str
) -> Estimate:
    """Size of a dump from the recordings' headers, before anything is run."""
    good = [r for r in recordings if r.seconds is not None]
    size = 0.0
    width = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    for info in infos:
        per_frame = sum(info.dims) * width
        for r in good:
            length = max(1.0, r.seconds / info.clock.shift) if info.clock.shift else 1.0
            size += per_frame * {"frames": length, "sampled": min(frames, length), "means": 1}[keep]
    return Estimate(
        len(good), sum(r.seconds for r in good) / 3600, int(size), [r for r in recordings if r.seconds is None]
    )


def reduce_utterance(
    layers: list[list[Tensor]],
    infos: Sequence[ModelInfo],
    utterance: str,
    seconds: float,
    *,
    keep: str,
    frames: int,
    seed: int,
) -> tuple[list[list[Tensor]], np.ndarray | None]:
    """All frames, the frames nearest to `frames` random instants, or the mean over the utterance, for every model."""
    if keep == "means":
        return [[x.double().mean(0, keepdim=True).float() for x in model] for model in layers], None
    if keep == "frames":
        return layers, None
    instants = align.sample_instants(utterance, seconds, frames, seed)
    picks = [info.clock.nearest(instants) for info in infos]
    valid = np.ones(len(instants), bool)
    for pick, model in zip(picks, layers, strict=True):
        valid &= (pick >= 0) & (pick < len(model[0]))
    chosen = [
        [x[torch.from_numpy(pick[valid]).to(x.device)] for x in model]
        for pick, model in zip(picks, layers, strict=True)
    ]
    return chosen, instants[valid]


def dump(
    models: Sequence,
    recordings: str | Path | Sequence,
    out: str | Path,
    *,
    dtype: str = "float32",
    keep: str = "frames",
    frames: int = 50,
    seed: int = 0,
    shard: str | tuple[int, int] | None = None,
    limit: int | None = None,
    skip_unreadable: bool = False,
    shard_mib: int = 256,
    device: str = "cpu",
    progress: bool = True,
    announce: Callable[[str], None] = logger.info,
) -> Path:
    """Write the layers of one or more models for a list of recordings to a feature store; resumes where it was stopped.

    models : specifications, callables or `Model`s;  recordings : folder, list file or list of paths
    keep : "frames" (all), "sampled" (`frames` random ones per utterance) or "means" (one per utterance)
    shard : "i/n" writes every n-th utterance; when all n are there the store is complete
    skip_unreadable : accept recordings that cannot be read; without it their number is found before any work is done
    Returns the store's path. Raises AudioError, StoreError, NonFinite.

    >>> import tempfile, soundfile
    >>> from cka_addon.models import Model
    >>> folder = Path(tempfile.mkdtemp())
    >>> soundfile.write(folder / "a.wav", np.zeros(16000, "float32"), 16000)
    >>> model = Model(lambda wavs: {"hidden_states": [torch.ones(1, len(wavs[0]) // 320, 4)]}, "ones")
    >>> FeatureStore(dump([model], folder, folder / "store", progress=False)).ids
    ['a']
    """
    if keep not in KEEP:
        raise StoreError(f"got keep={keep!r}; expected one of {', '.join(KEEP)}")
    if dtype not in DTYPES:
        raise StoreError(f"got dtype={dtype!r}; expected one of {', '.join(DTYPES)}")
    index, count = parse_shard(shard)
    out = Path(out)
    models = load_models(models, device=device)
    infos = [m.info for m in models]
    found = audio.find_recordings(recordings, limit=limit)
    mine = found[index - 1 :: count]
    size = estimate(infos, mine, keep=keep, frames=frames, dtype=dtype)
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
        "options": {"dtype": dtype, "keep": keep, "frames": frames if keep == "sampled" else None, "seed": seed},
        "recordings": len(found),
        "parts": count,
        "provenance": provenance.collect(audio=str(recordings) if isinstance(recordings, (str, Path)) else "list"),
    }
    writer = _Writer(out, header, index, count, dtype, shard_mib << 20)
    with writer:
        done = writer.done
        if done:
            announce(f"{out}: resuming, {len(done)} of {len(mine)} utterances are there")
        left = [r for r in mine if r.id not in done]
        free = shutil.disk_usage(out).free
        if left and size.bytes * len(left) / max(1, len(mine)) > free:
            raise StoreError(
                f"{out}: needs about {format_bytes(size.bytes)}, the disk has {format_bytes(free)} left; "
                "keep fewer layers, use --dtype float16, --keep sampled or --keep means"
            )
        _fill(writer, models, left, skip_unreadable, progress, keep=keep, frames=frames, seed=seed)
        writer.finish(skip_unreadable)
    return out


def _fill(writer, models, recordings, skip_unreadable, progress, *, keep, frames, seed) -> None:
    infos = [m.info for m in models]
    written = 0
    for recording in tqdm(recordings, desc="dump", unit="utt", disable=not progress):
        try:
            wav, about = audio.load(recording)
            layers = [model(wav, recording.id) for model in models]
            kept, instants = reduce_utterance(
                layers, infos, recording.id, about["seconds"], keep=keep, frames=frames, seed=seed
            )
            writer.add(recording.id, kept, about, instants)
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
        for key in ("format", "options", "parts", "recordings"):
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

    def add(self, name: str, layers: list[list[Tensor]], about: dict, instants: np.ndarray | None) -> None:
        flat = [x.detach().to("cpu", self.dtype) for model in layers for x in model]
        if self.dtype == torch.float16:
            for label, x in zip(self.names, flat, strict=True):
                if not bool(torch.isfinite(x).all()):
                    raise NonFinite(
                        f"layer {label} in utterance '{name}': values beyond 65504 do not fit float16; "
                        "dump with --dtype float32"
                    )
        # A sum of finite values can still be NaN-free and huge; float32 features are checked by the model itself.
        entry = {"id": name, "frames": [len(model[0]) for model in layers], **about}
        if instants is not None:
            entry["instants"] = [round(float(t), 6) for t in instants]
        self.buffer.append(flat)
        self.index.append(entry)
        self.done.add(name)
        self.size += sum(x.numel() * x.element_size() for x in flat)
        if self.size >= self.shard_bytes:
            self._flush()

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


def read_index(path: Path) -> dict:
    """Index of one shard: {"utterances": [...], "skipped": {...}}."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return json.loads(file.metadata()["index"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path}: damaged ({error}); expected a shard of a feature store: delete it and resume"
        ) from error


def complete_if_done(store: Path) -> bool:
    """Write complete.json when every part is there. Safe to call by several writers: they all write the same."""
    header = json.loads((store / "store.json").read_text(encoding="utf-8"))
    manifests = sorted((store / "parts").glob("part-*.json"))
    if len(manifests) != header["parts"]:
        return False
    parts = [json.loads(p.read_text(encoding="utf-8")) for p in manifests]
    summary = {
        "files": {name: digest for part in parts for name, digest in part["files"].items()},
        "utterances": sum(part["utterances"] for part in parts),
        "skipped": {name: problem for part in parts for name, problem in part["skipped"].items()},
    }
    provenance.write_json(store / "complete.json", summary)
    return True


class FeatureStore:
    """A feature store for reading; any number of readers at once.

    Raises StoreError where the folder is no store or is not complete (allow_incomplete reads what is there).
    """

    def __init__(self, path: str | Path, *, allow_incomplete: bool = False) -> None:
        self.path = Path(path)
        header = self.path / "store.json"
        if not header.is_file():
            raise StoreError(f"{self.path}: no store.json; expected a feature store made by 'cka-addon dump'")
        self.header = json.loads(header.read_text(encoding="utf-8"))
        if self.header.get("format") != FORMAT:
            raise StoreError(f"{self.path}: format {self.header.get('format')}; this version reads format {FORMAT}")
        manifest = self.path / "complete.json"
        self.complete = manifest.is_file()
        if not self.complete and not allow_incomplete:
            parts = len(list((self.path / "parts").glob("part-*.json")))
            raise StoreError(
                f"{self.path}: is not complete ({parts} of {self.header['parts']} parts are done); "
                "run the same 'cka-addon dump' again to finish it"
            )
        self.manifest = json.loads(manifest.read_text(encoding="utf-8")) if self.complete else None
        self.infos = [ModelInfo.from_dict(m) for m in self.header["models"]]
        self.options = self.header["options"]
        self.entries: dict[str, dict] = {}
        self.skipped: dict[str, str] = {}
        files = sorted(self.manifest["files"]) if self.complete else None
        self.files = [self.path / "data" / f for f in files] if files is not None else self._files()
        for file in self.files:
            shard = read_index(file)
            self.skipped.update(shard["skipped"])
            start = [0] * len(self.infos)
            for entry in shard["utterances"]:
                if entry["id"] in self.entries:
                    raise StoreError(f"{self.path}: utterance '{entry['id']}' is in two shards; run 'cka-addon verify'")
                self.entries[entry["id"]] = {**entry, "file": file, "start": list(start)}
                start = [a + b for a, b in zip(start, entry["frames"], strict=True)]
        self.skipped = {k: v for k, v in self.skipped.items() if k not in self.entries}
        self.ids = sorted(self.entries)
        self._open: OrderedDict[Path, object] = OrderedDict()

    def _files(self) -> list[Path]:
        return sorted((self.path / "data").glob("part-*.safetensors"))

    def __len__(self) -> int:
        return len(self.ids)

    def seconds(self, utterance: str) -> float:
        """Length of an utterance in seconds."""
        return float(self.entries[utterance]["seconds"])

    def frames(self, utterance: str) -> list[int]:
        """Stored frames of an utterance, per model."""
        return list(self.entries[utterance]["frames"])

    def read(self, utterance: str) -> Utterance:
        """Features of one utterance, float32."""
        from safetensors import safe_open

        entry = self.entries[utterance]
        handle = self._open.get(entry["file"])
        if handle is None:
            handle = self._open[entry["file"]] = safe_open(str(entry["file"]), "pt")
            if len(self._open) > 8:
                self._open.popitem(last=False)
        self._open.move_to_end(entry["file"])
        layers = []
        for m, info in enumerate(self.infos):
            a, n = entry["start"][m], entry["frames"][m]
            layers.append([handle.get_slice(f"{info.name}/{layer}")[a : a + n].float() for layer in info.layers])
        instants = np.array(entry["instants"]) if "instants" in entry else None
        return Utterance(utterance, layers, float(entry["seconds"]), [instants] * len(layers))

    def __iter__(self) -> Iterator[Utterance]:
        for utterance in self.ids:
            yield self.read(utterance)

    def verify(self, *, progress: bool = True) -> list[str]:
        """Problems of the store; an empty list where there is none. Reads every byte."""
        from safetensors import safe_open

        problems = [] if self.complete else ["the store is not complete"]
        for file in tqdm(self.files, desc="verify", unit="file", disable=not progress):
            if self.manifest and provenance.file_sha256(file) != self.manifest["files"][file.name]:
                problems.append(f"{file.name}: its SHA-256 is not the one of the manifest")
                continue
            total = [0] * len(self.infos)
            for entry in read_index(file)["utterances"]:
                total = [a + b for a, b in zip(total, entry["frames"], strict=True)]
            if not any(total):
                continue
            with safe_open(str(file), "pt") as handle:
                for info, rows in zip(self.infos, total, strict=True):
                    for layer, width in zip(info.layers, info.dims, strict=True):
                        tensor = handle.get_tensor(f"{info.name}/{layer}")
                        if tuple(tensor.shape) != (rows, width):
                            problems.append(f"{file.name}: {layer} is {tuple(tensor.shape)}, expected {(rows, width)}")
                        elif not bool(torch.isfinite(tensor).all()):
                            problems.append(f"{file.name}: {info.name}/{layer} holds NaN or infinite values")
        if self.complete:
            extra = {p.name for p in self._files()} - set(self.manifest["files"])
            problems += [f"{name}: is not in the manifest" for name in sorted(extra)]
            if len(self.entries) != self.manifest["utterances"]:
                problems.append(f"{len(self.entries)} utterances, the manifest says {self.manifest['utterances']}")
            missing = self.header["recordings"] - len(self.entries) - len(self.skipped)
            if missing:
                problems.append(f"{missing} of {self.header['recordings']} recordings are neither stored nor skipped")
        return problems

    def info(self) -> dict[str, object]:
        """Summary for people and scripts."""
        return {
            "path": str(self.path),
            "complete": self.complete,
            "utterances": len(self.entries),
            "hours": sum(e["seconds"] for e in self.entries.values()) / 3600,
            "skipped": self.skipped,
            "resampled": sum(bool(e["resampled"]) for e in self.entries.values()),
            "bytes": sum(p.stat().st_size for p in self.files),
            "options": self.options,
            "models": [
                {
                    "name": i.name,
                    "layers": list(i.layers),
                    "dims": list(i.dims),
                    "frame_shift_ms": i.clock.shift * 1000,
                    "first_center_ms": i.clock.first_center * 1000,
                    "frames": sum(e["frames"][m] for e in self.entries.values()),
                    "upstream": i.provenance.get("upstream"),
                    "weights_sha256": i.provenance.get("weights_sha256"),
                }
                for m, i in enumerate(self.infos)
            ],
            "provenance": self.header["provenance"],
        }


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
        for key in ("format", "options", "parts", "recordings"):
            if header[key] != first[key]:
                raise MergeError(f"{path}: {key} is {header[key]}, in {parts[0]} it is {first[key]}; expected the same")
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
                provenance.write_atomically(target, lambda t, s=source: _link(s, t))
        if not (out / "parts" / name).exists():
            provenance.write_atomically(out / "parts" / name, lambda t, s=manifest: shutil.copyfile(s, t))
    complete_if_done(out)
    return out


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
