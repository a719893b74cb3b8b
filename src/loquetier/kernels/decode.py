"""Attention over cached pages as the base calls it: Triton on a GPU, C on a CPU where it is fastest, else torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loquetier.kernels import attention
from loquetier.kernels.attention import MaskRule
from loquetier.kernels.kv_write import NativeKvWrite
from loquetier.kernels.native_attention import NativeDecode, NativePrefill
from loquetier.kernels.select import process_kernels

if TYPE_CHECKING:  # imports triton, which a CPU installation does not have
    from loquetier.kernels.triton_attention import TritonAttention


@cache
def _native() -> NativeDecode | None:
    library = process_kernels("cpu").native("decode_attention")
    return NativeDecode(library) if library else None


@cache
def _native_prefill() -> NativePrefill | None:
    library = process_kernels("cpu").native("prefill_attention")
    return NativePrefill(library) if library else None


def _native_prefill_for(q_LHD: Tensor, k_cache: Tensor) -> NativePrefill | None:
    native = _native_prefill() if q_LHD.is_cpu else None
    return native if native is not None and native.takes(q_LHD, k_cache) else None


@cache
def _triton(device_type: str) -> TritonAttention | None:
    if not process_kernels(device_type).in_triton("decode_attention"):
        return None
    from loquetier.kernels.triton_attention import TritonAttention

    return TritonAttention()


def _triton_for(q_NHD: Tensor, k_cache: Tensor) -> TritonAttention | None:
    triton = _triton(q_NHD.device.type)
    return triton if triton is not None and triton.takes(q_NHD, k_cache) else None


@cache
def _native_kv_write() -> NativeKvWrite | None:
    library = process_kernels("cpu").native("kv_write")
    return NativeKvWrite(library) if library else None


def kv_write_for(*heads_MHD: Tensor) -> NativeKvWrite | None:
    """The kernel that turns and writes such rows of q, k and v; None where torch does it."""
    native = _native_kv_write() if heads_MHD[0].is_cpu else None
    return native if native is not None and native.takes(*heads_MHD) else None


def reads_written_tokens_only(q_HLD: Tensor, k_cache: Tensor) -> bool:
    """Whether attention over these pages never looks at tokens that were not written: then none need be cleared.

    Triton's kernels and the C ones do not; nor does a chunk on the reference, which gathers written tokens only.
    """
    q_LHD = q_HLD.transpose(0, 1)
    native = _native() if q_HLD.is_cpu else None
    return _triton_for(q_LHD, k_cache) is not None or (native is not None and native.takes(q_LHD, k_cache))


def prompts_read_pages(q_HLD: Tensor, k_cache: Tensor, rule: MaskRule) -> bool:
    """Whether a prompt without a past runs over its pages too, because torch has no fast kernel for this rule."""
    if rule.window is None and rule.softcap is None:
        return False
    q_LHD = q_HLD.transpose(0, 1)
    # Float32 keeps one path: trained and served rows agree to the bit there.
    return _triton_for(q_LHD, k_cache) is not None or (
        q_HLD.dtype == torch.bfloat16 and _native_prefill_for(q_LHD, k_cache) is not None
    )


def decode_attention(
    q_NHD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pages_NB: Tensor,
    positions_N: Tensor,
    visible_NP: Callable[[int | None], Tensor],
    scale: float,
    rule: MaskRule,
) -> Tensor:
    """One query per sequence over its cached tokens -> ``[N, H, D]``.

    Args:
        q_NHD: queries; heads and rows may lie anywhere, a head's elements side by side.
        k_cache, v_cache: ``[pages, page_size, K, D]``, contiguous.
        pages_NB: int64 page numbers of each sequence, padded with the trash page.
        positions_N: int64 position of each query: it sees itself and what is before, as far as the window goes.
        visible_NP: gives the reference's mask for a window; the C kernel needs none.
        scale, rule: as in `attention.span_attention`.
    """
    triton = _triton_for(q_NHD, k_cache)
    if triton is not None:
        return triton.decode(q_NHD, k_cache, v_cache, pages_NB, positions_N, scale, rule)
    native = _native() if q_NHD.is_cpu else None
    if native is not None and native.takes(q_NHD, k_cache):
        return native(q_NHD, k_cache, v_cache, pages_NB, positions_N, scale, rule)
    return attention.decode_attention(q_NHD, k_cache, v_cache, pages_NB, visible_NP(rule.window), scale, rule.softcap)


def chunk_attention(
    q_HLD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pages_B: Tensor,
    past: int,
    read: Callable[[], tuple[Tensor, Tensor]],
    scale: float,
    rule: MaskRule,
) -> Tensor:
    """Causal attention of rows ``[past, past + L)`` of one sequence over its cached tokens -> ``[H, L, D]``.

    Args:
        q_HLD: queries; their own K and V are in the cache already.
        pages_B: int64 pages of the sequence's first ``past + L`` tokens.
        read: gathers those tokens' K and V, ``[past + L, K, D]`` each, for the reference.
        k_cache, v_cache, scale, rule: as in `decode_attention`.
    """
    q_LHD = q_HLD.transpose(0, 1)
    triton = _triton_for(q_LHD, k_cache)
    if triton is not None:
        return triton.chunk(q_LHD, k_cache, v_cache, pages_B, past, scale, rule).transpose(0, 1)
    native = _native_prefill_for(q_LHD, k_cache)
    if native is not None:
        return native(q_LHD, k_cache, v_cache, pages_B, past, scale, rule).transpose(0, 1)
    k_PKD, v_PKD = read()
    return attention.span_attention(q_HLD, k_PKD.transpose(0, 1), v_PKD.transpose(0, 1), scale, rule)
