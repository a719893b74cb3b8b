"""Adapters that were loaded into a server, and stay: weights copied into the data directory, names and pins as rows."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

import structlog

from loquetier.adapters.packed import PackedAdapter
from loquetier.adapters.peft_write import CONFIG_NAME, WEIGHTS_NAME
from loquetier.errors import AdapterExistsError, ConfigError, LoquetierError
from loquetier.info import AdapterInfo
from loquetier.runtime import Runtime
from loquetier.server.auth import Principal
from loquetier.server.store.adapters import AdapterRow, VersionRow
from loquetier.server.store.store import Store

log = structlog.get_logger("loquetier.server.adapters")


@dataclass(frozen=True, slots=True)
class AdapterLedger:
    """The rows beside the runtime's registry. Methods wait for the disk and the engine: on worker threads only."""

    store: Store
    runtime: Runtime

    def open(self) -> None:
        """Once, before anything is served: files go when nobody needs them any more."""
        self.runtime.on_forgotten(self._tidy)

    def _tidy(self, directory: Path) -> None:
        if directory.parent == self.store.data_dir.adapters:
            self.store.adapters.tidy([directory.name])

    # --- changes ---

    def load(self, who: Principal, name: str, directory: Path) -> AdapterInfo:
        """Copy an adapter into the data directory and serve it as `name`, as a new version if the name is taken.

        What is served is what was copied: nobody can change it underneath. Raises as `Runtime.load_adapter`, and
        InsufficientStorageError; nothing has changed then.
        """
        self.runtime.read_adapter(directory)  # checked completely before a byte of it is copied
        place = self.store.adapters.place(directory)
        before = self.store.adapters.find(name)
        try:
            packed = self.runtime.read_adapter(place)
            last = self.runtime.number_after(name, 0)
            with self.store.write() as c:
                number = self._note(c, who, name, directory, place, packed, last)
            try:
                return self.runtime.add_adapter(name, packed, place, replace=True, number=number)
            except LoquetierError:
                self._undo(name, number, before)
                raise
        except BaseException:
            self.store.adapters.tidy([place.name])
            raise

    def _note(
        self,
        c: sqlite3.Connection,
        who: Principal,
        name: str,
        directory: Path,
        place: Path,
        packed: PackedAdapter,
        last: int,
    ) -> int:
        adapters, known = self.store.adapters, self.store.adapters.find(name)
        if known is None:
            self.store.know(c, who.owner, who.id)
            adapters.create(c, name, who.owner, "loaded", str(directory))
        first = 1 if known is None else known.next_number
        # Versions that have no rows (--adapter, training) may have taken higher numbers than the rows know of.
        number = max(first, last + 1)
        adapters.reserve(c, name, number + 1 - first)
        size = sum((place / file).stat().st_size for file in (CONFIG_NAME, WEIGHTS_NAME))
        assert packed.source_digest is not None
        now = int(self.store.wall())
        adapters.add(c, VersionRow(name, number, packed.source_digest, place.name, size, now))
        old = [v.number for v in adapters.versions(name) if v.number < number]
        keep = self.runtime.config.keep_versions
        adapters.drop_versions(c, name, old[: max(0, len(old) - keep)])
        return number

    def _undo(self, name: str, number: int, before: AdapterRow | None) -> None:
        """The engine did not take it."""
        with self.store.write() as c:
            if before is None or before.live_number is None:
                self.store.adapters.remove(c, name)
            else:
                self.store.adapters.set_live(c, name, before.live_number)
                self.store.adapters.drop_versions(c, name, [number])

    def unload(self, name: str) -> int:
        """Forget an adapter; its files go when the last request on it has ended. Returns the bytes freed in memory."""
        known = self.store.adapters.find(name)
        directories = [v.directory for v in self.store.adapters.versions(name)]
        self.store.fail_point("unload.before_commit")
        if known is not None:
            with self.store.write() as c:
                self.store.adapters.remove(c, name)
        self.store.fail_point("unload.after_commit")
        try:
            return self.runtime.unload_adapter(name)
        except LookupError:
            if known is None:
                raise
            self.store.adapters.tidy(directories)  # it was there as a row only: its files were damaged
            return 0

    def rollback(self, name: str, number: int) -> AdapterInfo:
        """Have another version answer, also after a restart."""
        info = self.runtime.rollback(name, number)
        if self.store.adapters.version(name, number) is not None:
            with self.store.write() as c:
                self.store.adapters.set_live(c, name, number)
        return info

    def set_pinned(self, name: str, is_pinned: bool) -> AdapterInfo:
        """Pin or unpin, also for after a restart."""
        info = self.runtime.pin_adapter(name) if is_pinned else self.runtime.unpin_adapter(name)
        if self.store.adapters.find(name) is not None:
            with self.store.write() as c:
                self.store.adapters.set_pinned(c, name, is_pinned)
        return info

    # --- after a restart ---

    def restore(self, row: AdapterRow) -> bool:
        """Have an adapter answer again as before, without reading its weights. False: what is wrong with it is logged.

        Raises:
            ConfigError: --adapter has taken a version that this one had.
        """
        adapters = self.store.adapters
        try:
            versions = adapters.versions(row.name)
            # One that was rolled back to may be older than others; as many of them as are kept come back with it.
            others = [v.number for v in versions if v.number != row.live_number]
            dropped = set(others[: max(0, len(others) - self.runtime.config.keep_versions)])
            for version in [v for v in versions if v.number not in dropped]:
                self.runtime.register_adapter(row.name, version.number, adapters.path(version), version.digest)
            self.runtime.number_after(row.name, row.next_number - 1)
            if row.live_number is not None:
                self.runtime.rollback(row.name, row.live_number)
            if row.is_pinned:
                self.runtime.pin_adapter(row.name, wait=False)
        except AdapterExistsError as error:
            raise ConfigError(
                f"--adapter {row.name}: the data directory has an adapter of this name ({error}); choose another name, "
                "or start without --adapter and unload it"
            ) from error
        except LoquetierError as error:
            log.error("adapter_not_served", adapter=row.name, problem=str(error))
            return False
        return True
