"""The endpoints of `vllm serve` that TRL 1.11 and later, its async trainers, and curl use.

What asks for an answer goes to one backend, or is split over several where it carries several prompts; what changes a
server goes to all of them, all or nothing, exactly once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from .. import balancer, validation
from ..dialects.base import Endpoint, Job
from ..errors import AttemptError, BackendMismatchError, InvalidRequestError
from ..exchange import StreamedAnswer
from ..pool import AsyncVLLMClientPool
from .failures import WrongDialectError, json_response
from .plumbing import REQUEST_ID, Handler, add, broadcast_answer, broadcast_body, pool_of, read_body, while_connected
from .settings import GatewaySettings

# What concerns the connection, and what the gateway says itself.
_NOT_PASSED_ON = frozenset(
    {
        "connection",
        "content-length",
        "keep-alive",
        "upgrade",
        "trailer",
        "transfer-encoding",
        "server",
        "date",
        REQUEST_ID,
    }
)

logger = logging.getLogger(__name__)


def _vllm(request: Request) -> AsyncVLLMClientPool:
    pool = pool_of(request)
    if not pool.one_group:
        pool.require_recognised()
        raise WrongDialectError(
            f"{request.url.path} is an endpoint of `vllm serve`, and the backends are `trl vllm-serve`; "
            "use /generate/, /chat/, /get_sequence_logprobs/"
        )
    return pool


def _headers(request: Request) -> dict[str, str]:
    """What of a client's headers goes on: the request's id, and a key, where the gateway has none of its own."""
    headers = {REQUEST_ID: request.state.request_id}
    own: GatewaySettings = request.app.state.settings
    if own.backend_api_key is None and "authorization" in request.headers:
        headers["authorization"] = request.headers["authorization"]
    return headers


async def _object(request: Request) -> tuple[bytes, dict[str, Any]]:
    """A body, and what it says."""
    settings: GatewaySettings = request.app.state.settings
    body = await read_body(request, settings.max_body_bytes)
    return body, validation.parse_object(body)


def add_openai_routes(app: FastAPI) -> None:
    """Endpoints that ask for an answer."""
    settings: GatewaySettings = app.state.settings

    async def serve(request: Request, job: Job) -> Response:
        work = _vllm(request).submit(
            job, session_id=request.headers.get(settings.sticky_header), headers=_headers(request)
        )
        result = await while_connected(request, work)
        return json_response(result.value, headers={"x-backend": ", ".join(result.backends)})

    async def stream(request: Request, body: bytes, unit: Any, weight: int) -> Response:
        pool = _vllm(request)
        context = pool.stream(
            _target(request),
            body,
            key=balancer.affinity_key(unit, settings.prompt_sticky_prefix_chars),
            weight=weight,
            session_id=request.headers.get(settings.sticky_header),
            # The bytes pass through as they are, so it is the client who has to be able to decode them.
            headers={**_headers(request), "accept-encoding": request.headers.get("accept-encoding", "identity")},
        )
        name, response = await while_connected(request, context.__aenter__())
        return _Streamed(context, name, response)

    async def completions(request: Request) -> Response:
        """Completions; several prompts are spread over the backends."""
        body, fields = await _object(request)
        units = _apart(fields.get("prompt"))
        n = _completions(fields)
        if fields.get("stream"):
            return await stream(request, body, units[0], n * len(units))
        rest = {name: value for name, value in fields.items() if name != "prompt"}
        if len(units) == 1 or "prompt_embeds" in fields:
            return await serve(request, _passed(request, body, units[0], n))
        return await serve(request, Job(Endpoint.GENERATE, units, rest, n, raw=True, body=body))

    async def chat_completions(request: Request) -> Response:
        """A chat completion, by one backend."""
        body, fields = await _object(request)
        messages = fields.get("messages")
        unit = messages if isinstance(messages, list) and all(isinstance(m, dict) for m in messages) else ""
        if fields.get("stream"):
            return await stream(request, body, unit, _completions(fields))
        return await serve(request, _passed(request, body, unit, _completions(fields)))

    async def passed_on(request: Request) -> Response:
        """Answered by one backend."""
        body, fields = await _object(request)
        tokens = fields.get("token_ids")
        parameters = fields.get("sampling_params")
        n = _completions(parameters) if isinstance(parameters, dict) else 1
        return await serve(request, _passed(request, body, tokens if isinstance(tokens, list) else "", n))

    def asked(path: str) -> Handler:
        async def ask(request: Request) -> Response:
            """Answered by one backend: the others agree with it."""
            pool = _vllm(request)
            query = f"?{request.url.query}" if request.url.query else ""
            answer = await while_connected(request, pool.ask_one(path + query, headers=_headers(request)))
            return Response(answer.body, answer.status, media_type=answer.headers.get("content-type"))

        return ask

    add(app, "POST", "/v1/completions", completions, direct=True)
    add(app, "POST", "/v1/chat/completions", chat_completions, direct=True)
    add(app, "POST", "/v1/chat/completions/render", passed_on, direct=True)
    add(app, "POST", "/inference/v1/generate", passed_on, direct=True)
    for path in ("/v1/models", "/server_info", "/version"):
        add(app, "GET", path, asked(path))


def _passed(request: Request, body: bytes, unit: Any, n: int) -> Job:
    return Job(Endpoint.PASS, [unit], n=n, raw=True, body=body, target=_target(request))


def _target(request: Request) -> str:
    """The path as a server knows it."""
    path: str = request.scope["path"]
    return path.removeprefix(request.scope.get("root_path", "")).rstrip("/")


def _apart(prompt: Any) -> list[Any]:
    """The prompts that can be served apart, or a single one. What a server would refuse goes to one as it is."""
    if isinstance(prompt, list) and prompt:
        several = all(isinstance(one, str) for one in prompt) or all(isinstance(one, list) for one in prompt)
        return prompt if several else [prompt]
    return [prompt if isinstance(prompt, str) else ""]


def _completions(fields: dict[str, Any]) -> int:
    """`n`, which servers take as text, too; what they refuse counts as one."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return max(1, int(fields.get("n", 1)))
    return 1


class _Streamed(StreamingResponse):
    """A backend's answer, piece by piece. However it ends, its lease is given back."""

    def __init__(self, context: Any, backend: str, response: StreamedAnswer) -> None:
        self._context, self._whole = context, False
        headers = {name: value for name, value in response.headers.items() if name not in _NOT_PASSED_ON}
        super().__init__(self._pieces(response), response.status, {**headers, "x-backend": backend})

    async def _pieces(self, response: StreamedAnswer) -> AsyncIterator[bytes]:
        async for piece in response.pieces():
            yield piece
        # Before its end is passed on: whoever has the whole answer finds the backend free.
        self._whole = True
        await self._context.__aexit__(None, None, None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except AttemptError as problem:
            await self._context.__aexit__(AttemptError, problem, problem.__traceback__)
            # The head is out: all that is left is to break off, which the client sees. An answer without its end makes
            # the server close the connection.
            logger.warning("Request %s: its stream broke off: %s", scope["state"]["request_id"], problem)
            return
        except BaseException as error:
            if not self._whole:
                await self._context.__aexit__(type(error), error, error.__traceback__)
            raise
        if not self._whole:
            # A client that left in the middle says nothing about the backend.
            with contextlib.suppress(asyncio.CancelledError):
                await self._context.__aexit__(asyncio.CancelledError, asyncio.CancelledError(), None)


def add_development_routes(app: FastAPI) -> None:
    """Endpoints that change servers, and those that trainers ask beside them."""

    async def init(request: Request) -> Response:
        """Lets every backend join the trainer's weight update group, each at an offset of its own."""
        _, fields = await _object(request)
        init_info = fields.get("init_info")
        if not isinstance(init_info, dict):
            raise InvalidRequestError("init_info must be an object")
        for name in ("rank_offset", "world_size"):
            value = init_info.get(name, 1)
            if not isinstance(value, int) or value < 1:
                raise InvalidRequestError(f"init_info.{name} must be a positive number, got {value!r}")
        return broadcast_answer("init_weight_transfer_engine", await _vllm(request).relay.init(init_info))

    async def start(request: Request) -> Response:
        """Begins a weight update on every backend; requests wait until it has ended."""
        body, _ = await _object(request)
        return broadcast_answer("start_weight_update", await _vllm(request).relay.start(body))

    async def update(request: Request) -> Response:
        """Announces tensors to every backend, and returns when all have received them."""
        body, fields = await _object(request)
        info = fields.get("update_info")
        if not isinstance(info, dict):
            raise InvalidRequestError("update_info must be an object")
        names = info.get("names", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InvalidRequestError("update_info.names must be a list of names")
        return broadcast_answer("update_weights", await _vllm(request).relay.update(body, names))

    async def finish(request: Request) -> Response:
        """Ends the update, resets prefix caches, publishes the version and lets requests go on."""
        _, fields = await _object(request)
        return broadcast_answer("finish_weight_update", await _vllm(request).relay.finish(fields))

    async def pause(request: Request) -> Response:
        """Pauses every backend; requests that `mode=keep` freezes are not waited for by an update."""
        keep = request.query_params.get("mode") == "keep"
        return _same(await _vllm(request).relay.pause(request.url.query, keep=keep), {"status": "paused"})

    async def resume(request: Request) -> Response:
        """Lets every backend go on."""
        return _same(await _vllm(request).relay.resume(), {"status": "resumed"})

    async def is_paused(request: Request) -> Response:
        """Whether every backend is paused."""
        answers = await _vllm(request).ask_all("/is_paused")
        return json_response({"is_paused": all(answer.get("is_paused") for answer in answers.values())})

    async def weight_info(request: Request) -> Response:
        """The weight version that all backends report; 409 naming them when they differ."""
        versions = await _vllm(request).relay.versions()
        if len(set(versions.values())) > 1:
            raise BackendMismatchError(
                "The backends differ in weight version", {url: f"has {v!r}" for url, v in versions.items()}
            )
        return json_response({"weight_version": next(iter(versions.values()), None)})

    def adapters(load: bool) -> Handler:
        async def change(request: Request) -> Response:
            """Loads or unloads a LoRA adapter everywhere; a backend that comes back gets it before it serves."""
            body, fields = await _object(request)
            name = fields.get("lora_name")
            if not isinstance(name, str) or not name:
                raise InvalidRequestError("lora_name must be a string")
            results = await _vllm(request).broadcast_adapter(name, body, load=load)
            return broadcast_answer(request.url.path, results)

        return change

    async def shut_down(request: Request) -> Response:
        """Lets every backend leave the trainer's weight update group."""
        return broadcast_answer("shutdown_weight_transfer_engine", await _vllm(request).relay.shut_down())

    async def rename(request: Request) -> Response:
        """Gives the weights another version, without changing them."""
        body, fields = await _object(request)
        version = fields.get("new_version")
        if not isinstance(version, str):
            raise InvalidRequestError("new_version must be a string")
        return _same(await _vllm(request).relay.rename(body, version), {"success": True, "new_version": version})

    async def abort(request: Request) -> Response:
        """Aborts requests on every backend: those of the body's `request_ids`, or all."""
        body, _ = await _object(request)
        return _same(await _vllm(request).relay.everywhere("/abort_requests", body or b"{}"), {"status": "aborted"})

    add(app, "POST", "/init_weight_transfer_engine", init)
    add(app, "POST", "/start_weight_update", start)
    add(app, "POST", "/update_weights", update)
    add(app, "POST", "/finish_weight_update", finish)
    add(app, "POST", "/pause", pause)
    add(app, "POST", "/resume", resume)
    add(app, "GET", "/is_paused", is_paused)
    add(app, "GET", "/weight_info", weight_info)
    add(app, "POST", "/v1/load_lora_adapter", adapters(True))
    add(app, "POST", "/v1/unload_lora_adapter", adapters(False))
    add(app, "POST", "/shutdown_weight_transfer_engine", shut_down)
    add(app, "POST", "/update_weight_version", rename)
    add(app, "POST", "/abort_requests", abort)


def _same(results: dict[str, Any], answer: dict[str, Any]) -> Response:
    """What one server would have said, when all of them did as they were told."""
    return json_response({**answer, **broadcast_body("The call", results)})
