"""The adapters that are served: into slots, out of slots, and as factors for export. Engine thread only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from torch import Tensor

from loquetier.adapters.arena import Arena
from loquetier.adapters.methods import LORA_METHOD, slot_method
from loquetier.adapters.orientation import PeftTensors, from_peft, to_peft
from loquetier.adapters.registry import AdapterRegistry, AdapterVersion
from loquetier.adapters.spec import LORA, AdapterSpec, ModulePlan
from loquetier.errors import ConfigError, ServeOnlyError


@dataclass(frozen=True, slots=True)
class AdapterShelf:
    """Arena and registry as one: what has a name has a slot."""

    arena: Arena
    registry: AdapterRegistry
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
        method = slot_method(modules)
        if self.lora_only and method is not LORA_METHOD:
            raise ServeOnlyError(
                f"{name!r} is a {method.name} adapter, which computes with the base's original weights, and serve_only "
                "dropped them: start without serve_only (--serve-only)"
            )
        if not (replace and name in self.registry.names):
            self.registry.check_free(name)
        slot = self.arena.allocate(modules)
        from_peft(factors, self.arena.flat(slot), modules)
        self.arena.refresh(slot)
        return self.registry.publish(name, slot, spec, template_fingerprint)

    def digest(self, model: str) -> str:
        """sha256 of a version's layout (paths, ranks, scales) and weights; equal weights, equal digest.

        Raises:
            AdapterNotFoundError, ConfigError: no such adapter, or it is the base.
        """
        version = self.registry.resolve(model)
        if version.slot < 0:
            raise ConfigError(f"{model!r} is the base: it has no adapter weights")
        if version.digest is None:
            digest = hashlib.sha256()
            for m in self.arena.modules(version.slot):
                method = "" if m.method == LORA else f" {m.method} {m.form}"
                digest.update(f"{m.target.path} {m.rank} {m.scale!r}{method}\n".encode())
            weights = self.arena.flat(version.slot).float().cpu().contiguous()
            digest.update(weights.numpy().tobytes())
            version.digest = digest.hexdigest()
        return version.digest

    def unload(self, name: str) -> AdapterVersion:
        """The name stops answering at once; memory is freed when the last request on it has ended."""
        return self.registry.remove(name)

    def factors(self, model: str) -> tuple[AdapterVersion, tuple[ModulePlan, ...], dict[str, tuple[Tensor, ...]]]:
        """A copy of a version's weights in PEFT's orientation (LoRA: A ``[r, in]``, B ``[out, r]``), on the CPU."""
        version = self.registry.resolve(model)
        if version.slot < 0:
            raise ConfigError(f"{model!r} is the base: it has no adapter weights to export")
        modules = self.arena.modules(version.slot)
        return version, modules, to_peft(self.arena.flat(version.slot), modules)
