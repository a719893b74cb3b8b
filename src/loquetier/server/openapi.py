"""Bodies in ``/openapi.json``: they are read by `bodies`, so FastAPI does not see them by itself."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def body_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route whose JSON body is a `kind`."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.update(_inline(schema, schema.pop("$defs", {})))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inline(value: Any, definitions: dict[str, Any]) -> Any:
    """References replaced by what they mean: no definition here refers to itself."""
    if isinstance(value, dict):
        if "$ref" in value:
            return _inline(definitions[value["$ref"].rpartition("/")[2]], definitions)
        return {k: _inline(v, definitions) for k, v in value.items()}
    return [_inline(v, definitions) for v in value] if isinstance(value, list) else value
