"""Between the wire and the application: every request is counted, meets its fault, and waits for its turn.

An ASGI middleware. It reads the whole body before a request counts as received, and has the whole answer in
hand before a byte of it is sent, so a fault can replace it, cut it or break the connection in its middle. Streamed
answers alone pass through as they come, unless a fault wants their body.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Awaitable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trl_pool.sim.answer import Answer, altered
from trl_pool.sim.faults import Fault, FaultBook
from trl_pool.sim.ledger import Ledger
from trl_pool.sim.traits import Traits
from trl_pool.sim.turns import Turns
from trl_pool.sim.worker import hang_for_good

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SERVER = (b"server", b"trl-pool-sim")  # on every response: no weights live here
_ALTERING = frozenset({"reset", "cut_json", "invalid_json", "wrong_count"})


class MayBePoisoned(Protocol):
    """What the gate asks the worker."""

    @property
    def poisoned(self) -> bool:
        """Whether nothing will ever be answered again."""


@dataclass(frozen=True)
class Outcome:
    """What the application made of a request."""

    status: int
    answer: Answer | None
    """`None` when it was streamed, and so is sent already."""
    raised: bool = False
    """Whether it is an answer because the application raised."""


class Gate:
    """The middleware.

    Args:
        app (`ASGIApp`):
            The dialect's routes.
        worker (`MayBePoisoned`):
            Does the work behind them.
        ledger (`Ledger`):
            Counts.
        faults (`FaultBook`):
            Asked once per request.
        traits (`Traits`):
            The dialect's.
        turns (`Turns`):
            Decides when a request is served.
    """

    def __init__(
        self,
        app: ASGIApp,
        worker: MayBePoisoned,
        ledger: Ledger,
        faults: FaultBook,
        traits: Traits,
        turns: Turns,
    ) -> None:
        self.app = app
        self.worker, self.ledger, self.faults = worker, ledger, faults
        self._traits, self._turns = traits, turns
        self._released = asyncio.Event()

    def release(self) -> None:
        """Let go of the requests that hang because of a fault."""
        self._released.set()
        self._released = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:
            return
        endpoint = self._traits.endpoint(scope["path"])
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        record = self.ledger.arrived(endpoint, headers, _parsed(body))
        status: int | None = None
        try:
            status = await self._serve(scope, body, receive, send, endpoint)
        finally:
            self.ledger.left(record, status)

    async def _serve(self, scope: Scope, body: bytes, receive: Receive, send: Send, endpoint: str) -> int | None:
        """Answer, and say with which status; `None` if there was no whole answer."""
        if self.worker.poisoned:
            await hang_for_good()
        transport: asyncio.Transport | None = scope.setdefault("state", {}).get("transport")

        def gone() -> bool:
            return transport is not None and transport.is_closing()

        fault = self.faults.take(endpoint)
        kind = fault.kind if fault else None
        if fault and kind in ("status", "busy"):
            status, default = (429, 1.0) if kind == "busy" else (fault.status, None)
            retry_after = default if fault.retry_after is None else fault.retry_after
            answer = Answer.of_error(status, retry_after, openai=self._traits.openai_errors)
            await _send(send, answer)
            return answer.status
        if kind in ("hang", "dead_worker"):
            await self._released.wait()
            if gone():
                return None
        scope["state"].update(gone=gone, false_reset=kind == "false_reset")
        outcome = await self._outcome(scope, body, receive, send, endpoint, fault)
        if outcome is None:
            return None
        if outcome.answer is None:
            return outcome.status
        answer = outcome.answer
        if fault and answer.status == 200:
            answer = altered(answer, fault, self._traits)
            if kind == "reset" and transport is not None:
                await _send_part(send, answer, fault.after_bytes, transport)
                return None
        await _send(send, answer)
        if outcome.raised and transport is not None:
            transport.close()  # uvicorn closes a connection whose request ended in an exception
        return answer.status

    async def _outcome(
        self, scope: Scope, body: bytes, receive: Receive, send: Send, endpoint: str, fault: Fault | None
    ) -> Outcome | None:
        """What the application makes of the request when its turn has come; `None` if it was abandoned."""
        capture = _Capture(None if fault and fault.kind in _ALTERING else send)
        slow_seconds = fault.seconds if fault and fault.kind == "slow" else 0.0
        replay = _Replay(body, receive)
        serving = self._turns.serve(endpoint, scope["state"], slow_seconds, lambda: self._run(scope, replay, capture))
        if endpoint in self._traits.abandoned:
            return await _unless_left(serving, receive, capture)
        return await serving

    async def _run(self, scope: Scope, receive: Receive, capture: _Capture) -> Outcome:
        try:
            await self.app(scope, receive, capture)
        except Exception as error:  # whatever an endpoint raises is the client's 500
            logger.debug("%s raised %r", scope["path"], error)
            answer = Answer.of_error(500, openai=self._traits.openai_errors, message=str(error))
            return Outcome(500, answer, raised=True)
        return capture.outcome()


async def _unless_left(serving: Awaitable[T], receive: Receive, capture: _Capture) -> T | None:
    """The result, or `None` if the client goes away before there is one; serving ends then."""
    task, leaving = asyncio.ensure_future(serving), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        # After the last byte of a stream one is told of a disconnect as well.
        if leaving.done() and not capture.sent_all:
            return None
        return await task
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    """Wait until the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _Replay:
    """`receive` for an application whose request body has been read already."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


class _Capture:
    """`send` that keeps the response, except for a stream of events, which passes through if there is a way."""

    def __init__(self, stream: Send | None) -> None:
        self._stream = stream
        self._streaming = False
        self.sent_all = False
        """Whether the last part of a stream has passed."""
        self._start: MutableMapping[str, Any] = {}
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
            self._streaming = self._stream is not None and any(b"text/event-stream" in kind for kind in kinds)
            if self._streaming:
                message = {**message, "headers": [_SERVER, *message["headers"]]}
        if self._streaming and self._stream is not None:
            await self._stream(message)
            self.sent_all = message["type"] == "http.response.body" and not message.get("more_body", False)
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")

    def outcome(self) -> Outcome:
        status: int = self._start["status"]
        if self._streaming:
            return Outcome(status, None)
        return Outcome(status, Answer(status, tuple(self._start["headers"]), bytes(self._body)))


async def _read(receive: Receive) -> bytes | None:
    """The request's body, or `None` if the client went away in its middle."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


async def _send(send: Send, answer: Answer, part: int | None = None) -> None:
    """Send an answer, or only this many bytes of its body."""
    headers = [_SERVER, *answer.headers]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body[:part], "more_body": part is not None})


async def _send_part(send: Send, answer: Answer, size: int | None, transport: asyncio.Transport) -> None:
    """Send headers and the first half of a body, or `size` bytes of it, or (-1) nothing; then reset."""
    if size != -1:
        await _send(send, answer, len(answer.body) // 2 if size is None else min(size, len(answer.body) - 1))
    abort(transport)


def abort(transport: asyncio.Transport) -> None:
    """End a connection with a TCP reset: SO_LINGER of zero seconds makes close() send one."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _parsed(body: bytes) -> object:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
