"""Where work meets backends: hands out leases, and lets what has to wait wait its turn."""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from . import balancer
from .backend import Backend
from .config import PoolConfig
from .errors import NoBackendAvailableError, OverloadedError
from .facts import Health
from .leases import Lane, Lease, Tally
from .pace import Pace
from .prefixes import PrefixMemory
from .ring import HashRing
from .waiting import Line

T = TypeVar("T")

_COUNT_SECONDS = 0.5
"""How long a count of those who may take part holds. It only says what the mean load is."""


@dataclass(frozen=True)
class Want:
    """What a piece of work needs.

    Args:
        lane ([`Lane`]): Its kind.
        weight (`int`): Its load in completions.
        key (`str`, *optional*): Affinity key. Without one the least loaded backend is right.
        marks (`Sequence[int]`, *optional*): Hashes of the prompt's beginnings ([`prefixes.marks`]).
        keep (`bool`, *optional*, defaults to `False`): Whether the key's place on the ring is kept unless that has far
            more to do than others, as a session's is. Otherwise evenness comes first.
        home (`str`, *optional*): The backend it was planned for, taken if at all possible.
        tried (`Container[str]`, *optional*): Backends it failed on; they come last.
        owner (`object`, *optional*): The call it belongs to.
        per_backend (`int`, *optional*): Requests that its call may have on a backend at once.
        shares_slot (`bool`, *optional*, defaults to `False`):
            Whether its call's requests on a backend take one slot together. A protocol that takes one conversation a
            request would otherwise keep a server at as many sequences as it has slots.
    """

    lane: Lane
    weight: int
    key: str | None = None
    marks: Sequence[int] = ()
    keep: bool = False
    home: str | None = None
    tried: Container[str] = ()
    owner: object = None
    per_backend: int | None = None
    shares_slot: bool = False


@dataclass(frozen=True)
class Candidates:
    """Who may take a piece of work: `ready` now, `later` after a wait; `forced` past their breakers."""

    ready: Mapping[str, Backend]
    later: Mapping[str, Backend]
    forced: bool


class Dispatcher:
    """Chooses backends and keeps the queue. Every decision is one synchronous step: filter, pick, take.

    Args:
        config ([`PoolConfig`]): Limits.
        clock (`Callable[[], float]`): Monotonic seconds.
        rng (`random.Random`): For ties.
    """

    def __init__(self, config: PoolConfig, *, clock: Callable[[], float], rng: random.Random) -> None:
        self._config, self._clock, self._rng = config, clock, rng
        self.backends: dict[str, Backend] = {}
        self.ring = HashRing(virtual_nodes=config.virtual_nodes)
        self.memory = PrefixMemory(config.prefix_memory)
        self.pace = Pace()
        self.tally = Tally()
        self._names: list[str] = []
        self._able = 0  # how many may take part, and when that was counted
        self._counted = -float("inf")
        self._gate: str | None = None
        self._gate_drains = False
        self.under_way: set[object] = set()  # calls that somebody has begun to serve
        self._line = Line(self._due)

    def __repr__(self) -> str:
        gate = f", gate closed: {self._gate}" if self._gate else ""
        return f"<Dispatcher {len(self.backends)} backends, {len(self._line)} waiting{gate}>"

    # Membership and gate

    def add(self, backend: Backend) -> None:
        self.backends[backend.name] = backend
        self._names = list(self.backends)
        self.ring.add(backend.name)
        self.changed()

    def remove(self, backend: Backend) -> None:
        self.ring.remove(backend.name)
        self.backends.pop(backend.name, None)
        self._names = list(self.backends)
        self.pace.forget(backend.name)
        self.memory.forget(backend.name)
        self.changed()

    @property
    def gate(self) -> str | None:
        """Why no lease is given at all now, or `None`."""
        return self._gate

    def close_gate(self, reason: str, *, drain: bool = False) -> None:
        """No new leases until [`open_gate`]; work waits. With `drain`, calls under way may still come to their end."""
        self._gate, self._gate_drains = reason, drain

    def open_gate(self) -> None:
        """Leases are given again. Whatever it was closed for, caches have been reset or will be."""
        self._gate = None
        self.memory.clear()
        self.changed()

    @property
    def queued(self) -> int:
        """Calls that wait for their first slot."""
        return self._line.calls

    @property
    def waiting(self) -> int:
        """Pieces of work that wait."""
        return len(self._line)

    # Who

    def reasons(self) -> dict[str, str]:
        """Why each backend is not eligible, per URL; eligible ones are left out."""
        found = {b.url: b.statistics() for b in self.backends.values()}
        return {url: s.reason for url, s in found.items() if not s.eligible}

    def eligible(self) -> list[Backend]:
        """Backends that may take requests."""
        return [b for b in self.backends.values() if b.why_ineligible() is None and b.breaker.allows()]

    def candidates(self, want: Want) -> Candidates:
        """Who may take a piece of work, best class only: not suspect before suspect, not tried before tried.

        Raises:
            [`NoBackendAvailableError`]: naming why not, per backend.
        """
        able = [b for b in self.backends.values() if b.why_ineligible() is None]
        # A half-open backend whose trial is out is worth waiting for only when there is nobody else.
        pool = [b for b in able if b.breaker.allows()]
        forced = not pool and bool(able)
        if forced:
            # Never eject the last: of those that only their breakers keep away, the one whose time is up first.
            pool = [min(able, key=lambda b: (b.breaker.seconds_until_trial(), b.inflight, b.name))]
        if not pool:
            raise self._nobody()
        for unwanted in (self._is_suspect, lambda b: b.name in want.tried):
            pool = [b for b in pool if not unwanted(b)] or pool
        ready: dict[str, Backend] = {}
        later: dict[str, Backend] = {}
        for backend in pool:
            crowded = want.per_backend is not None and backend.leased_to(want.owner) >= want.per_backend
            sharer = want.owner if want.shares_slot else None
            waits = crowded or backend.why_blocked(want.lane, sharer) is not None or self._yields(backend, want.lane)
            (later if waits else ready)[backend.name] = backend
        return Candidates(ready, later, forced)

    def _yields(self, backend: Backend, lane: Lane) -> bool:
        """Who waits for this server to end its work of one kind must not see ever more of that kind go first."""
        return bool(self._line.ahead) and backend.dialect.scoring_is_exclusive and bool(self._line.ahead - {lane})

    def takes(self, name: str, want: Want) -> Backend | None:
        """The backend of that name, if it is among the best class of [`candidates`] and can take the work at once.
        What most choices need, with a look at one or two backends instead of all of them."""
        backend = self.backends.get(name)
        if (
            backend is None
            or name in want.tried
            or self._is_suspect(backend)
            or backend.why_ineligible() is not None
            or not backend.breaker.allows()
            or (want.per_backend is not None and backend.leased_to(want.owner) >= want.per_backend)
            or backend.why_blocked(want.lane, want.owner if want.shares_slot else None) is not None
            or self._yields(backend, want.lane)
        ):
            return None
        return backend

    @staticmethod
    def _is_suspect(backend: Backend) -> bool:
        return backend.health.state is Health.SUSPECT

    def _nobody(self) -> NoBackendAvailableError:
        waits = [b.breaker.seconds_until_trial() for b in self.backends.values()]
        retry_after = min((w for w in waits if w > 0), default=self._config.health_interval)
        return NoBackendAvailableError(self.reasons(), retry_after=retry_after)

    def try_lease(self, want: Want) -> Lease | None:
        """A lease at once, or `None` when the work has to wait.

        Raises:
            [`NoBackendAvailableError`]: when there is nobody to wait for either.
        """
        if not self.gives(want.owner):
            return None
        lease = self._lease_quickly(want)
        if lease is not None:
            return lease
        found = self.candidates(want)
        if not found.ready:
            return None
        if want.home is not None and want.home in found.ready:
            name = want.home
        else:
            loads = {name: backend.load for name, backend in found.ready.items()}
            if want.key is not None:
                order = balancer.sticky_order(
                    want.key, want.weight, loads, self.ring.walk, self._config.balance_factor
                )
            else:
                order = balancer.least_loaded(loads, self._rng)
            name = order[0]
        return found.ready[name].take(
            want.lane, want.weight, owner=want.owner, shares_slot=want.shares_slot, force=found.forced
        )

    def gives(self, owner: object) -> bool:
        """Whether leases are given to a call now, as far as the gate is concerned."""
        return self._gate is None or (self._gate_drains and owner in self.under_way)

    def _lease_quickly(self, want: Want) -> Lease | None:
        """A lease on the home, or on the sticky backend, if that is as it should be."""
        able: dict[str, Backend] = {}

        def load(name: str) -> int | None:
            backend = self.takes(name, want)
            if backend is None:
                return None
            able[name] = backend
            return backend.load

        name: str | None = None
        if want.home is not None:
            name = want.home
            load(name)
        elif want.key is not None:
            name = balancer.sticky(
                self.ring.walk(want.key),
                self.memory.holders(want.marks),
                load,
                mean=self._mean_load(),
                weight=want.weight,
                factor=self._config.balance_factor,
                keep=want.keep,
                rng=self._rng,
                names=self._names,
            )
        backend = None if name is None else able.get(name)
        if backend is None:
            return None
        return backend.take(want.lane, want.weight, owner=want.owner, shares_slot=want.shares_slot)

    def _mean_load(self) -> float:
        now = self._clock()
        if now - self._counted > _COUNT_SECONDS:
            self._able, self._counted = len(self.eligible()), now
        return self.tally.total / max(1, self._able)

    def split(
        self, want: Want, keys: Sequence[str], marks: Sequence[Sequence[int]] | None = None
    ) -> list[tuple[Lease, list[int]]] | None:
        """Plans a batch over everybody who is ready and takes a lease for each share; `None` when all is taken.

        Args:
            want ([`Want`]): What the batch needs; its weight is that of one prompt.
            keys (`Sequence[str]`): Affinity key per prompt.
            marks (`Sequence[Sequence[int]]`, *optional*): Hashes of each prompt's beginnings.

        Raises:
            [`NoBackendAvailableError`]: naming why not, per backend.
        """
        if self._gate is not None:
            return None
        found = self.candidates(want)
        if not found.ready:
            return None
        return self._share_out(want, keys, marks, found, {})

    def spread(
        self, lease: Lease, want: Want, keys: Sequence[str], marks: Sequence[Sequence[int]] | None = None
    ) -> list[tuple[Lease, list[int]]]:
        """Like [`split`], for a call that waited and holds one lease already."""
        held = {lease.backend.name: lease}
        lease.backend.reweigh(lease, 0)
        try:
            found = self.candidates(want)
            ready = {**found.ready, lease.backend.name: lease.backend}
            found = Candidates(ready, {}, found.forced)
        except NoBackendAvailableError:
            found = Candidates({lease.backend.name: lease.backend}, {}, forced=False)
        return self._share_out(want, keys, marks, found, held)

    def _share_out(
        self,
        want: Want,
        keys: Sequence[str],
        marks: Sequence[Sequence[int]] | None,
        found: Candidates,
        held: dict[str, Lease],
    ) -> list[tuple[Lease, list[int]]]:
        loads = {name: backend.load for name, backend in found.ready.items()}
        shards = balancer.split(
            keys,
            want.weight,
            loads,
            self.ring.walk,
            self._rng,
            speeds=self.pace.shares(loads),
            holders=None if marks is None else [self.memory.holders(few) for few in marks],
        )
        taken = []
        for name, indices in shards.items():
            lease = held.pop(name, None)
            if lease is None:
                lease = found.ready[name].take(
                    want.lane, 0, owner=want.owner, shares_slot=want.shares_slot, force=found.forced
                )
            lease.backend.reweigh(lease, want.weight * len(indices))
            taken.append((lease, indices))
        for lease in held.values():  # it waited, and others turned out to be emptier
            lease.backend.release_unused(lease)
        return taken

    # Waiting

    async def lease(self, want: Want, *, until: float, new_call: bool = False) -> Lease:
        """A lease, as soon as there is one.

        Args:
            want ([`Want`]): What is needed.
            until (`float`): The call's deadline on the pool's clock.
            new_call (`bool`, *optional*, defaults to `False`): Whether `max_queue` and `queue_timeout` apply.

        Raises:
            [`NoBackendAvailableError`]: when nobody is eligible for `backend_wait_seconds`, or only a weight update
                could change that.
            [`OverloadedError`]: when the queue is full or the wait was too long.
            `TimeoutError`: when the deadline is reached.
        """
        return await self.patiently(lambda: self.try_lease(want), want.lane, until=until, new_call=new_call)

    async def patiently(
        self, attempt: Callable[[], T | None], lane: Lane, *, until: float, new_call: bool = False
    ) -> T:
        """What `attempt` returns, as soon as it returns something; the rest is as in [`lease`].

        Args:
            attempt (`Callable`): May raise [`NoBackendAvailableError`], which is waited out for a while.
            lane ([`Lane`]): Kind of the work.
            until (`float`): The call's deadline on the pool's clock.
            new_call (`bool`, *optional*, defaults to `False`): Whether `max_queue` and `queue_timeout` apply.
        """
        alone_since: float | None = None

        def poll() -> T | NoBackendAvailableError | None:
            nonlocal alone_since
            try:
                found = attempt()
            except NoBackendAvailableError as error:
                now = self._clock()
                alone_since = now if alone_since is None else alone_since
                hopeless = all(b.only_stale() for b in self.backends.values())
                over = now - alone_since >= self._config.backend_wait_seconds
                return error if hopeless or over else None
            alone_since = None
            return found

        result = poll()
        if result is None:
            result = await self._queue(poll, lane, until=until, new_call=new_call)
        if isinstance(result, NoBackendAvailableError):
            raise result
        return result

    async def _queue(self, poll: Callable[[], Any], lane: Lane, *, until: float, new_call: bool) -> Any:
        limit = self._config.queue_timeout if new_call else None
        if new_call and self._config.max_queue is not None and self.queued >= self._config.max_queue:
            raise OverloadedError(
                f"every slot is taken and {self.queued} calls wait already (max_queue={self._config.max_queue}): "
                f"{self.pressure(lane)}",
                retry_after=self._retry_after(),
            )
        started = self._clock()
        timeout = until - started if limit is None else min(limit, until - started)
        try:
            return await self.until(poll, timeout=timeout, is_call=new_call, lane=lane)
        except TimeoutError:
            if limit is not None and self._clock() < until:
                raise OverloadedError(
                    f"no slot became free within {limit:g} s (queue_timeout): {self.pressure(lane)}",
                    retry_after=self._retry_after(),
                ) from None
            raise

    def pressure(self, lane: Lane) -> str:
        """What stands between a request and each backend, in words."""
        if self._gate is not None:
            return self._gate
        reasons = {b.url: b.why_ineligible() or b.why_blocked(lane) or "is free" for b in self.backends.values()}
        return "; ".join(f"{url} {reason}" for url, reason in reasons.items())

    def _retry_after(self) -> float:
        return max(1.0, min((b.seconds_busy() for b in self.backends.values()), default=1.0))

    async def until(
        self, poll: Callable[[], T | None], *, timeout: float, is_call: bool = False, lane: Lane | None = None
    ) -> T:
        """See [`Line.until`]."""
        return await self._line.until(poll, timeout=timeout, is_call=is_call, lane=lane)

    def changed(self) -> None:
        """Something may let waiting work go on."""
        self._line.changed()

    def _due(self) -> Iterator[float]:
        for backend in self.backends.values():
            yield backend.breaker.seconds_until_trial()
            yield backend.seconds_busy()

    def close(self) -> None:
        """Stops looking at what waits; its owners cancel it."""
        self._line.close()
