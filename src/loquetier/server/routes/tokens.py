"""``/tokenize`` and ``/detokenize``, as vLLM has them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from loquetier.server.auth import Scope
from loquetier.server.bodies import read_model
from loquetier.server.conversation import read_conversation
from loquetier.server.guard import need
from loquetier.server.openapi import body_schema
from loquetier.server.orders import refuse_unsupported
from loquetier.server.problems import bad
from loquetier.server.schemas.tokens import DetokenizeRequest, TokenizeRequest
from loquetier.server.services import Services


def router(services: Services) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["tokens"])

    @routes.post("/tokenize", dependencies=[need(Scope.INFER)], openapi_extra=body_schema(TokenizeRequest))
    async def tokenize(request: Request) -> dict[str, Any]:
        """Token ids of a prompt or a conversation, exactly as inference would see it."""
        body = await read_model(request, services.settings, TokenizeRequest)
        refuse_unsupported(body)
        if (body.prompt is None) == (body.messages is None):
            raise bad("give either 'prompt' or 'messages'", "prompt")
        _check_model(request, body.model)
        tokens = await _tokens(body)
        texts = [services.text.piece(t) for t in tokens] if body.return_token_strs else None
        context = services.port.max_context
        return {"count": len(tokens), "max_model_len": context, "tokens": tokens, "token_strs": texts}

    async def _tokens(body: TokenizeRequest) -> list[int]:
        if body.prompt is not None:
            special = True if body.add_special_tokens is None else body.add_special_tokens
            return await services.text.encode(body.prompt, add_special_tokens=special)
        if body.add_special_tokens:
            raise bad("'add_special_tokens' is for 'prompt': a template brings its own", "add_special_tokens")
        messages = read_conversation(body.messages or [], services.settings.max_messages)
        prompt = True if body.add_generation_prompt is None else body.add_generation_prompt
        return await services.text.render(messages, body.tools, add_generation_prompt=prompt)

    @routes.post("/detokenize", dependencies=[need(Scope.INFER)], openapi_extra=body_schema(DetokenizeRequest))
    async def detokenize(request: Request) -> dict[str, Any]:
        """Text of token ids, special tokens spelled out."""
        body = await read_model(request, services.settings, DetokenizeRequest)
        _check_model(request, body.model)
        limit = services.port.vocab_size
        if wrong := [t for t in body.tokens if t >= limit]:
            raise bad(f"tokens: id {wrong[0]} is not in [0, {limit})", "tokens")
        return {"prompt": await services.text.decode(body.tokens)}

    def _check_model(request: Request, model: str | None) -> None:
        if model is not None:
            services.models.find(request.scope["state"]["principal"], model)

    return routes
