"""What a decoder layer does between its GEMMs, on the device: norms, rotary with the KV write, gated activations.

They round where Hugging Face's eager code does: ``_as(x, like)`` rounds to the tensors' type, and float32 goes on.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

SILU, GELU_TANH = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def _as(x, like):
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def rms_norm_kernel(
    x, x_stride, delta, delta_stride, weight, y, y_stride, heads, dim, epsilon,
    ADD: tl.constexpr, ONE_PLUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``x += delta`` if ADD, then ``y = weight * x / sqrt(mean(x^2) + epsilon)``. Grid: rows times heads.

    A row holds `heads` vectors of `dim`, side by side. ONE_PLUS: Gemma's ``(1 + weight)``, which rounds once.
    """
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    d = tl.arange(0, BLOCK)
    mask = d < dim
    at = x + row * x_stride + head * dim + d
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value = _as(value + tl.load(delta + row * delta_stride + d, mask=mask, other=0.0).to(tl.float32), x)
        tl.store(at, value.to(x.dtype.element_ty), mask=mask)
    scaled = value * tl.rsqrt(tl.sum(value * value, 0) / dim + epsilon)
    w = tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
    result = scaled * (1.0 + w) if ONE_PLUS else _as(scaled, x) * w
    tl.store(y + row * y_stride + head * dim + d, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_backward_kernel(
    x, x_stride, weight, dy, dy_stride, dx, dx_stride, dim, epsilon, ONE_PLUS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``dx = r (g - x r^2 mean(g x))``, ``g = dy * weight``, ``r = 1 / sqrt(mean(x^2) + epsilon)``. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = d < dim
    value = tl.load(x + row * x_stride + d, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
    if ONE_PLUS:
        w = 1.0 + w
    g = tl.load(dy + row * dy_stride + d, mask=mask, other=0.0).to(tl.float32) * w
    r = tl.rsqrt(tl.sum(value * value, 0) / dim + epsilon)
    result = r * (g - value * (r * r * tl.sum(g * value, 0) / dim))
    tl.store(dx + row * dx_stride + d, result.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _activated(gate, ACTIVATION: tl.constexpr):
    """The activation's value and its derivative."""
    if ACTIVATION == SILU:
        s = tl.sigmoid(gate)
        return gate * s, s * (1.0 + gate * (1.0 - s))
    else:  # 0.5 x (1 + tanh(t)) = x sigmoid(2t), t = sqrt(2 / pi) (x + 0.044715 x^3)
        s = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
        return gate * s, s + gate * s * (1.0 - s) * slope


@triton.jit
def gated_kernel(
    gate, gate_stride, up, up_stride, y, y_stride, dim, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``y = act(gate) * up``. Grid: rows, blocks of columns."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = d < dim
    g = tl.load(gate + row * gate_stride + d, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + d, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activated(g, ACTIVATION)
    tl.store(y + row * y_stride + d, (_as(value, y) * u).to(y.dtype.element_ty), mask=mask)


@triton.jit
def gated_backward_kernel(
    gate, gate_stride, up, up_stride, dy, dy_stride, dgate, dup, dim, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``dgate = dy * up * act'(gate)``, ``dup = dy * act(gate)``, both without gaps. Grid: rows, blocks of columns."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = d < dim
    g = tl.load(gate + row * gate_stride + d, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + d, mask=mask, other=0.0).to(tl.float32)
    above = tl.load(dy + row * dy_stride + d, mask=mask, other=0.0).to(tl.float32)
    value, slope = _activated(g, ACTIVATION)
    tl.store(dgate + row * dim + d, (above * u * slope).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + row * dim + d, (above * value).to(dup.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_cached"], do_not_specialize_on_alignment=["cache_rows"])
def rotary_kernel(
    x, x_stride, cosines, sines, k_cache, v_cache, cache_rows, first_cached, heads, kv_heads,
    DIM: tl.constexpr, HALF: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Rotate the first ``heads + kv_heads`` heads of each row in place: ``x * cos + rotate_half(x) * sin``.

    WRITE: rows from `first_cached` on put their K, rotated, and their V into the cache, at ``cache_rows``.
    Grid: rows, heads (with WRITE: those of V too).
    """
    row, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, HALF)
    mask = d < DIM // 2
    at = x + row.to(tl.int64) * x_stride + head * DIM + d
    low, high = tl.load(at, mask=mask, other=0.0), tl.load(at + DIM // 2, mask=mask, other=0.0)
    if head < heads + kv_heads:
        angle = row * DIM + d
        cos_low = tl.load(cosines + angle, mask=mask, other=0.0).to(tl.float32)
        cos_high = tl.load(cosines + angle + DIM // 2, mask=mask, other=0.0).to(tl.float32)
        sin_low = tl.load(sines + angle, mask=mask, other=0.0).to(tl.float32)
        sin_high = tl.load(sines + angle + DIM // 2, mask=mask, other=0.0).to(tl.float32)
        a, b = low.to(tl.float32), high.to(tl.float32)
        low = (_as(a * cos_low, x) - _as(b * sin_low, x)).to(x.dtype.element_ty)
        high = (_as(b * cos_high, x) + _as(a * sin_high, x)).to(x.dtype.element_ty)
        tl.store(at, low, mask=mask)
        tl.store(at + DIM // 2, high, mask=mask)
    if WRITE:  # noqa: SIM102  (decided by the compiler, the next one by the program)
        if (head >= heads) & (row >= first_cached):
            cell = tl.load(cache_rows + row - first_cached).to(tl.int64) * kv_heads
            if head < heads + kv_heads:
                to = k_cache + (cell + head - heads) * DIM + d
                tl.store(to, low, mask=mask)
                tl.store(to + DIM // 2, high, mask=mask)
            else:
                to = v_cache + (cell + head - heads - kv_heads) * DIM + d
                tl.store(to, low, mask=mask)
                tl.store(to + DIM // 2, high, mask=mask)
