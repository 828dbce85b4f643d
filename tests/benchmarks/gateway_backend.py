"""A server that answers every POST with the same bytes after a while: `FILE DELAY PORT…`.

One asyncio protocol (on uvloop where there is one) without a framework: as much of a C server as Python can be, since
nginx cannot wait. It serves several ports, each as a `vllm serve` that says who it is.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path


def _answer(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


QUESTIONS = {
    b"/v1/models": _answer(b'{"data":[{"id":"m"}]}'),
    b"/version": _answer(b'{"version":"0.31.0"}'),
    b"/health": _answer(b""),
}
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"


class Protocol(asyncio.Protocol):
    """One connection; requests come one after the other."""

    def __init__(self, answer: bytes, delay: float) -> None:
        self._answer, self._delay = answer, delay
        self._loop = asyncio.get_running_loop()
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        while True:
            head, found, rest = self._data.partition(b"\r\n\r\n")
            if not found:
                return
            method, path, _ = head.split(b" ", 2)
            if method == b"GET":
                self._transport.write(QUESTIONS.get(path.partition(b"?")[0], NOT_FOUND))
                self._data = rest
                continue
            lower = head.lower()
            start = lower.find(b"content-length:") + 15
            length = int(lower[start:].split(b"\r\n", 1)[0]) if start >= 15 else 0
            if len(rest) < length:
                return
            self._data = rest[length:]
            self._loop.call_later(self._delay, self._transport.write, self._answer)


async def serve(answer: bytes, delay: str, *ports: str) -> None:
    """Serves until it is ended."""
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(lambda: Protocol(answer, float(delay)), "127.0.0.1", int(p)) for p in ports]
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    try:
        from uvloop import run
    except ImportError:
        from asyncio import run
    run(serve(_answer(Path(sys.argv[1]).read_bytes()), *sys.argv[2:]))
