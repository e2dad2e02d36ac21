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
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cka_addon import provenance
from cka_addon.errors import StoreError
from cka_addon.models import ModelInfo
from cka_addon.utterances import Utterance

FORMAT = 1
DTYPES = {"float16": torch.float16, "float32": torch.float32}


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
        self.manifest: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8")) if self.complete else {}
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
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def _files(self) -> list[Path]:
        return sorted((self.path / "data").glob("part-*.safetensors"))

    def __len__(self) -> int:
        return len(self.ids)

    def seconds(self, utterance: str) -> float:
        """Length of an utterance in seconds."""
        return float(self.entries[utterance]["seconds"])

    def differs(self, other: FeatureStore, utterance: str) -> str | None:
        """How the recording of an utterance differs from the one in another store; None where it is the same.

        By the digest of the samples, or by the length where one of the stores is of a version that kept none.
        """
        mine, theirs = self.entries[utterance], other.entries[utterance]
        if abs(mine["seconds"] - theirs["seconds"]) > 1e-3:
            return f"{mine['seconds']:.3f} s and {theirs['seconds']:.3f} s long"
        one, two = mine.get("samples_sha256"), theirs.get("samples_sha256")
        return f"other samples ({one} and {two})" if one and two and one != two else None

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
        clocks = [info.clock for info in self.infos]
        power = np.array(entry["frame_power"]) if "frame_power" in entry else None
        return Utterance(utterance, layers, float(entry["seconds"]), [instants] * len(layers), clocks, power=power)

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

    def info(self) -> dict[str, Any]:
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
