"""Each route says which scope it needs; one that does not is refused when the app is built."""

from __future__ import annotations

from typing import Any

from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request

from loquetier.errors import IntegrityError
from loquetier.server.auth import Principal, Scope
from loquetier.server.gate import METRICS, PUBLIC
from loquetier.server.problems import ApiError


class Need:
    """A dependency: the caller's key has one of these scopes, or the route is public (no scope)."""

    def __init__(self, *scopes: Scope) -> None:
        self.scopes = frozenset(scopes)

    def __call__(self, request: Request) -> None:
        """Raises ApiError 403."""
        if not self.scopes:
            return
        who: Principal = request.scope["state"]["principal"]
        if not self.scopes & who.scopes:
            names = " or ".join(sorted(s.value for s in self.scopes))
            raise ApiError(403, f"this key lacks the scope {names}", code="insufficient_permissions")


def need(*scopes: Scope) -> Any:
    """``dependencies=[need(Scope.INFER)]``; without arguments for a public path."""
    return Depends(Need(*scopes))


def needs_of(route: APIRoute) -> Need | None:
    """What a route says."""
    return next((d.dependency for d in route.dependencies if isinstance(d.dependency, Need)), None)


def routes_of(app: FastAPI) -> list[APIRoute]:
    """Every route of the app.

    Raises:
        IntegrityError: one is of another kind (a mount, a plain route), which no scope can guard.
    """
    found: list[APIRoute] = []
    for context in app.routes:
        if not isinstance(context, APIRoute):
            raise IntegrityError(f"route {getattr(context, 'path', context)!r} is no APIRoute: it has no scope")
        found.append(context)
    return found


def check_guards(app: FastAPI) -> None:
    """Raises IntegrityError for a route without a scope that is not one of the public paths."""
    for route in routes_of(app):
        need_of_route = needs_of(route)
        if need_of_route is None or (not need_of_route.scopes and route.path not in {*PUBLIC, METRICS}):
            raise IntegrityError(f"route {route.path} names no scope: add dependencies=[need(...)]")
