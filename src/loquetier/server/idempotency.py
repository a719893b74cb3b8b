"""The `Idempotency-Key` header."""

from __future__ import annotations

from starlette.requests import Request

from loquetier.server.problems import bad

MAX_LENGTH = 255


def idempotency_key(request: Request) -> str | None:
    """The caller's key for one thing to be made. Raises ApiError for what is none."""
    found = request.headers.getlist("idempotency-key")
    if not found:
        return None
    key = found[0]
    if len(found) > 1 or not 0 < len(key) <= MAX_LENGTH or not key.isascii() or not key.isprintable():
        raise bad(f"Idempotency-Key must be one header of 1 to {MAX_LENGTH} printable ASCII characters")
    return key
