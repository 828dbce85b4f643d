"""The asynchronous class: the same methods, and cancellation at any moment."""

from __future__ import annotations

import asyncio
import gc
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest
from conftest import Tensor, ask, quick, received

from trl_pool import AsyncVLLMClientPool, BackendsUnreachableError, PoolClosedError, VLLMClientPool
from trl_pool.sim import SimProcess

Fleet = Callable[[int], list[SimProcess]]

PROMPTS = [f"prompt {i}" for i in range(6)]
RENAMED = {"close": "aclose", "__enter__": "__aenter__", "__exit__": "__aexit__"}
SYNCHRONOUS = {"model", "last_report", "deferred_update_errors"}
"""Attributes, and what a loop over parameters in a trainer's own thread needs."""


def pool_of(sims: list[SimProcess], **settings: Any) -> AsyncVLLMClientPool:
    return AsyncVLLMClientPool([sim.url for sim in sims], connection_timeout=10, config=quick(**settings))


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


def let_go_of_sockets() -> None:
    """anyio's `connect_tcp` forgets a socket that connects in the very moment in which it is cancelled; what the
    garbage collector says about it belongs to the test that cancelled."""
    gc.collect()


async def steps(count: int) -> None:
    """Lets everybody else take this many steps."""
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    "method",
    [n for n in vars(VLLMClientPool) if (not n.startswith("_") or n == "__init__") and n not in SYNCHRONOUS],
)
def test_both_classes_have_the_same_methods(method: str) -> None:
    ours = inspect.signature(getattr(AsyncVLLMClientPool, RENAMED.get(method, method))).parameters
    theirs = inspect.signature(getattr(VLLMClientPool, method)).parameters

    def shown(parameters: Any) -> list[Any]:
        return [(p.name, p.kind, p.default, str(p.annotation)) for p in parameters.values()]

    if method == "__init__":  # the seams of the core come after
        assert shown(ours)[: len(theirs)] == shown(theirs)
    else:
        assert shown(ours) == shown(theirs)


@pytest.mark.parametrize("attribute", ["model", "last_report"])
def test_both_classes_have_the_same_attributes(fleet: Fleet, attribute: str) -> None:
    urls = [sim.url for sim in fleet(1)]

    async def read() -> Any:
        async with AsyncVLLMClientPool(urls, connection_timeout=10) as pool:
            return getattr(pool, attribute)

    with VLLMClientPool(urls, connection_timeout=10) as pool:
        assert getattr(pool, attribute) == asyncio.run(read())


def test_it_gives_what_one_server_gives(fleet: Fleet) -> None:
    sims = fleet(3)

    async def main() -> None:
        async with pool_of(sims) as pool:
            assert await pool.generate(PROMPTS, n=2) == ask(sims[0], "generate", prompts=PROMPTS, n=2)
            chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
            assert await pool.chat(chats) == ask(sims[0], "chat", messages=chats)
            scores = await pool.get_sequence_logprobs([[1, 2, 3]] * 4, [1] * 4, top_logprobs=2)
            assert set(scores) == {"logprobs", "logprob_token_ids", "actual_logprobs", "actual_token_ids"}
            assert await pool.get_world_size() == 1

    run(main())


def test_many_calls_at_a_time_keep_their_answers_apart(fleet: Fleet) -> None:
    sims = fleet(3)
    expected = [ask(sims[0], "generate", prompts=[f"call {i}"] * 2) for i in range(40)]

    async def main() -> None:
        async with pool_of(sims, max_inflight_per_backend=3) as pool:
            calls = (pool.generate([f"call {i}"] * 2) for i in range(40))
            assert await asyncio.gather(*calls) == expected
            assert pool.statistics().waiting == 0

    run(main())


def test_entering_waits_for_the_servers_and_fails_without_any() -> None:
    async def main() -> None:
        with pytest.raises(BackendsUnreachableError):
            async with AsyncVLLMClientPool("http://127.0.0.1:1"):
                pass

    run(main())


def test_after_aclose_every_use_is_a_clear_error() -> None:
    async def main() -> None:
        healthy = httpx.MockTransport(lambda request: httpx.Response(200, json={"status": "ok"}))
        async with AsyncVLLMClientPool("http://n1:8000", transport=healthy) as pool:
            pass
        await pool.aclose()
        for use in (pool.generate(["a"]), pool.check_server(), pool.init_communicator(), pool.add_backend("n2")):
            with pytest.raises(PoolClosedError, match="AsyncVLLMClientPool is closed"):
                await use

    run(main())


@pytest.mark.parametrize("work", ["generate", "split", "session", "score", "queued"])
def test_cancellation_at_any_moment_gives_everything_back(fleet: Fleet, work: str) -> None:
    """Cancelled after any number of steps, a call leaves no slot taken, nothing waiting and nobody charged."""
    sims = fleet(2)

    async def main() -> None:
        slots = 1 if work == "queued" else 8
        async with pool_of(sims, max_inflight_per_backend=slots, fail_eject_threshold=1) as pool:
            for count in range(60):
                match work:
                    case "score":
                        call = pool.get_sequence_logprobs([[1, 2]] * 6, [1] * 6, top_logprobs=1, chunk_size=1)
                    case "session":
                        call = pool.generate(PROMPTS, session_id="s")
                    case "generate":
                        call = pool.generate(PROMPTS[:1])
                    case _:
                        call = pool.generate(PROMPTS)
                others = [asyncio.create_task(pool.generate(["other"])) for _ in range(3 * (work == "queued"))]
                task = asyncio.create_task(call)
                await steps(count)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await asyncio.gather(*others)
                now = pool.statistics()
                assert now.waiting == 0, repr(pool)
                assert all(b.inflight == b.load == 0 for b in now.backends), f"{count} steps: {pool!r}"
                assert all(b.failures == b.ejections == 0 and b.eligible for b in now.backends)
            assert await pool.generate(PROMPTS) == ask(sims[0], "generate", prompts=PROMPTS)

    run(main())


def test_a_cancelled_scoring_call_keeps_generations_off_its_server_until_it_is_answered(fleet: Fleet) -> None:
    sims = fleet(1)

    async def main() -> None:
        async with pool_of(sims) as pool:
            for count in range(0, 40, 3):
                sims[0].faults("slow", seconds=0.02, times=1, endpoints=["get_sequence_logprobs"])
                score = asyncio.create_task(pool.get_sequence_logprobs([[1, 2, 3]], [1], top_logprobs=1))
                await steps(count)
                score.cancel()
                await asyncio.gather(score, return_exceptions=True)
                assert len((await pool.generate(PROMPTS))["prompt_ids"]) == 6
                sims[0].clear_faults()

    run(main())
    assert sims[0].state()["mixed"] == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # see let_go_of_sockets
def test_a_server_removed_without_draining_at_any_moment_loses_nothing(fleet: Fleet) -> None:
    sims = fleet(2)
    expected = ask(sims[0], "generate", prompts=PROMPTS)

    async def main() -> None:
        async with pool_of(sims) as pool:
            for count in range(25):
                task = asyncio.create_task(pool.generate(PROMPTS))
                await steps(count)
                await pool.remove_backend(sims[1].url, drain=False)
                assert await task == expected
                await pool.add_backend(sims[1].url)

    run(main())
    let_go_of_sockets()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # see let_go_of_sockets
def test_closing_at_any_moment_ends_a_call_with_a_clear_error(fleet: Fleet) -> None:
    sims = fleet(2)

    async def main() -> None:
        for count in range(0, 30, 2):
            pool = pool_of(sims)
            await pool.check_server()
            task = asyncio.create_task(pool.generate(PROMPTS))
            await steps(count)
            await pool.aclose()
            async with asyncio.timeout(5):
                outcome = (await asyncio.gather(task, return_exceptions=True))[0]
            assert isinstance(outcome, (dict, PoolClosedError)), repr(outcome)

    run(main())
    let_go_of_sockets()


def test_another_tasks_generation_waits_for_the_end_of_an_update(fleet: Fleet) -> None:
    sims = fleet(2)

    async def main() -> None:
        async with pool_of(sims) as pool:
            begun = asyncio.Event()

            async def roll_out() -> dict[str, Any]:
                await begun.wait()
                return await pool.generate(PROMPTS)

            rollout = asyncio.create_task(roll_out())
            await pool.init_communicator()
            await pool.update_named_param("a", Tensor())
            begun.set()
            await asyncio.wait([rollout], timeout=0.2)
            assert not rollout.done()
            assert pool.statistics().waiting == 1
            await pool.update_named_param("b", Tensor())
            await pool.reset_prefix_cache()
            assert await rollout == ask(sims[0], "generate", prompts=PROMPTS)

    run(main())
    assert [sim.state()["weights"]["updates"] for sim in sims] == [2, 2]


def test_a_generation_of_the_same_task_ends_an_update(fleet: Fleet) -> None:
    sims = fleet(2)

    async def main() -> None:
        async with pool_of(sims) as pool:
            await pool.init_communicator()
            await pool.update_named_param("a", Tensor())
            await pool.generate(PROMPTS)
            assert pool.statistics().weight_version.endswith(":1")

    run(main())
    assert received(sims, "reset_prefix_cache") == [1, 1]
