"""HTTP/1.1 over sockets: how answers are framed, what is kept, what is refused."""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_pool.addresses import BackendAddress
from trl_pool.http1 import KEEPALIVE_SECONDS, Headers, Progress, Sockets

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Server:
    """Answers the n-th request of a connection with the n-th script: packets, of which `None` closes the connection.
    What it is sent is in `requests`, head and body."""

    def __init__(self, *scripts: list[bytes | None]) -> None:
        self.scripts = scripts
        self.requests: list[tuple[int, bytes, bytes]] = []
        self.connections = 0
        self.ends: list[asyncio.Event] = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = self.connections
        self.connections += 1
        self.ends.append(asyncio.Event())
        try:
            for script in self.scripts:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.lower().split(b"\r\n")
                length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
                self.requests.append((number, head, await reader.readexactly(length)))
                for packet in script:
                    if packet is None:
                        return
                    writer.write(packet)
                    await writer.drain()
                    await asyncio.sleep(0.001)  # a packet of its own
            await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self.ends[number].set()

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for end in self.ends:
            await end.wait()


@asynccontextmanager
async def sockets_to(server: Server, host: str = "127.0.0.1") -> AsyncIterator[Sockets]:
    address = BackendAddress.parse(f"{host}:{server.port}/prefix")
    sockets = Sockets(address, context=None, headers={"user-agent": "pool"})
    try:
        yield sockets
    finally:
        await sockets.aclose()


async def fetch(
    sockets: Sockets,
    path: str = "/x",
    body: bytes = b"{}",
    *,
    method: str = "POST",
    max_idle: float = KEEPALIVE_SECONDS,
    progress: Progress | None = None,
    **headers: str,
) -> tuple[int, bytes]:
    status, _, content = await sockets.fetch(
        method, path, body, headers, connect_within=5.0, max_idle=max_idle, progress=progress or Progress()
    )
    return status, content


def one(*packets: bytes | None) -> tuple[int, bytes]:
    """What is made of an answer that comes in these packets."""

    async def go() -> tuple[int, bytes]:
        async with Server(list(packets)) as server, sockets_to(server) as sockets:
            return await fetch(sockets)

    return asyncio.run(go())


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("packets", "expected"),
    [
        ([OK], b"ok"),
        ([OK[:5], OK[5:-4], OK[-4:-1], OK[-1:]], b"ok"),
        ([OK.replace(b"content-length", b"Content-Length")], b"ok"),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"], b""),
        ([b"HTTP/1.1 200 OK\r\n\r\nto the ", b"end", None], b"to the end"),
        ([b"HTTP/1.0 200 OK\r\n\r\nold", None], b"old"),
        ([CHUNKED + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"], b"abcde"),
        ([CHUNKED, b"3\r\na", b"bc\r\n", b"0\r\n", b"trailer: x\r\n\r\n"], b"abc"),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", OK], b"ok"),
        ([b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK], b"ok"),
    ],
)
def test_a_body_is_read_to_its_end(packets: list[bytes | None], expected: bytes) -> None:
    assert one(*packets) == (200, expected)


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_that_cannot_have_a_body_has_none(status: int) -> None:
    assert one(b"HTTP/1.1 %d Nothing\r\n\r\n" % status) == (status, b"")


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=1, max_size=300), st.lists(st.integers(0, 400), max_size=4), st.booleans())
def test_how_an_answer_is_cut_into_packets_makes_no_difference(body: bytes, cuts: list[int], chunked: bool) -> None:
    if chunked:
        whole = CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        whole = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    places = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    packets = [whole[a:b] for a, b in itertools.pairwise(places) if a < b]
    assert one(*packets) == (200, body)


@pytest.mark.parametrize(
    "packets",
    [
        [None],
        [OK[:-1], None],
        [OK[:10], None],
        [CHUNKED + b"5\r\nab", None],
        [CHUNKED + b"no number\r\n"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nokk"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\nok"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: two\r\n\r\nok"],
        [b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"],
        [b"SSH-2.0-OpenSSH_9.6\r\n\r\n"],
        [b"x" * 70_000, b"x" * 70_000],
    ],
)
def test_what_is_no_whole_answer_is_a_protocol_error(packets: list[bytes | None]) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        one(*packets)


def test_a_connection_is_kept_after_every_kind_of_answer_whose_end_is_known() -> None:
    chunked = CHUNKED + b"2\r\nok\r\n0\r\n\r\n"

    async def go() -> None:
        async with Server([OK], [chunked], [OK], [chunked]) as server, sockets_to(server) as sockets:
            for turn in range(4):
                progress = Progress()
                assert await fetch(sockets, progress=progress) == (200, b"ok")
                assert progress == Progress(reused=turn > 0, sent=True, answered=True)
            assert server.connections == 1

    asyncio.run(go())


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
        OK + b"and more than it had announced",
        CHUNKED + b"2\r\nok\r\n0\r\n\r\n" + b"and more than it had announced",
        OK.replace(b"200 OK", b"500 Oh"),
    ],
    ids=["said so", "old", "too much", "too much in chunks", "error"],
)
def test_a_connection_is_not_kept(answer: bytes) -> None:
    async def go() -> None:
        async with Server([answer], [OK]) as server, sockets_to(server) as sockets:
            assert (await fetch(sockets))[1] == b"ok"
            await server.ends[0].wait()
            assert (await fetch(sockets))[1] == b"ok"
            assert server.connections == 2

    asyncio.run(go())


def test_what_a_server_says_unasked_ends_the_connection() -> None:
    async def go() -> None:
        async with Server([OK, b"unasked"], [OK]) as server, sockets_to(server) as sockets:
            assert await fetch(sockets) == (200, b"ok")
            await server.ends[0].wait()
            assert await fetch(sockets) == (200, b"ok")
            assert server.connections == 2

    asyncio.run(go())


def test_a_connection_that_was_idle_for_longer_than_allowed_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> list[int]:
        async with Server([OK], [OK], [OK]) as server, sockets_to(server) as sockets:
            loop = asyncio.get_running_loop()
            real, later = loop.time, 0.0
            monkeypatch.setattr(loop, "time", lambda: real() + later)
            await fetch(sockets)
            later = 2.0
            await fetch(sockets, max_idle=1.0)
            await fetch(sockets, max_idle=1.0)  # this one is young
            later += KEEPALIVE_SECONDS + 0.1
            await fetch(sockets)
            assert [end.is_set() for end in server.ends] == [False, False, False]
            later += 0.1
            await fetch(sockets)  # the expired ones were closed when the last one was kept
            await asyncio.gather(*(end.wait() for end in server.ends[:2]))
            return [number for number, _, _ in server.requests]

    assert asyncio.run(go()) == [0, 1, 1, 2, 2]


def test_requests_go_out_as_asked() -> None:
    async def go() -> list[tuple[int, bytes, bytes]]:
        async with Server([OK], [OK], [OK]) as server, sockets_to(server) as sockets:
            await fetch(sockets, "/a?b=c", b"body", **{"user-agent": "other", "x-request-id": "é"})
            await fetch(sockets, "/sp ace", b"", method="GET")
            await fetch(sockets, body=b"")
            assert f"host: 127.0.0.1:{server.port}\r\n".encode() in server.requests[0][1]
            return server.requests

    (_, first, body), (_, second, _), (_, third, _) = asyncio.run(go())
    assert first.startswith(b"POST /prefix/a?b=c HTTP/1.1\r\n")
    assert body == b"body"
    assert first.count(b"user-agent: ") == 1
    for line in (b"user-agent: other", b"x-request-id: \xe9", b"content-type: application/json"):
        assert line + b"\r\n" in first
    assert second.startswith(b"GET /prefix/sp%20ace HTTP/1.1\r\n")
    assert b"content-" not in second
    assert b"content-length: 0\r\n" in third


@pytest.mark.parametrize("value", ["a\r\nx-evil: 1", "a\nb", "\0", "☃"])
def test_a_header_that_would_end_early_is_refused_before_anything_is_sent(value: str) -> None:
    async def go() -> None:
        async with Server([OK]) as server, sockets_to(server) as sockets:
            with pytest.raises(httpx.LocalProtocolError):
                await fetch(sockets, **{"x-request-id": value})
            assert server.connections == 0

    asyncio.run(go())


def test_a_large_request_arrives_whole() -> None:
    body = bytes(range(256)) * 40_000

    async def go() -> None:
        async with Server([OK]) as server, sockets_to(server) as sockets:
            assert await fetch(sockets, body=body) == (200, b"ok")
            assert server.requests[0][2] == body

    asyncio.run(go())


@pytest.mark.parametrize("size", [1024 * 1024 - 1, 1024 * 1024, 9_000_000])
def test_a_large_answer_arrives_whole_and_its_connection_serves_on(size: int) -> None:
    body = (bytes(range(251)) * (size // 251 + 1))[:size]
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size

    async def go() -> None:
        scripts: list[list[bytes | None]] = [[head, body], [head + body], [head, body[:1], body[1:]], [OK]]
        async with Server(*scripts) as server, sockets_to(server) as sockets:
            for _ in range(3):
                assert await fetch(sockets) == (200, body)
            assert await fetch(sockets) == (200, b"ok")
            assert server.connections == 1

    asyncio.run(go())


def test_a_large_answer_that_breaks_off_is_a_protocol_error() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 3000000\r\n\r\n"
    with pytest.raises(httpx.RemoteProtocolError):
        one(head, bytes(1_500_000), None)


def test_a_large_answer_that_nobody_waits_for_any_more_is_dropped() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 3000000\r\n\r\n"

    async def go() -> None:
        async with Server([head, bytes(1_500_000)]) as server, sockets_to(server) as sockets:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await fetch(sockets)
            await server.ends[0].wait()

    asyncio.run(go())


def test_a_request_that_nobody_reads_counts_as_not_sent() -> None:
    async def go() -> Progress:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            accepted.set()
            await gone.wait()
            writer.close()

        accepted, gone = asyncio.Event(), asyncio.Event()
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        address = BackendAddress.parse(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        sockets = Sockets(address, context=None, headers={})
        progress = Progress()
        task = asyncio.create_task(fetch(sockets, body=bytes(30_000_000), progress=progress))
        await accepted.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gone.set()
        await sockets.aclose()
        server.close()
        return progress

    assert asyncio.run(go()) == Progress(reused=False, sent=False, answered=False)


def test_a_name_with_several_addresses_is_tried_at_each() -> None:
    """`localhost` is both; the server is at one of them."""

    async def go() -> None:
        async with Server([OK]) as server, sockets_to(server, "localhost") as sockets:
            assert await fetch(sockets) == (200, b"ok")

    asyncio.run(go())


def test_a_name_that_nobody_has_is_a_connection_error() -> None:
    async def go() -> None:
        sockets = Sockets(BackendAddress.parse("nobody.invalid:1"), context=None, headers={})
        with pytest.raises(httpx.ConnectError):
            await fetch(sockets)

    asyncio.run(go())


def test_a_server_without_tls_is_a_connection_error_for_https() -> None:
    async def go() -> None:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(OK)
            writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        address = BackendAddress.parse(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        sockets = Sockets(address, context=ssl.create_default_context(), headers={})
        with pytest.raises(httpx.ConnectError):
            await fetch(sockets)
        await sockets.aclose()
        server.close()

    asyncio.run(go())


def test_no_connection_within_the_time_is_a_connect_timeout() -> None:
    async def go() -> None:
        async with Server() as server:
            address = BackendAddress.parse(f"https://127.0.0.1:{server.port}")  # TLS is never answered
            sockets = Sockets(address, context=ssl.create_default_context(), headers={})
            with pytest.raises(httpx.ConnectTimeout, match=r"no connection within 0\.1 s"):
                await sockets.fetch("GET", "/", b"", {}, connect_within=0.1, max_idle=0.0, progress=Progress())
            await sockets.aclose()

    asyncio.run(go())


def test_headers_are_found_in_any_case_and_several_of_a_name_are_one_list() -> None:
    headers = Headers([(b"Retry-After", b"7"), (b"Via", b"a"), (b"VIA", b"\xe9")])
    assert (headers["retry-after"], headers.get("RETRY-AFTER"), headers["via"]) == ("7", "7", "a, é")
    assert ("x" in headers, headers.get("x"), len(headers), list(headers)) == (False, None, 2, ["retry-after", "via"])
    assert (headers.encoded, Headers([(b"Content-Encoding", b"gzip")]).encoded) == (False, True)


# Streamed


def test_a_streamed_answer_comes_with_its_head_and_then_in_pieces() -> None:
    async def go() -> list[bytes]:
        script: list[bytes | None] = [CHUNKED, b"1\r\na\r\n", b"1\r\nb\r\n", b"0\r\n\r\n"]
        async with Server(script) as server, sockets_to(server) as sockets:
            incoming = await sockets.open("/x", b"{}", {}, connect_within=5.0, read_within=5.0)
            assert (incoming.status, dict(incoming.headers)) == (200, {"transfer-encoding": "chunked"})
            pieces = [piece async for piece in incoming.pieces()]
            await incoming.aclose()
            await server.ends[0].wait()
            return pieces

    pieces = asyncio.run(go())
    assert b"".join(pieces) == b"ab"
    assert b"" not in pieces


def test_a_stream_that_breaks_off_gives_what_came_and_then_the_error() -> None:
    async def go() -> None:
        async with Server([OK[:-1], None]) as server, sockets_to(server) as sockets:
            incoming = await sockets.open("/x", b"{}", {}, connect_within=5.0, read_within=5.0)
            pieces = incoming.pieces()
            assert await anext(pieces) == b"o"
            with pytest.raises(httpx.RemoteProtocolError):
                await anext(pieces)
            await incoming.aclose()

    asyncio.run(go())


def test_a_stream_that_falls_silent_is_a_read_timeout() -> None:
    async def go() -> None:
        async with Server([OK[:-1]]) as server, sockets_to(server) as sockets:
            incoming = await sockets.open("/x", b"{}", {}, connect_within=5.0, read_within=0.05)
            pieces = incoming.pieces()
            assert await anext(pieces) == b"o"
            with pytest.raises(httpx.ReadTimeout):
                await anext(pieces)
            await incoming.aclose()

    asyncio.run(go())


def test_a_stream_that_nobody_reads_makes_the_server_wait() -> None:
    async def go() -> None:
        size = 64 * 1024 * 1024
        head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size
        async with Server([head, *[bytes(size // 64)] * 64]) as server, sockets_to(server) as sockets:
            incoming = await sockets.open("/x", b"{}", {}, connect_within=5.0, read_within=5.0)
            connection = incoming._connection
            while not connection._paused:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert connection._buffered < size // 4
            assert sum([len(piece) async for piece in incoming.pieces()]) == size
            await incoming.aclose()

    asyncio.run(go())


# What stands where nothing should


@pytest.mark.parametrize(
    "behind",
    [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nxy", b"HTTP/1.1 200 O", b"garbage"],
    ids=["another answer", "a part of one", "no HTTP"],
)
def test_what_stands_behind_a_chunked_answer_is_no_part_of_it_and_ends_the_connection(behind: bytes) -> None:
    async def go() -> None:
        whole = CHUNKED + b"2\r\nab\r\n0\r\n\r\n"
        async with Server([whole + behind], [whole]) as server, sockets_to(server) as sockets:
            assert await fetch(sockets) == (200, b"ab")
            assert await fetch(sockets) == (200, b"ab")
            assert server.connections == 2

    asyncio.run(go())


def test_a_connection_with_a_request_that_is_not_written_yet_takes_no_other() -> None:
    async def go() -> None:
        early = b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n"
        reads = asyncio.Event()

        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(early)
            await reads.wait()  # and reads no further
            writer.close()

        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        sockets = Sockets(BackendAddress.parse(f"127.0.0.1:{port}"), context=None, headers={})
        try:
            for _ in range(2):
                first, second = Progress(), Progress()
                assert (await fetch(sockets, body=bytes(30_000_000), progress=first))[0] == 413
                assert (await fetch(sockets, progress=second))[0] == 413
                assert not second.reused
        finally:
            reads.set()
            await sockets.aclose()
            server.close()

    asyncio.run(go())


def test_any_number_of_provisional_answers_may_come_first() -> None:
    assert one(b"HTTP/1.1 100 Continue\r\n\r\n" * 3000 + OK) == (200, b"ok")


def test_a_name_that_cannot_be_one_is_a_server_that_is_not_reached() -> None:
    async def go() -> None:
        sockets = Sockets(BackendAddress("http", "a..b", 80, ""), context=None, headers={})
        with pytest.raises(httpx.ConnectError):
            await fetch(sockets)

    asyncio.run(go())
