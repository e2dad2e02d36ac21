"""What probes found: per property and layer a number with its interval and controls; tables, JSON, verdicts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cka_addon import provenance
from cka_addon.errors import SpecError, StoreError, require

if TYPE_CHECKING:
    import pandas

FORMAT = "cka_addon probe 1"
METRICS = {"class": "accuracy", "number": "R2"}


@dataclass
class ProbeResult:
    """Answers of all layers to all properties.

    properties : one dict each: name, unit, kind, metric, classes, examples, groups, by, chance (with its interval),
        rows (one per probe, model and layer), differences, verdicts, vectors, warnings, counts
    details : models, options, provenance
    """

    properties: list[dict]
    details: dict

    @property
    def names(self) -> list[str]:
        """Names of the properties."""
        return [p["name"] for p in self.properties]

    def find(self, name: str) -> dict:
        """One property. Raises SpecError naming the ones there are."""
        for p in self.properties:
            if p["name"] == name:
                return p
        raise SpecError(f"got property '{name}'; expected one of {', '.join(self.names)}")

    def curve(self, name: str, model: str, probe: str = "linear") -> list[dict]:
        """Rows of one model in the order of its layers."""
        return [r for r in self.find(name)["rows"] if r["model"] == model and r["probe"] == probe]

    def models(self, role: str = "model") -> list[str]:
        """Names of the models of a role: "model", "untrained" or "control"."""
        return [m["name"] for m in self.details["models"] if m["role"] == role]

    def to_frame(self) -> pandas.DataFrame:
        """pandas table, one row per property, probe, model and layer."""
        import pandas

        rows = []
        first = self.details.get("made_by", {})
        for p in self.properties:
            shared = {"property": p["name"], "unit": p["unit"], "kind": p["kind"], "metric": p["metric"]}
            tail = {
                "chance": p["chance"]["value"],
                "examples": p["examples"],
                "groups": p["groups"],
                "grouped_by": p["by"],
                "folds": self.details["settings"]["folds"],
                "seed": self.details["settings"]["seed"],
                "git_revision": first.get("git_revision"),
            }
            for r in p["rows"]:
                rows.append({**shared, **{k: v for k, v in r.items() if not isinstance(v, (list, dict))}, **tail})
        return pandas.DataFrame(rows)

    def differences_frame(self) -> pandas.DataFrame:
        """pandas table of all paired differences with intervals and corrected p-values."""
        import pandas

        columns = ["property", "probe", "family", "a", "b", "difference", "lower", "upper", "p", "significant"]
        rows = [{"property": p["name"], **d} for p in self.properties for d in p["differences"]]
        return pandas.DataFrame(rows, columns=columns)

    def to_csv(self, path: str | Path) -> Path:
        """Write the table and, beside it, PATH.provenance.json with everything that made it."""
        table = self.to_frame()
        provenance.write_json(Path(path).with_suffix(".provenance.json"), self.details)
        return provenance.write_atomically(path, lambda temporary: table.to_csv(temporary, index=False))

    def to_parquet(self, path: str | Path) -> Path:
        """Write the table as Parquet with the provenance in the file's own metadata (key "cka_addon")."""
        arrow = require("pyarrow", "pip install pyarrow", "writing Parquet")
        parquet = require("pyarrow.parquet", "pip install pyarrow", "writing Parquet")
        table = arrow.Table.from_pandas(self.to_frame(), preserve_index=False)
        metadata = {**(table.schema.metadata or {}), b"cka_addon": json.dumps(self.details, default=str).encode()}
        table = table.replace_schema_metadata(metadata)
        return provenance.write_atomically(path, lambda temporary: parquet.write_table(table, temporary))

    def save(self, path: str | Path) -> Path:
        """Write the whole result as JSON (`load` reads it back exactly)."""
        return provenance.write_json(path, {"format": FORMAT, "properties": self.properties, "details": self.details})

    @classmethod
    def load(cls, path: str | Path) -> ProbeResult:
        """Read what `save` wrote. Raises StoreError where the file is something else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{path}: cannot be read as JSON ({error}); expected a result of 'cka-addon probe'"
            ) from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise StoreError(f"{path}: is not a result of 'cka-addon probe' (format '{FORMAT}')")
        return cls(data["properties"], data["details"])

    def summary(self) -> str:
        """The answers in words and numbers, controls first; for a terminal."""
        return "\n\n".join(_property_text(p) for p in self.properties)

    def __repr__(self) -> str:
        parts = ", ".join(f"{p['name']} ({p['metric']}, {p['examples']} {p['unit']}s)" for p in self.properties)
        return f"ProbeResult({parts}; {', '.join(self.models())})"


def percent(value: float | None, metric: str) -> str:
    """12.3 for accuracies (percent), 0.123 for R2."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if metric == "accuracy" else f"{value:.3f}"


def _ends(row: dict, metric: str) -> str:
    if row.get("lower") is None:
        return ""
    return f"[{percent(row['lower'], metric)}, {percent(row['upper'], metric)}]"


def _property_text(p: dict) -> str:
    metric = p["metric"]
    what = f"{len(p['classes'])} classes" if p["kind"] == "class" else "number"
    lines = [
        f"{p['name']}: {p['examples']} {p['unit']}s, {what}, {p['groups']} groups ({p['by']}), {metric}"
        + (" in %" if metric == "accuracy" else "")
    ]
    chance = "majority class" if p["kind"] == "class" else "mean"
    header = f"  {'probe':6} {'model / layer':34} {metric:>9}  {'interval':17}"
    header += f" {'macro-F1':>8}" if p["kind"] == "class" else ""
    lines.append(header + f" {'control':>8} {'selectivity':>11}  verdict")
    lines.append(f"  {'':6} {chance:34} {percent(p['chance']['value'], metric):>9}  {_ends(p['chance'], metric):17}")
    for r in p["rows"]:
        f1 = f" {percent(r.get('macro_f1'), metric):>8}" if p["kind"] == "class" else ""
        lines.append(
            f"  {r['probe']:6} {r['model'] + ' / ' + r['layer']:34} {percent(r['value'], metric):>9}  "
            f"{_ends(r, metric):17}{f1} {percent(r.get('control'), metric):>8} "
            f"{percent(r.get('selectivity'), metric):>11}  {r.get('verdict') or ''}".rstrip()
        )
    for v in p["vectors"]:
        lines.append(
            f"  against {v['vectors']}: {v['model']} / {v['layer']} {v['cka']:.3f} "
            f"[{v['lower']:.3f}, {v['upper']:.3f}] ({v['types']} {v['of']}, permuted {v['permuted']:.3f})"
        )
    lines += [f"  note: {w}" for w in p["warnings"]]
    lines += [f"  note: {n} {what}" for what, n in p["counts"].items()]
    return "\n".join(lines)
