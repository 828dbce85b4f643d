"""Servers for the weight benchmark that cost next to nothing: a web framework in each of eight would drown the rest.

`python -m tests.benchmarks.weight_servers answer -n 8 --dialect trl` answers control calls after a while, all in one
process. `… receive -n 8` takes tensors over gloo, in a process for each, as the worker of a `trl vllm-serve` does.
Both print one line of JSON (urls, pids) and end with their standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_HOST = "127.0.0.1"
_START_SECONDS = 120.0
_ROOT = Path(__file__).resolve().parents[2]

Answer = Callable[[str, bytes], Any]
"""Path and body of a request; the JSON of its answer, perhaps awaitable. `None` is a 307."""


class Http(asyncio.Protocol):
    """As much of an HTTP server as a control call needs.

    Args:
        answer (`Callable`): Makes answers.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer, self._data = answer, b""
        self._tasks: set[asyncio.Task[None]] = set()
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, rest = self._data.partition(b"\r\n\r\n")
        if not found:
            return
        length = 0
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        if len(rest) < length:
            return
        self._data = rest[length:]
        path = head.split(b" ", 2)[1].decode()
        task = asyncio.ensure_future(self._respond(path, rest[:length]))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _respond(self, path: str, body: bytes) -> None:
        told = self._answer(path, body)
        if asyncio.iscoroutine(told) or asyncio.isfuture(told):
            told = await told
        if told is None:
            self._transport.write(b"HTTP/1.1 307 Temporary Redirect\r\nlocation: /\r\ncontent-length: 0\r\n\r\n")
            return
        text = json.dumps(told).encode()
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text)
        )


def trl_facts(path: str) -> Any:
    """What a `trl vllm-serve` answers to questions."""
    return {"/health/": {"status": "ok"}, "/get_world_size/": {"world_size": 1}}.get(path)


class Delayed:
    """One server's control calls, answered after a while.

    Args:
        dialect (`str`): `"trl"` or `"vllm"`.
        seconds (`float`): Until the answer to a control call.
    """

    def __init__(self, dialect: str, seconds: float) -> None:
        self._seconds, self._version = seconds, "default"
        self._facts: Any = trl_facts if dialect == "trl" else self._vllm_facts

    def __call__(self, path: str, body: bytes) -> Any:
        return self._facts(path) or (None if path == "/health/" else self._control(path, body))

    async def _control(self, path: str, body: bytes) -> Any:
        await asyncio.sleep(self._seconds)
        if path == "/finish_weight_update":
            self._version = json.loads(body).get("weight_version", self._version)
        return {"message": "Request received, status: True", "success": True}

    def _vllm_facts(self, path: str) -> Any:
        config = {"model_config": {"dtype": "bfloat16"}, "weight_transfer_config": {"backend": "gloo"}}
        return {
            "/health": {"status": "ok"},
            "/v1/models": {"data": [{"id": "model", "max_model_len": 4096}]},
            "/version": {"version": "0.31.0"},
            "/server_info?config_format=json": {"vllm_config": config},
            "/get_world_size": {"world_size": 1},
            "/weight_info": {"weight_version": self._version},
        }.get(path)


class Receiving:
    """One `trl vllm-serve`: answers at once, and a worker takes what it was told of in that order."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[str, Any, Future[None]]] = queue.SimpleQueue()
        self._group: Any = None
        threading.Thread(target=self._work, daemon=True).start()

    def __call__(self, path: str, body: bytes) -> Any:
        told = trl_facts(path)
        if told is not None:
            return told
        done: Future[None] = Future()
        self._calls.put((path, json.loads(body) if body else {}, done))
        return self._fence(done) if path == "/reset_prefix_cache/" else {"message": "Request received"}

    async def _fence(self, done: Future[None]) -> Any:
        await asyncio.wrap_future(done)
        return {"message": "Request received, resetting prefix cache status: True"}

    def _work(self) -> None:
        import torch
        from vllm.distributed.utils import StatelessProcessGroup

        from trl_pool.weights.gloo import group_over

        stateless: Any = None
        while True:
            path, body, done = self._calls.get()
            try:
                if path == "/init_communicator/":
                    stateless = StatelessProcessGroup.create(
                        host=body["host"], port=body["port"], rank=0, world_size=body["world_size"]
                    )
                    self._group = group_over(stateless, timeout=60.0)
                elif path == "/update_named_param/":
                    tensor = torch.empty(body["shape"], dtype=getattr(torch, body["dtype"].removeprefix("torch.")))
                    self._group.broadcast(tensor, 1)
                    stateless.barrier()
                elif path == "/close_communicator/" and self._group is not None:
                    self._group.close()
                    self._group = stateless = None
            except Exception as error:
                done.set_exception(error)
                print(f"{path}: {error}", file=sys.stderr, flush=True)
            else:
                done.set_result(None)


async def _serve(sockets: list[socket.socket], answers: list[Answer]) -> None:
    loop = asyncio.get_running_loop()
    for listener, answer in zip(sockets, answers, strict=True):
        await loop.create_server(lambda answer=answer: Http(answer), sock=listener)
    ended = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), lambda: None if os.read(0, 1024) else ended.set())
    await ended.wait()


def _listeners(n: int) -> list[socket.socket]:
    return [socket.create_server((_HOST, 0), backlog=128) for _ in range(n)]


def _told(listeners: list[socket.socket], pids: list[int]) -> None:
    urls = [f"http://{_HOST}:{listener.getsockname()[1]}" for listener in listeners]
    print(json.dumps({"urls": urls, "pids": pids}), flush=True)


def main() -> None:
    """Serves until its standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("answer", "receive"))
    parser.add_argument("-n", type=int, default=1)
    parser.add_argument("--dialect", default="trl")
    parser.add_argument("--seconds", type=float, default=0.01)
    options = parser.parse_args()
    listeners = _listeners(options.n)
    if options.what == "answer":
        _told(listeners, [os.getpid()])
        asyncio.run(_serve(listeners, [Delayed(options.dialect, options.seconds) for _ in listeners]))
        return
    import torch
    import vllm.distributed.utils  # noqa: F401 (imported once, for all children)

    torch.set_num_threads(1)
    children: list[int] = []
    for listener in listeners:
        child = os.fork()
        if child == 0:
            try:
                asyncio.run(_serve([listener], [Receiving()]))
            finally:
                os._exit(0)
        children.append(child)
    _told(listeners, children)
    while os.read(0, 1024):
        pass
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


class Servers:
    """Such a process; a context manager.

    Args:
        arguments (`str`): Of its command line.
    """

    def __init__(self, *arguments: str) -> None:
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.weight_servers", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            cwd=_ROOT,
        )
        self.urls: list[str] = []
        self.pids: list[int] = []

    def __enter__(self) -> Self:
        assert self._child.stdout is not None
        timer = threading.Timer(_START_SECONDS, self._child.kill)
        timer.start()
        line = b"{}"
        try:
            # Whatever a library prints on its way comes first.
            while (line := self._child.stdout.readline()) and not line.startswith(b'{"urls"'):
                pass
        finally:
            timer.cancel()
        if not line:
            self._end()
            raise RuntimeError("the servers of the weight benchmark did not start")
        told = json.loads(line)
        self.urls, self.pids = told["urls"], told["pids"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        try:
            self._child.wait(5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()


if __name__ == "__main__":
    main()
