"""``pandas.Series.iteritems``, gone since pandas 2.0, for the one function of s3prl that says it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["lacks_iteritems", "supply_datapoints"]


def lacks_iteritems(module: ModuleType) -> bool:
    """Whether pandas is of a version without the name."""
    return not hasattr(module.pd.Series, "iteritems")


def datapoints(df: Any, unique_name_fn: Callable[[dict[str, Any]], str]) -> dict[str, dict[str, Any]]:
    """Each row of a table as a dictionary, by the name that ``unique_name_fn`` gives it.

    >>> import pandas
    >>> datapoints(pandas.DataFrame({"id": ["a", "b"], "n": [1, 2]}), lambda row: row["id"])["b"]["n"]
    2
    """
    rows = [dict(row.items()) for _, row in df.iterrows()]
    found = {unique_name_fn(row): row for row in rows}
    if len(found) != len(rows):
        raise AssertionError(f"{len(found)} different names for {len(rows)} rows")
    return found


def supply_datapoints(module: ModuleType) -> None:
    """s3prl/dataio/corpus/base.py: ``Corpus.dataframe_to_datapoints``."""
    module.Corpus.dataframe_to_datapoints = staticmethod(datapoints)
