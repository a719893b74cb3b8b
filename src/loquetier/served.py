"""The adapters of a runtime: loaded, listed, pinned, rolled back and written, each call on the engine's thread."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

from loquetier.adapters.packed import PackedAdapter
from loquetier.adapters.peft_io import read_layout
from loquetier.adapters.peft_write import write_adapter
from loquetier.adapters.registry import AdapterVersion, check_name
from loquetier.arguments import path_of
from loquetier.engine.engine import Engine
from loquetier.engine.hold import Hold
from loquetier.engine.loop import EngineLoop
from loquetier.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterInUseError,
    ConfigError,
    EngineStoppedError,
    LoquetierError,
)
from loquetier.info import AdapterInfo
from loquetier.storage import FULL, out_of_room
from loquetier.training.chat import template_fingerprint

log = logging.getLogger("loquetier.adapters")


class ServedAdapters:
    """What answers beside the base. Methods may be called from any thread; `Runtime`'s of like names say the rest."""

    def __init__(self, engine: Engine, loop: EngineLoop) -> None:
        self._engine, self._loop = engine, loop

    def add(
        self, name: str, packed: PackedAdapter, source: Path, *, replace: bool = False, number: int | None = None
    ) -> AdapterInfo:
        """See `Runtime.add_adapter`."""
        engine = self._engine
        self._warn_of(name, packed)

        def load() -> AdapterInfo:
            if engine.jobs.find(name) is not None:
                raise AdapterExistsError(f"a job is training {name!r}; cancel it first, or choose another name")
            engine.adapters.add(name, packed, source, replace=replace, number=number)
            return self._info(name)

        return self._loop.call(load)

    def register(self, name: str, number: int, directory: Path, digest: str) -> None:
        """See `Runtime.register_adapter`."""
        check_name(name)
        layout = read_layout(directory, self._engine.base.targets)
        self._loop.call(lambda: self._engine.adapters.register(name, number, layout, directory, digest))

    def number_after(self, name: str, number: int) -> int:
        """See `Runtime.number_after`."""

        def last() -> int:
            self._engine.registry.number_after(name, number)
            return self._engine.registry.last_number(name)

        return self._loop.call(last)

    def on_swapped_in(self, tell: Callable[[float], object]) -> None:
        """See `Runtime.on_swapped_in`."""
        self._engine.residency.loaded = tell

    def on_forgotten(self, tell: Callable[[Path], object]) -> None:
        """See `Runtime.on_forgotten`."""
        files = self._engine.residency.files

        def forgotten(version: AdapterVersion) -> None:
            source = version.source
            if source is not None:
                files.background.clean_up(lambda: tell(source))

        self._engine.residency.forgotten = forgotten

    def unload(self, name: str) -> int:
        """See `Runtime.unload_adapter`."""
        check_name(name)

        def unload() -> int:
            if self._engine.jobs.find(name) is not None:
                raise AdapterInUseError(f"a job is training {name!r} and would publish it again; cancel it first")
            there = [v for v in self._engine.registry.versions if v.name == name and v.slot >= 0]
            self._engine.adapters.unload(name)
            return sum(v.num_bytes for v in there if not v.is_live)

        return self._loop.call(unload)

    def infos(self) -> list[AdapterInfo]:
        """See `Runtime.adapters`."""
        return self._loop.call(lambda: [self._info(name) for name in self._engine.registry.names])

    def pin(self, name: str, *, wait: bool = True) -> AdapterInfo:
        """See `Runtime.pin_adapter`."""
        engine, there = self._engine, Future[None]()

        def done(error: LoquetierError | None) -> None:
            if error is None:
                there.set_result(None)
            else:
                if engine.registry.find(name) is not None:
                    engine.registry.set_pinned(name, False)
                there.set_exception(error)

        def pin() -> None:
            self._info(name)
            engine.residency.preload(name, done)
            engine.registry.set_pinned(name, True)

        self._loop.call(pin)
        if wait:
            there.result()
        return self.info(name)

    def unpin(self, name: str) -> AdapterInfo:
        """See `Runtime.unpin_adapter`."""

        def unpin() -> AdapterInfo:
            self._engine.registry.set_pinned(name, False)
            self._engine.residency.look_again()
            return self._info(name)

        return self._loop.call(unpin)

    def info(self, name: str) -> AdapterInfo:
        """See `Runtime.adapter`."""
        return self._loop.call(lambda: self._info(name))

    def digest(self, model: str) -> str:
        """See `Runtime.digest`."""
        with self.in_memory(model):
            return self._loop.call(lambda: self._engine.adapters.digest(model))

    @contextmanager
    def in_memory(self, model: str) -> Iterator[None]:
        """Keep a version in the arena; waits until it is there.

        Raises:
            AdapterUnavailableError, OutOfAdapterMemoryError.
        """
        residency, there = self._engine.residency, Future[None]()

        def begin() -> Hold:
            hold = residency.acquire(model)
            try:
                residency.start(hold, lambda: there.set_result(None), there.set_exception)
            except BaseException:
                residency.drop(hold)
                raise
            return hold

        hold = self._loop.call(begin)
        try:
            there.result()
            yield
        finally:
            with suppress(EngineStoppedError):
                self._loop.call(lambda: residency.drop(hold))

    def versions(self, name: str) -> list[int]:
        """See `Runtime.versions`."""

        def numbers() -> list[int]:
            self._info(name)
            return sorted(v.number for v in self._engine.registry.versions if v.name == name)

        return self._loop.call(numbers)

    def rollback(self, name: str, number: int) -> AdapterInfo:
        """See `Runtime.rollback`."""

        def back() -> AdapterInfo:
            self._engine.registry.rollback(name, number)
            self._engine.residency.keep_pins()
            return self._info(name)

        return self._loop.call(back)

    def export(self, model: str, directory: str | os.PathLike[str], *, overwrite: bool = False) -> str:
        """See `Runtime.export_adapter`."""
        with self.in_memory(model):
            version, modules, factors = self._loop.call(lambda: self._engine.adapters.factors(model))
        try:
            return write_adapter(
                path_of(directory),
                spec=version.spec,
                modules=modules,
                factors=factors,
                base_name=str(self._engine.base.loaded.name),
                overwrite=overwrite,
                template_fingerprint=version.template_fingerprint,
            )
        except OSError as error:
            if error.errno in FULL:
                needed = sum(part.nbytes for parts in factors.values() for part in parts)
                raise out_of_room(path_of(directory).absolute().parent, needed) from error
            raise AdapterError(f"cannot write {os.fspath(directory)!r}: {error.strerror}") from error

    def _warn_of(self, name: str, packed: PackedAdapter) -> None:
        if packed.ignored:
            keys = ", ".join(map(repr, packed.ignored[:8])) + (", ..." if len(packed.ignored) > 8 else "")
            log.warning("adapter %s: adapter_config.json has keys that are not PEFT's and are ignored: %s", name, keys)
        if self._template_differs(packed.template_fingerprint):
            log.warning(
                "adapter %s was trained under another chat template or tokenizer (%.80s) than the base %s has (%s): "
                "chat prompts are not those it was trained on",
                name,
                packed.template_fingerprint,
                self._engine.base.name,
                self.template_fingerprint,
            )

    def _info(self, name: str) -> AdapterInfo:
        version = self._engine.registry.resolve(name)
        if version.is_base:
            raise ConfigError(f"{name!r} is the base, not an adapter")
        return AdapterInfo(
            name,
            version.number,
            len(version.modules),
            version.num_bytes,
            version.users,
            version.spec,
            version.template_fingerprint,
            self._template_differs(version.template_fingerprint),
            is_resident=version.is_resident,
            is_pinned=self._engine.registry.is_pinned(version),
        )

    @cached_property
    def template_fingerprint(self) -> str | None:
        """What turns this base's conversations into token ids, as ``sha256:...``; None without a tokenizer."""
        tokenizer = self._engine.base.loaded.tokenizer
        return None if tokenizer is None else template_fingerprint(tokenizer)

    def _template_differs(self, other: str | None) -> bool:
        return other is not None and self.template_fingerprint is not None and other != self.template_fingerprint
