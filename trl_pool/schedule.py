"""Who gets which prompts of a batch, and when: the plan of one call, and what becomes of it as servers answer.

A batch that fits into what the servers run at once is sent at once: every prompt starts at the first moment, and there
is nothing to gain by waiting. A larger one is not committed in advance, because nobody knows how long completions will
be, nor how fast servers are: each server gets what keeps it full, and comes back for more as it answers. It takes
prompts of its own share first, whose prefixes it has; when that is used up it takes from whoever has most left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .pace import Pace

PIECE = 8
"""Completions in a request of a batch that is pulled. Small, since a server is seen to have room only when the last
completion of a request has ended; not one, since every request costs something."""

DEFAULT_MAX_NUM_SEQS = 256
"""vLLM's default for most GPUs (1024 for the largest), where a server does not say."""

SURPLUS = 0.25
"""Completions that wait inside a server, as a share of those that it runs, so that it never runs dry between two looks
at it. More would only be committed too early."""

_ALIKE = 1.25
"""By how much a backend's requests may take longer than the quickest backend's without its being called slow."""

_LOOK_SECONDS = 0.2
"""How long a comparison of all backends holds."""


@dataclass
class Queue:
    """What a server said of its queue, and what has become of it since.

    Args:
        running (`int`): Sequences that it ran.
        waiting (`int`): Sequences that waited inside it.
        at (`float`): When it was asked.
        changed (`int`, *optional*, defaults to `0`): Completions sent to it since, less those that have ended.
    """

    running: int
    waiting: int
    at: float
    changed: int = 0

    def answered(self, sent_at: float, now: float, lengths: Sequence[int]) -> None:
        """A request was answered.

        Args:
            sent_at (`float`): When it had been sent.
            now (`float`): When it was answered.
            lengths (`Sequence[int]`): Tokens of each of its completions. Those that ended before the server was asked
                were not in its count any more.
        """
        longest = max(lengths, default=0)
        token_seconds = (now - sent_at) / max(1, longest)
        self.changed -= sum(now - (longest - length) * token_seconds > self.at for length in lengths)


def room(queue: Queue | None, *, max_num_seqs: int, load: int, occupancy: float | None) -> int:
    """Completions that a server can take, so that it runs as many as it can and few wait inside it.

    Args:
        queue ([`Queue`] or `None`): What it said last.
        max_num_seqs (`int`): Sequences that it runs at once.
        load (`int`): Completions that are out.
        occupancy (`float` or `None`): For a server that says nothing: the share of what is out that runs
            ([`Pace.occupancy`]). `None` for one that will.
    """
    if queue is not None:
        # One where some wait runs as many as it can, be it fewer than its limit: its memory may not hold more.
        runs = queue.running if queue.waiting else max_num_seqs
        return int(runs * (1 + SURPLUS)) - queue.running - queue.waiting - queue.changed
    return int(max_num_seqs * (1 + SURPLUS) / (occupancy or 1.0)) - load


@dataclass(frozen=True)
class Standing:
    """A backend that takes part, at one moment.

    Args:
        load (`int`): Its completions that are out.
        since (`float` or `None`): When the oldest of the call's requests that are out was sent.
    """

    load: int
    since: float | None


class Schedule:
    """The prompts of one call that nobody has been given yet.

    Args:
        homes (`Mapping[str, Sequence[int]]`): Indices of prompts per backend, in the order in which to send them.
        weight (`int`): Completions per prompt.
        pace ([`Pace`]): What is known of the backends' speed.
        standing (`Callable[[], Mapping[str, Standing]]`): The backends that take part.
        load (`Callable[[str], int]`): Completions that a backend has out; 0 for one that is gone.
        clock (`Callable[[], float]`): Monotonic seconds.
    """

    def __init__(
        self,
        homes: Mapping[str, Sequence[int]],
        weight: int,
        *,
        pace: Pace,
        standing: Callable[[], Mapping[str, Standing]],
        load: Callable[[str], int],
        clock: Callable[[], float],
    ) -> None:
        self._queues = {name: deque(indices) for name, indices in homes.items() if indices}
        self._weight, self._pace, self._standing, self._clock = weight, pace, standing, clock
        self.load = load
        self.held = sum(map(len, self._queues.values()))
        self._looked = -float("inf")
        self._slow: dict[str, bool] = {}
        self._present: Mapping[str, Standing] = {}

    def __repr__(self) -> str:
        queues = {name: len(queue) for name, queue in self._queues.items()}
        return f"<Schedule {self.held} prompts held: {queues}>"

    def share(self, name: str) -> int:
        """Prompts of a backend's own share that are left."""
        return len(self._queues.get(name, ()))

    def take(self, name: str, count: int, *, reserve: int = 0, anyway: bool = False) -> list[int]:
        """Prompts for a backend that has room: of its own share, else of whoever has most left.

        Args:
            name (`str`): The backend.
            count (`int`): Most prompts.
            reserve (`int`, *optional*, defaults to `0`): Prompts that are left to another that will soon ask for them.
            anyway (`bool`, *optional*, defaults to `False`): Even if the backend is slow: no other has anything.

        Returns:
            `list[int]`: Their indices; none when they are better left to others.
        """
        self._compare()
        if self._slow.get(name) and not anyway:
            return []
        own = self._queues.get(name)
        if own:
            taken = [own.popleft() for _ in range(min(count, len(own)))]
            if not own:
                del self._queues[name]
        else:
            victim, spare = self._richest(self.load(name) // self._weight + reserve)
            # From its end: what it would have sent last.
            taken = [self._queues[victim].pop() for _ in range(min(count, spare))]
            if victim and not self._queues[victim]:
                del self._queues[victim]
        self.held -= len(taken)
        return taken

    def drop(self) -> list[int]:
        """All that is left. Nobody gets it any more."""
        left = [index for queue in self._queues.values() for index in queue]
        self._queues.clear()
        self.held = 0
        return left

    def _richest(self, mine: int) -> tuple[str, int]:
        """Who has most left, and how many prompts of it may be taken by somebody who has `mine` out: they are even
        then. Of those who are slow, gone, or doing nothing, all."""
        found, spare = "", 0
        for name, queue in self._queues.items():
            most = len(queue)
            load = self.load(name)
            if load and not self._slow.get(name, True):
                most = min(most, (most + load // self._weight - mine + 1) // 2)
            if most > spare:
                found, spare = name, most
        return found, spare

    def _compare(self) -> None:
        """Finds the backends that would end a piece taken now later than the others had everything done. They must not
        take the last; what they have not taken is anybody's. So is what belongs to those who are gone."""
        now = self._clock()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        self._present = self._standing()
        paces = {name: self._expected(name, standing, now) for name, standing in self._present.items()}
        known = {name: seconds for name, seconds in paces.items() if seconds}
        quickest = min(known.values(), default=0.0)
        rate = sum(standing.load / known[name] for name, standing in self._present.items() if name in known)
        self._slow = {}
        for name, standing in self._present.items():
            seconds = known.get(name, 0.0)
            others = rate - standing.load / seconds if seconds else rate
            late = self._pace.spread * (seconds - quickest)
            slow = seconds > _ALIKE * quickest and others > 0 and late > self.held * self._weight / others
            self._slow[name] = slow

    def _expected(self, name: str, standing: Standing, now: float) -> float | None:
        """Seconds that a piece taken now would need."""
        seconds = self._pace.piece_seconds(name)
        if seconds is None or standing.since is None:
            return seconds
        # One that has not answered for long is slower than it ever was.
        return max(seconds, (now - standing.since) / self._pace.spread)
