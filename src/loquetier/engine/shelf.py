"""The adapters that are served: into slots, out of slots, and as factors for export. Engine thread only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from loquetier.adapters.arena import Arena
from loquetier.adapters.registry import AdapterRegistry, AdapterVersion
from loquetier.adapters.spec import LoraSpec, ModulePlan
from loquetier.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AdapterShelf:
    """Arena and registry as one: what has a name has a slot."""

    arena: Arena
    registry: AdapterRegistry

    def load(
        self,
        name: str,
        spec: LoraSpec,
        modules: tuple[ModulePlan, ...],
        factors: Mapping[str, tuple[Tensor, Tensor]],
        template_fingerprint: str | None = None,
    ) -> AdapterVersion:
        """Put an adapter's factors (A ``[r, in]``, B ``[out, r]`` by path) into a slot and serve it as `name`.

        Raises:
            AdapterExistsError, ConfigError, OutOfAdapterMemoryError: nothing changed.
        """
        self.registry.check_free(name)
        slot = self.arena.allocate(modules)
        for module in modules:
            a_RK, b_NR = factors[module.target.path]
            view = self.arena.factors[slot][module.target.index]
            view.a_RK.copy_(a_RK)
            view.b_RN.copy_(b_NR.T)
        return self.registry.add(name, slot, spec, template_fingerprint)

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
                digest.update(f"{m.target.path} {m.rank} {m.scale!r}\n".encode())
            weights = self.arena.flat(version.slot).float().cpu().contiguous()
            digest.update(weights.numpy().tobytes())
            version.digest = digest.hexdigest()
        return version.digest

    def unload(self, name: str) -> AdapterVersion:
        """The name stops answering at once; memory is freed when the last request on it has ended."""
        return self.registry.remove(name)

    def factors(self, model: str) -> tuple[AdapterVersion, tuple[ModulePlan, ...], dict[str, tuple[Tensor, Tensor]]]:
        """A copy of a version's weights in PEFT's orientation (A ``[r, in]``, B ``[out, r]``), on the CPU."""
        version = self.registry.resolve(model)
        if version.slot < 0:
            raise ConfigError(f"{model!r} is the base: it has no adapter weights to export")
        modules = self.arena.modules(version.slot)
        views = self.arena.factors[version.slot]
        factors = {
            m.target.path: (
                views[m.target.index].a_RK.detach().cpu().clone(),
                views[m.target.index].b_RN.detach().T.contiguous().cpu().clone(),
            )
            for m in modules
        }
        return version, modules, factors
