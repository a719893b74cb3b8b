"""Adapters that come and go while the server runs: paths jailed, files read off the engine's step."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from loquetier.adapters.registry import NAME_PATTERN
from loquetier.engine_port import EnginePort
from loquetier.errors import AdapterExistsError, AdapterNotFoundError, LoquetierError
from loquetier.info import AdapterInfo
from loquetier.runtime import Runtime
from loquetier.server.metrics import Metrics
from loquetier.server.models import ModelBook
from loquetier.server.problems import ApiError, from_error

log = structlog.get_logger("loquetier.server.adapters")

_NAME = re.compile(rf"(?!.*\.\.)(?:{NAME_PATTERN.pattern})")
_MAX_PATH = 4096


@dataclass(slots=True)
class AdapterDesk:
    """One change at a time: two loads of one name must not both believe that it is free."""

    runtime: Runtime
    port: EnginePort
    models: ModelBook
    metrics: Metrics
    root: Path | None
    clock: Callable[[], float]
    wall: Callable[[], float]
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def load(self, name: str, path: str, *, in_place: bool) -> AdapterInfo:
        """Serve the adapter in `path` as `name`; with `in_place` also over an adapter of that name, as a new version.

        Raises:
            ApiError: 400 bad name or adapter, or a taken name; 404 nothing there, or outside the root; 503 no room.
        """
        if not _NAME.fullmatch(name):
            raise ApiError(400, f"lora_name {name[:64]!r} must be letters, digits and . _ : / -", code="invalid_value")
        async with self._turn:
            is_new = all(v.name != name or not v.is_live for v in self.port.versions())
            if not is_new and not in_place:
                raise _exists(name)
            began = self.clock()
            info = await asyncio.to_thread(self._read, name, path, is_new)
            self.models.note(name, path, int(self.wall()))
            self.metrics.adapter_loaded(self.clock() - began)
        log.info("adapter_loaded", adapter=name, version=info.version, bytes=info.num_bytes)
        return info

    def _read(self, name: str, path: str, is_new: bool) -> AdapterInfo:
        """On a worker thread."""
        directory = jailed(path, self.root)
        try:
            return self.runtime.load_adapter(name, directory, replace=not is_new)
        except AdapterExistsError as error:
            raise ApiError(400, str(error), code=error.code, kind="InvalidUserInput", param="lora_name") from error
        except AdapterNotFoundError as error:
            raise not_on_disk(path) from error
        except LoquetierError as error:
            raise from_error(error) from error

    async def unload(self, name: str) -> int:
        """Stop serving `name`; returns the bytes that are or will be freed. Raises ApiError 404, or 400 in use."""
        async with self._turn:
            try:
                freed = await asyncio.to_thread(self.runtime.unload_adapter, name)
            except LoquetierError as error:
                if isinstance(error, AdapterNotFoundError) or not _NAME.fullmatch(name):
                    raise not_loaded(name) from error
                raise from_error(error) from error
        log.info("adapter_unloaded", adapter=name, bytes=freed)
        return freed

    async def rollback(self, name: str, number: int) -> AdapterInfo:
        """Have an older version answer again. Raises ApiError 404."""
        async with self._turn:
            try:
                info = await asyncio.to_thread(self.runtime.rollback, name, number)
            except LoquetierError as error:
                raise ApiError(error.status, str(error), code=error.code, param="version") from error
        log.info("adapter_rolled_back", adapter=name, version=number)
        return info


def jailed(path: str, root: Path | None) -> Path:
    """`path` (absolute, or below `root`) as a directory inside `root`, links followed.

    Raises:
        ApiError: 404, the same for what is outside and for what is not there.
    """
    if root is None or not path or len(path) > _MAX_PATH or "\0" in path:
        raise not_on_disk(path)
    base = Path(os.path.realpath(root))
    found = Path(os.path.realpath(base / path))
    if not found.is_relative_to(base) or not found.is_dir():
        raise not_on_disk(path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
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


def _exists(name: str) -> ApiError:
    return ApiError(
        400,
        f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
        "'load_inplace' to True.",
        kind="InvalidUserInput",
        code="adapter_exists",
        param="lora_name",
    )
