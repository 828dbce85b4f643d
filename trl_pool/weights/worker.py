"""A daemon thread for calls that may never return: a collective whose other side has died, for one."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")

_Call: TypeAlias = tuple[Future[Any], Callable[[], Any]]


class DaemonWorker:
    """Runs calls one after the other on a thread that keeps no process from ending.

    Whoever gives one up (a time-out) makes another: this one ends with the call it is in.

    Args:
        name (`str`): Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """The result of a blocking call. Cancelled, it stops waiting; the call goes on."""
        future: Future[T] = Future()
        self._calls.put((future, lambda: function(*args)))
        if self._thread is None:
            self._thread = threading.Thread(target=_work, args=(self._calls,), name=self._name, daemon=True)
            self._thread.start()
        return await asyncio.wrap_future(future)

    async def run_last(self, function: Callable[..., T], *args: Any) -> T:
        """The result of a blocking call, after which the thread ends."""
        future = asyncio.ensure_future(self.run(function, *args))
        await asyncio.sleep(0)  # it is in the queue now
        self.close()
        return await future

    def close(self) -> None:
        """Lets the thread end after the calls it was given."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread = None


def _work(calls: queue.SimpleQueue[_Call | None]) -> None:
    while (given := calls.get()) is not None:
        future, call = given
        if not future.set_running_or_notify_cancel():
            continue
        try:
            result = call()
        except BaseException as error:
            with contextlib.suppress(RuntimeError):  # the loop that waited is closed
                future.set_exception(error)
        else:
            with contextlib.suppress(RuntimeError):
                future.set_result(result)
        del given, future, call
