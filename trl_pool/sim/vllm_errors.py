"""How `vllm serve` refuses: OpenAI's body, and 400 where FastAPI would say 422."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from trl_pool.sim.answer import openai_error
from trl_pool.sim.sampling import InvalidSampling

_GUARDED = ("/v1", "/v2", "/inference", "/cohere")


class Refused(Exception):
    """The request is at fault.

    Args:
        message (`str`):
            What is wrong with it.
        param (`str`, *optional*):
            Which field.
        status (`int`, *optional*, defaults to `400`):
            Of the answer.
        kind (`str`, *optional*):
            `type` in the answer's body; by default that of the status.
    """

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, kind: str = "BadRequestError"
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.kind = message, param, status, kind


def not_found(message: str, param: str | None = None) -> Refused:
    """A 404 of OpenAI's kind."""
    return Refused(message, param, 404, "NotFoundError")


def json_response(content: Any, status: int = 200) -> Response:
    """An answer in JSON."""
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def add_error_handlers(app: FastAPI) -> None:
    """Have the application answer what its routes raise as `vllm serve` does. What else they raise is a 500 of the
    gate's, with the connection closed, as there."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        body = openai_error(error.status, error.message, error.kind, error.param)
        return json_response(body, error.status)

    @app.exception_handler(InvalidSampling)
    async def invalid(request: Request, error: InvalidSampling) -> Response:
        return json_response(openai_error(400, str(error), "BadRequestError", error.parameter), 400)

    @app.exception_handler(RequestValidationError)
    async def ill_formed(request: Request, error: RequestValidationError) -> Response:
        problems = [(_place(one["loc"]), one["msg"]) for one in error.errors()]
        where: str | None = problems[0][0]
        if where == "body" and not request.headers.get("content-type", "").startswith("application/json"):
            problems, where = [("content-type", "only application/json is taken")], None
        message = "; ".join(f"{place}: {problem}" for place, problem in problems[:10])
        return json_response(openai_error(400, message, HTTPStatus.BAD_REQUEST.phrase, where), 400)


def _place(loc: Sequence[str | int]) -> str:
    """Where in the request something is wrong, without the names of types that pydantic has tried."""
    parts = [str(part) for part in loc]
    return ".".join(part for part in parts if part != "str" and not set(part) & set("[]{}()"))


class ApiKeyGuard:
    """The middleware that wants a key for OpenAI's paths. Control paths are open to everybody, as on a real server.

    Args:
        app (`ASGIApp`): What it guards.
        api_key (`str`): The key.
    """

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] == "http" and scope["path"].startswith(_GUARDED) and not self._knows(scope):
            await json_response({"error": "Unauthorized"}, 401)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        given: bytes = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(key, self._key)
