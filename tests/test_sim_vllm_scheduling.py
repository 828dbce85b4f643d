"""The simulated `vllm serve` over time: requests beside each other, frozen, queued and aborted."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from conftest import eventually
from vllm_sims import (
    CHAT,
    COMPLETIONS,
    SHORT_SECONDS,
    USER,
    Aside,
    aside_calls,
    complete,
    events,
    expected,
    get,
    post,
    started,
    tokens,
    unspoilt,
)

from trl_pool.sim import SimProcess
from trl_pool.sim.engine import Weights, generate, tokenize
from trl_pool.sim.sampling import Sampling

TRAITS: dict[str, dict[str, Any]] = {
    "slow": {"latency_ms": 400},
    "decoding": {"decode_ms_per_token": 20, "prefill_ms_per_token": 10},
}
LONG: dict[str, Any] = {"ignore_eos": True, "max_tokens": 200}  # four seconds on `decoding`


@pytest.fixture(scope="module")
def fleet() -> Iterator[dict[str, SimProcess]]:
    with started(**TRAITS) as sims:
        yield sims


@pytest.fixture
def slow(fleet: dict[str, SimProcess]) -> SimProcess:
    """A server that needs 0.4 seconds for each request."""
    return unspoilt(fleet["slow"])


@pytest.fixture
def sim(fleet: dict[str, SimProcess]) -> SimProcess:
    """A server that needs 20 milliseconds for each token."""
    return unspoilt(fleet["decoding"])


@pytest.fixture
def aside() -> Iterator[Aside]:
    with aside_calls() as send:
        yield send


def running(sim: SimProcess, number: int = 1) -> None:
    eventually(lambda: sim.state()["running"] == number)


@contextmanager
def streamed(sim: SimProcess, prompt: str, **fields: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """The choices of a stream, as they come."""
    body = {"prompt": prompt, "stream": True, "return_token_ids": True, **fields}
    with (
        httpx.Client(trust_env=False, verify=False, timeout=10) as client,
        client.stream("POST", sim.url + COMPLETIONS, json=body) as answer,
    ):
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {"))
        yield (json.loads(line)["choices"][0] for line in lines)


def reasons(answer: dict[str, Any]) -> list[str]:
    return [choice["finish_reason"] for choice in answer["choices"]]


# Beside each other.


def test_probes_are_answered_while_it_generates(slow: SimProcess, aside: Aside) -> None:
    generating = aside(complete, slow)
    running(slow)
    for path in ("/health", "/version", "/v1/models", "/get_world_size", "/weight_info", "/is_paused"):
        assert get(slow, path).status_code == 200
    assert not generating.done()
    assert [choice["token_ids"] for choice in generating.result()["choices"]] == expected("Hello")


def test_requests_run_beside_each_other(slow: SimProcess, aside: Aside) -> None:
    begun = time.monotonic()
    answers = [aside(complete, slow, prompt) for prompt in ("a", "b", "c", "d", "e")]
    running(slow, 5)
    found = [answer.result()["choices"][0]["token_ids"] for answer in answers]
    assert time.monotonic() - begun < 5 * 0.4
    assert found == expected("a", "b", "c", "d", "e")
    state = slow.state()
    assert state["max_in_flight"] == 5
    assert (state["running"], state["in_flight"]) == (0, 0)


def test_latency_follows_the_prompts_and_the_longest_completion(sim: SimProcess) -> None:
    begun = time.monotonic()
    complete(sim, ["abcde", "abcde"], max_tokens=8, ignore_eos=True)
    assert time.monotonic() - begun >= 10 * 0.010 + 8 * 0.020


def test_a_request_ends_with_its_clients_connection(sim: SimProcess) -> None:
    with pytest.raises(httpx.ReadTimeout):
        post(sim, COMPLETIONS, {"prompt": "x", **LONG}, timeout=0.1)
    eventually(lambda: sim.state()["in_flight"] == 0)
    state = sim.state()
    assert (state["running"], state["endpoints"]["completions"]["answered"]) == (0, 0)


def test_a_stream_ends_with_its_clients_connection(sim: SimProcess) -> None:
    with streamed(sim, "x", **LONG) as choices:
        next(choices)
        assert sim.state()["running"] == 1
    eventually(lambda: sim.state()["in_flight"] == 0)
    assert sim.state()["running"] == 0


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": [USER]})])
def test_a_stream_comes_as_it_is_generated(sim: SimProcess, path: str, body: dict[str, Any]) -> None:
    body = {**body, "stream": True, "max_tokens": 25, "ignore_eos": True}
    with (
        httpx.Client(trust_env=False, verify=False, timeout=10) as client,
        client.stream("POST", sim.url + path, json=body) as answer,
    ):
        times = [time.monotonic() for line in answer.iter_lines() if line.startswith("data: {")]
    assert times[-1] - times[0] >= 0.4  # 24 tokens at 20 ms
    eventually(lambda: sim.state()["in_flight"] == 0)
    assert sim.state()["requests"][0]["status"] == 200


# Paused.


def test_keep_freezes_what_runs_and_queues_what_comes(sim: SimProcess, aside: Aside) -> None:
    frozen = aside(complete, sim, "a", **{**LONG, "max_tokens": 25})
    running(sim)
    assert post(sim, "/pause?mode=keep").json() == {"status": "paused"}
    assert get(sim, "/is_paused").json() == {"is_paused": True}
    queued = aside(complete, sim, "b")
    eventually(lambda: sim.state()["waiting"] == 2)
    assert sim.state()["running"] == 0
    assert get(sim, "/health").status_code == 200
    with pytest.raises(TimeoutError):
        frozen.result(timeout=0.6)  # longer than either takes
    assert not queued.done()
    assert post(sim, "/resume").json() == {"status": "resumed"}
    assert get(sim, "/is_paused").json() == {"is_paused": False}
    assert [c["token_ids"] for c in frozen.result()["choices"]] == expected("a", **{**LONG, "max_tokens": 25})
    assert [c["token_ids"] for c in queued.result()["choices"]] == expected("b")


def test_abort_ends_what_runs_and_queues_what_comes(sim: SimProcess, aside: Aside) -> None:
    aborted = aside(complete, sim, ["a", "bb"], **LONG)
    with streamed(sim, "c", **LONG) as choices:
        next(choices)  # so there are tokens by now
        running(sim, 2)
        assert post(sim, "/pause").json() == {"status": "paused"}
        assert list(choices)[-1]["finish_reason"] == "abort"
    assert reasons(aborted.result()) == ["abort", "abort"]
    for found, whole in zip(aborted.result()["choices"], expected("a", "bb", **LONG), strict=True):
        assert len(found["token_ids"]) < 200
        assert found["token_ids"] == whole[: len(found["token_ids"])]
    queued = aside(complete, sim, "c")
    eventually(lambda: sim.state()["waiting"] == 1)
    post(sim, "/resume")
    assert [c["token_ids"] for c in queued.result()["choices"]] == expected("c")


def test_wait_waits_for_what_runs_and_not_for_what_comes(sim: SimProcess, aside: Aside) -> None:
    draining = aside(complete, sim, "a", **{**LONG, "max_tokens": 40})
    running(sim)
    pausing = aside(post, sim, "/pause?mode=wait")
    eventually(lambda: sim.state()["paused"])
    queued = aside(complete, sim, "b")
    eventually(lambda: sim.state()["waiting"] == 1)
    assert not pausing.done()
    assert pausing.result().json() == {"status": "paused"}
    assert reasons(draining.result()) == ["length"]
    assert not queued.done()
    post(sim, "/resume")
    assert [c["token_ids"] for c in queued.result()["choices"]] == expected("b")


def test_wait_does_not_wait_for_the_frozen(sim: SimProcess, aside: Aside) -> None:
    frozen = aside(complete, sim, "a", **{**LONG, "max_tokens": 25})
    running(sim)
    post(sim, "/pause?mode=keep")
    assert post(sim, "/pause?mode=wait").json() == {"status": "paused"}
    assert not frozen.done()
    post(sim, "/resume")
    assert reasons(frozen.result()) == ["length"]


def test_the_old_name_of_wait_still_works(sim: SimProcess, aside: Aside) -> None:
    draining = aside(complete, sim, "a", **{**LONG, "max_tokens": 25})
    running(sim)
    post(sim, "/pause?wait_for_inflight_requests=true")
    assert reasons(draining.result()) == ["length"]


def test_the_frozen_go_on_with_new_weights_where_they_were(sim: SimProcess, aside: Aside) -> None:
    """The async trainers' order: pause, update, resume. Tokens before are from the old weights, later ones are not."""
    group = {"master_address": "h", "master_port": 1, "rank_offset": 1, "world_size": 2}
    post(sim, "/init_weight_transfer_engine", {"init_info": group}).raise_for_status()
    fields = {**LONG, "max_tokens": 40}
    with streamed(sim, "a", **fields) as choices:
        found = [next(choices) for _ in range(5)]
        post(sim, "/pause?mode=keep")
        post(sim, "/start_weight_update", {})
        update = {"names": ["w"], "dtype_names": ["bfloat16"], "shapes": [[2]]}
        post(sim, "/update_weights", {"update_info": update})
        post(sim, "/finish_weight_update", {})
        post(sim, "/resume")
        found += choices
    sampled = [token for choice in found for token in choice["token_ids"]]
    (old,) = expected("a", **fields)
    assert sampled[:5] == old[:5]
    assert sampled != old
    new = Weights(sim.state()["weights"]["digest"])
    sampling = Sampling(max_tokens=40, ignore_eos=True, logprobs=None)
    mixtures = [
        generate([tokenize("a")], sampling, Weights.checkpoint(), later=[(step, new)]).completion_ids[0]
        for step in range(5, 40)
    ]
    assert sampled in mixtures


# Aborted.


def test_abort_requests_ends_all_that_runs_or_waits(sim: SimProcess, aside: Aside) -> None:
    assert post(sim, "/abort_requests", {}).json() == {"status": "aborted", "aborted": 0}
    several = aside(complete, sim, ["a", "b"], n=2, **LONG)
    running(sim)
    streamed = aside(post, sim, COMPLETIONS, {"prompt": "c", "stream": True, **LONG})
    running(sim, 2)
    # Two prompts with two sequences and one parent each, and one sequence without a parent.
    assert post(sim, "/abort_requests", {}).json() == {"status": "aborted", "aborted": 7}
    assert reasons(several.result()) == ["abort"] * 4
    last = events(streamed.result())[-1]["choices"][0]
    assert last["finish_reason"] == "abort"
    post(sim, "/pause?mode=keep")
    queued = aside(complete, sim, "d", **LONG)
    eventually(lambda: sim.state()["waiting"] == 1)
    assert post(sim, "/abort_requests", {}).json()["aborted"] == 1
    assert [(c["finish_reason"], c["token_ids"]) for c in queued.result()["choices"]] == [("abort", [])]


def test_abort_requests_can_name_them(sim: SimProcess, aside: Aside) -> None:
    one = aside(complete, sim, "a", request_id="one", **LONG)
    other = aside(complete, sim, "b", request_id="other", **{**LONG, "max_tokens": 25})
    running(sim, 2)
    post(sim, "/abort_requests", {"request_ids": ["one"]})  # not what the engine calls it
    assert post(sim, "/abort_requests", {"request_ids": ["cmpl-one-0"]}).json() == {"status": "aborted", "aborted": 1}
    assert reasons(one.result()) == ["abort"]
    assert reasons(other.result()) == ["length"]


# The prefix cache.


def test_the_prefix_cache_cannot_be_reset_while_a_request_holds_it(sim: SimProcess, aside: Aside) -> None:
    assert post(sim, "/reset_prefix_cache").json() == {"success": True}
    holding = aside(complete, sim, "a", **{**LONG, "max_tokens": 40})
    running(sim)
    assert post(sim, "/reset_prefix_cache").json() == {"success": False}
    assert post(sim, "/reset_prefix_cache?reset_running_requests=true").json() == {"success": True}
    post(sim, "/pause?mode=keep")
    assert post(sim, "/reset_prefix_cache").json() == {"success": True}
    post(sim, "/resume")
    assert reasons(holding.result()) == ["length"]


def test_nothing_is_left_of_requests_that_are_over(sim: SimProcess) -> None:
    assert tokens(sim) == expected("Hello")
    with pytest.raises(httpx.ReadTimeout):
        post(sim, COMPLETIONS, {"prompt": "x", **LONG}, timeout=SHORT_SECONDS)
    eventually(lambda: sim.state()["in_flight"] == 0)
    state = sim.state()
    assert (state["running"], state["waiting"], state["paused"]) == (0, 0, False)
