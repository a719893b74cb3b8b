"""A multipart body with one file, streamed to the disk: bounded in parts, fields, bytes and silence."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from loquetier.server.problems import ApiError, bad, too_slow
from loquetier.server.settings import ServerSettings
from loquetier.storage import FULL, out_of_room

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_PARTS: Final = 32
MAX_HEADER_BYTES: Final = 8192
"""Of one part."""
MAX_FIELD_BYTES: Final = 4096
"""Of a part that is no file."""
MAX_BOUNDARY: Final = 200
_OVERHEAD: Final = 1 << 18
"""Bytes of a body that are not the file's: fields and boundaries."""
_WRITE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Upload:
    """What came in."""

    fields: dict[str, str]
    filename: str
    """What the client calls it: data, never a path."""
    num_bytes: int
    sha256: str


async def receive(
    request: Request, settings: ServerSettings, target: Path, check_size: Callable[[int], None]
) -> Upload:
    """Stream the file of a multipart body into the new file `target`, synced when this returns.

    Args:
        check_size: called with the file's bytes so far, and those announced; raises ApiError for too many.

    Raises:
        ApiError: 415 no multipart, 413 too large, 408 silent, 400 malformed or without its file. ClientDisconnect.
        InsufficientStorageError: the disk is full. In every case `target` is gone.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= MAX_BOUNDARY:
        raise ApiError(415, "Content-Type must be multipart/form-data with a boundary", code="unsupported_media_type")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > _OVERHEAD:
        check_size(int(declared[:20]) - _OVERHEAD)
    try:
        with target.open("xb") as file:
            form = _Form(file, check_size)
            await _read(request, settings, boundary, form)
            await asyncio.to_thread(form.sync)
        return form.result()
    except BaseException as error:
        target.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise out_of_room(target.parent, _WRITE_BYTES) from error
        raise


async def _read(request: Request, settings: ServerSettings, boundary: bytes, form: _Form) -> None:
    parser = MultipartParser(boundary, form.callbacks())
    stream = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(settings.body_timeout):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise too_slow(f"nothing of the upload came for {settings.body_timeout:g} s") from None
        if chunk is None:
            break
        try:
            parser.write(chunk)
        except MultipartParseError as error:
            raise bad(f"the multipart body is malformed: {error}") from error
        if form.num_waiting >= _WRITE_BYTES:
            await asyncio.to_thread(form.flush)
    if not form.is_complete:
        raise bad("the multipart body ends before its last boundary")


@dataclass(slots=True)
class _Form:
    """The parser's callbacks: part after part, with bounds on each."""

    file: IO[bytes]
    check_size: Callable[[int], None]
    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    num_bytes: int = 0
    is_complete: bool = False
    _sha256: hashlib._Hash = field(default_factory=hashlib.sha256)
    _waiting: list[bytes] = field(default_factory=list)
    num_waiting: int = 0
    """Bytes of the file that are not written yet."""
    _num_parts: int = 0
    _header_bytes: int = 0
    _header: list[bytes] = field(default_factory=lambda: [b"", b""])
    _disposition: bytes = b""
    _name: str = ""
    _is_file: bool = False
    _value: bytearray = field(default_factory=bytearray)

    def callbacks(self) -> MultipartCallbacks:
        """For `MultipartParser`."""
        return {
            "on_part_begin": self._part_begin,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_header_field": lambda data, start, end: self._header_data(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._header_data(1, data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_end": self._end,
        }

    def _part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise ApiError(413, f"more than {MAX_PARTS} parts", code="request_too_large")
        self._header_bytes, self._disposition = 0, b""
        self._name, self._is_file = "", False
        self._value.clear()

    def _header_data(self, which: int, data: bytes) -> None:
        self._header_bytes += len(data)
        if self._header_bytes > MAX_HEADER_BYTES:
            raise ApiError(413, f"a part's headers have more than {MAX_HEADER_BYTES} bytes", code="request_too_large")
        self._header[which] += data

    def _header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = self._header[1]
        self._header = [b"", b""]

    def _headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not self._name:
            raise bad("each part needs `Content-Disposition: form-data` with a name")
        if self._name != "file":
            return
        if b"filename" not in options:
            raise bad("the part `file` has no filename: it must be a file", "file")
        if self.filename is not None:
            raise bad("there is more than one part `file`", "file")
        self._is_file = True
        self.filename = _shown(options[b"filename"])

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        part = data[start:end]
        if self._is_file:
            self.num_bytes += len(part)
            self.check_size(self.num_bytes)
            self._sha256.update(part)
            self._waiting.append(part)
            self.num_waiting += len(part)
            return
        self._value += part
        if len(self._value) > MAX_FIELD_BYTES:
            raise ApiError(413, f"{self._name[:64]!r} has more than {MAX_FIELD_BYTES} bytes", code="request_too_large")

    def _part_end(self) -> None:
        if self._is_file:
            return
        if self._name in self.fields:
            raise bad(f"there is more than one part {self._name[:64]!r}", self._name[:64])
        try:
            self.fields[self._name] = self._value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise bad(f"{self._name[:64]!r} is not UTF-8", self._name[:64]) from error

    def _end(self) -> None:
        self.is_complete = True

    def flush(self) -> None:
        """Write what waits; on a thread."""
        self.file.writelines(self._waiting)
        self._waiting.clear()
        self.num_waiting = 0

    def sync(self) -> None:
        """Write what waits and make the file durable; on a thread."""
        self.flush()
        self.file.flush()
        os.fsync(self.file.fileno())

    def result(self) -> Upload:
        """Raises ApiError: there was no file."""
        if self.filename is None:
            raise bad("the multipart body has no part `file`", "file", "missing_required_parameter")
        return Upload(self.fields, self.filename, self.num_bytes, self._sha256.hexdigest())


def _shown(name: bytes) -> str:
    """A file name as it is kept and shown: its last 255 characters, control characters replaced."""
    text = name.decode("utf-8", "replace")[-255:]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
