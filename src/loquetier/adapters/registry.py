"""Names, versions and who uses them. Pure Python: slots are numbers here.

A version is immutable. Publishing makes a new version the live one of its name; requests in flight keep the one
they began with, and a version that is neither live nor in use gives its slot back at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from loquetier.adapters.spec import AdapterSpec, LoraSpec
from loquetier.engine.rows import BASE_SLOT
from loquetier.errors import AdapterExistsError, AdapterNotFoundError, ConfigError, IntegrityError

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

    @property
    def label(self) -> str:
        """``name@number``; the base is just its name."""
        return self.name if self.slot == BASE_SLOT else f"{self.name}@{self.number}"


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
        self._last_number: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """Adapter names that answer now, in the order they came."""
        return list(self._live)

    @property
    def versions(self) -> list[AdapterVersion]:
        """Every version with a slot: live ones, and old ones that requests still use or that are kept."""
        return [*self._live.values(), *self._retired]

    def resolve(self, model: str) -> AdapterVersion:
        """The version that `model` means: the base's name, an adapter's, or ``name@number`` while that is resident.

        Raises:
            AdapterNotFoundError: nothing answers under this name. Never the base instead.
        """
        if model == self._base.name:
            return self._base
        name, at, number = model.partition("@")
        if not at and name in self._live:
            return self._live[name]
        for version in self.versions if at else ():
            if version.name == name and str(version.number) == number:
                return version
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
            self._retired.remove(version)
            self._free_slot(version.slot)

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
        self, name: str, slot: int, spec: AdapterSpec, template_fingerprint: str | None = None
    ) -> AdapterVersion:
        """Make the weights in `slot` the live version of `name`; the version before retires."""
        number = self._last_number.get(name, 0) + 1
        self._last_number[name] = number
        version = AdapterVersion(name, number, slot, spec, template_fingerprint=template_fingerprint)
        old = self._live.get(name)
        self._live[name] = version
        if old is not None:
            self._retire(old)
        return version

    def remove(self, name: str) -> AdapterVersion:
        """The name stops answering at once; its slot is freed when the last user has left.

        Raises:
            AdapterNotFoundError: no adapter of this name.
        """
        if name not in self._live:
            known = ", ".join(self._live) or "none"
            raise AdapterNotFoundError(f"no adapter {name[:140]!r} is loaded; there are: {known}")
        version = self._live.pop(name)
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

    def drop_oldest_kept(self) -> bool:
        """Give up the kept version that has waited longest and that no request uses. False when there is none."""
        oldest = next((v for v in self._retired if v.is_kept and v.users == 0), None)
        if oldest is not None:
            self._drop(oldest)
        return oldest is not None

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
            self._retired.remove(version)
            self._free_slot(version.slot)

    def check_integrity(self) -> None:
        """Live and retired are disjoint, slots are distinct, counts are sane. Raises IntegrityError."""
        slots = [v.slot for v in self.versions]
        if len(set(slots)) != len(slots):
            raise IntegrityError(f"registry: two versions share a slot: {sorted(slots)}")
        for version in self._live.values():
            if not version.is_live or version.users < 0:
                raise IntegrityError(f"registry: {version.label} is live={version.is_live} with {version.users} users")
        for version in self._retired:
            if version.is_live or version.users < 0 or (version.users == 0 and not version.is_kept):
                raise IntegrityError(f"registry: retired {version.label} has {version.users} users")
