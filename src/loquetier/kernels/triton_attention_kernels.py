"""Attention over paged K and V on the device: one kernel for decode rows and for chunks of a prompt.

The query heads that share a kv head are rows of one tile, so K and V are read once for all of them. Few sequences are
split along their keys; `merge_kernel` joins the parts by their log-sum-exps. Softmax and sums are float32.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _softcapped(scores, softcap):
    # softcap * tanh(scores / softcap); tanh(x) = 1 - 2 / (exp(2x) + 1), which is +-1 where exp overflows or vanishes.
    return softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))


@triton.jit(
    do_not_specialize=["past", "num_rows", "window", "pages_stride"],
    do_not_specialize_on_alignment=["pages", "positions"],  # cut out of one tensor of the step's integers
)
def paged_kernel(
    q, q_row_stride, q_head_stride, k_cache, v_cache, out, partial, stats, pages, pages_stride, positions,
    past, num_rows, scale, window, softcap,
    DECODE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, COMPUTE: tl.constexpr,
    GROUPS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """``[rows, heads, DIM]``. Grid: blocks of rows (DECODE: rows), KV_HEADS, SPLIT.

    DECODE: row i is the token at ``positions[i]`` of the sequence whose pages are ``pages[i]``. Otherwise row i is
    token ``past + i`` of one sequence. A row sees itself and what is before, with WINDOW the last `window` of that.
    """
    block, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = tl.arange(0, BLOCK_M)
    head = kv_head * GROUPS + m % GROUPS
    if DECODE:
        row = block + m * 0
        live = m < GROUPS
        last = tl.load(positions + block).to(tl.int32)
        q_pos = last + m * 0
        lowest = last
        table = pages + block.to(tl.int64) * pages_stride
    else:
        ROWS: tl.constexpr = BLOCK_M // GROUPS
        row = block * ROWS + m // GROUPS
        live = (m < ROWS * GROUPS) & (row < num_rows)
        q_pos = past + row
        lowest = past + block * ROWS
        last = past + tl.minimum((block + 1) * ROWS, num_rows) - 1
        table = pages
    d = tl.arange(0, BLOCK_D)
    q_at = q + row.to(tl.int64)[:, None] * q_row_stride + head[:, None] * q_head_stride + d[None, :]
    q_MD = tl.load(q_at, mask=live[:, None] & (d < DIM)[None, :], other=0.0).to(COMPUTE)
    first = 0
    if WINDOW:
        first = tl.maximum(lowest - window + 1, 0) // BLOCK_N
    stop = last // BLOCK_N + 1
    each = tl.cdiv(stop - first, SPLIT)
    start = first + split * each
    stop = tl.minimum(stop, start + each)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for number in range(start, stop):
        pos = number * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = pos <= last
        page = tl.load(table + pos // PAGE, mask=inside, other=0).to(tl.int64)
        at = ((page * PAGE + pos % PAGE) * KV_HEADS + kv_head) * DIM
        # Only written tokens are read: what else lies in a page, NaN say, never meets a weight of zero.
        mask = inside[:, None] & (d < DIM)[None, :]
        k_ND = tl.load(k_cache + at[:, None] + d[None, :], mask=mask, other=0.0).to(COMPUTE)
        v_ND = tl.load(v_cache + at[:, None] + d[None, :], mask=mask, other=0.0).to(COMPUTE)
        scores = tl.dot(q_MD, tl.trans(k_ND), input_precision="tf32x3") * scale
        if SOFTCAP:
            scores = _softcapped(scores, softcap)
        visible = pos[None, :] <= q_pos[:, None]
        if WINDOW:
            visible = visible & (q_pos[:, None] - pos[None, :] < window)
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing visible yet: no inf - inf
        weights = tl.exp(scores - base[:, None])
        fade = tl.exp(top - base)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(COMPUTE), v_ND, acc * fade[:, None], input_precision="tf32x3")
        top = higher
    heads = KV_HEADS * GROUPS
    to = row.to(tl.int64) * heads + head
    keep = live[:, None] & (d < DIM)[None, :]
    if SPLIT == 1:
        result = acc / total[:, None]
        tl.store(out + to[:, None] * DIM + d[None, :], result.to(out.dtype.element_ty), mask=keep)
    else:
        to = to * SPLIT + split
        tl.store(partial + to[:, None] * DIM + d[None, :], acc, mask=keep)
        tl.store(stats + to * 2, top, mask=live)
        tl.store(stats + to * 2 + 1, total, mask=live)


@triton.jit
def merge_kernel(
    partial, stats, out, DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Join the SPLIT parts of each row and head. Grid: rows times heads."""
    to = tl.program_id(0).to(tl.int64)
    part, d = tl.arange(0, SPLIT), tl.arange(0, BLOCK_D)
    top = tl.load(stats + (to * SPLIT + part) * 2)
    weights = tl.exp(top - tl.max(top, 0))
    total = tl.sum(weights * tl.load(stats + (to * SPLIT + part) * 2 + 1), 0)
    at = partial + (to * SPLIT + part)[:, None] * DIM + d[None, :]
    acc = tl.load(at, mask=(d < DIM)[None, :], other=0.0)
    result = tl.sum(acc * weights[:, None], 0) / total
    tl.store(out + to * DIM + d, result.to(out.dtype.element_ty), mask=d < DIM)
