"""``/v1/models``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from loquetier.server.auth import Scope
from loquetier.server.guard import need
from loquetier.server.services import Services


def router(services: Services) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["models"])
    models = services.models

    @routes.get("/v1/models", dependencies=[need(*Scope)])
    async def list_models(request: Request) -> dict[str, Any]:
        """The base first, then the adapters."""
        return {"object": "list", "data": models.cards(request.scope["state"]["principal"])}

    @routes.get("/v1/models/{model:path}", operation_id="get_model", dependencies=[need(*Scope)])
    async def get_model(request: Request, model: str) -> dict[str, Any]:
        """One model, also ``name@version`` and names with "/" and ":"."""
        return models.card(models.find(request.scope["state"]["principal"], model), model)

    return routes
