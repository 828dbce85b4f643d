"""One connection, and one exchange of HTTP/1.1 at a time on it: what is written, and what is made of what comes.

A request is one write; its answer wakes its task once; heads are parsed in C; a body whose length is known is not
parsed at all, and a large one is received where it stays.
"""

from __future__ import annotations

import asyncio
import io
from typing import Any, cast

import httptools
import httpx

RawHeaders = list[tuple[bytes, bytes]]

_MAX_HEAD = 128 * 1024

_READ_AHEAD = 1024 * 1024
"""Bytes of a streamed answer that may lie here unread before the server has to wait."""

_JOIN_BELOW = 64 * 1024
"""A body up to this size is copied behind its head, so that both are one packet."""

_FILL_FROM, _FILL_TO = 1024 * 1024, 1024**3
"""Bodies of which length are received straight to where they stay."""


class _Filling(asyncio.BufferedProtocol):
    """Takes the rest of a large body of known length, which the kernel then writes where it will stay: it is copied
    once instead of three times.

    Args:
        connection ([`Connection`]): Told of everything else.
        length (`int`): Of the whole body.
        begun (`bytes`): What has come of it.
    """

    def __init__(self, connection: Connection, length: int, begun: bytes) -> None:
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


class Connection(asyncio.Protocol):
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
