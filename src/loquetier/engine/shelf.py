"""The adapters that are served: into slots, out of slots, and as factors for export. Engine thread only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from loquetier.adapters.arena import Arena
from loquetier.adapters.methods import LORA_METHOD, slot_method
from loquetier.adapters.orientation import PeftTensors, to_peft
from loquetier.adapters.packed import PackedAdapter, digest_of
from loquetier.adapters.peft_io import AdapterLayout
from loquetier.adapters.registry import ABSENT_SLOT, AdapterRegistry, AdapterVersion
from loquetier.adapters.spec import AdapterSpec, ModulePlan
from loquetier.engine.residency import Residency
from loquetier.errors import AdapterExistsError, ConfigError, ServeOnlyError


@dataclass(frozen=True, slots=True)
class AdapterShelf:
    """Arena, registry and residency as one."""

    arena: Arena
    registry: AdapterRegistry
    residency: Residency
    lora_only: bool = False
    """Other methods compute with the base's weights, which are gone in a process that only serves."""

    def load(
        self,
        name: str,
        spec: AdapterSpec,
        modules: tuple[ModulePlan, ...],
        factors: PeftTensors,
        template_fingerprint: str | None = None,
        *,
        replace: bool = False,
    ) -> AdapterVersion:
        """Put an adapter's tensors (LoRA: A ``[r, in]``, B ``[out, r]`` by path) into a slot and serve it as `name`.

        With `replace`, an adapter of that name gets a new version instead of being in the way.

        Raises:
            AdapterExistsError, ConfigError, OutOfAdapterMemoryError, ServeOnlyError: nothing changed.
        """
        packed = self.residency.files.packer.pack(spec, modules, factors, template_fingerprint)
        return self.add(name, packed, replace=replace)

    def add(
        self,
        name: str,
        packed: PackedAdapter,
        source: Path | None = None,
        *,
        replace: bool = False,
        number: int | None = None,
    ) -> AdapterVersion:
        """Serve packed weights as `name`: from the arena where there is room, else they come in when they are needed.

        Args:
            source: PEFT directory that they can be read from again. Without one they need room in the arena now.
            number: of the version; None = the next one.

        Raises:
            AdapterExistsError, ConfigError, OutOfAdapterMemoryError, ServeOnlyError: nothing changed.
        """
        self._check_method(name, packed.modules)
        if not (replace and self.registry.find(name) is not None):
            self.registry.check_free(name)
        modules, slot = self.residency.layouts.shared(packed.modules), ABSENT_SLOT
        if source is None or self.arena.has_room(modules):
            slot = self.arena.allocate(modules, zeroed=False)
            self.arena.flat(slot).copy_(packed.flat)
            self.arena.refresh(slot)
        version = self.registry.publish(
            name,
            slot,
            packed.spec,
            packed.template_fingerprint,
            modules=modules,
            num_bytes=self.arena.bytes_for(modules),
            source=source,
            source_digest=packed.source_digest,
            digest=packed.digest,
            number=number,
        )
        if source is not None:
            self.residency.host.put(version, packed.flat)
        self.residency.keep_pins()
        return version

    def register(
        self, name: str, number: int, layout: AdapterLayout, source: Path, source_digest: str
    ) -> AdapterVersion:
        """A version of an earlier life of the process: it answers at once, and comes in when it is needed.

        Raises:
            AdapterExistsError: this version, or a later one, is there already.
        """
        self._check_method(name, layout.modules)
        live = self.registry.find(name)
        if live is not None and live.number >= number:
            raise AdapterExistsError(f"{name}@{number} cannot be registered: {live.label} is there already")
        return self.registry.publish(
            name,
            ABSENT_SLOT,
            layout.spec,
            layout.template_fingerprint,
            modules=self.residency.layouts.shared(layout.modules),
            num_bytes=self.arena.bytes_for(layout.modules),
            source=source,
            source_digest=source_digest,
            number=number,
        )

    def _check_method(self, name: str, modules: tuple[ModulePlan, ...]) -> None:
        method = slot_method(modules)
        if self.lora_only and method is not LORA_METHOD:
            raise ServeOnlyError(
                f"{name!r} is a {method.name} adapter, which computes with the base's original weights, and serve_only "
                "dropped them: start without serve_only (--serve-only)"
            )

    def digest(self, model: str) -> str:
        """sha256 of a version's layout (paths, ranks, scales) and weights; equal weights, equal digest.

        Raises:
            AdapterNotFoundError, ConfigError: no such adapter, or it is the base.
        """
        version = self.registry.resolve(model)
        if version.is_base:
            raise ConfigError(f"{model!r} is the base: it has no adapter weights")
        if version.digest is None:  # then it is in the arena: who asks holds it there
            version.digest = digest_of(version.modules, self.arena.flat(version.slot))
        return version.digest

    def unload(self, name: str) -> AdapterVersion:
        """The name stops answering at once; memory is freed when the last request on it has ended."""
        return self.registry.remove(name)

    def factors(self, model: str) -> tuple[AdapterVersion, tuple[ModulePlan, ...], dict[str, tuple[Tensor, ...]]]:
        """A copy of a version's weights in PEFT's orientation (LoRA: A ``[r, in]``, B ``[out, r]``), on the CPU.

        The version must be in the arena: hold it.
        """
        version = self.registry.resolve(model)
        if version.is_base:
            raise ConfigError(f"{model!r} is the base: it has no adapter weights to export")
        assert version.is_resident, f"{version.label} is not in the arena"
        return version, version.modules, to_peft(self.arena.flat(version.slot), version.modules)
