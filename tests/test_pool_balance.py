"""Where work goes, and what waits."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from conftest import ask, eventually, received

from trl_pool import (
    ConfigurationError,
    NoBackendAvailableError,
    OverloadedError,
    RolloutTimeoutError,
    UnknownBackendError,
    VLLMClientPool,
)
from trl_pool.sim import SimProcess

Fleet = Callable[[int], list[SimProcess]]
MakePool = Callable[..., VLLMClientPool]
Background = Callable[..., Future[Any]]

PROMPTS = [f"prompt {i}" for i in range(12)]


def served(pool: VLLMClientPool) -> list[int]:
    return [b.prompts for b in pool.statistics().backends]


# Splitting


@pytest.mark.parametrize(("count", "shares"), [(64, [16] * 4), (10, [2, 2, 3, 3]), (3, [0, 1, 1, 1])])
def test_a_batch_is_spread_evenly_in_one_request_per_server(
    fleet: Fleet, make_pool: MakePool, count: int, shares: list[int]
) -> None:
    sims = fleet(4)
    pool = make_pool(sims)
    pool.generate([f"a prompt of a batch, number {i}" for i in range(count)], n=2)
    assert sorted(served(pool)) == shares
    assert sorted(received(sims)) == [min(share, 1) for share in shares]


def test_equal_prompts_are_spread_as_evenly_as_different_ones(fleet: Fleet, make_pool: MakePool) -> None:
    pool = make_pool(fleet(4))
    pool.generate(["the same prompt"] * 32)
    assert served(pool) == [8] * 4


def test_a_prompt_comes_back_to_the_server_that_has_its_prefix(fleet: Fleet, make_pool: MakePool) -> None:
    pool = make_pool(fleet(4), prompt_sticky_prefix_chars=10)
    for i in range(5):
        pool.generate([f"0123456789 and then {i}"])
    assert sorted(served(pool)) == [0, 0, 0, 5]


def test_load_that_is_out_already_is_evened_out(fleet: Fleet, make_pool: MakePool, background: Background) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    for sim in sims:
        sim.faults("slow", seconds=0.5, times=1)
    first = background(pool.generate, ["alone"], n=8, session_id="s")
    busy = eventually(lambda: [b for b in pool.statistics().backends if b.load])[0]
    assert (busy.inflight, busy.load) == (1, 8)
    pool.generate([f"prompt {i}" for i in range(8)])
    first.result()
    assert sorted(served(pool)) == [1, 8], "eight completions weigh as much as eight prompts"


def test_unsplit_requests_go_as_a_whole_to_the_server_of_their_first_prompt(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(4)
    pool = make_pool(sims, split_batches=False)
    for i in range(4):
        prompts = ["first", *(f"{i} {k}" for k in range(6))]
        assert pool.generate(prompts) == ask(sims[0], "generate", prompts=prompts)
    assert sorted(served(pool)) == [0, 0, 0, 28]
    for i in range(30):
        pool.generate([f"another {i}"])
    assert all(served(pool))


def test_an_unsplit_request_leaves_its_server_when_that_has_more_than_its_share(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = fleet(2)
    pool = make_pool(sims, split_batches=False)
    for sim in sims:
        sim.faults("slow", seconds=0.4)
    calls = [background(pool.generate, ["the same first prompt"], n=8) for _ in range(4)]
    for call in calls:
        call.result()
    assert all(served(pool))


# Sessions


def test_a_session_stays_on_its_server_and_sessions_are_spread(fleet: Fleet, make_pool: MakePool) -> None:
    pool = make_pool(fleet(4))
    for i in range(5):
        pool.generate([f"turn {i}", "and another"], session_id="one conversation")
    assert sorted(served(pool)) == [0, 0, 0, 10]
    for i in range(20):
        pool.chat([[{"role": "user", "content": "hello"}]], session_id=f"conversation {i}")
    assert all(served(pool))


def test_the_pools_own_session_id_is_the_default(fleet: Fleet, make_pool: MakePool) -> None:
    pool = make_pool(fleet(3), session_id="mine")
    for i in range(5):
        pool.generate([f"turn {i}"])
    assert sorted(served(pool)) == [0, 0, 5]
    for i in range(20):
        pool.generate(["hello"], session_id=f"yours {i}")
    assert all(served(pool))


def test_a_session_outlives_its_server(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(3)
    pool = make_pool(sims)
    expected = ask(sims[0], "generate", prompts=PROMPTS)
    assert pool.generate(PROMPTS, session_id="s") == expected
    home = next(sim for sim in sims for b in pool.statistics().backends if b.name == sim.name and b.prompts)
    home.kill()
    assert pool.generate(PROMPTS, session_id="s") == expected
    home.restart()
    eventually(lambda: all(b.eligible for b in pool.statistics().backends))
    before = served(pool)
    pool.generate(["back home"], session_id="s")
    assert served(pool)[sims.index(home)] == before[sims.index(home)] + 1


# Limits and the queue


def test_a_server_never_has_more_requests_than_its_limit(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = fleet(2)
    pool = make_pool(sims, max_inflight_per_backend=2)
    for sim in sims:
        sim.faults("slow", seconds=0.1)
    calls = [background(pool.generate, [f"prompt {i}"]) for i in range(12)]
    assert all(len(call.result()["completion_ids"]) == 1 for call in calls)
    assert max(sim.state()["max_in_flight"] for sim in sims) == 2
    assert sum(served(pool)) == 12
    assert pool.statistics().waiting == 0


def test_what_has_to_wait_waits_in_line_until_its_deadline(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = fleet(1)
    pool = make_pool(sims, max_inflight_per_backend=1, total_timeout=0.7)
    # Scoring that hangs keeps its lane after its caller's deadline, so nothing becomes free at the last moment.
    sims[0].faults("hang", endpoints=["get_sequence_logprobs"], times=1)
    first = background(pool.get_sequence_logprobs, [[1, 2, 3]], [1], top_logprobs=1)
    eventually(lambda: pool.statistics().backends[0].inflight)
    started = time.monotonic()
    with pytest.raises(RolloutTimeoutError, match="never sent"):
        pool.generate(["second"])
    assert 0.6 < time.monotonic() - started < 1.5
    assert isinstance(first.exception(), RolloutTimeoutError)
    assert (pool.statistics().waiting, pool.statistics().backends[0].inflight) == (0, 0)


def test_a_full_queue_turns_new_calls_away_at_once(fleet: Fleet, make_pool: MakePool, background: Background) -> None:
    sims = fleet(1)
    pool = make_pool(sims, max_inflight_per_backend=1, max_queue=1)
    sims[0].faults("slow", seconds=0.5, times=1)
    first = background(pool.generate, ["first"])
    eventually(lambda: pool.statistics().backends[0].inflight)
    second = background(pool.generate, ["second"])
    eventually(lambda: pool.statistics().waiting)
    with pytest.raises(OverloadedError, match="max_queue=1") as caught:
        pool.generate(["third"])
    assert caught.value.retry_after >= 1
    assert len(first.result()["prompt_ids"]) == len(second.result()["prompt_ids"]) == 1
    pool.generate(["fourth"])


def test_a_new_call_waits_no_longer_than_queue_timeout(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = fleet(1)
    pool = make_pool(sims, max_inflight_per_backend=1, queue_timeout=0.2)
    sims[0].faults("slow", seconds=0.8, times=1)
    first = background(pool.generate, ["first"])
    eventually(lambda: pool.statistics().backends[0].inflight)
    with pytest.raises(OverloadedError, match="queue_timeout"):
        pool.generate(["second"])
    first.result()


@pytest.mark.parametrize("limit", [{"max_queue": 1}, {"queue_timeout": 0.05}], ids=str)
def test_the_chunks_of_a_call_under_way_are_no_new_calls(
    fleet: Fleet, make_pool: MakePool, limit: dict[str, Any]
) -> None:
    sims = fleet(2)
    pool = make_pool(sims, **limit)
    for sim in sims:
        sim.faults("slow", seconds=0.02)
    sequences = [[1, 2, i] for i in range(20)]
    found = pool.get_sequence_logprobs(sequences, [1] * 20, top_logprobs=1, chunk_size=1, max_concurrent_requests=1)
    assert len(found["logprobs"]) == 20


# Busy


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks_and_no_failure_is_counted(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(2)
    pool = make_pool(sims, fail_eject_threshold=1)
    sims[0].faults("busy", retry_after=30, times=1)
    for _ in range(3):
        assert len(pool.generate(PROMPTS)["prompt_ids"]) == 12
    assert received(sims) == [1, 4]
    assert [(b.failures, b.ejections, b.breaker) for b in pool.statistics().backends] == [(0, 0, "closed")] * 2


def test_when_all_are_busy_a_call_waits_as_long_as_they_ask(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    for sim in sims:
        sim.faults("busy", retry_after=0.5, times=1)
    started = time.monotonic()
    assert len(pool.generate(PROMPTS)["prompt_ids"]) == 12
    assert 0.4 < time.monotonic() - started < 3


def test_a_server_that_is_busy_for_ever_is_not_hammered(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims, total_timeout=0.8)
    for sim in sims:
        sim.faults("busy", retry_after=0)
    with pytest.raises(RolloutTimeoutError):
        pool.generate(["prompt"])
    assert sum(received(sims)) < 20


# Lanes


def test_scoring_and_generating_never_meet_on_a_server(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    for sim in sims:
        sim.faults("slow", seconds=0.02)
    expected = ask(sims[0], "generate", prompts=PROMPTS)
    sequences = [[1, 2, i] for i in range(12)]
    calls = []
    for _ in range(6):
        calls.append(background(pool.generate, PROMPTS))
        calls.append(background(pool.get_sequence_logprobs, sequences, [1] * 12, top_logprobs=1, chunk_size=2))
    scores = pool.get_sequence_logprobs(sequences, [1] * 12, top_logprobs=1)
    assert all(call.result() == (scores if i % 2 else expected) for i, call in enumerate(calls))
    assert [sim.state()["mixed"] for sim in sims] == [0, 0]


def test_a_scoring_call_that_timed_out_keeps_generations_off_its_server_until_it_is_answered(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(2)
    pool = make_pool(sims, request_timeout=0.3)
    sims[0].faults("slow", seconds=1.5, endpoints=["get_sequence_logprobs"], times=1)
    sequences = [[1, 2, i] for i in range(8)]
    assert len(pool.get_sequence_logprobs(sequences, [1] * 8, top_logprobs=1)["logprobs"]) == 8
    for _ in range(3):
        pool.generate(PROMPTS)
    assert received(sims) == [0, 3]
    eventually(lambda: sims[0].state()["in_flight"] == 0)
    eventually(lambda: pool.generate(PROMPTS) and received(sims)[0])
    assert [sim.state()["mixed"] for sim in sims] == [0, 0]


def test_a_scoring_call_has_no_more_requests_on_a_server_than_asked_for(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    for sim in sims:
        sim.faults("slow", seconds=0.05)
    sequences = [[1, 2, i] for i in range(24)]
    for limit in (1, 3):
        for sim in sims:
            sim.forget()
        pool.get_sequence_logprobs(sequences, [1] * 24, top_logprobs=1, chunk_size=2, max_concurrent_requests=limit)
        assert [sim.state()["max_in_flight"] for sim in sims] == [limit] * 2
        assert sum(received(sims, "get_sequence_logprobs")) == 12


# Membership


def test_a_server_can_be_added_and_removed(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(3)
    pool = make_pool(sims[:2])
    name = pool.add_backend(sims[2].url)
    assert name == sims[2].name
    pool.generate(PROMPTS)
    assert received(sims) == [1, 1, 1]
    pool.remove_backend(name)
    pool.generate(PROMPTS)
    assert received(sims) == [2, 2, 1]
    assert [b.name for b in pool.statistics().backends] == [sim.name for sim in sims[:2]]
    with pytest.raises(UnknownBackendError, match="no backend"):
        pool.remove_backend(name)
    with pytest.raises(ConfigurationError, match="already"):
        pool.add_backend(sims[0].url + "/")


def test_a_server_that_is_added_before_it_is_up_joins_when_it_is(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims[:1])
    sims[1].kill()
    pool.add_backend(sims[1].url)
    assert [b.eligible for b in pool.statistics().backends] == [True, False]
    sims[1].restart()
    eventually(lambda: all(b.eligible for b in pool.statistics().backends))


def test_a_server_that_drains_ends_what_it_has_and_gets_nothing_new(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    for sim in sims:
        sim.faults("slow", seconds=0.5, times=1)
    step = background(pool.generate, PROMPTS)
    eventually(lambda: all(sim.state()["in_flight"] for sim in sims))
    removal = background(pool.remove_backend, sims[1].url)
    eventually(lambda: pool.statistics().backends[1].draining)
    assert "draining" in repr(pool)
    pool.generate(["more"])
    assert len(step.result()["prompt_ids"]) == 12
    removal.result()
    assert received(sims) == [2, 1]
    assert [b.failovers for b in pool.statistics().backends] == [0]


def test_a_server_that_is_removed_without_draining_loses_nothing(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    expected = ask(sims[0], "generate", prompts=PROMPTS)
    sims[1].faults("hang", endpoints=["generate"])
    step = background(pool.generate, PROMPTS)
    eventually(lambda: sims[1].state()["in_flight"])
    pool.remove_backend(sims[1].url, drain=False)
    assert step.result() == expected


def test_draining_is_bounded(fleet: Fleet, make_pool: MakePool, background: Background) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    sims[1].faults("hang", endpoints=["generate"])
    step = background(pool.generate, PROMPTS)
    eventually(lambda: sims[1].state()["in_flight"])
    with pytest.raises(TimeoutError):
        pool.drain_backend(sims[1].url, timeout=0.1)
    assert pool.statistics().backends[1].draining
    pool.remove_backend(sims[1].url, timeout=0.1)
    assert len(step.result()["prompt_ids"]) == 12


def test_the_last_server_can_be_removed_and_the_error_then_says_so(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(1)
    pool = make_pool(sims, backend_wait_seconds=0.1)
    pool.remove_backend(sims[0].name)
    with pytest.raises(NoBackendAvailableError, match="the pool has no backends"):
        pool.generate(PROMPTS)


# What can be seen


def test_statistics_are_a_frozen_picture(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    before = pool.statistics()
    pool.generate(PROMPTS)
    after = pool.statistics()
    assert [b.prompts for b in before.backends] == [0, 0]
    assert [(b.requests, b.prompts, b.failures, b.inflight) for b in after.backends] == [(1, 6, 0, 0)] * 2
    assert all(b.eligible and not b.reason and b.health == "up" and b.breaker == "closed" for b in after.backends)
    assert all(b.latency is not None and b.latency > 0 for b in after.backends)
    assert (after.waiting, after.gate) == (0, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        after.waiting = 3  # type: ignore[misc]


def test_the_repr_tells_who_is_eligible_and_why_others_are_not(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    assert repr(pool).startswith("<VLLMClientPool 2 of 2 backends eligible, weights ")
    assert f"{sims[0].name} up, 0 in flight" in repr(pool)
    sims[1].kill()
    eventually(lambda: "1 of 2 backends eligible" in repr(pool))
    assert f"{sims[1].name} is down (connection refused), 0 in flight" in repr(pool)


@pytest.mark.parametrize("by", ["argument", "setting"])
def test_progress_is_shown_if_asked_for(
    fleet: Fleet, make_pool: MakePool, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    pool = make_pool(fleet(2), progress=by == "setting")
    pool.generate(PROMPTS, progress=True if by == "argument" else None)
    assert "12" in capsys.readouterr().err
    pool.generate(PROMPTS, progress=False)
    pool.get_sequence_logprobs([[1, 2]], [1], top_logprobs=1, progress=False)
    assert capsys.readouterr().err == ""
