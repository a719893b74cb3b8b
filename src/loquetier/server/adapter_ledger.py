"""Adapters that stay: weights copied into the data directory; names, versions, owners and pins as rows."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from loquetier.adapters.packed import PackedAdapter
from loquetier.adapters.peft_write import CONFIG_NAME, WEIGHTS_NAME
from loquetier.engine.engine import Engine
from loquetier.errors import AdapterExistsError, AdapterNotFoundError, ConfigError, EngineStoppedError, LoquetierError
from loquetier.info import AdapterInfo
from loquetier.runtime import Runtime
from loquetier.server.auth import Principal
from loquetier.server.store.adapters import AdapterRow, VersionRow
from loquetier.server.store.store import Store
from loquetier.storage import with_room

log = structlog.get_logger("loquetier.server.adapters")


@dataclass(frozen=True, slots=True)
class AdapterLedger:
    """The rows beside the runtime's registry. Methods wait for the disk and the engine: on worker threads only.

    Rows are committed before the engine hears of a change. Files outlive both the rows and the last request on them.
    """

    store: Store
    runtime: Runtime
    _changing: threading.Lock = field(default_factory=threading.Lock)
    """One change at a time."""
    _tidying: threading.Lock = field(default_factory=threading.Lock)

    def open(self) -> None:
        """Once, before anything is served. Raises ConfigError: --adapter has taken a name of ours."""
        for version in self.runtime.port.versions():
            if self.store.adapters.find(version.name) is not None:
                raise ConfigError(
                    f"--adapter {version.name}=...: the data directory {str(self.store.data_dir.root)!r} has an "
                    "adapter of this name; choose another name, or start without --adapter and unload it"
                )
        self.runtime.on_forgotten(self._forgotten)

    def _forgotten(self, directory: Path) -> None:
        """On a background thread: the last user of a version has left."""
        if directory.parent == self.store.data_dir.adapters:
            self.tidy([directory.name])

    def tidy(self, directories: Sequence[str]) -> None:
        """Remove those of these directories that no row refers to and no request may still be read from.

        A request that was accepted before its adapter was deleted may be waiting to come in; who leaves last tidies.
        What cannot be removed now is removed at the next start.
        """
        if not directories:
            return
        try:
            used = self.runtime.port.call(lambda engine: {v.source for v in engine.registry.versions}).result()
            place = self.store.data_dir.adapters
            with self._tidying:  # who deletes a model and its last user may both come
                self.store.adapters.tidy([name for name in directories if place / name not in used])
        except (EngineStoppedError, OSError) as error:
            log.warning("tidying_waits", problem=str(error))

    # --- changes ---

    def load(self, who: Principal, name: str, directory: Path, root: str) -> AdapterInfo:
        """Copy an adapter into the data directory and serve it as `name`, as a new version if the name is taken.

        What is served is what was copied: nobody can change it underneath.

        Args:
            root: where it came from, as clients are told.

        Raises:
            AdapterExistsError: the name is a job's, or --adapter's. InsufficientStorageError. Others as
                `Runtime.load_adapter`. Nothing has changed then.
        """
        with self._changing:
            before = self._may_load(name)
            self.runtime.read_adapter(directory)  # checked completely before a byte of it is copied
            place = with_room(self.store.data_dir.adapters, lambda: self.store.adapters.place(directory))
            try:
                packed = self.runtime.read_adapter(place)
                last = self.runtime.number_after(name, 0)
                with self.store.write() as c:
                    number = self._note(c, who, name, root, place, packed, before, last)
                self.store.fail_point("load.after_commit")
                try:
                    info = self.runtime.add_adapter(name, packed, place, replace=True, number=number)
                except LoquetierError:
                    self._undo(name, number, before)
                    raise
            except BaseException:
                self.store.adapters.tidy([place.name])
                raise
            self._drop_old(name)
            return info

    def _may_load(self, name: str) -> AdapterRow | None:
        """The row that is there already. Raises AdapterExistsError."""
        if name == self.runtime.base_name:  # before there is a row of it: the base would be one owner's meanwhile
            raise AdapterExistsError(f"{name!r} is the base's name; choose another for the adapter")
        adapters = self.store.adapters
        maker = adapters.find(name.partition(":ckpt-step-")[0])  # checkpoints take their names when they are made
        if maker is not None and maker.job_id is not None:
            raise AdapterExistsError(f"{name!r} is a name of job {maker.job_id}; choose another one")
        before = adapters.find(name)
        if before is None and self.runtime.port.find(name) is not None:
            raise AdapterExistsError(
                f"{name!r} was given with --adapter, which decides at each start; choose another name, or start "
                "without that"
            )
        return before

    def _note(
        self,
        c: sqlite3.Connection,
        who: Principal,
        name: str,
        root: str,
        place: Path,
        packed: PackedAdapter,
        before: AdapterRow | None,
        last: int,
    ) -> int:
        adapters = self.store.adapters
        if before is None:
            self.store.know(c, who.owner, who.id)
            adapters.create(c, name, who.owner, "loaded", root)
        first = 1 if before is None else before.next_number
        # A name that was --adapter's, and was unloaded, has had numbers that the rows do not know.
        number = max(first, last + 1)
        adapters.reserve(c, name, number + 1 - first)
        adapters.set_root(c, name, root)
        size = sum((place / file).stat().st_size for file in (CONFIG_NAME, WEIGHTS_NAME))
        assert packed.source_digest is not None
        now = int(self.store.wall())
        adapters.add(c, VersionRow(name, number, packed.source_digest, place.name, size, now))
        return number

    def _undo(self, name: str, number: int, before: AdapterRow | None) -> None:
        """The engine did not take it."""
        adapters = self.store.adapters
        with self.store.write() as c:
            if before is None or before.live_number is None:
                adapters.remove(c, name)
            else:
                adapters.set_live(c, name, before.live_number)
                adapters.set_root(c, name, before.root)
                adapters.drop_versions(c, name, [number])

    def _drop_old(self, name: str) -> None:
        """Forget versions beyond those that the registry keeps too."""
        adapters, row = self.store.adapters, self.store.adapters.find(name)
        assert row is not None
        dropped = self._beyond_kept(row)
        if dropped:
            with self.store.write() as c:
                adapters.drop_versions(c, name, [v.number for v in dropped])
            self.tidy([v.directory for v in dropped])

    def _beyond_kept(self, row: AdapterRow) -> list[VersionRow]:
        others = [v for v in self.store.adapters.versions(row.name) if v.number != row.live_number]
        return others[: max(0, len(others) - self.runtime.config.keep_versions)]

    def unload(self, name: str) -> int:
        """Forget an adapter that was loaded; its files go when the last request on it has ended.

        Returns the bytes freed in memory. Raises AdapterNotFoundError.
        """
        with self._changing:
            known = self.store.adapters.find(name)
            directories = [v.directory for v in self.store.adapters.versions(name)]
            self.store.fail_point("unload.before_commit")
            if known is not None:
                with self.store.write() as c:
                    self.store.adapters.remove(c, name)
            self.store.fail_point("unload.after_commit")
            try:
                freed = self.runtime.unload_adapter(name)
            except AdapterNotFoundError:
                if known is None:
                    raise
                freed = 0  # it was there as a row only: its files were damaged
            self.tidy(directories)
            return freed

    def rollback(self, name: str, number: int) -> AdapterInfo:
        """Have another version answer; also after a restart, if it is on the disk.

        Raises AdapterNotFoundError, also for a version of a loaded adapter that is there for requests under way only:
        its files go with them.
        """
        with self._changing:
            adapters, known = self.store.adapters, self.store.adapters.find(name)
            is_kept = adapters.version(name, number) is not None
            if known is not None and known.source == "loaded" and not is_kept:
                raise AdapterNotFoundError(f"version {number} of {name!r} is not kept (any more); load it again")
            info = self.runtime.rollback(name, number)
            if is_kept:
                with self.store.write() as c:
                    self.store.adapters.set_live(c, name, number)
            return info

    def set_pinned(self, name: str, is_pinned: bool) -> AdapterInfo:
        """Pin or unpin, also for after a restart."""
        with self._changing:
            info = self.runtime.pin_adapter(name) if is_pinned else self.runtime.unpin_adapter(name)
            if self.store.adapters.find(name) is not None:
                with self.store.write() as c:
                    self.store.adapters.set_pinned(c, name, is_pinned)
            return info

    # --- after a restart ---

    def restore(self, row: AdapterRow) -> bool:
        """Have an adapter with a live version answer as its rows say, without reading weights.

        Returns False, and logs why, where the live version's files are damaged.

        Raises EngineStoppedError.
        """
        adapters, runtime = self.store.adapters, self.runtime
        # One that was rolled back to may be older than others; as many of those as are kept come back with it.
        dropped = self._beyond_kept(row)
        for version in [v for v in adapters.versions(row.name) if v not in dropped]:
            try:
                runtime.register_adapter(row.name, version.number, adapters.path(version), version.digest)
            except EngineStoppedError:
                raise
            except LoquetierError as error:
                is_live = version.number == row.live_number
                log.error("adapter_not_served", adapter=version.label, is_live=is_live, problem=str(error))
                if is_live:  # never another version in its place
                    with suppress(AdapterNotFoundError):
                        runtime.unload_adapter(row.name)
                    return False
        live = row.live_number
        assert live is not None

        def settle(engine: Engine) -> None:  # one wait for a step: a job's checkpoints are pruned meanwhile
            engine.registry.number_after(row.name, row.next_number - 1)
            engine.registry.rollback(row.name, live)

        runtime.port.call(settle).result()
        if row.is_pinned:
            self._pin_again(row.name)
        return True

    def _pin_again(self, name: str) -> None:
        try:
            self.runtime.pin_adapter(name, wait=False)
        except EngineStoppedError:
            raise
        except LoquetierError as error:  # adapter_memory may be smaller than before
            log.error("adapter_not_pinned", adapter=name, problem=str(error))
