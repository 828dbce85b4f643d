"""Between the wire and the application: every request is counted, meets its fault, and waits for its turn.

An ASGI middleware. It reads the whole body before a request counts as received, and has the whole answer in
hand before a byte of it is sent, so a fault can replace it, cut it or break the connection in its middle.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trl_pool.sim.faults import ENDPOINTS, Fault, FaultBook
from trl_pool.sim.ledger import Ledger
from trl_pool.sim.worker import Worker, hang_for_good

logger = logging.getLogger(__name__)

_SCORING = "get_sequence_logprobs"
_SERVER = (b"server", b"trl-pool-sim")  # on every response: no weights live here
_LISTS = ("completion_ids", "logprobs", "logprob_token_ids", "completion_lengths")


@dataclass(frozen=True)
class Answer:
    """A whole HTTP response."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def with_body(self, body: bytes) -> Answer:
        """The same response with another body, complete by its own account."""
        kept = tuple(h for h in self.headers if h[0].lower() != b"content-length")
        return replace(self, headers=(*kept, (b"content-length", b"%d" % len(body))), body=body)

    @classmethod
    def of_error(cls, status: int, retry_after: float | None = None) -> Answer:
        """What FastAPI answers for an error: its status phrase as `detail`, or for a 500 as bare text."""
        if status == 500:
            kind, body = b"text/plain; charset=utf-8", b"Internal Server Error"
        else:
            phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "Error"
            kind, body = b"application/json", msgspec.json.encode({"detail": phrase})
        headers = [(b"content-type", kind)]
        if retry_after is not None:
            headers.append((b"retry-after", b"%g" % retry_after))
        return cls(status, tuple(headers), b"").with_body(body)


class Gate:
    """The middleware.

    Args:
        app (`ASGIApp`):
            The dialect's routes.
        worker (`Worker`):
            Its `turn` is the server's event loop.
        ledger (`Ledger`):
            Counts.
        faults (`FaultBook`):
            Asked once per request.
    """

    def __init__(self, app: ASGIApp, worker: Worker, ledger: Ledger, faults: FaultBook) -> None:
        self.app = app
        self.worker, self.ledger, self.faults = worker, ledger, faults
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
        endpoint = _endpoint(scope["path"])
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        record = self.ledger.arrived(endpoint, headers, _parsed(body))
        status: int | None = None
        try:
            status = await self._serve(scope, _Replay(body, receive), send, endpoint)
        finally:
            self.ledger.left(record, status)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, endpoint: str) -> int | None:
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
            answer = Answer.of_error(status, default if fault.retry_after is None else fault.retry_after)
            await _send(send, answer)
            return answer.status
        if kind in ("hang", "dead_worker"):
            await self._released.wait()
            if gone():
                return None
        scope["state"].update(gone=gone, false_reset=kind == "false_reset")
        run = self._run_scoring if endpoint == _SCORING else self._run_in_turn
        answer, raised = await run(scope, receive, fault.seconds if fault and kind == "slow" else 0.0)
        if fault and answer.status == 200:
            answer = altered(answer, fault)
            if kind == "reset" and transport is not None:
                await _send_part(send, answer, fault.after_bytes, transport)
                return None
        await _send(send, answer)
        if raised and transport is not None:
            transport.close()  # uvicorn closes a connection whose request ended in an exception
        return answer.status

    async def _run_in_turn(self, scope: Scope, receive: Receive, slow_seconds: float) -> tuple[Answer, bool]:
        async with self.worker.turn:
            if slow_seconds:
                await self.worker.sleep(slow_seconds)
            return await self._run(scope, receive)

    async def _run_scoring(self, scope: Scope, receive: Receive, slow_seconds: float) -> tuple[Answer, bool]:
        """Scoring waits on threads: the event loop must be free to take the request and to answer it, no longer."""
        with self.worker.pipe(scoring=True, gone=scope["state"]["gone"]) as use:
            scope["state"]["use"] = use
            async with self.worker.turn:
                pass
            if slow_seconds:
                await self.worker.sleep(slow_seconds)
            result = await self._run(scope, receive)
        async with self.worker.turn:
            return result

    async def _run(self, scope: Scope, receive: Receive) -> tuple[Answer, bool]:
        """The application's answer, and whether it is one because the application raised."""
        capture = _Capture()
        try:
            await self.app(scope, receive, capture)
        except Exception as error:  # whatever an endpoint raises is the client's bare 500
            logger.debug("%s raised %r", scope["path"], error)
            return Answer.of_error(500), True
        return capture.answer(), False


def altered(answer: Answer, fault: Fault) -> Answer:
    """The answer as the fault leaves it; unchanged if the fault does not concern the body."""
    if fault.kind == "cut_json":
        return answer.with_body(answer.body[: len(answer.body) // 2])
    if fault.kind == "invalid_json":
        return answer.with_body(b'{"completion_ids": [[1, 2, oops')
    if fault.kind == "wrong_count":
        fields: dict[str, Any] = msgspec.json.decode(answer.body)
        for name in _LISTS:
            if fields.get(name):
                fields[name] = fields[name][:-1]
        return answer.with_body(msgspec.json.encode(fields))
    return answer


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
    """`send` that keeps the response."""

    def __init__(self) -> None:
        self._start: MutableMapping[str, Any] = {}
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")

    def answer(self) -> Answer:
        return Answer(self._start["status"], tuple(self._start["headers"]), bytes(self._body))


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


def _endpoint(path: str) -> str:
    name = path[1:-1]
    return name if path == f"/{name}/" and name in ENDPOINTS else "other"


def _parsed(body: bytes) -> object:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
