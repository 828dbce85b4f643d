"""Streamed answers through the gateway: they come as they are made, and however they end nothing is left behind."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from typing import Any

import httpx
import pytest
from conftest import eventually
from test_server_process import Gateway, GatewayProcess, gateways, http
from vllm_sims import CHAT, COMPLETIONS, MODEL, USER, events, post, started, unspoilt

from trl_pool.sim import SimProcess

Start = Callable[..., Gateway]
Background = Callable[..., Future[Any]]

gateway = pytest.fixture(gateways)

TRAITS: dict[str, dict[str, Any]] = {name: {"decode_ms_per_token": 5} for name in ("a", "b")}

SHORT: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hello", "max_tokens": 6, "stream": True},
    CHAT: {"messages": [USER], "max_tokens": 6, "stream": True},
}
# Ten seconds, if nobody ends it.
LONG: dict[str, dict[str, Any]] = {p: {**b, "max_tokens": 2000, "ignore_eos": True} for p, b in SHORT.items()}
WORK = {COMPLETIONS: "completions", CHAT: "chat_completions"}


@pytest.fixture(scope="module")
def _vllm() -> Iterator[list[SimProcess]]:
    with started(**TRAITS) as sims:
        yield list(sims.values())


@pytest.fixture
def sims(_vllm: list[SimProcess]) -> list[SimProcess]:
    for sim in _vllm:
        if not sim.running:
            sim.restart(wait=False)
    return [unspoilt(sim.wait_ready()) for sim in _vllm]


@contextmanager
def streamed(url: str, path: str, body: dict[str, Any], **headers: str) -> Iterator[httpx.Response]:
    """An answer whose body has not been read."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with http(url) as client, client.stream("POST", path, json=body, headers=named) as answer:
        yield answer


def pieces(answer: httpx.Response) -> Iterator[str]:
    """The events as they come."""
    return (line for line in answer.iter_lines() if line)


def content(answer: httpx.Response) -> list[Any]:
    """The events without what is new in every answer."""
    return [{k: v for k, v in event.items() if k not in ("id", "created")} for event in events(answer)]


def of(sims: list[SimProcess], answer: httpx.Response) -> tuple[SimProcess, SimProcess]:
    """Who serves it, and who does not."""
    serving = next(sim for sim in sims if sim.name == answer.headers["x-backend"])
    return serving, next(sim for sim in sims if sim is not serving)


def counted(sims: list[SimProcess], path: str) -> list[int]:
    return [sim.state()["endpoints"][WORK[path]]["received"] for sim in sims]


def broken_off(gateway: Gateway) -> None:
    """What is in the log when a client's connection was broken: one line of uvicorn's, and no traceback."""
    eventually(lambda: gateway.errors)
    assert gateway.errors == ["ASGI callable returned without completing response."]
    gateway.errors.clear()


@contextmanager
def fake_backend(answer: Callable[[str], bytes]) -> Iterator[tuple[str, list[str]]]:
    """A server of a few lines that says `vllm serve` and then, to a POST, whatever it is told to."""
    seen: list[str] = []
    told = {
        "/v1/models": {"data": [{"id": MODEL}]},
        "/version": {"version": "0.26.0"},
        "/health": {},
    }

    def serve(connection: socket.socket) -> None:
        with closing(connection), connection.makefile("rb") as reader:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                line = reader.readline()
                if not line:
                    return
                head += line
            text = head.decode()
            method, path, _ = text.split(" ", 2)
            if method == "POST":
                seen.append(text.lower())
                connection.sendall(answer(path))
                return
            body = json.dumps(told.get(path, {})).encode()
            status = b"200 OK" if path in told else b"404 Not Found"
            length = f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
            connection.sendall(b"HTTP/1.1 " + status + b"\r\n" + length + body)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
        listener.shutdown(socket.SHUT_RDWR)
    accepting.join(5)


# What comes


@pytest.mark.parametrize("path", SHORT)
def test_a_stream_is_the_one_of_a_single_server(path: str, sims: list[SimProcess], gateway: Start) -> None:
    """Its events, its end, and its headers."""
    theirs = post(sims[0], path, {**SHORT[path], "n": 2})
    started = gateway(sims)
    with http(started.url) as client:
        for _ in range(2):  # over one connection: it is kept
            answer = client.post(path, json={**SHORT[path], "n": 2}, headers={"x-request-id": "7"})
            assert content(answer) == content(theirs)
            assert answer.headers.get_list("x-request-id") == ["7"]
            assert answer.headers["x-backend"] in {sim.name for sim in sims}
            assert answer.headers["transfer-encoding"] == "chunked"
            assert len(answer.headers.get_list("date")) == len(answer.headers.get_list("server")) == 1
            assert answer.headers.get("connection", "keep-alive") == "keep-alive"
            assert not {"content-length", "content-encoding"} & answer.headers.keys()
    assert started.inflight() == 0
    assert sum(counted(sims, path)) == 3


def test_several_prompts_in_one_stream_come_from_one_backend(sims: list[SimProcess], gateway: Start) -> None:
    """Its choices are numbered by the server."""
    body = {**SHORT[COMPLETIONS], "prompt": ["a", "b", "c"], "stream_options": {"include_usage": True}}
    answer = gateway(sims).client.post(COMPLETIONS, json=body)
    assert content(answer) == content(post(sims[0], COMPLETIONS, body))
    assert {event["choices"][0]["index"] for event in events(answer) if event["choices"]} == {0, 1, 2}


@pytest.mark.parametrize("path", LONG)
def test_pieces_arrive_before_the_answer_is_complete(path: str, sims: list[SimProcess], gateway: Start) -> None:
    """And the backend's slot is taken until then."""
    started = gateway(sims)
    with streamed(started.url, path, LONG[path]) as answer:
        coming = pieces(answer)
        first = [next(coming) for _ in range(3)]
        assert all(line.startswith("data: {") for line in first)
        assert of(sims, answer)[0].state()["running"] == 1
        assert started.inflight() == 1


def test_streams_count_in_the_balance(sims: list[SimProcess], gateway: Start) -> None:
    """Two at a time go to two backends, and when both are taken the third waits."""
    started = gateway(sims, max_inflight_per_backend=1, queue_timeout=0.2)
    with (
        streamed(started.url, CHAT, LONG[CHAT]) as one,
        streamed(started.url, CHAT, LONG[CHAT]) as other,
    ):
        assert {one.headers["x-backend"], other.headers["x-backend"]} == {sim.name for sim in sims}
        third = started.client.post(CHAT, json=SHORT[CHAT])
        assert third.status_code == 429
        assert "no slot became free within 0.2 s (queue_timeout)" in third.json()["detail"]
        assert int(third.headers["retry-after"]) >= 1
    eventually(lambda: started.inflight() == 0)


def test_the_clients_session_decides_where_it_streams_from(sims: list[SimProcess], gateway: Start) -> None:
    client = gateway(sims).client
    homes = []
    for session in range(12):
        header = {"x-session-id": str(session)}
        served = {client.post(path, json=SHORT[path], headers=header).headers["x-backend"] for path in SHORT}
        assert len(served) == 1
        homes += served
    assert set(homes) == {sim.name for sim in sims}


@pytest.mark.parametrize("accepted", ["gzip", "identity", None])
def test_a_stream_is_encoded_only_where_the_client_takes_that(accepted: str | None, gateway: Start) -> None:
    """Its bytes pass through as they are, so the client's wish has to reach the server."""
    text = b"data: [DONE]\n\n"

    def answer(path: str) -> bytes:
        encoded = accepted == "gzip"
        body = gzip.compress(text) if encoded else text
        extra = "content-encoding: gzip\r\n" if encoded else ""
        more = "x-request-id: theirs\r\nx-backend: theirs\r\nkeep-alive: timeout=1\r\nx-kept: yes\r\n"
        kind = "content-type: text/event-stream; charset=utf-8\r\n"
        return f"HTTP/1.1 200 OK\r\n{kind}content-length: {len(body)}\r\n{extra}{more}\r\n".encode() + body

    with fake_backend(answer) as (url, seen):
        headers = {"x-request-id": "ours", **({} if accepted is None else {"accept-encoding": accepted})}
        client = gateway([url]).client
        if accepted is None:
            del client.headers["accept-encoding"]
        response = client.post(CHAT, json=SHORT[CHAT], headers=headers)
        assert response.content == text  # the client has decoded it
        assert response.headers.get("content-encoding") == ("gzip" if accepted == "gzip" else None)
        assert response.headers.get_list("x-request-id") == ["ours"]
        assert response.headers.get_list("x-backend") == [url.removeprefix("http://")]
        assert response.headers["x-kept"] == "yes"
        assert "keep-alive" not in response.headers
        (head,) = seen
        assert f"accept-encoding: {accepted or 'identity'}\r\n" in head
        assert "x-request-id: ours\r\n" in head


# What goes wrong


FAULTS: tuple[tuple[int, dict[str, Any]], ...] = (  # and how many attempts they are worth
    (2, {"kind": "reset", "after_bytes": -1}),
    (3, {"kind": "status", "status": 500}),
    (5, {"kind": "status", "status": 503}),
)


@pytest.mark.parametrize("path", SHORT)
def test_before_the_first_byte_it_is_failed_over(path: str, sims: list[SimProcess], gateway: Start) -> None:
    """Whatever happened: nothing was told the client yet. And the failure is counted."""
    expected = content(post(sims[0], path, SHORT[path]))
    started = gateway(sims)
    session = {"x-session-id": "1"}
    home, other = of(sims, started.client.post(path, json=SHORT[path], headers=session))
    for number, (_, fault) in enumerate(FAULTS, 1):
        home.faults(endpoints=[WORK[path]], times=1, **fault)
        answer = started.client.post(path, json=SHORT[path], headers=session)
        assert content(answer) == expected
        assert answer.headers["x-backend"] == other.name
        assert started.inflight() == 0
        assert (started.backend(home)["failures"], started.backend(other)["failures"]) == (number, 0)
        eventually(lambda: started.backend(home)["eligible"])


@pytest.mark.parametrize("path", SHORT)
def test_when_everybody_fails_it_is_a_502_with_the_attempts(path: str, sims: list[SimProcess], gateway: Start) -> None:
    """No more of them than other requests get."""
    started = gateway(sims)
    for attempts, fault in FAULTS:
        for sim in sims:
            sim.forget()
            sim.faults(endpoints=[WORK[path]], **fault)
        answer = started.client.post(path, json=SHORT[path])
        assert answer.status_code == 502
        assert len(answer.json()["attempts"]) == sum(counted(sims, path)) == attempts
        assert {attempt["backend"] for attempt in answer.json()["attempts"]} == {sim.url for sim in sims}
        assert started.inflight() == 0
        for sim in sims:
            sim.clear_faults()


def test_a_backend_that_is_dead_is_failed_over(sims: list[SimProcess], gateway: Start) -> None:
    started = gateway(sims, health_interval=60)
    home, other = of(sims, started.client.post(CHAT, json=SHORT[CHAT]))
    home.kill()
    answer = started.client.post(CHAT, json=SHORT[CHAT])
    assert (answer.status_code, answer.headers["x-backend"]) == (200, other.name)
    eventually(lambda: started.backend(home)["reason"] == "is down (connection refused)")


def test_a_backend_that_is_busy_is_waited_for(sims: list[SimProcess], gateway: Start) -> None:
    """That is no failure, however often it says so; and when the client has waited long enough it is a 429."""
    started = gateway(sims, queue_timeout=1.0, max_attempts=2)
    for sim in sims:
        sim.faults("busy", retry_after=0, times=2, endpoints=["chat_completions"])
    assert started.client.post(CHAT, json=SHORT[CHAT]).status_code == 200
    assert {(b["failures"], b["ejections"]) for b in started.backends()} == {(0, 0)}
    for sim in sims:
        sim.faults("busy", retry_after=30, endpoints=["chat_completions"])
    answer = started.client.post(CHAT, json=SHORT[CHAT])
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1


def test_a_stream_that_does_not_begin_in_time_is_a_504(sims: list[SimProcess], gateway: Start) -> None:
    """By each attempt's time, and by that of the whole request: waiting for a backend that is busy is part of it."""
    for sim in sims:
        sim.faults("hang", endpoints=["chat_completions"])
    answer = gateway(sims, request_timeout=0.3).client.post(CHAT, json=SHORT[CHAT])
    assert answer.status_code == 504
    assert [attempt["outcome"] for attempt in answer.json()["attempts"]] == ["timed out"] * 2
    for sim in sims:
        sim.clear_faults()
        sim.faults("status", status=500, times=1, endpoints=["chat_completions"])
        sim.faults("busy", retry_after=30, endpoints=["chat_completions"])
    answer = gateway(sims, total_timeout=0.6, queue_timeout=20).client.post(CHAT, json=SHORT[CHAT])
    assert answer.status_code == 504
    assert "total_timeout of 0.6 s reached" in answer.json()["detail"]
    assert [attempt["outcome"] for attempt in answer.json()["attempts"]] == ["server error"] * 2


@pytest.mark.parametrize("path", SHORT)
def test_a_4xx_passes_through_unchanged(path: str, sims: list[SimProcess], gateway: Start) -> None:
    started = gateway(sims)
    body = {**SHORT[path], "model": "no-such-model"}
    answer, theirs = started.client.post(path, json=body), post(sims[0], path, body)
    assert (answer.status_code, answer.content) == (theirs.status_code, theirs.content) == (404, theirs.content)
    assert answer.headers["content-type"] == "application/json"
    assert sum(counted(sims, path)) == 2
    assert [(b["failures"], b["inflight"]) for b in started.backends()] == [(0, 0), (0, 0)]


@pytest.mark.parametrize("path", LONG)
def test_a_backend_that_dies_in_the_middle_breaks_the_clients_connection(
    path: str, sims: list[SimProcess], gateway: Start
) -> None:
    """A truncated answer must not look complete. The backend is charged, and nobody else is asked."""
    started = gateway(sims, fail_eject_threshold=1)
    with streamed(started.url, path, LONG[path]) as answer:
        coming = pieces(answer)
        next(coming)
        home, other = of(sims, answer)
        home.kill()
        with pytest.raises(httpx.RemoteProtocolError):
            list(coming)
    broken_off(started)
    assert started.inflight() == 0
    assert started.backend(home)["failures"] == 1
    assert started.backend(home)["ejections"] == 1
    assert counted([other], path) == [0]
    assert started.client.post(path, json=SHORT[path]).headers["x-backend"] == other.name


def test_a_backend_that_falls_silent_in_the_middle_is_given_up(sims: list[SimProcess], gateway: Start) -> None:
    """After `request_timeout` without a piece."""
    started = gateway(sims, request_timeout=0.5)
    with streamed(started.url, CHAT, LONG[CHAT]) as answer:
        coming = pieces(answer)
        next(coming)
        home, _ = of(sims, answer)
        post(home, "/pause?mode=keep").raise_for_status()
        with pytest.raises(httpx.RemoteProtocolError):
            list(coming)
    broken_off(started)
    assert started.backend(home)["failures"] == 1
    eventually(lambda: home.state()["in_flight"] == 0)
    post(home, "/resume").raise_for_status()


def test_a_client_that_leaves_frees_the_slot(sims: list[SimProcess], gateway: Start) -> None:
    """In the middle of the stream, and before it has begun. It says nothing about the backend."""
    started = gateway(sims, fail_eject_threshold=1)
    for _ in range(2):
        with streamed(started.url, COMPLETIONS, LONG[COMPLETIONS]) as answer:
            coming = pieces(answer)  # kept: when it is dropped, the connection is
            next(coming)
            assert started.inflight() == 1
        eventually(lambda: started.inflight() == 0)
        eventually(lambda: sum(sim.state()["in_flight"] for sim in sims) == 0)
    for sim in sims:
        sim.faults("hang", endpoints=["completions"])
    with http(started.url) as client, pytest.raises(httpx.ReadTimeout):
        client.post(COMPLETIONS, json=SHORT[COMPLETIONS], timeout=0.3)
    eventually(lambda: started.inflight() == 0)
    found = [(b["failures"], b["ejections"], b["breaker"], b["load"]) for b in started.backends()]
    assert found == [(0, 0, "closed", 0)] * 2


# The end of the gateway


def test_a_drain_waits_for_a_stream(sims: list[SimProcess]) -> None:
    """To its end, over which the gateway takes no new connection."""
    body = {**SHORT[COMPLETIONS], "max_tokens": 150, "ignore_eos": True}
    expected = content(post(sims[0], COMPLETIONS, body))
    with GatewayProcess("module", sims, shutdown_settle_seconds=0, shutdown_timeout=20) as gateway:
        gateway.ready()
        with streamed(gateway.url, COMPLETIONS, body) as answer:
            coming = pieces(answer)
            lines = [next(coming)]
            gateway.terminate()
            lines += coming
        whole = httpx.Response(200, headers=answer.headers, text="\n\n".join([*lines, ""]))
        assert content(whole) == expected
        gateway.wait(10)
        assert "Traceback" not in gateway.log


def test_when_the_time_is_up_a_stream_is_broken_off(sims: list[SimProcess]) -> None:
    settings = {"shutdown_settle_seconds": 0, "shutdown_timeout": 0.3}
    with GatewayProcess("module", sims, **settings) as gateway:
        gateway.ready()
        with streamed(gateway.url, COMPLETIONS, LONG[COMPLETIONS]) as answer:
            coming = pieces(answer)
            next(coming)
            gateway.terminate()
            with pytest.raises(httpx.RemoteProtocolError):
                list(coming)
        gateway.wait(10)
        assert "Traceback" not in gateway.log
    eventually(lambda: sum(sim.state()["in_flight"] for sim in sims) == 0)
