"""Request bodies: bounded in bytes, time and depth before anything is built from them."""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar, get_args

import msgspec
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect, Request

from loquetier.server.problems import ApiError, bad, too_slow
from loquetier.server.settings import ServerSettings

M = TypeVar("M", bound=BaseModel)
_INLINE_BYTES = 64 * 1024
"""Larger bodies are parsed off the event loop."""
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
"""A string as a whole, or a bracket."""


async def read_json(request: Request, settings: ServerSettings) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        ApiError: 415 wrong type, 413 too large, 408 too slow, 400 not JSON, not an object, or too deep.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, f"Content-Type is {kind[:80]!r}; it must be application/json", code="unsupported_media_type"
        )
    body = await _read(request, settings)
    if len(body) <= _INLINE_BYTES:
        return parse_json(body, settings.max_json_depth)
    return await asyncio.to_thread(parse_json, body, settings.max_json_depth)


async def _read(request: Request, settings: ServerSettings) -> bytes:
    declared = request.headers.get("content-length", "")
    limit = settings.max_body_bytes
    if declared.isdigit() and int(declared[:20]) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise _too_large(limit)
                parts.append(part)
    except TimeoutError:
        raise too_slow(f"the body was not complete after {settings.body_timeout:g} s") from None
    return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than {limit} bytes", code="request_too_large", headers={"Connection": "close"}
    )


def parse_json(body: bytes, max_depth: int) -> dict[str, Any]:
    """Strict JSON (no NaN, no Infinity), an object, not nested deeper than `max_depth`. Raises ApiError."""
    depth = 0
    for match in _TOKEN.finditer(body):
        first = match[0][:1]
        depth += (first in b"[{") - (first in b"]}")
        if depth > max_depth:
            raise bad(f"the JSON body is nested deeper than {max_depth}")
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError, ValueError) as error:
        raise bad(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise bad("the JSON body must be an object")
    return value


async def read_model(request: Request, settings: ServerSettings, kind: type[M]) -> M:
    """The body, validated. Raises ApiError as `read_json`, and 400 with `param` for what the schema refuses."""
    return parse_model(await read_json(request, settings), kind)


def parse_model(value: dict[str, Any], kind: type[M]) -> M:
    """A JSON object, validated. Raises ApiError 400 with `param` for what the schema refuses."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise from_validation(error, kind) from error


def from_validation(error: ValidationError, kind: type[BaseModel]) -> ApiError:
    """The first problem as 400; `param` is its place in `kind`, as ``messages[0].content``."""
    problems = error.errors(include_url=False, include_input=False)
    # Of a union ("auto" or a number) every member complains: the last one is the most general.
    first = next((p for p in problems if p["type"] != "literal_error"), problems[0])
    first = _of_its_kind(first, problems)
    param = ""
    for part in first["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif not part[:1].isupper() and "[" not in part and part not in _UNION_TAGS:
            param += f".{part}" if param else part
    message = first["msg"]
    if first["type"] == "extra_forbidden":
        message = f"there is no such setting; there are {', '.join(_fields(kind, first['loc'][:-1]))}"
    return bad(f"{param or 'body'}: {message}"[:1000], param[:120] or None, "invalid_value")


def _of_its_kind(first: ErrorDetails, problems: list[ErrorDetails]) -> ErrorDetails:
    """Of a union ("a" or ["a"]) the complaint of the member that the value is one of, where there is such a member."""
    place = first["loc"][:-1]
    if not first["type"].endswith("_type") or first["loc"][-1] not in _UNION_TAGS:
        return first
    others = (p for p in problems if p["loc"][: len(place)] == place and not p["type"].endswith("_type"))
    return next(others, first)


def _fields(kind: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """Names of the object that lies at `place` in `kind`."""
    for part in place:
        annotation = kind.model_fields[str(part)].annotation
        kind = next(k for k in (annotation, *get_args(annotation)) if isinstance(k, type) and issubclass(k, BaseModel))
    return list(kind.model_fields)


_UNION_TAGS = frozenset(
    {"str", "int", "float", "bool", "tuple", "list", "constrained-str", "constrained-int", "constrained-float"}
)
"""Names of a union's members, which pydantic puts into the place."""

__all__ = ["ClientDisconnect", "from_validation", "parse_json", "parse_model", "read_json", "read_model"]
