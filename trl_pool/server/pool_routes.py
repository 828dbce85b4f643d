"""The gateway's own endpoints: how it is, and who is behind it."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from fastapi import FastAPI, Query, Request
from pydantic import BaseModel
from starlette.responses import Response

from .. import validation
from ..errors import NoBackendAvailableError
from ..fleet import resolve
from ..identity import GATEWAY_HEADER
from ..leases import BackendStatistics
from .drain import Drain
from .failures import json_response
from .plumbing import add, pool_of, read_body
from .settings import GatewaySettings


class NewBackend(BaseModel):
    """Body of `POST /pool/backends`."""

    url: str


def add_pool_routes(app: FastAPI) -> None:
    settings: GatewaySettings = app.state.settings
    drain: Drain = app.state.drain

    def _serving(request: Request) -> tuple[BackendStatistics, ...]:
        """The backends, if one of them is eligible, or will be once the weight update under way has ended."""
        statistics = pool_of(request).statistics()
        if statistics.gate is None and not any(backend.eligible for backend in statistics.backends):
            reasons = {b.url: b.reason for b in statistics.backends}
            raise NoBackendAvailableError(reasons, retry_after=settings.health_interval)
        return statistics.backends

    async def health(request: Request) -> Response:
        """200 while at least one backend is eligible."""
        backends = _serving(request)
        reasons = {b.url: b.reason for b in backends if not b.eligible}
        headers = {GATEWAY_HEADER: "gateway"}
        if len(backends) == 1 and not pool_of(request).one_group:
            # A stock trainer takes this for the rendezvous host of its weight update group; it may not know the name.
            headers["x-forwarded-for"] = await resolve(pool_of(request).address_of(backends[0].name).host)
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
        backends = pool_of(request).statistics().backends
        return json_response({"backends": [dataclasses.asdict(backend) for backend in backends]})

    async def add_backend(request: Request) -> Response:
        """Adds a backend."""
        new = validation.parse(NewBackend, await read_body(request, settings.max_body_bytes))
        return json_response({"name": await pool_of(request).add_backend(new.url)}, 201)

    async def drain_backend(request: Request, name: str) -> Response:
        """Gives a backend no further requests; `inflight` of `GET /pool/backends` tells when it has none left."""
        return json_response(dataclasses.asdict(pool_of(request).stop_backend(name)), 202)

    async def remove_backend(
        request: Request,
        name: str,
        drain: Annotated[bool, Query()] = True,
        timeout: Annotated[float | None, Query(gt=0)] = None,
    ) -> Response:
        """Takes a backend out, after its requests unless `drain=false`."""
        await pool_of(request).remove_backend(name, drain, timeout=timeout)
        return json_response({"removed": name})

    async def stats(request: Request) -> Response:
        """The pool at this moment."""
        return json_response(dataclasses.asdict(pool_of(request).statistics()))

    add(app, "GET", "/health/", health)
    add(app, "GET", "/livez", livez)
    add(app, "GET", "/readyz", readyz)
    add(app, "GET", "/pool/backends", list_backends)
    add(app, "POST", "/pool/backends", add_backend, NewBackend)
    add(app, "POST", "/pool/backends/{name:path}/drain", drain_backend)
    add(app, "DELETE", "/pool/backends/{name:path}", remove_backend)
    add(app, "GET", "/pool/stats", stats)
