"""SMLM on the device: shrink, expand and wgrad, which are forward and backward alike (see `reference`).

Every program reads its work from two tables in device memory, so a launch needs nothing from the host but pointers and
sizes that do not change from step to step: it can be captured in a CUDA graph.

    table  int64 [slots, modules, WORDS]: addresses of A and B, rank, scale's float32 bits, addresses of their
           gradients, hash of the module for dropout. Address 0: this slot does not adapt this module.
    tiles  int32 [tiles, TILE_WORDS]: slot row, first row, rows, dropout threshold, its scale bits. Slot -1: padding.

Sums are float32; the order of a sum depends on sizes alone, never on timing: no atomics. What changes from step to step
is not specialized on: Triton would compile again for 1 and for multiples of 16.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

WORDS = tl.constexpr(8)
TILE_WORDS = tl.constexpr(5)
RANK, SCALE, HASH = tl.constexpr(2), tl.constexpr(3), tl.constexpr(6)


@triton.jit
def _float(bits):
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _entry(table, table_stride, module, tile, FACTOR: tl.constexpr):
    """Where the table has the tile's slot, and the address of its factor: 0 where there is nothing to do."""
    slot = tl.load(tile)
    entry = table + slot.to(tl.int64) * table_stride + module * WORDS
    return entry, tl.load(entry + FACTOR, mask=slot >= 0, other=0)


@triton.jit
def _rows(tile, BLOCK_M: tl.constexpr):
    """The rows of a tile, and which of them there are."""
    m = tl.arange(0, BLOCK_M)
    return (tl.load(tile + 1) + m).to(tl.int64), m < tl.load(tile + 2)


@triton.jit
def _scale(entry, tile):
    return _float(tl.load(entry + SCALE)) * _float(tl.load(tile + 4))


@triton.jit
def _dot(a, b, acc, COMPUTE: tl.constexpr):
    # "tf32x3" keeps float32's precision on tensor cores (a single TF32 product has 10 bits); it concerns float32 only.
    # COMPUTE is float32 in the interpreter, whose bfloat16 dot is garbage.
    return tl.dot(a.to(COMPUTE), b.to(COMPUTE), acc, input_precision="tf32x3")


@triton.jit
def _kept(keys, module_hash, rows, cols, live, threshold):
    """``[rows, cols]``: 1 where dropout keeps the value; `dropout.dropped_TK`'s hash, bit for bit."""
    key = tl.load(keys + rows, mask=live, other=0).to(tl.uint64, bitcast=True)
    pair = (cols // 2 + 1).to(tl.uint64)
    z = (key ^ module_hash.to(tl.uint64, bitcast=True))[:, None] + pair[None, :] * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    half = tl.where((cols % 2 == 0)[None, :], z & 0xFFFFFFFF, z >> 32)
    return half.to(tl.uint32).to(tl.int32, bitcast=True) >= threshold


@triton.jit(do_not_specialize=["module", "num_rows"], do_not_specialize_on_alignment=["keys"])
def shrink_kernel(
    x, x_stride, planes, table, table_stride, module, tiles, keys, num_rows, dim,
    FACTOR: tl.constexpr, WEIGHTS: tl.constexpr, COMPUTE: tl.constexpr, DROP: tl.constexpr, ALIGNED: tl.constexpr,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """``planes[split, row, :R] = x[row] @ w^T``, every SPLIT-th block of columns. Grid: tiles, SPLIT, R / BLOCK_R."""
    tile = tiles + tl.program_id(0) * TILE_WORDS
    split = tl.program_id(1)
    entry, address = _entry(table, table_stride, module, tile, FACTOR)
    if address == 0:
        return
    rank = tl.load(entry + RANK).to(tl.int32)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    w = address.to(tl.pointer_type(WEIGHTS))
    rows, live = _rows(tile, BLOCK_M)
    q = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(split * BLOCK_K, dim, BLOCK_K * SPLIT):
        k = start + tl.arange(0, BLOCK_K)
        x_MK = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=live[:, None] & (k < dim)[None, :], other=0.0)
        if DROP:
            kept = _kept(keys, tl.load(entry + HASH), rows, k, live, tl.load(tile + 3))
            x_MK = tl.where(kept, x_MK, 0.0)
        w_KR = tl.load(w + q[None, :] * dim + k[:, None], mask=(q < rank)[None, :] & (k < dim)[:, None], other=0.0)
        acc = _dot(x_MK, w_KR, acc, COMPUTE)
    at = planes + (split.to(tl.int64) * num_rows + rows)[:, None] * R + q[None, :]
    tl.store(at, acc, mask=live[:, None])


@triton.jit
def _summed(planes, rows, live, num_rows, q, scale, R: tl.constexpr, SPLIT: tl.constexpr):
    """``[rows, q]``: scale times the sum of the planes."""
    at = planes + rows[:, None] * R + q[None, :]
    total = tl.load(at, mask=live[:, None], other=0.0)
    for split in range(1, SPLIT):
        total += tl.load(at + split * num_rows.to(tl.int64) * R, mask=live[:, None], other=0.0)
    return total * scale


@triton.jit(do_not_specialize=["module", "num_rows"], do_not_specialize_on_alignment=["keys"])
def expand_kernel(
    planes, y, y_stride, table, table_stride, module, tiles, keys, num_rows, dim,
    FACTOR: tl.constexpr, WEIGHTS: tl.constexpr, COMPUTE: tl.constexpr, DROP: tl.constexpr, ALIGNED: tl.constexpr,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """``y[row] += scale * s[row] @ w``, s being the sum of the planes. Grid: tiles, blocks of columns.

    With DROP the columns that dropout hides from the module's input get nothing: this is then the backward.
    """
    tile = tiles + tl.program_id(0) * TILE_WORDS
    entry, address = _entry(table, table_stride, module, tile, FACTOR)
    if address == 0:
        return
    rank = tl.load(entry + RANK).to(tl.int32)
    scale = _scale(entry, tile)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    w = address.to(tl.pointer_type(WEIGHTS))
    rows, live = _rows(tile, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, R, BLOCK_R):
        q = first + tl.arange(0, BLOCK_R)
        s_MR = _summed(planes, rows, live, num_rows, q, scale, R, SPLIT)
        w_RN = tl.load(
            w + q[:, None] * dim + cols[None, :], mask=(q < rank)[:, None] & (cols < dim)[None, :], other=0.0
        )
        acc = _dot(s_MR, w_RN, acc, COMPUTE)
    if DROP:
        acc = tl.where(_kept(keys, tl.load(entry + HASH), rows, cols, live, tl.load(tile + 3)), acc, 0.0)
    at = y + rows[:, None] * y_stride + cols[None, :]
    mask = live[:, None] & (cols < dim)[None, :]
    tl.store(at, (tl.load(at, mask=mask, other=0.0).to(tl.float32) + acc).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["module", "num_rows"], do_not_specialize_on_alignment=["keys"])
def wgrad_kernel(
    planes, x, x_stride, partial, table, table_stride, module, spans, keys, num_rows, dim,
    FACTOR: tl.constexpr, COMPUTE: tl.constexpr, DROP: tl.constexpr,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """``grad[q, d] += scale * sum over the span's rows of s[row, q] * x[row, d]``, in float32.

    Spans look like tiles but are as long as their segment; no slot may come twice in one launch. Grid: spans times
    R / BLOCK_R, blocks of columns, PARTS. With PARTS > 1 each part of the rows goes to ``partial[part, span, q, d]``.
    """
    span = tl.program_id(0) // (R // BLOCK_R)
    tile = spans + span * TILE_WORDS
    part = tl.program_id(2)
    entry, address = _entry(table, table_stride, module, tile, FACTOR)
    if address == 0:
        return
    rank = tl.load(entry + RANK).to(tl.int32)
    scale = _scale(entry, tile)
    row0, count = tl.load(tile + 1), tl.load(tile + 2)
    q = tl.program_id(0) % (R // BLOCK_R) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for start in range(part * BLOCK_M, count, BLOCK_M * PARTS):
        m = start + tl.arange(0, BLOCK_M)
        live = m < count
        rows = (row0 + m).to(tl.int64)
        s_MR = _summed(planes, rows, live, num_rows, q, scale, R, SPLIT)
        x_MN = tl.load(
            x + rows[:, None] * x_stride + cols[None, :], mask=live[:, None] & (cols < dim)[None, :], other=0.0
        )
        if DROP:
            x_MN = tl.where(_kept(keys, tl.load(entry + HASH), rows, cols, live, tl.load(tile + 3)), x_MN, 0.0)
        acc = _dot(tl.trans(s_MR), x_MN, acc, COMPUTE)
    mask = (q < rank)[:, None] & (cols < dim)[None, :]
    if PARTS > 1:
        at = partial + ((part * (tl.num_programs(0) // (R // BLOCK_R)) + span).to(tl.int64) * R + q)[:, None] * dim
        tl.store(at + cols[None, :], acc, mask=mask)
    else:
        at = address.to(tl.pointer_type(tl.float32)) + q[:, None] * dim + cols[None, :]
        tl.store(at, tl.load(at, mask=mask, other=0.0) + acc, mask=mask)


@triton.jit(do_not_specialize=["module", "num_spans"])
def wgrad_sum_kernel(
    partial, table, table_stride, module, spans, num_spans, dim,
    FACTOR: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``grad[q] += sum over parts of partial[part, span, q]``, in their order. Grid: spans, R, blocks of columns."""
    span, q = tl.program_id(0), tl.program_id(1)
    entry, address = _entry(table, table_stride, module, spans + span * TILE_WORDS, FACTOR)
    if address == 0:
        return
    if q >= tl.load(entry + RANK).to(tl.int32):
        return
    cols = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < dim
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for part in range(PARTS):
        at = partial + ((part * num_spans + span).to(tl.int64) * R + q) * dim + cols
        total += tl.load(at, mask=mask, other=0.0)
    at = address.to(tl.pointer_type(tl.float32)) + q * dim + cols
    tl.store(at, tl.load(at, mask=mask, other=0.0) + total, mask=mask)
