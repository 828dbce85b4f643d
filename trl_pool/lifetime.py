"""When something may be used: while it is open, and in the process that made it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from .errors import ForkedProcessError, PoolClosedError


class Lifetime:
    """Knows whether its owner is open, and ends what is under way when it is closed.

    Args:
        name (`str`): What the owner is called in errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pid = os.getpid()
        self._closed = False
        self._scopes: set[asyncio.Timeout] = set()
        self._unused = asyncio.Event()
        self._unused.set()

    @property
    def over(self) -> bool:
        """Whether there is nothing to close: it is closed, or this is a forked child, which owns nothing."""
        return self._closed or os.getpid() != self._pid

    @property
    def closed(self) -> bool:
        return self._closed

    def check(self) -> None:
        """Raises unless the owner may be used here and now.

        Raises:
            [`ForkedProcessError`], [`PoolClosedError`]: with what to do instead.
        """
        if os.getpid() != self._pid:
            raise ForkedProcessError(
                f"{self._name} was made in process {self._pid} and cannot be used in its forked child {os.getpid()}; "
                "make one there, or use it in the parent only"
            )
        if self._closed:
            raise PoolClosedError(f"{self._name} is closed; make a new one")

    def close(self) -> None:
        """Closes; what runs in [`in_use`] ends with [`PoolClosedError`]."""
        self._closed = True
        for scope in self._scopes:
            scope.reschedule(asyncio.get_running_loop().time())

    async def unused(self) -> None:
        """Waits until nothing is under way any more."""
        await self._unused.wait()

    @contextlib.asynccontextmanager
    async def in_use(self) -> AsyncIterator[None]:
        """Lets its block run while the owner is open."""
        self.check()
        try:
            # A time-out without a time: close() sets one.
            async with asyncio.timeout(None) as scope:
                self._scopes.add(scope)
                self._unused.clear()
                try:
                    yield
                finally:
                    self._scopes.discard(scope)
                    if not self._scopes:
                        self._unused.set()
        except TimeoutError:
            self.check()
            raise


class HasLifetime(Protocol):
    """Whose methods can be [`guarded`]."""

    lifetime: Lifetime


SelfT = TypeVar("SelfT", bound=HasLifetime)
P = ParamSpec("P")
T = TypeVar("T")


def guarded(
    method: Callable[Concatenate[SelfT, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SelfT, P], Coroutine[Any, Any, T]]:
    """Lets a method run only while its object is open, and ends it when that is closed meanwhile."""

    @functools.wraps(method)
    async def run(self: SelfT, /, *args: P.args, **kwargs: P.kwargs) -> T:
        async with self.lifetime.in_use():
            return await method(self, *args, **kwargs)

    return run
