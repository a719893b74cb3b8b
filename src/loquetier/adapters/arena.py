"""The arena: one flat buffer that holds the factors of every resident adapter version.

A slot is one contiguous run: first A of every adapted module, then B transposed of every adapted module, each
``[rank, dim]``. So load, evict, publish and checkpoint are one copy, any mix of ranks and target sets lives side
by side without padding, and an optimizer sees one flat tensor. The budget is bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from loquetier.adapters.spec import ModulePlan
from loquetier.errors import IntegrityError, OutOfAdapterMemoryError
from loquetier.kernels.reference import Factors

ALIGN = 64
"""Slots start at multiples of this many elements: cache lines, and 16-byte vector loads in any dtype."""
MAX_SPARE_VIEWS = 8
"""Sets of views of freed runs that are kept for the next slot of the same layout at the same place."""


def num_elements(modules: Iterable[ModulePlan]) -> int:
    """Elements of one slot for these modules."""
    return sum(m.num_elements for m in modules)


def slot_elements(modules: Iterable[ModulePlan]) -> int:
    """Elements that a slot takes in the arena, padding included."""
    return -(-num_elements(modules) // ALIGN) * ALIGN


def num_a_elements(modules: Iterable[ModulePlan]) -> int:
    """Elements of the leading A part of a slot; the rest is B transposed."""
    return sum(m.rank * m.target.in_features for m in modules)


def factor_views(flat: Tensor, modules: Iterable[ModulePlan]) -> dict[int, Factors]:
    """Cut a flat buffer of `num_elements` into factors by module index. Views: writing one writes the other."""
    modules = tuple(modules)
    views: dict[int, Factors] = {}
    a_at, b_at = 0, num_a_elements(modules)
    for m in modules:
        a_size, b_size = m.rank * m.target.in_features, m.rank * m.target.out_features
        views[m.target.index] = Factors(
            flat[a_at : a_at + a_size].view(m.rank, m.target.in_features),
            flat[b_at : b_at + b_size].view(m.rank, m.target.out_features),
            m.scale,
        )
        a_at, b_at = a_at + a_size, b_at + b_size
    return views


@dataclass(frozen=True, slots=True)
class _Run:
    start: int
    size: int


class Arena:
    """Allocator and owner of all adapter weights of one dtype on one device. Used by the engine thread only."""

    def __init__(self, num_bytes: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.dtype = dtype
        self.itemsize = torch.empty((), dtype=dtype).element_size()
        # Uninitialised memory costs nothing on a CPU until a slot is written.
        self._buffer = torch.empty(num_bytes // self.itemsize // ALIGN * ALIGN, dtype=dtype, device=device)
        self._free: list[_Run] = [_Run(0, self._buffer.numel())]
        self._runs: dict[int, _Run] = {}
        self._modules: dict[int, tuple[ModulePlan, ...]] = {}
        self._next_slot = 0
        self._spare_views: dict[int, tuple[tuple[ModulePlan, ...], dict[int, Factors]]] = {}
        """By start of a freed run. A job that publishes takes turns on two runs: making and dropping some hundred views
        each time took longer than copying the weights."""
        self.factors: dict[int, dict[int, Factors]] = {}
        """slot -> module index -> views: what the kernels read."""
        self.num_frees = 0
        """Slots given back so far: who waits for memory need not look again while it stays the same."""
        self.reclaim: Callable[[], bool] = lambda: False
        """Asked for a slot less when memory runs out; False when nothing can be given up."""

    @property
    def total_bytes(self) -> int:
        """The budget."""
        return self._buffer.numel() * self.itemsize

    @property
    def free_bytes(self) -> int:
        """Bytes not owned by a slot (not necessarily in one piece)."""
        return sum(r.size for r in self._free) * self.itemsize

    def allocate(self, modules: tuple[ModulePlan, ...], *, zeroed: bool = True) -> int:
        """Reserve a slot for these modules. Slot numbers are never reused.

        Args:
            zeroed: False when the caller overwrites all of it at once (publish).

        Raises:
            OutOfAdapterMemoryError: no free run is long enough; nothing changed.
        """
        size = slot_elements(modules)
        run = self._find(size)
        while run is None and self.reclaim():
            run = self._find(size)
        if run is None:
            largest = max((r.size for r in self._free), default=0) * self.itemsize
            raise OutOfAdapterMemoryError(
                f"adapter needs {size * self.itemsize} bytes; the arena has {self.free_bytes} of "
                f"{self.total_bytes} bytes free (largest piece {largest}). Unload an adapter or raise adapter_memory."
            )
        rest = [_Run(run.start + size, run.size - size)] if run.size > size else []
        self._free = sorted([*(r for r in self._free if r is not run), *rest], key=lambda r: r.start)
        slot, self._next_slot = self._next_slot, self._next_slot + 1
        self._runs[slot], self._modules[slot] = _Run(run.start, size), modules
        if zeroed:
            self._buffer[run.start : run.start + size].zero_()
        self.factors[slot] = self._views_at(slot)
        return slot

    def _views_at(self, slot: int) -> dict[int, Factors]:
        modules = self._modules[slot]
        held, views = self._spare_views.pop(self._runs[slot].start, ((), {}))
        return views if held == modules else factor_views(self.flat(slot), modules)

    def _find(self, size: int) -> _Run | None:
        return next((r for r in self._free if r.size >= size), None)

    def free(self, slot: int) -> int:
        """Give a slot back, zeroed so that no later tenant can see it; returns the bytes freed."""
        run = self._runs.pop(slot)
        self._spare_views[run.start] = (self._modules.pop(slot), self.factors.pop(slot))
        while len(self._spare_views) > MAX_SPARE_VIEWS:
            del self._spare_views[next(iter(self._spare_views))]
        self._buffer[run.start : run.start + run.size].zero_()
        self._free = _coalesce([*self._free, run])
        self.num_frees += 1
        return run.size * self.itemsize

    def flat(self, slot: int) -> Tensor:
        """The slot's weights as one flat view ``[num_elements]``."""
        start = self._runs[slot].start
        return self._buffer[start : start + num_elements(self._modules[slot])]

    def modules(self, slot: int) -> tuple[ModulePlan, ...]:
        """What the slot holds."""
        return self._modules[slot]

    def slot_bytes(self, slot: int) -> int:
        """Bytes the slot takes, padding included."""
        return self._runs[slot].size * self.itemsize

    @property
    def slots(self) -> frozenset[int]:
        """Slots in use."""
        return frozenset(self._runs)

    def check_integrity(self) -> None:
        """Free and used runs tile the buffer exactly, and every slot has its views. Raises IntegrityError."""
        at = 0
        for run in sorted([*self._free, *self._runs.values()], key=lambda r: r.start):
            if run.start != at:
                raise IntegrityError(f"arena: run at {run.start}, expected {at}: hole or overlap")
            at += run.size
        if at != self._buffer.numel():
            raise IntegrityError(f"arena: runs cover {at} of {self._buffer.numel()} elements")
        if not (self._runs.keys() == self._modules.keys() == self.factors.keys()):
            raise IntegrityError("arena: slots, modules and views disagree")


def _coalesce(runs: list[_Run]) -> list[_Run]:
    """Merge neighbouring free runs; sorted by start, so that allocation is first fit from the front."""
    merged: list[_Run] = []
    for run in sorted(runs, key=lambda r: r.start):
        if merged and merged[-1].start + merged[-1].size == run.start:
            merged[-1] = _Run(merged[-1].start, merged[-1].size + run.size)
        else:
            merged.append(run)
    return merged
