"""Draining: what happens between SIGTERM and the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from .failures import ShuttingDownError

logger = logging.getLogger(__name__)

_LAST_RESORT_SECONDS = 2.0


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
        self.over = False

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
        self.over = True
        for task in self._running:
            task.cancel()
        asyncio.get_running_loop().call_later(_LAST_RESORT_SECONDS, self._force)

    def _force(self) -> None:
        # A client that reads no answer keeps its connection; uvicorn takes a second SIGINT for "do not wait".
        if self._previous is not None:
            self._previous(signal.SIGINT, None)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """A request under way; it ends when the time is up.

        Raises:
            [`ShuttingDownError`]: then.
        """
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self.over:
                raise
            task.uncancel()
            raise ShuttingDownError("the gateway is shutting down and its time is up; try another") from None
        finally:
            self._running.discard(task)
