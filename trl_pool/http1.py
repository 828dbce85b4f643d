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
import io
import ipaddress
import re
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import httptools
import httpx

from .addresses import BackendAddress

RawHeaders = list[tuple[bytes, bytes]]

KEEPALIVE_SECONDS = 4.0
"""Idle connections are dropped on our side before uvicorn drops them, which it does after 5 s."""

_MAX_HEAD = 128 * 1024
_READ_AHEAD = 1024 * 1024
"""Bytes of a streamed answer that may lie here unread before the server has to wait."""

_JOIN_BELOW = 64 * 1024
"""A body up to this size is copied behind its head, so that both are one packet."""

_FILL_FROM, _FILL_TO = 1024 * 1024, 1024**3
"""Bodies of which length are received straight to where they stay."""

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


class _Filling(asyncio.BufferedProtocol):
    """Takes the rest of a large body of known length, which the kernel then writes where it will stay: it is copied
    once instead of three times.

    Args:
        connection ([`_Connection`]): Told of everything else.
        length (`int`): Of the whole body.
        begun (`bytes`): What has come of it.
    """

    def __init__(self, connection: _Connection, length: int, begun: bytes) -> None:
        self._connection = connection
        # Its buffer is the `bytes` object that getvalue() returns, as long as nobody else has it.
        self._body = io.BytesIO(bytes(length))
        self._view = self._body.getbuffer()
        self._view[: len(begun)] = begun
        self._filled = len(begun)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._filled == len(self._view):
            self._view.release()
            self._connection.filled(self._body)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()

    def eof_received(self) -> None:
        self._connection.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        self._connection.connection_lost(error)


class _Connection(asyncio.Protocol):
    """One connection, with one exchange at a time on it."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.lost: asyncio.Future[None] = loop.create_future()
        self.idle_since = 0.0
        self._asked = False
        self._reset(streamed=False)

    def _reset(self, *, streamed: bool) -> None:
        self._streamed = streamed
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._head: bytes | None = b""  # of the head what has come; `None` when all of it has
        self._parser: Any = None  # of a chunked body
        self._left: int | None = 0  # bytes of the body to come; `None` when only the end of the connection tells
        self._pieces: list[bytes] = []
        self._filled: io.BytesIO | None = None
        self._buffered = 0
        self._paused = False
        self._reusable = False
        self.finished = False
        self.answered = False
        self.sent = True
        self.status = 0
        self.headers: RawHeaders = []

    # An exchange

    async def ask(self, head: bytes, body: bytes, *, streamed: bool) -> None:
        """Sends a request and returns when its answer is there: all of it, or, if it is streamed, its head."""
        self._reset(streamed=streamed)
        self._asked = True
        if self._transport.is_closing():
            raise httpx.RemoteProtocolError("the server closed the connection")
        if len(body) < _JOIN_BELOW:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)
        while not (self.finished or (streamed and self._head is None)):
            await self._news()

    async def piece(self) -> bytes:
        """What has come of a streamed body; empty at its end."""
        while not self._pieces and not self.finished:
            await self._news()
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        return self.taken()

    def taken(self) -> bytes:
        """The part of the body that lies here."""
        if self._filled is not None:
            return self._filled.getvalue()
        pieces = self._pieces
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._pieces, self._buffered = [], 0
        return body

    async def _news(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        await self._waiter
        if self._error is not None and not self.finished:
            raise self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _break(self, error: Exception) -> None:
        if self._asked and not self.finished and self._error is None:
            self._error = error
            self._wake()
        self.abort()

    # Its life

    @property
    def usable(self) -> bool:
        """Whether another exchange can be made on it, as far as is known."""
        free = (self.finished and self._reusable and self.sent) or not self._asked
        return free and not self._transport.is_closing()

    def forget(self) -> None:
        """Lets go of the answer, which may be large."""
        self._filled = None
        self.headers = []

    def rest(self) -> None:
        """Lies idle from now on."""
        self._asked = False
        self.idle_since = self._loop.time()

    def leave(self) -> None:
        """Closes."""
        if self.finished:
            self._transport.close()
        else:
            self.abort()

    def abort(self) -> None:
        """Closes at once, whatever has not been written yet."""
        self._transport.abort()

    # Called by the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # The transport then calls pause_writing() whenever it holds something back.
        self._transport.set_write_buffer_limits(0)

    def pause_writing(self) -> None:
        self.sent = False

    def resume_writing(self) -> None:
        self.sent = True

    def eof_received(self) -> None:
        self._ended(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._ended(error)
        if not self.lost.done():
            self.lost.set_result(None)

    def _ended(self, error: Exception | None) -> None:
        self._reusable = False
        if error is None and self._asked and self._head is None and self._left is None:
            self._finish()
        elif error is None:
            self._break(httpx.RemoteProtocolError("the server closed the connection"))
        else:
            broken = httpx.ReadError(str(error) or type(error).__name__)
            broken.__cause__ = error
            self._break(broken)

    def data_received(self, data: bytes) -> None:
        if not self._asked or self.finished:
            self._reusable = False  # nobody asked for that: what follows could not be told from an answer
            self.abort()
            return
        self.answered = True
        if self._head is None:
            self._more(data)
            return
        data = self._head + data
        while True:
            end = data.find(b"\r\n\r\n") + 4
            if end < 4:
                self._head = data
                if len(data) > _MAX_HEAD:
                    self._break(httpx.RemoteProtocolError("the head of the answer has no end"))
                return
            if not self._read_head(data, end):
                return
            data = data[end:]  # behind a provisional answer

    def _read_head(self, data: bytes, end: int) -> bool:
        """Takes a head, and what is behind it. Returns whether another head has to follow."""
        parser = httptools.HttpResponseParser(self)
        self.headers = []
        try:
            parser.feed_data(memoryview(data)[:end])
            self.status = parser.get_status_code()
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._break(httpx.RemoteProtocolError(f"the answer is no HTTP: {error}"))
            return False
        if self.status < 200:  # "go on", "more will come": no answer yet
            return True
        self._head = None
        self._reusable = parser.should_keep_alive()
        self._left = self._body_length(parser)
        if self._streamed:
            self._wake()
        if self._left == 0 and self._parser is None:
            self._reusable = self._reusable and end == len(data)
            self._finish()
        elif end < len(data):
            self._more(data[end:])
        return False

    def _body_length(self, parser: Any) -> int | None:
        """What the head says of the body's length. llhttp has refused what contradicts itself."""
        if self.status in (204, 304):
            return 0
        length: int | None = None
        for name, value in self.headers:
            name = name.lower()
            if name == b"transfer-encoding":
                self._parser = parser
                return 0
            if name == b"content-length":
                length = int(value)
        return length

    def _more(self, data: bytes) -> None:
        """Takes a part of the body."""
        if self._parser is not None:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserError as error:
                self._reusable = False
                self._break(httpx.RemoteProtocolError(f"the answer breaks off: {error}"))
                return
        elif self._left is None:
            self._keep(data)
        else:
            if len(data) > self._left:
                data = data[: self._left]
                self._reusable = False
            large = _FILL_FROM <= self._left <= _FILL_TO and not self._streamed
            if large and not self._pieces and 0 < len(data) < self._left:
                self._receive_by(_Filling(self, self._left, data))
                return
            self._left -= len(data)
            self._keep(data)
            if not self._left:
                self._finish()
                return
        if self._streamed and self._pieces:
            self._wake()

    def filled(self, body: io.BytesIO) -> None:
        """The whole body is there. The transport still has its hands on it: it would be copied if it were read now."""
        self._receive_by(self)
        self._filled = body
        self._finish()

    def _receive_by(self, protocol: asyncio.BaseProtocol) -> None:
        # uvloop looks at the kind of a protocol when it begins to read.
        self._transport.pause_reading()
        self._transport.set_protocol(protocol)
        self._transport.resume_reading()

    def _keep(self, data: bytes) -> None:
        self._pieces.append(data)
        self._buffered += len(data)
        if self._streamed and self._buffered > _READ_AHEAD and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _finish(self) -> None:
        self.finished = True
        self._wake()

    # Called by the parser

    def on_message_begin(self) -> None:
        if self.finished:  # something that was not asked for stands behind a chunked body
            self._reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head is not None:  # trailers are dropped
            self.headers.append((name, value))

    def on_body(self, data: bytes) -> None:
        if not self.finished:
            self._keep(data)

    def on_message_complete(self) -> None:
        if self._parser is not None and not self.finished:
            self._finish()


class Incoming:
    """An answer whose head is there, and whose body comes.

    Args:
        connection ([`_Connection`]): On which it comes; nothing else is asked on it afterwards.
        read_within (`float`): Seconds that may pass between two pieces of the body.
    """

    def __init__(self, connection: _Connection, read_within: float) -> None:
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
        self._idle: list[_Connection] = []  # the longest idle first
        self._all: set[_Connection] = set()

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

    def _keep(self, connection: _Connection) -> None:
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

    async def _connection(self, connect_within: float, max_idle: float, progress: Progress) -> _Connection:
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

    async def _connect(self) -> _Connection:
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
                        _Connection, each, port, ssl=self._context, server_hostname=name
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
