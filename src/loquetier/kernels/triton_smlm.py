"""SMLM on the Triton kernels: which tables, which tile sizes, which launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from loquetier.kernels import triton_plan as plans
from loquetier.kernels import triton_smlm_kernels as kernels
from loquetier.kernels.reference import FactorTable, Segment
from loquetier.kernels.transfer import to_device
from loquetier.kernels.triton_layout import Layout, fixed_layout, make_layout
from loquetier.kernels.triton_load import TYPES, interpreted
from loquetier.kernels.triton_plan import SMALL_TILE
from loquetier.kernels.triton_tables import GRAD_A, GRAD_B, A, B, SlotTable, common, words_of

if TYPE_CHECKING:
    from loquetier.kernels.dropout import DropoutRows
    from loquetier.kernels.smlm import SmlmPlan

_TYPES = {dtype: getattr(tl, name) for dtype, name in TYPES.items()}


class _Work(NamedTuple):
    """What all launches of one call share."""

    layout: Layout
    table: Tensor
    """``[slots, modules, WORDS]``."""
    column: int
    """Of the table: the module."""
    keys_T: Tensor
    """Dropout's; anything where nothing drops."""
    compute: Any
    """Type in which tiles are multiplied."""

    def common(self, dim: int, factor: int) -> dict[str, Any]:
        """Arguments that every kernel takes."""
        return {
            "table": self.table, "table_stride": self.table.stride(0), "module": self.column, "dim": dim,
            "FACTOR": factor, "R": self.layout.rank, "BLOCK_R": plans.rank_block(self.layout.rank),
        }  # fmt: skip


class TritonSmlm:
    """Both directions. Rows lie anywhere, a row's elements side by side; y and dx are changed in place."""

    @staticmethod
    def takes(dtype: torch.dtype) -> bool:
        """Whether there are kernels for rows of this type."""
        return dtype in _TYPES

    def forward(
        self,
        x_TK: Tensor,
        y_TN: Tensor,
        module: int,
        segments: Sequence[Segment],
        table: FactorTable,
        plan: SmlmPlan | None = None,
        dropout: DropoutRows | None = None,
    ) -> None:
        """`reference.smlm_forward`, or with `dropout` `dropout.dropout_forward`: two launches."""
        work = _work(x_TK, module, segments, table, None, plan, dropout)
        if work is not None:
            planes = _shrink(x_TK, work, A, dropped=True)
            _expand(planes, y_TN, work, B, dropped=False)

    def backward(
        self,
        x_TK: Tensor,
        dy_TN: Tensor,
        dx_TK: Tensor,
        module: int,
        segments: Sequence[Segment],
        table: FactorTable,
        grads: FactorTable,
        plan: SmlmPlan | None = None,
        dropout: DropoutRows | None = None,
    ) -> None:
        """`reference.smlm_backward`, or with `dropout` `dropout.dropout_backward`: five launches; S is made again."""
        work = _work(x_TK, module, segments, table, grads, plan, dropout)
        if work is None:
            return
        ds_planes = _shrink(dy_TN, work, B, dropped=False)
        s_planes = _shrink(x_TK, work, A, dropped=True)
        _expand(ds_planes, dx_TK, work, A, dropped=True)
        for spans in work.layout.rounds:
            _wgrad(ds_planes, x_TK, spans, work, GRAD_A, dropped=True)
            _wgrad(s_planes, dy_TN, spans, work, GRAD_B, dropped=False)


def _work(
    x_TK: Tensor,
    module: int,
    segments: Sequence[Segment],
    table: FactorTable,
    grads: FactorTable | None,
    plan: SmlmPlan | None,
    dropout: DropoutRows | None,
) -> _Work | None:
    """None when no row of these segments has an adapter on this module."""
    if plan is not None and plan.fixed is not None:
        assert grads is None and dropout is None, "a fixed layout is for rows without a backward"
        return _made(plan.fixed, plan.slot_table(x_TK.device).tensor, module, x_TK, None)
    if plan is not None:
        layout, slots = _planned(tuple(segments), table, grads, plan, dropout, x_TK.device)
        assert layout.stop <= len(x_TK), "segments of other rows"
        return _made(layout, slots, module, x_TK, dropout) if module in layout.modules else None
    live = tuple(s for s in segments if s.stop > s.start)
    if not any(module in table[s.slot] for s in live):
        return None
    assert max(s.stop for s in live) <= len(x_TK), "segments of other rows"
    layout, slots = _unplanned(live, module, table, grads, dropout, x_TK.device)
    return _made(layout, slots, 0, x_TK, dropout)


def _made(layout: Layout, slots: Tensor, column: int, x_TK: Tensor, dropout: DropoutRows | None) -> _Work:
    narrow = layout.weights == x_TK.dtype and not interpreted()
    keys_T = slots if dropout is None else dropout.keys_T
    return _Work(layout, slots, column, keys_T, _TYPES[layout.weights] if narrow else tl.float32)


def _rates(segments: Sequence[Segment], dropout: DropoutRows | None) -> tuple[float, ...]:
    return tuple(dropout.rates[s.slot] if dropout is not None and dropout.drops(s) else 0.0 for s in segments)


def _planned(
    segments: tuple[Segment, ...],
    table: FactorTable,
    grads: FactorTable | None,
    plan: SmlmPlan,
    dropout: DropoutRows | None,
    device: torch.device,
) -> tuple[Layout, Tensor]:
    """The layout of these segments for every module at once, made when the first asks."""
    slots, rates = plan.slot_table(device), () if dropout is None else _rates(segments, dropout)
    key = (segments, rates, grads is not None)
    layout = plan.layouts.get(key)
    if layout is None:
        layout = plan.layouts[key] = _layout(segments, table, slots, dropout, backward=grads is not None)
    for slot in {s.slot for s in segments if s.stop > s.start} if grads is not None else ():
        slots.set_gradients(slot, grads[slot])  # type: ignore[index]
    return layout, slots.tensor


def _layout(
    segments: tuple[Segment, ...],
    table: FactorTable,
    slots: SlotTable,
    dropout: DropoutRows | None,
    *,
    backward: bool,
) -> Layout:
    live = tuple(s for s in segments if s.stop > s.start)
    used = [s.slot for s in live]
    row_of, modules = slots.rows_of(used, table), frozenset(m for slot in used for m in table[slot])
    if not modules:
        return fixed_layout(0, SMALL_TILE, rank=1, weights=torch.float32, aligned=False, device=slots.device)
    layout = make_layout(
        live, row_of, _rates(live, dropout), device=slots.device, backward=backward, **slots.common(used)
    )
    return replace(layout, modules=modules, stop=max(s.stop for s in live))


def _unplanned(
    segments: tuple[Segment, ...],
    module: int,
    table: FactorTable,
    grads: FactorTable | None,
    dropout: DropoutRows | None,
    device: torch.device,
) -> tuple[Layout, Tensor]:
    """Tables of one call: what is not planned is rare, or one module."""
    used = tuple(s for s in segments if module in table[s.slot])
    row_of = {slot: row for row, slot in enumerate(dict.fromkeys(s.slot for s in used))}
    found = {slot: table[slot][module] for slot in row_of}
    words = [words_of(module, f, None if grads is None else grads[slot][module]) for slot, f in found.items()]
    slots = to_device(np.asarray(words, dtype=np.int64)[:, None], device)
    layout = make_layout(
        used, row_of, _rates(used, dropout), device=device, backward=grads is not None, **common(found.values())
    )
    return layout, slots


def _shrink(x_TD: Tensor, work: _Work, factor: int, *, dropped: bool) -> Tensor:
    """``[SPLIT, T, R]`` float32; rows outside the tiles are not written."""
    x_TD, (num_rows, dim), layout = side_by_side(x_TD), x_TD.shape, work.layout
    sizes = plans.shrink_plan(dim, layout.rank, layout.block, len(layout.tiles))
    planes = torch.empty((sizes.split, num_rows, layout.rank), dtype=torch.float32, device=x_TD.device)
    grid = (len(layout.tiles), sizes.split, layout.rank // plans.rank_block(layout.rank))
    kernels.shrink_kernel[grid](
        x_TD, x_TD.stride(0), planes, tiles=layout.tiles, keys=work.keys_T, num_rows=num_rows,
        WEIGHTS=_TYPES[layout.weights], COMPUTE=work.compute, DROP=dropped and layout.drops, ALIGNED=layout.aligned,
        BLOCK_M=layout.block, BLOCK_K=sizes.block, SPLIT=sizes.split,
        num_warps=sizes.warps, num_stages=sizes.stages, **work.common(dim, factor),
    )  # fmt: skip
    return planes


def _expand(planes: Tensor, y_TD: Tensor, work: _Work, factor: int, *, dropped: bool) -> None:
    (num_rows, dim), layout = y_TD.shape, work.layout
    assert y_TD.stride(1) == 1 or dim == 1, "written in place"
    sizes = plans.expand_plan(dim, layout.rank, layout.block)
    kernels.expand_kernel[(len(layout.tiles), triton.cdiv(dim, sizes.block))](
        planes, y_TD, y_TD.stride(0), tiles=layout.tiles, keys=work.keys_T, num_rows=num_rows,
        WEIGHTS=_TYPES[layout.weights], COMPUTE=work.compute, DROP=dropped and layout.drops, ALIGNED=layout.aligned,
        BLOCK_M=layout.block, BLOCK_N=sizes.block, SPLIT=len(planes),
        num_warps=sizes.warps, num_stages=sizes.stages, **work.common(dim, factor),
    )  # fmt: skip


def _wgrad(planes: Tensor, x_TD: Tensor, spans: Tensor, work: _Work, factor: int, *, dropped: bool) -> None:
    x_TD, (num_rows, dim), layout = side_by_side(x_TD), x_TD.shape, work.layout
    sizes = plans.wgrad_plan(dim, layout.rank, layout.longest, len(spans))
    blocks, common = triton.cdiv(dim, sizes.block), work.common(dim, factor)
    parts = (sizes.split, len(spans), layout.rank, dim)
    partial = torch.empty(parts, dtype=torch.float32, device=x_TD.device) if sizes.split > 1 else planes
    grid = (len(spans) * (layout.rank // plans.rank_block(layout.rank)), blocks, sizes.split)
    kernels.wgrad_kernel[grid](
        planes, x_TD, x_TD.stride(0), partial, spans=spans, keys=work.keys_T, num_rows=num_rows,
        COMPUTE=tl.float32 if interpreted() else _TYPES[x_TD.dtype], DROP=dropped and layout.drops,
        BLOCK_M=plans.WGRAD_ROWS, BLOCK_N=sizes.block, SPLIT=len(planes), PARTS=sizes.split,
        num_warps=sizes.warps, num_stages=sizes.stages, **common,
    )  # fmt: skip
    if sizes.split > 1:
        del common["BLOCK_R"]
        kernels.wgrad_sum_kernel[(len(spans), layout.rank, blocks)](
            partial, spans=spans, num_spans=len(spans), BLOCK_N=sizes.block, PARTS=sizes.split, **common
        )


def side_by_side(x_TD: Tensor) -> Tensor:
    """The same with each row's elements side by side: a copy only where they are not."""
    return x_TD if x_TD.stride(1) == 1 or x_TD.shape[1] == 1 else x_TD.contiguous()
