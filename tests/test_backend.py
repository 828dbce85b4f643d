"""One server as the pool sees it: time in its line, requests nobody waits for any more, breaking off."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import eventually, quick

from trl_pool import AsyncVLLMClientPool, RolloutError
from trl_pool.errors import Outcome

Fleet = Callable[[int], list[Any]]


def test_time_in_a_servers_line_is_nobodys_time_out(fleet: Fleet, make_pool: Any) -> None:
    """Four requests of 0.5 s each to a server that works through them one by one all end well with a request time-out
    of 1.2 s, though the last of them waits for 2 s."""
    (sim,) = fleet(1)
    sim.faults("slow", endpoints=["generate"], seconds=0.5)
    pool = make_pool([sim], request_timeout=1.2)
    answers = []
    threads = [
        threading.Thread(target=lambda i=i: answers.append(pool.generate([f"prompt {i}"], max_tokens=2)))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    (backend,) = pool.statistics().backends
    assert (backend.requests, backend.failures) == (4, 0)
    assert sim.state()["max_in_flight"] > 1


def test_a_server_that_answers_nothing_times_out_though_others_wait_in_its_line(fleet: Fleet, make_pool: Any) -> None:
    """Without an answer to anybody nothing restarts the clock."""
    (sim,) = fleet(1)
    sim.faults("hang", endpoints=["generate"])
    pool = make_pool([sim], request_timeout=0.5, max_attempts=1)
    errors = []

    def call() -> None:
        with pytest.raises(RolloutError) as caught:
            pool.generate(["x"])
        errors.append(caught.value)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert len(errors) == 3
    assert all(attempt.outcome is Outcome.TIMED_OUT for error in errors for attempt in error.attempts)
    assert all(0.4 < attempt.seconds < 2 for error in errors for attempt in error.attempts)


class TwoServers(httpx.AsyncBaseTransport):
    """`n1` works; `n2` takes a generation and vanishes with its whole host: no answer, and no connection either."""

    def __init__(self) -> None:
        self.vanished = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.host == "n2":
            if self.vanished and request.method == "GET":
                raise httpx.ConnectTimeout("timed out")
            if request.method == "POST":
                self.vanished = True
                await asyncio.Event().wait()
        if request.method == "GET":
            return httpx.Response(200, json={"status": "ok"})
        await request.aread()
        prompts = httpx.Response(200, content=request.content).json()["prompts"]
        return httpx.Response(
            200,
            json={
                "prompt_ids": prompts,
                "completion_ids": [[1]] * len(prompts),
                "logprobs": None,
                "logprob_token_ids": None,
            },
        )


def test_requests_on_a_host_that_vanished_do_not_wait_for_their_time_out() -> None:
    """No process is left there to close the connection; the probes notice after five tries, long before 900 s."""

    async def run() -> None:
        config = quick(request_timeout=900, total_timeout=1700, health_interval=0.05)
        async with AsyncVLLMClientPool(["http://n1", "http://n2"], config=config, transport=TwoServers()) as pool:
            prompts = [[i, 7] for i in range(8)]
            answer = await asyncio.wait_for(
                pool.generate(prompts, logprobs=None),  # type: ignore[arg-type]
                10,
            )
            assert answer["prompt_ids"] == prompts
            lost = pool.statistics().backends[1]
            assert (lost.health, lost.failovers, lost.inflight) == ("down", 4, 0)

    asyncio.run(run())


def test_an_abandoned_scoring_keeps_generations_away_until_the_server_is_done_with_it(
    fleet: Fleet, make_pool: Any
) -> None:
    """A real server would mix up the two replies; the simulated one counts it."""
    (sim,) = fleet(1)
    sim.faults("slow", endpoints=["get_sequence_logprobs"], seconds=1.0, times=1)
    pool = make_pool([sim], request_timeout=0.2, total_timeout=5, max_attempts=1, fail_eject_threshold=5)
    with pytest.raises(RolloutError):
        pool.get_sequence_logprobs([[1, 2, 3]], [1], top_logprobs=2)
    assert len(pool.generate(["x"], max_tokens=1)["completion_ids"]) == 1
    assert sim.state()["mixed"] == 0


def test_leases_are_given_back_whatever_happens(fleet: Fleet, make_pool: Any) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    sims[0].faults("status", status=500, times=1)
    sims[1].faults("reset", times=1)
    pool.generate([f"p{i}" for i in range(6)])
    eventually(lambda: all((b.inflight, b.load) == (0, 0) for b in pool.statistics().backends))
