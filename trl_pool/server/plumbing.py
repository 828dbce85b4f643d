"""What every route needs: bodies within a limit, clients that may leave, paths with and without a slash."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ..errors import ControlResult, NoBackendAvailableError
from ..pool import AsyncVLLMClientPool
from ..weights.coordinator import require_all
from .failures import BodyTooLargeError, ClientGoneError, json_response, results_body

REQUEST_ID = "x-request-id"


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


def add(
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
