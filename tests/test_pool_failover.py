"""What fails on one server is served by another, and what cannot be is named."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import requests
from conftest import ask, eventually, received

from trl_pool import (
    InvalidRequestError,
    NoBackendAvailableError,
    RequestRejectedError,
    RolloutError,
    RolloutTimeoutError,
    VLLMClientPool,
)
from trl_pool.errors import Outcome
from trl_pool.sim import SimProcess

Fleet = Callable[[int], list[SimProcess]]
MakePool = Callable[..., VLLMClientPool]
Background = Callable[..., Future[Any]]

PROMPTS = [f"prompt {i}" for i in range(12)]


def stats(pool: VLLMClientPool, sim: SimProcess) -> Any:
    return next(b for b in pool.statistics().backends if b.name == sim.name)


def subset(answer: dict[str, Any], indices: list[int]) -> dict[str, Any]:
    return {name: [values[i] for i in indices] for name, values in answer.items()}


# Each fault once, on real sockets


@pytest.mark.parametrize(
    ("fault", "failures"),
    [
        ({"kind": "slow", "seconds": 0.3}, 0),
        ({"kind": "busy", "retry_after": 0}, 0),
        ({"kind": "status", "status": 503, "retry_after": 0}, 0),
        ({"kind": "status", "status": 500}, 1),
        ({"kind": "status", "status": 502}, 1),
        ({"kind": "status", "status": 503}, 1),
        ({"kind": "reset"}, 1),
        ({"kind": "reset", "after_bytes": -1}, 1),
        ({"kind": "reset", "after_bytes": 0}, 1),
        ({"kind": "cut_json"}, 1),
        ({"kind": "invalid_json"}, 1),
        ({"kind": "wrong_count"}, 1),
        ({"kind": "hang"}, 1),
        ({"kind": "dead_worker"}, 1),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("work", ["generate", "get_sequence_logprobs"])
def test_a_fault_of_one_server_changes_nothing_in_the_answer(
    fleet: Fleet, make_pool: MakePool, fault: dict[str, Any], failures: int, work: str
) -> None:
    sims = fleet(3)
    pool = make_pool(sims, request_timeout=0.6 if fault["kind"] in ("hang", "dead_worker") else 10)
    sims[1].faults(times=1, **fault)
    if work == "generate":
        assert pool.generate(PROMPTS, n=2) == ask(sims[0], "generate", prompts=PROMPTS, n=2)
    else:
        sequences, lengths = [[i, 2, 3] for i in range(12)], [1] * 12
        expected = ask(sims[0], "get_sequence_logprobs", sequences=sequences, prompt_lengths=lengths, top_logprobs=2)
        found = pool.get_sequence_logprobs(sequences, lengths, top_logprobs=2, use_binary=False)
        assert found == {name: expected[name] for name in ("logprobs", "logprob_token_ids")}
    assert [b.failures for b in pool.statistics().backends] == [0, failures, 0]
    assert [b.ejections for b in pool.statistics().backends] == [0, 0, 0]


def test_a_server_that_refuses_connections_for_a_while_is_passed_over_and_used_again(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(3)
    pool = make_pool(sims)
    expected = ask(sims[0], "generate", prompts=PROMPTS)
    sims[1].faults("refuse")
    assert pool.generate(PROMPTS) == expected
    eventually(lambda: stats(pool, sims[1]).health == "down")
    assert "connection refused" in stats(pool, sims[1]).reason
    sims[1].clear_faults()
    eventually(lambda: stats(pool, sims[1]).eligible)
    before = stats(pool, sims[1]).prompts
    assert pool.generate(PROMPTS) == expected
    assert stats(pool, sims[1]).prompts == before + 4


def test_a_kept_connection_that_breaks_at_once_is_replaced_on_the_same_server_without_a_charge(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(2)
    pool = make_pool(sims, fail_eject_threshold=1)
    pool.generate(["warm up"], session_id="s")
    home = max(sims, key=lambda sim: sim.state()["endpoints"]["generate"]["received"])
    home.faults("reset", after_bytes=-1, times=1)
    pool.generate(["again"], session_id="s")
    assert stats(pool, home).prompts == 2
    assert (stats(pool, home).failures, stats(pool, home).failovers, stats(pool, home).ejections) == (0, 0, 0)


def test_connections_closed_by_an_idle_server_go_unnoticed(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    for _ in range(3):
        pool.generate(PROMPTS)
        for sim in sims:
            sim.faults("drop_idle")
    assert all(b.failures == b.failovers == 0 for b in pool.statistics().backends)


def test_a_server_killed_in_mid_step_loses_nothing_and_is_in_use_again_after_its_restart(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = fleet(3)
    pool = make_pool(sims)
    expected = ask(sims[0], "generate", prompts=PROMPTS, n=2)
    for sim in sims:
        sim.faults("slow", seconds=0.4)
    step = background(pool.generate, PROMPTS, n=2)
    eventually(lambda: sims[2].state()["in_flight"])
    sims[2].kill()
    assert step.result() == expected
    eventually(lambda: stats(pool, sims[2]).health == "down")
    assert stats(pool, sims[2]).failovers == 4
    sims[2].restart()
    eventually(lambda: stats(pool, sims[2]).eligible)
    assert pool.generate(PROMPTS, n=2) == expected
    assert stats(pool, sims[2]).prompts == 4


# Poison


def test_a_poison_prompt_costs_two_servers_at_most_and_is_named_with_what_it_did(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(4)
    prompts = [f"prompt {i}" for i in range(40)]
    expected = ask(sims[0], "generate", prompts=prompts)
    prompts[13] = "far too long " * 400
    pool = make_pool(sims, request_timeout=0.8)
    with pytest.raises(RolloutError) as caught:
        pool.generate(prompts)
    error = caught.value
    assert sum(sim.state()["poisoned"] for sim in sims) <= 2
    assert 13 in error.failed
    assert len(error.failed) <= 3, "it took too many innocent ones with it"
    for attempts in error.failed.values():
        assert [a.outcome for a in attempts] == [Outcome.TIMED_OUT] * 2
        assert len({a.backend for a in attempts}) == 2
    assert sorted([*error.completed, *error.failed]) == list(range(40))
    assert error.result == subset(expected, error.completed)
    assert error.timed_out
    assert isinstance(error, requests.ConnectionError)
    first = error.failed[13][0]
    assert f"{first.backend} timed out after" in str(error)
    assert f"prompts {min(error.failed)}" in str(error)


def test_prompts_that_do_not_fit_are_refused_by_index_before_anything_is_sent(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(2)
    pool = make_pool(sims, max_model_len=8, vocab_size=300)
    prompts = [[1] * 7, [1] * 8, [2], [3] * 9]
    with pytest.raises(ValueError, match="indices 1, 3") as caught:
        pool.generate(prompts)
    assert caught.value.indices == [1, 3]  # type: ignore[attr-defined]
    with pytest.raises(InvalidRequestError, match="index 1"):
        pool.get_sequence_logprobs([[1], [1] * 8], [0, 0], top_logprobs=1)
    with pytest.raises(InvalidRequestError, match="outside 0-299 at index 0"):
        pool.generate([[300]])
    assert received(sims) == received(sims, "get_sequence_logprobs") == [0, 0]
    pool.generate([[1] * 7])


@pytest.mark.parametrize(
    "arguments",
    [
        {"n": 0},
        {"n": -1},
        {"n": 20_000},
        {"n": 4, "temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": 2.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -2},
        {"min_p": 2.0},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"logprobs": -2},
        {"logprobs": -1},
        {"logprobs": 21},
        {"structured_outputs_regex": "("},
        {"generation_kwargs": {"max_token": 3}},
        {"generation_kwargs": {"temperature": -1}},
        {"generation_kwargs": {"min_tokens": 17}},
        {"generation_kwargs": {"presence_penalty": 3}},
        {"prompts": [""]},
        {"prompts": [[]]},
        {"prompts": [[1], []]},
        {"prompts": [[-1]]},
        {"prompts": ["text", [1]]},
        {"prompts": [1, 2]},
        {"images": [None, None]},
    ],
    ids=str,
)
def test_arguments_that_a_server_answers_with_500_or_dies_of_are_refused(
    fleet: Fleet, make_pool: MakePool, arguments: dict[str, Any]
) -> None:
    sims = fleet(1)
    with pytest.raises(ValueError):  # noqa: PT011 (the point is that it is one)
        make_pool(sims).generate(**{"prompts": ["text"], **arguments})
    assert received(sims) == [0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"top_logprobs": -1},
        {"top_logprobs": 21},
        {"prompt_lengths": [1, 1]},
        {"prompt_lengths": [4]},
        {"prompt_lengths": [-1]},
        {"sequences": [[]], "prompt_lengths": [0]},
        {"chunk_size": -1},
        {"max_concurrent_requests": 0},
    ],
    ids=str,
)
def test_scoring_arguments_that_kill_a_server_are_refused(
    fleet: Fleet, make_pool: MakePool, arguments: dict[str, Any]
) -> None:
    sims = fleet(1)
    given = {"sequences": [[1, 2, 3]], "prompt_lengths": [1], "top_logprobs": 2, **arguments}
    with pytest.raises(ValueError):  # noqa: PT011
        make_pool(sims).get_sequence_logprobs(**given)
    assert received(sims, "get_sequence_logprobs") == [0]


# What is charged to whom


def test_one_call_charges_a_server_once_and_the_third_failing_call_ejects_it(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(3)
    pool = make_pool(sims, fail_eject_threshold=3)
    sims[1].faults("status", status=502, endpoints=["generate"])
    for _ in range(2):
        pool.generate(PROMPTS)
    assert stats(pool, sims[1]).ejections == 0
    pool.generate(PROMPTS)
    assert (stats(pool, sims[1]).ejections, stats(pool, sims[1]).breaker) == (1, "open")
    assert "ejected for" in stats(pool, sims[1]).reason
    assert "ejected for" in repr(pool)
    sent = received(sims)[1]
    pool.generate(PROMPTS)
    assert received(sims)[1] == sent, "an ejected server gets nothing"


def test_a_call_that_fails_on_a_server_many_times_charges_it_once(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims, fail_eject_threshold=2)
    for sim in sims:
        sim.faults("status", status=502)
    with pytest.raises(RolloutError):
        pool.generate(PROMPTS)
    assert all(b.failures > 2 for b in pool.statistics().backends)
    assert [b.breaker for b in pool.statistics().backends] == ["closed", "closed"]


def test_a_500_that_others_do_not_give_is_charged_to_the_server(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(3)
    pool = make_pool(sims, fail_eject_threshold=1)
    sims[1].faults("status", status=500, endpoints=["generate"])
    pool.generate(PROMPTS)
    assert [b.ejections for b in pool.statistics().backends] == [0, 1, 0]


def test_a_500_that_all_give_is_charged_to_nobody(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(3)
    pool = make_pool(sims, fail_eject_threshold=1)
    for sim in sims:
        sim.faults("status", status=500)
    with pytest.raises(RolloutError, match="500, Internal Server Error") as caught:
        pool.generate(["one prompt"])
    assert [a.outcome for a in caught.value.attempts] == [Outcome.SERVER_ERROR] * 3
    assert len({a.backend for a in caught.value.attempts}) == 3
    assert [b.ejections for b in pool.statistics().backends] == [0, 0, 0]


def test_a_4xx_goes_nowhere_else_and_is_charged_to_nobody(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(3)
    pool = make_pool(sims, fail_eject_threshold=1)
    for sim in sims:
        sim.faults("status", status=422)
    with pytest.raises(RequestRejectedError, match="Request failed: 422") as caught:
        pool.generate(["one prompt"])
    assert caught.value.status == 422
    assert sum(received(sims)) == 1
    assert [(b.ejections, b.inflight) for b in pool.statistics().backends] == [(0, 0)] * 3


def test_an_ejected_server_is_tried_again_with_one_request_after_its_cooldown(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(2)
    pool = make_pool(sims, fail_eject_threshold=1, cooldown_seconds=0.5)
    sims[0].faults("status", status=502, times=1)
    pool.generate(PROMPTS)
    assert stats(pool, sims[0]).ejections == 1
    eventually(lambda: stats(pool, sims[0]).breaker == "half-open")
    pool.generate(PROMPTS)
    assert stats(pool, sims[0]).breaker == "closed"


def test_the_last_server_is_never_ejected(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(1)
    pool = make_pool(sims, fail_eject_threshold=1)
    sims[0].faults("status", status=502, times=2)
    pool.generate(PROMPTS)
    assert stats(pool, sims[0]).prompts == 12


def test_the_rounds_of_a_call_are_bounded(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims, max_attempts=3)
    for sim in sims:
        sim.faults("status", status=503)
    with pytest.raises(RolloutError) as caught:
        pool.generate(["one prompt"])
    assert len(caught.value.attempts) == 3 == sum(received(sims))
    assert all(dataclasses.asdict(a)["prompts"] == 1 for a in caught.value.attempts)


# Busy is not down


def test_a_generation_of_many_health_intervals_is_never_taken_for_a_dead_server(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    """A `trl` server answers no probe while it generates."""
    sims = fleet(2)
    pool = make_pool(sims, health_interval=0.05, health_timeout=0.2, fail_eject_threshold=1)
    for sim in sims:
        sim.faults("slow", seconds=1.5)
    step = background(pool.generate, PROMPTS)
    eventually(lambda: all(sim.state()["in_flight"] for sim in sims))
    seen = set()
    while not step.done():
        seen |= {(b.health, b.breaker) for b in pool.statistics().backends}
    assert seen == {("up", "closed")}
    assert len(step.result()["prompt_ids"]) == 12
    assert all(b.failures == b.ejections == b.failovers == 0 for b in pool.statistics().backends)


def test_a_server_that_is_silent_without_work_of_ours_is_chosen_last(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims, health_timeout=0.1)
    sims[0].faults("hang", endpoints=["health"])
    eventually(lambda: stats(pool, sims[0]).health == "suspect")
    pool.generate(PROMPTS)
    assert received(sims) == [0, 1]
    sims[1].kill()
    eventually(lambda: stats(pool, sims[1]).health == "down")
    assert len(pool.generate(PROMPTS)["prompt_ids"]) == 12


def test_a_suspect_server_is_ejected_by_its_next_failure(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(1)
    pool = make_pool(sims, health_timeout=0.1, fail_eject_threshold=3, request_timeout=0.3, max_attempts=1)
    sims[0].faults("hang")
    sims[0].faults("hang", endpoints=["health"])
    eventually(lambda: stats(pool, sims[0]).health == "suspect")
    with pytest.raises(RolloutError):
        pool.generate(["one prompt"])
    assert stats(pool, sims[0]).ejections == 1


# The end of hope


def test_with_all_servers_down_the_error_says_why_for_each(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims, backend_wait_seconds=0.2)
    for sim in sims:
        sim.kill()
    eventually(lambda: not any(b.eligible for b in pool.statistics().backends))
    with pytest.raises(NoBackendAvailableError, match="No backend available") as caught:
        pool.generate(PROMPTS)
    assert set(caught.value.reasons) == {sim.url for sim in sims}
    assert all("connection refused" in reason for reason in caught.value.reasons.values())
    assert isinstance(caught.value, requests.ConnectionError)


def test_a_call_waits_for_a_server_to_come_back(fleet: Fleet, make_pool: MakePool, background: Background) -> None:
    sims = fleet(1)
    pool = make_pool(sims, backend_wait_seconds=20)
    sims[0].kill()
    eventually(lambda: stats(pool, sims[0]).health == "down")
    step = background(pool.generate, PROMPTS)
    eventually(lambda: pool.statistics().waiting == 1)
    sims[0].restart()
    assert len(step.result()["prompt_ids"]) == 12


def test_the_deadline_of_a_call_holds_and_the_answers_that_came_are_in_the_error(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(3)
    expected = ask(sims[0], "generate", prompts=PROMPTS)
    pool = make_pool(sims, total_timeout=0.6)
    sims[1].faults("hang", endpoints=["generate"])
    started = time.monotonic()
    with pytest.raises(RolloutTimeoutError, match=r"total_timeout of 0\.6 s") as caught:
        pool.generate(PROMPTS)
    assert time.monotonic() - started < 2
    assert isinstance(caught.value, requests.Timeout)
    assert isinstance(caught.value, requests.ConnectionError)
    assert len(caught.value.failed) == 4
    assert caught.value.result == subset(expected, caught.value.completed)
    assert stats(pool, sims[1]).ejections == 0


def test_every_attempt_is_in_the_error(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    for sim in sims:
        sim.faults("reset")
    with pytest.raises(RolloutError) as caught:
        pool.generate(["one prompt"])
    attempts = caught.value.attempts
    assert {a.backend for a in attempts} == {sim.url for sim in sims}
    assert all(a.outcome is Outcome.LOST and a.prompts == 1 and a.seconds >= 0 for a in attempts)
    assert all(str(a) in str(caught.value) for a in attempts)
    assert caught.value.result is None
    assert caught.value.completed == []
