"""Random numbers without a generator: a hash of (seed, counter), so nothing needs to be shared or saved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream_seed(seed: int, choice_index: int) -> int:
    """The 64-bit stream of one choice: ``mix(mix(seed mod 2**64) + (choice_index + 1) * golden) mod 2**64``.

    mix is splitmix64's finaliser, golden its odd constant 0x9E3779B97F4A7C15.
    """
    return int(_hash64([seed % (1 << 64)], [choice_index])[0])


def uniforms(seeds: Sequence[int], counters: Sequence[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per (64-bit seed, counter): the top 53 bits of the same hash as in `stream_seed`."""
    return (_hash64(seeds, counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _hash64(seeds: Sequence[int], counters: Sequence[int]) -> npt.NDArray[np.uint64]:
    steps = np.array(counters, dtype=np.uint64) + np.uint64(1)
    return _mix64(_mix64(np.array(seeds, dtype=np.uint64)) + steps * _GOLDEN)


def _mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014); products wrap modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
