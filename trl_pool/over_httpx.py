"""HTTP by way of httpx: over a transport that was given from outside, through a proxy, or into a test's hands.

It does what [`http1`] does, many times slower.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from .addresses import BackendAddress
from .config import PoolConfig
from .http1 import KEEPALIVE_SECONDS, Progress


def httpx_is_patched() -> bool:
    """Whether somebody has put themselves in the place of httpx's sockets, as pytest-httpx does."""
    module: str = httpx.AsyncHTTPTransport.handle_async_request.__module__
    return not module.startswith("httpx.")


class _Trace:
    """What httpx tells while it sends: whether the connection is new, and how far the exchange came."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._connected = False

    async def __call__(self, event: str, info: Mapping[str, Any]) -> None:
        self._connected = self._connected or event.startswith("connection.connect")
        self._progress.reused = not self._connected
        if event.endswith("send_request_body.complete"):
            self._progress.sent = True
        elif event.endswith("receive_response_headers.complete"):
            self._progress.answered = True


class IncomingByHttpx:
    """An answer whose head is there, and whose body comes."""

    def __init__(self, response: httpx.Response) -> None:
        self.status, self.headers = response.status_code, response.headers
        self._response = response

    def pieces(self) -> AsyncIterator[bytes]:
        """The body, as it came."""
        return self._response.aiter_raw()

    async def aclose(self) -> None:
        await self._response.aclose()


class OverHttpx:
    """Two httpx clients for one server, made when they are first used.

    Args:
        address ([`BackendAddress`]): Where it is.
        config ([`PoolConfig`]): For `trust_env`.
        transport (`httpx.AsyncBaseTransport`, *optional*): Instead of sockets. It is its owner's to close.
        context (`ssl.SSLContext`, *optional*): For `https`.
        headers (`Mapping[str, str]`): Sent with every request that does not say otherwise.
    """

    def __init__(
        self,
        address: BackendAddress,
        config: PoolConfig,
        *,
        transport: httpx.AsyncBaseTransport | None,
        context: ssl.SSLContext | None,
        headers: Mapping[str, str],
    ) -> None:
        self._url = address.url
        self._owned = transport is None
        self._common: dict[str, Any] = {
            "verify": False if context is None else context,
            "transport": transport,
            "trust_env": config.trust_env,
            "headers": headers,
            "follow_redirects": False,
        }
        self._clients: dict[bool, httpx.AsyncClient] = {}

    async def aclose(self) -> None:
        """Closes its connections."""
        if self._owned:
            for client in self._clients.values():
                await client.aclose()

    def _client(self, *, fresh: bool) -> httpx.AsyncClient:
        """What is sent once only never takes a connection that may be stale."""
        if fresh not in self._clients:
            kept = 0 if fresh else None
            limits = httpx.Limits(
                max_connections=None, max_keepalive_connections=kept, keepalive_expiry=KEEPALIVE_SECONDS
            )
            self._clients[fresh] = httpx.AsyncClient(**self._common, limits=limits)
        return self._clients[fresh]

    async def fetch(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        *,
        connect_within: float,
        max_idle: float,
        progress: Progress,
    ) -> tuple[int, httpx.Headers, bytes]:
        """See [`Sockets.fetch`]; a `max_idle` below that of kept connections means a new one; the body is decoded."""
        client = self._client(fresh=max_idle < KEEPALIVE_SECONDS)
        request = self._request(client, method, path, body, headers, connect_within, None)
        request.extensions["trace"] = _Trace(progress)
        response = await client.send(request)
        return response.status_code, response.headers, response.content

    async def open(
        self, path: str, body: bytes, headers: Mapping[str, str], *, connect_within: float, read_within: float
    ) -> IncomingByHttpx:
        """See [`Sockets.open`]."""
        client = self._client(fresh=True)
        request = self._request(client, "POST", path, body, headers, connect_within, read_within)
        return IncomingByHttpx(await client.send(request, stream=True))

    def _request(
        self,
        client: httpx.AsyncClient,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        connect_within: float,
        read_within: float | None,
    ) -> httpx.Request:
        timeouts = httpx.Timeout(None, connect=connect_within, read=read_within)
        return client.build_request(
            method,
            self._url + path,
            content=body,
            headers={**headers, **({"content-type": "application/json"} if body else {})},
            timeout=timeouts,
        )
