"""What probes find, and the restart that happens between two of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import Tensor, eventually, quick

from trl_pool import AsyncVLLMClientPool, InvalidRequestError, NoBackendAvailableError, RolloutError

Fleet = Callable[[int], list[Any]]


def test_a_restart_between_two_probes_is_noticed_and_the_server_is_out_of_sync(fleet: Fleet, make_pool: Any) -> None:
    """Its standing connection ended. To probes a minute apart it looks as if nothing had happened, and it holds the
    checkpoint's weights again."""
    sims = fleet(2)
    pool = make_pool(sims, health_interval=60)
    pool.init_communicator()
    pool.update_named_param("w", Tensor())
    pool.reset_prefix_cache()
    sims[1].kill()
    sims[1].restart()
    stale = eventually(lambda: next((b for b in pool.statistics().backends if not b.eligible), None))
    assert stale.name == sims[1].name
    assert "its port was closed" in stale.reason
    pool.generate([f"p{i}" for i in range(8)])
    assert sims[1].state()["endpoints"]["generate"]["received"] == 0


def test_a_restart_before_any_update_costs_nothing_but_the_communicator(fleet: Fleet, make_pool: Any) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    sims[0].kill()
    eventually(lambda: not pool.statistics().backends[0].eligible)
    sims[0].restart()
    eventually(lambda: pool.statistics().backends[0].eligible)
    assert pool.statistics().backends[0].weight_version == 0


class Told(httpx.AsyncBaseTransport):
    """A server whose health answer says more than `ok`."""

    def __init__(self, **health: Any) -> None:
        self.health = {"status": "ok", **health}
        self.posts = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json=self.health)
        self.posts += 1
        return httpx.Response(
            200,
            json={"prompt_ids": [[1]], "completion_ids": [[2]], "logprobs": None, "logprob_token_ids": None},
        )


def test_max_model_len_is_learnt_from_a_server_that_tells() -> None:
    server = Told(max_model_len=16)

    async def run() -> None:
        async with AsyncVLLMClientPool("http://n1", config=quick(), transport=server) as pool:
            with pytest.raises(InvalidRequestError, match=r"max_model_len=16 at index 1"):
                await pool.generate([[5] * 15, [5] * 16])

    asyncio.run(run())
    assert server.posts == 0


def test_required_model_version_follows_what_the_server_reports() -> None:
    server = Told(model_version="step-1")

    async def run() -> None:
        config = quick(required_model_version="step-2", backend_wait_seconds=0)
        async with AsyncVLLMClientPool("http://n1", config=config, transport=server) as pool:
            with pytest.raises(NoBackendAvailableError, match="reports model version 'step-1', required is 'step-2'"):
                await pool.generate([[1]], logprobs=None)
            server.health["model_version"] = "step-2"
            deadline = time.monotonic() + 5
            while not pool.statistics().backends[0].eligible:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            await pool.generate([[1]], logprobs=None)

    asyncio.run(run())


def test_a_probe_that_expired_while_our_own_loop_was_late_is_void() -> None:
    """The loop decodes something large for longer than the probe may take; the server is not to blame."""

    class Late(httpx.AsyncBaseTransport):
        blocking = False

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if self.blocking:
                time.sleep(0.4)  # noqa: ASYNC251 - this is the late loop
                await asyncio.sleep(0.3)
            return httpx.Response(200, json={"status": "ok"})

    transport = Late()

    async def run() -> None:
        config = quick(health_interval=60, health_timeout=0.3)
        async with AsyncVLLMClientPool("http://n1", config=config, transport=transport) as pool:
            transport.blocking = True
            await pool._monitor.probe_once()
            assert pool.statistics().backends[0].health == "up"

    asyncio.run(run())


def test_an_idle_server_that_answers_no_probe_is_suspect_and_comes_last(fleet: Fleet, make_pool: Any) -> None:
    """It may be busy with somebody else's work, or hung: others are preferred, and its next failure ejects it."""
    sims = fleet(2)
    pool = make_pool(sims, health_timeout=0.2, request_timeout=1.0, max_attempts=2)
    sims[0].faults("hang", endpoints=["health", "generate"])
    eventually(lambda: pool.statistics().backends[0].health == "suspect")
    assert pool.statistics().backends[0].eligible
    pool.generate([f"p{i}" for i in range(6)], max_tokens=1)
    assert [b.prompts for b in pool.statistics().backends] == [0, 6]
    pool.remove_backend(sims[1].name)
    with pytest.raises(RolloutError):
        pool.generate(["alone"], max_tokens=1)
    assert pool.statistics().backends[0].ejections == 1


def test_a_connection_that_breaks_during_a_probe_does_not_change_who_the_server_is() -> None:
    """Whoever answers afterwards may be a new process and is asked; the answer to the old question says nothing."""

    class Vllm(httpx.AsyncBaseTransport):
        def __init__(self) -> None:
            self.told: dict[str, Any] = {
                "/v1/models": {"data": [{"id": "m", "max_model_len": 99}]},
                "/version": {"version": "0.31.0"},
                "/server_info": {"vllm_config": {}},
                "/weight_info": {"weight_version": "default"},
            }
            self.asked: asyncio.Event | None = None
            self.goes_on, self.says_who_it_is = asyncio.Event(), asyncio.Event()

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if request.method == "POST":
                raise httpx.ReadError("reset")
            if request.url.path == "/health" and self.asked is not None:
                self.asked.set()
                await self.goes_on.wait()
            if request.url.path == "/health/" and self.asked is not None:
                await self.says_who_it_is.wait()
            if request.url.path in self.told:
                return httpx.Response(200, json=self.told[request.url.path])
            return httpx.Response(200 if request.url.path == "/health" else 404)

    async def run() -> None:
        transport = Vllm()
        config = quick(health_interval=60, backend_wait_seconds=0, max_attempts=1)
        async with AsyncVLLMClientPool("http://n1", config=config, transport=transport) as pool:
            await pool._monitor.probe_once()
            transport.asked = asyncio.Event()
            probe = asyncio.create_task(pool._monitor.probe_once())
            await transport.asked.wait()
            with pytest.raises(RolloutError, match="connection lost"):
                await pool.generate([[1]])
            transport.goes_on.set()
            for _ in range(100):  # as far as it comes with the answer to the old question
                await asyncio.sleep(0)
            transport.says_who_it_is.set()
            await probe
            assert pool.dialect.name == "vllm"
            assert pool.statistics().backends[0].eligible

    asyncio.run(run())
