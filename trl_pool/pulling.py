"""A large batch under way: servers are given what keeps them full, and more as they answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from . import queues
from .backend import Backend
from .dispatch import Dispatcher, Want
from .leases import Lease
from .schedule import PIECE, SURPLUS, Schedule, Standing, room

LOOK_SECONDS = 1.0
"""Seconds between two looks at the servers' queues. In one of them a server ends a few per cent of what it runs, much
less than what waits in it."""

_LOOKS_PER_SECOND = 200
"""Most looks a second, over all servers."""

_STALE_SECONDS = 5.0
"""How long what a server said of its queue is of use."""

_ROUND_SECONDS = 0.25
"""How often backends are thought of again that had no room, or could not take anything."""


class Pull:
    """Hands out the prompts of one call.

    Args:
        want ([`Want`]): What a prompt needs.
        shards (`Sequence[tuple[Lease, list[int]]]`): The plan: per backend that can begin, its lease and its share.
        dispatcher ([`Dispatcher`]): Gives further leases.
        clock (`Callable[[], float]`): Monotonic seconds.
        timeout (`float`): Seconds that a server has to say how long its queue is.
    """

    def __init__(
        self,
        want: Want,
        shards: Sequence[tuple[Lease, list[int]]],
        *,
        dispatcher: Dispatcher,
        clock: Callable[[], float],
        timeout: float,
    ) -> None:
        self._want, self._dispatcher, self._clock, self._timeout = want, dispatcher, clock, timeout
        self._out: dict[str, dict[Lease, float]] = {}
        self._hungry: set[str] = set()
        self._filled = -float("inf")
        self.schedule = Schedule(
            {lease.backend.name: share for lease, share in shards},
            want.weight,
            pace=dispatcher.pace,
            standing=self._standing,
            load=self._load,
            clock=clock,
        )

    def begin(self, lease: Lease) -> list[int]:
        """The first piece of a backend that has a lease for all of its share: the whole share if there is room for it
        now, else a small one. None, and the lease is given back, if it would end anything later than the others
        have done everything."""
        backend = lease.backend
        free = self._room(backend) + lease.weight
        share = self.schedule.share(backend.name)
        whole = share * self._want.weight <= free
        piece = self.schedule.take(backend.name, share if whole else self._size(free))
        if piece:
            backend.reweigh(lease, len(piece) * self._want.weight)
            self._sent(lease)
        else:
            backend.release_unused(lease)
        return piece

    def take(self) -> tuple[Lease, list[int]] | None:
        """The next piece, with a lease for it; `None` when nobody has room now.

        Raises:
            [`NoBackendAvailableError`]: when there is nobody to wait for.
        """
        if not self._dispatcher.gives(self._want.owner):
            return None
        now = self._clock()
        if now - self._filled > _ROUND_SECONDS:
            self._hungry, self._filled = set(self._dispatcher.backends), now
        while self._hungry:
            name = next(iter(self._hungry))
            backend = self._dispatcher.takes(name, self._want)
            piece = [] if backend is None else self._piece(backend)
            if backend is not None and piece:
                return self._leased(backend, piece), piece
            self._hungry.discard(name)
        if not any(self._out.values()):
            found = self._dispatcher.candidates(self._want)
            # With nothing of ours out nothing would wake us. So whoever is left takes something: one that is slow, one
            # that is suspect, and where breakers alone keep all away, one on trial. (A piece that failed may be on its
            # way somewhere already.)
            if not any(b.leased_to(self._want.owner) for b in self._dispatcher.backends.values()):
                for backend in found.ready.values():
                    piece = self._piece(backend, anyway=True)
                    if piece:
                        return self._leased(backend, piece, force=found.forced), piece
        return None

    def _leased(self, backend: Backend, piece: Sequence[int], *, force: bool = False) -> Lease:
        want = self._want
        lease = backend.take(want.lane, len(piece) * want.weight, owner=want.owner, shares_slot=True, force=force)
        self._sent(lease)
        return lease

    def _piece(self, backend: Backend, *, anyway: bool = False) -> list[int]:
        weight = self._want.weight
        # Others' work may fill a server for good; a part of it is ours all the same, and waits its turn inside.
        ours = sum(lease.weight for lease in self._out.get(backend.name, ()))
        free = max(self._room(backend), int(SURPLUS * backend.max_num_seqs) - ours)
        if free < weight and backend.load:
            return []
        share = self.schedule.share(backend.name)
        whole = not self._out.get(backend.name) and 0 < share * weight <= free
        reserve = int(SURPLUS * backend.max_num_seqs) // weight
        count = share if whole else self._size(free)
        # In their order: a body that holds the whole batch is passed on as it came.
        return sorted(self.schedule.take(backend.name, count, reserve=reserve, anyway=anyway))

    def _size(self, free: int) -> int:
        return max(1, min(PIECE, free) // self._want.weight)

    def _room(self, backend: Backend) -> int:
        fresh = backend.queue is not None and self._clock() - backend.queue.at < _STALE_SECONDS
        # Until it was asked for the first time a server is given no more than it can run.
        guess = self._dispatcher.pace.occupancy if backend.tells_queue is False else None
        return room(
            backend.queue if fresh else None,
            max_num_seqs=backend.max_num_seqs,
            load=backend.load,
            occupancy=guess,
        )

    # What became of it

    def _sent(self, lease: Lease) -> None:
        self._out.setdefault(lease.backend.name, {})[lease] = self._clock()

    def answered(self, lease: Lease, lengths: Sequence[int]) -> None:
        """A piece was answered, with completions of these lengths (none if they are not known)."""
        since = self.ended(lease)
        if since is not None and len(lengths) <= max(PIECE, self._want.weight):
            self._dispatcher.pace.observe_piece(lease.backend.name, self._clock() - since, lengths)

    def ended(self, lease: Lease) -> float | None:
        """A piece has come to its end, in whatever way. Returns when it was sent, `None` if it was none of these."""
        self._hungry.add(lease.backend.name)
        return self._out.get(lease.backend.name, {}).pop(lease, None)

    def _standing(self) -> dict[str, Standing]:
        found = {}
        for name, backend in self._dispatcher.backends.items():
            able = backend.why_ineligible() is None and backend.breaker.allows()
            if able and not backend.seconds_busy():  # who asked to be left alone cannot come for its share
                found[name] = Standing(backend.load, min(self._out.get(name, {}).values(), default=None))
        return found

    def _load(self, name: str) -> int:
        backend = self._dispatcher.backends.get(name)
        return 0 if backend is None else backend.load

    def release(self) -> None:
        """Gives back every lease that it has given and that nobody has ended: at the end of the call, however that
        came, there may be one that never reached it."""
        for leases in self._out.values():
            for lease in leases:
                lease.backend.release_unused(lease)

    async def watch(self) -> None:
        """Looks at the servers' queues, again and again."""
        while True:
            backends = list(self._dispatcher.backends.values())
            await asyncio.sleep(max(LOOK_SECONDS, len(backends) / _LOOKS_PER_SECOND))
            await queues.look(backends, timeout=self._timeout, clock=self._clock)
            self.looked()
            self._dispatcher.changed()

    def looked(self) -> None:
        """What servers say of their queues is new: everybody may have room."""
        self._hungry.update(self._dispatcher.backends)
