"""What an error says about a name that does not exist: the nearest one that does, or all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "nearest"]


def nearest(name: object, known: Iterable[object], n: int = 1) -> list[str]:
    """The ``n`` nearest of ``known``, best first, whatever their case; empty if nothing is near.

    >>> nearest("ecapa_dinos", ["fbank", "ecapa_dino"])
    ['ecapa_dino']
    """
    folded = {str(k).casefold(): str(k) for k in known}
    return [folded[k] for k in difflib.get_close_matches(str(name).casefold(), folded, n=n, cutoff=0.5)]


def did_you_mean(name: object, known: Iterable[object], *, prefix: str = "") -> str:
    """The end of a message about ``name``: the nearest of ``known``, else the list of them.

    >>> did_you_mean("momentun", ["lr", "momentum"])
    "did you mean 'momentum'?"
    >>> did_you_mean("x", ["lr", "momentum"], prefix="optim.")
    'expected one of: lr, momentum'
    """
    names = [str(k) for k in known]
    near = nearest(name, names)
    return f"did you mean '{prefix}{near[0]}'?" if near else f"expected one of: {', '.join(names)}"
