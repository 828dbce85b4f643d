"""Faults of the simulated `vllm serve`, endpoint by endpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import eventually
from vllm_sims import (
    CHAT,
    COMPLETIONS,
    GENERATE,
    SHORT_SECONDS,
    USER,
    Aside,
    aside_calls,
    complete,
    error,
    get,
    post,
    started,
    tokens,
    unspoilt,
)

from trl_pool.sim import SimProcess, start_fleet
from trl_pool.sim.traits import VLLM

WORK: list[tuple[str, str, dict[str, Any]]] = [
    ("completions", COMPLETIONS, {"prompt": ["x", "y"], "n": 2}),
    ("chat_completions", CHAT, {"messages": [USER], "n": 2}),
    ("generate", GENERATE, {"token_ids": [5], "sampling_params": {"n": 2}}),
]


@pytest.fixture(scope="module")
def fleet() -> Iterator[dict[str, SimProcess]]:
    with started(plain={}) as sims:
        yield sims


@pytest.fixture
def sim(fleet: dict[str, SimProcess]) -> Iterator[SimProcess]:
    sim = unspoilt(fleet["plain"])
    yield sim
    sim.clear_faults()


@pytest.fixture
def aside() -> Iterator[Aside]:
    with aside_calls() as send:
        yield send


def test_every_endpoint_can_have_a_fault_of_its_own(sim: SimProcess) -> None:
    for path, name in VLLM.paths.items():
        sim.faults("status", status=418, endpoints=[name], times=1)
        assert {get(sim, path).status_code, post(sim, path, {}).status_code} & {418}, name
        sim.clear_faults()
    assert tokens(sim)


def test_endpoints_of_the_other_dialect_are_refused(sim: SimProcess) -> None:
    for name in ("init_communicator", "chat", "complete"):
        with pytest.raises(ValueError, match="unknown endpoints"):
            sim.faults("hang", endpoints=[name])
    assert sim.state()["faults"] == []


def test_errors_have_openais_body(sim: SimProcess) -> None:
    sim.faults("status", times=1)
    assert error(post(sim, COMPLETIONS, {"prompt": "x"})) == (500, "InternalServerError", None)
    sim.faults("status", status=503, retry_after=0.5, times=1)
    answer = post(sim, COMPLETIONS, {"prompt": "x"})
    assert error(answer) == (503, "ServiceUnavailable", None)
    assert answer.headers["retry-after"] == "0.5"
    sim.faults("busy")
    answer = post(sim, COMPLETIONS, {"prompt": "x"})
    assert error(answer) == (429, "TooManyRequests", None)
    assert answer.headers["retry-after"] == "1"
    assert get(sim, "/health").status_code == 200  # health only if named


def test_hang_holds_requests_until_faults_are_cleared(sim: SimProcess, aside: Aside) -> None:
    whole = tokens(sim)
    sim.faults("hang", endpoints=["completions"], times=1)
    hung = aside(tokens, sim)
    eventually(lambda: sim.state()["in_flight"] == 1)
    assert tokens(sim) == whole
    assert not hung.done()
    sim.clear_faults()
    assert hung.result() == whole


def test_a_dead_worker_hides_behind_a_healthy_server(sim: SimProcess) -> None:
    sim.faults("dead_worker")
    for _, path, body in WORK:
        with pytest.raises(httpx.ReadTimeout):
            post(sim, path, body, timeout=SHORT_SECONDS)
    for path in ("/reset_prefix_cache", "/pause", "/start_weight_update"):
        with pytest.raises(httpx.ReadTimeout):
            post(sim, path, {}, timeout=SHORT_SECONDS)
    with pytest.raises(httpx.ReadTimeout):
        get(sim, "/weight_info", timeout=SHORT_SECONDS)
    for path in ("/health", "/version", "/v1/models", "/get_world_size", "/server_info"):
        assert get(sim, path).status_code == 200


def test_slow_answers_late_and_keeps_nobody_else_waiting(sim: SimProcess, aside: Aside) -> None:
    sim.faults("slow", seconds=0.5, times=1)
    begun = time.monotonic()
    late = aside(tokens, sim)
    eventually(lambda: sim.state()["in_flight"] == 1)
    assert get(sim, "/health", timeout=0.3).status_code == 200
    assert tokens(sim)
    assert not late.done()
    assert late.result() == tokens(sim)
    assert time.monotonic() - begun >= 0.5


@pytest.mark.parametrize(("endpoint", "path", "body"), WORK)
def test_wrong_count_leaves_one_choice_out(sim: SimProcess, endpoint: str, path: str, body: dict[str, Any]) -> None:
    right = post(sim, path, body).json()["choices"]
    sim.faults("wrong_count", endpoints=[endpoint], times=1)
    assert post(sim, path, body).json()["choices"] == right[:-1]
    assert post(sim, path, body).json()["choices"] == right


@pytest.mark.parametrize("kind", ["cut_json", "invalid_json"])
@pytest.mark.parametrize(("endpoint", "path", "body"), WORK)
def test_broken_json_comes_in_a_complete_response(
    sim: SimProcess, kind: str, endpoint: str, path: str, body: dict[str, Any]
) -> None:
    sim.faults(kind, endpoints=[endpoint], times=1)
    response = post(sim, path, body)
    assert response.status_code == 200
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        response.json()


@pytest.mark.parametrize("after_bytes", [None, 0, -1])
@pytest.mark.parametrize("stream", [False, True])
def test_reset_breaks_the_connection_in_the_middle_of_the_body(
    sim: SimProcess, after_bytes: int | None, stream: bool
) -> None:
    sim.faults("reset", times=1, after_bytes=after_bytes)
    with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
        complete(sim, stream=stream)
    assert tokens(sim)


def test_a_stream_can_be_cut(sim: SimProcess) -> None:
    body = {"prompt": "x", "stream": True, "max_tokens": 5, "ignore_eos": True, "request_id": "r"}
    whole = post(sim, COMPLETIONS, body).content
    sim.faults("cut_json", times=1)
    cut = post(sim, COMPLETIONS, body)
    assert cut.headers["content-type"].startswith("text/event-stream")
    assert len(cut.content) == len(whole) // 2
    assert b"[DONE]" not in cut.content


def test_false_reset_says_so(sim: SimProcess) -> None:
    sim.faults("false_reset", times=1)
    assert post(sim, "/reset_prefix_cache").json() == {"success": False}
    assert post(sim, "/reset_prefix_cache").json() == {"success": True}


def test_refuse_closes_the_port_for_a_while(sim: SimProcess) -> None:
    sim.faults("refuse", seconds=0.4)
    with pytest.raises(httpx.ConnectError):
        get(sim, "/health")
    eventually(lambda: bool(sim.state()["listening"]))
    assert tokens(sim)


def test_control_calls_can_fail_and_change_nothing(sim: SimProcess) -> None:
    sim.faults("status", endpoints=["start_weight_update"], times=1)
    assert post(sim, "/start_weight_update", {}).status_code == 500
    assert not sim.state()["updating"]
    assert post(sim, "/start_weight_update", {}).status_code == 200
    assert post(sim, "/finish_weight_update", {}).status_code == 200


def test_a_fleet_speaks_the_dialect() -> None:
    with start_fleet(2, dialect="vllm", model="m") as fleet:
        names = [get(sim, "/v1/models").json()["data"][0]["id"] for sim in fleet]
        assert names == ["m", "m"]
        assert tokens(fleet[0], model="m") == tokens(fleet[1], model="m")
