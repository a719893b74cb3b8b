"""Attention over cached pages on the Triton kernel: sizes and launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loquetier.kernels import triton_plan as plans
from loquetier.kernels.attention import MaskRule
from loquetier.kernels.triton_attention_kernels import merge_kernel, paged_kernel
from loquetier.kernels.triton_load import TYPES, interpreted


class TritonAttention:
    """Decode rows and chunks; arguments as `decode.decode_attention`'s and `decode.chunk_attention`'s."""

    @staticmethod
    def takes(q_NHD: Tensor, k_cache: Tensor) -> bool:
        """One type that the kernel knows; a head's elements side by side, as many as a tile may have."""
        same = q_NHD.dtype == k_cache.dtype and q_NHD.dtype in TYPES
        return same and q_NHD.stride(2) == 1 and q_NHD.shape[2] <= plans.LARGEST_HEAD

    def decode(
        self,
        q_NHD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        pages_NB: Tensor,
        positions_N: Tensor,
        scale: float,
        rule: MaskRule,
    ) -> Tensor:
        """``[N, H, D]``: one query per sequence. Sizes follow from shapes alone, so a CUDA graph may hold it."""
        most_keys = pages_NB.shape[1] * k_cache.shape[1]
        return _launch(q_NHD, k_cache, v_cache, pages_NB, positions_N, 0, most_keys, scale, rule)

    def chunk(
        self,
        q_LHD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        pages_B: Tensor,
        past: int,
        scale: float,
        rule: MaskRule,
    ) -> Tensor:
        """``[L, H, D]``: rows ``past, past + 1, ...`` of one sequence."""
        return _launch(q_LHD, k_cache, v_cache, pages_B[None], None, past, past + len(q_LHD), scale, rule)


def _launch(
    q_NHD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pages: Tensor,
    positions_N: Tensor | None,
    past: int,
    most_keys: int,
    scale: float,
    rule: MaskRule,
) -> Tensor:
    rows, heads, dim = q_NHD.shape
    _, page_size, kv_heads, _ = k_cache.shape
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and pages.stride(1) == 1
    groups, decode = heads // kv_heads, positions_N is not None
    sizes = plans.attention_plan(rows, kv_heads, groups, dim, most_keys, decode=decode, wide=q_NHD.element_size() > 2)
    blocks = rows if decode else triton.cdiv(rows, sizes.block_m // groups)
    out = torch.empty((rows, heads, dim), dtype=q_NHD.dtype, device=q_NHD.device)
    partial = stats = out
    if sizes.split > 1:
        partial = torch.empty((rows, heads, sizes.split, dim), dtype=torch.float32, device=q_NHD.device)
        stats = torch.empty((rows, heads, sizes.split, 2), dtype=torch.float32, device=q_NHD.device)
    paged_kernel[(blocks, kv_heads, sizes.split)](
        q_NHD, q_NHD.stride(0), q_NHD.stride(1), k_cache, v_cache, out, partial, stats, pages, pages.stride(0),
        pages if positions_N is None else positions_N, past, rows, scale, rule.window or 0, rule.softcap or 0.0,
        DECODE=decode, WINDOW=rule.window is not None, SOFTCAP=rule.softcap is not None,
        COMPUTE=tl.float32 if interpreted() else getattr(tl, TYPES[q_NHD.dtype]),
        GROUPS=groups, KV_HEADS=kv_heads, DIM=dim, PAGE=page_size,
        BLOCK_M=sizes.block_m, BLOCK_N=sizes.block_n, BLOCK_D=sizes.block_d, SPLIT=sizes.split,
        num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    if sizes.split > 1:
        merge_kernel[(rows * heads,)](partial, stats, out, DIM=dim, BLOCK_D=sizes.block_d, SPLIT=sizes.split)
    return out
