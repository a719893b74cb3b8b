"""The files of adapter versions: read when one is needed, written when one that training made must leave the arena.

Engine thread only; the work itself is done on other threads.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from loquetier.adapters.arena import Arena
from loquetier.adapters.packed import PackedAdapter, Packer
from loquetier.adapters.registry import AdapterRegistry, AdapterVersion
from loquetier.engine.background import Background, Result
from loquetier.errors import AdapterUnavailableError, LoquetierError

log = logging.getLogger("loquetier.residency")

RETRY_SECONDS = 10.0
"""After a version could not be saved."""

Done = Callable[[LoquetierError | None], None]


def _nothing(_: object = None) -> None:
    """Nobody is told."""


class _Save:
    """One version's way to its directory, begun on the engine's thread and written on another.

    Either side may be the last to know: the files are removed by whoever finds that they exist and are not wanted.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.Lock()
        self._is_written = self._is_unwanted = False

    def give_up(self) -> bool:
        """Nobody wants the files any more; whether they lie there already. Else they never will."""
        with self._lock:
            self._is_unwanted = True
            return self._is_written

    def written(self) -> None:
        """On the writing thread, when the files lie there: removes them where nobody wants them any more."""
        with self._lock:
            self._is_written = not self._is_unwanted
        if not self._is_written:
            _remove(self.directory)


@dataclass(slots=True)
class VersionFiles:
    """Reads versions from their PEFT directories, and gives files to those that only the arena has.

    Args:
        spill: directory for the latter; None = they have none, and stay in the arena.
    """

    arena: Arena
    registry: AdapterRegistry
    packer: Packer
    background: Background
    spill: Path | None = None
    clock: Callable[[], float] = time.monotonic
    changed: Callable[[], None] = _nothing
    """Told when a version has got files, or did not get any."""
    num_saved: int = 0
    saving: dict[AdapterVersion, _Save] = field(default_factory=dict)
    _failed: dict[AdapterVersion, float] = field(default_factory=dict)
    """When saving them failed last."""

    def read(self, version: AdapterVersion, done: Callable[[Result[PackedAdapter]], None]) -> None:
        """Read a version's files again; they must be those that it was loaded from or saved to."""
        label, source, digest, packer = version.label, version.source, version.source_digest, self.packer
        assert source is not None and digest is not None, f"{label} is not in the arena and has no files"
        self.background.submit(lambda: packer.read_again(label, source, digest), done)

    def can_save(self, version: AdapterVersion) -> bool:
        """Whether it may get files; not just after the disk was found to be full."""
        failed = self._failed.get(version)
        return self.spill is not None and (failed is None or self.clock() - failed >= RETRY_SECONDS)

    def save_one(self) -> None:
        """Somebody waits for room: save the version that was used longest ago. One at a time."""
        if self.spill is None or self.saving:
            return
        unsaved = [
            v for v in self.registry.versions if v.is_live and v.is_resident and v.source is None and self.can_save(v)
        ]
        if unsaved:
            self.save(min(unsaved, key=lambda v: (v.holders > 0, v.last_used)))

    def save(self, version: AdapterVersion, done: Done = _nothing) -> None:
        """Write a resident version's files; from then on it can leave the arena and come back."""
        assert self.spill is not None and version.is_resident and version.source is None
        directory = self.spill / _directory_name(version)
        # A version never changes, so requests go on meanwhile; the copy is for a slot that is freed meanwhile.
        flat = self.arena.flat(version.slot).cpu().clone()
        spec, modules, packer = version.spec, version.modules, self.packer
        known, template = version.digest, version.template_fingerprint
        save = self.saving[version] = _Save(directory)

        def write() -> tuple[str, str]:
            packed = packer.repack(spec, modules, flat, template, known)
            digests = packed.digest, packer.write(directory, packed)
            save.written()
            return digests

        self.background.submit(write, lambda result: self._written(version, directory, result, done))

    def _written(self, version: AdapterVersion, directory: Path, result: Result[tuple[str, str]], done: Done) -> None:
        self.saving.pop(version, None)
        self.changed()
        try:
            digest, of_files = result()
        except Exception as error:
            typed = error if isinstance(error, LoquetierError) else _unsaved(version, error)
            log.warning("%s", typed)
            if self.registry.find(version.label) is version:
                self._failed[version] = self.clock()
            done(typed)
            return
        if self.registry.find(version.label) is not version:  # `forget` saw to its files
            done(_unsaved(version, "it was unloaded"))
            return
        version.digest, version.source, version.source_digest = digest, directory, of_files
        self.num_saved += 1
        done(None)

    def forget(self, version: AdapterVersion) -> None:
        """Nobody means or uses it any more: remove its files, if they are ours."""
        self._failed.pop(version, None)
        source, save = version.source, self.saving.pop(version, None)
        if save is not None and save.give_up():  # the engine was not told yet
            source = save.directory
        if source is not None and source.parent == self.spill:
            self.background.clean_up(lambda: _remove(source))


def _remove(directory: Path) -> None:
    try:
        shutil.rmtree(directory)
    except OSError as error:
        log.warning("%s cannot be removed and stays: %s", directory, error)


def _directory_name(version: AdapterVersion) -> str:
    """Readable, and different for names that differ in what a file name cannot hold."""
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", version.name)[:64]
    return f"{readable}-{hashlib.sha256(version.name.encode()).hexdigest()[:12]}-{version.number}"


def unavailable(version: AdapterVersion, error: Exception) -> AdapterUnavailableError:
    """For what went wrong with its files and has no type of ours."""
    return AdapterUnavailableError(
        f"{version.label} cannot be brought back from its files: {type(error).__name__}: {error}"
    )


def _unsaved(version: AdapterVersion, reason: object) -> AdapterUnavailableError:
    return AdapterUnavailableError(f"{version.label} could not be saved, so it stays in the arena: {reason}")
