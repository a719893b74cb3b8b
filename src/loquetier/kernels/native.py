"""The C library in this process: loaded with ctypes, on torch's own threads.

Calls release the GIL. Pointers come from tensors that the caller keeps alive for the call's duration; nothing in C
keeps one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loquetier.kernels.build import BuildError, source_hash

ISA_NAMES = ("generic", "avx2", "avx512")
"""By the number that C uses."""
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
"""As in loquetier.h; other dtypes run on the reference."""


class NativeLibrary:
    """One loaded library.

    Args:
        path: the shared library.
        isa: the variant to run, of ISA_NAMES; None = the best that this machine has.

    Raises:
        BuildError: it cannot be loaded, was built from other sources, or the machine lacks `isa`.
    """

    def __init__(self, path: Path, isa: str | None = None) -> None:
        try:
            self._lib = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"{path.name} cannot be loaded: {error}") from error
        self._lib.lq_source_hash.restype = ctypes.c_char_p
        if self._lib.lq_source_hash() != source_hash().encode():
            raise BuildError(f"{path.name} was built from other sources than this package's: rebuild or remove it")
        pool = _torch_parallel_for()
        self.threads = "torch's pool" if pool else "one thread: this torch exports no torch_parallel_for"
        self._lib.lq_init.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
        teams = "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()
        found = self._lib.lq_init(pool, -1 if isa is None else ISA_NAMES.index(isa), teams)
        if found < 0:
            raise BuildError(f"this machine has no {isa}")
        self.isa = ISA_NAMES[found]
        """The variant that runs. One per process: a second library object of the same file changes it for both."""

    def function(self, name: str, *argtypes: Any, restype: Any = None) -> Callable[..., Any]:
        """The C function ``restype name(argtypes...)``, typed, so that Python's integers reach it as they are."""
        found = self._lib[name]  # a new object each time: two callers cannot disagree about its types
        found.argtypes, found.restype = argtypes, restype
        return found


def _torch_parallel_for() -> int | None:
    """Address of libtorch_cpu's C symbol of that name (torch 2.10 and newer); None where there is none."""
    directory = Path(torch.__file__).parent / "lib"
    for suffix in (".so", ".dylib"):
        library = directory / f"libtorch_cpu{suffix}"
        if library.is_file():
            symbol = getattr(ctypes.CDLL(str(library)), "torch_parallel_for", None)
            return None if symbol is None else ctypes.cast(symbol, ctypes.c_void_p).value
    return None
