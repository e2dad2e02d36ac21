"""numpy with the two old names that s3prl's upstreams still say: ``int`` and ``complex``, gone since numpy 1.24.

Stands for ``np`` in those modules only (see the list in ``standins.py``); numpy itself is left as it is, so that no other
code finds names in it that numpy does not have. Every other name is numpy's own, and unknown ones raise numpy's error.

>>> import numpy
>>> int is __builtins__["int"] if isinstance(__builtins__, dict) else True
True
"""

from __future__ import annotations

import builtins
from typing import Any

import numpy

int = builtins.int
complex = builtins.complex


def __getattr__(name: str) -> Any:
    return getattr(numpy, name)
