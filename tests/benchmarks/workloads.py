"""What a fleet is asked: batches of a training step, conversations, prompts with a beginning that many share."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .engine_model import Clock, Engine, Prompt, Server
from .policies import POLICIES, Policy

CAP = 4096
"""`max_tokens`: the longest completion."""

MEDIAN, SIGMA = 600, 0.9
"""Of completion lengths, log-normal: a mean of 865 tokens with the cap, one in 60 reaches it. Reasoning models under
RL look like that: many short answers, a long tail, a wall."""

SYSTEM_TOKENS = 400
"""Of the system prompt that all conversations share."""


@dataclass(frozen=True)
class Outcome:
    """What a workload took under a policy.

    Args:
        seconds (`list[float]`): Per step.
        bounds (`list[float]`): Per step, what no policy can be faster than; 0 where none is computed.
        hits (`float`): Share of the prompts' tokens that was found in a cache.
    """

    seconds: list[float]
    bounds: list[float]
    hits: float


@dataclass(frozen=True)
class Workload:
    """One question.

    Args:
        name (`str`): In the tables.
        run (`Callable[[type[Policy], int], Outcome]`): Plays it, for a policy and a seed.
        seeds (`int`): Most seeds that it is worth playing with.
    """

    name: str
    run: Callable[[type[Policy], int], Outcome]
    seeds: int = 99


class Fleet:
    """Servers, their clock and a policy.

    Args:
        policy (`type[Policy]`): Who decides.
        engines (`Sequence[Engine]`): One per server.
        seed (`int`): Of the policy's lots.
    """

    def __init__(self, policy: type[Policy], engines: Sequence[Engine], seed: int) -> None:
        self.clock = Clock()
        self.servers = [Server(engine, self.clock, f"n{index}:8000") for index, engine in enumerate(engines)]
        order = list(self.servers)
        random.Random(seed).shuffle(order)  # no policy is to gain from where in the list a slow one stands
        self.policy = policy(order, self.clock, random.Random(seed))

    @property
    def hits(self) -> float:
        return sum(s.cached_tokens for s in self.servers) / max(1, sum(s.asked_tokens for s in self.servers))

    def bound(self, prompts: Sequence[Prompt], lengths: Sequence[Sequence[int]]) -> float:
        """Seconds that no policy can be faster than: all the work at the rate of full batches on all servers at once,
        or the longest completion alone on the fastest server.

        Args:
            prompts (`Sequence[Prompt]`): What is asked.
            lengths (`Sequence[Sequence[int]]`): Tokens of the completions.
        """
        usual = min((server.engine for server in self.servers), key=lambda engine: engine.slowness)
        capacity = sum(usual.slowness / server.engine.slowness for server in self.servers)
        tokens, prefill = sum(map(sum, lengths)), sum(prompt.length for prompt in prompts)
        work = tokens / usual.best_rate + prefill * usual.prefill_seconds * usual.slowness
        return max(work / capacity, max(map(max, lengths)) * usual.step(1))


def log_normal(rng: random.Random, median: float = MEDIAN, sigma: float = SIGMA, cap: int = CAP) -> int:
    return min(cap, max(1, int(rng.lognormvariate(math.log(median), sigma))))


def equal(rng: random.Random) -> int:
    return 800


def steps(
    policy: type[Policy],
    seed: int,
    *,
    engines: Sequence[Engine],
    prompts: int,
    n: int = 8,
    length: Callable[[random.Random], int] = log_normal,
    count: int = 1,
    stall_seconds: float = 0.0,
) -> Outcome:
    """Training steps, each one batch whose end is waited for; caches are empty after each, as after an update."""
    fleet = Fleet(policy, engines, seed)
    rng = random.Random(seed + 1)
    seconds, bounds = [], []
    for step in range(count):
        batch = [Prompt(300, key=f"{step}-{index}") for index in range(prompts)]
        lengths = [[length(rng) for _ in range(n)] for _ in batch]
        began, ended = fleet.clock.now, list[float]()
        if stall_seconds:
            fleet.clock.at(began + 20.0, lambda: fleet.servers[0].stall(stall_seconds))
        fleet.policy.batch(batch, lengths, lambda ended=ended: ended.append(fleet.clock.now))
        fleet.clock.run()
        seconds.append(ended[0] - began)
        bounds.append(fleet.bound(batch, lengths))
    return Outcome(seconds, bounds, fleet.hits)


class Conversation:
    """One conversation: each of its prompts is the one before, its answer, and something new.

    Args:
        number (`int`): Its name.
        system (`list[int]`): Tokens that all of them begin with.
        turns (`int`): How many prompts it has.
        rng (`random.Random`): Decides its lengths and tokens.
    """

    def __init__(self, number: int, system: list[int], turns: int, rng: random.Random) -> None:
        self.turns, self.rng = turns, rng
        self._key = f"conversation {number}"
        self._ids = system + tokens(rng, 100, 500)

    def turn(self) -> tuple[Prompt, int, list[int]]:
        """Its next prompt, and the answer that it will get: length and tokens."""
        prompt = Prompt(len(self._ids), list(self._ids), self._key)
        length = log_normal(self.rng, 300, 0.7, 1024)
        answer = tokens(self.rng, length, length + 1)
        self._ids = [*self._ids, *answer, *tokens(self.rng, 50, 300)]
        self.turns -= 1
        return prompt, length, answer


def tokens(rng: random.Random, at_least: int, below: int) -> list[int]:
    return [rng.randrange(100_000) for _ in range(rng.randrange(at_least, below))]


def turns_together(policy: type[Policy], seed: int, *, engines: Sequence[Engine], conversations: int) -> Outcome:
    """A tool-using rollout as trainers run it: a batch per turn of all conversations that go on; each ends with a
    probability of 15 % a turn, after six in any case."""
    fleet = Fleet(policy, engines, seed)
    rng = random.Random(seed + 1)
    system = tokens(rng, SYSTEM_TOKENS, SYSTEM_TOKENS + 1)
    live = [Conversation(i, system, 6, random.Random(rng.random())) for i in range(conversations)]

    def turn() -> None:
        nonlocal live
        live = [one for one in live if one.turns and (one.turns == 6 or one.rng.random() > 0.15)]
        if live:
            prompts, lengths, answers = zip(*(one.turn() for one in live), strict=True)
            fleet.policy.batch(prompts, [[n] for n in lengths], lambda: fleet.clock.at(fleet.clock.now, turn), answers)

    turn()
    fleet.clock.run()
    return Outcome([fleet.clock.now], [0.0], fleet.hits)


def turns_apart(policy: type[Policy], seed: int, *, engines: Sequence[Engine], conversations: int) -> Outcome:
    """Conversations of 2 – 8 turns that go on each by itself, as through a gateway."""
    fleet = Fleet(policy, engines, seed)
    rng = random.Random(seed + 1)
    system = tokens(rng, SYSTEM_TOKENS, SYSTEM_TOKENS + 1)
    live = [Conversation(i, system, rng.randrange(2, 9), random.Random(rng.random())) for i in range(conversations)]

    def go_on(one: Conversation) -> None:
        if one.turns:
            prompt, length, answer = one.turn()
            later = fleet.clock.now + 2 * one.rng.random()
            fleet.policy.single(
                prompt, length, lambda: fleet.clock.at(max(later, fleet.clock.now), lambda: go_on(one)), answer
            )

    for one in live:
        fleet.clock.at(5 * rng.random(), lambda one=one: go_on(one))
    fleet.clock.run()
    return Outcome([fleet.clock.now], [0.0], fleet.hits)


def _hot(rng: random.Random, shared: list[int]) -> Prompt:
    own = tokens(rng, 100, 600)
    ids = shared + own if rng.random() < 0.6 else own
    return Prompt(len(ids), ids)


def hot_batch(policy: type[Policy], seed: int, *, engines: Sequence[Engine], prompts: int) -> Outcome:
    """One batch, of whose prompts 60 % share 2,000 tokens."""
    fleet = Fleet(policy, engines, seed)
    rng = random.Random(seed + 1)
    shared = tokens(rng, 2000, 2001)
    batch = [_hot(rng, shared) for _ in range(prompts)]
    lengths = [[log_normal(rng, 300, 0.7, 1024) for _ in range(4)] for _ in batch]
    fleet.policy.batch(batch, lengths, lambda: None)
    fleet.clock.run()
    return Outcome([fleet.clock.now], [0.0], fleet.hits)


def hot_requests(policy: type[Policy], seed: int, *, engines: Sequence[Engine], prompts: int) -> Outcome:
    """The same prompts one by one, 75 of them out per server."""
    fleet = Fleet(policy, engines, seed)
    rng = random.Random(seed + 1)
    shared = tokens(rng, 2000, 2001)
    left = prompts

    def another() -> None:
        nonlocal left
        if left:
            left -= 1
            fleet.policy.single(_hot(rng, shared), log_normal(rng, 300, 0.7, 1024), another, [])

    for _ in range(75 * len(engines)):
        another()
    fleet.clock.run()
    return Outcome([fleet.clock.now], [0.0], fleet.hits)


def _engines(count: int, **changes: float) -> list[Engine]:
    """Like each other, except for the first, if it is told how."""
    usual = Engine()
    return [replace(usual, **changes), *[usual] * (count - 1)]


BATCHES = (
    Workload("equal lengths, 8", lambda p, s: steps(p, s, engines=_engines(8), prompts=1024, length=equal)),
    Workload("log-normal, 8", lambda p, s: steps(p, s, engines=_engines(8), prompts=2048)),
    Workload("log-normal, 8, half as many", lambda p, s: steps(p, s, engines=_engines(8), prompts=1024)),
    Workload("log-normal, 8, all run at once", lambda p, s: steps(p, s, engines=_engines(8), prompts=256)),
    Workload("log-normal, 64", lambda p, s: steps(p, s, engines=_engines(64), prompts=16384), 3),
    Workload("log-normal, 1,000", lambda p, s: steps(p, s, engines=_engines(1000), prompts=64000), 1),
    Workload("half speed, 8", lambda p, s: steps(p, s, engines=_engines(8, slowness=2.0), prompts=2048)),
    Workload(
        "half speed, 8, third step",
        lambda p, s: _last(steps(p, s, engines=_engines(8, slowness=2.0), prompts=2048, count=3)),
    ),
    Workload("half speed, 64", lambda p, s: steps(p, s, engines=_engines(64, slowness=2.0), prompts=16384), 3),
    Workload(
        "half speed, 8, all run at once, sixth step",
        lambda p, s: _last(steps(p, s, engines=_engines(8, slowness=2.0), prompts=256, count=6)),
    ),
    Workload("stall of 60 s, 8", lambda p, s: steps(p, s, engines=_engines(8), prompts=2048, stall_seconds=60.0)),
)
"""Name: what it is, and on how many servers."""

CONVERSATIONS = (
    Workload("turns together, 8", lambda p, s: turns_together(p, s, engines=_engines(8), conversations=512)),
    Workload("turns apart, 8", lambda p, s: turns_apart(p, s, engines=_engines(8), conversations=512)),
    Workload(
        "turns apart, small caches, 8",
        lambda p, s: turns_apart(p, s, engines=[Engine(cache_blocks=1200)] * 8, conversations=512),
    ),
    Workload("turns apart, 64", lambda p, s: turns_apart(p, s, engines=_engines(64), conversations=4096), 1),
    Workload("hot beginning, batch, 8", lambda p, s: hot_batch(p, s, engines=_engines(8), prompts=1024)),
    Workload("hot beginning, requests, 8", lambda p, s: hot_requests(p, s, engines=_engines(8), prompts=4000)),
)


def _last(outcome: Outcome) -> Outcome:
    return Outcome(outcome.seconds[-1:], outcome.bounds[-1:], outcome.hits)


def play(workload: Workload, seeds: Sequence[int]) -> dict[str, list[Outcome]]:
    """Everybody plays a workload with the same seeds.

    Returns:
        `dict[str, list[Outcome]]`: Per policy, one outcome per seed.
    """
    return {
        name: [workload.run(policy, seed) for seed in seeds[: workload.seeds]] for name, policy in POLICIES.items()
    }
