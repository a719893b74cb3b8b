"""One checkpoint of a job: a directory that is there completely or not at all, and that says when it is damaged.

    adapter_config.json, adapter_model.safetensors   float32 master weights, as stock PEFT loads them
    optimizer.safetensors                            Adam's moments and the gradient accumulated so far, flat
    trainer_state.json                               everything else, with the digest of every file

A job draws from no global random generator: its seed, its place in the data and its step are all that chance needs.
The examples are not stored, only their digest: who resumes brings the same data.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor

import loquetier
from loquetier.adapters.arena import num_elements
from loquetier.adapters.durable import fsync_directory, write_file
from loquetier.adapters.orientation import PeftTensors, from_peft, to_peft
from loquetier.adapters.peft_io import read_adapter
from loquetier.adapters.peft_write import CONFIG_NAME, WEIGHTS_NAME, write_adapter
from loquetier.adapters.spec import AdapterSpec, LinearTarget, ModulePlan, resolve_modules
from loquetier.config import TrainingConfig
from loquetier.errors import AdapterError, AdapterMismatchError, CheckpointError, ConfigError
from loquetier.failpoints import FailPoint, no_fail_point
from loquetier.training.checkpoint_state import (
    DataDigest,
    canonical,
    decode_image,
    decode_spec,
    differences,
    encode_image,
    encode_spec,
)
from loquetier.training.example import Example
from loquetier.training.job import JobImage

STATE_NAME: Final = "trainer_state.json"
OPTIMIZER_NAME: Final = "optimizer.safetensors"
FORMAT: Final = 1
_FILES: Final = (CONFIG_NAME, WEIGHTS_NAME, OPTIMIZER_NAME)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobIdentity:
    """What a job must share with a checkpoint to go on from it."""

    name: str
    spec: AdapterSpec
    config: TrainingConfig
    data: DataDigest
    base_fingerprint: str
    template_fingerprint: str | None = None
    """Not compared as the rest is: what it decides is in the data's digest. A difference is told."""


def write_checkpoint(
    directory: Path,
    image: JobImage,
    modules: tuple[ModulePlan, ...],
    *,
    base_name: str,
    base_fingerprint: str,
    data: DataDigest,
    fail_point: FailPoint = no_fail_point,
    template_fingerprint: str | None = None,
) -> None:
    """Write a new checkpoint: files made durable in a temporary sibling, which is then renamed.

    Args:
        modules: what `resolve_modules` gives for the image's spec.
        data: of the image's examples; it is asked for because hashing them takes time, and they never change.

    Raises:
        CheckpointError: `directory` exists. AdapterError: the weights are not finite.
        OSError: the disk is full or not writable. In every case nothing is left behind.
    """
    if os.path.lexists(directory):
        raise CheckpointError(f"{str(directory)!r} exists; a checkpoint never replaces anything")
    temporary = directory.with_name(f".{directory.name}.tmp-{secrets.token_hex(8)}")
    fail_point("checkpoint.before_write")
    try:
        factors = to_peft(image.master, modules)
        write_adapter(
            temporary,
            spec=image.spec,
            modules=modules,
            factors=factors,
            base_name=base_name,
            template_fingerprint=template_fingerprint,
        )
        fail_point("checkpoint.after_weights")
        tensors = {"grad": image.grad} | {f"moments.{name}": tensor for name, tensor in image.moments.items()}
        write_file(temporary / OPTIMIZER_NAME, [safetensors.torch.save(tensors)])
        fail_point("checkpoint.after_optimizer")
        state = {
            "format": FORMAT,
            "job": encode_image(image),
            "data": asdict(data),
            "base": {"name": base_name, "fingerprint": base_fingerprint},
            "environment": environment(),
            "files": {name: _sha256(temporary / name) for name in _FILES},
        }
        text = json.dumps({"sha256": _state_digest(state), "state": state}, indent=1, allow_nan=False)
        write_file(temporary / STATE_NAME, [text.encode("ascii"), b"\n"])
        fsync_directory(temporary)
        fail_point("checkpoint.before_rename")
        os.rename(temporary, directory)
        fsync_directory(directory.parent)
        fail_point("checkpoint.after_rename")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def checkpoint_bytes(modules: tuple[ModulePlan, ...], num_steps: int) -> int:
    """Bytes on the disk, at most, of one checkpoint after so many steps: weights, gradient, two moments, history."""
    return 4 * 4 * num_elements(modules) + 512 * (num_steps + len(modules)) + (1 << 16)


def environment() -> dict[str, Any]:
    """What a bit-exact resume must not change: versions, machine type, threads."""
    return {
        "loquetier": loquetier.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def read_checkpoint(
    directory: Path,
    targets: Sequence[LinearTarget],
    identity: JobIdentity,
    examples: tuple[Example, ...],
    eval_examples: tuple[Example, ...],
) -> tuple[JobImage, list[str]]:
    """Read a checkpoint back, completely checked.

    Returns:
        The image, and what differs in the environment: with a difference, equal bits are not promised.

    Raises:
        CheckpointError: torn, corrupted, or of an unknown format: an older one may be good.
        ConfigError: it belongs to a job with other settings, data or base; every difference is named.
    """
    state = _verified_state(directory)
    _check_identity(directory, state, identity)
    try:
        spec = decode_spec(state["job"]["spec"])
        weights = read_adapter(directory, targets)
        tensors = safetensors.torch.load((directory / OPTIMIZER_NAME).read_bytes())
        modules = resolve_modules(spec, targets)
        image = decode_image(
            state["job"],
            examples=examples,
            eval_examples=eval_examples,
            master=_flat(weights.factors, modules),
            grad=tensors.pop("grad"),
            moments={name.removeprefix("moments."): tensor for name, tensor in tensors.items()},
        )
    except (AdapterError, KeyError, OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"checkpoint {str(directory)!r}: {error}") from error
    changed = differences("environment", environment(), state["environment"])
    now, then = identity.template_fingerprint, weights.template_fingerprint
    if now is not None and then is not None:
        changed += differences("base", {"template_fingerprint": now}, {"template_fingerprint": then})
    return image, changed


def _verified_state(directory: Path) -> dict[str, Any]:
    """The state of a checkpoint all of whose bytes are those that were written."""
    label = f"checkpoint {str(directory)!r}"
    try:
        outer = json.loads((directory / STATE_NAME).read_bytes())
        state: dict[str, Any] = outer["state"]
        if outer["sha256"] != _state_digest(state):
            raise CheckpointError(f"{label}: {STATE_NAME} does not have the digest that it names: it is damaged")
        if state["format"] != FORMAT:
            raise CheckpointError(f"{label}: format {state['format']!r}; this version reads format {FORMAT}")
        for name in _FILES:
            if _sha256(directory / name) != state["files"][name]:
                raise CheckpointError(f"{label}: {name} does not have the digest it was written with: it is damaged")
    except OSError as error:
        raise CheckpointError(f"{label}: {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{label}: {STATE_NAME} cannot be read ({error}): it is damaged") from error
    return state


def _check_identity(directory: Path, state: Mapping[str, Any], identity: JobIdentity) -> None:
    job = state["job"]
    found = differences("job", {"name": identity.name}, {"name": job["name"]})
    found += differences("training", asdict(identity.config), job["config"])
    # Decoded and encoded again: an older checkpoint lacks the fields that came later, at their defaults.
    found += differences("lora", encode_spec(identity.spec), encode_spec(decode_spec(job["spec"])))
    found += differences("data", asdict(identity.data), state["data"])
    fingerprint = {"fingerprint": identity.base_fingerprint}
    found += differences("base", fingerprint, {"fingerprint": state["base"]["fingerprint"]})
    if found:
        raise ConfigError(
            f"checkpoint {str(directory)!r} belongs to another job: {'; '.join(found)}. Give the same settings, data "
            "and base to go on from it, or another checkpoint_dir to begin anew."
        )


def _flat(tensors: PeftTensors, modules: tuple[ModulePlan, ...]) -> Tensor:
    for path, own in tensors.items():
        if odd := next((t.dtype for t in own if t.dtype != torch.float32), None):
            raise AdapterMismatchError(f"{path}: {odd} weights; a checkpoint holds float32")
    flat = torch.empty(num_elements(modules))
    from_peft(tensors, flat, modules)
    return flat


def _state_digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(state)).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
