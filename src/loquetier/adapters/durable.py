"""Files that are on the disk when the call returns."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def write_file(path: Path, chunks: Iterable[bytes]) -> bytes:
    """Write a new file and make it durable. Returns the sha256 of its bytes."""
    sha256 = hashlib.sha256()
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)
            sha256.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    return sha256.digest()


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_durably(descriptor: int, data: bytes) -> None:
    """Add `data` to the end of a file and make it durable: all of it, or nothing where it fails (OSError)."""
    end = os.fstat(descriptor).st_size
    os.lseek(descriptor, end, os.SEEK_SET)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, end)
        raise
