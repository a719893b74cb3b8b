"""The adapters of a step as the decoder stack in C reads them.

A slot's weights are looked up once, all modules together; a layout of segments is then a few operations on arrays, so
that a step whose rows come and go costs tens of microseconds, not a look-up per module and segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from loquetier.base.fused import FusedStack
from loquetier.base.linear import LinearGroup
from loquetier.kernels.gemm import AMX
from loquetier.kernels.native_smlm import LONG_FORWARD, usable_factor
from loquetier.kernels.native_stack import TILES_LINE, TILES_RANK, NativeStack, Pieces
from loquetier.kernels.reference import Factors, FactorTable, Segment

_SLOTS_KEPT = 256
_GEMMS = 4
"""Of a layer: q|k|v, o, gate|up, down."""


class _Site(NamedTuple):
    """An adapter's place in the stack: columns ``[first, first + width)`` of a GEMM whose rows are `k` wide."""

    module: int
    gemm: int
    first: int
    width: int
    k: int


@dataclass(frozen=True, slots=True)
class _Slot:
    """One adapter on all sites; rank 0 where it has none."""

    addresses: np.ndarray[Any, Any]
    """``[sites, 2]`` int64: of A and B."""
    ranks: np.ndarray[Any, Any]
    scales: np.ndarray[Any, Any]
    dtype: torch.dtype | None
    """None: no weights here at all."""


@dataclass(frozen=True, slots=True)
class StackCut:
    """The adapters of one layout of segments; the arrays keep alive what the addresses point to."""

    pieces: Pieces | None
    """None: C cannot take them."""
    arrays: tuple[np.ndarray[Any, Any], ...] = ()


class StackDeltas:
    """Cuts layouts for one stack. Slots' weights do not move, and slot numbers are never used twice."""

    def __init__(self, fused: FusedStack, native: NativeStack, level: int) -> None:
        self._native, self._tiles = native, level >= AMX
        self._sites = tuple(_sites(fused))
        self._num_gemms = _GEMMS * len(fused.layers)
        # gemm, (segments, scales, count,) first, width, k: the fields of `LqDelta`.
        fields = [(s.gemm, 0, 0, 0, s.first, s.width, s.k) for s in self._sites]
        self._fields = np.array(fields, np.int64).reshape(-1, 7)
        self._fits_lines = not (self._fields[:, 4:] % TILES_LINE).any()
        self._slots: dict[int, _Slot | None] = {}
        self._factors: FactorTable | None = None
        """The arena's table that `_slots` were read from."""

    def cut(self, segments: Sequence[Segment], factors: FactorTable) -> StackCut:
        """What these segments need; without pieces when C cannot read a weight, or torch is faster on a segment."""
        if factors is not self._factors:
            self._slots, self._factors = {}, factors
        live = [s for s in segments if s.stop > s.start]
        slots = [self._slot(s.slot, factors[s.slot]) for s in live]
        known = [slot for slot in slots if slot is not None]
        dtypes = {slot.dtype for slot in known} - {None}
        if len(known) < len(slots) or len(dtypes) > 1:
            return StackCut(None)
        dtype = dtypes.pop() if dtypes else torch.float32
        assert dtype is not None
        bounds_S2 = np.array([(s.start, s.stop) for s in live], np.int64).reshape(-1, 2)
        ranks_MS = np.array([slot.ranks for slot in known], np.int64).reshape(len(live), len(self._sites)).T
        if self._is_for_torch(ranks_MS, bounds_S2[:, 1] - bounds_S2[:, 0]):
            return StackCut(None)
        table_E7, scales_E = _entries(known, ranks_MS, bounds_S2)
        return self._cut(np.count_nonzero(ranks_MS, axis=1), table_E7, scales_E, dtype)

    def _is_for_torch(self, ranks_MS: np.ndarray[Any, Any], rows_S: np.ndarray[Any, Any]) -> bool:
        """A segment so long that torch's GEMMs are faster than the pieces, and that tiles cannot take."""
        if self._tiles and self._fits_lines and ranks_MS.max(initial=0) <= TILES_RANK:
            return False
        return bool((ranks_MS * rows_S > LONG_FORWARD).any())

    def _cut(
        self, counts_M: np.ndarray[Any, Any], table_E7: np.ndarray[Any, Any], scales_E: np.ndarray[Any, Any], dtype: Any
    ) -> StackCut:
        before_M = np.cumsum(counts_M) - counts_M
        deltas_M7 = self._fields.copy()
        deltas_M7[:, 1] = table_E7.ctypes.data + before_M * table_E7.itemsize * 7
        deltas_M7[:, 2] = scales_E.ctypes.data + before_M * scales_E.itemsize
        deltas_M7[:, 3] = counts_M
        deltas_D7 = np.ascontiguousarray(deltas_M7[counts_M > 0])
        pieces = self._native.cut(deltas_D7, self._num_gemms, dtype, tiles=self._tiles)
        return StackCut(pieces, (table_E7, scales_E))

    def _slot(self, number: int, factors: Mapping[int, Factors]) -> _Slot | None:
        """None: C cannot read a weight of it."""
        if number not in self._slots:
            if len(self._slots) >= _SLOTS_KEPT:
                del self._slots[next(iter(self._slots))]
            self._slots[number] = _read_slot(self._sites, factors)
        return self._slots[number]


def _sites(fused: FusedStack) -> list[_Site]:
    found: list[_Site] = []
    for i, layer in enumerate(fused.layers):
        groups: tuple[LinearGroup, ...] = (layer.qkv, layer.o, layer.gate_up, layer.down)
        for j, group in enumerate(groups):
            packed = group.gemm.packed
            assert packed is not None, "every GEMM of the stack has its packed copy"
            found += [_Site(m.module, _GEMMS * i + j, m.start, m.stop - m.start, packed.k) for m in group.adapted]
    return found


def _read_slot(sites: Sequence[_Site], factors: Mapping[int, Factors]) -> _Slot | None:
    addresses = np.zeros((len(sites), 2), np.int64)
    ranks, scales = np.zeros(len(sites), np.int64), np.zeros(len(sites))
    dtype: torch.dtype | None = None
    for i, site in enumerate(sites):
        found = factors.get(site.module)
        if found is None or not len(found.a_RK):
            continue
        dtype = dtype or found.a_RK.dtype
        if not (usable_factor(found.a_RK, dtype) and usable_factor(found.b_RN, dtype)):
            return None
        # C reads and writes where it is told to: these are this site's widths.
        assert found.a_RK.shape[1] == site.k and found.b_RN.shape == (len(found.a_RK), site.width)
        addresses[i] = found.a_RK.data_ptr(), found.b_RN.data_ptr()
        ranks[i], scales[i] = len(found.a_RK), found.scale
    return _Slot(addresses, ranks, scales, dtype)


def _entries(
    slots: Sequence[_Slot], ranks_MS: np.ndarray[Any, Any], bounds_S2: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """``a, b, grad a, grad b, rank, start, stop`` and scale of each segment on each site, site by site."""
    shape = (*ranks_MS.shape, 7)
    table_MS7 = np.zeros(shape, np.int64)
    scales_MS = np.zeros(ranks_MS.shape)
    for i, slot in enumerate(slots):
        table_MS7[:, i, :2], scales_MS[:, i] = slot.addresses, slot.scales
    table_MS7[..., 4], table_MS7[..., 5:] = ranks_MS, bounds_S2
    exists_MS = ranks_MS > 0
    return np.ascontiguousarray(table_MS7[exists_MS]), np.ascontiguousarray(scales_MS[exists_MS])
