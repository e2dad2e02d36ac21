"""Stock s3prl 0.4.18 on current packages: what they removed or the PyPI package lacks, supplied only when missing.

:func:`install` is called when ``s3prl`` is first imported. It only registers post-import hooks; every stand-in of
:data:`~s3prl_speaker_upstreams.compat.standins.STANDINS` is looked at when the module that it belongs to (torchaudio,
huggingface_hub, a module of s3prl) has been imported, and put in place if its own check says that the thing is missing.
Nothing of s3prl is edited on disk. ``S3PRL_SPEAKER_UPSTREAMS_COMPAT=0`` switches everything off.

>>> from s3prl_speaker_upstreams import compat
>>> compat.install()
>>> [standin.name for standin in compat.report()][0]
'torchaudio beside a later torch'
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

__all__ = ["SWITCH", "Status", "enabled", "install", "report"]

SWITCH = "S3PRL_SPEAKER_UPSTREAMS_COMPAT"

_installed = False
_state: dict[str, bool] = {}  # name of a stand-in -> whether it was put in place


@dataclass(frozen=True)
class Status:
    """What became of one stand-in: a line of the report.

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

    for standin in STANDINS:

        def put_in_place(module: Any, standin: Any = standin) -> None:
            needed = standin.missing(module)
            if needed:
                standin.supply(module)
            _state[standin.name] = _state.get(standin.name, False) or needed

        def for_one_import(standin: Any = standin) -> Any:
            _state[standin.name] = standin.missing(None)
            return standin.supply(None) if _state[standin.name] else None

        if standin.lent:
            lend(standin.modules, for_one_import)
        else:
            watch(standin.modules, put_in_place)


def report(*, probe: bool = False) -> list[Status]:
    """Every stand-in with whether it is in place in this process.

    probe : import each stand-in's module first, so that ``active`` is True or False wherever the module exists
            (slow: this imports torchaudio and much of s3prl; modules with missing packages stay None)
    """
    from s3prl_speaker_upstreams.compat.standins import STANDINS

    if probe:
        install()
        for name in dict.fromkeys(name for standin in STANDINS for name in standin.modules):
            _try_import(name)
    return [
        Status(
            standin.name,
            standin.removed_in,
            tuple(f"s3prl/{place}" for place in standin.used_by),
            standin.supplies,
            _state.get(standin.name),
        )
        for standin in STANDINS
    ]


def _try_import(name: str) -> None:
    import importlib
    import logging

    try:
        importlib.import_module(name)
    except (ImportError, OSError) as error:  # an optional package of that module is absent
        logging.getLogger(__name__).debug("cannot look at %s: %s", name, error)
