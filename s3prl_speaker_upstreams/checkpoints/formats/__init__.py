"""The checkpoint formats, one project a module: whatever module stands in this folder is listed by its ``FORMATS``.

>>> sorted(BY_NAME)
['3dspeaker', 'native', 'rdino', 'sdpn', 'speechbrain', 'sslsv', 'taoruijie', 'wespeaker']
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

from ..format import Format

__all__ = ["BY_NAME"]


def _listed() -> dict[str, Format]:
    found: dict[str, Format] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        for format in importlib.import_module(f"{__name__}.{module}").FORMATS:
            found[format.name] = format
    return found


BY_NAME: Mapping[str, Format] = MappingProxyType(_listed())
