"""An adapter on the host in the arena's layout: what reading its files comes to, one copy away from being served."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from loquetier.adapters.arena import num_elements, slot_elements
from loquetier.adapters.orientation import PeftTensors, from_peft, to_peft
from loquetier.adapters.peft_io import read_adapter
from loquetier.adapters.peft_write import write_adapter
from loquetier.adapters.spec import LORA, AdapterSpec, LinearTarget, ModulePlan
from loquetier.errors import AdapterChangedError, AdapterUnavailableError, LoquetierError, OutOfAdapterMemoryError


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """One adapter's weights and what must be known to serve them."""

    spec: AdapterSpec
    modules: tuple[ModulePlan, ...]
    flat: Tensor
    """``[num_elements]`` in slot layout and the arena's dtype, on the host; pinned where the arena is on a GPU."""
    digest: str
    """Of layout and weights: see `digest_of`."""
    template_fingerprint: str | None = None
    source_digest: str | None = None
    """Of the files that it was read from, as `read_adapter` gives it."""
    ignored: tuple[str, ...] = ()
    """Keys of its config that are not PEFT's and have no effect here."""


@dataclass(frozen=True, slots=True)
class Packer:
    """Reads and writes adapters for one arena. Used by any thread: it owns no state."""

    targets: tuple[LinearTarget, ...]
    base_name: str
    base_path: str
    """What the base was loaded from, for the files that are written."""
    dtype: torch.dtype
    arena_bytes: int
    on_gpu: bool = False

    def pack(
        self,
        spec: AdapterSpec,
        modules: tuple[ModulePlan, ...],
        factors: PeftTensors,
        template_fingerprint: str | None = None,
    ) -> PackedAdapter:
        """PEFT's tensors in slot layout.

        Raises:
            OutOfAdapterMemoryError: it would not fit even if it were alone.
        """
        needed = slot_elements(modules) * self.dtype.itemsize
        if needed > self.arena_bytes:
            raise OutOfAdapterMemoryError(
                f"the adapter needs {needed} bytes and the whole arena has {self.arena_bytes}: it does not fit even "
                "alone. Raise adapter_memory."
            )
        flat = torch.empty(num_elements(modules), dtype=self.dtype, pin_memory=self.on_gpu)
        from_peft(factors, flat, modules)
        return PackedAdapter(spec, modules, flat, digest_of(modules, flat), template_fingerprint)

    def repack(
        self,
        spec: AdapterSpec,
        modules: tuple[ModulePlan, ...],
        flat: Tensor,
        template_fingerprint: str | None,
        digest: str | None,
    ) -> PackedAdapter:
        """A copy of a slot's weights ``[num_elements]`` on the host; `digest` if it is known already."""
        return PackedAdapter(spec, modules, flat, digest or digest_of(modules, flat), template_fingerprint)

    def read(self, directory: Path) -> PackedAdapter:
        """A PEFT directory, checked completely. Raises as `read_adapter` and `pack`."""
        limit = 4 * self.arena_bytes  # float32 on disk may take more than the arena's own dtype
        found = read_adapter(directory, self.targets, base_names=(self.base_name,), max_bytes=limit)
        packed = self.pack(found.spec, found.modules, found.factors, found.template_fingerprint)
        return replace(packed, source_digest=found.digest, ignored=found.ignored)

    def read_again(self, label: str, directory: Path, digest: str) -> PackedAdapter:
        """A version's weights from the directory that they once came from, or were saved to.

        Args:
            digest: of the files then.

        Raises:
            AdapterChangedError: there are other files now. AdapterUnavailableError: nothing can be read.
        """
        try:
            found = self.read(directory)
        except LoquetierError as error:
            raise AdapterUnavailableError(f"{label} cannot be brought back from its files: {error}") from error
        if found.source_digest != digest:
            raise AdapterChangedError(
                f"the files of {label} have changed since it was loaded (sha256 {str(found.source_digest)[:12]}..., "
                f"not {digest[:12]}...), and other weights are never served under the same version. Put the files "
                "back, or load them as a new version."
            )
        return found

    def write(self, directory: Path, packed: PackedAdapter) -> str:
        """Make the weights durable as a PEFT directory; returns the digest of its files.

        Raises:
            OSError: the disk is full.
        """
        return write_adapter(
            directory,
            spec=packed.spec,
            modules=packed.modules,
            factors=to_peft(packed.flat, packed.modules),
            base_name=self.base_path,
            template_fingerprint=packed.template_fingerprint,
            overwrite=True,
        )


def digest_of(modules: Sequence[ModulePlan], flat: Tensor) -> str:
    """sha256 of layout (paths, ranks, scales) and weights ``[num_elements]``; equal weights, equal digest."""
    digest = hashlib.sha256()
    for m in modules:
        method = "" if m.method == LORA else f" {m.method} {m.form}"
        digest.update(f"{m.target.path} {m.rank} {m.scale!r}{method}\n".encode())
    digest.update(flat.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
