"""Small tensors from the host's lists, and keys that order a row of logits without ties."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from loquetier.kernels.transfer import to_device

_CHUNK_ELEMENTS = 1 << 22
"""Logits per chunk of the sorting and drawing stages: bounds their 8-byte temporaries to 32 MiB each."""
_LOW_32 = (1 << 32) - 1


def index_of(rows: Sequence[int], like: Tensor) -> Tensor:
    return ids_of(rows, like.device)


def ids_of(values: Iterable[int], device: torch.device | str) -> Tensor:
    return to_device(np.fromiter(values, dtype=np.int64), torch.device(device))


def column_of(values: Sequence[float], like: Tensor) -> Tensor:
    on_host = torch.tensor(values, dtype=torch.float32, device="cpu")  # not numpy: it warns where a penalty overflows
    return to_device(on_host.numpy(), like.device)[:, None]


def chunks_of(rows: int, vocab: int) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // vocab)
    return [slice(start, start + step) for start in range(0, rows, step)]


def ordered_keys(x_MV: Tensor) -> Tensor:
    """int64 keys that order a row by value, ties by smaller token id first: no two tokens compare equal.

    A plain topk leaves the order of ties to its implementation, which may differ with the batch's shape.
    """
    bits_MV = (x_MV.float() + 0.0).contiguous().view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    # IEEE floats order like sign-magnitude integers; flipping the lower bits of negatives makes it two's complement.
    ordered_MV = bits_MV ^ ((bits_MV >> 31) & 0x7FFFFFFF)
    ids_V = torch.arange(x_MV.shape[1], device=x_MV.device)
    return (ordered_MV.to(torch.int64) << 32) | (_LOW_32 - ids_V)


def key_ids(keys: Tensor) -> Tensor:
    return _LOW_32 - (keys & _LOW_32)
