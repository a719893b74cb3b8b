"""``/v1/files``. Scope: train."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from loquetier.server.auth import Principal, Scope
from loquetier.server.file_desk import no_such_file
from loquetier.server.guard import need
from loquetier.server.idempotency import idempotency_key
from loquetier.server.openapi import errors, links
from loquetier.server.paging import place_behind
from loquetier.server.problems import ApiError, overloaded
from loquetier.server.schemas.files import UPLOAD_SCHEMA, FileDeleted, FileList, FileObject
from loquetier.server.store.files import FileRow
from loquetier.server.tuning import Tuning

_CHUNK = 1 << 18
_GUARD = [need(Scope.TRAIN)]


def router(tuning: Tuning) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["files"])
    _upload_route(routes, tuning)
    _look_routes(routes, tuning)
    _content_route(routes, tuning)
    _delete_route(routes, tuning)
    return routes


def _upload_route(routes: APIRouter, tuning: Tuning) -> None:
    @routes.post(
        "/v1/files",
        operation_id="create_file",
        dependencies=_GUARD,
        response_model_exclude_none=True,
        responses=errors(400, 403, 413, 415, 507)
        | links("file_id", "get_file", "get_file_content", "delete_file", bodies={"create_job": "training_file"}),
        openapi_extra=UPLOAD_SCHEMA,
    )
    async def create_file(request: Request) -> FileObject:
        """Upload a file: JSON lines, or .json, .csv, .parquet (an extension), also compressed, told by their bytes."""
        who: Principal = request.scope["state"]["principal"]
        if tuning.admission.is_draining:
            raise overloaded("the server is shutting down", code="shutting_down")
        key = idempotency_key(request)
        return shown(await tuning.files.upload(request, who, key))


def _look_routes(routes: APIRouter, tuning: Tuning) -> None:
    table = tuning.store.files

    @routes.get("/v1/files", dependencies=_GUARD, response_model_exclude_none=True, responses=errors(400))
    async def list_files(
        request: Request,
        after: Annotated[str | None, Query(max_length=128)] = None,
        limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
        order: Literal["asc", "desc"] = "desc",
        purpose: Annotated[str | None, Query(max_length=64)] = None,
    ) -> FileList:
        """The caller's files."""
        who: Principal = request.scope["state"]["principal"]

        def place_of(file_id: str) -> int | None:
            file = table.find(file_id, who.owner)
            return None if file is None else file.seq

        behind = place_behind(after, place_of, "none of your files")
        found = table.page(who.owner, after=behind, limit=limit + 1, descending=order == "desc", purpose=purpose)
        data = [shown(file) for file in found[:limit]]
        first, last_id = (data[0].id, data[-1].id) if data else ("", "")
        return FileList(data=data, first_id=first, last_id=last_id, has_more=len(found) > limit)

    @routes.get(
        "/v1/files/{file_id}",
        operation_id="get_file",
        dependencies=_GUARD,
        response_model_exclude_none=True,
        responses=errors(404),
    )
    async def get_file(request: Request, file_id: str) -> FileObject:
        """One file."""
        return shown(tuning.files.find(request.scope["state"]["principal"], file_id))


def _content_route(routes: APIRouter, tuning: Tuning) -> None:
    @routes.get(
        "/v1/files/{file_id}/content",
        operation_id="get_file_content",
        dependencies=_GUARD,
        response_class=Response,
        responses=errors(404) | {200: {"content": {"application/octet-stream": {}}}},
    )
    async def get_content(request: Request, file_id: str) -> Response:
        """The bytes as they were uploaded. Whole files only: ranges are not served."""
        file = tuning.files.find(request.scope["state"]["principal"], file_id)
        opened = await asyncio.to_thread(_open, tuning.store.files.path(file_id), file)
        headers = {"Content-Length": str(file.bytes), "X-Content-Type-Options": "nosniff"}
        return StreamingResponse(_chunks(opened), 200, headers, "application/octet-stream")


def _delete_route(routes: APIRouter, tuning: Tuning) -> None:
    @routes.delete("/v1/files/{file_id}", operation_id="delete_file", dependencies=_GUARD, responses=errors(404))
    async def delete_file(request: Request, file_id: str) -> FileDeleted:
        """Delete a file. A job that has begun with it goes on."""
        who: Principal = request.scope["state"]["principal"]
        await asyncio.shield(asyncio.to_thread(tuning.files.delete, who, file_id))
        return FileDeleted(id=file_id)


def shown(file: FileRow) -> FileObject:
    """As clients see it."""
    known: dict[str, Any] = {name: getattr(file, name) for name in FileObject.model_fields if name != "object"}
    return FileObject(**known)


def _open(path: Path, file: FileRow) -> IO[bytes]:
    try:
        return path.open("rb")
    except FileNotFoundError as error:  # deleted between the look and now
        raise no_such_file(file.id) from error
    except OSError as error:
        raise ApiError(500, f"the content cannot be read: {error.strerror}", code="storage_error") from error


async def _chunks(file: IO[bytes]) -> AsyncIterator[bytes]:
    try:
        while chunk := await asyncio.to_thread(file.read, _CHUNK):
            yield chunk
    finally:
        file.close()
