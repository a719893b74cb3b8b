"""SMLM as the base's linears call it: in C where that is fastest, else on the reference. Same result either way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from torch import Tensor

from loquetier.kernels import reference
from loquetier.kernels.native_smlm import NativeSmlm, Rows, backward_rows, forward_rows, usable_matrix
from loquetier.kernels.reference import FactorTable, Segment
from loquetier.kernels.select import process_kernels


class SmlmPlan:
    """Pointer tables of one layout of segments, by module; made when a module first asks, used by every later step.

    It belongs to one arena: a slot's weights do not move, and slot numbers are never used twice.
    """

    __slots__ = ("rows",)

    def __init__(self) -> None:
        self.rows: dict[int, Rows | None] = {}


class SmlmPlans:
    """The plans of the last few layouts of one engine's steps. While decoding, the same few come again and again."""

    KEPT = 16

    def __init__(self) -> None:
        self._plans: dict[tuple[Segment, ...], SmlmPlan] = {}

    def of(self, segments: tuple[Segment, ...]) -> SmlmPlan:
        """The plan of this layout."""
        plan = self._plans.pop(segments, None) or SmlmPlan()
        self._plans[segments] = plan  # last in, last out
        if len(self._plans) > self.KEPT:
            del self._plans[next(iter(self._plans))]
        return plan


@cache
def _native(kernel: str) -> NativeSmlm | None:
    library = process_kernels("cpu").native(kernel)
    return NativeSmlm(library) if library else None


def smlm_forward(
    x_TK: Tensor,
    y_TN: Tensor,
    module: int,
    segments: Sequence[Segment],
    table: FactorTable,
    plan: SmlmPlan | None = None,
) -> None:
    """`reference.smlm_forward`; `plan` must be of these segments and saves looking up their pointers."""
    native = _native("smlm_forward") if x_TK.is_cpu else None
    dtype = x_TK.dtype
    if native is not None and usable_matrix(x_TK, dtype) and usable_matrix(y_TN, dtype):
        rows = planned_rows(module, segments, table, plan)
        if rows is not None and native.takes(rows, dtype):
            native.forward(x_TK, y_TN, rows)
            segments = rows.long
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
) -> None:
    """`reference.smlm_backward`."""
    native = _native("smlm_backward") if x_TK.is_cpu else None
    if native is not None and all(usable_matrix(m, x_TK.dtype) for m in (x_TK, dy_TN, dx_TK)):
        rows = backward_rows(module, segments, table, grads)
        if rows is not None and native.takes(rows, x_TK.dtype):
            native.backward(x_TK, dy_TN, dx_TK, rows)
            segments = rows.long
    reference.smlm_backward(x_TK, dy_TN, dx_TK, module, segments, table, grads)
