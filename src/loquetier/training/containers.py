"""The bytes of a training file, decompressed within bounds. What a file is, its first bytes tell, never its name."""

from __future__ import annotations

import gzip
import importlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from loquetier.errors import DataError

Container = Literal["plain", "gzip", "zstd", "parquet"]

_MAGIC: tuple[tuple[bytes, Container], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PAR1", "parquet"),
)
_CHUNK = 1 << 16
_RATIO_FREE_BYTES = 64 << 20
"""Below this, any ratio is fine: a small file of repeated lines compresses a thousandfold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileLimits:
    """What a training file may cost before it is refused."""

    max_bytes: int = 2 << 30
    """Bytes after decompression."""
    max_ratio: float = 200.0
    """Decompressed per compressed bytes, once 64 MiB are out. Text seldom passes 20; a bomb has 1000."""
    max_line_bytes: int = 16 << 20
    """Bytes of one line, CSV field or table row."""
    max_lines: int = 10_000_000
    """Lines (blank ones too), table rows or array elements: even an empty record costs memory and time."""
    max_document_bytes: int = 128 << 20
    """Bytes of a JSON array, which is held as a whole; JSON lines are not."""


def detect_container(path: Path) -> Container:
    """Container by magic bytes. Raises DataError if the file cannot be read."""
    with open_file(path) as file:
        head = file.read(4)
    return next((name for magic, name in _MAGIC if head.startswith(magic)), "plain")


@contextmanager
def open_file(path: Path) -> Iterator[IO[bytes]]:
    """The file, open for reading; whatever the system says against it is a DataError."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def read_chunks(path: Path, container: Container, limits: FileLimits) -> Iterator[bytes]:
    """The decompressed bytes of a plain, gzip or zstd file in pieces of at most 64 KiB.

    Raises:
        DataError: unreadable, damaged or cut off, or larger than `limits` allow.
    """
    size, packed = 0, 0
    for chunk in _READERS[container](path):
        packed = packed or path.stat().st_size
        size += len(chunk)
        if size > limits.max_bytes:
            raise DataError(
                f"{path} has more than {limits.max_bytes} bytes after decompression, the limit; split the file"
            )
        if container != "plain" and size > max(_RATIO_FREE_BYTES, limits.max_ratio * packed):
            raise DataError(
                f"{path} unpacks to more than {limits.max_ratio:g} times its {packed} bytes, as decompression bombs "
                "do; if it is real data, unpack it first"
            )
        yield chunk


def import_pyarrow(what: str) -> Any:
    """pyarrow's module `what`, or a DataError that says how to get it."""
    try:
        return importlib.import_module(what)
    except ImportError as error:
        raise DataError(
            "parquet and zstd files need pyarrow, which is not installed: run `pip install 'loquetier[data]'`, or "
            "give the data as .jsonl or .jsonl.gz"
        ) from error


def _plain(path: Path) -> Iterator[bytes]:
    with open_file(path) as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _gunzip(path: Path) -> Iterator[bytes]:
    with open_file(path) as file, gzip.GzipFile(fileobj=file) as stream:
        try:
            while chunk := stream.read(_CHUNK):
                yield chunk
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} is a damaged or cut off gzip file: {error}") from error


def _unzstd(path: Path) -> Iterator[bytes]:
    arrow = import_pyarrow("pyarrow")
    # memory_map is no option: the file may be cut while it is read.
    with open_file(path) as file:
        try:
            stream = arrow.CompressedInputStream(arrow.PythonFile(file, mode="r"), "zstd")
            while chunk := stream.read(_CHUNK):
                yield bytes(chunk)
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"{path} is a damaged or cut off zstd file: {error}") from error


_READERS: dict[Container, Callable[[Path], Iterator[bytes]]] = {"plain": _plain, "gzip": _gunzip, "zstd": _unzstd}
