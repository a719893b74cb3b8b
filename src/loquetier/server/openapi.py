"""Bodies in ``/openapi.json``: they are read by `bodies`, so FastAPI does not see them by itself."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel


def body_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route whose JSON body is a `kind`."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.update(_inline(schema, schema.pop("$defs", {})))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: the statuses of its own, and those that every route has."""
    shape = {"content": {"application/json": {"schema": ERROR_SCHEMA}}}
    known = sorted({400, 401, 403, 429, *statuses})
    return {status: {"description": HTTPStatus(status).phrase, **shape} for status in known}


def links(
    parameter: str, *operations: str, value: str = "$response.body#/id", bodies: Mapping[str, str] | None = None
) -> dict[int | str, dict[str, Any]]:
    """`responses` with links: what a program can do next with what this answer tells.

    Args:
        parameter: takes `value` in each of `operations`.
        value: a runtime expression of OpenAPI.
        bodies: operation -> field of its JSON body that takes `value`.
    """
    found: dict[str, Any] = {o: {"operationId": o, "parameters": {parameter: value}} for o in operations}
    for operation, name in (bodies or {}).items():
        found[operation] = {"operationId": operation, "requestBody": {name: value}}
    return {200: {"description": "Successful Response", "links": found}}


ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
"""OpenAI's error object."""


def _inline(value: Any, definitions: dict[str, Any]) -> Any:
    """References replaced by what they mean: no definition here refers to itself."""
    if isinstance(value, dict):
        if "$ref" in value:
            return _inline(definitions[value["$ref"].rpartition("/")[2]], definitions)
        return {k: _inline(v, definitions) for k, v in value.items()}
    return [_inline(v, definitions) for v in value] if isinstance(value, list) else value
