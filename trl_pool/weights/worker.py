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


class Lane:
    """Runs calls one after the other on a daemon thread of its own: one that hangs with a dead server holds up only
    those behind it, and keeps no process from ending.

    Args:
        name (`str`): Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """A blocking call's result, some time. Given up before its turn (cancelled), it is not made."""
        future: Future[T] = Future()
        self._calls.put((future, function))
        if self._thread is None:
            self._thread = threading.Thread(target=_work, args=(self._calls,), name=self._name, daemon=True)
            self._thread.start()
        return future

    def close(self) -> None:
        """Lets the thread end after the calls it was given."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread = None


class DaemonWorker(Lane):
    """A [`Lane`] whose calls are awaited.

    Whoever gives one up (a time-out) makes another: this one ends with the call it is in.
    """

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """The result of a blocking call. Cancelled, it stops waiting; the call goes on."""
        return await asyncio.wrap_future(self.submit(lambda: function(*args)))

    async def run_last(self, function: Callable[..., T], *args: Any) -> T:
        """The result of a blocking call, after which the thread ends."""
        future = asyncio.ensure_future(self.run(function, *args))
        await asyncio.sleep(0)  # it is in the queue now
        self.close()
        return await future


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
