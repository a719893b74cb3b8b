"""A safetensors file's header, checked before any byte of data is read; and the same format written deterministically.

Format: 8 bytes header length (little endian), a JSON object of that length, then the tensors' bytes. Stricter than
the format asks: a bounded header, no duplicate keys, no empty tensors, only the dtypes of adapters, and data that is
covered by the tensors without gap, overlap or rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

from loquetier.errors import AdapterError, UnsupportedAdapterError

MAX_HEADER_BYTES: Final = 4 << 20
"""Room for about 17,000 adapted linears."""
ITEM_BYTES: Final[Mapping[str, int]] = {"F32": 4, "F16": 2, "BF16": 2}
MAX_DIM: Final = 1 << 48
_ENTRY_KEYS: Final = frozenset({"dtype", "shape", "data_offsets"})


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies and what it is."""

    dtype: str
    """"F32", "F16" or "BF16"."""
    shape: tuple[int, ...]
    start: int
    """Bytes from the start of the data, which follows the header."""
    end: int

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header."""

    raw: bytes
    """The file's first bytes, length field included; the data begin after them."""
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(file: BinaryIO, file_size: int) -> Header:
    """Read and check the header of the safetensors file that `file` is at the start of.

    Raises:
        UnsupportedAdapterError: a tensor has a dtype other than F32, F16, BF16.
        AdapterError: anything else is not exactly as it should be.
    """
    length_field = file.read(8)
    if len(length_field) < 8:
        raise AdapterError(f"safetensors: the file has {file_size} bytes; the header length alone takes 8")
    length = int.from_bytes(length_field, "little")
    if length > MAX_HEADER_BYTES:
        raise AdapterError(f"safetensors: the header is said to have {length} bytes; the limit is {MAX_HEADER_BYTES}")
    if 8 + length > file_size:
        raise AdapterError(f"safetensors: the header is said to have {length} bytes in a file of {file_size}")
    text = file.read(length)
    if len(text) < length or not text.startswith(b"{"):
        raise AdapterError("safetensors: the header is not a JSON object")
    fields = parse_json_object(text, "safetensors header")
    metadata = _metadata(fields.pop("__metadata__", {}))
    tensors = {name: _entry(name, value) for name, value in fields.items()}
    _check_layout(tensors, file_size - 8 - length)
    return Header(length_field + text, tensors, metadata)


def parse_json_object(text: bytes, what: str) -> dict[str, Any]:
    """Parse one JSON object strictly: UTF-8, no duplicate keys, no NaN or Infinity.

    Raises:
        AdapterError: `text` is anything else; the message begins with `what`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"duplicate key {name[:100]!r}")
            found[name] = value
        return found

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except RecursionError as error:
        raise AdapterError(f"{what}: nested too deeply") from error
    except ValueError as error:
        raise AdapterError(f"{what}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{what}: must be a JSON object, not {type(value).__name__}")
    return value


def encode_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, tuple[str, ...]]:
    """The header for these tensors (name -> dtype, shape), and the names in the order in which their data must follow.

    Own code because the safetensors library orders metadata at random: the same adapter must give the same bytes, and
    so the same digest, in every process.
    """
    # Wider types first keeps every tensor aligned to its own size.
    order = tuple(sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name][0]], name)))
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        dtype, shape = tensors[name]
        end = offset + ITEM_BYTES[dtype] * math.prod(shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode("ascii")
    # Spaces up to a multiple of 8 bytes: the data begin aligned.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def _metadata(value: object) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise AdapterError("safetensors header: __metadata__ must map strings to strings")
    return value


def _entry(name: str, value: object) -> TensorEntry:
    label = f"safetensors tensor {name[:200]!r}"
    if not isinstance(value, dict) or value.keys() != _ENTRY_KEYS:
        raise AdapterError(f"{label}: must have exactly the fields {', '.join(sorted(_ENTRY_KEYS))}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UnsupportedAdapterError(f"{label}: dtype {str(dtype)[:20]!r}; supported are {', '.join(ITEM_BYTES)}")
    if not _is_int_list(shape) or not all(1 <= dim <= MAX_DIM for dim in shape) or len(shape) > 8:
        raise AdapterError(f"{label}: shape {str(shape)[:100]} must be a list of at most 8 positive integers")
    if not _is_int_list(offsets) or len(offsets) != 2 or not 0 <= offsets[0] < offsets[1]:
        raise AdapterError(f"{label}: data_offsets {str(offsets)[:100]} must be [start, end] with 0 <= start < end")
    start, end = offsets
    expected = ITEM_BYTES[dtype] * math.prod(shape)
    if end - start != expected:
        raise AdapterError(f"{label}: {dtype} {shape} takes {expected} bytes, data_offsets give {end - start}")
    return TensorEntry(dtype, tuple(shape), start, end)


def _is_int_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)


def _check_layout(tensors: Mapping[str, TensorEntry], data_size: int) -> None:
    """Raise AdapterError unless the tensors cover the data exactly, each byte once."""
    offset = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].start):
        if entry.start != offset:
            problem = "overlaps the tensor before it" if entry.start < offset else "leaves a hole before it"
            raise AdapterError(f"safetensors tensor {name[:200]!r}: starts at {entry.start}, not {offset}: {problem}")
        offset = entry.end
    if offset != data_size:
        problem = "the file is cut short" if offset > data_size else "bytes are left over"
        raise AdapterError(f"safetensors: tensors take {offset} bytes, the file holds {data_size}: {problem}")
