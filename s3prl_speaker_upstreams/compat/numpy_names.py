"""numpy with the two old names that s3prl's upstreams still say: ``int`` and ``complex``, gone since numpy 1.24.

Stands for ``np`` in those modules only (see the list in ``standins.py``); numpy itself is left as it is, so that no
other code finds names in it that numpy does not have. Every other name is numpy's own, and unknown ones raise numpy's
error.

>>> from s3prl_speaker_upstreams.compat import numpy_names as np
>>> np.zeros(2, dtype=np.int)
array([0, 0])
"""

from __future__ import annotations

import builtins
from typing import Any

import numpy

int = builtins.int
complex = builtins.complex


def __getattr__(name: str) -> Any:
    return getattr(numpy, name)
