"""Probes: what they find goes into each backend's health, and into nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

import msgspec

from .backend import SIMULATED, Backend
from .config import PoolConfig
from .errors import AttemptError, Outcome
from .exchange import Answer
from .facts import Health
from .identity import Identity, identify, weight_version
from .sentinel import Sentinel

logger = logging.getLogger(__name__)

_UNKNOWN_PATH = "/health/"
"""Where a server is probed before it was asked who it is."""

_IDENTIFY_SECONDS = 30.0
"""Longest wait for an answer to "who are you": the first one makes a `vllm serve` look around its machine."""

_TICK_SECONDS = 0.05

_CLOSE_LOOKS = (0.0, 0.1, 0.3)
"""Seconds before each probe of a backend whose connection broke."""

_VANISHED_PROBES = 5
"""Probes in a row without even a connection after which requests that are out are given up. TCP outlives a short
network outage, and so should a rollout of many minutes."""


class LagMeter:
    """How late our own event loop is. A probe that expired while it was late proves nothing about the server.

    Args:
        clock (`Callable[[], float]`, *optional*): Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.worst = 0.0

    @contextlib.asynccontextmanager
    async def measuring(self) -> AsyncIterator[LagMeter]:
        """Measures while the block runs."""
        self.worst = 0.0
        ticker = asyncio.create_task(self._tick())
        try:
            yield self
        finally:
            ticker.cancel()

    async def _tick(self) -> None:
        while True:
            due = self._clock() + _TICK_SECONDS
            await asyncio.sleep(_TICK_SECONDS)
            self.worst = max(self.worst, self._clock() - due)


class HealthMonitor:
    """Probes backends, at once on demand and every `health_interval` in the background.

    Args:
        backends (`Callable[[], Iterable[Backend]]`): Whom to probe.
        config ([`PoolConfig`]): Interval and time-out.
        rng (`random.Random`): For the jitter between rounds.
        changed (`Callable[[], None]`): Called after every round.
        recognised (`Callable[[Backend, Identity], Awaitable[None]]`): Called when a server has said who it is.
        version_of (`Callable[[int], str]`): How a weight version reads that the pool has given out.
        proved (`Callable[[Backend], None]`): Called when a backend whose process was doubted has shown that it is the
            same still.
    """

    def __init__(
        self,
        backends: Callable[[], Iterable[Backend]],
        config: PoolConfig,
        *,
        rng: random.Random,
        changed: Callable[[], None],
        recognised: Callable[[Backend, Identity], Awaitable[None]],
        version_of: Callable[[int], str],
        proved: Callable[[Backend], None],
    ) -> None:
        self._backends, self._config, self._rng, self._changed = backends, config, rng, changed
        self._recognised, self._version_of, self._proved = recognised, version_of, proved
        self._loop_task: asyncio.Task[None] | None = None
        self._urgent: dict[str, asyncio.Task[None]] = {}
        self._sentinels: dict[str, asyncio.Task[None]] = {}
        self._standing: dict[str, Sentinel] = {}

    def start(self) -> None:
        """Starts the background rounds; a second time does nothing."""
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._run(), name="trl-pool-health")

    async def aclose(self) -> None:
        """Ends every probe."""
        tasks = [*self._urgent.values(), *self._sentinels.values()]
        if self._loop_task is not None:
            tasks.append(self._loop_task)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._config.health_interval * self._rng.uniform(0.9, 1.1))
            try:
                await self.probe_once()
            except Exception:
                logger.exception("A round of health probes failed; the next one goes on")

    def probe_soon(self, backend: Backend) -> None:
        """Probes one backend in the background, now and twice more: a process that dies takes a moment to."""
        if backend.name not in self._urgent:
            task = asyncio.create_task(self._probe_closely(backend))
            self._urgent[backend.name] = task
            task.add_done_callback(lambda _: self._urgent.pop(backend.name, None))

    async def _probe_closely(self, backend: Backend) -> None:
        for delay in _CLOSE_LOOKS:
            await asyncio.sleep(delay)
            await self.probe_once([backend])

    def _watch(self, backend: Backend) -> None:
        """Keeps a connection open that ends with the server's process. A server that restarts between two probes
        looks to them as if nothing had happened, and has forgotten its weights."""
        if backend.exchange.has_sockets and backend.name not in self._sentinels and not backend.draining:
            task = asyncio.create_task(self._stand_by(backend))
            self._sentinels[backend.name] = task
            task.add_done_callback(lambda _: self._sentinels.pop(backend.name, None))

    async def _stand_by(self, backend: Backend) -> None:
        with contextlib.suppress(OSError):
            sentinel = await backend.exchange.stand_by()
            self._standing[backend.name] = sentinel
            try:
                await sentinel.ended()
            finally:
                self._standing.pop(backend.name, None)
            self.probe_soon(backend)

    def forget(self, backend: Backend) -> None:
        """Stops looking at a backend that left the pool."""
        for tasks in (self._urgent, self._sentinels):
            if backend.name in tasks:
                tasks[backend.name].cancel()

    async def probe_once(self, backends: Iterable[Backend] | None = None, *, timeout: float | None = None) -> None:
        """One round over all backends, or some, at the same time.

        Args:
            backends (`Iterable[Backend]`, *optional*): Whom; everybody by default.
            timeout (`float`, *optional*): Seconds, at most `health_timeout`.
        """
        whom = list(self._backends() if backends is None else backends)
        limit = self._config.health_timeout if timeout is None else min(timeout, self._config.health_timeout)
        async with LagMeter().measuring() as lag:
            await asyncio.gather(*(self._probe(backend, limit, lag) for backend in whom))
        self._changed()

    async def _probe(self, backend: Backend, timeout: float, lag: LagMeter) -> None:
        before = backend.health.state
        # Work that ends while the probe is under way explains its silence as well as work that is still out.
        busy = backend.working
        recognised = backend.recognised
        path = backend.dialect.health_path if recognised else _UNKNOWN_PATH
        try:
            answer = await backend.exchange.once("GET", path, timeout=timeout)
            if recognised and not backend.recognised:
                # A connection broke meanwhile, so this may be a new process; its answer here does not say who it is.
                recognised = False
                answer = await backend.exchange.once("GET", _UNKNOWN_PATH, timeout=timeout)
            if recognised:
                known = answer.status == 200
            else:
                known = await self._ask_who(backend, answer, timeout)
            if known:
                await self._ask_weights(backend, timeout)
                await self._clear_up(backend, timeout)
        except AttemptError as error:
            if error.refused:
                backend.gone(error.detail)
            elif error.outcome is Outcome.TIMED_OUT:
                backend.health.silent(
                    busy=busy or backend.working,
                    lagged=lag.worst > timeout / 4,
                    reason=f"health probe not answered within {timeout:g} s",
                )
            elif error.status is not None:
                backend.health.wrong(error.detail)
            else:
                backend.health.unreachable(error.detail)
                if backend.health.unreached >= _VANISHED_PROBES:
                    # No process left to close our connections: without this they would wait for request_timeout.
                    backend.break_off(Outcome.LOST, f"its host has vanished ({error.detail})")
        else:
            if known:
                self._up(backend, answer)
            else:
                backend.health.wrong(f"health probe answered {answer.status}")
        if backend.health.state is Health.DOWN and before is not Health.DOWN:
            backend.may_have_restarted("it was down since the last update")
        if backend.health.state is not before:
            level = logging.WARNING if backend.health.state in (Health.DOWN, Health.SUSPECT) else logging.INFO
            logger.log(level, "%s is %s %s", backend.url, backend.health.state.value, backend.health.reason)

    async def _ask_who(self, backend: Backend, answer: Answer, timeout: float) -> bool:
        """Whether a server whose process has not been asked yet is one that the pool can use."""
        incarnation = backend.incarnation
        identity = await identify(backend.exchange, answer, timeout=max(timeout, _IDENTIFY_SECONDS))
        if identity is None or incarnation != backend.incarnation:
            return False
        await self._recognised(backend, identity)
        return True

    async def _ask_weights(self, backend: Backend, timeout: float) -> None:
        """Lets a server that keeps its weights' version say it, where something hangs on it."""
        identity = backend.identity
        if identity is None or not identity.keeps_version:
            return
        believed = backend.sync.believed
        # Until this pool's own first update somebody else may send weights: what the servers say is all there is.
        if believed is None and backend.updated:
            return
        incarnation = backend.incarnation
        told = await weight_version(backend.exchange, timeout=timeout)
        backend.health.model_version = told
        if believed is None or incarnation != backend.incarnation or backend.sync.believed != believed:
            return
        if told == self._version_of(believed):
            backend.sync.reached(believed)  # no new process says that
            self._proved(backend)
        else:
            backend.sync.lost(f"{backend.sync.reason}, and it reports weights {told!r}")

    async def _clear_up(self, backend: Backend, timeout: float) -> None:
        """Finds out whether a server that answers again is the process that it was before a connection broke."""
        if backend.doubt is None:
            return
        sentinel = self._standing.get(backend.name)
        incarnation = backend.incarnation
        same = sentinel is not None and await sentinel.prove(backend.dialect.health_path, timeout=timeout)
        if same is not None and backend.doubt is not None and incarnation == backend.incarnation:
            backend.cleared_up(same=same)

    def _up(self, backend: Backend, answer: Answer) -> None:
        backend.simulated = answer.headers.get("server") == SIMULATED
        version, length = _told(answer.body)
        if backend.identity is not None and backend.identity.dialect != "trl":
            version, length = backend.health.model_version, backend.identity.max_model_len
        if backend.health.answered(version, length):
            backend.breaker.server_restarted()
        self._watch(backend)


def _told(body: bytes) -> tuple[str | None, int | None]:
    """`model_version` and `max_model_len` of a health answer. TRL's own servers send neither; others may."""
    try:
        answer = msgspec.json.decode(body)
    except ValueError:
        return None, None
    if not isinstance(answer, dict):
        return None, None
    version, length = answer.get("model_version"), answer.get("max_model_len")
    return None if version is None else str(version), length if isinstance(length, int) else None
