"""Policies that spread work over modelled servers: the pool's own code, and what it is compared with."""

from __future__ import annotations

import abc
import random
from collections.abc import Callable, Sequence

from trl_pool import balancer
from trl_pool.config import PoolConfig
from trl_pool.pace import Pace
from trl_pool.prefixes import PrefixMemory, marks
from trl_pool.ring import HashRing
from trl_pool.schedule import PIECE, SURPLUS, Queue, Schedule, Standing, room

from .engine_model import Clock, Prompt, Request, Server

BALANCE_FACTOR = PoolConfig().balance_factor

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
    """The pool's own code: its plan, its schedule, what it has learnt."""

    def __init__(self, servers: Sequence[Server], clock: Clock, rng: random.Random) -> None:
        super().__init__(servers, clock, rng)
        self.ring, self.pace, self.memory = HashRing(self.names), Pace(), PrefixMemory(65536)
        self.queues: dict[str, Queue] = {}
        self.max_num_seqs = {server.name: server.engine.max_num_seqs for server in servers}

    def batch(
        self,
        prompts: Sequence[Prompt],
        lengths: Lengths,
        done: Callable[[], None],
        answers: Sequence[list[int]] | None = None,
    ) -> None:
        weight = len(lengths[0])
        keys = [balancer.affinity_key(p.ids, 200) if p.ids else p.key for p in prompts]
        seen = [marks(p.ids or []) for p in prompts]
        homes = balancer.split(
            keys,
            weight,
            self.loads,
            self.ring.walk,
            self.rng,
            speeds=self.pace.shares(self.names),
            holders=[self.memory.holders(few) for few in seen],
        )
        open_requests: dict[str, dict[int, float]] = {name: {} for name in self.names}
        started, left = self.clock.now, len(prompts)
        given: dict[str, tuple[float, int, int]] = {}
        committed = True

        def standing() -> dict[str, Standing]:
            return {n: Standing(self.loads[n], min(open_requests[n].values(), default=None)) for n in self.names}

        schedule = Schedule(
            homes, weight, pace=self.pace, standing=standing, load=self.loads.__getitem__, clock=self.clock
        )

        def answered(name: str, request: Request) -> None:
            nonlocal left
            left -= len(request.prompts)
            took = [n for few in request.lengths for n in few]
            if len(took) <= max(PIECE, weight):
                self.pace.observe_piece(name, self.clock.now - request.sent, took)
            if name in self.queues:
                self.queues[name].answered(request.sent, self.clock.now, took)
            del open_requests[name][request.indices[0]]
            _, tokens, longest = given.get(name, (0.0, 0, 0))
            given[name] = self.clock.now - started, tokens + sum(took), max(longest, *took)
            if left:
                self.clock.at(self.clock.now + 1e-3, lambda: pump([name]))
            else:
                if committed:
                    self.pace.observe_call(given, self.max_num_seqs)
                done()

        def pump(names: Sequence[str]) -> None:
            nonlocal committed
            hungry = list(names)
            while schedule.held and hungry:
                for name in list(hungry):
                    free = room(
                        self.queues.get(name),
                        max_num_seqs=self.max_num_seqs[name],
                        load=self.loads[name],
                        occupancy=None,
                    )
                    size = max(1, min(PIECE, free) // weight)
                    if not open_requests[name] and schedule.share(name) * weight <= free:
                        size = schedule.share(name)
                    else:
                        committed = False
                    reserve = int(SURPLUS * self.max_num_seqs[name]) // weight
                    able = free >= weight or not self.loads[name]  # one that does nothing can always take one
                    indices = schedule.take(name, size, reserve=reserve) if able else []
                    if not indices:
                        hungry.remove(name)
                        continue
                    open_requests[name][indices[0]] = self.clock.now
                    for index in indices:
                        self.memory.served(seen[index], name)
                    if name in self.queues:
                        self.queues[name].changed += len(indices) * weight
                    self.send(name, indices, prompts, lengths, lambda r, n=name: answered(n, r), answers)

        def look() -> None:
            if schedule.held:
                for name, server in self.servers.items():
                    self.queues[name] = Queue(*server.queue(), self.clock.now)
                pump(self.names)
                self.clock.at(self.clock.now + 1.0, look)

        self.queues.clear()
        pump(self.names)
        self.clock.at(self.clock.now + 1.0, look)

    def single(self, prompt: Prompt, length: int, done: Callable[[], None], answer: list[int]) -> None:
        key = balancer.affinity_key(prompt.ids or [], 200)
        seen = marks(prompt.ids or [])
        name = balancer.sticky(
            self.ring.walk(key),
            self.memory.holders(seen),
            self.loads.get,
            mean=sum(self.loads.values()) / len(self.loads),
            weight=1,
            factor=BALANCE_FACTOR,
            keep=False,
            rng=self.rng,
            names=self.names,
        )
        assert name is not None
        self.memory.served(seen, name)
        self.send(name, [0], [prompt], [[length]], lambda request: done(), [answer])


POLICIES: dict[str, type[Policy]] = {
    "contiguous chunks": Contiguous,
    "round-robin": RoundRobin,
    "plain ring": PlainRing,
    "least in flight": LeastInFlight,
    "trl_pool": Ours,
}
