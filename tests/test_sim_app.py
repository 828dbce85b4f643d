"""The simulated server's application called in-process, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx

from trl_pool.sim.app import create_app
from trl_pool.sim.config import SimConfig
from trl_pool.sim.engine import Latency
from trl_pool.sim.faults import Fault

T = TypeVar("T")


def in_process(app: httpx.ASGITransport, scenario: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
    async def run() -> T:
        async with httpx.AsyncClient(transport=app, base_url="http://sim", verify=False) as client:
            return await scenario(client)

    return asyncio.run(run())


def test_the_app_answers_without_a_socket() -> None:
    app = create_app(model_version="v1")

    async def scenario(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get("/health/"), await client.post("/generate/", json={"prompts": ["x"]})]

    health, generated = in_process(httpx.ASGITransport(app), scenario)
    assert health.json() == {"status": "ok", "model_version": "v1"}
    assert health.headers["server"] == "trl-pool-sim"
    assert len(generated.json()["completion_ids"]) == 1
    assert app.ledger.counts["generate"].answered == 1


def test_faults_and_bare_500s_work_without_a_socket() -> None:
    app = create_app()
    app.faults.add(Fault(kind="busy", times=1))
    app.faults.add(Fault(kind="reset", times=1))

    async def scenario(client: httpx.AsyncClient) -> list[int]:
        bodies = [{"prompts": ["x"]}, {"prompts": ["x"]}, {"prompts": ["x"], "n": 0}]
        return [(await client.post("/generate/", json=body)).status_code for body in bodies]

    # A reset needs a connection that can be reset: without one the answer stays whole.
    assert in_process(httpx.ASGITransport(app), scenario) == [429, 200, 500]


def test_time_passes_only_where_the_worker_sleeps() -> None:
    """The clock and the sleep are the worker's: a test may take them over."""
    app = create_app(SimConfig(latency=Latency(fixed_ms=60_000, prefill_ms_per_token=1_000)))
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    app.worker.clock, app.worker.sleep = (lambda: 0.0), sleep
    app.faults.add(Fault(kind="slow", seconds=5.0, times=1))

    async def scenario(client: httpx.AsyncClient) -> int:
        return (await client.post("/generate/", json={"prompts": ["abc"]})).status_code

    assert in_process(httpx.ASGITransport(app), scenario) == 200
    assert slept == [5.0, 63.0]
