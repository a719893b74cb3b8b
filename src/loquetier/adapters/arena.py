"""The arena: one flat buffer that holds the weights of every resident adapter version.

A slot is one contiguous run: the first part of every adapted module, then the second part of every one, and so on, as
its method lists them. LoRA's is A of every module, then B transposed of every module, each ``[rank, dim]``. What a
method derives from its weights (DoRA's norms) follows them. So load, evict, publish and checkpoint are one copy, any
mix of methods, ranks and target sets lives side by side without padding, and an optimizer sees one flat tensor. The
budget is bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loquetier.adapters.methods import slot_method
from loquetier.adapters.methods.method import BaseWeight, Method
from loquetier.adapters.spec import ModulePlan
from loquetier.errors import IntegrityError, OutOfAdapterMemoryError
from loquetier.kernels.huge_pages import on_huge_pages

ALIGN = 64
"""Slots start at multiples of this many elements: cache lines, and 16-byte vector loads in any dtype."""
MAX_SPARE_VIEWS = 8
"""Sets of views of freed runs that are kept for the next slot of the same layout at the same place."""


def num_elements(modules: Iterable[ModulePlan]) -> int:
    """Learned weights of one slot for these modules."""
    modules = tuple(modules)
    method = slot_method(modules)
    return sum(math.prod(part.shape) for m in modules for part in method.parts(m))


def slot_elements(modules: Iterable[ModulePlan]) -> int:
    """Elements that a slot takes in the arena, what its method derives and padding included."""
    modules = tuple(modules)
    return -(-(num_elements(modules) + num_derived(modules)) // ALIGN) * ALIGN


def num_derived(modules: Iterable[ModulePlan]) -> int:
    """Elements of a slot that its method derives from the learned ones."""
    modules = tuple(modules)
    method = slot_method(modules)
    return sum(method.num_derived(m) for m in modules)


def num_a_elements(modules: Iterable[ModulePlan]) -> int:
    """Elements of a slot before its first fast part (LoRA: A); all of them for a method without fast parts."""
    modules = tuple(modules)
    method = slot_method(modules)
    return sum(math.prod(part.shape) for m in modules for part in method.parts(m) if not part.fast)


def part_views(flat: Tensor, modules: Iterable[ModulePlan]) -> dict[int, tuple[Tensor, ...]]:
    """Cut a flat buffer of `num_elements` into each module's parts. Views: writing one writes the other."""
    modules = tuple(modules)
    method = slot_method(modules)
    parts = [method.parts(m) for m in modules]
    views: dict[int, list[Tensor]] = {m.target.index: [] for m in modules}
    at = 0
    for kind in range(max((len(p) for p in parts), default=0)):
        for m, own in zip(modules, parts, strict=True):
            size = math.prod(own[kind].shape)
            views[m.target.index].append(flat[at : at + size].view(own[kind].shape))
            at += size
    return {index: tuple(found) for index, found in views.items()}


def factor_views(flat: Tensor, modules: Iterable[ModulePlan], derived: Tensor | None = None) -> dict[int, Any]:
    """The same as the method's own kernels read it, by module index.

    Args:
        flat: learned weights, or their gradients.
        derived: what the method derives, flat; None for gradients.
    """
    modules = tuple(modules)
    method = slot_method(modules)
    parts = part_views(flat, modules)
    views: dict[int, Any] = {}
    at = 0
    for m in modules:
        size = method.num_derived(m)
        own = derived[at : at + size] if derived is not None and size else None
        views[m.target.index] = method.weights(m, parts[m.target.index], own)
        at += size
    return views


@dataclass(frozen=True, slots=True)
class Run:
    """Elements of the buffer, by place."""

    start: int
    size: int


class Arena:
    """Allocator and owner of all adapter weights of one dtype on one device. Used by the engine thread only.

    Args:
        base_weight: what some methods derive from; an arena without it holds no adapter of theirs.
    """

    def __init__(
        self,
        num_bytes: int,
        dtype: torch.dtype,
        device: torch.device | str,
        base_weight: BaseWeight | None = None,
    ) -> None:
        self.dtype = dtype
        self.base_weight: BaseWeight = base_weight or _no_base_weight
        self.itemsize = torch.empty((), dtype=dtype).element_size()
        # Uninitialised memory costs nothing on a CPU until a slot is written.
        size = num_bytes // self.itemsize // ALIGN * ALIGN
        self._buffer = on_huge_pages(torch.empty(size, dtype=dtype, device=device))
        self._free: list[Run] = [Run(0, self._buffer.numel())]
        self._runs: dict[int, Run] = {}
        self._modules: dict[int, tuple[ModulePlan, ...]] = {}
        self._next_slot = 0
        self._spare_views: dict[int, tuple[tuple[ModulePlan, ...], dict[int, Any]]] = {}
        """By start of a freed run. A job that publishes takes turns on two runs: making and dropping some hundred views
        each time took longer than copying the weights."""
        self.num_frees = 0
        """Slots given back so far: who waits for memory need not look again while it stays the same."""
        self._derives: set[int] = set()
        """Slots whose method derives something."""
        self.factors: dict[int, dict[int, Any]] = {}
        """slot -> module index -> views: what the method's kernels read."""
        self.methods: dict[int, Method] = {}
        """slot -> its method."""
        self.reclaim: Callable[[int], bool] = lambda size: False
        """Asked for room for so many elements when there is none; False when nothing can be given up."""
        self.claimed: Callable[[], Sequence[Run]] = lambda: ()
        """Places that somebody waits for: taken last."""

    @property
    def total_bytes(self) -> int:
        """The budget."""
        return self._buffer.numel() * self.itemsize

    @property
    def free_bytes(self) -> int:
        """Bytes not owned by a slot (not necessarily in one piece)."""
        return sum(r.size for r in self._free) * self.itemsize

    def allocate(self, modules: tuple[ModulePlan, ...], *, zeroed: bool = True, at: int | None = None) -> int:
        """Reserve a slot for these modules. Slot numbers are never reused.

        Args:
            zeroed: False when the caller overwrites all of it at once (publish).
            at: the element where it must begin, inside a free run; None = wherever there is room.

        Raises:
            OutOfAdapterMemoryError: no free run is long enough; nothing changed.
        """
        method, derived, size = slot_method(modules), num_derived(modules), slot_elements(modules)
        run = self._find(size) if at is None else self._free_at(at, size)
        while run is None and at is None and self.reclaim(size):
            run = self._find(size)
        if run is None:
            largest = max((r.size for r in self._free), default=0) * self.itemsize
            raise OutOfAdapterMemoryError(
                f"adapter needs {size * self.itemsize} bytes; the arena has {self.free_bytes} of "
                f"{self.total_bytes} bytes free (largest piece {largest}). Unload an adapter or raise adapter_memory."
            )
        before = [] if at is None or at == run.start else [Run(run.start, at - run.start)]
        whole, run = run, run if at is None else Run(at, run.start + run.size - at)
        rest = [Run(run.start + size, run.size - size)] if run.size > size else []
        self._free = sorted([*(r for r in self._free if r is not whole), *before, *rest], key=lambda r: r.start)
        slot, self._next_slot = self._next_slot, self._next_slot + 1
        self._runs[slot], self._modules[slot] = Run(run.start, size), modules
        if zeroed:
            self._buffer[run.start : run.start + size].zero_()
        self.factors[slot] = self._views_at(slot, derived)
        self.methods[slot] = method
        if derived:
            self._derives.add(slot)
        return slot

    def _views_at(self, slot: int, num_derived: int) -> dict[int, Any]:
        modules = self._modules[slot]
        held, views = self._spare_views.pop(self._runs[slot].start, ((), {}))
        if held == modules:
            return views
        learned = num_elements(modules)
        return factor_views(self.flat(slot), modules, self._run(slot)[learned : learned + num_derived])

    def refresh(self, slot: int) -> None:
        """To be called after every change of a slot's weights: what its method derives follows them."""
        if slot in self._derives:
            for m in self._modules[slot]:
                self.methods[slot].derive(self.factors[slot][m.target.index], m, self.base_weight)

    def copy(self, source: int, to: int) -> None:
        """Make `to`, a slot of the same modules, equal to `source`, with what is derived."""
        assert self._modules[source] == self._modules[to]
        self._run(to).copy_(self._run(source))

    def _run(self, slot: int) -> Tensor:
        run = self._runs[slot]
        return self._buffer[run.start : run.start + run.size]

    def _find(self, size: int) -> Run | None:
        fitting = [r for r in self._free if r.size >= size]
        claimed = self.claimed() if fitting else ()
        unclaimed = (
            r for r in fitting if not any(c.start < r.start + size and r.start < c.start + c.size for c in claimed)
        )
        return next(unclaimed, fitting[0] if fitting else None)

    def _free_at(self, start: int, size: int) -> Run | None:
        return next((r for r in self._free if r.start <= start and start + size <= r.start + r.size), None)

    def bytes_for(self, modules: tuple[ModulePlan, ...]) -> int:
        """What a slot for these modules takes, padding included."""
        return slot_elements(modules) * self.itemsize

    @property
    def free_runs(self) -> tuple[Run, ...]:
        """What no slot has, in order of address."""
        return tuple(self._free)

    def run_of(self, slot: int) -> Run:
        """Where a slot lies."""
        return self._runs[slot]

    def has_room(self, modules: tuple[ModulePlan, ...]) -> bool:
        """Whether a slot for these modules can be had without taking anything from anybody."""
        size, claimed = slot_elements(modules), self.claimed()
        return any(
            r.size >= size and not any(c.start < r.start + r.size and r.start < c.start + c.size for c in claimed)
            for r in self._free
        )

    def free(self, slot: int) -> int:
        """Give a slot back, zeroed so that no later tenant can see it; returns the bytes freed."""
        run = self._runs.pop(slot)
        self._spare_views[run.start] = (self._modules.pop(slot), self.factors.pop(slot))
        while len(self._spare_views) > MAX_SPARE_VIEWS:
            del self._spare_views[next(iter(self._spare_views))]
        del self.methods[slot]
        self._derives.discard(slot)
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


def _no_base_weight(module: int) -> Tensor:
    raise IntegrityError(f"arena: module {module}'s weight is needed, and this arena has no base")


def _coalesce(runs: list[Run]) -> list[Run]:
    """Merge neighbouring free runs; sorted by start, so that allocation is first fit from the front."""
    merged: list[Run] = []
    for run in sorted(runs, key=lambda r: r.start):
        if merged and merged[-1].start + merged[-1].size == run.start:
            merged[-1] = Run(merged[-1].start, merged[-1].size + run.size)
        else:
            merged.append(run)
    return merged
