"""The circuit breaker of one backend: a transition table over what its traffic shows.

Probes are no traffic: a server that says "ok" and answers no request is exactly what a breaker is for.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass


class BreakerState(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Verdict(enum.Enum):
    """What one request says about its backend."""

    SUCCESS = "success"
    FAILURE = "failure"
    NEUTRAL = "neutral"  # cancelled, 4xx, 429: nothing about the backend


class _Event(enum.Enum):
    SUCCESS = enum.auto()
    THRESHOLD = enum.auto()  # a failure that makes the streak long enough
    COOLED = enum.auto()  # the cooldown is over, or the server was seen to restart


# What is not listed does not change the state.
TRANSITIONS: dict[tuple[BreakerState, _Event], BreakerState] = {
    (BreakerState.CLOSED, _Event.THRESHOLD): BreakerState.OPEN,
    (BreakerState.OPEN, _Event.COOLED): BreakerState.HALF_OPEN,
    (BreakerState.HALF_OPEN, _Event.SUCCESS): BreakerState.CLOSED,
    (BreakerState.HALF_OPEN, _Event.THRESHOLD): BreakerState.OPEN,
}


@dataclass(frozen=True)
class Permit:
    """The right to send one request, to be given back with [`CircuitBreaker.release`]."""

    epoch: int


class CircuitBreaker:
    """Ejects a backend after consecutive failures, and lets one request try it again after a while.

    The k-th ejection in a row lasts `k * cooldown` up to `max_cooldown` (Envoy's outlier detection); after
    `max_cooldown` without another one the count starts anew.

    Args:
        threshold (`int`): Consecutive failures that eject.
        cooldown (`float`): Seconds of the first ejection.
        max_cooldown (`float`): Seconds of the longest.
        clock (`Callable[[], float]`): Monotonic seconds.
    """

    def __init__(self, *, threshold: int, cooldown: float, max_cooldown: float, clock: Callable[[], float]) -> None:
        self._threshold, self._cooldown, self._max_cooldown = threshold, cooldown, max(cooldown, max_cooldown)
        self._clock = clock
        self._state = BreakerState.CLOSED
        self._epoch = 0
        self._failures = 0
        self._streak = 0  # ejections in a row
        self._probing = 0  # permits out while half-open
        self._reopens_at = 0.0
        self._closed_at = clock()
        self.ejections = 0
        self.last_failure = ""

    def __repr__(self) -> str:
        return f"<CircuitBreaker {self.describe()}>"

    def describe(self) -> str:
        """The state and its reason in words."""
        state = self.state
        if state is BreakerState.OPEN:
            return f"ejected for {self.seconds_until_trial():.0f} s after {self.last_failure}"
        if state is BreakerState.HALF_OPEN:
            return "half-open, its trial request is out" if self._probing else "half-open"
        return f"closed, {self._failures} failures in a row" if self._failures else "closed"

    @property
    def state(self) -> BreakerState:
        """The state now; an ejection that is over reads as half-open."""
        if self._state is BreakerState.OPEN and self._clock() >= self._reopens_at:
            self._apply(_Event.COOLED)
        return self._state

    @property
    def consecutive_failures(self) -> int:
        return self._failures

    def seconds_until_trial(self) -> float:
        """Seconds until the breaker lets a request through; 0 when it does so now."""
        return max(0.0, self._reopens_at - self._clock()) if self.state is BreakerState.OPEN else 0.0

    def allows(self) -> bool:
        """Whether [`acquire`] would be right without force."""
        state = self.state
        return state is BreakerState.CLOSED or (state is BreakerState.HALF_OPEN and not self._probing)

    def acquire(self, *, force: bool = False) -> Permit:
        """Takes a permit.

        Args:
            force (`bool`): Take it although the breaker is against it, because nobody else is left. An ejected
                backend becomes half-open by that, so that a success brings it back at once.

        Raises:
            `RuntimeError`: when the breaker does not allow it and nobody forces it.
        """
        if not self.allows():
            if not force:
                raise RuntimeError(f"breaker gives no permit: {self.describe()}")
            self._apply(_Event.COOLED)
        if self._state is BreakerState.HALF_OPEN:
            self._probing += 1
        return Permit(self._epoch)

    def release(self, permit: Permit, verdict: Verdict, *, reason: str = "", trip: bool = False) -> None:
        """Gives a permit back with what the request showed.

        Args:
            permit ([`Permit`]): From [`acquire`].
            verdict ([`Verdict`]): What the request says about the backend.
            reason (`str`, *optional*): A failure in words.
            trip (`bool`, *optional*, defaults to `False`): One failure is enough (the backend was suspect already).
        """
        if permit.epoch != self._epoch:
            return  # the state has changed since: what this request saw belongs to the past
        if self._state is BreakerState.HALF_OPEN:
            self._probing -= 1
        self.record(verdict, reason=reason, trip=trip)

    def record(self, verdict: Verdict, *, reason: str = "", trip: bool = False) -> None:
        """Counts a verdict that comes later than its permit."""
        state = self.state
        if verdict is Verdict.SUCCESS:
            self._failures = 0
            if state is BreakerState.CLOSED and self._clock() - self._closed_at > self._max_cooldown:
                self._streak = 0
            self._apply(_Event.SUCCESS)
        elif verdict is Verdict.FAILURE and state is not BreakerState.OPEN:
            self._failures += 1
            count = f"{self._failures} failures" if self._failures > 1 else "a failure"
            self.last_failure = f"{count} ({reason})" if reason else count
            if trip or self._state is BreakerState.HALF_OPEN or self._failures >= self._threshold:
                self._apply(_Event.THRESHOLD)

    def server_restarted(self) -> None:
        """A new process answers: what its predecessor did is no reason to wait."""
        self._apply(_Event.COOLED)

    def _apply(self, event: _Event) -> None:
        target = TRANSITIONS.get((self._state, event))
        if target is None:
            return
        now = self._clock()
        if target is BreakerState.OPEN:
            self.ejections += 1
            self._streak += 1
            self._reopens_at = now + min(self._cooldown * self._streak, self._max_cooldown)
        elif target is BreakerState.CLOSED:
            self._closed_at = now
        self._state = target
        self._epoch += 1
        self._probing = 0
        if target is not BreakerState.HALF_OPEN:
            self._failures = 0
