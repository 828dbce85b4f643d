"""What follows from things that may mean much or little: a connection that broke, scoring that nobody waits for."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from conftest import Tensor, ask, eventually, received

from trl_pool import RolloutError, RolloutTimeoutError, VLLMClientPool
from trl_pool.sim import SimProcess

Fleet = Callable[..., list[SimProcess]]
MakePool = Callable[..., VLLMClientPool]
Background = Callable[..., "Future[Any]"]

PROMPTS = [f"prompt {i}" for i in range(8)]


def update(pool: VLLMClientPool) -> None:
    pool.update_named_param("a", Tensor())
    pool.reset_prefix_cache()


def state(pool: VLLMClientPool, sim: SimProcess) -> Any:
    return next(backend for backend in pool.statistics().backends if backend.name == sim.name)


def test_a_connection_that_breaks_does_not_cost_a_living_server_its_weights(fleet: Fleet, make_pool: MakePool) -> None:
    """A network that hiccups resets every connection at once; the run must not end of it."""
    sims = fleet(2)
    pool = make_pool(sims)
    pool.init_communicator()
    update(pool)
    for sim in sims:
        sim.faults("reset", endpoints=["generate"], times=1)
    fresh = pool.generate(PROMPTS)
    assert fresh == ask(sims[0], "generate", prompts=PROMPTS)
    eventually(lambda: all(backend.eligible for backend in pool.statistics().backends))
    assert [backend.weight_version for backend in pool.statistics().backends] == [1, 1]
    update(pool)
    assert received(sims, "init_communicator") == [1, 1]  # the groups are the old ones, too


def test_a_server_that_restarts_while_its_connection_breaks_is_not_taken_for_the_old_one(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(2, first_weights=False)
    pool = make_pool(sims)
    pool.init_communicator()
    update(pool)
    sims[1].faults("reset", endpoints=["generate"], times=1)
    sims[1].kill()
    sims[1].restart()
    eventually(lambda: state(pool, sims[1]).health == "up")
    pool.generate(PROMPTS)
    assert "out of sync" in state(pool, sims[1]).reason
    assert received(sims[1:]) == [0]


def test_scoring_that_hangs_blocks_an_update_only_until_it_counts_as_stuck(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2, first_weights=False)
    pool = make_pool(sims, request_timeout=0.3, control_timeout=0.6, drain_timeout=20)
    pool.init_communicator()
    sims[1].faults("dead_worker", endpoints=["get_sequence_logprobs"], times=1)
    pool.get_sequence_logprobs([[1, 2, 3]] * 8, [1] * 8, top_logprobs=1)
    started = time.monotonic()
    update(pool)
    assert time.monotonic() - started < 10
    assert state(pool, sims[0]).weight_version == 1
    assert "stuck" in state(pool, sims[1]).reason
    sims[1].clear_faults()  # it answers at last
    eventually(lambda: "stuck" not in state(pool, sims[1]).reason)
    update(pool)
    assert state(pool, sims[1]).weight_version == 2


def test_what_hung_on_a_process_that_is_gone_holds_its_successor_up_no_longer(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(1, first_weights=False)
    pool = make_pool(sims, request_timeout=0.3, control_timeout=60, max_attempts=1)
    sims[0].faults("hang", endpoints=["get_sequence_logprobs"], times=1)
    with pytest.raises(RolloutError, match="timed out"):
        pool.get_sequence_logprobs([[1, 2, 3]], [1], top_logprobs=1)
    sims[0].restart()
    eventually(lambda: state(pool, sims[0]).health == "up")
    assert len(pool.generate(["a"])["completion_ids"]) == 1


def test_a_waiting_score_is_not_overtaken_by_ever_more_generates(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = fleet(1)
    pool = make_pool(sims)
    sims[0].faults("slow", seconds=0.05, endpoints=["generate"])
    done = False

    def generate_for_ever() -> int:
        count = 0
        while not done:
            pool.generate(["again"])
            count += 1
        return count

    loops = [background(generate_for_ever) for _ in range(3)]
    eventually(lambda: received(sims)[0] > 3)
    before = received(sims)[0]
    try:
        pool.get_sequence_logprobs([[1, 2, 3]], [1], top_logprobs=1)
        after = received(sims)[0]
    finally:
        done = True
    assert sum(loop.result() for loop in loops) > 0
    assert after - before <= 6  # those that were out or in line already
    assert sims[0].state()["mixed"] == 0


def test_a_call_whose_time_is_up_says_what_was_tried_and_what_was_waited_for(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = fleet(1)
    pool = make_pool(sims, total_timeout=0.6, request_timeout=0.6, max_inflight_per_backend=1)
    sims[0].faults("hang", endpoints=["generate"], times=1)
    with pytest.raises(RolloutTimeoutError, match=r"total_timeout of 0.6 s reached.*timed out after 0.6 s"):
        pool.generate(["a"])
    sims[0].faults("hang", endpoints=["get_sequence_logprobs"], times=1)
    first = background(pool.get_sequence_logprobs, [[1, 2, 3]], [1], top_logprobs=1)
    eventually(lambda: state(pool, sims[0]).inflight)
    with pytest.raises(RolloutTimeoutError, match=r"waited for a slot.*is scoring, which excludes generating"):
        pool.generate(["b"])
    assert first.exception() is not None
