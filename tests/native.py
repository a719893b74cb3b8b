"""The C library for tests: compiled once per run, any variant that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from loquetier.kernels.build import BuildError, built_library
from loquetier.kernels.native import NativeLibrary


@contextmanager
def native_library(isa: str) -> Iterator[NativeLibrary]:
    """The library running `isa`; skips where machine or compiler lack it. The process's own variant comes back."""
    try:
        path = built_library().path
        library = NativeLibrary(path, isa)
    except BuildError as error:
        pytest.skip(str(error))
    try:
        yield library
    finally:
        NativeLibrary(path)
