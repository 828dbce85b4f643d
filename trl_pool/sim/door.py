"""A port that can be shut and opened again while the process lives.

`uvicorn.Server` serves from start to shutdown. A simulated server must be able to refuse connections for a
while, close idle ones, and reset one in the middle of an answer, so it uses uvicorn's HTTP protocol under a
listener of its own.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from trl_pool.sim.gate import abort


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen (yet). Others with the same options may bind the same port beside it."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)  # asyncio sets TCP_NODELAY only where the protocol is named
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


class Door:
    """An address with an application behind it.

    Args:
        app (`ASGIApp`):
            Serves the requests.
        host (`str`):
            Address to listen on.
        port (`int`):
            Port to listen on; 0 for any free one. The port is taken from now on, listening begins with
            `open()`.
        keep_alive_seconds (`float`):
            Idle connections are closed after this time.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, keep_alive_seconds: float) -> None:
        self._config = uvicorn.Config(
            cast(Any, app),
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=cast(int, keep_alive_seconds),  # goes to loop.call_later: a float is as good
        )
        self._config.load()
        self._state = ServerState()
        self._host = host
        # Where the system allows it, the port is bound for good beside the listening socket, so nobody else
        # gets it while the door is shut.
        held = bind(host, port)
        self.port: int = held.getsockname()[1]
        if sys.platform == "linux":
            self._held: socket.socket | None = held
        else:
            held.close()
            self._held = None
        self._server: asyncio.Server | None = None
        self._opening = asyncio.Lock()
        self._reopening: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Door {self.url} {'open' if self.is_open else 'shut'}, {self.connections} connections>"

    @property
    def url(self) -> str:
        """Base URL without a trailing slash."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}"

    @property
    def is_open(self) -> bool:
        """Whether connections are accepted."""
        return self._server is not None

    @property
    def connections(self) -> int:
        """Number of open connections, idle ones included."""
        return len(self._state.connections)

    async def open(self) -> None:
        """Listen. Nothing happens if the door is open."""
        self._keep_shut()
        async with self._opening:
            if self._server is None:
                listener = bind(self._host, self.port)
                loop = asyncio.get_running_loop()
                self._server = await loop.create_server(self._protocol, sock=listener, backlog=2048)

    def shut(self, seconds: float | None = None) -> None:
        """Stop listening and reset every connection.

        Args:
            seconds (`float`, *optional*):
                Open again after this time.
        """
        self._keep_shut()
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self._state.connections):
            abort(_h11(connection).transport)
        if seconds is not None:
            self._reopening = asyncio.create_task(self._reopen_after(seconds))

    def drop_idle(self) -> int:
        """Close the kept-alive connections: those that had a request and have none now.

        Returns:
            `int`: How many they were.
        """
        # uvicorn leaves a connection alone on which no request was made yet.
        idle = [c for c in map(_h11, self._state.connections) if c.cycle is not None and c.cycle.response_complete]
        for connection in idle:
            connection.timeout_keep_alive_handler()  # what uvicorn does when the keep-alive timeout is over
        return len(idle)

    def close(self) -> None:
        """Shut for good and give the port back."""
        self.shut()
        if self._held is not None:
            self._held.close()

    def _keep_shut(self) -> None:
        if self._reopening is not None:
            self._reopening.cancel()
            self._reopening = None

    async def _reopen_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._reopening = None  # from here on it is too late to cancel it
        await self.open()

    def _protocol(self) -> asyncio.Protocol:
        return _Protocol(config=self._config, server_state=self._state, app_state={})


class _Protocol(H11Protocol):
    """uvicorn's, with the transport in each request's `scope["state"]`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state["transport"] = transport


def _h11(connection: object) -> H11Protocol:
    return cast(H11Protocol, connection)
