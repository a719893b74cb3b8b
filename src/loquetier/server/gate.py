"""What every HTTP request passes first: request id, host, key, request limit; and what catches every error.

A plain ASGI middleware: it decides on ``scope["path"]``, never on a URL put together from headers.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loquetier.errors import LoquetierError
from loquetier.server.problems import ApiError, from_error, response_of
from loquetier.server.services import Services

log = structlog.get_logger("loquetier.server")

PUBLIC = frozenset({"/health", "/ready"})
"""Paths that need no key."""
METRICS = "/metrics"
"""Needs none by option."""
MAX_HEADER_BYTES = 32 * 1024
_LOCAL_HOST = re.compile(rb"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)


class Gate:
    """Authenticates before routing: an unknown path without a key is 401, not 404."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app, self._services = app, services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _Visit(self._app, self._services, scope).run(receive, send)


class _Visit:
    """One request on its way through."""

    def __init__(self, app: ASGIApp, services: Services, scope: Scope) -> None:
        self._app, self._services, self._scope = app, services, scope
        self._id = f"req-{uuid.uuid4().hex}"
        self._shown_id = _caller_id(_values(scope, b"x-request-id")) or self._id
        self._status = 0
        self._key = "-"
        self._began = services.clock()
        self._extra: dict[str, str] = {}

    async def run(self, receive: Receive, send: Send) -> None:
        state = self._scope.setdefault("state", {})
        state["request_id"] = self._id

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
                extra = {"x-request-id": self._shown_id, **self._extra}
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode("latin-1")) for name, value in extra.items()),
                ]
            await send(message)

        try:
            self._enter()
            await self._app(self._scope, receive, tagged)
        except ClientDisconnect:
            self._status = self._status or 499
        except LoquetierError as error:
            await self._tell(from_error(error), receive, tagged)
        except Exception:
            log.exception("unhandled_error", request_id=self._id, path=self._scope["path"][:200])
            await self._tell(ApiError(500, "internal error; the log has it", code="internal_error"), receive, tagged)
        finally:
            self._report()

    async def _tell(self, error: ApiError, receive: Receive, send: Send) -> None:
        if self._status == 0:  # an answer that has begun can only be cut off
            await response_of(error)(self._scope, receive, send)

    def _enter(self) -> None:
        """Raises ApiError for who may not come in."""
        services, scope = self._services, self._scope
        path = scope["path"]
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            raise ApiError(431, f"the headers have more than {MAX_HEADER_BYTES} bytes", code="headers_too_large")
        if not services.keys.keys and not services.settings.insecure:
            _check_host(_values(scope, b"host"))
        if path in PUBLIC or (path == METRICS and services.settings.public_metrics):
            return
        address = (scope.get("client") or ("?",))[0]
        throttled = services.bad_keys.check(address)
        who = services.keys.find(_values(scope, b"authorization"))
        if who is None:
            services.bad_keys.count(address)
            raise throttled or ApiError(
                401,
                "Incorrect API key provided, or none: send one `Authorization: Bearer KEY` header.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        scope["state"]["principal"], self._key = who, who.id
        services.limiter.take_request(who)
        self._extra = services.limiter.headers(who)

    def _report(self) -> None:
        services = self._services
        services.metrics.answered(self._status)
        if self._scope["path"] in PUBLIC and self._status == 200:
            return
        log.info(
            "request",
            request_id=self._id,
            client_request_id=self._shown_id if self._shown_id != self._id else None,
            key=self._key,
            method=self._scope["method"][:16],
            path=self._scope["path"][:200],
            status=self._status,
            seconds=round(services.clock() - self._began, 4),
            model=self._scope["state"].get("model"),
        )


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


def _caller_id(values: Sequence[bytes]) -> str | None:
    """The caller's request id, to be echoed and logged only: at most 128 printable ASCII characters."""
    if len(values) != 1:
        return None
    return re.sub(r"[^\x21-\x7e]", "", values[0][:128].decode("latin-1")) or None


def _check_host(values: Sequence[bytes]) -> None:
    """Without keys only this machine may ask: a page that a browser was lured to has another Host."""
    if len(values) != 1 or not _LOCAL_HOST.fullmatch(values[0]):
        raise ApiError(
            400, "Host must be localhost or a loopback address as long as there are no API keys", code="invalid_host"
        )
