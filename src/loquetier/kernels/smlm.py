"""SMLM as the base's linears call it: Triton on a GPU, on a CPU C where that is fastest, else the reference.

Same result whichever runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loquetier.kernels import reference
from loquetier.kernels.native_smlm import NativeSmlm, Rows, backward_rows, forward_rows, usable_matrix
from loquetier.kernels.native_smlm_long import LONG_ON_TILES, NativeLongSmlm
from loquetier.kernels.reference import FactorTable, Segment
from loquetier.kernels.select import process_kernels
from loquetier.kernels.triton_layout import Layout, fits, fixed_layout, refill
from loquetier.kernels.triton_plan import SMALL_TILE
from loquetier.kernels.triton_tables import SlotTable

if TYPE_CHECKING:  # imports triton, which a CPU installation does not have
    from loquetier.kernels.triton_smlm import TritonSmlm


class SmlmPlan:
    """What one layout of segments needs of the arena, made when a module first asks, used by every later step.

    It belongs to one arena: a slot's weights do not move, and slot numbers are never used twice.
    """

    __slots__ = ("_tables", "fixed", "layouts", "rows", "stack")

    def __init__(self, tables: dict[torch.device, SlotTable] | None = None, fixed: Layout | None = None) -> None:
        self.fixed = fixed
        """Triton: the one layout that every call uses, whatever its segments (see `SmlmPlans.fixed`)."""
        self.rows: dict[int, Rows | None] = {}
        """C: pointers by module."""
        self.stack: object | None = None
        """C: what the decoder stack as one call needs; its owner's."""
        self.layouts: dict[tuple[object, ...], Layout] = {}
        """Triton: tiles on the device, by segments (all, or the train rows') and what drops."""
        self._tables = {} if tables is None else tables

    def slot_table(self, device: torch.device) -> SlotTable:
        """Where the slots' weights lie; one per arena, shared by its plans."""
        return self._tables.setdefault(device, SlotTable(device))


class SmlmPlans:
    """The plans of the last few layouts of one engine's steps. While decoding, the same few come again and again."""

    KEPT = 16

    def __init__(self) -> None:
        self._plans: dict[tuple[Segment, ...], SmlmPlan] = {}
        self._tables: dict[torch.device, SlotTable] = {}

    def of(self, segments: tuple[Segment, ...]) -> SmlmPlan:
        """The plan of this layout."""
        plan = self._plans.pop(segments, None) or SmlmPlan(self._tables)
        self._plans[segments] = plan  # last in, last out
        if len(self._plans) > self.KEPT:
            del self._plans[next(iter(self._plans))]
        return plan

    def fixed(self, num_tiles: int, table: FactorTable, slots: Sequence[int], device: torch.device) -> SmlmPlan:
        """A plan whose addresses and sizes stay: for a CUDA graph, captured once and filled for each step.

        Args:
            num_tiles: most segments of 16 rows or less that a step may have.
            slots: adapters whose largest rank the graph is captured for; one at least.
        """
        known = self._slot_table(device)
        known.rows_of(slots, table)
        kind = known.common(slots)
        return SmlmPlan(self._tables, fixed_layout(num_tiles, SMALL_TILE, device=device, **kind))

    def fill(self, plan: SmlmPlan, segments: Sequence[Segment], table: FactorTable, device: torch.device) -> bool:
        """Make a fixed plan run these segments; False when it must be made and captured again.

        That is when the adapters' table moved, or a rank, a dtype or an alignment is not what it was made for.
        """
        known, live = self._slot_table(device), [s for s in segments if s.stop > s.start]
        before, used = known.generation, [s.slot for s in live]
        row_of = known.rows_of(used, table)
        assert plan.fixed is not None
        if known.generation != before or not fits(plan.fixed, live, **(known.common(used) if used else {})):
            return False
        refill(plan.fixed, live, row_of)
        return True

    def _slot_table(self, device: torch.device) -> SlotTable:
        return self._tables.setdefault(device, SlotTable(device))


@cache
def _triton(device_type: str) -> TritonSmlm | None:
    kernels = process_kernels(device_type)
    if not (kernels.in_triton("smlm_forward") and kernels.in_triton("smlm_backward")):
        return None
    from loquetier.kernels.triton_smlm import TritonSmlm

    return TritonSmlm()


def triton_smlm(x_TK: Tensor) -> TritonSmlm | None:
    """The Triton kernels if they are what runs on rows like these."""
    triton = _triton(x_TK.device.type)
    return triton if triton is not None and triton.takes(x_TK.dtype) else None


@cache
def _native(kernel: str) -> NativeSmlm | None:
    library = process_kernels("cpu").native(kernel)
    return NativeSmlm(library) if library else None


@cache
def _long() -> NativeLongSmlm | None:
    library = process_kernels("cpu").native("smlm_long")
    kernel = NativeLongSmlm(library) if library else None
    return kernel if kernel is not None and kernel.available else None


def smlm_forward(
    x_TK: Tensor,
    y_TN: Tensor,
    module: int,
    segments: Sequence[Segment],
    table: FactorTable,
    plan: SmlmPlan | None = None,
) -> None:
    """`reference.smlm_forward`; `plan` must be of these segments and saves looking up their pointers."""
    triton = triton_smlm(x_TK)
    if triton is not None:
        triton.forward(x_TK, y_TN, module, segments, table, plan)
        return
    native = _native("smlm_forward") if x_TK.is_cpu else None
    dtype = x_TK.dtype
    if native is not None and usable_matrix(x_TK, dtype) and usable_matrix(y_TN, dtype):
        rows = planned_rows(module, segments, table, plan)
        if rows is not None and native.takes(rows, dtype):
            native.forward(x_TK, y_TN, rows)
            segments = rows.long
        long = _long()
        if long is not None:
            segments = long.forward(x_TK, y_TN, module, segments, table)
    reference.smlm_forward(x_TK, y_TN, module, segments, table)


def planned_rows(module: int, segments: Sequence[Segment], table: FactorTable, plan: SmlmPlan | None) -> Rows | None:
    """`forward_rows`, looked up in the plan of these segments if there is one, and kept in it."""
    if plan is None:
        return forward_rows(module, segments, table)
    if module not in plan.rows:
        plan.rows[module] = forward_rows(module, segments, table)
    return plan.rows[module]


def smlm_backward(
    x_TK: Tensor,
    dy_TN: Tensor,
    dx_TK: Tensor,
    module: int,
    segments: Sequence[Segment],
    table: FactorTable,
    grads: FactorTable,
    plan: SmlmPlan | None = None,
) -> None:
    """`reference.smlm_backward`; `plan` as in the forward, of segments that hold these."""
    triton = triton_smlm(x_TK)
    if triton is not None:
        triton.backward(x_TK, dy_TN, dx_TK, module, segments, table, grads, plan)
        return
    native = _native("smlm_backward") if x_TK.is_cpu else None
    if native is not None and all(usable_matrix(m, x_TK.dtype) for m in (x_TK, dy_TN, dx_TK)):
        longest = None if _long() is None or x_TK.dtype != torch.bfloat16 else LONG_ON_TILES
        rows = backward_rows(module, segments, table, grads, longest)
        if rows is not None and native.takes(rows, x_TK.dtype):
            native.backward(x_TK, dy_TN, dx_TK, rows)
            segments = rows.long
        long = _long()
        if long is not None:
            segments = long.backward(x_TK, dy_TN, dx_TK, module, segments, table, grads)
    reference.smlm_backward(x_TK, dy_TN, dx_TK, module, segments, table, grads)
