"""The right to a request on a backend, and what a backend has done with such rights so far."""

from __future__ import annotations

import asyncio
import enum
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .breaker import Permit
from .errors import AttemptError

if TYPE_CHECKING:
    from .backend import Backend


class Lane(enum.Enum):
    """Work that may share a server with its own kind; on some servers not with the other."""

    GENERATE = "generating"
    SCORE = "scoring"


@dataclass(eq=False)
class Lease:
    """The right to one request on one backend. It is given back by [`Backend.release`], whatever happened."""

    backend: Backend
    lane: Lane
    weight: int
    permit: Permit
    started: float
    owner: object = None
    shares_slot: bool = False
    weight_version: int | None = None
    # While its request is out:
    scope: asyncio.Timeout | None = None
    patience: float = 0.0
    until: float = 0.0
    broken_off: AttemptError | None = None


class Tally:
    """A number that several keep together: the completions that are out on all backends."""

    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = 0


class Leases:
    """The leases on one backend, and their sums. A choice looks at those of many backends, so none of them is added up
    when it is asked for.

    Args:
        tally ([`Tally`]): Completions out on all backends.
    """

    def __init__(self, tally: Tally) -> None:
        self._leases: set[Lease] = set()
        self._tally = tally
        self.load = 0
        self._of: Counter[int] = Counter()  # per owner; alive as long as their leases
        self._sharing: Counter[int] = Counter()
        self._sharers = 0
        self._in_lane: Counter[Lane] = Counter()

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases)

    def __contains__(self, lease: Lease) -> bool:
        return lease in self._leases

    def add(self, lease: Lease) -> None:
        self._leases.add(lease)
        self._count(lease, 1)

    def discard(self, lease: Lease) -> None:
        self._leases.discard(lease)
        self._count(lease, -1)

    def reweigh(self, lease: Lease, weight: int) -> None:
        """A lease is for more, or for less, than was thought."""
        if lease in self._leases:
            self.load += weight - lease.weight
            self._tally.total += weight - lease.weight
        lease.weight = weight

    def _count(self, lease: Lease, sign: int) -> None:
        self.load += sign * lease.weight
        self._tally.total += sign * lease.weight
        self._in_lane[lease.lane] += sign
        owner = id(lease.owner)
        self._sharers += sign * lease.shares_slot
        for counter in (self._of, self._sharing) if lease.shares_slot else (self._of,):
            counter[owner] += sign
            if not counter[owner]:
                del counter[owner]

    def of(self, owner: object) -> int:
        """How many belong to one call."""
        return self._of.get(id(owner), 0)

    def shares_slot(self, owner: object) -> bool:
        """Whether a call has a slot that its requests share."""
        return id(owner) in self._sharing

    @property
    def slots(self) -> int:
        """Slots in use; requests that share one with the rest of their call count once."""
        return len(self._leases) - self._sharers + len(self._sharing)

    def in_lane(self, lane: Lane) -> bool:
        """Whether there are any of this kind."""
        return self._in_lane[lane] > 0


@dataclass(frozen=True)
class BackendStatistics:
    """A backend at one moment.

    Args:
        name (`str`): `host:port` and path prefix.
        url (`str`): Its URL.
        eligible (`bool`): Whether it may take requests.
        reason (`str`): Why not, empty if it may.
        health (`str`): `"up"`, `"suspect"`, `"down"` or `"not probed yet"`.
        breaker (`str`): `"closed"`, `"open"` or `"half-open"`.
        weight_version (`int` or `None`): The weights it holds; `None` when unknown.
        model_version (`str` or `None`): What its health answer says.
        inflight (`int`): Requests out now.
        load (`int`): Completions out now.
        requests (`int`): Requests sent so far.
        answered (`int`): Requests it has answered.
        prompts (`int`): Prompts it has answered.
        failures (`int`): Requests that failed.
        failovers (`int`): Prompts taken from it and sent elsewhere.
        ejections (`int`): Times its breaker opened.
        latency (`float` or `None`): Mean seconds of the requests it answered.
        draining (`bool`): Whether it is on its way out.
    """

    name: str
    url: str
    eligible: bool
    reason: str
    health: str
    breaker: str
    weight_version: int | None
    model_version: str | None
    inflight: int
    load: int
    requests: int
    answered: int
    prompts: int
    failures: int
    failovers: int
    ejections: int
    latency: float | None
    draining: bool
