"""Arrays in memory up to a limit in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np

__all__ = ["ByteCache"]


class ByteCache:
    """Arrays by key, the least recently used dropped once they exceed ``max_bytes``.

    >>> cache = ByteCache(100)
    >>> cache.put("a", np.zeros(20, dtype=np.float32)); cache.put("b", np.zeros(10, dtype=np.float32))
    >>> cache.get("a") is None, cache.get("b").shape
    (True, (10,))
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = int(max_bytes)
        self.bytes = 0
        self._items: OrderedDict[Hashable, np.ndarray] = OrderedDict()

    def get(self, key: Hashable) -> np.ndarray | None:
        """The array of ``key``, or None."""
        item = self._items.get(key)
        if item is not None:
            self._items.move_to_end(key)
        return item

    def put(self, key: Hashable, item: np.ndarray) -> None:
        """Keep ``item``; one larger than the whole cache is not kept."""
        if item.nbytes > self.max_bytes:
            return
        old = self._items.pop(key, None)
        self.bytes += item.nbytes - (0 if old is None else old.nbytes)
        self._items[key] = item
        while self.bytes > self.max_bytes:
            _, dropped = self._items.popitem(last=False)
            self.bytes -= dropped.nbytes

    def __len__(self) -> int:
        return len(self._items)
