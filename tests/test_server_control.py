"""Weights and caches through the gateway: broadcasts, their results, and who may serve what in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import httpx
import pytest
from conftest import ask, eventually, received
from test_server_process import BODIES, SENTENCE, Gateway, gateways, http

from trl_pool.fleet import USER_AGENT
from trl_pool.sim import SimProcess

Fleet = Callable[..., list[SimProcess]]
Start = Callable[..., Gateway]
Background = Callable[..., Future[Any]]

gateway = pytest.fixture(gateways)

CONTROL = ("init_communicator", "update_named_param", "reset_prefix_cache", "close_communicator")
MESSAGES = {
    "init_communicator": "Request received, initializing communicator",
    "update_named_param": "Request received, updating named parameter",
    "reset_prefix_cache": "Request received, resetting prefix cache status: True",
    "close_communicator": "Request received, closing communicator",
}


def call(gateway: Gateway, endpoint: str, name: str = "a") -> httpx.Response:
    """A control call as TRL's client makes it."""
    body = BODIES.get(endpoint)
    if endpoint == "update_named_param":
        body = {**BODIES[endpoint], "name": name}
    return gateway.client.post(f"/{endpoint}/", json=body)


def calls(gateway: Gateway, *endpoints: str) -> None:
    """Several that all succeed."""
    for endpoint in endpoints:
        answer = call(gateway, endpoint)
        assert (endpoint, answer.status_code) == (endpoint, 200), answer.text


def reasons(gateway: Gateway) -> dict[str, str]:
    """Why backends are not eligible."""
    return {b["url"]: b["reason"] for b in gateway.backends() if not b["eligible"]}


def updates(sims: Sequence[SimProcess]) -> list[int]:
    """Parameters that each server has."""
    return [sim.state()["weights"]["updates"] for sim in sims]


def digests(sims: Sequence[SimProcess]) -> set[str]:
    """The weights that servers have."""
    return {sim.state()["weights"]["digest"] for sim in sims}


# Broadcasts


def test_control_calls_go_to_every_backend_and_succeed_together(fleet: Fleet, gateway: Start) -> None:
    """With the backends' message and a result for each; a whole update leaves all of them alike."""
    sims = fleet(2)
    started = gateway(sims)
    for endpoint in CONTROL:
        answer = call(started, endpoint)
        assert answer.status_code == 200
        result = {"ok": True, "status": 200, "message": MESSAGES[endpoint]}
        assert answer.json() == {"message": MESSAGES[endpoint], "results": {sim.url: result for sim in sims}}
        # An earlier communicator is closed before a new one is made.
        assert received(sims, endpoint) == ([2, 2] if endpoint == "close_communicator" else [1, 1])
    assert updates(sims) == [1, 1]
    assert len(digests(sims)) == 1
    assert [b["weight_version"] for b in started.backends()] == [1, 1]
    assert started.client.get("/pool/stats").json()["weight_version"].endswith(":1")


def test_control_calls_are_made_concurrently(fleet: Fleet, gateway: Start, background: Background) -> None:
    sims = fleet(2, first_weights=False)
    started = gateway(sims)
    for endpoint in CONTROL:
        for sim in sims:
            sim.faults("hang", endpoints=[endpoint])
        answer = background(call, started, endpoint)
        eventually(lambda: all(sim.state()["endpoints"][endpoint]["in_flight"] for sim in sims))  # noqa: B023
        assert not answer.done()
        for sim in sims:
            sim.clear_faults()
        assert answer.result().status_code == 200


FAILURES: dict[str, tuple[dict[str, Any], int | None, str]] = {
    "500": ({"kind": "status", "status": 500}, 500, "server error: 500, Internal Server Error"),
    "503": ({"kind": "status", "status": 503}, 503, "unavailable: 503"),
    "429": ({"kind": "busy"}, 429, "busy: 429"),
    "422": ({"kind": "status", "status": 422}, 422, "Request failed: 422"),
    "reset": ({"kind": "reset", "after_bytes": -1}, None, "connection lost"),
    "hang": ({"kind": "hang"}, None, "timed out: no answer within 0.5 s"),
}


def fails_once(gateway: Gateway, sims: Sequence[SimProcess], endpoint: str, failure: str) -> None:
    """The second of two backends fails at a control call."""
    fault, status, words = FAILURES[failure]
    before = received(sims, endpoint)
    sims[1].faults(endpoints=[endpoint], **fault)
    answer = call(gateway, endpoint)
    assert answer.status_code == 502
    results = answer.json()["results"]
    assert results[sims[0].url] == {"ok": True, "status": 200, "message": MESSAGES[endpoint]}
    assert (results[sims[1].url]["ok"], results[sims[1].url]["status"]) == (False, status)
    assert words in results[sims[1].url]["message"]
    assert sims[1].url in answer.json()["detail"]
    assert [after - count for after, count in zip(received(sims, endpoint), before, strict=True)] == [1, 1]
    sims[1].clear_faults()


def test_a_control_call_that_one_backend_refuses_is_a_502_and_never_retried(fleet: Fleet, gateway: Start) -> None:
    """With the result for each; every backend was called exactly once."""
    sims = fleet(2, first_weights=False)
    started = gateway(sims)
    for endpoint in CONTROL:
        if endpoint != "init_communicator":
            calls(started, "init_communicator")
        fails_once(started, sims, endpoint, "500")
        calls(started, "close_communicator")


def test_a_control_call_is_never_retried_however_it_fails(fleet: Fleet, gateway: Start) -> None:
    """Not even where a request would be: busy, a broken connection, a time-out."""
    sims = fleet(2, first_weights=False)
    started = gateway(sims, control_timeout=0.5)
    for failure in FAILURES:
        fails_once(started, sims, "reset_prefix_cache", failure)
        eventually(lambda: not reasons(started))


def test_a_dead_backend_fails_the_broadcast_by_name(fleet: Fleet, gateway: Start) -> None:
    sims = fleet(2, first_weights=False)
    started = gateway(sims)
    sims[1].kill()
    answer = call(started, "init_communicator")
    assert answer.status_code == 502
    results = answer.json()["results"]
    assert results[sims[0].url]["ok"]
    assert "connection refused" in results[sims[1].url]["message"]


def test_a_reset_that_says_it_failed_is_a_502(fleet: Fleet, gateway: Start) -> None:
    """Though the server answers it with a 200."""
    sims = fleet(2, first_weights=False)
    started = gateway(sims)
    sims[0].faults("false_reset")
    answer = call(started, "reset_prefix_cache")
    assert answer.status_code == 502
    message = "Request received, resetting prefix cache status: False"
    assert answer.json()["results"][sims[0].url] == {"ok": False, "status": 200, "message": message}


def test_a_backend_whose_control_call_hangs_is_left_alone_until_it_returns(fleet: Fleet, gateway: Start) -> None:
    sims = fleet(2, first_weights=False)
    started = gateway(sims, control_timeout=0.3)
    sims[0].faults("hang", endpoints=["reset_prefix_cache"])
    assert call(started, "reset_prefix_cache").status_code == 502
    assert reasons(started) == {sims[0].url: "is stuck: /reset_prefix_cache/ has not returned"}
    assert started.post("generate", {"prompts": ["a", "b"]}).headers["x-backend"] == sims[1].name
    sims[0].clear_faults()
    eventually(lambda: not reasons(started))


def test_without_a_backend_control_calls_are_a_503(fleet: Fleet, gateway: Start) -> None:
    """A trainer must not believe that it has a group."""
    started = gateway(fleet(1, first_weights=False))
    (backend,) = started.backends()
    started.client.delete(f"/pool/backends/{backend['name']}")
    for endpoint in CONTROL:
        answer = call(started, endpoint)
        assert (endpoint, answer.status_code) in {(endpoint, 502), (endpoint, 503)}
    answer = started.client.get("/get_world_size/")
    assert (answer.status_code, answer.headers.get("retry-after")) == (503, "1")


# The warning


def test_a_stock_trainer_is_warned_that_several_servers_wait_for_it(
    fleet: Fleet, gateway: Start, caplog: pytest.LogCaptureFixture
) -> None:
    started = gateway(fleet(2, first_weights=False))
    answer = call(started, "init_communicator")
    assert answer.status_code == 200
    assert answer.headers["warning"].startswith('199 trl_pool "2 servers each wait for a trainer connection')
    assert "2 servers each wait for a trainer connection" in caplog.text


def test_nobody_is_warned_of_one_server_nor_this_packages_client(fleet: Fleet, gateway: Start) -> None:
    sims = fleet(2, first_weights=False)
    assert "warning" not in call(gateway(sims[:1]), "init_communicator").headers
    call(gateway(sims[:1]), "close_communicator")
    with http(gateway(sims).url, headers={"user-agent": USER_AGENT}) as client:
        answer = client.post("/init_communicator/", json=BODIES["init_communicator"])
        assert (answer.status_code, "warning" in answer.headers) == (200, False)


# The gate


def test_requests_wait_during_an_update_and_go_on_after_the_reset(
    fleet: Fleet, gateway: Start, background: Background
) -> None:
    """On the new weights. Meanwhile the gateway is healthy and ready: its clients wait, they need not leave."""
    sims = fleet(2)
    started = gateway(sims)
    old = ask(sims[0], "generate", **BODIES["generate"])
    calls(started, "init_communicator", "update_named_param")
    before = received(sims)
    waiting = [background(started.post, endpoint) for endpoint in ("generate", "chat", "get_sequence_logprobs")]
    eventually(lambda: started.client.get("/pool/stats").json()["waiting"] == 3)
    assert started.client.get("/pool/stats").json()["gate"] == "weight update v1 is under way"
    assert started.client.get("/health/").status_code == 200
    assert started.client.get("/readyz").status_code == 200
    assert call(started, "update_named_param", "b").status_code == 200
    assert received(sims) == before
    calls(started, "reset_prefix_cache")
    assert [answer.result().status_code for answer in waiting] == [200, 200, 200]
    new = waiting[0].result().json()
    assert new == ask(sims[0], "generate", **BODIES["generate"])
    assert new["completion_ids"] != old["completion_ids"]
    assert updates(sims) == [2, 2]


def test_an_update_waits_for_requests_that_are_out(fleet: Fleet, gateway: Start, background: Background) -> None:
    sims = fleet(2, first_weights=False)
    started = gateway(sims)
    calls(started, "init_communicator")
    sims[0].faults("hang", endpoints=["generate"])
    sims[1].faults("hang", endpoints=["generate"])
    request = background(started.post, "generate")
    eventually(lambda: started.inflight() == 1)
    update = background(call, started, "update_named_param")
    eventually(lambda: started.client.get("/pool/stats").json()["gate"])
    assert received(sims, "update_named_param") == [0, 0]
    assert not update.done()
    for sim in sims:
        sim.clear_faults()
    assert (request.result().status_code, update.result().status_code) == (200, 200)
    calls(started, "reset_prefix_cache")


def test_an_update_that_cannot_begin_says_who_is_still_working(
    fleet: Fleet, gateway: Start, background: Background
) -> None:
    """And changes nothing: everybody keeps serving."""
    (sim,) = fleet(1, first_weights=False)
    started = gateway([sim], drain_timeout=0.3)
    calls(started, "init_communicator")
    sim.faults("hang", endpoints=["generate"])
    request = background(started.post, "generate")
    eventually(lambda: started.inflight() == 1)
    answer = call(started, "update_named_param")
    assert answer.status_code == 502
    assert "is still working" in answer.json()["results"][sim.url]["message"]
    assert received([sim], "update_named_param") == [0]
    sim.clear_faults()
    assert request.result().status_code == 200
    assert started.post("generate").status_code == 200


def test_concurrent_clients_only_ever_see_whole_versions(fleet: Fleet, gateway: Start, background: Background) -> None:
    """While updates come and go every answer is that of one set of weights, for all of its prompts."""
    sims = fleet(3, first_weights=False)
    started = gateway(sims)
    calls(started, "init_communicator")
    body = {"prompts": [f"{SENTENCE} {i}" for i in range(6)], "max_tokens": 6}
    versions = [ask(sims[0], "generate", **body)]
    done = False

    def client() -> list[Any]:
        seen = []
        with http(started.url) as own:
            while not done:
                seen.append(own.post("/generate/", json=body).raise_for_status().json())
        return seen

    clients = [background(client) for _ in range(4)]
    for round_ in range(3):
        served = sum(backend["prompts"] for backend in started.backends())
        eventually(lambda: sum(backend["prompts"] for backend in started.backends()) > served + 12)  # noqa: B023
        for name in ("a", "b"):
            assert call(started, "update_named_param", name).status_code == 200, round_
        calls(started, "reset_prefix_cache")
        versions.append(ask(sims[0], "generate", **body))
    done = True
    seen = [answer for one in clients for answer in one.result()]
    assert all(answer in versions for answer in seen)
    assert len(digests(sims)) == 1
    assert all(sim.state()["mixed"] == 0 for sim in sims)


def test_concurrent_announcements_reach_every_backend_in_one_order(
    fleet: Fleet, gateway: Start, background: Background
) -> None:
    sims = fleet(2)
    started = gateway(sims)
    calls(started, "init_communicator")
    answers = [background(call, started, "update_named_param", f"layer.{i}") for i in range(8)]
    assert {answer.result().status_code for answer in answers} == {200}
    calls(started, "reset_prefix_cache")
    assert updates(sims) == [8, 8]
    assert len(digests(sims)) == 1


def test_a_reset_without_an_update_only_resets(fleet: Fleet, gateway: Start) -> None:
    sims = fleet(2, first_weights=False)
    started = gateway(sims)
    calls(started, "reset_prefix_cache")
    assert received(sims, "reset_prefix_cache") == [1, 1]
    assert [b["weight_version"] for b in started.backends()] == [0, 0]
    assert started.post("generate").status_code == 200


# The fence


def test_an_abandoned_update_leaves_nobody_to_serve(fleet: Fleet, gateway: Start) -> None:
    """Whoever waited is told so; a whole update later heals everybody."""
    sims = fleet(2, first_weights=False)
    started = gateway(sims, update_idle_timeout=0.4)
    calls(started, "init_communicator", "update_named_param")
    answer = started.post("generate")  # waits, and then there is nobody
    assert answer.status_code == 503
    why = "out of sync (update v1 was abandoned: no control call for 0.4 s), needs weights v0"
    assert answer.json()["backends"] == {sim.url: why for sim in sims}
    assert started.client.get("/health/").status_code == 503
    assert started.client.get("/readyz").status_code == 503
    calls(started, "update_named_param", "reset_prefix_cache")
    assert started.post("generate").json() == ask(sims[0], "generate", **BODIES["generate"])
    assert reasons(started) == {}


def test_the_rest_of_an_abandoned_update_is_not_published(fleet: Fleet, gateway: Start) -> None:
    """Somebody may have missed its first part."""
    sims = fleet(2, first_weights=False)
    started = gateway(sims)
    calls(started, "init_communicator")
    sims[1].faults("status", status=500, endpoints=["update_named_param"], times=1)
    assert call(started, "update_named_param", "a").status_code == 502
    calls(started, "close_communicator", "init_communicator")
    assert call(started, "update_named_param", "b").status_code == 200
    answer = call(started, "reset_prefix_cache")
    assert answer.status_code == 502
    assert "was not whole" in answer.json()["detail"]
    assert started.post("generate").status_code == 503
    for name in ("a", "b"):
        assert call(started, "update_named_param", name).status_code == 200
    calls(started, "reset_prefix_cache")
    assert reasons(started) == {}


def test_a_failed_update_fences_everybody_who_took_part(fleet: Fleet, gateway: Start) -> None:
    """The trainer stops at the first error, so nobody has the whole of it."""
    sims = fleet(2, first_weights=False)
    started = gateway(sims)
    calls(started, "init_communicator", "update_named_param")
    sims[1].faults("status", status=500, endpoints=["update_named_param"], times=1)
    assert call(started, "update_named_param", "b").status_code == 502
    answer = started.post("generate")
    assert answer.status_code == 503
    assert "another backend failed in it" in answer.json()["backends"][sims[0].url]
    assert "update v1 failed: server error" in answer.json()["backends"][sims[1].url]
    assert received(sims) == [0, 0]


def test_a_restarted_server_is_fenced_until_the_next_whole_update(fleet: Fleet, gateway: Start) -> None:
    """It is up and healthy, and has the first weights again."""
    sims = fleet(2, first_weights=False)
    started = gateway(sims)
    calls(started, *CONTROL[:3])
    new = ask(sims[0], "generate", **BODIES["generate"])
    sims[1].restart()
    eventually(lambda: started.backend(sims[1])["health"] == "up" and reasons(started))
    assert list(reasons(started)) == [sims[1].url]
    assert "out of sync" in reasons(started)[sims[1].url]
    assert [started.post("generate").json() == new for _ in range(8)] == [True] * 8
    assert received(sims)[1] == 0
    # It has no communicator either, and would die of an announcement.
    answer = call(started, "update_named_param")
    assert answer.status_code == 502
    assert sims[1].url in answer.json()["results"]
    assert received(sims, "update_named_param") == [1, 0]
    calls(started, "close_communicator", *CONTROL[:3])
    assert reasons(started) == {}
    assert {b["weight_version"] for b in started.backends()} == {2}
    assert not any(sim.state()["dead_worker"] for sim in sims)


def test_a_server_that_restarts_during_an_update_is_not_published(fleet: Fleet, gateway: Start) -> None:
    sims = fleet(2, first_weights=False)
    started = gateway(sims)
    calls(started, "init_communicator", "update_named_param")
    sims[1].restart()
    eventually(lambda: started.backend(sims[1])["health"] == "up")
    answer = call(started, "reset_prefix_cache")
    assert answer.status_code == 502
    assert "it was restarted during the update" in answer.json()["results"][sims[1].url]["message"]
    assert started.post("generate").status_code == 503
    assert received(sims) == [0, 0]


def test_an_update_without_a_communicator_is_refused_before_it_is_sent(fleet: Fleet, gateway: Start) -> None:
    """A worker without a group would die of it."""
    sims = fleet(2, first_weights=False)
    started = gateway(sims)
    answer = call(started, "update_named_param")
    assert answer.status_code == 502
    assert "call init_communicator first" in answer.json()["detail"]
    assert set(answer.json()["results"]) == {sim.url for sim in sims}
    assert received(sims, "update_named_param") == [0, 0]
    assert started.post("generate").status_code == 200


def test_a_backend_that_joins_later_serves_after_the_next_update(fleet: Fleet, gateway: Start) -> None:
    """Before the first update it serves at once."""
    sims = fleet(3)
    started = gateway(sims[:1])
    assert started.client.post("/pool/backends", json={"url": sims[1].url}).status_code == 201
    assert reasons(started) == {}
    calls(started, *CONTROL[:3])
    assert started.client.post("/pool/backends", json={"url": sims[2].url}).status_code == 201
    assert "it joined after the last update" in reasons(started)[sims[2].url]
    calls(started, "close_communicator", *CONTROL[:3])
    assert reasons(started) == {}
    assert updates(sims) == [2, 2, 1]


def test_a_backend_removed_during_an_update_leaves_it(fleet: Fleet, gateway: Start) -> None:
    sims = fleet(3, first_weights=False)
    started = gateway(sims)
    calls(started, "init_communicator", "update_named_param")
    assert started.client.delete(f"/pool/backends/{sims[2].name}", params={"drain": False}).status_code == 200
    answer = call(started, "update_named_param", "b")
    assert answer.status_code == 200
    assert set(answer.json()["results"]) == {sim.url for sim in sims[:2]}
    calls(started, "reset_prefix_cache")
    assert started.post("generate").status_code == 200
