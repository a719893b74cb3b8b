"""Where adapters' weights lie, as SMLM's Triton kernels read it from device memory. Sent when a slot is first used.

Imports no Triton.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from loquetier.kernels.mixing import module_hash
from loquetier.kernels.reference import Factors, FactorTable
from loquetier.kernels.transfer import to_device

Int64s = npt.NDArray[np.int64]
WORDS: Final = 8
"""Per slot and module: address of A, of B, rank, scale's bits, addresses of their gradients, module's hash, unused."""
A, B, RANK, SCALE, GRAD_A, GRAD_B, HASH = range(7)
TILE_WORDS: Final = 5
"""Per tile: row of the table, first row, rows, dropout threshold, bits of dropout's part of the scale."""
PADDING: Final = -1
"""Table row of a tile that does nothing."""
KEEP_ALL: Final = -(1 << 31)
"""Threshold under which no hash lies."""
_FIRST_SLOTS, _ALIGNED = 64, 16


def float_bits(value: float) -> int:
    """The bits of a float32."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


ONE_BITS: Final = float_bits(1.0)


def words_of(module: int, factors: Factors, grads: Factors | None) -> list[int]:
    """The entry of one adapter on one module. Gradients must be float32, every factor without gaps."""
    a_RK, b_RN, scale = factors
    assert a_RK.is_contiguous() and b_RN.is_contiguous() and a_RK.dtype == b_RN.dtype and len(a_RK) == len(b_RN)
    at = [0, 0]
    if grads is not None:
        for own, grad in ((a_RK, grads.a_RK), (b_RN, grads.b_RN)):
            assert grad.is_contiguous() and grad.dtype == torch.float32 and grad.shape == own.shape
        at = [grads.a_RK.data_ptr(), grads.b_RN.data_ptr()]
    return [a_RK.data_ptr(), b_RN.data_ptr(), len(a_RK), float_bits(scale), *at, module_hash(module), 0]


class SlotTable:
    """``int64 [slots, modules, WORDS]`` on the device. A slot's weights do not move and its number is never reused.

    It grows when it is full of slots in use; `tensor` is then another one (`generation` counts that), so what captured
    its address must be captured again.
    """

    def __init__(self, device: torch.device, num_modules: int = 0) -> None:
        self.device, self.generation = device, 0
        self._host = np.zeros((_FIRST_SLOTS, num_modules, WORDS), dtype=np.int64)
        self.tensor = to_device(self._host.copy(), device)
        self._rows: dict[int, int] = {}
        self._kinds: dict[int, dict[str, Any]] = {}

    @property
    def stride(self) -> int:
        """Elements from a slot to the next."""
        return self._host.shape[1] * WORDS

    def rows_of(self, slots: Sequence[int], table: FactorTable) -> dict[int, int]:
        """The row of each slot; new ones are read from `table` and sent. A slot without modules gets an empty row."""
        new = [s for s in dict.fromkeys(slots) if s not in self._rows]
        if new:
            self._make_room(new, table)
            for slot in new:
                self._add(slot, table[slot])
        return {slot: self._rows[slot] for slot in slots}

    def _make_room(self, new: Sequence[int], table: FactorTable) -> None:
        for slot in [s for s in self._rows if s not in table]:
            self._forget(slot)
        slots, modules, _ = self._host.shape
        needed = 1 + max((m for s in new for m in table[s]), default=-1)
        if needed <= modules and len(self._rows) + len(new) <= slots:
            return
        while slots < len(self._rows) + len(new):
            slots *= 2
        grown = np.zeros((slots, max(modules, needed), WORDS), dtype=np.int64)
        grown[: len(self._host), :modules] = self._host
        self._host = grown
        self.tensor = to_device(grown.copy(), self.device)
        self.generation += 1

    def _forget(self, slot: int) -> None:
        del self._rows[slot], self._kinds[slot]

    def _add(self, slot: int, modules: Mapping[int, Factors]) -> None:
        used = set(self._rows.values())
        row = next(r for r in range(len(self._host)) if r not in used)
        own = self._host[row]
        own[:] = 0
        for module, factors in modules.items():
            own[module] = words_of(module, factors, None)
        self._rows[slot] = row
        self._kinds[slot] = common(modules.values())
        self.tensor[row].copy_(to_device(own.copy(), self.device))

    def common(self, slots: Iterable[int]) -> dict[str, Any]:
        """What a layout must know of its slots' weights together."""
        kinds = [kind for s in slots if (kind := self._kinds[s])]
        assert len({k["weights"] for k in kinds}) == 1, "an arena has one dtype"
        return {
            "rank": max(k["rank"] for k in kinds),
            "aligned": all(k["aligned"] for k in kinds),
            "weights": kinds[0]["weights"],
        }

    def set_gradients(self, slot: int, grads: Mapping[int, Factors]) -> None:
        """Tell where a slot's gradients lie; sends the row again only if they lie elsewhere than last time."""
        own = self._host[self._rows[slot]]
        first = next(iter(grads), None)
        if first is None or own[first, GRAD_A] == grads[first].a_RK.data_ptr():
            return
        for module, (a_RK, b_RN, _) in grads.items():
            own[module, GRAD_A], own[module, GRAD_B] = a_RK.data_ptr(), b_RN.data_ptr()
        self.tensor[self._rows[slot]].copy_(to_device(own.copy(), self.device))


def common(found: Iterable[Factors]) -> dict[str, Any]:
    """Largest rank, whether everything is aligned, and the type of some factors; empty for none."""
    found = tuple(found)
    return (
        {
            "rank": max(len(f.a_RK) for f in found),
            "aligned": all(_is_aligned(f) for f in found),
            "weights": found[0].a_RK.dtype,
        }
        if found
        else {}
    )


def _is_aligned(factors: Factors) -> bool:
    return all(
        f.data_ptr() % _ALIGNED == 0 and f.shape[1] * f.element_size() % _ALIGNED == 0
        for f in (factors.a_RK, factors.b_RN)
    )
