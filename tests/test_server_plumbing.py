"""What every route needs: bodies within a limit, clients that may leave, routes without FastAPI in between."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.requests import Request

from trl_pool.server import GatewaySettings, create_app
from trl_pool.server.failures import BodyTooLargeError, ClientGoneError
from trl_pool.server.plumbing import read_body, while_connected

GONE = {"type": "http.disconnect"}


def packet(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


class Client:
    """What a request receives: these messages, and then nothing until it leaves."""

    def __init__(self, *messages: dict[str, Any], headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self.messages = list(messages)
        self.left = asyncio.Event()
        self.watched = asyncio.Event()
        self.request = Request({"type": "http", "method": "POST", "headers": list(headers)}, self.receive)

    async def receive(self) -> dict[str, Any]:
        if self.messages:
            return self.messages.pop(0)
        self.watched.set()
        await self.left.wait()
        return GONE


# Bodies


def test_a_body_in_pieces_is_put_together() -> None:
    async def go() -> bytes:
        return await read_body(Client(packet(b"ab", True), packet(b"", True), packet(b"c")).request, 3)

    assert asyncio.run(go()) == b"abc"


def test_a_body_is_refused_as_soon_as_too_much_has_come() -> None:
    async def go() -> None:
        client = Client(packet(b"ab", True), packet(b"cd", True), packet(b"e"))
        with pytest.raises(BodyTooLargeError):
            await read_body(client.request, 3)
        assert client.messages == [packet(b"e")]

    asyncio.run(go())


def test_a_body_that_is_announced_as_too_large_is_not_read() -> None:
    async def go() -> None:
        client = Client(packet(b"abcd"), headers=[(b"content-length", b"4")])
        with pytest.raises(BodyTooLargeError):
            await read_body(client.request, 3)
        assert client.messages == [packet(b"abcd")]

    asyncio.run(go())


def test_a_client_that_leaves_in_the_middle_of_its_body_is_gone() -> None:
    async def go() -> None:
        with pytest.raises(ClientGoneError):
            await read_body(Client(packet(b"a", True), GONE).request, 3)

    asyncio.run(go())


# Clients that leave


def test_work_whose_client_stays_gives_its_result() -> None:
    async def go() -> None:
        client = Client()

        async def quick() -> int:
            return 1

        async def slow() -> int:
            await client.watched.wait()
            return 2

        assert await while_connected(client.request, quick()) == 1
        assert not client.watched.is_set()
        assert await while_connected(client.request, slow()) == 2

    asyncio.run(go())


def test_work_whose_client_leaves_is_cancelled() -> None:
    async def go() -> None:
        client = Client(packet(b"the rest of a body"))
        cancelled = False

        async def work() -> None:
            nonlocal cancelled
            try:
                client.left.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled = True
                raise

        task = asyncio.current_task()
        assert task is not None
        with pytest.raises(ClientGoneError):
            await while_connected(client.request, work())
        assert (cancelled, task.cancelling()) == (True, 0)

    asyncio.run(go())


def test_an_error_of_the_work_comes_out_as_it_is() -> None:
    async def go() -> None:
        async def work() -> None:
            raise ValueError("of the work")

        with pytest.raises(ValueError, match="of the work"):
            await while_connected(Client().request, work())

    asyncio.run(go())


@pytest.mark.parametrize("leaves", [False, True])
def test_a_request_that_is_cancelled_from_outside_is_cancelled(leaves: bool) -> None:
    """Also when its client leaves at the same moment."""

    async def go() -> None:
        client = Client()
        task = asyncio.create_task(while_connected(client.request, asyncio.Event().wait()))
        await client.watched.wait()
        if leaves:
            client.left.set()
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())


def test_a_time_out_around_the_work_is_not_taken_for_a_client_that_left() -> None:
    async def go() -> None:
        async def work() -> None:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()

        with pytest.raises(TimeoutError):
            await while_connected(Client().request, work())

    asyncio.run(go())


# Routes


def test_routes_that_are_called_directly_are_documented_like_all_others() -> None:
    app = create_app(GatewaySettings(backends="http://n1:8000"))
    direct = {path for _, path in app.state.direct}
    assert {"/generate", "/generate/", "/v1/completions", "/v1/completions/", "/inference/v1/generate"} <= direct
    documented = app.openapi()["paths"]
    for path in direct:
        twin = path.rstrip("/") if path.endswith("/") else f"{path}/"
        assert (path in documented) != (twin in documented), path
    assert "requestBody" in documented["/generate/"]["post"]


def test_what_a_gateways_process_keeps_for_good_is_no_work_for_the_garbage_collector() -> None:
    """In a process of its own: it cannot be undone for a single test."""
    code = (
        "import gc; from trl_pool.server.lifecycle import keep_for_good; keep_for_good(); print(gc.get_freeze_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) > 10_000


def test_middleware_that_somebody_adds_is_not_passed_by() -> None:
    """Whoever bolts on authentication expects it in front of every route."""
    app = create_app(GatewaySettings(backends=("n1:8000",)))

    class Door:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                await send({"type": "http.response.start", "status": 401, "headers": []})
                await send({"type": "http.response.body", "body": b""})

    app.add_middleware(Door)
    statuses = []

    async def go() -> None:
        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        for path in ("/v1/completions", "/generate/", "/pool/stats"):
            scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
            await app(scope, Client(packet(b"{}")).receive, send)

    asyncio.run(go())
    assert statuses == [401, 401, 401]
