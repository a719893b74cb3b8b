"""Read a PEFT adapter directory completely, or refuse it. `peft_write` is the other direction.

Everything is checked before memory is taken for it: config, header, names, shapes, size; then the weights' values.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from loquetier.adapters.peft_config import MAX_CONFIG_BYTES, PeftConfig, adapter_digest, parse_config
from loquetier.adapters.peft_keys import base_copy_name, check_tensors
from loquetier.adapters.peft_write import CONFIG_NAME, TARGETS_METADATA, TEMPLATE_METADATA, WEIGHTS_NAME, write_adapter
from loquetier.adapters.safetensors_check import Header, read_header
from loquetier.adapters.spec import AdapterSpec, LinearTarget, ModulePlan, matching_part, resolve_modules
from loquetier.errors import (
    AdapterError,
    AdapterMismatchError,
    AdapterNotFoundError,
    ConfigError,
    OutOfAdapterMemoryError,
    UnsupportedAdapterError,
)

__all__ = ["AdapterLayout", "AdapterWeights", "read_adapter", "read_layout", "write_adapter"]

_PICKLES: Final = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")


@dataclass(frozen=True)
class AdapterWeights:
    """One adapter as read from disk, on the CPU."""

    spec: AdapterSpec
    modules: tuple[ModulePlan, ...]
    """The adapted linears, ordered by index."""
    factors: Mapping[str, tuple[Tensor, ...]]
    """By `LinearTarget.path`, the tensors of `Method.parts` in PEFT's shapes, each float32, float16 or bfloat16 as
    stored. LoRA: A ``[rank, in]``, B ``[out, rank]``."""
    base_name: str | None
    """What the config says that the base was called where the adapter was made."""
    digest: str
    """sha256 (hex) of the weights file's bytes and the settings that decide what the adapter computes."""
    template_fingerprint: str | None = None
    """Of the chat template and tokenizer that it was trained under, if whoever wrote it said so."""
    ignored: tuple[str, ...] = ()
    """Keys of its config that are not PEFT's and have no effect here."""


@dataclass(frozen=True)
class AdapterLayout:
    """What an adapter is, without its weights."""

    spec: AdapterSpec
    modules: tuple[ModulePlan, ...]
    template_fingerprint: str | None = None


def read_layout(directory: Path, targets: Sequence[LinearTarget]) -> AdapterLayout:
    """`read_adapter` without reading the weights: config, header, names and shapes. Raises as that does."""
    with _open_regular(directory, CONFIG_NAME) as (file, size):
        if size > MAX_CONFIG_BYTES:
            raise AdapterError(f"{CONFIG_NAME} has {size} bytes; the limit is {MAX_CONFIG_BYTES}")
        config = parse_config(file.read(MAX_CONFIG_BYTES + 1))
    try:
        spec, modules = _resolve(config.spec, targets, allow_partial=False)
        with _open_regular(directory, WEIGHTS_NAME) as (file, size):
            header = read_header(file, size)
            check_tensors(header.tensors, modules, allow_partial=False)
    except ConfigError as error:
        raise AdapterError(f"{CONFIG_NAME}: {error}") from error
    return AdapterLayout(
        _original_targets(spec, modules, targets, header), modules, header.metadata.get(TEMPLATE_METADATA) or None
    )


def read_adapter(
    directory: Path,
    targets: Sequence[LinearTarget],
    *,
    base_names: Collection[str] = (),
    allow_partial: bool = False,
    base_weight: Callable[[str], Tensor] | None = None,
    max_bytes: int | None = None,
) -> AdapterWeights:
    """Read `adapter_config.json` and `adapter_model.safetensors` of a PEFT adapter: LoRA, DoRA or IA3.

    Args:
        directory: the adapter's directory. Only these two files in it are opened; they may be links to regular files.
        targets: every linear of the base that may be adapted.
        base_names: names that this base is known by. A different name in the config is no error, because paths differ
            between machines, but it is told when the adapter does not fit.
        allow_partial: take the part of the adapter that fits (and its spec narrowed to that part), if any does.
        base_weight: gives the base's own weight ``[out, in]`` at a path. PEFT stores a copy of it beside a LoRA on
            lm_head; such a file is refused unless the copy can be compared, because it might be a trained weight.
        max_bytes: most bytes of tensors that may be read.

    Raises:
        AdapterNotFoundError: the directory or a file in it does not exist.
        UnsupportedAdapterError: a PEFT feature that we do not honour, named; or weights that are not safetensors.
        AdapterMismatchError: the adapter does not fit this base; the message names the tensor or module.
        OutOfAdapterMemoryError: the tensors are larger than `max_bytes`.
        AdapterError: anything malformed, or weights that are not finite.
    """
    with _open_regular(directory, CONFIG_NAME) as (file, size):
        if size > MAX_CONFIG_BYTES:
            raise AdapterError(f"{CONFIG_NAME} has {size} bytes; the limit is {MAX_CONFIG_BYTES}")
        config = parse_config(file.read(MAX_CONFIG_BYTES + 1))
    _refuse_pickles(directory)
    try:
        spec, modules = _resolve(config.spec, targets, allow_partial)
        with _open_regular(directory, WEIGHTS_NAME) as (file, size):
            header = read_header(file, size)
            keys = check_tensors(header.tensors, modules, allow_partial=allow_partial)
            _check_budget(size - len(header.raw), max_bytes)
            blob = _read_all(file, size, header)
        tensors = _load(blob)
        _check_base_copies(tensors, modules, base_weight)
    except AdapterMismatchError as error:
        raise AdapterMismatchError(f"{error}{_base_hint(config, base_names)}") from error
    except ConfigError as error:
        raise AdapterError(f"{CONFIG_NAME}: {error}") from error
    _check_finite(tensors, keys)
    spec = _original_targets(spec, modules, targets, header)
    # `keys` has the tensors of each module in the order of its method's parts.
    factors = {
        path: tuple(tensors[name] for name, _ in group)
        for path, group in groupby(keys.items(), key=lambda item: item[1].path)
    }
    digest = adapter_digest(hashlib.sha256(blob).digest(), spec)
    template = header.metadata.get(TEMPLATE_METADATA) or None
    return AdapterWeights(spec, modules, factors, config.base_name, digest, template, config.ignored)


@contextmanager
def _open_regular(directory: Path, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file of the directory, and give its size. A FIFO or device is refused without waiting on it."""
    try:
        descriptor = os.open(directory / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise AdapterNotFoundError(f"No adapter found in {str(directory)!r}: {name} does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise AdapterError(f"cannot open {name} in {str(directory)!r}: {error}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise AdapterError(f"{name} in {str(directory)!r} is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file, status.st_size


def _refuse_pickles(directory: Path) -> None:
    if os.path.lexists(directory / WEIGHTS_NAME):
        return
    for name in _PICKLES:
        if os.path.lexists(directory / name):
            raise UnsupportedAdapterError(
                f"{name}: only safetensors is supported, because reading a pickle runs the code in it; "
                f"save the adapter as {WEIGHTS_NAME} (PEFT's default)"
            )


def _resolve(
    spec: AdapterSpec, targets: Sequence[LinearTarget], allow_partial: bool
) -> tuple[AdapterSpec, tuple[ModulePlan, ...]]:
    if allow_partial:
        spec = matching_part(spec, targets)
    return spec, resolve_modules(spec, targets)


def _check_budget(num_bytes: int, max_bytes: int | None) -> None:
    if max_bytes is not None and num_bytes > max_bytes:
        raise OutOfAdapterMemoryError(f"the adapter's tensors take {num_bytes} bytes; the limit is {max_bytes}")


def _read_all(file: BinaryIO, size: int, header: Header) -> bytes:
    """The whole file, which must still be the one whose header was checked."""
    file.seek(0)
    blob = file.read(size + 1)
    if len(blob) != size or not blob.startswith(header.raw):
        raise AdapterError(f"{WEIGHTS_NAME} changed while it was read; try again when nothing writes to it")
    return blob


def _load(blob: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(blob)
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{WEIGHTS_NAME}: {error}") from error


def _check_finite(tensors: Mapping[str, Tensor], names: Collection[str]) -> None:
    for name in names:
        finite = torch.isfinite(tensors[name])
        if not finite.all():
            bad = int(finite.numel() - finite.sum())
            raise AdapterError(f"tensor {name}: {bad} of {finite.numel()} weights are NaN or infinite")


def _check_base_copies(
    tensors: Mapping[str, Tensor], modules: Sequence[ModulePlan], base_weight: Callable[[str], Tensor] | None
) -> None:
    for plan in modules:
        name = base_copy_name(plan.target.path)
        if name not in tensors:
            continue
        if base_weight is None:
            raise UnsupportedAdapterError(
                f"tensor {name}: a copy of the base's weight, which cannot be compared here; "
                "save the adapter with save_embedding_layers=False"
            )
        if not _same_weight(tensors[name], base_weight(plan.target.path).cpu()):
            raise AdapterMismatchError(
                f"tensor {name}: differs from this base's weight: another base, or a trained or resized one"
            )


def _same_weight(copy: Tensor, base: Tensor) -> bool:
    """Equal bit for bit once both have the same dtype: a cast of one gives the other."""
    return torch.equal(copy.to(base.dtype), base) or torch.equal(copy, base.to(copy.dtype))


def _original_targets(
    spec: AdapterSpec, modules: tuple[ModulePlan, ...], targets: Sequence[LinearTarget], header: Header
) -> AdapterSpec:
    """`spec` with the string that `write_adapter` noted ("all-linear", a regex) in place of the list it wrote.

    The config stays the authority: a note that does not select exactly the same linears is out of date.
    """
    note = header.metadata.get(TARGETS_METADATA)
    if note is None:
        return spec
    try:
        original: AdapterSpec = replace(spec, target_modules=note)
        same = resolve_modules(original, targets) == modules
    except (ConfigError, AdapterMismatchError):
        return spec
    return original if same else spec


def _base_hint(config: PeftConfig, base_names: Collection[str]) -> str:
    if config.base_name is None or not base_names or config.base_name in base_names:
        return ""
    return f" (the adapter was made for {config.base_name[:200]!r}, this base is {next(iter(base_names))!r})"
