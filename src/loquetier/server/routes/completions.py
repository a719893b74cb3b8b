"""``POST /v1/completions``."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from loquetier.server.answering import answer
from loquetier.server.auth import Scope
from loquetier.server.bodies import read_model
from loquetier.server.completion_shape import CompletionShape, PromptText
from loquetier.server.guard import need
from loquetier.server.openapi import body_schema
from loquetier.server.orders import Order, check_size, completion_params, refuse_unsupported, streaming_of
from loquetier.server.problems import bad
from loquetier.server.schemas.completions import CompletionRequest
from loquetier.server.services import Services
from loquetier.server.settings import ServerSettings


def router(services: Services) -> APIRouter:
    """The route."""
    routes = APIRouter(tags=["inference"])

    @routes.post(
        "/v1/completions",
        operation_id="complete",
        dependencies=[need(Scope.INFER)],
        openapi_extra=body_schema(CompletionRequest),
    )
    async def complete(request: Request) -> Response:
        """Go on with one text or many, whole or as a stream."""
        body = await read_model(request, services.settings, CompletionRequest)
        refuse_unsupported(body)
        given = split_prompts(body.prompt, body.n or 1, services.settings)
        order = Order(
            request_id=f"cmpl-{uuid.uuid4().hex}",
            model=body.model,
            params=completion_params(body, services.port.vocab_size),
            priority=body.priority or 0,
            streaming=streaming_of(body),
            return_token_ids=bool(body.return_token_ids),
            cache_salt=body.cache_salt,
            constrain=await services.grammars.constraint(body),
        )
        services.models.find(request.scope["state"]["principal"], body.model)
        request.scope["state"]["model"] = body.model
        prompts = [await _read(services, prompt, body) for prompt in given]
        created = int(services.wall())

        def shape(label: str) -> CompletionShape:
            hides = body.max_tokens == 0
            return CompletionShape(order, services.text, created, label, prompts, bool(body.echo), hides)

        return await answer(services, request, order, [p.tokens for p in prompts], shape)

    return routes


def split_prompts(prompt: Any, n: int, settings: ServerSettings) -> list[str | list[int]]:
    """One entry per prompt, text or token ids. Raises ApiError: empty, of mixed types, or too many."""
    if isinstance(prompt, str):
        given: list[Any] = [prompt]
    elif isinstance(prompt, list) and prompt:
        given = [prompt] if isinstance(prompt[0], int) else prompt
    else:
        raise bad("prompt must be a string, a list of strings, token ids, or lists of token ids", "prompt")
    check_size(len(given), n, settings)
    kind = str if isinstance(given[0], str) else list
    for index, entry in enumerate(given):
        if not isinstance(entry, kind) or entry == []:
            raise bad(f"prompt[{index}] must be a non-empty {'string' if kind is str else 'list of ids'}", "prompt")
        if kind is list and not all(type(token) is int for token in entry):
            raise bad(f"prompt[{index}] must hold token ids only, as integers", "prompt")
    return given


async def _read(services: Services, prompt: str | list[int], body: CompletionRequest) -> PromptText:
    if isinstance(prompt, str):
        special = True if body.add_special_tokens is None else body.add_special_tokens
        return PromptText(tuple(await services.text.encode(prompt, add_special_tokens=special)), prompt)
    shows = body.echo or body.logprobs is not None
    if not shows or services.text.tokenizer is None or len(prompt) > services.port.max_context:
        return PromptText(tuple(prompt), "")
    if not all(0 <= token < services.port.vocab_size for token in prompt):
        return PromptText(tuple(prompt), "")  # refused with its number when it is queued
    skip = True if body.skip_special_tokens is None else body.skip_special_tokens
    return PromptText(tuple(prompt), await services.text.decode(prompt, skip_special_tokens=skip))
