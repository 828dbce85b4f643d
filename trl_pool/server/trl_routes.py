"""The endpoints of `trl vllm-serve` of TRL 1.0 – 1.10."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from .. import validation
from ..config import PoolConfig
from ..dialects.base import Job
from ..dialects.trl_requests import (
    ChatRequest,
    GenerateRequest,
    InitCommunicatorRequest,
    SequenceLogprobsRequest,
    UpdateNamedParamRequest,
)
from ..errors import InvalidRequestError
from ..pool import AsyncVLLMClientPool
from .failures import WrongDialectError, json_response
from .plumbing import REQUEST_ID, add, broadcast_answer, broadcast_body, pool_of, read_body, while_connected
from .settings import GatewaySettings

logger = logging.getLogger(__name__)

_OWN_CLIENT = "trl_pool/"


def _form(request: Request, body: bytes) -> dict[str, Any]:
    """Bodies of `trl` servers are passed on unread where they can be; for `vllm serve` they are translated."""
    return {"lenient": True} if pool_of(request).one_group else {"raw": True, "body": body}


def _scorable(request: Request, asked: SequenceLogprobsRequest) -> SequenceLogprobsRequest:
    if pool_of(request).one_group and asked.response_format != "json":
        raise InvalidRequestError("response_format: must be 'json' where the backends are `vllm serve`")
    return asked


def add_data_routes(app: FastAPI) -> None:
    settings: GatewaySettings = app.state.settings

    async def serve(request: Request, make_job: Callable[[bytes, PoolConfig], Job]) -> Response:
        job = make_job(await read_body(request, settings.max_body_bytes), pool_of(request).limits())
        work = pool_of(request).submit(
            job,
            session_id=request.headers.get(settings.sticky_header),
            headers={REQUEST_ID: request.state.request_id},
        )
        result = await while_connected(request, work)
        return json_response(result.value, headers={"x-backend": ", ".join(result.backends)})

    async def generate(request: Request) -> Response:
        """Completions for prompts, spread over the backends."""
        return await serve(
            request,
            lambda body, limits: validation.generate_job(
                validation.parse(GenerateRequest, body), limits, **_form(request, body)
            ),
        )

    async def chat(request: Request) -> Response:
        """Completions for conversations, spread over the backends."""
        return await serve(
            request,
            lambda body, limits: validation.chat_job(
                validation.parse(ChatRequest, body), limits, **_form(request, body)
            ),
        )

    async def get_sequence_logprobs(request: Request) -> Response:
        """Logprobs of given sequences, spread over the backends."""
        return await serve(
            request,
            lambda body, limits: validation.score_job(
                _scorable(request, validation.parse(SequenceLogprobsRequest, body)), limits, **_form(request, body)
            ),
        )

    add(app, "POST", "/generate/", generate, GenerateRequest, direct=True)
    add(app, "POST", "/chat/", chat, ChatRequest, direct=True)
    add(app, "POST", "/get_sequence_logprobs/", get_sequence_logprobs, SequenceLogprobsRequest, direct=True)


def _trl(request: Request) -> AsyncVLLMClientPool:
    pool = pool_of(request)
    if pool.one_group:
        raise WrongDialectError(
            f"{request.url.path} is an endpoint of `trl vllm-serve`, and the backends are `vllm serve`; "
            "use /init_weight_transfer_engine, /start_weight_update, …"
        )
    return pool


def add_control_routes(app: FastAPI) -> None:
    settings: GatewaySettings = app.state.settings

    async def get_world_size(request: Request) -> Response:
        """World size of one backend, which is what a trainer of the `trl` dialect has to know; for `vllm serve` the
        sum, since one update group spans them all."""
        return json_response({"world_size": await pool_of(request).get_world_size()})

    async def init_communicator(request: Request) -> Response:
        """Makes every backend wait for its trainer's connection."""
        body = await read_body(request, settings.max_body_bytes)
        validation.parse(InitCommunicatorRequest, body)
        pool = _trl(request)
        members = pool.weights.everybody()
        results = await pool.separate.open({b.name: body for b in members}, members, fresh=True)
        headers = {}
        if len(members) > 1 and not request.headers.get("user-agent", "").startswith(_OWN_CLIENT):
            text = (
                f"{len(members)} servers each wait for a trainer connection of their own, and a stock trainer makes "
                "one; use trl_pool.VLLMClientPool in the trainer"
            )
            logger.warning("init_communicator: %s", text)
            headers["warning"] = f'199 trl_pool "{text}"'
        return broadcast_answer("init_communicator", results, headers)

    async def update_named_param(request: Request) -> Response:
        """Announces a parameter to every backend; the first one closes the gate until `/reset_prefix_cache/`."""
        body = await read_body(request, settings.max_body_bytes)
        name = validation.parse(UpdateNamedParamRequest, body).name
        return broadcast_answer(
            "update_named_param", await _trl(request).separate.announce(name, body, owner="gateway")
        )

    async def reset_prefix_cache(request: Request) -> Response:
        """Resets every backend's prefix cache; after an update that publishes it."""
        pool = pool_of(request)
        if pool.one_group:
            results = await pool.relay.reset_caches(request.url.query)
            return json_response({"success": True, **broadcast_body("reset_prefix_cache", results)})
        return broadcast_answer("reset_prefix_cache", await pool.separate.reset_caches())

    async def close_communicator(request: Request) -> Response:
        """Makes every backend leave its weight update group."""
        return broadcast_answer("close_communicator", await _trl(request).separate.close())

    add(app, "GET", "/get_world_size/", get_world_size)
    add(app, "POST", "/init_communicator/", init_communicator, InitCommunicatorRequest)
    add(app, "POST", "/update_named_param/", update_named_param, UpdateNamedParamRequest)
    add(app, "POST", "/reset_prefix_cache/", reset_prefix_cache)
    add(app, "POST", "/close_communicator/", close_communicator)
