"""One HTTP exchange: the table of foreign errors, statuses, and connections that break."""

from __future__ import annotations

import asyncio
import email.utils
import gzip
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest_httpx import HTTPXMock

from trl_pool import PoolConfig
from trl_pool.addresses import BackendAddress
from trl_pool.errors import AttemptError, Outcome, RequestRejectedError
from trl_pool.exchange import CONTROL_IDLE_SECONDS, OUTCOMES, Answer, Exchange, judge, parse_retry_after, translate

URL = "http://n1:8000"
UNREACHED, LOST, TIMED_OUT, BAD_ANSWER = Outcome.UNREACHED, Outcome.LOST, Outcome.TIMED_OUT, Outcome.BAD_ANSWER

EXPECTED = {
    "ConnectError": UNREACHED,
    "ConnectTimeout": UNREACHED,
    "PoolTimeout": UNREACHED,
    "ProxyError": UNREACHED,
    "UnsupportedProtocol": UNREACHED,
    "ReadError": LOST,
    "WriteError": LOST,
    "CloseError": LOST,
    "RemoteProtocolError": LOST,
    "LocalProtocolError": LOST,
    "ReadTimeout": TIMED_OUT,
    "WriteTimeout": TIMED_OUT,
    "DecodingError": BAD_ANSWER,
    "TooManyRedirects": BAD_ANSWER,
}


def exported(base: type[Exception]) -> dict[str, type[Exception]]:
    """What httpx exports below a class and actually raises: nothing derives from it."""
    found = {n: v for n, v in vars(httpx).items() if inspect.isclass(v) and issubclass(v, base)}
    return {n: v for n, v in found.items() if not any(w is not v and issubclass(w, v) for w in found.values())}


# The table


def test_the_table_covers_every_error_of_httpx_that_is_raised_while_sending() -> None:
    assert set(exported(httpx.RequestError)) == set(EXPECTED)
    for name, kind in exported(httpx.RequestError).items():
        assert kind in OUTCOMES, name


@pytest.mark.parametrize(("name", "outcome"), EXPECTED.items())
def test_errors_of_httpx_mean(name: str, outcome: Outcome) -> None:
    error = translate(URL, getattr(httpx, name)("oops"), 3.0)
    assert (error.backend, error.outcome, error.refused) == (URL, outcome, False)
    assert "oops" in error.detail


@pytest.mark.parametrize(
    "error",
    [
        httpx.StreamError("unheard of"),
        httpx.StreamClosed(),
        httpx.StreamConsumed(),
        httpx.ResponseNotRead(),
        httpx.RequestNotRead(),
        ConnectionResetError("reset"),
        BrokenPipeError("pipe"),
        OSError("no route to host"),
        httpx.NetworkError("unheard of"),
        httpx.ProtocolError("unheard of"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_else_breaks_counts_as_lost(error: Exception) -> None:
    found = translate(URL, error, None)
    assert (found.outcome, found.refused) == (LOST, False)
    assert found.detail.startswith("connection broken (")


def test_no_stream_error_of_httpx_is_forgotten_here() -> None:
    assert set(exported(httpx.StreamError)) == {"StreamClosed", "StreamConsumed", "ResponseNotRead", "RequestNotRead"}


def test_a_subclass_means_what_its_parent_means() -> None:
    class Special(httpx.ReadTimeout):
        pass

    assert translate(URL, Special("x"), 1.0).outcome is TIMED_OUT


def test_an_error_without_words_is_named_by_its_class() -> None:
    assert translate(URL, httpx.ConnectTimeout(""), 1.0).detail == "ConnectTimeout"
    assert translate(URL, httpx.ReadError(""), 1.0).detail == "connection broken (ReadError)"


def test_a_time_out_says_how_long_was_waited() -> None:
    error = translate(URL, TimeoutError(), 900.0)
    assert (error.outcome, error.detail) == (TIMED_OUT, "no answer within 900.0 s")


def test_a_time_out_of_the_kernel_is_one_though_we_set_none() -> None:
    error = translate(URL, TimeoutError(110, "Connection timed out"), None)
    assert (error.outcome, "Connection timed out" in error.detail) == (TIMED_OUT, True)


def chained(outer: Exception, inner: BaseException) -> Exception:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (ConnectionRefusedError(111, "Connect call failed"), True),
        (chained(httpx.ConnectError("x"), ConnectionRefusedError()), True),
        (chained(httpx.ConnectError("x"), chained(OSError("y"), ConnectionRefusedError())), True),
        (httpx.ConnectError("[Errno 111] Connection refused"), True),
        (
            chained(
                OSError("All connection attempts failed"),
                ExceptionGroup("multiple", [ConnectionRefusedError(), ConnectionRefusedError()]),
            ),
            True,
        ),
        (
            chained(
                OSError("All connection attempts failed"),
                ExceptionGroup("multiple", [ConnectionRefusedError(), OSError("no route to host")]),
            ),
            False,
        ),
        (httpx.ConnectError("Name or service not known"), False),
        (httpx.ConnectTimeout("x"), False),
    ],
)
def test_a_refused_connection_is_recognised_at_the_bottom_of_an_error(error: Exception, refused: bool) -> None:
    found = translate(URL, error, 1.0)
    assert found.refused is refused
    if refused:
        assert found.detail == "connection refused"


# Statuses


def answer(status: int, body: bytes = b"text", **headers: str) -> Answer:
    return Answer(status, httpx.Headers({k.replace("_", "-"): v for k, v in headers.items()}), body)


def test_200_is_an_answer() -> None:
    judge(URL, answer(200))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 408, 409, 413, 422, 499])
def test_a_4xx_means_that_the_request_is_wrong_and_is_passed_on_whole(status: int) -> None:
    with pytest.raises(RequestRejectedError) as caught:
        judge(URL, answer(status, b"x" * 1000, content_type="text/plain"))
    assert (caught.value.backend, caught.value.status, caught.value.content_type) == (URL, status, "text/plain")
    assert caught.value.body == b"x" * 1000


@pytest.mark.parametrize(
    ("status", "headers", "outcome", "retry_after"),
    [
        (429, {}, Outcome.BUSY, 1.0),
        (429, {"retry_after": "7"}, Outcome.BUSY, 7.0),
        (429, {"retry_after": "soon"}, Outcome.BUSY, 1.0),
        (503, {"retry_after": "7"}, Outcome.BUSY, 7.0),
        (503, {"retry_after": "0"}, Outcome.BUSY, 0.0),
        (503, {"retry_after": "soon"}, Outcome.UNAVAILABLE, None),
        (503, {}, Outcome.UNAVAILABLE, None),
        (502, {"retry_after": "7"}, Outcome.UNAVAILABLE, None),
        (504, {}, Outcome.UNAVAILABLE, None),
        (500, {}, Outcome.SERVER_ERROR, None),
        (501, {}, Outcome.SERVER_ERROR, None),
        (505, {}, Outcome.SERVER_ERROR, None),
        (599, {}, Outcome.SERVER_ERROR, None),
        (201, {}, BAD_ANSWER, None),
        (204, {}, BAD_ANSWER, None),
        (304, {}, BAD_ANSWER, None),
    ],
)
def test_statuses_mean(status: int, headers: dict[str, str], outcome: Outcome, retry_after: float | None) -> None:
    with pytest.raises(AttemptError) as caught:
        judge(URL, answer(status, **headers))
    error = caught.value
    assert (error.outcome, error.status, error.retry_after) == (outcome, status, retry_after)
    assert str(status) in error.detail
    assert error.refused is False


def test_a_redirect_is_a_wrong_answer_that_names_where_to() -> None:
    with pytest.raises(AttemptError, match="answered 307 to http://elsewhere/ instead of 200; check that the address"):
        judge(URL, answer(307, location="http://elsewhere/"))


def test_a_long_or_binary_error_page_is_quoted_in_part() -> None:
    with pytest.raises(AttemptError) as caught:
        judge(URL, answer(500, b"\xff" + b"x" * 10_000))
    assert len(caught.value.detail) < 320


NOW = 1_700_000_000.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        ("7", 7.0),
        (" 7 ", 7.0),
        ("1.5", 1.5),
        ("-3", 0.0),
        ("61", 60.0),
        ("1e999", 60.0),
        ("inf", 60.0),
        ("nan", None),
        ("", None),
        ("soon", None),
        ("7 seconds", None),
        (email.utils.formatdate(NOW + 30, usegmt=True), 30.0),
        (email.utils.formatdate(NOW - 30, usegmt=True), 0.0),
        (email.utils.formatdate(NOW + 3600, usegmt=True), 60.0),
        ("Tue, 99 Nov 2023 00:00:00 GMT", None),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", None),
    ],
)
def test_retry_after_reads(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value, now=lambda: NOW) == seconds


@given(st.text(st.characters(max_codepoint=255), max_size=30))
def test_retry_after_is_never_out_of_bounds(value: str) -> None:
    seconds = parse_retry_after(value)
    assert seconds is None or 0 <= seconds <= 60


# Over a transport given from outside


@asynccontextmanager
async def exchange_over(
    handler: Callable[[httpx.Request], httpx.Response | Awaitable[httpx.Response]], url: str = URL
) -> AsyncIterator[Exchange]:
    transport = httpx.MockTransport(handler)  # type: ignore[arg-type]
    exchange = Exchange(BackendAddress.parse(url), PoolConfig(), transport=transport, user_agent="pool/1")
    yield exchange
    await exchange.aclose()


@pytest.mark.parametrize("how", ["post", "once"])
def test_a_request_goes_out_as_asked_with_our_headers(how: str) -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(418, content=b"tea", headers={"x-kind": "pot"})

    async def go() -> Answer:
        async with exchange_over(handler, "https://n1:8443/prefix/") as exchange:
            if how == "post":
                return await exchange.post("/generate/", b"{}", timeout=1.0, headers={"x-request-id": "r1"})
            return await exchange.once("POST", "/generate/", b"{}", timeout=1.0, headers={"x-request-id": "r1"})

    found = asyncio.run(go())
    assert (found.status, found.body, found.headers["x-kind"]) == (418, b"tea", "pot")
    (request,) = seen
    assert (request.method, str(request.url), request.content) == ("POST", "https://n1:8443/prefix/generate/", b"{}")
    sent = {name: request.headers.get(name) for name in ("user-agent", "content-type", "accept", "x-request-id")}
    assert sent == {
        "user-agent": "pool/1",
        "content-type": "application/json",
        "accept": "application/json",
        "x-request-id": "r1",
    }


def test_a_request_without_a_body_has_no_content_type() -> None:
    seen: list[httpx.Request] = []

    async def go() -> None:
        async with exchange_over(lambda request: seen.append(request) or httpx.Response(200)) as exchange:
            await exchange.once("GET", "/health/", timeout=1.0)

    asyncio.run(go())
    assert (seen[0].method, "content-type" in seen[0].headers) == ("GET", False)


def test_redirects_are_not_followed() -> None:
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return httpx.Response(307, headers={"location": "http://evil/"})

    async def go() -> Answer:
        async with exchange_over(handler) as exchange:
            return await exchange.post("/generate/", b"{}", timeout=1.0)

    assert asyncio.run(go()).status == 307
    assert seen == [f"{URL}/generate/"]


@pytest.mark.parametrize("how", ["post", "once"])
@pytest.mark.parametrize("name", EXPECTED)
def test_an_error_of_the_transport_comes_out_as_an_attempt_after_one_try(name: str, how: str) -> None:
    tries = 0

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal tries
        tries += 1
        raise getattr(httpx, name)("oops")

    async def go() -> None:
        async with exchange_over(handler) as exchange:
            if how == "post":
                await exchange.post("/generate/", b"{}", timeout=5.0)
            else:
                await exchange.once("GET", "/health/", timeout=5.0)

    with pytest.raises(AttemptError) as caught:
        asyncio.run(go())
    assert (caught.value.outcome, tries) == (EXPECTED[name], 1)
    assert isinstance(caught.value.__cause__, getattr(httpx, name))


@pytest.mark.parametrize("how", ["post", "once"])
def test_no_answer_within_the_time_is_a_time_out(how: str) -> None:
    async def handler(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def go() -> None:
        async with exchange_over(handler) as exchange:
            if how == "post":
                await exchange.post("/generate/", b"{}", timeout=0.02)
            else:
                await exchange.once("POST", "/generate/", b"{}", timeout=0.02)

    with pytest.raises(AttemptError, match=r"no answer within 0\.0 s") as caught:
        asyncio.run(go())
    assert (caught.value.outcome, caught.value.refused) == (TIMED_OUT, False)


def test_a_cancelled_request_is_cancelled_and_no_attempt_error() -> None:
    started = asyncio.Event()

    async def handler(request: httpx.Request) -> httpx.Response:
        started.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def go() -> None:
        async with exchange_over(handler) as exchange:
            task = asyncio.create_task(exchange.post("/generate/", b"{}", timeout=5.0))
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(go())


def test_connecting_may_take_less_than_the_whole_so_that_the_two_are_told_apart() -> None:
    seen: list[dict[str, float | None]] = []

    async def go() -> None:
        def handler(request: httpx.Request) -> httpx.Response:
            seen.append(request.extensions["timeout"])
            return httpx.Response(200)

        async with exchange_over(handler) as exchange:
            for timeout in (2.0, 900.0, None):
                await exchange.once("GET", "/health/", timeout=timeout)

    asyncio.run(go())
    assert [timeouts["connect"] for timeouts in seen] == [pytest.approx(1.6), 10.0, 10.0]
    assert {timeouts[kind] for timeouts in seen for kind in ("read", "write", "pool")} == {None}


def test_a_transport_from_outside_is_not_closed() -> None:
    class Transport(httpx.MockTransport):
        closed = False

        async def aclose(self) -> None:
            self.closed = True

    async def go() -> bool:
        transport = Transport(lambda request: httpx.Response(200))
        exchange = Exchange(BackendAddress.parse(URL), PoolConfig(), transport=transport, user_agent="x")
        await exchange.once("GET", "/health/", timeout=1.0)
        await exchange.aclose()
        return transport.closed

    assert asyncio.run(go()) is False


# Over sockets

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CUT_SHORT = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\no"


class Server:
    """A server that does what a script says. Each connection takes the next list of steps; a step is what is
    answered to one request, or `None` to close instead. After its last step a connection stays open until the
    client or `hang_up()` closes it."""

    def __init__(self, *scripts: list[bytes | None]) -> None:
        self.scripts = list(scripts)
        self.requests: list[int] = []  # per request, the number of its connection
        self.connections = 0
        self.writers: list[asyncio.StreamWriter] = []
        self.closed: list[asyncio.Event] = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = self.connections
        self.connections += 1
        self.writers.append(writer)
        self.closed.append(asyncio.Event())
        try:
            for step in self.scripts[number] if number < len(self.scripts) else []:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (int(h[15:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:")), 0
                )
                await reader.readexactly(length)
                self.requests.append(number)
                if step is None:
                    return
                writer.write(step)
                await writer.drain()
                if step is CUT_SHORT:
                    return
            await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self.closed[number].set()

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    def stop_listening(self) -> None:
        self._server.close()

    async def hang_up(self, number: int) -> None:
        """Closes a connection between two requests, as uvicorn does with idle ones."""
        self.writers[number].close()
        await self.writers[number].wait_closed()

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self.writers:
            writer.close()
        for closed in self.closed:
            await closed.wait()


@asynccontextmanager
async def exchange_to(server: Server) -> AsyncIterator[Exchange]:
    address = BackendAddress.parse(f"127.0.0.1:{server.port}")
    exchange = Exchange(address, PoolConfig(), transport=None, user_agent="x")
    try:
        yield exchange
    finally:
        await exchange.aclose()


async def outcome_of(request: Awaitable[Answer]) -> Outcome:
    try:
        found = await request
    except AttemptError as error:
        return error.outcome
    assert (found.status, found.body) == (200, b"ok")
    return Outcome.OK


def test_requests_share_a_kept_connection() -> None:
    async def go() -> None:
        async with Server([OK, OK, OK]) as server, exchange_to(server) as exchange:
            for _ in range(3):
                assert await outcome_of(exchange.post("/x", b"{}", timeout=5.0)) is Outcome.OK
            assert server.requests == [0, 0, 0]

    asyncio.run(go())


def test_a_kept_connection_that_the_server_had_closed_is_replaced_by_a_new_one() -> None:
    async def go() -> None:
        async with Server([OK], [OK]) as server, exchange_to(server) as exchange:
            assert await outcome_of(exchange.post("/x", b"{}", timeout=5.0)) is Outcome.OK
            await server.hang_up(0)
            assert await outcome_of(exchange.post("/x", b"{}", timeout=5.0)) is Outcome.OK
            assert server.requests == [0, 1]

    asyncio.run(go())


def test_a_kept_connection_that_closes_under_our_request_is_replaced_by_a_new_one() -> None:
    """The server's close and our request cross each other: from here that looks like this."""

    async def go() -> None:
        async with Server([OK, None], [OK]) as server, exchange_to(server) as exchange:
            assert await outcome_of(exchange.post("/x", b"{}", timeout=5.0)) is Outcome.OK
            assert await outcome_of(exchange.post("/x", b"{}", timeout=5.0)) is Outcome.OK
            assert server.requests == [0, 0, 1]

    asyncio.run(go())


def test_a_kept_connection_is_replaced_once_only() -> None:
    async def go() -> None:
        async with Server([OK, None], [None], [OK]) as server, exchange_to(server) as exchange:
            assert await outcome_of(exchange.post("/x", b"{}", timeout=5.0)) is Outcome.OK
            assert await outcome_of(exchange.post("/x", b"{}", timeout=5.0)) is LOST
            assert server.requests == [0, 0, 1]

    asyncio.run(go())


def test_a_stale_connection_is_not_replaced_by_another_that_may_be_stale_too() -> None:
    async def go() -> None:
        async with Server([OK, None], [OK, None], [OK]) as server, exchange_to(server) as exchange:
            await asyncio.gather(*(exchange.post("/x", b"{}", timeout=5.0) for _ in range(2)))
            assert sorted(server.requests) == [0, 1]
            assert await outcome_of(exchange.post("/x", b"{}", timeout=5.0)) is Outcome.OK
            assert len(server.requests) == 4
            assert server.requests[-1] == 2

    asyncio.run(go())


def test_a_new_connection_that_breaks_is_lost_and_the_request_not_sent_again() -> None:
    async def go() -> None:
        async with Server([None], [OK]) as server, exchange_to(server) as exchange:
            assert await outcome_of(exchange.post("/x", b"{}", timeout=5.0)) is LOST
            assert server.requests == [0]

    asyncio.run(go())


def test_a_server_that_dies_with_the_request_in_its_hands_is_lost_not_unreached() -> None:
    async def go() -> None:
        async with Server([OK, None]) as server, exchange_to(server) as exchange:
            assert await outcome_of(exchange.post("/x", b"{}", timeout=5.0)) is Outcome.OK
            server.stop_listening()
            with pytest.raises(AttemptError) as caught:
                await exchange.post("/x", b"{}", timeout=5.0)
            assert (caught.value.outcome, caught.value.refused) == (LOST, True)
            assert caught.value.detail.endswith(", then connection refused")
            assert server.requests == [0, 0]

    asyncio.run(go())


def test_an_answer_that_breaks_off_on_a_kept_connection_is_lost_and_not_asked_for_again() -> None:
    async def go() -> None:
        async with Server([OK, CUT_SHORT], [OK]) as server, exchange_to(server) as exchange:
            assert await outcome_of(exchange.post("/x", b"{}", timeout=5.0)) is Outcome.OK
            assert await outcome_of(exchange.post("/x", b"{}", timeout=5.0)) is LOST
            assert server.requests == [0, 0]

    asyncio.run(go())


def test_a_kept_connection_that_breaks_long_after_the_request_was_sent_is_lost() -> None:
    """The server worked on it: that was no connection it had closed before."""

    async def go() -> None:
        clock = iter([0.0, 0.0, 1.5])  # the first is sent, the second is sent, the second breaks
        async with Server([OK, None], [OK]) as server:
            address = BackendAddress.parse(f"127.0.0.1:{server.port}")
            exchange = Exchange(address, PoolConfig(), transport=None, user_agent="x", clock=lambda: next(clock))
            assert await outcome_of(exchange.post("/x", b"{}", timeout=5.0)) is Outcome.OK
            assert await outcome_of(exchange.post("/x", b"{}", timeout=5.0)) is LOST
            assert server.requests == [0, 0]
            await exchange.aclose()

    asyncio.run(go())


def test_nobody_listening_is_unreached_and_refused() -> None:
    async def go() -> None:
        async with Server() as server, exchange_to(server) as exchange:
            server.stop_listening()
            for request in (exchange.post("/x", b"{}", timeout=5.0), exchange.once("GET", "/x", timeout=5.0)):
                with pytest.raises(AttemptError, match="connection refused") as caught:
                    await request
                assert (caught.value.outcome, caught.value.refused) == (UNREACHED, True)

    asyncio.run(go())


def test_once_never_takes_a_kept_connection_and_leaves_none_behind() -> None:
    async def go() -> None:
        async with Server([OK, OK], [OK], [OK]) as server, exchange_to(server) as exchange:
            await exchange.post("/x", b"{}", timeout=5.0)
            assert await outcome_of(exchange.once("POST", "/x", b"{}", timeout=5.0)) is Outcome.OK
            await server.closed[1].wait()
            assert await outcome_of(exchange.once("GET", "/x", timeout=5.0)) is Outcome.OK
            await exchange.post("/x", b"{}", timeout=5.0)
            assert server.requests == [0, 1, 2, 0]

    asyncio.run(go())


def test_once_never_sends_a_second_time() -> None:
    async def go() -> None:
        async with Server([None], [OK]) as server, exchange_to(server) as exchange:
            assert await outcome_of(exchange.once("POST", "/x", b"{}", timeout=5.0)) is LOST
            assert server.requests == [0]

    asyncio.run(go())


def test_control_calls_in_a_row_share_a_connection() -> None:
    async def go() -> None:
        async with Server([OK, OK, OK]) as server, exchange_to(server) as exchange:
            for _ in range(3):
                assert await outcome_of(exchange.control("/x", b"{}", timeout=5.0)) is Outcome.OK
            assert server.requests == [0, 0, 0]

    asyncio.run(go())


def test_a_control_call_never_sends_a_second_time_not_even_over_a_stale_connection() -> None:
    async def go() -> None:
        async with Server([OK, None], [OK]) as server, exchange_to(server) as exchange:
            assert await outcome_of(exchange.control("/x", b"{}", timeout=5.0)) is Outcome.OK
            assert await outcome_of(exchange.control("/x", b"{}", timeout=5.0)) is LOST
            assert server.requests == [0, 0]
            assert await outcome_of(exchange.control("/x", b"{}", timeout=5.0)) is Outcome.OK
            assert server.requests == [0, 0, 1]

    asyncio.run(go())


def test_a_control_call_takes_no_connection_that_was_idle_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        async with Server([OK, OK], [OK]) as server, exchange_to(server) as exchange:
            loop = asyncio.get_running_loop()
            real, later = loop.time, 0.0
            monkeypatch.setattr(loop, "time", lambda: real() + later)
            await exchange.post("/x", b"{}", timeout=5.0)
            later = CONTROL_IDLE_SECONDS + 0.1
            assert await outcome_of(exchange.control("/x", b"{}", timeout=5.0)) is Outcome.OK
            assert server.requests == [0, 1]

    asyncio.run(go())


def test_a_server_that_was_replaced_in_between_gets_no_control_call_meant_for_its_predecessor() -> None:
    async def go() -> None:
        async with Server([OK], [OK]) as server, exchange_to(server) as exchange:
            assert await outcome_of(exchange.control("/x", b"{}", timeout=5.0)) is Outcome.OK
            server.writers[0].close()  # our side has not been told when the next call begins
            assert await outcome_of(exchange.control("/x", b"{}", timeout=5.0)) is LOST
            assert server.requests == [0]

    asyncio.run(go())


def test_what_pytest_httpx_has_to_see_goes_through_httpx(
    httpx_mock: HTTPXMock,
) -> None:
    httpx_mock.add_response(url=f"{URL}/x", text="mocked", is_reusable=True)

    async def go() -> list[bytes]:
        address = BackendAddress.parse(URL)
        exchange = Exchange(address, PoolConfig(), transport=None, user_agent="x")
        found = [
            await exchange.post("/x", b"{}", timeout=5.0),
            await exchange.control("/x", b"{}", timeout=5.0),
            await exchange.once("POST", "/x", b"{}", timeout=5.0),
        ]
        async with exchange.stream("/x", b"{}", timeout=5.0, headers={}) as streamed:
            found.append(await streamed.read())
        await exchange.aclose()
        return [answer.body for answer in found]

    assert asyncio.run(go()) == [b"mocked"] * 4


def test_a_proxy_is_used_where_the_environment_may_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        async with Server([OK]) as proxy:
            monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
            monkeypatch.delenv("NO_PROXY", raising=False)
            address = BackendAddress.parse("http://nobody.invalid:1")
            exchange = Exchange(address, PoolConfig(trust_env=True), transport=None, user_agent="x")
            assert await outcome_of(exchange.post("/x", b"{}", timeout=5.0)) is Outcome.OK
            assert proxy.requests == [0]
            await exchange.aclose()
            exchange = Exchange(address, PoolConfig(), transport=None, user_agent="x")
            assert await outcome_of(exchange.post("/x", b"{}", timeout=5.0)) is UNREACHED
            await exchange.aclose()

    asyncio.run(go())


def test_an_encoding_that_an_intermediary_put_around_an_answer_is_taken_off() -> None:
    body = gzip.compress(b"ok")
    packed = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)

    async def go() -> None:
        async with Server([packed]) as server, exchange_to(server) as exchange:
            assert await outcome_of(exchange.post("/x", b"{}", timeout=5.0)) is Outcome.OK

    asyncio.run(go())


def test_bytes_that_are_no_http_are_lost() -> None:
    async def go() -> None:
        async with Server([b"SSH-2.0-OpenSSH_9.6\r\n\r\n"]) as server, exchange_to(server) as exchange:
            assert await outcome_of(exchange.post("/x", b"{}", timeout=5.0)) is LOST

    asyncio.run(go())


def test_an_answer_in_an_encoding_that_does_not_decode_is_a_bad_answer() -> None:
    garbled = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\nok"

    async def go() -> None:
        async with Server([garbled]) as server, exchange_to(server) as exchange:
            assert await outcome_of(exchange.post("/x", b"{}", timeout=5.0)) is BAD_ANSWER

    asyncio.run(go())


def test_a_server_that_takes_the_request_and_says_nothing_times_out_and_is_left() -> None:
    async def go() -> None:
        async with Server([b""]) as server, exchange_to(server) as exchange:
            assert await outcome_of(exchange.post("/x", b"{}", timeout=0.05)) is TIMED_OUT
            assert server.requests == [0]
            await server.closed[0].wait()  # our side has closed it

    asyncio.run(go())


async def stand_by(exchange: Exchange) -> None:
    """Watches a silent connection to its end."""
    await (await exchange.stand_by()).ended()


def test_a_silent_connection_is_watched_until_the_server_closes_it() -> None:
    async def go() -> None:
        async with Server([], []) as server, exchange_to(server) as exchange:
            assert exchange.has_sockets
            watch = asyncio.create_task(stand_by(exchange))
            while not server.writers:
                await asyncio.wait([watch], timeout=0.01)
            assert not watch.done()
            await server.hang_up(0)
            await watch
            assert server.requests == []

    asyncio.run(go())


def test_a_watch_that_is_cancelled_closes_its_connection() -> None:
    async def go() -> None:
        async with Server([]) as server, exchange_to(server) as exchange:
            watch = asyncio.create_task(stand_by(exchange))
            while not server.writers:
                await asyncio.wait([watch], timeout=0.01)
            watch.cancel()
            with pytest.raises(asyncio.CancelledError):
                await watch
            await server.closed[0].wait()

    asyncio.run(go())


@pytest.mark.parametrize("alive", [True, False])
def test_a_watched_connection_proves_that_the_process_behind_it_is_the_same(alive: bool) -> None:
    """Only that process can answer on it, whoever listens on the port by now."""

    async def go() -> None:
        answer = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
        async with Server([answer], []) as server, exchange_to(server) as exchange:
            sentinel = await exchange.stand_by()
            watch = asyncio.create_task(sentinel.ended())
            while not server.writers:
                await asyncio.wait([watch], timeout=0.01)
            if not alive:
                await server.hang_up(0)
                await watch
            assert await sentinel.prove("/health/", timeout=5) is alive
            assert not await sentinel.prove("/health/", timeout=5)  # once; after it the server counts it as idle
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    asyncio.run(go())


def test_a_watch_on_nobody_says_so() -> None:
    async def go() -> None:
        async with Server() as server, exchange_to(server) as exchange:
            server.stop_listening()
            with pytest.raises(OSError, match=r"refused|Connect call failed"):
                await exchange.stand_by()

    asyncio.run(go())
