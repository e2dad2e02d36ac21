"""Layers against given vectors: do the means of words lie as in GloVe, those of phones as in a table of features?

The measure is unbiased linear CKA between the means of the features over each value (types x width) and its vectors
(types x dimensions), or, for one-hot vectors, between single examples and their labels. It is the counterpart of
CCA-word and CCA-GloVe in the field, without CCA's need for many more types than dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cka_addon.hsic import linear_cka
from cka_addon.probe.errors import LabelError

if TYPE_CHECKING:
    from cka_addon.probe.solve import Question

ONE_HOT = "one-hot"
MIN_TYPES = 10
SAMPLE = 2000  # examples against one-hot vectors


@dataclass(frozen=True)
class Source:
    """Where vectors come from: "one-hot", a GloVe text file or an npz."""

    path: str


def parse(text: str, names: list[str]) -> tuple[str, Source]:
    """`PROPERTY=glove.txt`, `PROPERTY=file.npz` or `PROPERTY=one-hot`.

    >>> parse("word=one-hot", ["word"])
    ('word', Source(path='one-hot'))
    """
    name, equals, path = text.partition("=")
    if not equals or name not in names:
        raise LabelError(f"got --vectors '{text}'; expected PROPERTY=FILE with a property of {', '.join(names)}")
    if path != ONE_HOT and not Path(path).expanduser().is_file():
        raise LabelError(f"got --vectors '{text}': {path} does not exist; expected a text file, an .npz or 'one-hot'")
    return name, Source(path)


def read_vectors(path: str | Path, wanted: set[str]) -> dict[str, np.ndarray]:
    """Vectors of the wanted names, which are compared without case.

    A GloVe or word2vec text file (name and numbers on a line), or an npz: arrays by name, or `names` and `vectors`.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "v.txt"
    >>> _ = file.write_text("cat 1 0\\ndog 0 1\\n")
    >>> read_vectors(file, {"CAT"})["CAT"].tolist()
    [1.0, 0.0]
    """
    path = Path(path).expanduser()
    keys = {w.lower(): w for w in sorted(wanted, reverse=True)}
    found: dict[str, np.ndarray] = {}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as data:
            if set(data.files) >= {"names", "vectors"}:
                rows = np.asarray(data["vectors"], np.float64)
                pairs = list(zip(data["names"].astype(str).tolist(), rows, strict=True))
            else:
                pairs = [(n, np.asarray(data[n], np.float64).reshape(-1)) for n in data.files]
            found = {keys[n.lower()]: v for n, v in pairs if n.lower() in keys}
    else:
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                name, _, rest = line.rstrip().partition(" ")
                if name.lower() not in keys:
                    continue
                try:
                    vector = np.array([float(v) for v in rest.split()])
                except ValueError as error:
                    raise LabelError(
                        f"{path}:{number}: got no numbers behind '{name}'; expected a GloVe text file"
                    ) from error
                found.setdefault(keys[name.lower()], vector)
    sizes = {len(v) for v in found.values()}
    if len(sizes) > 1:
        raise LabelError(f"{path}: vectors have {sorted(sizes)} numbers; expected one length for all")
    return found


def compare(question: Question, source: Source, *, seed: int, confidence: float) -> list[dict]:
    """CKA with the vectors, for every layer: a delete-a-group jackknife over types gives the interval."""
    if question.number:
        raise LabelError(f"{question.prop.name}: is a number; expected classes to compare with vectors")
    rng = np.random.default_rng([seed, 9])
    names = question.classes
    one_hot = source.path == ONE_HOT
    if one_hot:
        order = np.sort(rng.permutation(len(question.y))[:SAMPLE])
        target = np.eye(len(names))[question.y[order]]
        units = question.group[order]
    else:
        table = read_vectors(source.path, set(names))
        chosen = [i for i, n in enumerate(names) if n in table]
        if len(chosen) < MIN_TYPES:
            raise LabelError(
                f"{question.prop.name}: {len(chosen)} of {len(names)} values are in {source.path}, e.g. {names[:3]}; "
                f"expected at least {MIN_TYPES}"
            )
        target = np.stack([table[names[i]] for i in chosen])
        units = np.arange(len(chosen))
    keep = torch.from_numpy(question.keep)
    lines = []
    for model, layer, width in question.gathered.columns:
        x = question.gathered.layer(model, layer)[keep]
        if one_hot:
            mine = x[torch.from_numpy(order)].double()
        else:
            total = torch.zeros(len(names), width, dtype=torch.float64)
            total.index_add_(0, torch.from_numpy(question.y), x.double())
            counts = np.bincount(question.y, minlength=len(names))
            mine = (total / torch.from_numpy(np.maximum(counts, 1))[:, None])[chosen]
        lines.append(
            {
                "vectors": source.path if one_hot else Path(source.path).name,
                "model": model,
                "layer": layer,
                "types": len(target),
                "of": f"{question.prop.unit}s" if one_hot else f"values of {len(names)}",
                **_cka(mine, torch.from_numpy(target), units, rng, confidence),
            }
        )
    return lines


def _cka(x: torch.Tensor, y: torch.Tensor, units: np.ndarray, rng: np.random.Generator, confidence: float) -> dict:
    from scipy import stats

    value = float(linear_cka(x, y))
    permuted = float(linear_cka(x, y[torch.from_numpy(rng.permutation(len(y)))]))
    kinds = np.unique(units)
    parts = np.array_split(rng.permutation(kinds), min(20, len(kinds)))
    left = np.array(
        [float(linear_cka(x[k], y[k])) for part in parts for k in [torch.from_numpy(~np.isin(units, part))]]
    )
    count = len(parts)
    half = float(
        stats.t.ppf(0.5 + confidence / 2, count - 1) * np.sqrt((count - 1) / count * ((left - left.mean()) ** 2).sum())
    )
    return {"cka": value, "lower": value - half, "upper": value + half, "permuted": permuted}
