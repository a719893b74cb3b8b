"""Write a PEFT adapter directory so that it is there completely or not at all, and gives the same bytes every time."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from loquetier.adapters.durable import fsync_directory, write_file
from loquetier.adapters.orientation import PeftTensors
from loquetier.adapters.peft_config import adapter_digest, render_config
from loquetier.adapters.peft_keys import expected_factors
from loquetier.adapters.safetensors_check import encode_header
from loquetier.adapters.spec import AdapterSpec, ModulePlan, matching_part, resolve_modules
from loquetier.errors import AdapterError, AdapterExistsError, AdapterMismatchError

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
TARGETS_METADATA: Final = "loquetier.target_modules"
"""Safetensors metadata key for a `target_modules` string, because the config must hold a list of names."""
TEMPLATE_METADATA: Final = "loquetier.template_fingerprint"
"""Safetensors metadata key for the chat template and tokenizer under which the adapter was trained. Here and not in
the config, whose keys every reader has an opinion about."""

_DTYPES: Final = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_adapter(
    directory: Path,
    *,
    spec: AdapterSpec,
    modules: tuple[ModulePlan, ...],
    factors: PeftTensors,
    base_name: str | None,
    overwrite: bool = False,
    template_fingerprint: str | None = None,
) -> str:
    """Write an adapter that PEFT, vLLM and SGLang load, and that `read_adapter` gives back unchanged.

    The files are made durable in a temporary sibling directory, which is then renamed. With `overwrite`, the old
    directory is renamed away first and put back if the new one cannot take its place; a power cut between the two
    renames leaves both under temporary names (``.NAME.tmp-*`` complete, ``.NAME.old-*``), never a mixture.

    Args:
        directory: where to write; its parent is made if missing.
        spec: the adapter's settings.
        modules: what `resolve_modules` gave for `spec`.
        factors: by path, the tensors of `Method.parts` in PEFT's shapes (LoRA: A ``[rank, in]``, B ``[out, rank]``),
            each float32, float16 or bfloat16, on any device.
        base_name: recorded as `base_model_name_or_path`.
        overwrite: replace `directory` if it holds an adapter and nothing else.
        template_fingerprint: kept beside the weights, if given; see `training.chat.template_fingerprint`.

    Returns:
        The adapter's digest, as `read_adapter` gives it.

    Raises:
        AdapterExistsError: `directory` exists, and may not be replaced.
        AdapterMismatchError: `spec` and `modules` disagree, or a tensor is missing, too many, or of the wrong shape.
        AdapterError: a tensor's dtype is not supported, or it is not finite.
        OSError: the disk is full or not writable; `directory` is as it was.
    """
    tensors = _named_tensors(spec, modules, factors)
    with new_directory(directory, overwrite) as temporary:
        metadata = {"format": "pt"}
        if isinstance(spec.target_modules, str):
            metadata[TARGETS_METADATA] = spec.target_modules
        if template_fingerprint is not None:
            metadata[TEMPLATE_METADATA] = template_fingerprint
        weights_sha256 = write_file(temporary / WEIGHTS_NAME, _encode(tensors, metadata))
        config = json.dumps(render_config(spec, modules, base_name), indent=2) + "\n"
        write_file(temporary / CONFIG_NAME, [config.encode("ascii")])
    return adapter_digest(weights_sha256, spec)


def _named_tensors(spec: AdapterSpec, modules: Sequence[ModulePlan], factors: PeftTensors) -> dict[str, Tensor]:
    """Every tensor by its PEFT name; raises whatever `read_adapter` would raise on reading it back."""
    targets = [plan.target for plan in modules]
    # Names of a spec may select linears that exclude_modules or the layer filter drops: only `modules` count here.
    if not modules or resolve_modules(matching_part(spec, targets), targets) != tuple(modules):
        raise AdapterMismatchError("modules are not what resolve_modules gives for this spec")
    if factors.keys() != {target.path for target in targets}:
        odd = sorted(factors.keys() ^ {target.path for target in targets})
        raise AdapterMismatchError(f"factors and modules name different linears: {', '.join(odd[:3])}")
    expected = expected_factors(modules)
    if sum(map(len, factors.values())) != len(expected):
        raise AdapterMismatchError(f"{sum(map(len, factors.values()))} tensors; these modules have {len(expected)}")
    found: dict[str, Tensor] = {}
    for name, key in expected.items():
        tensor = factors[key.path][key.number].detach()
        if tuple(tensor.shape) != key.shape:
            raise AdapterMismatchError(f"tensor {name}: shape {list(tensor.shape)}, expected {list(key.shape)}")
        if tensor.dtype not in _DTYPES:
            raise AdapterError(f"tensor {name}: dtype {tensor.dtype}; supported are float32, float16, bfloat16")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"tensor {name}: has NaN or infinite weights")
        found[name] = tensor
    return found


def _encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The safetensors file, one tensor at a time."""
    layout = {name: (_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    header, order = encode_header(layout, metadata)
    yield header
    for name in order:
        # Flat first: a tensor with one column is contiguous whatever its strides say, and could not be viewed as bytes.
        yield tensors[name].cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@contextmanager
def new_directory(directory: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling to write an adapter's files into, which becomes `directory` at the end, or else is removed.

    Raises:
        AdapterExistsError: `directory` exists, and may not be replaced.
        OSError: the disk is full or not writable; `directory` is as it was.
    """
    directory = Path(os.path.abspath(directory))
    check_place(directory, overwrite)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.tmp-{secrets.token_hex(8)}")
    temporary.mkdir()
    try:
        yield temporary
        fsync_directory(temporary)
        _move_into_place(temporary, directory, overwrite)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_place(directory: Path, overwrite: bool) -> None:
    """Whether an adapter may be written there. Raises AdapterExistsError."""
    if not os.path.lexists(directory):
        return
    if not overwrite:
        raise AdapterExistsError(f"{str(directory)!r} exists; choose another directory or pass overwrite=True")
    if directory.is_symlink() or not directory.is_dir():
        raise AdapterExistsError(f"{str(directory)!r} is not a directory, so it cannot be replaced by an adapter")
    # The whole directory is replaced, so anything else in it would be lost.
    with os.scandir(directory) as entries:
        other = next((entry.name for entry in entries if entry.name not in (CONFIG_NAME, WEIGHTS_NAME)), None)
    if other is not None:
        raise AdapterExistsError(f"{str(directory)!r} also holds {other!r}, which overwriting would delete")


def _move_into_place(temporary: Path, directory: Path, overwrite: bool) -> None:
    """Rename a complete, synced directory to where it belongs, durably."""
    old: Path | None = None
    if overwrite and os.path.lexists(directory):
        old = directory.with_name(f".{directory.name}.old-{secrets.token_hex(8)}")
        os.rename(directory, old)
    try:
        os.rename(temporary, directory)
    except BaseException:
        if old is not None:
            os.rename(old, directory)
        raise
    fsync_directory(directory.parent)
    if old is not None:
        shutil.rmtree(old)
