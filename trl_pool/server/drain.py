"""Draining: what happens between SIGTERM and the end."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, TypeVar

from .failures import ShuttingDownError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Drain:
    """From SIGTERM to the end: not ready, then not accepting, then not waiting any longer.

    Args:
        settle_seconds (`float`): From not ready to not accepting, for load balancers to notice.
        timeout (`float`): Seconds in which requests may end after that.
    """

    def __init__(self, settle_seconds: float, timeout: float) -> None:
        self._settle_seconds, self._timeout = settle_seconds, timeout
        self._running: set[asyncio.Task[Any]] = set()
        self._previous: Callable[[int, FrameType | None], Any] | None = None
        self.draining = False

    def install(self) -> None:
        """Takes SIGTERM over from the server that runs the application, to hand it on after the settle time."""
        if threading.current_thread() is not threading.main_thread():
            return
        previous = signal.getsignal(signal.SIGTERM)
        if callable(previous):
            self._previous = previous
            loop = asyncio.get_running_loop()
            signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(self.begin))

    def begin(self) -> None:
        """Begins to drain; a second time the settle time is skipped."""
        loop = asyncio.get_running_loop()
        if self.draining:
            self._hand_on()
            return
        self.draining = True
        logger.warning("SIGTERM: draining, %d requests under way", len(self._running))
        loop.call_later(self._settle_seconds, self._hand_on)
        loop.call_later(self._settle_seconds + self._timeout, self._cut_off)

    def _hand_on(self) -> None:
        if self._previous is not None:
            self._previous(signal.SIGTERM, None)

    def _cut_off(self) -> None:
        logger.warning("Time is up: %d requests are answered 503", len(self._running))
        for task in self._running:
            task.cancel()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a request's work, which ends when the time is up.

        Raises:
            [`ShuttingDownError`]: then.
        """
        task = asyncio.create_task(work)
        self._running.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if task.cancelled() and current is not None and not current.cancelling():
                raise ShuttingDownError("the gateway is shutting down and its time is up; try another") from None
            raise
        finally:
            self._running.discard(task)
            task.cancel()
