"""The paged KV cache: one K and one V tensor per layer, ``[pages, page_size, kv heads, head size]``."""

from __future__ import annotations

import torch
from torch import Tensor

TRASH_PAGE = 0
"""Never allocated: padding of page tables points here."""


class KVCache:
    """Storage only; who owns which page is `engine.blocks`' business."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        shape = (num_pages + 1, page_size, kv_heads, head_dim)  # + 1: the trash page
        # Uninitialised memory costs a CPU nothing until a page is used. Pages are cleared before their first token
        # (see `clear`), the trash page is here: masked keys are multiplied by zero weights, and 0 * NaN would be NaN.
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        for layer in (*self.keys, *self.values):
            layer[TRASH_PAGE].zero_()

    def clear(self, layer: int, pages_F: Tensor) -> None:
        """Zero pages before their first token is written: what another sequence left there, NaN say, must not count."""
        self.keys[layer].index_fill_(0, pages_F, 0)
        self.values[layer].index_fill_(0, pages_F, 0)

    def write(self, layer: int, rows_M: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> None:
        """Store K and V of M tokens at flat positions ``page * page_size + offset`` (``rows_M``, int64)."""
        self.keys[layer].flatten(0, 1).index_copy_(0, rows_M, k_MKD)
        self.values[layer].flatten(0, 1).index_copy_(0, rows_M, v_MKD)

    def read(self, layer: int, pages_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """K and V of one sequence's first `length` tokens, ``[length, K, D]`` each (a copy)."""
        k, v = (c[layer].index_select(0, pages_B).flatten(0, 1)[:length] for c in (self.keys, self.values))
        return k, v

    @staticmethod
    def page_bytes(num_layers: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one page over all layers, K and V together."""
        return 2 * num_layers * page_size * kv_heads * head_dim * torch.empty((), dtype=dtype).element_size()
