"""vLLM's run-time adapter endpoints, and versions and rollback beside them. Scope: admin."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from loquetier.adapters.registry import AdapterVersion
from loquetier.adapters.spec import LoraSpec
from loquetier.server.adapter_desk import refused
from loquetier.server.auth import Principal, Scope
from loquetier.server.bodies import read_model
from loquetier.server.guard import need
from loquetier.server.openapi import body_schema, links
from loquetier.server.problems import unsupported
from loquetier.server.schemas.adapters import LoadRequest, PinRequest, RollbackRequest, UnloadRequest
from loquetier.server.services import Services

_NAME = "$request.body#/lora_name"
_NAMING = ("running", "waiting", "resident", "pinned")
"""Fields of the residency that hold names."""


def router(services: Services) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["adapters"])
    _load_routes(routes, services)
    _rollback_route(routes, services)
    _pin_routes(routes, services)
    _look_routes(routes, services)
    return routes


def _load_routes(routes: APIRouter, services: Services) -> None:
    desk, settings = services.adapters, services.settings

    @routes.post(
        "/v1/load_lora_adapter",
        dependencies=[need(Scope.ADMIN)],
        responses=links("model", "get_model", value=_NAME, bodies={"unload_adapter": "lora_name", "complete": "model"}),
        openapi_extra=body_schema(LoadRequest),
    )
    async def load(request: Request) -> Response:
        """Serve a PEFT directory; answers in plain text, as vLLM does."""
        body = await read_model(request, settings, LoadRequest)
        if not body.lora_name or not body.lora_path:
            raise refused("Both 'lora_name' and 'lora_path' must be provided.")
        if body.is_3d_lora_weight:
            raise unsupported("is_3d_lora_weight")
        info = await desk.load(_who(request), body.lora_name, body.lora_path, in_place=body.load_inplace)
        text = f"Success: LoRA adapter '{body.lora_name}' added successfully."
        return PlainTextResponse(text, headers={"x-loquetier-model-version": f"{info.name}@{info.version}"})

    @routes.post(
        "/v1/unload_lora_adapter",
        operation_id="unload_adapter",
        dependencies=[need(Scope.ADMIN)],
        openapi_extra=body_schema(UnloadRequest),
    )
    async def unload(request: Request) -> Response:
        """Stop serving an adapter; what is under way ends on it."""
        body = await read_model(request, settings, UnloadRequest)
        if not body.lora_name:
            raise refused("'lora_name' needs to be provided to unload a LoRA adapter.")
        freed = await desk.unload(_who(request), body.lora_name)
        text = f"Success: LoRA adapter '{body.lora_name}' removed successfully."
        return PlainTextResponse(text, headers={"x-loquetier-freed-bytes": str(freed)})


def _rollback_route(routes: APIRouter, services: Services) -> None:
    desk, settings = services.adapters, services.settings

    @routes.post(
        "/v1/rollback_lora_adapter", dependencies=[need(Scope.ADMIN)], openapi_extra=body_schema(RollbackRequest)
    )
    async def rollback(request: Request) -> dict[str, Any]:
        """Have an older version, still in memory, answer under the name again."""
        body = await read_model(request, settings, RollbackRequest)
        info = await desk.rollback(_who(request), body.lora_name, body.version)
        return {"object": "adapter.version", "lora_name": info.name, "version": info.version}


def _pin_routes(routes: APIRouter, services: Services) -> None:
    desk, settings = services.adapters, services.settings

    @routes.post("/v1/adapters/pin", dependencies=[need(Scope.ADMIN)], openapi_extra=body_schema(PinRequest))
    async def pin(request: Request) -> dict[str, Any]:
        """Bring an adapter into memory and keep it there; answers when it is there."""
        body = await read_model(request, settings, PinRequest)
        return _described(services, (await desk.set_pinned(_who(request), body.lora_name, True)).name)

    @routes.post("/v1/adapters/unpin", dependencies=[need(Scope.ADMIN)], openapi_extra=body_schema(PinRequest))
    async def unpin(request: Request) -> dict[str, Any]:
        """Let an adapter leave memory again when others need it."""
        body = await read_model(request, settings, PinRequest)
        return _described(services, (await desk.set_pinned(_who(request), body.lora_name, False)).name)


def _look_routes(routes: APIRouter, services: Services) -> None:
    @routes.get("/v1/adapters", dependencies=[need(Scope.ADMIN)])
    async def list_adapters(
        request: Request,
        after: Annotated[str | None, Query(max_length=128)] = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    ) -> dict[str, Any]:
        """Every adapter that this key may use, by name: its live version, and whether it is in memory and pinned."""
        names = services.models.names(_who(request))
        names = names[bisect_right(names, after) if after else 0 :]
        data = [found for name in names[:limit] if (found := _described(services, name))]
        return {"object": "list", "data": data, "has_more": len(names) > limit}

    @routes.get("/v1/adapters/residency", dependencies=[need(Scope.ADMIN)])
    async def residency(request: Request) -> dict[str, Any]:
        """What adapters take of the memory, who waits, what came and went; only names that the key may use."""
        pulse = services.watch.pulse
        if pulse is None:
            return {"object": "adapters.residency"}
        shown, names = asdict(pulse.adapters), set(services.models.names(_who(request)))
        shown |= {field: [n for n in shown[field] if n in names] for field in _NAMING}
        return {"object": "adapters.residency"} | shown

    @routes.get("/v1/lora_adapters", dependencies=[need(Scope.ADMIN)])
    async def versions(request: Request) -> dict[str, Any]:
        """Every version, the live one of each name marked."""
        names = set(services.models.names(_who(request)))
        data = [_version(v) for v in services.port.versions() if v.name in names]
        return {"object": "list", "data": data}


def _who(request: Request) -> Principal:
    who: Principal = request.scope["state"]["principal"]
    return who


def _version(v: AdapterVersion) -> dict[str, Any]:
    return {
        "object": "adapter.version", "id": v.label, "lora_name": v.name, "version": v.number, "live": v.is_live,
        "running": v.users, "method": v.spec.method, "r": v.spec.r if isinstance(v.spec, LoraSpec) else None,
        "resident": v.is_resident, "bytes": v.num_bytes,
    }  # fmt: skip


def _described(services: Services, name: str) -> dict[str, Any]:
    """An adapter by its live version; empty when it went away meanwhile."""
    version = services.port.find(name)
    if version is None:
        return {}
    return _version(version) | {"object": "adapter", "id": name, "pinned": services.port.is_pinned(name)}
