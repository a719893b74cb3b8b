"""The ASGI application over a `Services`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from loquetier import __version__
from loquetier.errors import LoquetierError
from loquetier.server.auth import Scope
from loquetier.server.gate import Gate
from loquetier.server.guard import check_guards, need
from loquetier.server.problems import ApiError, bad, from_error, response_of
from loquetier.server.routes import adapters, chat, completions, files, health, jobs, models, tokens
from loquetier.server.services import Services

ROOMS = (models, chat, completions, tokens, adapters, health)
_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(services: Services, more: Sequence[APIRouter] = ()) -> FastAPI:
    """The app; `more` are routers of other rooms.

    Raises:
        IntegrityError: a route names no scope.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        services.text.close()
        services.grammars.close()

    app = FastAPI(
        title="Loquetier",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    tuned = [] if services.tuning is None else [files.router(services.tuning), jobs.router(services.tuning)]
    for router in (*(room.router(services) for room in ROOMS), *tuned, *more):
        app.router.routes.extend(router.routes)  # flat, so that `check_guards` sees every route as it is

    @app.get("/openapi.json", dependencies=[need(*Scope)], include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        return app.openapi()

    app.add_exception_handler(LoquetierError, _on_error)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_middleware(Gate, services=services)
    check_guards(app)
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LoquetierError)
    return response_of(from_error(error, request.scope["state"].get("model")))


async def _on_invalid(_: Request, error: Exception) -> Response:
    """A query or path parameter that the schema refuses: OpenAI's shape, not FastAPI's."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = str(first["loc"][-1])
    return response_of(bad(f"{param}: {first['msg']}"[:1000], param[:120], "invalid_value"))


async def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code)
    return response_of(ApiError(error.status_code, str(error.detail), code=code, headers=error.headers))
