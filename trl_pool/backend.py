"""One server: its connection, its dialect, the leases on it, and three separate facts about it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

from .addresses import BackendAddress
from .breaker import CircuitBreaker, Verdict
from .config import PoolConfig
from .dialects.base import Dialect
from .errors import AttemptError, Outcome, UnknownBackendError
from .exchange import Answer, Exchange
from .facts import Health, HealthFact, SyncFact
from .identity import Identity
from .leases import BackendStatistics, Lane, Lease, Leases, Tally
from .orphans import Orphans
from .schedule import DEFAULT_MAX_NUM_SEQS, Queue

SIMULATED = "trl-pool-sim"
"""What simulated servers call themselves in the `server` header."""


# A server that says "busy" again and again is left alone for longer, whatever its Retry-After says.
_BUSY_FLOOR_SECONDS = 0.1
_BUSY_CEILING_SECONDS = 5.0


class Backend:
    """One server as the pool sees it.

    Args:
        address ([`BackendAddress`]): Where it is.
        dialect ([`Dialect`]): What it is taken to speak until it was asked.
        config ([`PoolConfig`]): Limits and thresholds.
        exchange ([`Exchange`]): HTTP to it.
        clock (`Callable[[], float]`): Monotonic seconds.
        required_weights (`Callable[[], int]`): The weight version that may serve.
        changed (`Callable[[], None]`): Called after anything that may let waiting work go on.
        doubted (`Callable[[Backend], None]`, *optional*): Called when traffic suggests that the server is gone.
        restarted (`Callable[[Backend], None]`, *optional*):
            Called when its process may be a new one, whose caches are empty.
        tally ([`Tally`], *optional*): Completions out on all backends.
    """

    def __init__(
        self,
        address: BackendAddress,
        *,
        dialect: Dialect,
        config: PoolConfig,
        exchange: Exchange,
        clock: Callable[[], float],
        required_weights: Callable[[], int],
        changed: Callable[[], None],
        doubted: Callable[[Backend], None] = lambda backend: None,
        restarted: Callable[[Backend], None] = lambda backend: None,
        tally: Tally | None = None,
    ) -> None:
        self.address, self.name, self.url = address, address.name, address.url
        self.dialect, self.exchange = dialect, exchange
        self._config, self._clock = config, clock
        self._required_weights, self._changed, self._doubted = required_weights, changed, doubted
        self._restarted = restarted
        self.health = HealthFact(silent_means_suspect=dialect.silent_while_busy)
        self.sync = SyncFact()
        self.breaker = CircuitBreaker(
            threshold=config.fail_eject_threshold,
            cooldown=config.cooldown_seconds,
            max_cooldown=config.max_cooldown_seconds,
            clock=clock,
        )
        self.draining = False
        self._frozen = False
        self.simulated = False
        self.incarnation = 0
        self.certain = 0  # the incarnation before its process was doubted
        self.identity: Identity | None = None
        self.refusal: str | None = None  # why it cannot share work with the others
        self._identified = -1  # the incarnation that said who it is
        self.doubt: str | None = None  # why its process may be a new one, until a probe has cleared it up
        self._busy_until = 0.0
        self._busy_streak = 0
        self._leases = Leases(tally or Tally())
        self.queue: Queue | None = None  # what it said of its queue last
        self.tells_queue: bool | None = None  # whether it says that at all, once it was asked
        self._orphans = Orphans(clock, changed)
        self._removed = False
        self._requests = self._prompts = self._failures = self._failovers = 0
        self._seconds = 0.0
        self._answered = 0

    def __repr__(self) -> str:
        return (
            f"<Backend {self.url} {self.health.state.value}, breaker {self.breaker.describe()}, "
            f"weights v{self.sync.held}, {self.inflight}/{self._config.max_inflight_per_backend} in flight>"
        )

    # Who it is

    @property
    def recognised(self) -> bool:
        """Whether its present process was asked who it is."""
        return self._identified == self.incarnation

    def recognise(self, identity: Identity, dialect: Dialect) -> None:
        """Takes down what its process says about itself."""
        self.identity, self.dialect, self._identified = identity, dialect, self.incarnation
        self.health.silent_means_suspect = dialect.silent_while_busy

    # What it is doing

    @property
    def inflight(self) -> int:
        """Requests out."""
        return len(self._leases)

    @property
    def slots_taken(self) -> int:
        """Slots in use: requests out, of which those that share one with the rest of their call count once."""
        return self._leases.slots

    @property
    def load(self) -> int:
        """Completions out."""
        return self._leases.load

    @property
    def max_num_seqs(self) -> int:
        """Sequences that it runs at once, or is taken to run if it does not say."""
        told = None if self.identity is None else self.identity.max_num_seqs
        return DEFAULT_MAX_NUM_SEQS if told is None else told

    def leased_to(self, owner: object) -> int:
        """Requests out that belong to one call."""
        return self._leases.of(owner)

    @property
    def working(self) -> bool:
        """Whether the server has work of ours, waited for or not."""
        return bool(len(self._leases) or len(self._orphans))

    @property
    def stuck(self) -> str | None:
        """The control call that has not returned, if there is one; or scoring that should have long ago."""
        if not len(self._orphans):
            return None
        long_ago = self._clock() - self._config.control_timeout
        for what, since in self._orphans:
            if what != Lane.SCORE.value or since < long_ago:
                return what
        return None

    def holds_lane(self, lane: Lane) -> bool:
        """Whether requests of this kind are out, waited for or not."""
        if lane is Lane.SCORE and any(what == Lane.SCORE.value for what, _ in self._orphans):
            return True
        return self._leases.in_lane(lane)

    # Whether it may have a request

    def why_ineligible(self) -> str | None:
        """Why it may take no request at all, breaker aside; `None` if it may."""
        if self.draining:
            return "is draining"
        if self.refusal is not None:
            return self.refusal
        if self.stuck:
            return f"is stuck: {self.stuck} has not returned"
        stale = self.why_stale()
        if stale is not None:
            return stale
        wanted = self._config.required_model_version
        if wanted is not None and self._required_weights() == 0 and self.health.model_version != wanted:
            return f"reports model version {self.health.model_version!r}, required is {wanted!r}"
        if not self.health.usable:
            return f"is down ({self.health.reason})" if self.health.reason else "is down"
        return None

    def why_stale(self) -> str | None:
        """Why its weights forbid it to serve; `None` if they do not."""
        return self.sync.why_stale(self._required_weights(), self._config.max_staleness)

    @property
    def updated(self) -> bool:
        """Whether the pool has made a weight update."""
        return self._required_weights() > 0

    def only_stale(self) -> bool:
        """Whether waiting cannot help, because only a weight update can."""
        may_pass = self.sync.believed is not None or (self.sync.conflict and not self.updated)
        return self.refusal is not None or (self.why_stale() is not None and not may_pass)

    def why_blocked(self, lane: Lane, sharer: object = None) -> str | None:
        """Why it has to be waited for just now; `None` if a request may go out.

        Args:
            lane ([`Lane`]): Of the request.
            sharer (`object`, *optional*): The call whose slot it may share.
        """
        has_slot = sharer is not None and self._leases.shares_slot(sharer)
        if not has_slot and self.slots_taken >= self._config.max_inflight_per_backend:
            return f"has all {self._config.max_inflight_per_backend} slots taken"
        wait = self.seconds_busy()
        if wait > 0:
            return f"asked to be left alone for {wait:.1f} s"
        other = Lane.SCORE if lane is Lane.GENERATE else Lane.GENERATE
        if self.dialect.scoring_is_exclusive and self.holds_lane(other):
            return f"is {other.value}, which excludes {lane.value}"
        return None

    def seconds_busy(self) -> float:
        """Seconds for which it asked to be left alone."""
        return max(0.0, self._busy_until - self._clock())

    # Leases

    def take(
        self, lane: Lane, weight: int, *, owner: object = None, shares_slot: bool = False, force: bool = False
    ) -> Lease:
        """Takes a slot and the breaker's permit. Synchronous: what was checked before still holds."""
        lease = Lease(self, lane, weight, self.breaker.acquire(force=force), self._clock(), owner, shares_slot)
        lease.weight_version = self.sync.held
        self._leases.add(lease)
        if self.queue is not None:
            self.queue.changed += weight
        return lease

    def reweigh(self, lease: Lease, weight: int) -> None:
        """A lease turns out to be for more completions than was thought, or for fewer."""
        if self.queue is not None and lease in self._leases:
            self.queue.changed += weight - lease.weight
        self._leases.reweigh(lease, weight)

    def release(self, lease: Lease, verdict: Verdict, *, reason: str = "") -> None:
        """Gives a lease back with what the request showed; a second time does nothing."""
        if lease not in self._leases:
            return
        self._leases.discard(lease)
        if self.queue is not None and verdict is not Verdict.SUCCESS:
            self.queue.changed -= lease.weight  # what nobody waits for is aborted
        suspect = self.health.state is Health.SUSPECT
        self.breaker.release(lease.permit, verdict, reason=reason, trip=suspect)
        self._changed()

    def release_unused(self, lease: Lease) -> None:
        """Gives back a lease that no request was sent on."""
        self.release(lease, Verdict.NEUTRAL)

    def served(self, lease: Lease, prompts: int, lengths: Sequence[int] = ()) -> None:
        """Counts an answer.

        Args:
            lease ([`Lease`]): Of the request.
            prompts (`int`): Prompts in it.
            lengths (`Sequence[int]`, *optional*): Tokens of its completions, where they are known.
        """
        if self.queue is not None:
            self.queue.answered(lease.started, self._clock(), lengths or (1,) * lease.weight)
        self.health.served()
        self._busy_streak = 0
        self._prompts += prompts
        self._line_moved(lease)
        self._answered += 1
        self._seconds += self._clock() - lease.started

    def failed(self, error: AttemptError) -> None:
        """Counts a failed request and draws what it says about health and weights."""
        self._failures += error.outcome is not Outcome.BUSY
        if error.outcome is Outcome.BUSY:
            floor = min(_BUSY_FLOOR_SECONDS * 2**self._busy_streak, _BUSY_CEILING_SECONDS)
            self._busy_streak = min(self._busy_streak + 1, 10)
            self._busy_until = self._clock() + max(error.retry_after or 0.0, floor)
        if error.refused:
            self.gone(error.detail)
        elif error.outcome is Outcome.LOST:
            self.doubted(f"a connection broke: {error.detail}")
            self._doubted(self)

    def moved(self, prompts: int) -> None:
        """Counts prompts that are sent elsewhere."""
        self._failovers += prompts

    # What was seen

    def gone(self, reason: str) -> None:
        """Nobody listens there: the process is gone, and whoever comes back has other weights."""
        self.health.refused(reason)
        self._orphans.bury()
        self.may_have_restarted("its port was closed since the last update")

    def doubted(self, reason: str) -> None:
        """A broken connection may be all that is left of the process, or just that. The next probe clears it up; until
        then the backend takes no request, if it has had an update to lose."""
        self.doubt = reason
        if self._required_weights() > 0:
            self.sync.doubted(reason)

    def cleared_up(self, *, same: bool) -> None:
        """The doubt is over.

        Args:
            same (`bool`): Whether the process is proved to be the one that it was.
        """
        reason, self.doubt = self.doubt, None
        if not same:
            self.incarnation += 1
            self._begin_anew()
            if self.sync.believed is not None:
                self.sync.lost(reason or "its process may be a new one")
        elif self.sync.believed is not None:
            self.sync.reached(self.sync.believed)
        self._changed()

    def _begin_anew(self) -> None:
        """What was learnt of its process is not true of the next one."""
        self.queue = self.tells_queue = None
        self._restarted(self)

    def may_have_restarted(self, reason: str) -> None:
        """Whoever answers next may be a new process: it has no communicator, and after the first update the wrong
        weights. A `trl` server cannot say so; others are asked with the next probe."""
        self.incarnation += 1
        self._begin_anew()
        self.doubt = None
        if self._required_weights() > 0 and self.sync.held is not None:
            if self.identity is not None and self.identity.keeps_version:
                self.certain = self.incarnation - 1
                self.sync.doubted(reason)
            else:
                self.sync.lost(reason)
        elif self.sync.believed is not None and not (self.identity is not None and self.identity.keeps_version):
            self.sync.lost(reason)

    # Traffic

    async def post(
        self,
        lease: Lease,
        path: str,
        body: bytes,
        *,
        patience: float,
        until: float,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Sends a leased request.

        A scoring request that nobody waits for any more is not dropped where that matters: the server would go on
        with it, and mix up its reply with that of the next generation. It keeps its lane until it is answered.

        Args:
            lease ([`Lease`]): Its lease.
            path (`str`): Where to.
            body (`bytes`): What.
            patience (`float`): Seconds without an answer after which it has timed out. On a server that works
                through its requests one after the other they start anew with each answer to another: waiting in its
                line is no fault of anybody's.
            until (`float`): When to give up in any case, on the pool's clock.
            headers (`Mapping[str, str]`, *optional*): Sent along.
        """
        if self._removed:
            raise AttemptError(self.url, Outcome.UNAVAILABLE, "it was removed from the pool")
        self._requests += 1
        now = asyncio.get_running_loop().time()
        lease.patience, lease.until = patience, now + until - self._clock()
        try:
            async with asyncio.timeout_at(self._due(lease, now)) as lease.scope:
                request = self.exchange.post(path, body, timeout=None, headers=headers)
                if lease.lane is Lane.SCORE and self.dialect.scoring_is_exclusive:
                    return await self._orphans.outlive(request, Lane.SCORE.value)
                return await request
        except TimeoutError:
            if lease.broken_off is not None:
                raise lease.broken_off from None
            seconds = asyncio.get_running_loop().time() - now
            raise AttemptError(self.url, Outcome.TIMED_OUT, f"no answer within {seconds:.1f} s") from None
        finally:
            lease.scope = None

    def _line_moved(self, answered: Lease) -> None:
        """The server has finished one request and turns to the next: their time starts now."""
        if self.dialect.one_request_at_a_time:
            self._time_anew(lease for lease in self._leases if lease is not answered)

    @property
    def frozen(self) -> bool:
        """Whether it is paused with its requests kept. They are not late, however long that takes."""
        return self._frozen

    @frozen.setter
    def frozen(self, frozen: bool) -> None:
        self._frozen = frozen
        self._time_anew(self._leases)

    def _due(self, lease: Lease, now: float) -> float:
        """When a request has timed out, if its time starts now."""
        return lease.until if self._frozen else min(now + lease.patience, lease.until)

    def _time_anew(self, leases: Iterable[Lease]) -> None:
        now = asyncio.get_running_loop().time()
        for lease in leases:
            if lease.scope is not None and lease.broken_off is None and not lease.scope.expired():
                lease.scope.reschedule(self._due(lease, now))

    async def control(self, path: str, body: bytes | None, *, timeout: float | None = None) -> Answer:
        """Sends a control call, exactly once. One that does not return in time leaves the backend stuck until it
        does (or until the connection breaks).

        Args:
            path (`str`): Where to.
            body (`bytes` or `None`): What.
            timeout (`float`, *optional*): Seconds, `control_timeout` by default.
        """
        if self._removed:
            raise AttemptError(self.url, Outcome.UNAVAILABLE, "it was removed from the pool")
        limit = self._config.control_timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(limit):
                return await self._orphans.outlive(self.exchange.control(path, body, timeout=None), path)
        except TimeoutError:
            raise AttemptError(self.url, Outcome.TIMED_OUT, f"no answer within {limit:.1f} s") from None

    def break_off(self, outcome: Outcome, reason: str) -> None:
        """Ends every request that is out, as failed with that outcome, so that it is served elsewhere, and waits for
        nothing any more."""
        self._orphans.bury()
        self.break_off_requests(outcome, reason)

    def break_off_requests(self, outcome: Outcome, reason: str) -> None:
        """The same, except for control calls that have not returned."""
        for lease in self._leases:
            if lease.scope is not None and not lease.scope.expired():
                lease.broken_off = AttemptError(self.url, outcome, f"broken off: {reason}")
                lease.scope.reschedule(asyncio.get_running_loop().time())

    async def aclose(self) -> None:
        """Ends what is still out and closes the connections."""
        self._removed = True
        self.break_off(Outcome.UNAVAILABLE, "it was removed from the pool")
        await asyncio.gather(*self._orphans.bury(), return_exceptions=True)
        await self.exchange.aclose()

    def statistics(self) -> BackendStatistics:
        """The backend at this moment."""
        reason = self.why_ineligible()
        if reason is None and not self.breaker.allows():
            reason = self.breaker.describe()
        return BackendStatistics(
            name=self.name,
            url=self.url,
            eligible=reason is None,
            reason=reason or "",
            health=self.health.state.value,
            breaker=self.breaker.state.value,
            weight_version=self.sync.held,
            model_version=self.health.model_version,
            inflight=self.inflight,
            load=self.load,
            requests=self._requests,
            answered=self._answered,
            prompts=self._prompts,
            failures=self._failures,
            failovers=self._failovers,
            ejections=self.breaker.ejections,
            latency=self._seconds / self._answered if self._answered else None,
            draining=self.draining,
        )


def find(backends: dict[str, Backend], name: str) -> Backend:
    """The backend of that name or URL.

    Raises:
        [`UnknownBackendError`]: naming those there are.
    """
    for backend in backends.values():
        if name.rstrip("/") in (backend.name, backend.url):
            return backend
    raise UnknownBackendError(f"no backend {name!r}; there are: {', '.join(backends) or 'none'}")
