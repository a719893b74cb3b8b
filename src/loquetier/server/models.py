"""The models of the server as a key sees them: the base, adapters, and pinned versions ``name@n``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from loquetier.adapters.registry import NAME_PATTERN, AdapterVersion
from loquetier.engine_port import EnginePort
from loquetier.server.auth import Principal
from loquetier.server.problems import ApiError, model_not_found
from loquetier.server.store.adapters import AdapterTable

_PINNED = re.compile(rf"({NAME_PATTERN.pattern})(?:@([0-9]{{1,18}}))?")


@dataclass(slots=True)
class ModelBook:
    """Names, and where the weights behind them came from. Reads wait for no engine step."""

    port: EnginePort
    base_root: str
    """What the base was loaded from, as the operator named it."""
    started: int
    """Unix seconds."""
    durable: AdapterTable | None = None
    """Whose adapters are whose."""
    roots: dict[str, tuple[str, int]] = field(default_factory=dict)
    """By adapter: its directory and when it was loaded (Unix seconds)."""

    def find(self, who: Principal, model: str) -> AdapterVersion | None:
        """The version that `model` means; None for the base.

        Raises:
            ApiError: 404, for what does not exist as for what this key may not use.
        """
        name = model.partition("@")[0] if model != self.port.base_name else model
        if not self._may_see(who, name):
            raise model_not_found(model)
        if model == self.port.base_name:
            return None
        match = _PINNED.fullmatch(model)
        if match is None:
            raise model_not_found(model)
        version = self.port.find(model)
        if version is None:
            raise model_not_found(model)
        return version

    def sees(self, who: Principal, model: str) -> bool:
        """Whether `find` would find it."""
        try:
            return self.find(who, model) is not None
        except ApiError:
            return False

    def names(self, who: Principal) -> list[str]:
        """Adapters that this key may use, in the order of their names."""
        return sorted(version.name for version in self._seen(who))

    def _seen(self, who: Principal) -> list[AdapterVersion]:
        """What answers to this key: see `_may_see`."""
        live = [v for v in self.port.versions() if v.is_live]
        if who.adapters is not None:
            known = who.adapters | (self.durable.made_by(who.id, who.owner) if self.durable else set())
            return [v for v in live if v.name in known]
        hidden = self.durable.strangers(who.owner) if self.durable else set()
        return [v for v in live if v.name not in hidden]

    def _may_see(self, who: Principal, name: str) -> bool:
        """Its owner's adapters and those that nobody owns (--adapter); a key with a list: those, and its own jobs'."""
        if who.adapters is not None:
            return name in who.adapters or self._made(who, name)
        return self.durable is None or not self.durable.stranger(name, who.owner)

    def _made(self, who: Principal, name: str) -> bool:
        """Whether a job that this very key made is called so, or its checkpoint."""
        return self.durable is not None and bool(self.durable.made_by(who.id, who.owner, name))

    def may_change(self, who: Principal, name: str) -> bool:
        """Whether this key may load over, unload or pin the adapter called `name`, if there is one."""
        if self.durable is not None and self.durable.stranger(name, who.owner):
            return False
        return who.may_use(name) or self._made(who, name)

    def may_unload(self, who: Principal, name: str) -> bool:
        """Whether there is such an adapter and this key may unload it.

        What is not there costs as much as what is another's: one row is looked for, and nothing waits for a thread.
        """
        owner = None if self.durable is None else self.durable.owner_of(name)
        is_there = owner is not None or self.port.find(name) is not None
        return is_there and owner in (None, who.owner) and (who.may_use(name) or self._made(who, name))

    def may_load(self, who: Principal, name: str) -> bool:
        """Whether this key may load an adapter as `name`. What begins with "ft:" is the server's to give."""
        maker = name.partition(":ckpt-step-")[0]
        is_ours = self.durable is None or self.durable.find(maker) is not None or not name.startswith("ft:")
        return is_ours and self.may_change(who, maker) and self.may_change(who, name)

    def note(self, name: str, root: str, created: int) -> None:
        """Remember where an adapter came from, and forget what is not served any more."""
        served = {v.name for v in self.port.versions()}
        for gone in self.roots.keys() - served:
            del self.roots[gone]
        self.roots[name] = (root, created)

    def label_of(self, model: str) -> str:
        """The version's label, or `model` itself where nothing answers to it."""
        version = self.port.find(model)
        return model if version is None else version.label

    def cards(self, who: Principal) -> list[dict[str, Any]]:
        """The base first, then adapters in the order they came; only what this key may use."""
        base = [self.card(None)] if who.may_use(self.port.base_name) else []
        return [*base, *(self.card(v) for v in self._seen(who))]

    def _noted(self, name: str) -> tuple[str, int]:
        """Of a model that nobody loaded: what its row says (a job's), or the server's own start (--adapter)."""
        row = None if self.durable is None else self.durable.find(name)
        if row is None:
            return name, self.started
        self.roots[name] = row.root, row.created_at  # once a name, not once a listing
        return self.roots[name]

    def card(self, version: AdapterVersion | None, asked: str | None = None) -> dict[str, Any]:
        """A model object as vLLM shows it; `asked` is the id that the client used."""
        base = self.port.base_name
        root, created = self.base_root, self.started
        if version is not None:
            root, created = self.roots.get(version.name) or self._noted(version.name)
        return {
            "id": asked or (base if version is None else version.name),
            "object": "model",
            "created": created,
            "owned_by": "loquetier",
            "root": root,
            "parent": None if version is None else base,
            "max_model_len": self.port.max_context,
            "permission": [],
            "version": None if version is None else version.label,
        }
