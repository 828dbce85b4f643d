"""HTTP/1.1 over sockets: the little that a pool asks of its servers, at little cost.

A gateway spends its time here, so this is what makes it fast: a request is one write; its answer wakes its task once;
heads are parsed in C (llhttp, by way of httptools, which uvicorn uses too); a body whose length is known is not parsed
at all, and copied once. No redirects, no cookies, no time-outs but the one for connecting, no second try of anything:
all that is decided above, in [`exchange`]. Errors are those of httpx, so that there is one table of them.

Why not a library's client. A pool has to know of every request whether it left on a used connection and how far it
came, and must send a control call once and not again; and a gateway has to add little to it. httpx moves about 600
answers of 51 KB a second. aiohttp was tried in this place: it sends a GET again by itself, takes what a server says
unasked for the answer to the next request, and wants much code around it to be kept from that; a request waited 2.1 ms
longer in the gateway (here 1.0), and answers of 20 MB came at half of a direct connection's rate (here 0.8), since
they are copied twice more.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass

import httpx

from .addresses import BackendAddress
from .connection import Connection, RawHeaders

KEEPALIVE_SECONDS = 4.0
"""Idle connections are dropped on our side before uvicorn drops them, which it does after 5 s."""


_NEXT_ADDRESS_SECONDS = 1.0
"""How long an address of a host with several may say nothing before the next one is tried."""

_CLOSE_SECONDS = 1.0

_TARGET = re.compile(r"[!-~]+")


class Headers(Mapping[str, str]):
    """Headers of an answer by their names, in any case. They are looked through when somebody first asks, which of a
    good answer nobody does.

    Args:
        raw (`RawHeaders`): As they came.
    """

    __slots__ = ("_found", "_raw")

    def __init__(self, raw: RawHeaders) -> None:
        self._raw = raw
        self._found: dict[str, str] | None = None

    def _values(self) -> dict[str, str]:
        if self._found is None:
            self._found = {}
            for name, value in self._raw:
                key, text = name.decode("latin-1").lower(), value.decode("latin-1")
                self._found[key] = f"{self._found[key]}, {text}" if key in self._found else text
        return self._found

    def __getitem__(self, name: str) -> str:
        return self._values()[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())

    @property
    def encoded(self) -> bool:
        """Whether there is a content encoding around the body."""
        return any(name.lower() == b"content-encoding" for name, _ in self._raw)


@dataclass(slots=True)
class Progress:
    """How far an exchange has come, whatever became of it.

    Args:
        reused (`bool`): Whether it was made on a connection that had been used before.
        sent (`bool`): Whether the whole request has been handed to the kernel.
        answered (`bool`): Whether something of an answer has come.
    """

    reused: bool = False
    sent: bool = False
    answered: bool = False


class Incoming:
    """An answer whose head is there, and whose body comes.

    Args:
        connection ([`Connection`]): On which it comes; nothing else is asked on it afterwards.
        read_within (`float`): Seconds that may pass between two pieces of the body.
    """

    def __init__(self, connection: Connection, read_within: float) -> None:
        self.status, self.headers = connection.status, Headers(connection.headers)
        self._connection, self._read_within = connection, read_within

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, as it came.

        Raises:
            `httpx.TransportError`: when it breaks off.
        """
        while True:
            try:
                async with asyncio.timeout(self._read_within):
                    piece = await self._connection.piece()
            except TimeoutError:
                raise httpx.ReadTimeout(f"nothing came for {self._read_within:.1f} s") from None
            if not piece:
                return
            yield piece

    async def aclose(self) -> None:
        self._connection.leave()


class Sockets:
    """Connections to one server, kept for a while after use.

    Args:
        address ([`BackendAddress`]): Where it is.
        context (`ssl.SSLContext`, *optional*): For `https`.
        headers (`Mapping[str, str]`): Sent with every request that does not say otherwise; names in lower case.
    """

    def __init__(self, address: BackendAddress, *, context: ssl.SSLContext | None, headers: Mapping[str, str]) -> None:
        self._address, self._context = address, context
        default = {"http": 80, "https": 443}[address.scheme]
        host = f"[{address.host}]" if ":" in address.host else address.host
        self._headers = {
            "host": host if address.port == default else f"{host}:{address.port}",
            "accept-encoding": "gzip, deflate",
            **headers,
        }
        self._idle: list[Connection] = []  # the longest idle first
        self._all: set[Connection] = set()

    async def fetch(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        connect_within: float,
        max_idle: float,
        progress: Progress,
    ) -> tuple[int, RawHeaders, bytes]:
        """An exchange from its beginning to its end: status, headers and body of the answer.

        Args:
            method (`str`): Of the request.
            path (`str`): Of the request, with its query, below the address's prefix.
            body (`bytes`): Of the request; empty for none.
            headers (`Mapping[str, str]`): Of the request, names in lower case.
            connect_within (`float`): Seconds.
            max_idle (`float`): Most seconds that the connection may have been idle. 0 is for a new one, which is not
                used again either.
            progress ([`Progress`]): Told how far it came.

        Raises:
            `httpx.TransportError`: what an httpx transport would raise.
        """
        head = self._head(method, path, body, headers)
        connection = await self._connection(connect_within, max_idle, progress)
        try:
            await connection.ask(head, body, streamed=False)
        except BaseException:
            connection.abort()
            raise
        finally:
            progress.sent, progress.answered = connection.sent, connection.answered
        status, answered, whole = connection.status, connection.headers, connection.taken()
        connection.forget()
        # uvicorn closes the connection behind an error of its application, and does not announce it.
        if max_idle and status < 500:
            self._keep(connection)
        else:
            connection.leave()
        return status, answered, whole

    async def open(
        self, path: str, body: bytes, headers: Mapping[str, str], *, connect_within: float, read_within: float
    ) -> Incoming:
        """Posts like [`fetch`] over a new connection, but returns with the head of the answer. `read_within` is for
        the pieces of its body."""
        head = self._head("POST", path, body, headers)
        connection = await self._connection(connect_within, 0.0, Progress())
        try:
            await connection.ask(head, body, streamed=True)
        except BaseException:
            connection.abort()
            raise
        return Incoming(connection, read_within)

    def _keep(self, connection: Connection) -> None:
        if not connection.usable:
            connection.leave()
            return
        connection.rest()
        self._idle.append(connection)
        while connection.idle_since - self._idle[0].idle_since > KEEPALIVE_SECONDS:
            self._idle.pop(0).leave()

    async def aclose(self) -> None:
        """Closes all connections."""
        for connection in self._all:
            connection.abort()
        lost = [connection.lost for connection in self._all]
        self._idle.clear()
        if lost:
            await asyncio.wait(lost, timeout=_CLOSE_SECONDS)

    async def _connection(self, connect_within: float, max_idle: float, progress: Progress) -> Connection:
        oldest = asyncio.get_running_loop().time() - min(max_idle, KEEPALIVE_SECONDS)
        while self._idle and self._idle[-1].idle_since > oldest:
            connection = self._idle.pop()
            if connection.usable:
                progress.reused = True
                return connection
        try:
            async with asyncio.timeout(connect_within):
                connection = await self._connect()
        except TimeoutError as error:
            raise httpx.ConnectTimeout(str(error) or f"no connection within {connect_within:.1f} s") from error
        except (OSError, UnicodeError) as error:  # the latter for a name that cannot be one
            raise httpx.ConnectError(str(error) or type(error).__name__) from error
        self._all.add(connection)
        connection.lost.add_done_callback(lambda _: self._all.discard(connection))
        return connection

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        host, port = self._address.host, self._address.port
        hosts = [host]
        if not _is_ip(host):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            hosts = list(dict.fromkeys(str(place[0]) for *_, place in found))
        name = None if self._context is None else host
        failures: list[Exception] = []
        for number, each in enumerate(hosts, 1):
            try:
                async with asyncio.timeout(None if number == len(hosts) else _NEXT_ADDRESS_SECONDS):
                    _, connection = await loop.create_connection(
                        Connection, each, port, ssl=self._context, server_hostname=name
                    )
                return connection
            except OSError as error:
                failures.append(error)
        if len(failures) == 1:
            raise failures[0]
        raise OSError("All connection attempts failed") from ExceptionGroup("one per address", failures)

    def _head(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        target = self._address.prefix + path
        if _TARGET.fullmatch(target) is None:
            try:
                target = httpx.URL(self._address.url + path).raw_path.decode()
            except httpx.InvalidURL as error:
                raise httpx.LocalProtocolError(f"the path cannot be sent: {error}") from None
        fields = {**self._headers, **headers}
        if body:
            fields["content-type"] = "application/json"
        if body or method != "GET":
            fields["content-length"] = str(len(body))
        lines = [f"{name}: {value}" for name, value in fields.items()]
        text = "\r\n".join([f"{method} {target} HTTP/1.1", *lines, "", ""])
        if text.count("\r") != len(lines) + 2 or text.count("\n") != len(lines) + 2 or "\0" in text:
            raise httpx.LocalProtocolError("a header contains the end of a line")
        try:
            return text.encode("latin-1")
        except UnicodeEncodeError as error:
            raise httpx.LocalProtocolError(f"a header cannot be sent: {error.reason}") from None


def _is_ip(host: str) -> bool:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return True
    return False
