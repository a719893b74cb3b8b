"""SplitMix64's finalizer (Steele et al. 2014): the hash behind everything that must be chance and repeatable."""

from __future__ import annotations

from typing import Final

WORD: Final = (1 << 64) - 1
GOLDEN: Final = 0x9E3779B97F4A7C15
MIX_1: Final = 0xBF58476D1CE4E5B9
MIX_2: Final = 0x94D049BB133111EB


def mix_int(z: int) -> int:
    """A 64-bit word, well mixed."""
    z &= WORD
    z = ((z ^ (z >> 30)) * MIX_1) & WORD
    z = ((z ^ (z >> 27)) * MIX_2) & WORD
    return z ^ (z >> 31)


def signed(word: int) -> int:
    """The int64 with the same bits: torch's and numpy's integers are signed."""
    return word - (1 << 64) if word >> 63 else word


def module_hash(module: int) -> int:
    """What a module's index adds to the keys of its dropout mask, as int64."""
    return signed(mix_int(module + GOLDEN))


def drop_threshold(rate: float) -> int:
    """Values whose 32 hash bits, as int32, are below this are dropped."""
    return min(round(rate * 2**32), 2**32 - 1) - 2**31
