"""Tables of results: as text, and as csv and json with what made them.

>>> rows = [{"name": "net", "test": "clean", "scoring": "cosine", "eer": 0.1, "min_dcf_0.01": 0.9, "trials": 10}]
>>> print(table(rows))
name  test   scoring  EER %  minDCF 0.01  trials
net   clean  cosine   10.00        0.900      10
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from s3prl_speaker_upstreams.common.files import write_json, write_text
from s3prl_speaker_upstreams.common.provenance import collect

__all__ = ["table", "write_rows"]

_COLUMNS = {
    "name": ("name", "{}"),
    "test": ("test", "{}"),
    "scoring": ("scoring", "{}"),
    "seed": ("seed", "{}"),
    "eer": ("EER %", "{:.2f}"),
    "eer_low": ("low", "{:.2f}"),
    "eer_high": ("high", "{:.2f}"),
    "min_dcf_0.01": ("minDCF 0.01", "{:.3f}"),
    "min_dcf_0.05": ("minDCF 0.05", "{:.3f}"),
    "effective_dimension": ("eff. dim.", "{:.1f}"),
    "trials": ("trials", "{}"),
}


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows of :func:`evaluate_digits` as text, error rates in per cent; columns that no row has are left out."""
    rows = list(rows)
    keys = [key for key in _COLUMNS if any(key in row for row in rows)]
    cells = [[_COLUMNS[key][0] for key in keys]]
    for row in rows:
        values = [row.get(key) for key in keys]
        percent = [100 * v if k.startswith("eer") and v is not None else v for k, v in zip(keys, values, strict=True)]
        cells.append(["" if v is None else _COLUMNS[k][1].format(v) for k, v in zip(keys, percent, strict=True)])
    width = [max(len(line[column]) for line in cells) for column in range(len(keys))]
    left = [isinstance(next((row[key] for row in rows if key in row), ""), str) for key in keys]
    lines = []
    for line in cells:
        parts = [c.ljust(w) if flush else c.rjust(w) for c, w, flush in zip(line, width, left, strict=True)]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def write_rows(
    rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str], *, settings: Mapping[str, Any] | None = None
) -> list[Path]:
    """Write rows as ``path``.csv and, with the settings and versions that made them, as ``path``.json.

    >>> import tempfile
    >>> [path.suffix for path in write_rows([{"eer": 0.1}], Path(tempfile.mkdtemp()) / "result")]
    ['.csv', '.json']
    """
    rows = [dict(row) for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    base = Path(path)
    record = {"rows": rows, "settings": dict(settings or {}), **collect()}
    return [
        write_text(base.with_name(base.name + ".csv"), text.getvalue()),
        write_json(base.with_name(base.name + ".json"), record),
    ]
