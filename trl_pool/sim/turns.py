"""Who is served when: the trait in which the two dialects' servers differ most."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol, TypeVar

from trl_pool.sim.vllm_worker import VLLMWorker
from trl_pool.sim.worker import Worker

T = TypeVar("T")


class Turns(Protocol):
    """Decides when a request that has arrived is served."""

    async def serve(
        self,
        endpoint: str,
        state: MutableMapping[str, Any],
        slow_seconds: float,
        run: Callable[[], Awaitable[T]],
    ) -> T:
        """Serve one request in its turn.

        Args:
            endpoint (`str`): Its name.
            state (`MutableMapping[str, Any]`): The request's, for what the routes need to know.
            slow_seconds (`float`): How much longer it takes, because of a fault.
            run (`Callable[[], Awaitable[T]]`): Serves it.
        """


class OneAtATime:
    """`trl vllm-serve`: whoever is served has the event loop, and nobody else is answered meanwhile.

    Args:
        worker (`Worker`): Its `turn` is the event loop.
        threaded (`frozenset[str]`): Endpoints that wait on threads.
    """

    def __init__(self, worker: Worker, threaded: frozenset[str]) -> None:
        self._worker, self._threaded = worker, threaded

    async def serve(
        self, endpoint: str, state: MutableMapping[str, Any], slow_seconds: float, run: Callable[[], Awaitable[T]]
    ) -> T:
        if endpoint in self._threaded:
            return await self._on_a_thread(state, slow_seconds, run)
        async with self._worker.turn:
            if slow_seconds:
                await self._worker.sleep(slow_seconds)
            return await run()

    async def _on_a_thread(
        self, state: MutableMapping[str, Any], slow_seconds: float, run: Callable[[], Awaitable[T]]
    ) -> T:
        """The event loop must be free to take the request and to answer it, no longer."""
        with self._worker.pipe(scoring=True, gone=state["gone"]) as use:
            state["use"] = use
            async with self._worker.turn:
                pass
            if slow_seconds:
                await self._worker.sleep(slow_seconds)
            result = await run()
        async with self._worker.turn:
            return result


class AllAtOnce:
    """`vllm serve`: requests are batched as they come, and probes are answered meanwhile.

    Args:
        worker (`VLLMWorker`): Its `sleep` lets time pass.
    """

    def __init__(self, worker: VLLMWorker) -> None:
        self._worker = worker

    async def serve(
        self, endpoint: str, state: MutableMapping[str, Any], slow_seconds: float, run: Callable[[], Awaitable[T]]
    ) -> T:
        if slow_seconds:
            await self._worker.sleep(slow_seconds)
        return await run()
