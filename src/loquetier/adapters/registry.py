"""Names, versions and who uses them. Pure Python: slots are numbers here.

A version is immutable. Publishing makes a new version the live one of its name; requests in flight keep the one
they began with, and a version that is neither live nor in use gives its slot back at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from loquetier.adapters.spec import AdapterSpec, LoraSpec, ModulePlan
from loquetier.engine.rows import BASE_SLOT
from loquetier.errors import AdapterExistsError, AdapterNotFoundError, ConfigError, IntegrityError

ABSENT_SLOT = -2
"""Slot number of a version that is registered and not in the arena."""
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
"""Names are path-like labels, never paths; ``@`` is kept for versions."""


@dataclass(slots=True, eq=False)
class AdapterVersion:
    """One immutable set of weights under a name. Mutable are only its bookkeeping fields."""

    name: str
    number: int
    """1 for the first version of the name, counting up, never reused while the process lives."""
    slot: int
    spec: AdapterSpec
    users: int = field(default=0)
    """Requests and evaluations running on it."""
    is_live: bool = field(default=True)
    digest: str | None = field(default=None)
    """sha256 of layout and weights, filled in when first asked for: hashing between two steps would cost more than
    the publish itself."""
    is_kept: bool = field(default=False)
    """Not live, and kept all the same so that it can be rolled back to."""
    template_fingerprint: str | None = field(default=None)
    """Of the chat template and tokenizer that it was trained under; None = not known."""
    modules: tuple[ModulePlan, ...] = field(default=())
    """The linears that it adapts; known also while it is not in the arena."""
    num_bytes: int = field(default=0)
    """What it takes of the arena while it is there."""
    source: Path | None = field(default=None)
    """PEFT directory from which it can be brought back into the arena; None = only the arena has it."""
    source_digest: str | None = field(default=None)
    """Of those files, as `read_adapter` gives it."""
    is_ready: bool = field(default=True)
    """With a slot: its weights are in it. False while they are being read."""
    holders: int = field(default=0)
    """Users that need it in the arena now; the others wait until it is there."""
    last_used: int = field(default=0)
    """Counts up with every use of any version."""

    @property
    def is_base(self) -> bool:
        """The bare base: no weights of its own."""
        return self.slot == BASE_SLOT

    @property
    def is_resident(self) -> bool:
        """Its weights are in the arena."""
        return self.slot >= 0 and self.is_ready

    @property
    def label(self) -> str:
        """``name@number``; the base is just its name."""
        return self.name if self.is_base else f"{self.name}@{self.number}"


def check_name(name: str) -> str:
    """Return `name` if it can name an adapter.

    Raises:
        ConfigError: it does not match `NAME_PATTERN`.
    """
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name) or ".." in name:
        raise ConfigError(
            f"adapter name {str(name)[:140]!r}: must be 1 to 128 characters of letters, digits and . _ : / -, "
            "begin with a letter or digit, and have no '..'"
        )
    return name


class AdapterRegistry:
    """Which version a name means now, and which versions are still in use.

    Args:
        base_name: the name under which the bare base answers.
        free_slot: called with a slot when its version's last user has left and it is neither live nor kept.
        keep_versions: of each name, this many versions before the live one stay resident while memory allows.
    """

    def __init__(self, base_name: str, free_slot: Callable[[int], object], keep_versions: int = 0) -> None:
        self._keep_versions = keep_versions
        self._base = AdapterVersion(base_name, 0, BASE_SLOT, LoraSpec())
        self._free_slot = free_slot
        self._live: dict[str, AdapterVersion] = {}
        self._retired: list[AdapterVersion] = []
        self._numbered: dict[tuple[str, str], AdapterVersion] = {}
        """Every version by name and number as text."""
        self._last_number: dict[str, int] = {}
        self._pinned: frozenset[str] = frozenset()
        self.dropped: Callable[[AdapterVersion], object] = lambda version: None
        """Told of a version that nothing means or uses any more, before its slot is freed."""

    @property
    def names(self) -> list[str]:
        """Adapter names that answer now, in the order they came."""
        return list(self._live)

    @property
    def versions(self) -> list[AdapterVersion]:
        """Every version: live ones, and old ones that requests still use or that are kept."""
        return [*self._live.values(), *self._retired]

    def find(self, model: str) -> AdapterVersion | None:
        """The adapter version that `model` means, if any; may be called from any thread."""
        name, at, number = model.partition("@")
        return self._numbered.get((name, number)) if at else self._live.get(name)

    def resolve(self, model: str) -> AdapterVersion:
        """The version that `model` means: the base's name, an adapter's, or ``name@number`` while that is resident.

        Raises:
            AdapterNotFoundError: nothing answers under this name. Never the base instead.
        """
        if model == self._base.name:
            return self._base
        found = self.find(model)
        if found is not None:
            return found
        name, at, _ = model.partition("@")
        if at and name in self._live:
            there = ", ".join(f"{name}@{v.number}" for v in self.versions if v.name == name)
            raise AdapterNotFoundError(
                f"{model[:140]!r} is not in memory; there are: {there}. EngineConfig.keep_versions (now "
                f"{self._keep_versions}) decides how many stay."
            )
        known = ", ".join([self._base.name, *self._live][:8])
        raise AdapterNotFoundError(f"no model {model[:140]!r} is served; there are: {known}. Load it first.")

    def acquire(self, model: str) -> AdapterVersion:
        """`resolve`, and count one user; pair it with `release`."""
        version = self.resolve(model)
        version.users += 1
        return version

    def release(self, version: AdapterVersion) -> None:
        """One user has left; the last one out of a version that is not live frees its slot."""
        if version.users <= 0:
            raise IntegrityError(f"{version.label}: released more often than acquired")
        version.users -= 1
        if version.users == 0 and not version.is_live and not version.is_kept:
            self._forget(version)

    @property
    def pinned(self) -> frozenset[str]:
        """Names whose live version stays in the arena; may be read from any thread."""
        return self._pinned

    def is_pinned(self, version: AdapterVersion) -> bool:
        """Whether it must stay in the arena."""
        return version.is_live and version.name in self._pinned

    def set_pinned(self, name: str, is_pinned: bool) -> None:
        """Pin or unpin a name. Raises AdapterNotFoundError."""
        if name not in self._live:
            raise AdapterNotFoundError(f"no adapter {name[:140]!r} is loaded")
        self._pinned = self._pinned | {name} if is_pinned else self._pinned - {name}

    def check_free(self, name: str) -> None:
        """Whether `add` would take this name.

        Raises:
            ConfigError: bad name. AdapterExistsError: the name is taken (also by the base).
        """
        check_name(name)
        if name == self._base.name:
            raise AdapterExistsError(f"{name!r} is the base's name; choose another for the adapter")
        if name in self._live:
            raise AdapterExistsError(f"{name!r} is already loaded; unload it first, or choose another name")

    def add(self, name: str, slot: int, spec: AdapterSpec, template_fingerprint: str | None = None) -> AdapterVersion:
        """A new name becomes live. Errors as `check_free`."""
        self.check_free(name)
        return self.publish(name, slot, spec, template_fingerprint)

    def publish(
        self,
        name: str,
        slot: int,
        spec: AdapterSpec,
        template_fingerprint: str | None = None,
        *,
        modules: tuple[ModulePlan, ...] = (),
        num_bytes: int = 0,
        source: Path | None = None,
        source_digest: str | None = None,
        digest: str | None = None,
        number: int | None = None,
    ) -> AdapterVersion:
        """Make the weights in `slot` the live version of `name`; the version before retires.

        Args:
            slot: ABSENT_SLOT for weights that are at `source` only.
            number: its number in an earlier life of the process; None = the next one.
        """
        number = number or self._last_number.get(name, 0) + 1
        self.number_after(name, number)
        version = AdapterVersion(
            name,
            number,
            slot,
            spec,
            digest=digest,
            template_fingerprint=template_fingerprint,
            modules=modules,
            num_bytes=num_bytes,
            source=source,
            source_digest=source_digest,
        )
        self._numbered[name, str(number)] = version
        old = self._live.get(name)
        self._live[name] = version
        if old is not None:
            self._retire(old)
        return version

    def number_after(self, name: str, number: int) -> None:
        """Give the next version of `name` a higher number than `number`: others were given away before a restart."""
        self._last_number[name] = max(self._last_number.get(name, 0), number)

    def last_number(self, name: str) -> int:
        """The highest number that a version of `name` has had; 0 = none."""
        return self._last_number.get(name, 0)

    def remove(self, name: str) -> AdapterVersion:
        """The name stops answering at once; its slot is freed when the last user has left.

        Raises:
            AdapterNotFoundError: no adapter of this name.
        """
        if name not in self._live:
            known = ", ".join(self._live) or "none"
            raise AdapterNotFoundError(f"no adapter {name[:140]!r} is loaded; there are: {known}")
        version = self._live.pop(name)
        self._pinned -= {name}
        self._retire(version)
        for kept in [v for v in self._retired if v.name == name and v.is_kept]:
            self._drop(kept)
        return version

    def rollback(self, name: str, number: int) -> AdapterVersion:
        """Make a resident version of `name` the live one again; the one that was live stays as `publish` leaves it.

        Raises:
            AdapterNotFoundError: no adapter of this name, or that version is not resident (any more).
        """
        if name not in self._live:
            known = ", ".join(self._live) or "none"
            raise AdapterNotFoundError(f"no adapter {name[:140]!r} is loaded; there are: {known}")
        there = sorted((v for v in self.versions if v.name == name), key=lambda v: v.number)
        version = next((v for v in there if v.number == number), None)
        if version is None:
            raise AdapterNotFoundError(
                f"version {number} of {name!r} is not in memory; there are: {', '.join(str(v.number) for v in there)}. "
                f"EngineConfig.keep_versions (now {self._keep_versions}) decides how many stay."
            )
        if not version.is_live:
            old = self._live[name]
            self._retired.remove(version)
            version.is_live, version.is_kept = True, False
            self._live[name] = version
            self._retire(old)
        return version

    def _retire(self, version: AdapterVersion) -> None:
        version.is_live, version.is_kept = False, True
        self._retired.append(version)
        kept = sorted((v for v in self._retired if v.name == version.name and v.is_kept), key=lambda v: v.number)
        for old in kept[: max(0, len(kept) - self._keep_versions)]:
            self._drop(old)

    def _drop(self, version: AdapterVersion) -> None:
        """No longer kept: its slot is freed now, or when its last user leaves."""
        version.is_kept = False
        if version.users == 0:
            self._forget(version)

    def drop(self, version: AdapterVersion) -> None:
        """Give up a kept version that nobody uses."""
        assert version.is_kept and version.users == 0
        self._drop(version)

    def _forget(self, version: AdapterVersion) -> None:
        """Nothing means it and nobody uses it."""
        self._retired.remove(version)
        del self._numbered[version.name, str(version.number)]
        self.dropped(version)
        slot, version.slot = version.slot, ABSENT_SLOT
        if slot >= 0:
            self._free_slot(slot)

    def check_integrity(self) -> None:
        """Live and retired are disjoint, slots are distinct, counts are sane. Raises IntegrityError."""
        slots = [v.slot for v in self.versions if v.slot >= 0]
        if len(set(slots)) != len(slots):
            raise IntegrityError(f"registry: two versions share a slot: {sorted(slots)}")
        for version in self._live.values():
            if not version.is_live or version.users < 0:
                raise IntegrityError(f"registry: {version.label} is live={version.is_live} with {version.users} users")
        for version in self._retired:
            if version.is_live or version.users < 0 or (version.users == 0 and not version.is_kept):
                raise IntegrityError(f"registry: retired {version.label} has {version.users} users")
        for version in self.versions:
            if not 0 <= version.holders <= version.users or (version.holders and not version.is_resident):
                raise IntegrityError(
                    f"registry: {version.label} in slot {version.slot}: {version.holders} of {version.users} users run"
                )
        if len(self._numbered) != len(self.versions):
            raise IntegrityError(f"registry: {len(self._numbered)} numbers for {len(self.versions)} versions")
