"""The line in which work waits: first come, first looked at, whenever something changed that may let it go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from .leases import Lane, Lease

T = TypeVar("T")

_POLL_SECONDS = 1.0
"""Longest time between two looks at what waits: what changes by the clock alone (a cooldown) sends no notice."""


@dataclass(eq=False)
class _Waiter:
    poll: Callable[[], Any]
    future: asyncio.Future[Any]
    is_call: bool = False
    lane: Lane | None = None


class Line:
    """Work that waits.

    Args:
        due (`Callable[[], Iterable[float]]`): Seconds until something is over that ends by the clock alone; those that
            are not above 0 do not count.
    """

    def __init__(self, due: Callable[[], Iterable[float]]) -> None:
        self._due = due
        self._waiters: list[_Waiter] = []
        self.ahead: set[Lane] = set()
        """Kinds of work that wait before whoever is looked at."""
        self._notice: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiters)

    @property
    def calls(self) -> int:
        """Calls that wait for their first slot."""
        return sum(waiter.is_call for waiter in self._waiters)

    async def until(
        self, poll: Callable[[], T | None], *, timeout: float, is_call: bool = False, lane: Lane | None = None
    ) -> T:
        """Waits, in line, until `poll` returns something.

        Raises:
            `TimeoutError`: when it did not in time.
        """
        first = poll()
        if first is not None:
            return first
        waiter = _Waiter(poll, asyncio.get_running_loop().create_future(), is_call, lane)
        self._waiters.append(waiter)
        self._note_who_is_ahead()
        self._arm()
        try:
            async with asyncio.timeout(max(0.0, timeout)):
                await waiter.future
        except BaseException:
            # The answer may have come in the same moment; nobody will use it.
            if waiter.future.done() and not waiter.future.cancelled() and waiter.future.exception() is None:
                unused = waiter.future.result()
                if isinstance(unused, Lease):
                    unused.backend.release_unused(unused)
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                self._note_who_is_ahead()
        result: T = waiter.future.result()
        return result

    def changed(self) -> None:
        """Something may let waiting work go on: look at it once this step is over."""
        if self._waiters and self._notice is None:
            self._notice = asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        self._notice = None
        self.ahead = set()
        for waiter in list(self._waiters):
            if waiter.future.done():
                continue
            try:
                result = waiter.poll()
            except Exception as error:
                waiter.future.set_exception(error)
                continue
            if result is not None:
                waiter.future.set_result(result)
            elif waiter.lane is not None:
                self.ahead.add(waiter.lane)
        self._waiters = [waiter for waiter in self._waiters if not waiter.future.done()]
        self._note_who_is_ahead()
        self._arm()

    def _note_who_is_ahead(self) -> None:
        """Whoever comes now stands behind all that wait."""
        self.ahead = {w.lane for w in self._waiters if w.lane is not None and not w.future.done()}

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiters:
            delay = min([_POLL_SECONDS, *(wait + 0.001 for wait in self._due() if wait > 0)])
            self._timer = asyncio.get_running_loop().call_later(delay, self._look)

    def close(self) -> None:
        """Stops looking; waiting work is cancelled by its owners."""
        for handle in (self._timer, self._notice):
            if handle is not None:
                handle.cancel()
        self._timer = self._notice = None
