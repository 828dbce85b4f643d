"""What every route needs: bodies within a limit, clients that may leave, paths with and without a slash."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import Response

from ..errors import ControlResult, NoBackendAvailableError
from ..pool import AsyncVLLMClientPool
from ..weights.coordinator import require_all
from .failures import BodyTooLargeError, ClientGoneError, json_response, results_body

REQUEST_ID = "x-request-id"

_WATCH_AFTER_SECONDS = 0.05

Handler = Callable[..., Awaitable[Response]]
T = TypeVar("T")


async def read_body(request: Request, limit: int) -> bytes:
    """The body, as long as it stays within the limit.

    Raises:
        [`BodyTooLargeError`]: by the announced length, or as soon as too much has arrived.
        [`ClientGoneError`]: when the client stops in the middle.
    """

    def message() -> str:
        return f"request body is larger than MAX_BODY_MB={limit / 1e6:g} MB; raise it or send fewer prompts a request"

    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise BodyTooLargeError(message())
    chunks = []
    size = 0
    more = True
    while more:
        packet = await request.receive()
        if packet["type"] == "http.disconnect":
            raise ClientGoneError("the client closed the connection in the middle of its request")
        chunk = packet.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise BodyTooLargeError(message())
        chunks.append(chunk)
        more = packet.get("more_body", False)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The work's result, unless the client goes away first; then the work is cancelled.

    Most answers are there before a watch would pay: it begins after a while.

    Raises:
        [`ClientGoneError`]: nobody will read it.
    """
    task = asyncio.current_task()
    assert task is not None
    watch: asyncio.Task[None] | None = None
    gone = False

    async def wait_for_the_end() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    def begin() -> None:
        nonlocal watch
        watch = loop.create_task(wait_for_the_end())

    loop = asyncio.get_running_loop()
    timer = loop.call_later(_WATCH_AFTER_SECONDS, begin)
    try:
        return await work
    except asyncio.CancelledError:
        if gone and task.cancelling() == 1:
            raise ClientGoneError("the client closed the connection") from None
        raise
    finally:
        timer.cancel()
        if watch is not None:
            watch.cancel()
        if gone:
            task.uncancel()


def add(
    app: FastAPI,
    method: str,
    path: str,
    handler: Handler,
    model: type[BaseModel] | None = None,
    *,
    direct: bool = False,
) -> None:
    """Adds a route with and without the trailing slash; a redirect would lose the body of a careless client.

    Args:
        app (`FastAPI`): Where.
        method (`str`): Of its requests.
        path (`str`): Either spelling.
        handler (`Callable`): What answers.
        model (`type[BaseModel]`, *optional*): Of its bodies, for OpenAPI.
        direct (`bool`, *optional*, defaults to `False`): Whether [`DirectRoutes`] calls the handler; FastAPI then only
            documents it.
    """
    extra: dict[str, Any] = {}
    if model is not None:
        content = {"application/json": {"schema": model.model_json_schema()}}
        extra["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    app.add_api_route(path, handler, methods=[method], response_class=Response, **extra)
    twin = path.rstrip("/") if path.endswith("/") else f"{path}/"
    app.add_api_route(twin, handler, methods=[method], include_in_schema=False)
    if direct:
        app.state.direct[method, path] = app.state.direct[method, twin] = handler


def pool_of(request: Request) -> AsyncVLLMClientPool:
    pool: AsyncVLLMClientPool = request.app.state.pool
    return pool


def broadcast_body(what: str, results: dict[str, ControlResult]) -> dict[str, Any]:
    """The backends' message and a result per backend, when all succeeded.

    Raises:
        [`ControlError`]: when one did not.
    """
    require_all(what, results)
    if not results:
        raise NoBackendAvailableError({})
    message = next(result.message for result in results.values())
    return {"message": message, "results": results_body(results.values())}


def broadcast_answer(what: str, results: dict[str, ControlResult], headers: dict[str, str] | None = None) -> Response:
    """[`broadcast_body`] as an answer."""
    return json_response(broadcast_body(what, results), headers=headers)
