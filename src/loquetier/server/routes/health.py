"""``/health``, ``/ready`` and ``/metrics``."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from loquetier.server.auth import Scope
from loquetier.server.guard import need
from loquetier.server.problems import overloaded
from loquetier.server.services import Services


def router(services: Services) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["operations"])

    @routes.get("/health", dependencies=[need()])
    async def health() -> Response:
        """200 while the engine's loop lives."""
        problem = services.watch.problem
        if problem is not None:
            raise overloaded(problem, code="engine_stopped")
        return JSONResponse({"status": "ok"})

    @routes.get("/ready", dependencies=[need()])
    async def ready() -> Response:
        """200 while new requests are taken."""
        problem = services.watch.problem
        if services.admission.is_draining:
            problem = "the server is shutting down"
        elif services.tuning is not None and services.tuning.problem is not None:
            problem = services.tuning.problem
        elif services.watch.pulse is None:
            problem = problem or "the engine has not answered yet"
        if problem is not None:
            raise overloaded(problem, code="not_ready")
        return JSONResponse({"status": "ready"})

    @routes.get("/metrics", dependencies=[need() if services.settings.public_metrics else need(Scope.ADMIN)])
    async def metrics() -> Response:
        """Prometheus text. It has names of every owner's models: for the operator."""
        page = services.metrics.page(services.watch.pulse)
        return Response(page, media_type=CONTENT_TYPE_LATEST)

    return routes
