"""Puts the entries of :mod:`s3prl_speaker_upstreams.hubconf` into ``s3prl.hub``, never over an entry of s3prl's own."""

from __future__ import annotations

import logging
from types import ModuleType

from s3prl_speaker_upstreams.hubconf import ENTRY_MARK, entries

__all__ = ["register_into", "registered"]

logger = logging.getLogger(__name__)


def register_into(hub: ModuleType) -> list[str]:
    """Add every entry to ``hub``, unless ``hub`` has something else of that name already.

    Parameters
    ----------
    hub : module
        ``s3prl.hub``; its ``options()`` reads the module's globals, so setting attributes is all it takes.

    Returns
    -------
    list of str
        The names that are ours in ``hub`` now. Names that were taken are left alone and logged as a warning.

    >>> from types import ModuleType
    >>> hub = ModuleType("hub")
    >>> hub.ecapa_dino = "someone else's"
    >>> names = register_into(hub)
    >>> "ecapa_tdnn" in names, "ecapa_dino" in names, hub.ecapa_dino
    (True, False, "someone else's")
    """
    for name, entry in entries().items():
        present = getattr(hub, name, None)
        if present is None:
            setattr(hub, name, entry)
        elif not hasattr(present, ENTRY_MARK):
            logger.warning(
                "%s already has an entry %r that is not ours; it is left as it is. Use the entries of "
                "s3prl_speaker_upstreams.hubconf directly, or remove the other one.",
                hub.__name__,
                name,
            )
    return registered(hub)


def registered(hub: ModuleType) -> list[str]:
    """Names of our entries that ``hub`` has."""
    return sorted(name for name, value in vars(hub).items() if hasattr(value, ENTRY_MARK))
