"""What a client is told when something is wrong: one shape, OpenAI's, with all four keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from loquetier.errors import (
    AdapterChangedError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    ContextLengthError,
    EngineStoppedError,
    LoquetierError,
)

RETRY_SECONDS = 5
"""`Retry-After` where nothing better is known."""


class ApiError(LoquetierError):
    """An answer other than 200, with everything the client needs to act on it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.api_code, self.param = status, code, param
        self.kind = kind or kind_of(status)
        self.headers = dict(headers or {})


def kind_of(status: int) -> str:
    """OpenAI's `type` for a status."""
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400."""
    return ApiError(400, message, code=code, param=param)


def unsupported(param: str, hint: str = "") -> ApiError:
    """400 for a known field that is not honoured."""
    return bad(f"{param!r} is not supported by this server{hint}", param, "unsupported_parameter")


def model_not_found(model: str) -> ApiError:
    """404, the same for a model that does not exist and one that this key may not see."""
    shown = "".join(c if c.isprintable() else "?" for c in model[:64]) + ("..." if len(model) > 64 else "")
    return ApiError(
        404,
        f"The model `{shown}` does not exist or you do not have access to it.",
        code="model_not_found",
        param="model",
    )


def overloaded(message: str, seconds: float = RETRY_SECONDS, code: str = "server_overloaded") -> ApiError:
    """503: try again later."""
    return ApiError(503, message, code=code, headers={"Retry-After": retry_after(seconds)})


def too_many(message: str, seconds: float, code: str = "rate_limit_exceeded") -> ApiError:
    """429: this key (or address) has used up what it may use."""
    return ApiError(429, message, code=code, headers={"Retry-After": retry_after(seconds)})


def too_slow(message: str) -> ApiError:
    """408: the client took too long to send; the connection ends with it."""
    headers = {"Connection": "close", "x-should-retry": "false"}
    return ApiError(408, message, code="request_timeout", headers=headers)


def retry_after(seconds: float) -> str:
    """Whole seconds in [1, 120]: clients ignore longer ones."""
    return str(max(1, min(120, math.ceil(seconds))))


def from_error(error: LoquetierError, model: str | None = None) -> ApiError:
    """An error of the library as the client sees it. 5xx of unknown cause says nothing of our insides."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, AdapterNotFoundError) and model is not None:
        return model_not_found(model)
    if isinstance(error, EngineStoppedError):
        return overloaded("the engine has stopped; the server is going down", code=error.code)
    if isinstance(error, AdapterUnavailableError):  # whoever asks need not know where the files lie; the log says it
        why = "have changed since it was loaded" if isinstance(error, AdapterChangedError) else "cannot be read"
        return ApiError(error.status, f"the files of the model's adapter {why}; load it again", code=error.code)
    param = "messages" if isinstance(error, ContextLengthError) else None
    headers = {"Retry-After": str(RETRY_SECONDS)} if error.status == 503 else {}
    return ApiError(error.status, str(error), code=error.code, param=param, headers=headers)


def body_of(error: ApiError) -> dict[str, Any]:
    """The JSON object."""
    return {
        "error": {"message": str(error), "type": error.kind, "param": error.param, "code": error.api_code},
    }


def response_of(error: ApiError) -> Response:
    """The HTTP answer."""
    return Response(msgspec.json.encode(body_of(error)), error.status, error.headers, "application/json")
