"""``POST /v1/chat/completions``."""

from __future__ import annotations

import uuid

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from loquetier.server.answering import answer
from loquetier.server.auth import Scope
from loquetier.server.bodies import read_model
from loquetier.server.chat_shape import ChatShape
from loquetier.server.conversation import read_conversation, tools_of
from loquetier.server.guard import need
from loquetier.server.openapi import body_schema
from loquetier.server.orders import Order, chat_params, check_size, refuse_unsupported, streaming_of
from loquetier.server.schemas.chat import ChatRequest
from loquetier.server.services import Services


def router(services: Services) -> APIRouter:
    """The route."""
    routes = APIRouter(tags=["inference"])

    @routes.post("/v1/chat/completions", dependencies=[need(Scope.INFER)], openapi_extra=body_schema(ChatRequest))
    async def chat(request: Request) -> Response:
        """Answer a conversation, whole or as a stream."""
        settings = services.settings
        body = await read_model(request, settings, ChatRequest)
        refuse_unsupported(body)
        check_size(1, body.n or 1, settings)
        order = Order(
            request_id=f"chatcmpl-{uuid.uuid4().hex}",
            model=body.model,
            params=chat_params(body, services.port.vocab_size),
            priority=body.priority or 0,
            streaming=streaming_of(body),
            return_token_ids=bool(body.return_token_ids),
            cache_salt=body.cache_salt,
            constrain=await services.grammars.constraint(body),
        )
        messages, tools = read_conversation(body.messages, settings.max_messages), tools_of(body)
        services.models.find(request.scope["state"]["principal"], body.model)
        request.scope["state"]["model"] = body.model
        tokens = await services.text.render(messages, tools)
        created = int(services.wall())

        def shape(label: str) -> ChatShape:
            return ChatShape(order, services.text, created, label, tokens)

        return await answer(services, request, order, [tokens], shape)

    return routes
