"""Weight updates of `vllm serve` through the gateway: the stock trainer's order, the async trainers', failures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import httpx
import pytest
import requests
from conftest import eventually
from requests.adapters import HTTPAdapter
from test_server_process import Gateway, gateways
from test_server_vllm_routes import Recording
from urllib3.util.retry import Retry
from vllm_sims import CHAT, COMPLETIONS, USER, get, post, started

from trl_pool.sim import SimProcess

Start = Callable[..., Gateway]
Background = Callable[..., Future[Any]]

gateway = pytest.fixture(gateways)

TRAITS: dict[str, dict[str, Any]] = {
    "a": {"vllm_version": "0.32.0", "decode_ms_per_token": 5},
    "b": {"vllm_version": "0.32.0", "decode_ms_per_token": 5, "tensor_parallel_size": 2},
}

GROUP = {"master_address": "127.0.0.1", "master_port": 51216, "rank_offset": 1, "world_size": 4, "packed": True}
INFO = {"names": ["a", "b"], "dtype_names": ["bfloat16"] * 2, "shapes": [[2], [3, 4]]}
INIT, BEGIN, SEND, FINISH = (
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
)
BODIES: dict[str, Any] = {INIT: {"init_info": GROUP}, BEGIN: {}, SEND: {"update_info": INFO}, FINISH: {}}
SHORT = {"prompt": "Hello", "max_tokens": 4, "return_token_ids": True}
LONG = {"prompt": "Hello", "max_tokens": 150, "ignore_eos": True, "return_token_ids": True}  # 0.75 s


@pytest.fixture(scope="module")
def _vllm() -> Iterator[list[SimProcess]]:
    with started(**TRAITS) as sims:
        yield list(sims.values())


@pytest.fixture
def sims(_vllm: list[SimProcess]) -> list[SimProcess]:
    """Two servers with the same whole weights, maybe of an earlier test: a start takes half a second of a core."""
    states = [sim.state() if sim.running else None for sim in _vllm]

    def spoiled(state: Any) -> bool:
        fields = ("paused", "adapters", "updating", "in_flight", "dead_worker")
        return state is None or not state["whole"] or any(state[name] for name in fields)

    alike = len({(s["weights"]["digest"], s["weight_version"]) for s in states if s is not None}) == 1
    for sim, state in zip(_vllm, states, strict=True):
        if spoiled(state) or (not alike and state["weight_version"] != "default") or None in states:
            sim.restart(wait=False)
    for sim in _vllm:
        sim.wait_ready().clear_faults()
        sim.forget()
    return _vllm


def call(gateway: Gateway, path: str, body: Any = None) -> httpx.Response:
    return gateway.client.post(path, json=BODIES.get(path) if body is None else body)


def calls(gateway: Gateway, *paths: str) -> None:
    """Several that all succeed."""
    for path in paths:
        answer = call(gateway, path)
        assert (path, answer.status_code) == (path, 200), answer.text


def whole(gateway: Gateway, version: str | None = None) -> None:
    """A whole update, as a stock trainer makes it."""
    calls(gateway, BEGIN, SEND)
    answer = call(gateway, FINISH, {} if version is None else {"weight_version": version})
    assert answer.status_code == 200, answer.text


def received(sims: Sequence[SimProcess], path: str) -> list[int]:
    return [sim.state()["endpoints"][path.strip("/").replace("v1/", "")]["received"] for sim in sims]


def versions(sims: Sequence[SimProcess]) -> list[str]:
    return [get(sim, "/weight_info").json()["weight_version"] for sim in sims]


def sampled(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def own(sim: SimProcess) -> list[int]:
    """The tokens that a server samples by itself."""
    return sampled(post(sim, COMPLETIONS, SHORT))


def through(gateway: Gateway) -> list[int]:
    return sampled(call(gateway, COMPLETIONS, SHORT))


def reasons(gateway: Gateway) -> dict[str, str]:
    return {b["url"]: b["reason"] for b in gateway.backends() if not b["eligible"]}


def results(answer: httpx.Response, sims: Sequence[SimProcess]) -> list[tuple[bool, int | None]]:
    assert answer.status_code == 502, answer.text
    found = answer.json()["results"]
    assert set(found) == {sim.url for sim in sims}
    return [(found[sim.url]["ok"], found[sim.url]["status"]) for sim in sims]


def gate(gateway: Gateway) -> Any:
    return gateway.client.get("/pool/stats").json()["gate"]


def waiting(gateway: Gateway, number: int) -> None:
    eventually(lambda: gateway.client.get("/pool/stats").json()["waiting"] == number)


def frozen_request(gateway: Gateway, background: Background, sims: Sequence[SimProcess]) -> Future[Any]:
    """One that runs when `/pause?mode=keep` comes."""
    request = background(call, gateway, COMPLETIONS, LONG)
    eventually(lambda: sum(sim.state()["running"] for sim in sims) == 1)
    calls(gateway, "/pause?mode=keep")
    eventually(lambda: [sim.state()["running"] for sim in sims] == [0, 0])
    assert not request.done()
    return request


# The stock trainer's order


def test_an_update_reaches_every_backend_and_is_one_version(sims: list[SimProcess], gateway: Start) -> None:
    """Each is told a rank offset of its own, so that one broadcast of the trainer's feeds them all."""
    transport = Recording()
    started = gateway(sims, transport=transport)
    old = own(sims[0])
    assert started.client.get("/get_world_size").json() == {"world_size": 3}
    messages = {
        INIT: "Weight transfer initialized",
        BEGIN: "Weight update started",
        SEND: "Weights updated",
        FINISH: "Weight update finished",
    }
    for path, message in messages.items():
        answer = call(started, path)
        result = {"ok": True, "status": 200, "message": message}
        assert answer.json() == {"message": message, "results": {sim.url: result for sim in sims}}
        assert received(sims, path) == [1, 1]
    told = {request.url.port: json.loads(request.content)["init_info"] for request in transport.to(INIT)}
    assert [told[sim.port] for sim in sims] == [GROUP, {**GROUP, "rank_offset": 2}]
    assert [json.loads(request.content) for request in transport.to(SEND)] == [BODIES[SEND]] * 2
    version = started.client.get("/pool/stats").json()["weight_version"]
    assert version.endswith(":1")
    assert versions(sims) == [version, version]
    assert started.client.get("/weight_info").json() == {"weight_version": version}
    assert [b["weight_version"] for b in started.backends()] == [1, 1]
    assert own(sims[0]) == own(sims[1]) == through(started) != old
    assert received(sims, "/reset_prefix_cache") == [1, 1]  # the gateway's own
    answer = call(started, "/reset_prefix_cache")
    assert answer.json()["success"] is True
    assert received(sims, "/reset_prefix_cache") == [2, 2]
    whole(started)
    assert versions(sims) == [version.replace(":1", ":2")] * 2


def test_requests_wait_during_an_update_and_answer_on_the_new_weights(
    sims: list[SimProcess], gateway: Start, background: Background
) -> None:
    """Streams as well. Meanwhile the gateway is healthy and ready."""
    started = gateway(sims)
    calls(started, INIT, BEGIN)
    chat = {"messages": [USER], "max_tokens": 4}
    requests_ = [
        background(call, started, COMPLETIONS, SHORT),
        background(call, started, CHAT, chat),
        background(call, started, COMPLETIONS, {**SHORT, "stream": True}),
        background(started.post, "generate", {"prompts": ["Hello"], "max_tokens": 4}),
    ]
    waiting(started, 4)
    assert gate(started) == "weight update v1 is under way"
    assert [started.client.get(path).status_code for path in ("/health", "/readyz")] == [200, 200]
    calls(started, SEND)
    assert not any(request.done() for request in requests_)
    assert received(sims, COMPLETIONS) == [0, 0]
    calls(started, FINISH)
    completed, chatted, streamed, generated = (request.result() for request in requests_)
    assert sampled(completed) == own(sims[0])
    assert chatted.json()["choices"] == post(sims[0], CHAT, chat).json()["choices"]
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert generated.json()["completion_ids"] == [own(sims[0])]


def test_an_update_waits_for_what_is_out(sims: list[SimProcess], gateway: Start, background: Background) -> None:
    """For requests and for streams, to their end."""
    started = gateway(sims)
    calls(started, INIT)
    out = [background(call, started, COMPLETIONS, {**LONG, "stream": stream}) for stream in (False, True)]
    eventually(lambda: started.inflight() == 2)
    begun = background(call, started, BEGIN)
    eventually(lambda: gate(started))
    assert received(sims, BEGIN) == [0, 0]
    assert begun.result().status_code == 200
    assert [request.result().status_code for request in out] == [200, 200]
    assert out[1].result().text.endswith("data: [DONE]\n\n")
    calls(started, SEND, FINISH)


def test_an_update_that_cannot_begin_says_who_is_still_working(
    sims: list[SimProcess], gateway: Start, background: Background
) -> None:
    """And changes nothing."""
    started = gateway(sims, drain_timeout=0.2)
    calls(started, INIT)
    request = background(call, started, COMPLETIONS, LONG)
    eventually(lambda: started.inflight() == 1)
    answer = call(started, BEGIN)
    assert answer.status_code == 502
    (why,) = answer.json()["results"].values()
    assert "is still working (1 requests waited for)" in why["message"]
    assert received(sims, BEGIN) == [0, 0]
    assert request.result().status_code == 200
    whole(started)


def test_the_trainers_own_version_is_kept(sims: list[SimProcess], gateway: Start) -> None:
    """On every server and in the pool's books: it proves that a server whose connection broke is the same still."""
    started = gateway(sims, fail_eject_threshold=9)
    calls(started, INIT)
    whole(started, "step-7")
    assert versions(sims) == ["step-7"] * 2
    assert started.client.get("/weight_info").json() == {"weight_version": "step-7"}
    assert started.client.get("/pool/stats").json()["weight_version"] == "step-7"
    for sim in sims:
        sim.faults("reset", endpoints=["completions"], times=1)
    assert call(started, COMPLETIONS, SHORT).status_code == 502
    eventually(lambda: not reasons(started))
    assert through(started) == own(sims[0])
    whole(started)  # it has its communicator, too: the trainer need not make the group anew


def test_servers_that_keep_no_version_are_told_none(gateway: Start) -> None:
    """vLLM before 0.27.1; the pool counts all the same."""
    with SimProcess(dialect="vllm", vllm_version="0.26.0") as sim:
        transport = Recording()
        started = gateway([sim], transport=transport)
        group = {name: value for name, value in GROUP.items() if name != "packed"}
        assert call(started, INIT, {"init_info": {**group, "world_size": 2}}).status_code == 200
        whole(started)
        assert json.loads(transport.to(FINISH)[0].content) == {}
        assert started.backend(sim)["weight_version"] == 1
        assert through(started) == own(sim)


# The async trainers' order


def test_frozen_requests_are_not_waited_for_and_go_on_afterwards(
    sims: list[SimProcess], gateway: Start, background: Background
) -> None:
    """Pause, start, update, finish without a body, resume. What comes meanwhile answers on the new weights."""
    transport = Recording()
    started = gateway(sims, transport=transport)
    calls(started, INIT)
    old = own(sims[0])
    frozen = frozen_request(started, background, sims)
    assert started.client.get("/is_paused").json() == {"is_paused": True}
    assert call(started, BEGIN, {"is_checkpoint_format": True}).status_code == 200
    assert {request.content for request in transport.to(BEGIN)} == {b'{"is_checkpoint_format":true}'}
    late = background(call, started, COMPLETIONS, SHORT)
    waiting(started, 1)
    calls(started, SEND)
    answer = started.client.post(FINISH)
    assert answer.status_code == 200
    # Frozen ones hold what they computed with the old weights, and nobody else's may make the reset fail.
    assert {request.url.query for request in transport.to("/reset_prefix_cache")} == {b"reset_running_requests=true"}
    assert not frozen.done()
    assert not late.done()
    answer = call(started, "/resume")
    assert (answer.status_code, answer.json()["status"]) == (200, "resumed")
    assert len(sampled(frozen.result())) == 150
    assert frozen.result().json()["choices"][0]["finish_reason"] == "length"
    assert sampled(late.result()) == own(sims[1]) != old
    assert len(set(versions(sims))) == 1
    assert reasons(started) == {}


def test_a_frozen_request_does_not_time_out(sims: list[SimProcess], gateway: Start, background: Background) -> None:
    """However long the trainer takes: no server is at fault."""
    started = gateway(sims, request_timeout=2)
    frozen = frozen_request(started, background, sims)
    with pytest.raises(TimeoutError):
        frozen.result(timeout=2.5)
    assert [backend["failures"] for backend in started.backends()] == [0, 0]
    calls(started, "/resume")
    assert frozen.result().status_code == 200


def test_a_request_that_is_not_frozen_is_waited_for(
    sims: list[SimProcess], gateway: Start, background: Background
) -> None:
    """When only one of the backends could be paused."""
    started = gateway(sims, drain_timeout=0.2)
    calls(started, INIT)
    out = [background(call, started, COMPLETIONS, LONG) for _ in range(2)]
    eventually(lambda: [sim.state()["running"] for sim in sims] == [1, 1])
    sims[1].faults("status", status=500, endpoints=["pause"], times=1)
    answer = call(started, "/pause?mode=keep")
    assert results(answer, sims) == [(True, 200), (False, 500)]
    assert call(started, BEGIN).status_code == 502
    assert received(sims, BEGIN) == [0, 0]
    calls(started, "/resume")
    assert [request.result().status_code for request in out] == [200, 200]


def test_other_pauses_are_passed_on(sims: list[SimProcess], gateway: Start, background: Background) -> None:
    """`abort` ends what runs, and new requests queue on the servers until they are resumed."""
    started = gateway(sims)
    request = background(call, started, COMPLETIONS, LONG)
    eventually(lambda: sum(sim.state()["running"] for sim in sims) == 1)
    answer = call(started, "/pause")
    assert (answer.status_code, answer.json()["status"]) == (200, "paused")
    assert request.result().json()["choices"][0]["finish_reason"] == "abort"
    assert started.client.get("/is_paused").json() == {"is_paused": True}
    post(sims[0], "/resume")
    assert started.client.get("/is_paused").json() == {"is_paused": False}
    calls(started, "/pause?mode=wait", "/resume")
    assert started.client.get("/is_paused").json() == {"is_paused": False}
    assert started.client.post("/pause", params={"mode": "nonsense"}).status_code == 502


# A trainer that vanishes


@pytest.mark.parametrize("sent", [(), (SEND,)])
def test_when_the_trainer_vanishes_nobody_serves_until_a_whole_update(
    sent: tuple[str, ...], sims: list[SimProcess], gateway: Start
) -> None:
    """Whoever waited is told so."""
    started = gateway(sims, update_idle_timeout=1)
    calls(started, INIT, BEGIN, *sent)
    answer = call(started, COMPLETIONS, SHORT)  # waits, and then there is nobody
    assert answer.status_code == 503
    why = "out of sync (update v1 was abandoned: no control call for 1 s), needs weights v0"
    assert answer.json()["backends"] == {sim.url: why for sim in sims}
    assert call(started, COMPLETIONS, {**SHORT, "stream": True}).status_code == 503
    assert started.client.get("/readyz").status_code == 503
    late = call(started, FINISH)
    assert late.status_code == 502
    assert "No weight update is under way (it may have been abandoned)" in late.json()["detail"]
    assert received(sims, COMPLETIONS) == [0, 0]
    assert received(sims, FINISH) == [0, 0]
    whole(started)
    assert through(started) == own(sims[0]) == own(sims[1])
    assert [sim.state()["whole"] for sim in sims] == [True, True]
    assert reasons(started) == {}


def test_when_the_trainer_vanishes_frozen_requests_are_aborted(
    sims: list[SimProcess], gateway: Start, background: Background
) -> None:
    """They must not go on with mixed weights; and the servers are left unpaused."""
    started = gateway(sims, update_idle_timeout=1)
    calls(started, INIT)
    frozen = frozen_request(started, background, sims)
    calls(started, BEGIN, SEND)
    (choice,) = frozen.result().json()["choices"]
    assert choice["finish_reason"] == "abort"
    assert len(choice["token_ids"]) < 150
    eventually(lambda: [sim.state()["paused"] for sim in sims] == [False, False])
    assert gate(started) is None
    assert len(reasons(started)) == 2
    whole(started)
    assert through(started) == own(sims[0]) == own(sims[1])


def test_a_trainer_that_starts_anew_in_the_middle_heals_what_it_left(sims: list[SimProcess], gateway: Start) -> None:
    """It has forgotten what it had begun, and makes a group of its own."""
    started = gateway(sims)
    calls(started, INIT, BEGIN, SEND, INIT)
    assert gate(started) is None
    assert call(started, COMPLETIONS, SHORT).status_code == 503
    whole(started)
    assert own(sims[0]) == own(sims[1]) == through(started)
    calls(started, BEGIN, SEND)
    whole(started)
    assert [sim.state()["whole"] for sim in sims] == [True, True]
    assert through(started) == own(sims[0])


def test_an_update_that_was_not_whole_is_not_published_to_whoever_missed_the_rest(
    sims: list[SimProcess], gateway: Start
) -> None:
    started = gateway(sims)
    calls(started, INIT, BEGIN, SEND, INIT, BEGIN)
    part = {"names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[2]]}
    assert call(started, SEND, {"update_info": part}).status_code == 200
    answer = call(started, FINISH)
    assert answer.status_code == 502
    assert "was not whole; send every parameter" in answer.json()["detail"]
    assert call(started, COMPLETIONS, SHORT).status_code == 503
    whole(started)
    assert through(started) == own(sims[0])


# All or nothing


@pytest.mark.parametrize("fault", [{"kind": "status", "status": 500}, {"kind": "reset", "after_bytes": -1}])
@pytest.mark.parametrize("failing", [BEGIN, SEND, FINISH, "/reset_prefix_cache"])
def test_one_backend_that_fails_ends_the_update_for_all(
    failing: str, fault: dict[str, Any], sims: list[SimProcess], gateway: Start
) -> None:
    """502 with a result for each, nothing is sent again; nobody serves and nobody is called until the group is made
    anew."""
    started = gateway(sims)
    calls(started, INIT)
    order = [BEGIN, SEND, FINISH]
    asked = FINISH if failing not in order else failing
    calls(started, *order[: order.index(asked)])
    sims[1].faults(endpoints=[failing.strip("/")], times=1, **fault)
    status = fault.get("status")
    assert results(call(started, asked), sims) == [(True, 200), (False, status)]
    counts = {path: received(sims, path) for path in order}
    assert counts[asked] == [1, 1]
    for path in (asked, *order):
        answer = call(started, path)
        assert answer.status_code == 502
        assert set(answer.json()["results"]) == {sim.url for sim in sims}
    assert {path: received(sims, path) for path in order} == counts
    refused = call(started, COMPLETIONS, SHORT)
    assert refused.status_code == 503
    assert "another backend failed in it" in refused.json()["backends"][sims[0].url]
    assert "update v1 failed: " in refused.json()["backends"][sims[1].url]
    eventually(lambda: all(b["health"] == "up" for b in started.backends()))
    calls(started, INIT)
    whole(started)
    assert own(sims[0]) == own(sims[1]) == through(started)
    assert len(set(versions(sims))) == 1


def test_a_stock_clients_retries_reach_no_backend_twice(sims: list[SimProcess], gateway: Start) -> None:
    """urllib3's `Retry`, as TRL's client has it, sends a POST again that was answered 502."""
    started = gateway(sims)
    calls(started, INIT, BEGIN)
    sims[1].faults("status", status=500, endpoints=["update_weights"], times=1)
    retry = Retry(status=3, status_forcelist=[500, 502, 503], backoff_factor=0, allowed_methods=["POST"])
    with requests.Session() as session:
        session.trust_env = False
        session.mount("http://", HTTPAdapter(max_retries=retry))
        with pytest.raises(requests.exceptions.RetryError, match="too many 502"):
            session.post(started.url + SEND, json=BODIES[SEND])
    assert received(sims, SEND) == [1, 1]


def test_a_group_that_one_backend_did_not_join_is_no_group(sims: list[SimProcess], gateway: Start) -> None:
    """Nobody is told to start. The call sent again makes it anew."""
    started = gateway(sims)
    sims[1].faults("status", status=500, endpoints=["init_weight_transfer_engine"], times=1)
    assert results(call(started, INIT), sims) == [(True, 200), (False, 500)]
    assert received(sims, INIT) == [1, 1]
    answer = call(started, BEGIN)
    assert answer.status_code == 502
    assert set(answer.json()["results"]) == {sim.url for sim in sims}
    assert received(sims, BEGIN) == [0, 0]
    assert through(started) == own(sims[0])  # no weights have changed
    calls(started, INIT)
    whole(started)


def test_a_wrong_world_size_is_refused(sims: list[SimProcess], gateway: Start) -> None:
    """The trainer's side would wait for ranks that never come."""
    started = gateway(sims)
    for wrong in ({"world_size": 2}, {"world_size": 4, "rank_offset": 2}):
        answer = call(started, INIT, {"init_info": {**GROUP, **wrong}})
        assert answer.status_code == 502
        assert f"The group has world_size {wrong['world_size']}" in answer.json()["detail"]
        messages = {url: result["message"] for url, result in answer.json()["results"].items()}
        assert messages == {sims[0].url: "has 1", sims[1].url: "has 2"}
    sims[1].faults("status", status=500, endpoints=["get_world_size"], times=2)
    answer = call(started, INIT)
    assert answer.status_code == 502
    assert set(answer.json()["results"]) == {sims[1].url}
    assert started.client.get("/get_world_size").status_code == 503
    assert received(sims, INIT) == [0, 0]
    assert call(started, INIT, {"init_info": {**GROUP, "world_size": 5, "rank_offset": 2}}).status_code == 200


@pytest.mark.parametrize("path", [BEGIN, SEND, FINISH])
def test_an_update_without_a_group_or_a_start_reaches_no_backend(
    path: str, sims: list[SimProcess], gateway: Start
) -> None:
    started = gateway(sims)
    if path != BEGIN:
        calls(started, INIT)
    answer = call(started, path)
    assert answer.status_code == 502
    assert ("init_communicator" if path == BEGIN else "call /start_weight_update first") in answer.json()["detail"]
    assert received(sims, path) == [0, 0]
    assert through(started) == own(sims[0])


# Servers that come and go


def test_a_backend_that_restarts_during_an_update_is_named(sims: list[SimProcess], gateway: Start) -> None:
    started = gateway(sims)
    calls(started, INIT, BEGIN, SEND)
    sims[1].restart()
    eventually(lambda: started.backend(sims[1])["health"] == "up")
    answer = call(started, FINISH)
    assert answer.status_code == 502
    assert "it was restarted during the update" in answer.json()["results"][sims[1].url]["message"]
    assert received(sims, FINISH) == [0, 0]
    assert call(started, COMPLETIONS, SHORT).status_code == 503
    calls(started, INIT)
    whole(started)
    assert own(sims[0]) == own(sims[1]) == through(started)


def test_a_backend_that_restarts_after_an_update_is_fenced_until_the_next(
    sims: list[SimProcess], gateway: Start
) -> None:
    """It is healthy, and has the checkpoint's weights. The next update names it: it is not in the group any more."""
    started = gateway(sims)
    calls(started, INIT)
    whole(started)
    sims[1].kill()
    eventually(lambda: started.backend(sims[1])["health"] == "down")
    sims[1].restart()
    eventually(lambda: started.backend(sims[1])["health"] == "up")
    eventually(lambda: "it reports weights 'default'" in started.backend(sims[1])["reason"])
    assert {through(started) == own(sims[0]) for _ in range(4)} == {True}
    differ = started.client.get("/weight_info")
    assert differ.status_code == 409
    messages = {url: result["message"] for url, result in differ.json()["results"].items()}
    assert messages[sims[1].url] == "has 'default'"
    answer = call(started, BEGIN)
    assert answer.status_code == 502
    assert "was restarted" in answer.json()["results"][sims[1].url]["message"]
    assert received(sims, BEGIN) == [1, 0]
    calls(started, INIT)
    whole(started)
    assert own(sims[0]) == own(sims[1]) == through(started)
    assert started.client.get("/weight_info").status_code == 200


def test_a_backend_that_is_down_fails_the_calls_by_name(sims: list[SimProcess], gateway: Start) -> None:
    """A trainer must not believe that all have done as they were told."""
    started = gateway(sims)
    sims[1].kill()
    for path in ("/pause", "/resume", "/reset_prefix_cache", "/abort_requests", "/update_weight_version"):
        answer = call(started, path, {"new_version": "x"} if path == "/update_weight_version" else {})
        assert results(answer, sims) == [(True, 200), (False, None)]
        assert "connection refused" in answer.json()["results"][sims[1].url]["message"]
    assert started.client.get("/is_paused").status_code == 502
    assert call(started, INIT).status_code == 502
    assert started.client.get("/get_world_size").json() == {"world_size": 1}


# Around it


def test_what_goes_to_everybody_goes_to_everybody_once(
    sims: list[SimProcess], gateway: Start, background: Background
) -> None:
    started = gateway(sims)
    running = [background(call, started, COMPLETIONS, LONG) for _ in range(2)]
    eventually(lambda: [sim.state()["running"] for sim in sims] == [1, 1])
    answer = call(started, "/abort_requests", {})
    assert (answer.status_code, answer.json()["status"]) == (200, "aborted")
    assert [request.result().json()["choices"][0]["finish_reason"] for request in running] == ["abort", "abort"]
    answer = call(started, "/update_weight_version", {"new_version": "v9"})
    assert (answer.status_code, answer.json()["success"]) == (200, True)
    assert versions(sims) == ["v9", "v9"]
    assert started.client.get("/weight_info").json() == {"weight_version": "v9"}
    assert [received(sims, path) for path in ("/abort_requests", "/update_weight_version")] == [[1, 1], [1, 1]]
    sims[1].faults("false_reset")
    answer = call(started, "/reset_prefix_cache")
    assert results(answer, sims) == [(True, 200), (False, 200)]
    assert "the prefix cache was not reset" in answer.json()["results"][sims[1].url]["message"]


def test_a_version_that_was_given_afterwards_is_in_the_books_as_well(sims: list[SimProcess], gateway: Start) -> None:
    """A server whose connection broke proves with it that it is the same still."""
    started = gateway(sims, fail_eject_threshold=9)
    calls(started, INIT)
    whole(started)
    assert call(started, "/update_weight_version", {"new_version": "step-7"}).status_code == 200
    assert started.client.get("/pool/stats").json()["weight_version"] == "step-7"
    assert {b["model_version"] for b in started.backends()} == {"step-7"}
    for sim in sims:
        sim.faults("reset", endpoints=["completions"], times=1)
    assert call(started, COMPLETIONS, SHORT).status_code == 502
    eventually(lambda: not reasons(started))


def test_weight_info_names_a_backend_that_does_not_tell(sims: list[SimProcess], gateway: Start) -> None:
    """Also when nobody does."""
    started = gateway(sims)
    for failing in (sims[1:], sims):
        for sim in failing:
            sim.faults("status", status=500, endpoints=["weight_info"])
        answer = started.client.get("/weight_info")
        assert answer.status_code == 502
        told = {url: result["ok"] for url, result in answer.json()["results"].items()}
        assert told == {sim.url: sim not in failing for sim in sims}


def test_a_group_that_was_shut_down_takes_no_update(sims: list[SimProcess], gateway: Start) -> None:
    """Until it is made anew."""
    started = gateway(sims)
    calls(started, INIT)
    answer = call(started, "/shutdown_weight_transfer_engine")
    assert (answer.status_code, answer.json()["message"]) == (200, "Weight transfer engine shut down")
    assert [sim.state()["communicator"] for sim in sims] == [False, False]
    answer = call(started, BEGIN)
    assert answer.status_code == 502
    assert received(sims, BEGIN) == [0, 0]
    assert through(started) == own(sims[0])
    calls(started, INIT)
    whole(started)
