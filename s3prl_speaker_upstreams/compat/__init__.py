"""Stock s3prl 0.4.18 on current packages: what they removed or the PyPI package lacks, supplied only when missing.

:func:`install` is called when ``s3prl`` is first imported. It only registers post-import hooks; every stand-in of
:data:`~s3prl_speaker_upstreams.compat.standins.STANDINS` is looked at when the module that it belongs to (torchaudio,
huggingface_hub, a module of s3prl) has been imported, and put in place if its own check says that the thing is missing.
Nothing of s3prl is edited on disk. ``S3PRL_SPEAKER_UPSTREAMS_COMPAT=0`` switches everything off.

>>> from s3prl_speaker_upstreams import compat
>>> compat.install()
>>> [entry.name for entry in compat.report()][0]
'torchaudio.set_audio_backend'
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

__all__ = ["SWITCH", "Standin", "enabled", "install", "report"]

SWITCH = "S3PRL_SPEAKER_UPSTREAMS_COMPAT"

_installed = False
_state: dict[str, bool] = {}  # name of a stand-in -> whether it was put in place


@dataclass(frozen=True)
class Standin:
    """One line of the report.

    name : the removed or absent thing
    removed_in : the package version that no longer has it ("never on PyPI" for parts of s3prl)
    used_by : the places in s3prl 0.4.18 that call it, ``file:line``
    supplies : what the stand-in does
    active : True in place, False not needed here, None its module has not been imported yet
    """

    name: str
    removed_in: str
    used_by: tuple[str, ...]
    supplies: str
    active: bool | None


def enabled() -> bool:
    """False if the environment variable ``S3PRL_SPEAKER_UPSTREAMS_COMPAT`` is 0, off, no or false."""
    return os.environ.get(SWITCH, "1").strip().lower() not in ("0", "off", "no", "false")


def install() -> None:
    """Register the post-import hooks once; modules that are imported already are looked at now.

    Safe to call any number of times, and cheap: no package is imported.
    """
    global _installed
    if _installed or not enabled():
        return
    _installed = True
    from s3prl_speaker_upstreams.compat._hooks import lend, watch
    from s3prl_speaker_upstreams.compat.standins import STANDINS

    for entry in STANDINS:

        def put_in_place(module: Any, entry: Any = entry) -> None:
            needed = entry.missing(module)
            if needed:
                entry.supply(module)
            _state[entry.name] = _state.get(entry.name, False) or needed

        def for_one_import(entry: Any = entry) -> Any:
            _state[entry.name] = entry.missing(None)
            return entry.supply(None) if _state[entry.name] else None

        if entry.lent:
            lend(entry.modules, for_one_import)
        else:
            watch(entry.modules, put_in_place)


def report(*, probe: bool = False) -> list[Standin]:
    """Every stand-in with whether it is in place in this process.

    probe : import each stand-in's module first, so that ``active`` is True or False wherever the module exists
            (slow: this imports torchaudio and much of s3prl; modules with missing packages stay None)
    """
    from s3prl_speaker_upstreams.compat.standins import STANDINS

    if probe:
        install()
        for name in dict.fromkeys(name for entry in STANDINS for name in entry.modules):
            _try_import(name)
    return [
        Standin(
            entry.name,
            entry.removed_in,
            tuple(f"s3prl/{place}" for place in entry.used_by),
            entry.supplies,
            _state.get(entry.name),
        )
        for entry in STANDINS
    ]


def _try_import(name: str) -> None:
    import importlib
    import logging

    try:
        importlib.import_module(name)
    except (ImportError, OSError) as error:  # an optional package of that module is absent
        logging.getLogger(__name__).debug("cannot look at %s: %s", name, error)
