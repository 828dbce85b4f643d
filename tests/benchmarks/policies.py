"""Policies that spread work over modelled servers: the pool's own code, and what it is compared with."""

from __future__ import annotations

import abc
import random
from collections.abc import Callable, Sequence

from trl_pool import balancer
from trl_pool.breaker import Verdict
from trl_pool.config import PoolConfig
from trl_pool.dispatch import Want
from trl_pool.leases import Lane, Lease
from trl_pool.prefixes import marks
from trl_pool.pulling import LOOK_SECONDS, Pull
from trl_pool.ring import HashRing
from trl_pool.schedule import SURPLUS, Queue

from .engine_model import Clock, Prompt, Request, Server
from .fleets import dispatcher_over

ANSWER_SECONDS = 1e-3
"""From an answer to the next request: the network, and the trainer's process."""

Lengths = Sequence[Sequence[int]]


class Policy(abc.ABC):
    """Sends prompts to servers."""

    def __init__(self, servers: Sequence[Server], clock: Clock, rng: random.Random) -> None:
        self.servers = {server.name: server for server in servers}
        self.names = list(self.servers)
        self.clock, self.rng = clock, rng
        self.loads = dict.fromkeys(self.names, 0)

    @abc.abstractmethod
    def batch(
        self,
        prompts: Sequence[Prompt],
        lengths: Lengths,
        done: Callable[[], None],
        answers: Sequence[list[int]] | None = None,
    ) -> None:
        """Serves a batch; calls `done` when all of it is answered."""

    @abc.abstractmethod
    def single(self, prompt: Prompt, length: int, done: Callable[[], None], answer: list[int]) -> None:
        """Serves one prompt that came by itself."""

    def send(
        self,
        name: str,
        indices: Sequence[int],
        prompts: Sequence[Prompt],
        lengths: Lengths,
        done: Callable[[Request], None],
        answers: Sequence[list[int]] | None = None,
    ) -> None:
        request = Request(
            [prompts[i] for i in indices],
            [list(lengths[i]) for i in indices],
            lambda request: self._answered(name, request, done),
            None if answers is None else [answers[i] for i in indices],
            indices=list(indices),
        )
        self.loads[name] += request.sequences
        self.servers[name].submit(request)

    def _answered(self, name: str, request: Request, done: Callable[[Request], None]) -> None:
        self.loads[name] -= request.sequences
        done(request)


class Committed(Policy):
    """Every prompt has its server from the beginning, as in every peer that splits a batch."""

    @abc.abstractmethod
    def place(self, prompts: Sequence[Prompt], weights: Sequence[int]) -> list[str]:
        """A server per prompt."""

    def batch(
        self,
        prompts: Sequence[Prompt],
        lengths: Lengths,
        done: Callable[[], None],
        answers: Sequence[list[int]] | None = None,
    ) -> None:
        places = self.place(prompts, [len(few) for few in lengths])
        left = len(prompts)

        def one(request: Request) -> None:
            nonlocal left
            left -= 1
            if not left:
                done()

        for index, name in enumerate(places):
            self.send(name, [index], prompts, lengths, one, answers)

    def single(self, prompt: Prompt, length: int, done: Callable[[], None], answer: list[int]) -> None:
        self.batch([prompt], [[length]], done, [answer])


class Contiguous(Committed):
    """Equal chunks of neighbours; single requests as round-robin has them."""

    turn = -1

    def place(self, prompts: Sequence[Prompt], weights: Sequence[int]) -> list[str]:
        count = len(self.names)
        if len(prompts) == 1:
            self.turn += 1
            return [self.names[self.turn % count]]
        return [self.names[index * count // len(prompts)] for index in range(len(prompts))]


class RoundRobin(Committed):
    """The next prompt to the next server."""

    turn = 0

    def place(self, prompts: Sequence[Prompt], weights: Sequence[int]) -> list[str]:
        found = [self.names[(self.turn + index) % len(self.names)] for index in range(len(prompts))]
        self.turn += len(prompts)
        return found


class PlainRing(Committed):
    """The server that a consistent-hash ring says, whatever its load: by the prompt's session where there is one, as
    routers with a session header do, else by its first tokens."""

    def __init__(self, servers: Sequence[Server], clock: Clock, rng: random.Random) -> None:
        super().__init__(servers, clock, rng)
        self.ring = HashRing(self.names)

    def place(self, prompts: Sequence[Prompt], weights: Sequence[int]) -> list[str]:
        return [next(self.ring.walk(p.key or balancer.affinity_key(p.ids or [], 200))) for p in prompts]


class LeastInFlight(Committed):
    """The server with the fewest completions out, ties by lot."""

    def place(self, prompts: Sequence[Prompt], weights: Sequence[int]) -> list[str]:
        loads = dict(self.loads)
        found = []
        for weight in weights:
            name = min(loads, key=lambda name: (loads[name], self.rng.random()))
            loads[name] += weight
            found.append(name)
        return found


class Ours(Policy):
    """The pool itself: its dispatcher, its plan, its pulling, what it remembers and what it has learnt. Only the
    servers, their answers and the time are modelled."""

    def __init__(self, servers: Sequence[Server], clock: Clock, rng: random.Random) -> None:
        super().__init__(servers, clock, rng)
        # A slot is a request's; how many a server has at once is not what is asked here.
        config = PoolConfig(max_inflight_per_backend=1_000_000)
        limits = {server.name: server.engine.max_num_seqs for server in servers}
        self.dispatcher = dispatcher_over(limits, config, clock, rng)

    def batch(
        self,
        prompts: Sequence[Prompt],
        lengths: Lengths,
        done: Callable[[], None],
        answers: Sequence[list[int]] | None = None,
    ) -> None:
        dispatcher, began, left = self.dispatcher, self.clock.now, len(prompts)
        keys = [balancer.affinity_key(p.ids, 200) if p.ids else p.key for p in prompts]
        seen = [marks(p.ids or []) for p in prompts]
        weight = len(lengths[0])
        want = Want(Lane.GENERATE, weight, owner=object(), shares_slot=True)
        rooms = (int(b.max_num_seqs * (1 + SURPLUS)) - b.load for b in dispatcher.backends.values())
        large = len(prompts) * weight > sum(rooms) and len(dispatcher.backends) > 1
        shards = dispatcher.split(want, keys, seen)
        assert shards is not None
        pull = Pull(want, shards, dispatcher=dispatcher, clock=self.clock, timeout=1.0) if large else None
        given: dict[str, tuple[float, int, int]] = {}

        def send(lease: Lease, piece: Sequence[int]) -> None:
            for index in piece:
                dispatcher.memory.served(seen[index], lease.backend.name)
            self.send(lease.backend.name, piece, prompts, lengths, lambda r: answered(lease, r), answers)

        def answered(lease: Lease, request: Request) -> None:
            nonlocal left
            took = [n for few in request.lengths for n in few]
            if pull is not None:
                pull.answered(lease, took)
            given[lease.backend.name] = self.clock.now - began, sum(took), max(took)
            self._released(lease, len(request.prompts), took)
            left -= len(request.prompts)
            if left:
                self.clock.at(self.clock.now + ANSWER_SECONDS, more)
                return
            if pull is None:
                sequences = {b.name: b.max_num_seqs for b in dispatcher.backends.values()}
                dispatcher.pace.observe_call(given, sequences)
            done()

        def more() -> None:
            while pull is not None and pull.schedule.held and (found := pull.take()) is not None:
                send(*found)

        def look() -> None:
            if pull is not None and pull.schedule.held:
                for name, server in self.servers.items():
                    dispatcher.backends[name].queue = Queue(*server.queue(), self.clock.now)
                    dispatcher.backends[name].tells_queue = True
                pull.looked()
                more()
                self.clock.at(self.clock.now + LOOK_SECONDS, look)

        for lease, share in shards:
            piece = share if pull is None else pull.begin(lease)
            if piece:
                send(lease, piece)
        more()
        self.clock.at(self.clock.now + LOOK_SECONDS, look)

    def single(self, prompt: Prompt, length: int, done: Callable[[], None], answer: list[int]) -> None:
        seen = marks(prompt.ids or [])
        key = balancer.affinity_key(prompt.ids or [], 200)
        lease = self.dispatcher.try_lease(Want(Lane.GENERATE, 1, key=key, marks=seen))
        assert lease is not None
        self.dispatcher.memory.served(seen, lease.backend.name)

        def answered(request: Request) -> None:
            self._released(lease, 1, [length])
            done()

        self.send(lease.backend.name, [0], [prompt], [[length]], answered, [answer])

    @staticmethod
    def _released(lease: Lease, prompts: int, lengths: Sequence[int]) -> None:
        lease.backend.served(lease, prompts, lengths)
        lease.backend.release(lease, Verdict.SUCCESS)


POLICIES: dict[str, type[Policy]] = {
    "contiguous chunks": Contiguous,
    "round-robin": RoundRobin,
    "plain ring": PlainRing,
    "least in flight": LeastInFlight,
    "trl_pool": Ours,
}
