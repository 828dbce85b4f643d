"""The application: routes, and nothing about balancing."""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
from collections.abc import AsyncIterator, Mapping

import httpx
from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .._version import __version__
from ..errors import PoolError
from ..pool import AsyncVLLMClientPool
from .drain import Drain
from .failures import ShuttingDownError, failure, json_response
from .plumbing import REQUEST_ID, Handler
from .pool_routes import add_pool_routes
from .settings import GatewaySettings
from .trl_routes import add_control_routes, add_data_routes
from .vllm_routes import add_development_routes, add_openai_routes

logger = logging.getLogger(__name__)

_REQUEST_ID = REQUEST_ID.encode()
_PRINTABLE = re.compile(rb"[ -~]+")


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

    app = Gateway(
        title="trl_pool gateway",
        version=__version__,
        description="Many vLLM servers behind the endpoints of one.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.settings, app.state.drain = settings, drain
    app.state.direct = {}
    app.add_middleware(FrontMiddleware, drain=drain)

    @app.exception_handler(PoolError)
    async def pool_error(request: Request, error: PoolError) -> Response:
        return failure(error)

    add_data_routes(app)
    add_control_routes(app)
    add_openai_routes(app)
    add_development_routes(app)
    add_pool_routes(app)
    app.direct = DirectRoutes(drain, app.state.direct)
    return app


class Gateway(FastAPI):
    """FastAPI, but for the requests that a gateway is there for: they would spend more time in it than here."""

    direct: DirectRoutes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        direct = scope["type"] == "http" and (scope["method"], scope["path"]) in self.direct.handlers
        # Middleware that somebody has added (authentication, say) must not be passed by.
        if direct and len(self.user_middleware) == 1:
            scope["app"] = self
            await self.direct(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class FrontMiddleware:
    """What holds for every request: it has an id (its `X-Request-Id`, or a new one if that is missing or not
    printable), it ends when the gateway's time is up, and what nobody foresaw is answered in JSON too.

    Args:
        app (`ASGIApp`): What answers.
        drain ([`Drain`]): Knows when the time is up.
    """

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self.app, self.drain = app, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = b""
        for name, value in scope["headers"]:
            if name == _REQUEST_ID:
                request_id = value
                break
        if not (0 < len(request_id) <= 128 and _PRINTABLE.fullmatch(request_id)):
            request_id = secrets.token_hex(8).encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", []), (_REQUEST_ID, request_id)]
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


class DirectRoutes(FrontMiddleware):
    """Routes that are called without FastAPI in between, with everything that [`FrontMiddleware`] does.

    Args:
        drain ([`Drain`]): Knows when the time is up.
        handlers (`Mapping[tuple[str, str], Handler]`): Per method and path, what answers.
    """

    def __init__(self, drain: Drain, handlers: Mapping[tuple[str, str], Handler]) -> None:
        super().__init__(self._answer, drain)
        self.handlers = handlers

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self.handlers[scope["method"], scope["path"]](Request(scope, receive))
        except PoolError as error:
            response = failure(error)
        await response(scope, receive, send)
