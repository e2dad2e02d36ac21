"""A CKA matrix with its intervals, its layers and everything that made it; as table, CSV, Parquet and JSON."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cka_addon import provenance
from cka_addon.errors import SpecError, StoreError, require
from cka_addon.models import ModelInfo
from cka_addon.uncertainty import LeftOut

logger = logging.getLogger(__name__)

FORMAT = "cka_addon result 1"


@dataclass
class Measure:
    """Another measure of the same pairs: the same matrices as CKA's. pwcca is not symmetric: its row layer leads."""

    values: np.ndarray
    lower: np.ndarray | None = None
    upper: np.ndarray | None = None
    baseline: np.ndarray | None = None
    left_out: LeftOut | None = None


@dataclass
class CKAResult:
    """CKA of all wanted pairs of layers.

    models : the models, in the order of the matrix;  values : (layers, layers) float64, NaN outside `mask`
    lower, upper : ends of the intervals, or None;  baseline : the same with permuted examples, or None
    left_out : the values without each unit, for intervals of differences (`compare`), or None
    hsic : (layers, layers);  details : estimator, options, order, alignment, counts, provenance
    """

    models: list[ModelInfo]
    values: np.ndarray
    mask: np.ndarray
    lower: np.ndarray | None
    upper: np.ndarray | None
    baseline: np.ndarray | None
    hsic: np.ndarray
    details: dict
    left_out: LeftOut | None = None
    measures: dict[str, Measure] = field(default_factory=dict)

    def of(self, measure: str) -> CKAResult:
        """The result with another measure in place of CKA, for plots and comparisons. Raises SpecError for others."""
        if measure == self.measure:
            return self
        if measure not in self.measures:
            known = ", ".join([self.measure, *self.measures])
            raise SpecError(f"got measure '{measure}'; the result has {known}: compute with --measures")
        one = self.measures[measure]
        details = {**self.details, "measure": measure}
        values = np.where(self.mask, one.values, np.nan)
        return CKAResult(
            self.models, values, self.mask, one.lower, one.upper, one.baseline, self.hsic, details, one.left_out
        )

    @property
    def measure(self) -> str:
        """Name of what `values` holds."""
        return str(self.details.get("measure", "cka"))

    @property
    def names(self) -> list[str]:
        """Names of the models."""
        return [m.name for m in self.models]

    @property
    def labels(self) -> list[tuple[str, str]]:
        """(model, layer) of every row of the matrix."""
        return [(m.name, layer) for m in self.models for layer in m.layers]

    def rows(self, model: str) -> slice:
        """Rows of one model. Raises SpecError naming the models there are."""
        start = 0
        for m in self.models:
            if m.name == model:
                return slice(start, start + len(m.layers))
            start += len(m.layers)
        raise SpecError(f"got model '{model}'; expected one of {', '.join(self.names)}")

    def layers(self, model: str) -> tuple[str, ...]:
        """Layer names of one model."""
        self.rows(model)
        return next(m.layers for m in self.models if m.name == model)

    def find(self, layer: str) -> int:
        """Row of "model/layer"; the layer may be a position. Raises SpecError naming the choices."""
        model, _, name = layer.rpartition("/")
        if not model and len(self.models) == 1:
            model = self.names[0]
        rows, layers = self.rows(model), self.layers(model)
        if name in layers:
            return rows.start + layers.index(name)
        if name.lstrip("-").isdigit() and -len(layers) <= int(name) < len(layers):
            return rows.start + int(name) % len(layers)
        raise SpecError(f"got layer '{layer}'; expected {model}/ and one of {', '.join(layers)} or a position")

    def between(self, a: str, b: str | None = None, what: str = "values") -> np.ndarray:
        """Part of the matrix: (layers of a, layers of b). what : "values", "lower", "upper", "baseline" or "hsic".

        Raises SpecError where that pair of models was not computed.
        """
        b = a if b is None else b
        rows, columns = self.rows(a), self.rows(b)
        if not self.mask[rows, columns].all():
            raise SpecError(
                f"{a} against {b} was not computed (pairs={self.details['options']['pairs']}); compute with --pairs all"
            )
        whole = getattr(self, what)
        if whole is None:
            raise SpecError(f"the result has no {what}; compute with intervals or permutations")
        return whole[rows, columns]

    def to_frame(self):
        """pandas table, one row per wanted pair of layers (each pair once, row layer not after column layer)."""
        import pandas

        labels = self.labels
        positions = [i for m in self.models for i in range(len(m.layers))]
        counts, options = self.details["counts"], self.details["options"]
        first = self.details["made_by"][0] if self.details["made_by"] else {}
        rows = []
        for i in range(len(labels)):
            for j in range(i, len(labels)):
                if not self.mask[i, j]:
                    continue
                row = {
                    "model_a": labels[i][0],
                    "layer_a": labels[i][1],
                    "index_a": positions[i],
                    "model_b": labels[j][0],
                    "layer_b": labels[j][1],
                    "index_b": positions[j],
                    "cka": self.values[i, j],
                }
                if self.lower is not None and self.upper is not None:
                    row |= {"lower": self.lower[i, j], "upper": self.upper[i, j]}
                if self.baseline is not None:
                    row["permuted"] = self.baseline[i, j]
                row["hsic"] = self.hsic[i, j]
                for name, one in self.measures.items():
                    row[name] = one.values[i, j]
                    if name == "pwcca":
                        row["pwcca_of_b"] = one.values[j, i]
                    if name == "procrustes":
                        row["shape_distance"] = float(np.arccos(np.clip(one.values[i, j], -1, 1)))
                    if one.lower is not None and one.upper is not None:
                        row |= {f"{name}_lower": one.lower[i, j], f"{name}_upper": one.upper[i, j]}
                    if one.baseline is not None:
                        row[f"{name}_permuted"] = one.baseline[i, j]
                rows.append(row)
        table = pandas.DataFrame(rows)
        table["estimator"] = self.details["estimator"]
        table["mode"] = options["mode"]
        table["examples_are"] = options["examples"]
        table["examples"], table["utterances"] = counts["examples"], counts["utterances"]
        table["batch_size"] = options["batch_size"] if options["mode"] == "minibatch" else None
        table["interval"] = self.details["interval"]
        table["seed"] = options["seed"]
        table["git_revision"] = first.get("git_revision")
        return table

    def to_csv(self, path: str | Path) -> Path:
        """Write the table and, beside it, PATH.provenance.json with everything that made it."""
        table = self.to_frame()
        self._sidecar(path)
        return provenance.write_atomically(path, lambda temporary: table.to_csv(temporary, index=False))

    def to_parquet(self, path: str | Path) -> Path:
        """Write the table as Parquet with the provenance in the file's own metadata (key "cka_addon") as well."""
        arrow = require("pyarrow", "pip install pyarrow", "writing Parquet")
        parquet = require("pyarrow.parquet", "pip install pyarrow", "writing Parquet")
        table = arrow.Table.from_pandas(self.to_frame(), preserve_index=False)
        metadata = {**(table.schema.metadata or {}), b"cka_addon": json.dumps(self.details, default=str).encode()}
        table = table.replace_schema_metadata(metadata)
        self._sidecar(path)
        return provenance.write_atomically(path, lambda temporary: parquet.write_table(table, temporary))

    def _sidecar(self, path: str | Path) -> None:
        provenance.write_json(Path(path).with_suffix(".provenance.json"), self.details)

    def save(self, path: str | Path) -> Path:
        """Write the whole result as JSON, and the values without each unit beside it (PATH.units.npz).

        `load` reads both back exactly.
        """

        def plain(x: np.ndarray | None) -> list | None:
            return None if x is None else [[None if np.isnan(v) else float(v) for v in row] for row in x]

        self._save_units(Path(path))
        data = {
            "format": FORMAT,
            "models": [m.to_dict() for m in self.models],
            "values": plain(self.values),
            "lower": plain(self.lower),
            "upper": plain(self.upper),
            "permuted": plain(self.baseline),
            "hsic": plain(self.hsic),
            "measures": {
                name: {what: plain(getattr(one, what)) for what in ("values", "lower", "upper", "baseline")}
                for name, one in self.measures.items()
            },
            "details": self.details,
        }
        return provenance.write_json(path, data)

    def _save_units(self, path: Path) -> None:
        beside = path.with_suffix(".units.npz")
        if self.left_out is None:
            beside.unlink(missing_ok=True)
            self.details.pop("units_sha256", None)
            return
        units, upper = self.left_out, np.triu_indices(len(self.values))
        values = units.values[:, upper[0], upper[1]].astype(np.float32)
        about = np.array([units.kind, str(units.total)])
        noise = np.broadcast_to(units.noise, self.values.shape)[upper].astype(np.float32)

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, units=np.array(units.units), values=values, about=about, noise=noise)

        provenance.write_atomically(beside, write)
        self.details["units_sha256"] = provenance.file_sha256(beside)

    @classmethod
    def load(cls, path: str | Path) -> CKAResult:
        """Read what `save` wrote. Raises StoreError where the file is something else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{path}: cannot be read as JSON ({error}); expected a result of 'cka-addon compute'"
            ) from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise StoreError(f"{path}: is not a result of 'cka-addon compute' (format '{FORMAT}')")

        def array(x: list | None) -> np.ndarray | None:
            return (
                None
                if x is None
                else np.array([[np.nan if v is None else v for v in row] for row in x], dtype=np.float64)
            )

        def needed(x: list | None, name: str) -> np.ndarray:
            found = array(x)
            if found is None:
                raise StoreError(f"{path}: holds no {name}; it is damaged, compute it again")
            return found

        values = needed(data["values"], "values")
        return cls(
            [ModelInfo.from_dict(m) for m in data["models"]],
            values,
            ~np.isnan(values),
            array(data["lower"]),
            array(data["upper"]),
            array(data["permuted"]),
            needed(data["hsic"], "hsic"),
            data["details"],
            _load_units(Path(path), data["details"].get("units_sha256"), len(values)),
            {
                name: Measure(
                    needed(one["values"], name), array(one["lower"]), array(one["upper"]), array(one["baseline"])
                )
                for name, one in data.get("measures", {}).items()
            },
        )

    def __repr__(self) -> str:
        counts = self.details["counts"]
        models = ", ".join(f"{m.name} ({len(m.layers)} layers)" for m in self.models)
        return (
            f"CKAResult({models}; {self.details['options']['mode']}, {self.details['estimator'].split(' (')[0]}, "
            f"{counts['examples']} {self.details['options']['examples']} of {counts['utterances']} utterances)"
        )


def _load_units(path: Path, digest: str | None, layers: int) -> LeftOut | None:
    """The values without each unit, where the file beside the result is the one that was written with it."""
    beside = path.with_suffix(".units.npz")
    if digest is None or not beside.is_file():
        return None
    if provenance.file_sha256(beside) != digest:
        logger.warning("%s: belongs to another result and is not used", beside)
        return None
    with np.load(beside, allow_pickle=False) as file:
        values = np.zeros((len(file["units"]), layers, layers))
        upper = np.triu_indices(layers)
        values[:, upper[0], upper[1]] = values[:, upper[1], upper[0]] = file["values"]
        noise = np.zeros((layers, layers))
        noise[upper] = noise[upper[1], upper[0]] = file["noise"]
        return LeftOut(file["units"].tolist(), values, int(file["about"][1]), str(file["about"][0]), noise)
