"""Requests that go to one backend as they are, and whose answers come back piece by piece."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping

from .breaker import Verdict
from .config import PoolConfig
from .dispatch import Dispatcher, Want
from .errors import Attempt, AttemptError, Outcome, RolloutError, RolloutTimeoutError
from .exchange import StreamedAnswer, judge
from .leases import Lane, Lease
from .retry import MAX_COSTS, MAX_SERVER_ERRORS, RULES


class Forwarder:
    """Streams answers through.

    A request is tried on another backend as long as nothing of an answer has come; afterwards there is no way back.

    Args:
        dispatcher ([`Dispatcher`]): Gives leases.
        config ([`PoolConfig`]): Time-outs and limits.
        clock (`Callable[[], float]`): Monotonic seconds.
    """

    def __init__(self, dispatcher: Dispatcher, config: PoolConfig, *, clock: Callable[[], float]) -> None:
        self._dispatcher, self._config, self._clock = dispatcher, config, clock

    @contextlib.asynccontextmanager
    async def stream(
        self, path: str, body: bytes, *, key: str, keep: bool = False, weight: int, headers: Mapping[str, str]
    ) -> AsyncIterator[tuple[str, StreamedAnswer]]:
        """A backend's name and its answer, whose status is 200 and whose body has not been read.

        Args:
            path (`str`): Where to.
            body (`bytes`): What.
            key (`str`): Affinity key.
            keep (`bool`, *optional*, defaults to `False`): Whether it is a session's.
            weight (`int`): Load, in completions.
            headers (`Mapping[str, str]`): Sent along.

        Raises:
            [`RequestRejectedError`]: a backend answered 4xx.
            [`NoBackendAvailableError`], [`OverloadedError`]: it could not be sent.
            [`RolloutError`], [`RolloutTimeoutError`]: every attempt failed, or the time is up.
        """
        deadline = self._clock() + self._config.total_timeout
        attempts: list[Attempt] = []
        tried: set[str] = set()
        costs = errors = 0
        while True:
            want = Want(Lane.GENERATE, weight, key, keep=keep, tried=tried, owner=object())
            try:
                lease = await self._dispatcher.lease(want, until=deadline, new_call=not attempts)
            except TimeoutError:
                reason = f"total_timeout of {self._config.total_timeout:g} s reached"
                raise RolloutTimeoutError({0: attempts}, reason=reason) from None
            started = self._clock()
            async with contextlib.AsyncExitStack() as stack:
                stack.callback(lease.backend.release_unused, lease)
                try:
                    response = await stack.enter_async_context(self._open(lease, path, body, headers))
                except AttemptError as error:
                    attempt = self._failed(lease, error, self._clock() - started)
                    if error.outcome is Outcome.BUSY:
                        continue  # no failure: it waits its turn
                    attempts.append(attempt)
                    tried.add(lease.backend.name)
                    rule = RULES[error.outcome]
                    costs, errors = costs + rule.costs, errors + rule.compare
                    enough = costs >= MAX_COSTS or errors >= MAX_SERVER_ERRORS
                    if not rule.again or enough or len(attempts) >= self._config.max_attempts:
                        raise RolloutError({0: attempts}) from error
                    continue
                try:
                    yield lease.backend.name, response
                except AttemptError as error:
                    self._failed(lease, error, self._clock() - started)
                    raise
                lease.backend.served(lease, 1)
                lease.backend.release(lease, Verdict.SUCCESS)
                return

    @contextlib.asynccontextmanager
    async def _open(
        self, lease: Lease, path: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncIterator[StreamedAnswer]:
        exchange = lease.backend.exchange
        async with exchange.stream(path, body, timeout=self._config.request_timeout, headers=headers) as response:
            if response.status != 200:
                judge(lease.backend.url, await response.read())
            yield response

    def _failed(self, lease: Lease, error: AttemptError, seconds: float) -> Attempt:
        verdict = RULES[error.outcome].verdict
        lease.backend.failed(error)
        lease.backend.release(lease, verdict, reason=f"{error.outcome.value}: {error.detail}")
        return Attempt(lease.backend.url, error.outcome, error.detail, 1, seconds)
