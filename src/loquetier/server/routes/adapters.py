"""vLLM's run-time adapter endpoints, and versions and rollback beside them. Scope: admin."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from loquetier.adapters.spec import LoraSpec
from loquetier.server.auth import Scope
from loquetier.server.bodies import read_model
from loquetier.server.guard import need
from loquetier.server.openapi import body_schema
from loquetier.server.problems import ApiError, unsupported
from loquetier.server.schemas.adapters import LoadRequest, RollbackRequest, UnloadRequest
from loquetier.server.services import Services


def router(services: Services) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["adapters"])
    desk, settings = services.adapters, services.settings

    @routes.post("/v1/load_lora_adapter", dependencies=[need(Scope.ADMIN)], openapi_extra=body_schema(LoadRequest))
    async def load(request: Request) -> Response:
        """Serve a PEFT directory; answers in plain text, as vLLM does."""
        body = await read_model(request, settings, LoadRequest)
        if not body.lora_name or not body.lora_path:
            raise _missing("Both 'lora_name' and 'lora_path' must be provided.")
        if body.is_3d_lora_weight:
            raise unsupported("is_3d_lora_weight")
        info = await desk.load(body.lora_name, body.lora_path, in_place=body.load_inplace)
        text = f"Success: LoRA adapter '{body.lora_name}' added successfully."
        return PlainTextResponse(text, headers={"x-loquetier-model-version": f"{info.name}@{info.version}"})

    @routes.post("/v1/unload_lora_adapter", dependencies=[need(Scope.ADMIN)], openapi_extra=body_schema(UnloadRequest))
    async def unload(request: Request) -> Response:
        """Stop serving an adapter; what is under way ends on it."""
        body = await read_model(request, settings, UnloadRequest)
        if not body.lora_name:
            raise _missing("'lora_name' needs to be provided to unload a LoRA adapter.")
        freed = await desk.unload(body.lora_name)
        text = f"Success: LoRA adapter '{body.lora_name}' removed successfully."
        return PlainTextResponse(text, headers={"x-loquetier-freed-bytes": str(freed)})

    @routes.post(
        "/v1/rollback_lora_adapter", dependencies=[need(Scope.ADMIN)], openapi_extra=body_schema(RollbackRequest)
    )
    async def rollback(request: Request) -> dict[str, Any]:
        """Have an older version, still in memory, answer under the name again."""
        body = await read_model(request, settings, RollbackRequest)
        info = await desk.rollback(body.lora_name, body.version)
        return {"object": "adapter.version", "lora_name": info.name, "version": info.version}

    @routes.get("/v1/lora_adapters", dependencies=[need(Scope.ADMIN)])
    async def versions() -> dict[str, Any]:
        """Every version in memory, the live one of each name marked."""
        data = [
            {"object": "adapter.version", "id": v.label, "lora_name": v.name, "version": v.number,
             "live": v.is_live, "running": v.users, "method": v.spec.method,
             "r": v.spec.r if isinstance(v.spec, LoraSpec) else None}
            for v in services.port.versions()
        ]  # fmt: skip
        return {"object": "list", "data": data}

    return routes


def _missing(text: str) -> ApiError:
    return ApiError(400, text, kind="InvalidUserInput", code="invalid_value", param="lora_name")
