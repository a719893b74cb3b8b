"""Packed adapters in host memory, within a budget: between the arena and the files. Pure bookkeeping."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

from torch import Tensor

K = TypeVar("K")


class HostTier(Generic[K]):
    """The most recently used packed weights, by version. Engine thread only.

    Args:
        num_bytes: most bytes of all of them; 0 keeps none.
    """

    def __init__(self, num_bytes: int) -> None:
        self.total_bytes = num_bytes
        self.used_bytes = 0
        self._packed: OrderedDict[K, Tensor] = OrderedDict()

    def put(self, key: K, flat: Tensor) -> None:
        """Keep these weights, in place of those used longest ago; nothing happens where they do not fit at all."""
        self.drop(key)
        if flat.nbytes > self.total_bytes:
            return
        while self.used_bytes + flat.nbytes > self.total_bytes:
            self.used_bytes -= self._packed.popitem(last=False)[1].nbytes
        self._packed[key] = flat
        self.used_bytes += flat.nbytes

    def get(self, key: K) -> Tensor | None:
        """The weights, if they are here; this counts as a use."""
        flat = self._packed.get(key)
        if flat is not None:
            self._packed.move_to_end(key)
        return flat

    def drop(self, key: K) -> None:
        """Forget them, if they are here."""
        flat = self._packed.pop(key, None)
        self.used_bytes -= 0 if flat is None else flat.nbytes

    def __contains__(self, key: object) -> bool:
        return key in self._packed

    def __len__(self) -> int:
        return len(self._packed)
