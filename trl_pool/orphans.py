"""Requests that nobody waits for any more, and which the server still works on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from .exchange import Answer


class Orphans:
    """Lets requests outlive their callers, and knows which do.

    Args:
        clock (`Callable[[], float]`): Monotonic seconds.
        changed (`Callable[[], None]`): Called when one has come to its end.
    """

    def __init__(self, clock: Callable[[], float], changed: Callable[[], None]) -> None:
        self._clock, self._changed = clock, changed
        self._requests: dict[asyncio.Task[Answer], tuple[str, float]] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[tuple[str, float]]:
        """What each is, and since when nobody waits for it."""
        return iter(self._requests.values())

    async def outlive(self, request: Coroutine[Any, Any, Answer], what: str) -> Answer:
        """Waits for a request that goes on when nobody waits for it any more."""
        task = asyncio.create_task(request)
        try:
            return await asyncio.shield(task)
        finally:
            if not task.done():
                self._requests[task] = what, self._clock()
                task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Answer]) -> None:
        self._requests.pop(task, None)
        if not task.cancelled():
            task.exception()
        self._changed()

    def bury(self) -> list[asyncio.Task[Answer]]:
        """Nobody works on them any more: there is no process left, or no way to it. Returns what is on its end."""
        tasks = list(self._requests)
        for task in tasks:
            task.cancel()
        return tasks
