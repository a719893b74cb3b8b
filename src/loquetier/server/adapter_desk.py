"""Adapters that come and go while the server runs: paths jailed, files read off the engine's step."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from loquetier.adapters.peft_write import CONFIG_NAME, WEIGHTS_NAME
from loquetier.adapters.registry import NAME_PATTERN
from loquetier.engine_port import EnginePort
from loquetier.errors import AdapterExistsError, AdapterNotFoundError, LoquetierError
from loquetier.info import AdapterInfo
from loquetier.runtime import Runtime
from loquetier.server.adapter_ledger import AdapterLedger
from loquetier.server.auth import Principal
from loquetier.server.metrics import Metrics
from loquetier.server.models import ModelBook
from loquetier.server.problems import ApiError, from_error
from loquetier.server.quota import check_quota
from loquetier.server.settings import ServerSettings

log = structlog.get_logger("loquetier.server.adapters")

_NAME = re.compile(rf"(?!.*\.\.)(?:{NAME_PATTERN.pattern})")
_MAX_PATH = 4096
_FILES = (CONFIG_NAME, WEIGHTS_NAME)


@dataclass(slots=True)
class AdapterDesk:
    """One change at a time: two loads of one name must not both believe that it is free."""

    runtime: Runtime
    port: EnginePort
    models: ModelBook
    metrics: Metrics
    settings: ServerSettings
    clock: Callable[[], float]
    wall: Callable[[], float]
    forget: Callable[[str], int]
    """Unloads an adapter by its name, on a worker thread; returns the bytes freed."""
    ledger: AdapterLedger | None = None
    """What is durable; None = what is loaded is gone after a restart."""
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def load(self, who: Principal, name: str, path: str, *, in_place: bool) -> AdapterInfo:
        """Serve the adapter in `path` as `name`; with `in_place` also over an adapter of that name, as a new version.

        Raises:
            ApiError: 400 bad name or adapter, or a name that it may not have; 403 over its quota; 404 nothing there, or
                outside the root; 503 no room.
        """
        if not _NAME.fullmatch(name):
            raise ApiError(400, f"lora_name {name[:64]!r} must be letters, digits and . _ : / -", code="invalid_value")
        async with self._turn:
            is_new = self.port.find(name) is None
            if not self.models.may_load(who, name):
                raise _not_yours(name)
            if not is_new and not in_place:
                raise _exists(name)
            began = self.clock()
            info = await asyncio.shield(asyncio.to_thread(self._read, who, name, path, is_new))
            self.models.note(name, path, int(self.wall()))
            self.metrics.adapter_loaded(self.clock() - began)
        log.info("adapter_loaded", adapter=name, version=info.version, bytes=info.num_bytes)
        return info

    def _read(self, who: Principal, name: str, path: str, is_new: bool) -> AdapterInfo:
        """On a worker thread."""
        directory = jailed(path, self.settings.adapter_root)
        try:
            if self.ledger is not None:
                size = sum((directory / file).stat().st_size for file in _FILES if (directory / file).is_file())
                check_quota(self.settings, who, self.ledger.store.bytes_of(who.owner), size, "lora_path")
                return self.ledger.load(who, name, directory, path)
            return self.runtime.load_adapter(name, directory, replace=not is_new)
        except AdapterExistsError as error:
            raise refused(str(error), error.code) from error
        except AdapterNotFoundError as error:
            raise not_on_disk(path) from error
        except LoquetierError as error:
            raise from_error(error) from error

    async def unload(self, who: Principal, name: str) -> int:
        """Stop serving `name`; returns the bytes that are or will be freed. Raises ApiError 404, or 400 in use."""
        async with self._turn:
            if not self.models.may_unload(who, name):
                raise not_loaded(name)
            try:
                freed = await asyncio.shield(asyncio.to_thread(self.forget, name))
            except LoquetierError as error:
                if isinstance(error, AdapterNotFoundError) or not _NAME.fullmatch(name):
                    raise not_loaded(name) from error
                raise from_error(error) from error
        log.info("adapter_unloaded", adapter=name, bytes=freed)
        return freed

    async def rollback(self, who: Principal, name: str, number: int) -> AdapterInfo:
        """Have another version answer. Raises ApiError 404."""
        rollback = self.runtime.rollback if self.ledger is None else self.ledger.rollback
        info = await self._change(who, name, lambda: rollback(name, number), "version")
        log.info("adapter_rolled_back", adapter=name, version=number)
        return info

    async def set_pinned(self, who: Principal, name: str, is_pinned: bool) -> AdapterInfo:
        """Keep an adapter in memory, or let it leave again. Raises ApiError 404; 503: there is no room."""

        def change() -> AdapterInfo:
            if self.ledger is not None:
                return self.ledger.set_pinned(name, is_pinned)
            return self.runtime.pin_adapter(name) if is_pinned else self.runtime.unpin_adapter(name)

        info = await self._change(who, name, change, "lora_name")
        log.info("adapter_pinned" if is_pinned else "adapter_unpinned", adapter=name)
        return info

    async def _change(self, who: Principal, name: str, change: Callable[[], AdapterInfo], param: str) -> AdapterInfo:
        async with self._turn:
            # Asked here: the runtime's own error tells which adapters there are, and some are other owners'. In this
            # order: what is not there takes as long as what is another's.
            if not self.models.may_change(who, name) or self.port.find(name) is None:
                raise _unknown(name, param)
            try:
                return await asyncio.shield(asyncio.to_thread(change))
            except LoquetierError as error:
                raise ApiError(error.status, str(error), code=error.code, param=param) from error


def jailed(path: str, root: Path | None) -> Path:
    """`path` (absolute, or below `root`) as a directory inside `root`, links followed.

    Raises:
        ApiError: 404, the same for what is outside and for what is not there.
    """
    if root is None:
        raise ApiError(
            404,
            "Loading lora failed: this server was started without --adapter-root DIR, so it reads no directory.",
            kind="NotFoundError",
            code="adapter_not_found",
            param="lora_path",
        )
    if not path or len(path) > _MAX_PATH or "\0" in path:
        raise not_on_disk(path)
    base = Path(os.path.realpath(root))
    found = Path(os.path.realpath(base / path))
    if not found.is_relative_to(base) or not found.is_dir():
        raise not_on_disk(path)
    for name in _FILES:
        if not Path(os.path.realpath(found / name)).is_relative_to(base):  # a link out of the root
            raise not_on_disk(path)
    return found


def not_on_disk(path: str) -> ApiError:
    """404 with vLLM's words."""
    return ApiError(
        404,
        f"Loading lora failed: No adapter found for {path[:200]!r}. It must be a PEFT directory below --adapter-root.",
        kind="NotFoundError",
        code="adapter_not_found",
        param="lora_path",
    )


def not_loaded(name: str) -> ApiError:
    """404 with vLLM's words."""
    return ApiError(
        404,
        f"The lora adapter '{name[:64]}' cannot be found.",
        kind="NotFoundError",
        code="adapter_not_found",
        param="lora_name",
    )


def _unknown(name: str, param: str) -> ApiError:
    """404 of what vLLM does not have."""
    return ApiError(404, f"The lora adapter {name[:64]!r} cannot be found.", code="model_not_found", param=param)


def refused(text: str, code: str = "invalid_value") -> ApiError:
    """400 about `lora_name`, of vLLM's kind."""
    return ApiError(400, text, kind="InvalidUserInput", code=code, param="lora_name")


def _not_yours(name: str) -> ApiError:
    """The same for another owner's adapter as for what the key's list leaves out, there or not."""
    return refused(
        f"lora_name {name!r} cannot be used: it is taken, reserved (ft:...), or not on this key's list; choose another "
        "one"
    )


def _exists(name: str) -> ApiError:
    return refused(
        f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
        "'load_inplace' to True.",
        "adapter_exists",
    )
