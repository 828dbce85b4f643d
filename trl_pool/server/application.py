"""The application: routes, and nothing about balancing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

import httpx
from fastapi import FastAPI, Query, Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import validation
from .._version import __version__
from ..backend import BackendStatistics
from ..config import PoolConfig
from ..dialects.base import Job
from ..dialects.trl_requests import (
    ChatRequest,
    GenerateRequest,
    InitCommunicatorRequest,
    SequenceLogprobsRequest,
    UpdateNamedParamRequest,
)
from ..errors import ControlResult, NoBackendAvailableError, PoolError
from ..fleet import resolve
from ..pool import AsyncVLLMClientPool
from ..weights.coordinator import require_all
from .drain import Drain
from .failures import BodyTooLargeError, ClientGoneError, ShuttingDownError, failure, json_response, results_body
from .settings import GatewaySettings

logger = logging.getLogger(__name__)

_REQUEST_ID = "x-request-id"
_OWN_CLIENT = "trl_pool/"


class NewBackend(BaseModel):
    """Body of `POST /pool/backends`."""

    url: str


def create_app(settings: GatewaySettings, *, transport: httpx.AsyncBaseTransport | None = None) -> FastAPI:
    """Makes the gateway's application.

    Args:
        settings ([`GatewaySettings`]): Everything that can be set.
        transport (`httpx.AsyncBaseTransport`, *optional*): Instead of sockets, for tests.
    """
    drain = Drain(settings.shutdown_settle_seconds, settings.shutdown_timeout)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        pool = AsyncVLLMClientPool(settings.backends, config=settings, transport=transport, control_only=True)
        app.state.pool = pool
        drain.install()
        await pool.start()
        logger.info("Gateway up: %r", pool)
        try:
            yield
        finally:
            await pool.aclose()

    app = FastAPI(
        title="trl_pool gateway",
        version=__version__,
        description="Many `trl vllm-serve` servers behind the endpoints of one.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.settings, app.state.drain = settings, drain
    app.add_middleware(FrontMiddleware, drain=drain)

    @app.exception_handler(PoolError)
    async def pool_error(request: Request, error: PoolError) -> Response:
        return failure(error)

    _add_data_routes(app)
    _add_control_routes(app)
    _add_pool_routes(app)
    return app


class FrontMiddleware:
    """What holds for every request: it has an id (its `X-Request-Id`, or a new one if that is missing or not
    printable), it ends when the gateway's time is up, and what nobody foresaw is answered in JSON too."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self.app, self.drain = app, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == _REQUEST_ID.encode()), b"")
        usable = 0 < len(given) <= 128 and given.decode("latin-1").isascii() and given.decode("latin-1").isprintable()
        request_id = given if usable else secrets.token_hex(8).encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", []), (_REQUEST_ID.encode(), request_id)]
            await send(message)

        try:
            with self.drain.request():
                await self.app(scope, receive, send_with_id)
        except ShuttingDownError as error:
            if not started:
                await failure(error)(scope, receive, send_with_id)
        except Exception:
            logger.exception("Request %s to %s failed", request_id.decode(), scope["path"])
            if started:
                raise
            answer = json_response({"detail": f"Internal Server Error; see the log for {request_id.decode()}"}, 500)
            await answer(scope, receive, send_with_id)


async def read_body(request: Request, limit: int) -> bytes:
    """The body, as long as it stays within the limit.

    Raises:
        [`BodyTooLargeError`]: by the announced length, or as soon as too much has arrived.
        [`ClientGoneError`]: when the client stops in the middle.
    """
    message = f"request body is larger than MAX_BODY_MB={limit / 1e6:g} MB; raise it or send fewer prompts a request"
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise BodyTooLargeError(message)
    chunks = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise BodyTooLargeError(message)
            chunks.append(chunk)
    except ClientDisconnect:
        raise ClientGoneError("the client closed the connection in the middle of its request") from None
    return b"".join(chunks)


async def while_connected(request: Request, work: Awaitable[Any]) -> Any:
    """The work's result, unless the client goes away first; then the work is cancelled.

    Raises:
        [`ClientGoneError`]: nobody will read it.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError("the client closed the connection")
        return task.result()
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


def _add(
    app: FastAPI,
    method: str,
    path: str,
    handler: Callable[..., Awaitable[Response]],
    model: type[BaseModel] | None = None,
) -> None:
    """Adds a route with and without the trailing slash; a redirect would lose the body of a careless client."""
    extra: dict[str, Any] = {}
    if model is not None:
        content = {"application/json": {"schema": model.model_json_schema()}}
        extra["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    app.add_api_route(path, handler, methods=[method], response_class=Response, **extra)
    twin = path.rstrip("/") if path.endswith("/") else f"{path}/"
    app.add_api_route(twin, handler, methods=[method], include_in_schema=False)


def _pool(request: Request) -> AsyncVLLMClientPool:
    pool: AsyncVLLMClientPool = request.app.state.pool
    return pool


def _add_data_routes(app: FastAPI) -> None:
    settings: GatewaySettings = app.state.settings

    async def serve(request: Request, make_job: Callable[[bytes, PoolConfig], Job]) -> Response:
        job = make_job(await read_body(request, settings.max_body_bytes), _pool(request).limits())
        work = _pool(request).submit(
            job,
            session_id=request.headers.get(settings.sticky_header),
            headers={_REQUEST_ID: request.state.request_id},
        )
        result = await while_connected(request, work)
        return json_response(result.value, headers={"x-backend": ", ".join(result.backends)})

    async def generate(request: Request) -> Response:
        """Completions for prompts, spread over the backends."""
        return await serve(
            request,
            lambda body, limits: validation.generate_job(
                validation.parse(GenerateRequest, body), limits, raw=True, body=body
            ),
        )

    async def chat(request: Request) -> Response:
        """Completions for conversations, spread over the backends."""
        return await serve(
            request,
            lambda body, limits: validation.chat_job(validation.parse(ChatRequest, body), limits, raw=True, body=body),
        )

    async def get_sequence_logprobs(request: Request) -> Response:
        """Logprobs of given sequences, spread over the backends."""
        return await serve(
            request,
            lambda body, limits: validation.score_job(
                validation.parse(SequenceLogprobsRequest, body), limits, raw=True, body=body
            ),
        )

    _add(app, "POST", "/generate/", generate, GenerateRequest)
    _add(app, "POST", "/chat/", chat, ChatRequest)
    _add(app, "POST", "/get_sequence_logprobs/", get_sequence_logprobs, SequenceLogprobsRequest)


def _add_control_routes(app: FastAPI) -> None:
    settings: GatewaySettings = app.state.settings

    def answer(what: str, results: dict[str, ControlResult], headers: dict[str, str] | None = None) -> Response:
        require_all(what, results)
        if not results:
            raise NoBackendAvailableError({})
        message = next(result.message for result in results.values())
        return json_response({"message": message, "results": results_body(results.values())}, headers=headers)

    async def get_world_size(request: Request) -> Response:
        """World size of one backend, which is what a trainer of the `trl` dialect has to know."""
        return json_response({"world_size": await _pool(request).get_world_size()})

    async def init_communicator(request: Request) -> Response:
        """Makes every backend wait for its trainer's connection."""
        body = await read_body(request, settings.max_body_bytes)
        validation.parse(InitCommunicatorRequest, body)
        pool = _pool(request)
        members = pool.weights.everybody()
        results = await pool.separate.open({b.name: body for b in members}, members, fresh=False)
        headers = {}
        if len(members) > 1 and not request.headers.get("user-agent", "").startswith(_OWN_CLIENT):
            text = (
                f"{len(members)} servers each wait for a trainer connection of their own, and a stock trainer makes "
                "one; use trl_pool.VLLMClientPool in the trainer"
            )
            logger.warning("init_communicator: %s", text)
            headers["warning"] = f'199 trl_pool "{text}"'
        return answer("init_communicator", results, headers)

    async def update_named_param(request: Request) -> Response:
        """Announces a parameter to every backend; the first one closes the gate until `/reset_prefix_cache/`."""
        body = await read_body(request, settings.max_body_bytes)
        name = validation.parse(UpdateNamedParamRequest, body).name
        return answer("update_named_param", await _pool(request).separate.announce(name, body, owner="gateway"))

    async def reset_prefix_cache(request: Request) -> Response:
        """Resets every backend's prefix cache; after an update that publishes it."""
        return answer("reset_prefix_cache", await _pool(request).separate.reset_caches())

    async def close_communicator(request: Request) -> Response:
        """Makes every backend leave its weight update group."""
        return answer("close_communicator", await _pool(request).separate.close())

    _add(app, "GET", "/get_world_size/", get_world_size)
    _add(app, "POST", "/init_communicator/", init_communicator, InitCommunicatorRequest)
    _add(app, "POST", "/update_named_param/", update_named_param, UpdateNamedParamRequest)
    _add(app, "POST", "/reset_prefix_cache/", reset_prefix_cache)
    _add(app, "POST", "/close_communicator/", close_communicator)


def _add_pool_routes(app: FastAPI) -> None:
    settings: GatewaySettings = app.state.settings
    drain: Drain = app.state.drain

    def _serving(request: Request) -> tuple[BackendStatistics, ...]:
        """The backends, if one of them is eligible, or will be once the weight update under way has ended."""
        statistics = _pool(request).statistics()
        if statistics.gate is None and not any(backend.eligible for backend in statistics.backends):
            reasons = {b.url: b.reason for b in statistics.backends}
            raise NoBackendAvailableError(reasons, retry_after=settings.health_interval)
        return statistics.backends

    async def health(request: Request) -> Response:
        """200 while at least one backend is eligible."""
        backends = _serving(request)
        reasons = {b.url: b.reason for b in backends if not b.eligible}
        headers = {}
        if len(backends) == 1:
            # A stock trainer takes this for the rendezvous host of its weight update group; it may not know the name.
            headers["x-forwarded-for"] = await resolve(_pool(request).address_of(backends[0].name).host)
        body = {"status": "ok", "eligible": len(backends) - len(reasons), "not_eligible": reasons}
        return json_response(body, headers=headers)

    async def livez(request: Request) -> Response:
        """200 while the process runs."""
        return json_response({"status": "ok"})

    async def readyz(request: Request) -> Response:
        """200 while requests are welcome: not draining, and a backend is eligible."""
        if drain.draining:
            return json_response({"detail": "draining"}, 503, {"retry-after": "1"})
        _serving(request)
        return json_response({"status": "ok"})

    async def list_backends(request: Request) -> Response:
        """Every backend at this moment."""
        backends = _pool(request).statistics().backends
        return json_response({"backends": [dataclasses.asdict(backend) for backend in backends]})

    async def add_backend(request: Request) -> Response:
        """Adds a backend."""
        new = validation.parse(NewBackend, await read_body(request, settings.max_body_bytes))
        return json_response({"name": await _pool(request).add_backend(new.url)}, 201)

    async def drain_backend(request: Request, name: str) -> Response:
        """Gives a backend no further requests; `inflight` of `GET /pool/backends` tells when it has none left."""
        return json_response(dataclasses.asdict(_pool(request).stop_backend(name)), 202)

    async def remove_backend(
        request: Request,
        name: str,
        drain: Annotated[bool, Query()] = True,
        timeout: Annotated[float | None, Query(gt=0)] = None,
    ) -> Response:
        """Takes a backend out, after its requests unless `drain=false`."""
        await _pool(request).remove_backend(name, drain, timeout=timeout)
        return json_response({"removed": name})

    async def stats(request: Request) -> Response:
        """The pool at this moment."""
        return json_response(dataclasses.asdict(_pool(request).statistics()))

    _add(app, "GET", "/health/", health)
    _add(app, "GET", "/livez", livez)
    _add(app, "GET", "/readyz", readyz)
    _add(app, "GET", "/pool/backends", list_backends)
    _add(app, "POST", "/pool/backends", add_backend, NewBackend)
    _add(app, "POST", "/pool/backends/{name:path}/drain", drain_backend)
    _add(app, "DELETE", "/pool/backends/{name:path}", remove_backend)
    _add(app, "GET", "/pool/stats", stats)
