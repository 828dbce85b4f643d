"""Which HTTP answer each error becomes: one table, and the answers' bodies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from ..errors import (
    AttemptError,
    BackendMismatchError,
    ConfigurationError,
    ControlError,
    ControlResult,
    DuplicateBackendError,
    InvalidRequestError,
    NoBackendAvailableError,
    OverloadedError,
    PoolClosedError,
    PoolError,
    RequestRejectedError,
    RolloutError,
    RolloutTimeoutError,
    UnknownBackendError,
)


class BodyTooLargeError(PoolError):
    """A request's body is larger than `max_body_mb`."""


class ClientGoneError(PoolError):
    """The client closed the connection; nobody reads the answer."""


class WrongDialectError(PoolError):
    """An endpoint of a protocol that the backends do not speak."""


class ShuttingDownError(PoolError):
    """The gateway's time for finishing requests is over."""


STATUS: dict[type[PoolError], int] = {
    InvalidRequestError: 422,
    BodyTooLargeError: 413,
    WrongDialectError: 404,
    ConfigurationError: 422,
    DuplicateBackendError: 409,
    UnknownBackendError: 404,
    BackendMismatchError: 409,
    OverloadedError: 429,
    NoBackendAvailableError: 503,
    PoolClosedError: 503,
    ShuttingDownError: 503,
    ClientGoneError: 499,
    ControlError: 502,
    AttemptError: 502,
    RolloutError: 502,
    RolloutTimeoutError: 504,
    PoolError: 500,
}


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer; `msgspec.Raw` in it goes out as it came, and not even copied if it is all there is."""
    content = memoryview(value) if isinstance(value, msgspec.Raw) else msgspec.json.encode(value)
    return Response(content, status, headers, "application/json")


def results_body(results: Iterable[ControlResult]) -> dict[str, Any]:
    """A control call's results as they go over the wire, per backend URL."""
    return {r.url: {"ok": r.ok, "status": r.status, "message": r.message} for r in results}


def failure(error: PoolError) -> Response:
    """The answer that an error becomes: a JSON object whose `detail` says what happened and what to do."""
    if isinstance(error, RequestRejectedError):
        return Response(error.body, error.status, {"x-backend": error.backend.partition("://")[2]}, error.content_type)
    status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    headers: dict[str, str] = {}
    body: dict[str, Any] = {"detail": str(error)}
    if isinstance(error, InvalidRequestError):
        body["detail"] = error.details
        if any(detail["type"] == "json_invalid" for detail in error.details):
            status = 400
    if isinstance(error, NoBackendAvailableError):
        body["backends"] = error.reasons
    if isinstance(error, NoBackendAvailableError | OverloadedError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    elif status == 503:
        headers["retry-after"] = "1"
    if isinstance(error, RolloutError):
        if error.timed_out:
            status = 504
        body["attempts"] = [
            {
                "backend": attempt.backend,
                "outcome": attempt.outcome.value,
                "detail": attempt.detail,
                "prompts": attempt.prompts,
                "seconds": round(attempt.seconds, 3),
            }
            for attempt in error.attempts
        ]
        body["failed"] = sorted(error.failed)
        body["completed"] = error.completed
        body["result"] = error.result
    if isinstance(error, ControlError):
        body["results"] = results_body(error.results.values())
    return json_response(body, status, headers)
