"""``/v1/fine_tuning/jobs``, and deleting the models that jobs make. Scope: train."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from loquetier.server.auth import Principal, Scope
from loquetier.server.bodies import parse_model, read_json
from loquetier.server.guard import need
from loquetier.server.idempotency import idempotency_key
from loquetier.server.jobs.desk import canonical
from loquetier.server.jobs.shape import checkpoint_object, event_object, job_object
from loquetier.server.openapi import body_schema, errors, links
from loquetier.server.paging import place_behind
from loquetier.server.problems import ApiError, bad, model_not_found, overloaded
from loquetier.server.schemas.jobs import (
    CheckpointList,
    CreateJob,
    EventList,
    JobList,
    JobObject,
    ModelDeleted,
)
from loquetier.server.sse import EventStream, encode
from loquetier.server.store.jobs import JobRow
from loquetier.server.tuning import Tuning

_METADATA = re.compile(r"metadata\[(.{1,64})\]", re.DOTALL)
LINKED = ("get_job", "cancel_job", "pause_job", "resume_job", "list_job_events", "list_job_checkpoints")
"""Where a job's id leads."""
_GUARD = [need(Scope.TRAIN)]
_PAGE = 100
"""Events that a stream reads at once."""
Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(max_length=128)]


def router(tuning: Tuning) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["fine-tuning"])
    _create_route(routes, tuning)
    _steer_routes(routes, tuning)
    _delete_route(routes, tuning)
    _look_routes(routes, tuning)
    _event_route(routes, tuning)
    _checkpoint_route(routes, tuning)
    return routes


def _shown(tuning: Tuning, row: JobRow) -> JobObject:
    handle = tuning.running.handle(row.id)
    history = () if handle is None else handle.history
    return job_object(row, tuning.wall(), history, 0 if handle is None or not history else handle.total_steps)


def _create_route(routes: APIRouter, tuning: Tuning) -> None:
    @routes.post(
        "/v1/fine_tuning/jobs",
        operation_id="create_job",
        dependencies=_GUARD,
        responses=errors(404, 413, 415, 507) | links("job_id", *LINKED),
        openapi_extra=body_schema(CreateJob),
    )
    async def create_job(request: Request) -> JobObject:
        """Start training an adapter of the base on an uploaded file."""
        who: Principal = request.scope["state"]["principal"]
        value = await read_json(request, tuning.settings)
        body, key = parse_model(value, CreateJob), idempotency_key(request)
        if tuning.admission.is_draining:
            raise overloaded("the server is shutting down", code="shutting_down")
        work = asyncio.to_thread(tuning.jobs.create, who, body, canonical(value), key)
        return _shown(tuning, await asyncio.shield(work))


def _steer_routes(routes: APIRouter, tuning: Tuning) -> None:
    def steer(verb: str, does: Callable[[Principal, str], JobRow], description: str) -> None:
        @routes.post(
            f"/v1/fine_tuning/jobs/{{job_id}}/{verb}",
            operation_id=f"{verb}_job",
            name=f"{verb}_job",
            description=description,
            dependencies=_GUARD,
            responses=errors(404, 507) | links("job_id", *LINKED),
        )
        async def change_job(request: Request, job_id: str) -> JobObject:
            who: Principal = request.scope["state"]["principal"]
            return _shown(tuning, await asyncio.shield(asyncio.to_thread(does, who, job_id)))

    changes = tuning.changes
    steer("cancel", changes.cancel, "End a job; what it has published and its checkpoints go on answering.")
    steer("pause", changes.pause, "Stop a job after its current step, until it is resumed.")
    steer("resume", changes.resume, "Let a paused job go on.")


def _delete_route(routes: APIRouter, tuning: Tuning) -> None:
    @routes.delete("/v1/models/{model:path}", dependencies=_GUARD, responses=errors(404, 507))
    async def delete_model(request: Request, model: str) -> ModelDeleted:
        """Delete a fine-tuned model or a checkpoint of one; requests under way end on it."""
        who: Principal = request.scope["state"]["principal"]
        if model == tuning.runtime.base_name:
            raise ApiError(403, "the base cannot be deleted", code="insufficient_permissions", param="model")
        adapter = tuning.store.adapters.find(model, who.owner)
        if adapter is None or adapter.source == "loaded":
            raise model_not_found(model)
        await tuning.delete_model(model)
        return ModelDeleted(id=model)


def _look_routes(routes: APIRouter, tuning: Tuning) -> None:
    table = tuning.store.jobs

    @routes.get("/v1/fine_tuning/jobs", dependencies=_GUARD, responses=errors())
    async def list_jobs(request: Request, after: After = None, limit: Limit = 20) -> JobList:
        """The caller's jobs, newest first; ``metadata[KEY]=VALUE`` and ``metadata=null`` choose."""
        who: Principal = request.scope["state"]["principal"]

        def place_of(job_id: str) -> int | None:
            job = table.find(job_id, who.owner)
            return None if job is None else job.seq

        behind = place_behind(after, place_of, "none of your jobs")
        wanted, none = _metadata(request)
        found = table.page(who.owner, after=behind, limit=limit + 1, metadata=wanted, no_metadata=none)
        return JobList(data=[_shown(tuning, row) for row in found[:limit]], has_more=len(found) > limit)

    @routes.get("/v1/fine_tuning/jobs/{job_id}", operation_id="get_job", dependencies=_GUARD, responses=errors(404))
    async def get_job(request: Request, job_id: str) -> JobObject:
        """One job."""
        return _shown(tuning, tuning.changes.find(request.scope["state"]["principal"], job_id))


def _event_route(routes: APIRouter, tuning: Tuning) -> None:
    table = tuning.store.jobs

    @routes.get(
        "/v1/fine_tuning/jobs/{job_id}/events",
        operation_id="list_job_events",
        dependencies=_GUARD,
        response_model=EventList,
        responses=errors(404) | {200: {"content": {"text/event-stream": {}}}},
    )
    async def list_events(
        request: Request, job_id: str, after: After = None, limit: Limit = 20, stream: bool = False
    ) -> EventList | Response:
        """What happened, newest first; with ``stream=true`` oldest first, and on as it happens, until the job ends."""
        job = tuning.changes.find(request.scope["state"]["principal"], job_id)
        behind = place_behind(after, lambda event: table.event_seq(job.id, event), "no event of this job")
        if stream:
            return EventStream(_follow(tuning, job.id, behind), AsyncExitStack(), {})
        found = table.events(job.id, after=behind, limit=limit + 1)
        return EventList(data=[event_object(row) for row in found[:limit]], has_more=len(found) > limit)


def _checkpoint_route(routes: APIRouter, tuning: Tuning) -> None:
    table = tuning.store.jobs

    @routes.get(
        "/v1/fine_tuning/jobs/{job_id}/checkpoints",
        operation_id="list_job_checkpoints",
        dependencies=_GUARD,
        responses=errors(404),
    )
    async def list_checkpoints(request: Request, job_id: str, after: After = None, limit: Limit = 10) -> CheckpointList:
        """Checkpoints that answer as models, newest first."""
        job = tuning.changes.find(request.scope["state"]["principal"], job_id)

        def place_of(checkpoint: str) -> int | None:
            return next((row.seq for row in table.checkpoints(job.id) if row.id == checkpoint), None)

        behind = place_behind(after, place_of, "no checkpoint of this job")
        found = table.checkpoints(job.id, after=behind, limit=limit + 1)
        data = [checkpoint_object(row) for row in found[:limit]]
        ends = (data[0].id, data[-1].id) if data else (None, None)
        return CheckpointList(data=data, first_id=ends[0], last_id=ends[1], has_more=len(found) > limit)


def _metadata(request: Request) -> tuple[dict[str, str], bool]:
    """The filter of a list: pairs that a job must have, and whether it must have none. Raises ApiError."""
    wanted: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        found = _METADATA.fullmatch(name)
        if found:
            wanted[found[1]] = value
    literal = request.query_params.get("metadata")
    if literal not in (None, "null") or (literal and wanted) or len(wanted) > 16:
        raise bad("metadata must be metadata[KEY]=VALUE, at most 16 times, or the literal metadata=null", "metadata")
    return wanted, literal == "null"


async def _follow(tuning: Tuning, job_id: str, behind: int | None) -> AsyncGenerator[bytes, None]:
    """Events as they come; ends with the job, or with an error when the server stops."""
    table = tuning.store.jobs
    with tuning.bell.listening(job_id) as rung:
        while True:
            rung.clear()
            job = table.find(job_id)
            # A job's last event is in the transaction of its end, or before: what is read after this look is all.
            is_over = job is None or (job.is_final and tuning.running.handle(job_id) is None)
            while rows := table.events(job_id, after=behind, limit=_PAGE, descending=False):
                behind = rows[-1].seq
                yield b"".join(encode(event_object(row).model_dump()) for row in rows)
            if is_over:
                return
            if tuning.admission.is_draining:
                raise overloaded("the server is shutting down", code="shutting_down")
            await rung.wait()
