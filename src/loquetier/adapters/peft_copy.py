"""Copy an adapter's PEFT directory, whole and checked, or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from loquetier.adapters.durable import write_file
from loquetier.adapters.peft_config import adapter_digest, parse_config
from loquetier.adapters.peft_write import CONFIG_NAME, TARGETS_METADATA, WEIGHTS_NAME, new_directory
from loquetier.adapters.safetensors_check import read_header
from loquetier.errors import AdapterError, AdapterNotFoundError

_CHUNK = 1 << 20


def copy_adapter(source: Path, directory: Path, digest: str, *, overwrite: bool = False) -> None:
    """Copy the two files of an adapter whose digest is known. Needs no base: tensors are not looked at.

    Raises:
        AdapterExistsError: `directory` exists, and may not be replaced.
        AdapterNotFoundError: `source` is gone. AdapterError: it has another digest, so it is damaged.
        OSError: the disk is full or not writable. In every case `directory` is as it was.
    """
    with new_directory(directory, overwrite) as temporary:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            write_file(temporary / name, _chunks(source / name))
        if digest not in _digests(temporary):
            raise AdapterError(
                f"{str(source)!r} is damaged: its digest is not {digest[:16]}..., as it was when written"
            )


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise AdapterNotFoundError(f"{str(path)!r} does not exist (any more)") from error
    with file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _digests(directory: Path) -> set[str]:
    """What `read_adapter` may give for it: it prefers a note of the targets that were asked for, where that fits."""
    spec = parse_config((directory / CONFIG_NAME).read_bytes()).spec
    weights = directory / WEIGHTS_NAME
    with weights.open("rb") as file:
        note = read_header(file, weights.stat().st_size).metadata.get(TARGETS_METADATA)
        file.seek(0)
        content = hashlib.file_digest(file, "sha256").digest()
    specs = [spec] if note is None else [spec, replace(spec, target_modules=note)]
    return {adapter_digest(content, one) for one in specs}
