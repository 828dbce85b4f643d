"""What the gateway answers when something is wrong: every row of the table, and that bad input reaches no backend."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from typing import Any

import httpx
import pytest
from conftest import eventually, received
from test_server_process import BODIES, SENTENCE, Gateway, gateways, http

from trl_pool import errors
from trl_pool.errors import Attempt, Outcome, PoolError
from trl_pool.server import GatewaySettings, create_app
from trl_pool.server.failures import (
    STATUS,
    BodyTooLargeError,
    ClientGoneError,
    ShuttingDownError,
    WrongDialectError,
)
from trl_pool.sim import SimProcess
from trl_pool.sim.faults import ENDPOINTS

Fleet = Callable[[int], list[SimProcess]]
Start = Callable[..., Gateway]
Background = Callable[..., Future[Any]]

gateway = pytest.fixture(gateways)

WITH_BODY = tuple(BODIES)
JSON = {"content-type": "application/json"}


def work_received(sims: Sequence[SimProcess]) -> int:
    """Requests that reached a server, probes aside."""
    return sum(sum(received(sims, endpoint)) for endpoint in ENDPOINTS if endpoint != "health")


def raw(gateway: Gateway, head: str, body: bytes = b"") -> socket.socket:
    """Sends a request by hand; what it leaves out the client never sends."""
    client = socket.create_connection(gateway.address, timeout=20)
    client.sendall(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
    return client


def status_line(client: socket.socket) -> str:
    """The first line of the answer."""
    with client.makefile("rb") as stream:
        return stream.readline().decode().strip()


# The table

TRIED = {
    0: [
        Attempt("http://n1:1", Outcome.LOST, "gone", 1, 0.5),
        Attempt("http://n2:1", Outcome.TIMED_OUT, "slow", 1, 9.0),
    ]
}
LATE = {0: [Attempt("http://n1:1", Outcome.TIMED_OUT, "slow", 1, 9.0)]}

EVERY_ERROR: dict[type[PoolError], tuple[int, PoolError]] = {
    PoolError: (500, PoolError("x")),
    errors.ConfigurationError: (422, errors.ConfigurationError("x")),
    errors.DuplicateBackendError: (409, errors.DuplicateBackendError("x")),
    errors.PoolClosedError: (503, errors.PoolClosedError("x")),
    errors.ForkedProcessError: (500, errors.ForkedProcessError("x")),
    errors.UnsupportedTRLError: (500, errors.UnsupportedTRLError("x")),
    errors.InvalidRequestError: (422, errors.InvalidRequestError("x")),
    errors.RequestRejectedError: (
        418,
        errors.RequestRejectedError("n1:1", 418, b'{"detail":"x"}', "application/json"),
    ),
    errors.NoBackendAvailableError: (503, errors.NoBackendAvailableError({"http://n1:1": "is down"})),
    errors.BackendsUnreachableError: (503, errors.BackendsUnreachableError({"http://n1:1": "is down"})),
    errors.OverloadedError: (429, errors.OverloadedError("x", retry_after=2.5)),
    errors.RolloutError: (502, errors.RolloutError(TRIED)),
    errors.RolloutTimeoutError: (504, errors.RolloutTimeoutError(TRIED)),
    errors.ControlError: (502, errors.ControlError("x", {"http://n1:1": "refused"})),
    errors.WeightSyncError: (502, errors.WeightSyncError("x", {"http://n1:1": "refused"})),
    errors.BackendMismatchError: (409, errors.BackendMismatchError("x", {"http://n1:1": "has 2"})),
    errors.UnknownBackendError: (404, errors.UnknownBackendError("x")),
    errors.AttemptError: (502, errors.AttemptError("http://n1:1", Outcome.LOST, "x")),
    BodyTooLargeError: (413, BodyTooLargeError("x")),
    ClientGoneError: (499, ClientGoneError("x")),
    ShuttingDownError: (503, ShuttingDownError("x")),
    WrongDialectError: (404, WrongDialectError("x")),
}


def answers_to(raised: Sequence[BaseException]) -> list[httpx.Response]:
    """What the application answers when a route raises these."""
    app = create_app(GatewaySettings(backends=("http://n1:1",)))

    @app.get("/raise/{index}")
    async def fail(index: int) -> None:
        raise raised[index]

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            return [await client.get(f"/raise/{index}", headers={"x-request-id": "7"}) for index in range(len(raised))]

    return asyncio.run(ask())


def subclasses(kind: type[PoolError]) -> Iterator[type[PoolError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from subclasses(child)


def test_every_error_of_the_pool_has_a_status_of_its_own() -> None:
    """The table covers the whole tree, and what it leaves to a base class is meant so."""
    known = set(subclasses(PoolError))
    assert known == EVERY_ERROR.keys()
    by_their_base = {
        errors.ForkedProcessError: PoolError,
        errors.UnsupportedTRLError: PoolError,  # of a training script, never of a gateway
        errors.RequestRejectedError: PoolError,  # never asked: it has the backend's
        errors.BackendsUnreachableError: errors.NoBackendAvailableError,
        errors.WeightSyncError: errors.ControlError,
    }
    assert known - STATUS.keys() == by_their_base.keys()


def test_every_error_of_the_pool_becomes_json_with_its_status() -> None:
    answers = answers_to([error for _, error in EVERY_ERROR.values()])
    for (kind, (status, error)), answer in zip(EVERY_ERROR.items(), answers, strict=True):
        assert (kind, answer.status_code) == (kind, status)
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-request-id"] == "7"
        detail = answer.json()["detail"]
        if kind is errors.InvalidRequestError:
            assert detail == [{"type": "value_error", "loc": ["body"], "msg": "x"}]
        elif kind is not errors.RequestRejectedError:
            assert detail == str(error)
        assert ("retry-after" in answer.headers) == (status in (429, 503)), kind


def test_an_error_that_nobody_foresaw_is_json_too(caplog: pytest.LogCaptureFixture) -> None:
    """And its traceback is in the log, under the request's id."""
    (answer,) = answers_to([ZeroDivisionError("secret")])
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "7")
    assert answer.json() == {"detail": "Internal Server Error; see the log for 7"}
    (record,) = [record for record in caplog.records if record.exc_info]
    assert "Request 7 to /raise/0 failed" in record.getMessage()


def test_when_every_attempt_timed_out_it_is_a_504() -> None:
    mixed, late = answers_to([errors.RolloutError(TRIED), errors.RolloutError(LATE)])
    assert (mixed.status_code, late.status_code) == (502, 504)
    assert [attempt["outcome"] for attempt in mixed.json()["attempts"]] == ["connection lost", "timed out"]


# 400


@pytest.mark.parametrize("endpoint", [*WITH_BODY, "pool/backends"])
@pytest.mark.parametrize("body", [b"", b"{", b'{"prompts": ["a"]', b"\xff\xfe", b"prompts=a", b'{"a": 1} b'])
def test_what_is_no_json_is_a_400(endpoint: str, body: bytes, silent: tuple[Gateway, list[SimProcess]]) -> None:
    answer = silent[0].client.post(f"/{endpoint}/", content=body, headers=JSON)
    assert answer.status_code == 400
    (detail,) = answer.json()["detail"]
    assert (detail["type"], detail["loc"]) == ("json_invalid", ["body"])


@pytest.fixture(scope="module")
def silent() -> Iterator[tuple[Gateway, list[SimProcess]]]:
    """A gateway and its server, which hears of nothing but probes and what the tests send it themselves."""
    with SimProcess() as sim, closing(Gateway([sim], max_body_mb=0.01, health_interval=30)) as started:
        yield started, [sim]
        assert sum(received([sim], "chat")) == 0  # no test here sends one directly


# 413

TOO_MUCH = b" " * 10_001


@pytest.mark.parametrize("endpoint", [*WITH_BODY, "pool/backends"])
def test_a_body_over_the_limit_is_a_413(endpoint: str, silent: tuple[Gateway, list[SimProcess]]) -> None:
    """Announced, or in chunks."""
    for content in (TOO_MUCH, itertools.repeat(b" " * 1000, 11)):
        answer = silent[0].client.post(f"/{endpoint}/", content=content, headers=JSON)
        assert answer.status_code == 413
        assert answer.json()["detail"].startswith("request body is larger than MAX_BODY_MB=0.01 MB")


def test_a_body_of_exactly_the_limit_is_read(silent: tuple[Gateway, list[SimProcess]]) -> None:
    """And the connection lives on after one that was not."""
    client = silent[0].client
    body = json.dumps({"prompts": [""]}).encode()
    for size, status in ((10_000, 422), (10_001, 413), (10_000, 422)):
        assert client.post("/generate/", content=body.ljust(size), headers=JSON).status_code == status


def test_an_announced_length_over_the_limit_is_refused_before_the_body(
    silent: tuple[Gateway, list[SimProcess]],
) -> None:
    with raw(silent[0], "POST /generate/ HTTP/1.1\nHost: g\nContent-Length: 10001\n") as client:
        assert status_line(client).startswith("HTTP/1.1 413 ")


def test_a_body_without_a_length_is_refused_while_it_is_read(silent: tuple[Gateway, list[SimProcess]]) -> None:
    """Its end never comes."""
    chunk = b"3e8\r\n" + b" " * 1000 + b"\r\n"
    with raw(silent[0], "POST /chat/ HTTP/1.1\nHost: g\nTransfer-Encoding: chunked\n", 11 * chunk) as client:
        assert status_line(client).startswith("HTTP/1.1 413 ")


# 422

ILL_FORMED: dict[str, list[Any]] = {
    "generate": [
        {},
        {"prompts": None},
        {"prompts": "text"},
        {"prompts": [1]},
        {"prompts": ["a", [1]]},
        {"prompts": [["a"]]},
        {"prompts": ["a"], "n": "two"},
        {"prompts": ["a"], "n": 1.5, "temperature": [], "generation_kwargs": 3, "logprobs": "x"},
        {"prompts": ["a"], "max_tokens": None},
        {"prompts": ["a"], "images": "x"},
        {"prompts": ["a"], "structured_outputs_regex": 1},
        [],
        5,
        None,
        "x",
    ],
    "chat": [{}, {"messages": "Hi"}, {"messages": [{"role": "user", "content": "Hi"}]}, {"messages": [["Hi"]]}, []],
    "get_sequence_logprobs": [
        {},
        {"sequences": [[1]]},
        {"sequences": ["a"], "prompt_lengths": ["b"]},
        {"sequences": [[1.5]], "prompt_lengths": 1, "top_logprobs": None},
    ],
    "init_communicator": [{}, {"host": 1, "port": "x", "world_size": [], "client_device_uuid": None}],
    "update_named_param": [{}, {"name": 1, "dtype": 2, "shape": "x"}, {"name": "a", "dtype": "b", "shape": [1.5]}],
}


@pytest.mark.parametrize("endpoint", ILL_FORMED)
def test_ill_formed_fields_are_the_servers_own_422(endpoint: str, silent: tuple[Gateway, list[SimProcess]]) -> None:
    """The same status, and per fault the same place and type."""
    gateway, (sim,) = silent
    with http(sim.url) as client:
        for body in ILL_FORMED[endpoint]:
            path, content = f"/{endpoint}/", json.dumps(body)
            expected = client.post(path, content=content, headers=JSON)
            answer = gateway.client.post(path, content=content, headers=JSON)
            assert (body, expected.status_code, answer.status_code) == (body, 422, 422)
            theirs, ours = ([(f["type"], f["loc"]) for f in a.json()["detail"]] for a in (expected, answer))
            assert (body, ours) == (body, theirs)
            assert all(fault["msg"] for fault in answer.json()["detail"])
    sim.forget()


# Name of the field at fault, body.
REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    *(
        (endpoint, name, {**BODIES[endpoint], name: value})
        for endpoint in ("generate", "chat")
        for name, value in (
            ("n", 0),
            ("n", 16385),
            ("max_tokens", 0),
            ("temperature", -1),
            ("temperature", 2.5),
            ("top_p", 0),
            ("top_p", 1.5),
            ("top_k", -2),
            ("min_p", -0.1),
            ("repetition_penalty", 0),
            ("logprobs", -2),
        )
    ),
    ("generate", "n", {**BODIES["generate"], "n": 2, "temperature": 0}),
    ("generate", "no_such_parameter", {**BODIES["generate"], "generation_kwargs": {"no_such_parameter": 1}}),
    ("generate", "n", {**BODIES["generate"], "generation_kwargs": {"n": "2"}}),
    ("generate", "min_tokens", {**BODIES["generate"], "generation_kwargs": {"min_tokens": 5}}),
    ("generate", "presence_penalty", {**BODIES["generate"], "generation_kwargs": {"presence_penalty": 3}}),
    ("generate", "images", {**BODIES["generate"], "images": [None, None]}),
    ("chat", "messages", {"messages": [[{"content": "Hi"}]]}),
    ("chat", "messages", {"messages": [[{"role": "user"}]]}),
    ("chat", "messages", {"messages": [[{"role": "user", "content": [{"text": "Hi"}]}]]}),
    ("get_sequence_logprobs", "temperature", {**BODIES["get_sequence_logprobs"], "temperature": -1}),
    ("get_sequence_logprobs", "prompt_lengths", {**BODIES["get_sequence_logprobs"], "prompt_lengths": [1, 2]}),
    ("get_sequence_logprobs", "prompt_lengths", {**BODIES["get_sequence_logprobs"], "prompt_lengths": [5]}),
    ("get_sequence_logprobs", "prompt_lengths", {**BODIES["get_sequence_logprobs"], "prompt_lengths": [-1]}),
]


@pytest.mark.parametrize(("endpoint", "field", "body"), REFUSED)
def test_what_a_server_answers_with_a_500_is_a_422(
    endpoint: str, field: str, body: dict[str, Any], silent: tuple[Gateway, list[SimProcess]]
) -> None:
    """Naming the field."""
    gateway, (sim,) = silent
    if endpoint != "chat":
        with http(sim.url) as client:
            assert client.post(f"/{endpoint}/", json=body).status_code == 500
    answer = gateway.post(endpoint, body)
    assert answer.status_code == 422
    assert any(field in fault["loc"] for fault in answer.json()["detail"]), answer.text


# What a server never answers.
POISON: list[tuple[str, dict[str, Any]]] = [
    ("generate", {"prompts": [""]}),
    ("generate", {"prompts": [[1], []]}),
    ("generate", {"prompts": [[-1]]}),
    ("generate", {"prompts": [[2**31]]}),
    ("generate", {"prompts": [[512]]}),
    ("generate", {"prompts": [[1] * 64]}),
    ("generate", {"prompts": ["a"], "logprobs": 21}),
    ("generate", {"prompts": ["a"], "generation_kwargs": {"logprobs": 21}}),
    ("generate", {"prompts": ["a"], "generation_kwargs": {"prompt_logprobs": 21}}),
    ("generate", {"prompts": ["a"], "structured_outputs_regex": "("}),
    ("chat", {"messages": [[]]}),
    ("get_sequence_logprobs", {"sequences": [[1, 2]], "prompt_lengths": [1]}),  # top_logprobs=100
    ("get_sequence_logprobs", {"sequences": [[]], "prompt_lengths": [0], "top_logprobs": 1}),
    ("get_sequence_logprobs", {"sequences": [[1, 512]], "prompt_lengths": [1], "top_logprobs": 1}),
]


def test_what_a_server_dies_of_is_a_422_and_reaches_none(fleet: Fleet, gateway: Start) -> None:
    """Given the limits that no server tells."""
    sims = fleet(2)
    started = gateway(sims, max_model_len=64, vocab_size=512)
    for endpoint, body in POISON:
        answer = started.post(endpoint, body)
        assert (body, answer.status_code) == (body, 422)
    assert work_received(sims) == 0


def test_bad_input_reaches_no_backend(fleet: Fleet, gateway: Start) -> None:
    """And counts against none."""
    sims = fleet(2)
    started = gateway(sims, max_body_mb=0.01)
    bodies = [
        *((endpoint, json.dumps(body)) for endpoint, bodies in ILL_FORMED.items() for body in bodies),
        *((endpoint, json.dumps(body)) for endpoint, _, body in REFUSED),
        *((endpoint, content) for endpoint in WITH_BODY for content in ("{", TOO_MUCH)),
    ]
    for endpoint, content in bodies:
        answer = started.client.post(f"/{endpoint}/", content=content, headers=JSON)
        assert answer.status_code in (400, 413, 422)
        assert answer.json()["detail"]
    for endpoint in WITH_BODY:
        assert started.client.get(f"/{endpoint}/").status_code == 405
    assert work_received(sims) == 0
    assert [(b["requests"], b["failures"], b["ejections"]) for b in started.backends()] == [(0, 0, 0)] * 2


# 405


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_wrong_method_is_a_405(slash: str, silent: tuple[Gateway, list[SimProcess]]) -> None:
    client = silent[0].client
    wrong = [
        *(("GET", endpoint) for endpoint in (*WITH_BODY, "reset_prefix_cache", "close_communicator")),
        *(("POST", path) for path in ("health", "get_world_size", "livez", "readyz", "pool/stats")),
        ("PUT", "pool/backends"),
        ("GET", "pool/backends/n1:1"),
        ("GET", "pool/backends/n1:1/drain"),
    ]
    for method, path in wrong:
        answer = client.request(method, f"/{path}{slash}")
        assert (path, answer.status_code, answer.json()) == (path, 405, {"detail": "Method Not Allowed"})
        assert answer.headers["allow"]


# 429


def test_when_every_slot_is_taken_a_request_waits_its_turn(
    fleet: Fleet, gateway: Start, background: Background
) -> None:
    """One too many is a 429 at once, and so is the end of the longest wait."""
    (sim,) = fleet(1)
    started = gateway([sim], max_inflight_per_backend=1, max_queue=1, queue_timeout=1.0)
    sim.faults("hang", endpoints=["generate"])
    first = background(started.post, "generate")
    eventually(lambda: sim.state()["in_flight"] == 1)
    second = background(started.post, "generate")
    eventually(lambda: started.client.get("/pool/stats").json()["waiting"] == 1)
    too_many = started.post("generate")
    assert not second.done()
    assert too_many.status_code == 429
    assert "1 calls wait already (max_queue=1)" in too_many.json()["detail"]
    assert f"{sim.url} has all 1 slots taken" in too_many.json()["detail"]
    over = second.result()
    assert over.status_code == 429
    assert "within 1 s (queue_timeout)" in over.json()["detail"]
    assert int(too_many.headers["retry-after"]) >= 1
    assert int(over.headers["retry-after"]) >= 1
    third = background(started.post, "generate")
    eventually(lambda: started.client.get("/pool/stats").json()["waiting"] == 1)
    sim.clear_faults()
    assert (first.result().status_code, third.result().status_code) == (200, 200)
    assert received([sim]) == [2]


def test_without_a_queue_a_taken_slot_is_a_429(fleet: Fleet, gateway: Start, background: Background) -> None:
    (sim,) = fleet(1)
    started = gateway([sim], max_inflight_per_backend=1, max_queue=0)
    sim.faults("hang", endpoints=["generate"])
    first = background(started.post, "generate")
    eventually(lambda: sim.state()["in_flight"] == 1)
    assert started.post("chat").status_code == 429
    sim.clear_faults()
    assert first.result().status_code == 200


def test_backends_that_say_busy_are_waited_for_and_then_it_is_a_429(fleet: Fleet, gateway: Start) -> None:
    """Which counts against none."""
    sims = fleet(2)
    started = gateway(sims, queue_timeout=0.5)
    for sim in sims:
        sim.faults("busy", retry_after=2, times=1)
    answer = started.post("generate")
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert {(b["failures"], b["ejections"], b["eligible"]) for b in started.backends()} == {(0, 0, True)}


# 502, 503, 504


@pytest.mark.parametrize(
    ("kind", "fields", "outcome"),
    [
        ("reset", {"after_bytes": -1}, "connection lost"),
        ("status", {"status": 500}, "server error"),
        ("status", {"status": 503}, "unavailable"),
        ("cut_json", {}, "bad answer"),
        ("invalid_json", {}, "bad answer"),
        ("wrong_count", {}, "bad answer"),
    ],
)
def test_exhausted_fail_over_is_a_502_with_the_attempts(
    kind: str, fields: dict[str, Any], outcome: str, fleet: Fleet, gateway: Start
) -> None:
    sims = fleet(2)
    started = gateway(sims)
    for sim in sims:
        sim.faults(kind, endpoints=["generate"], **fields)
    answer = started.post("generate")
    assert answer.status_code == 502
    body = answer.json()
    assert body["detail"].startswith("1 of 1 prompts could not be served")
    assert {attempt["backend"] for attempt in body["attempts"]} == {sim.url for sim in sims}
    assert {attempt["outcome"] for attempt in body["attempts"]} == {outcome}
    assert all(attempt["prompts"] == 1 and attempt["seconds"] >= 0 for attempt in body["attempts"])
    assert (body["failed"], body["completed"], body["result"]) == ([0], [], None)
    assert started.inflight() == 0


def test_what_was_served_is_in_the_502(fleet: Fleet, gateway: Start) -> None:
    sims = fleet(2)
    started = gateway(sims, max_attempts=1)
    sims[0].faults("reset", endpoints=["generate"])
    answer = started.post("generate", {"prompts": [f"{SENTENCE} {i}" for i in range(4)], "n": 2})
    assert answer.status_code == 502
    body = answer.json()
    assert sorted([*body["failed"], *body["completed"]]) == [0, 1, 2, 3]
    assert len(body["completed"]) == len(body["result"]["prompt_ids"]) == 2
    assert len(body["result"]["completion_ids"]) == 4
    assert [attempt["prompts"] for attempt in body["attempts"]] == [2]


def test_it_is_a_504_when_every_attempt_timed_out(fleet: Fleet, gateway: Start) -> None:
    sims = fleet(2)
    started = gateway(sims, request_timeout=0.3)
    for sim in sims:
        sim.faults("hang", endpoints=["generate"])
    answer = started.post("generate")
    assert answer.status_code == 504
    attempts = answer.json()["attempts"]
    assert {attempt["backend"] for attempt in attempts} == {sim.url for sim in sims}
    assert {attempt["outcome"] for attempt in attempts} == {"timed out"}


def test_it_is_a_504_when_the_whole_time_is_up(fleet: Fleet, gateway: Start) -> None:
    (sim,) = fleet(1)
    sim.faults("hang", endpoints=["generate"])
    answer = gateway([sim], total_timeout=0.3).post("generate")
    assert answer.status_code == 504
    assert "total_timeout of 0.3 s" in answer.json()["detail"]


def test_no_eligible_backend_is_a_503_with_the_reason_for_each(fleet: Fleet, gateway: Start) -> None:
    """At once."""
    sims = fleet(2)
    started = gateway([*sims, "127.0.0.1:1"], health_interval=60)
    sims[0].kill()
    sims[1].faults("status", status=503, endpoints=["health"])
    started.client.post(f"/pool/backends/{sims[1].name}/drain")
    eventually(lambda: started.client.get("/health/").status_code == 503)
    for endpoint in ("generate", "chat", "get_sequence_logprobs"):
        answer = started.post(endpoint)
        assert answer.status_code == 503
        assert answer.json()["backends"] == {
            sims[0].url: "is down (connection refused)",
            sims[1].url: "is draining",
            "http://127.0.0.1:1": "is down (connection refused)",
        }
        assert int(answer.headers["retry-after"]) == 60


def test_an_ejected_backend_says_for_how_long(fleet: Fleet, gateway: Start) -> None:
    sims = fleet(2)
    started = gateway(sims, fail_eject_threshold=1, cooldown_seconds=20)
    sims[0].faults("reset", endpoints=["generate"])
    assert started.post("generate", {"prompts": ["a", "b"]}).headers["x-backend"] == sims[1].name
    (reason,) = started.client.get("/health/").json()["not_eligible"].values()
    assert reason.startswith("ejected for 20 s after a failure (connection lost")


# A backend's own 4xx


@pytest.mark.parametrize("status", [400, 404, 413, 418, 422, 451])
def test_a_backends_4xx_passes_through_unchanged(status: int, fleet: Fleet, gateway: Start) -> None:
    """It is sent to nobody else, and counts against nobody."""
    sims = fleet(2)
    started = gateway(sims)
    for sim in sims:
        sim.faults("status", status=status, endpoints=["generate"], times=1)
    answer = started.post("generate")
    with http(next(sim for sim in sims if sim.name not in answer.headers["x-backend"]).url) as client:
        expected = client.post("/generate/", json=BODIES["generate"])
    assert (answer.status_code, answer.content) == (expected.status_code, expected.content)
    assert answer.headers["content-type"] == expected.headers["content-type"]
    assert sum(received(sims)) == 2  # the second was the test's own
    assert [(b["ejections"], b["eligible"], b["breaker"]) for b in started.backends()] == [(0, True, "closed")] * 2


# Clients that go away


def test_a_client_that_disconnects_frees_its_slot(fleet: Fleet, gateway: Start) -> None:
    """While a backend works, and while it waits for one."""
    (sim,) = fleet(1)
    started = gateway([sim], max_inflight_per_backend=1)
    body = json.dumps(BODIES["generate"]).encode()
    head = f"POST /generate/ HTTP/1.1\nHost: g\nContent-Length: {len(body)}\n"
    sim.faults("hang", endpoints=["generate"])
    with raw(started, head, body):
        eventually(lambda: started.inflight() == 1 and sim.state()["in_flight"] == 1)
        with raw(started, head, body):
            eventually(lambda: started.client.get("/pool/stats").json()["waiting"] == 1)
        eventually(lambda: started.client.get("/pool/stats").json()["waiting"] == 0)
        assert started.inflight() == 1
    eventually(lambda: started.inflight() == 0)
    sim.clear_faults()
    assert started.post("generate").status_code == 200
    (backend,) = started.backends()
    assert (backend["failures"], backend["load"], backend["breaker"]) == (0, 0, "closed")


def test_a_client_that_disconnects_in_its_body_is_no_event(silent: tuple[Gateway, list[SimProcess]]) -> None:
    """Not even in the log (the fixture sees to that)."""
    for framing, body in (("Content-Length: 100", b'{"pro'), ("Transfer-Encoding: chunked", b"5\r\n12345\r\n")):
        raw(silent[0], f"POST /chat/ HTTP/1.1\nHost: g\n{framing}\n", body).close()
    assert silent[0].client.get("/livez").status_code == 200
