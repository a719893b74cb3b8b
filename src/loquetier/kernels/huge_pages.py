"""Large buffers on huge pages: on small ones a stream through memory is a third slower. Advice to the system only."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

from torch import Tensor

from loquetier.kernels.select import process_kernels

HUGE_PAGE = 2 << 20


def on_huge_pages(buffer: Tensor) -> Tensor:
    """`buffer`, for whose untouched memory huge pages were asked for: on a CPU, with the C library, from 4 MiB on."""
    library = process_kernels("cpu").library if buffer.is_cpu and buffer.nbytes >= 2 * HUGE_PAGE else None
    if library is not None:
        start = -buffer.data_ptr() % HUGE_PAGE
        num_bytes = (buffer.nbytes - start) // HUGE_PAGE * HUGE_PAGE
        library.function("lq_advise_huge", c_void_p, c_int64)(buffer.data_ptr() + start, num_bytes)
    return buffer
