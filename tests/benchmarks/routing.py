"""What a routing decision costs: picking a backend, planning a batch, building the ring."""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

from trl_pool import balancer, prefixes
from trl_pool.config import PoolConfig
from trl_pool.dispatch import Dispatcher, Want
from trl_pool.leases import Lane
from trl_pool.prefixes import PrefixMemory
from trl_pool.ring import HashRing

from .fleets import dispatcher_over
from .report import Report, Spread, Table
from .rounds import interleave

SUMMARY = "picking a backend, planning a batch, building the ring, of 8 and 1,000 backends"

FEW, MANY = 8, 1000
PICKS, PROMPTS, PROMPT_TOKENS = 2000, 4096, 512

TARGETS = {
    f"pick one of {FEW}": 5e-6,
    f"pick one of {MANY:,}": 20e-6,
    f"plan {PROMPTS:,} prompts over {MANY:,}": 50e-3,
    f"build the ring of {MANY:,}": 100e-3,
}


def add_options(group: argparse._ArgumentGroup) -> None:
    """Nothing: it takes seconds."""


def names(count: int) -> list[str]:
    return [f"node{index}:8000" for index in range(count)]


def dispatcher(count: int) -> Dispatcher:
    """A dispatcher with backends that are up, all of them busy."""
    rng = random.Random(0)
    found = dispatcher_over(dict.fromkeys(names(count)), PoolConfig(), time.monotonic, rng)
    for backend in found.backends.values():
        backend.take(Lane.GENERATE, rng.randrange(1, 9))
    return found


def per_call(work: Callable[[], Any], count: int) -> float:
    """Seconds for each of the `count` things that `work` does; the best of three, since what disturbs only adds."""
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best / count


def _leases(pool: Dispatcher) -> Callable[[], None]:
    wants = [Want(Lane.GENERATE, 1, key=f"session:{number}", keep=True) for number in range(PICKS)]

    def work() -> None:
        for want in wants:
            lease = pool.try_lease(want)
            assert lease is not None
            lease.backend.release_unused(lease)

    return work


def _picks(ring: HashRing, loads: dict[str, int]) -> Callable[[], None]:
    rng, everybody = random.Random(0), list(loads)
    mean = sum(loads.values()) / len(loads)

    def work() -> None:
        for number in range(PICKS):
            balancer.sticky(
                ring.walk(f"session:{number}"),
                (),
                loads.get,
                mean=mean,
                weight=1,
                factor=1.25,
                keep=True,
                rng=rng,
                names=everybody,
            )

    return work


def _everybody_looked_at(loads: dict[str, int]) -> Callable[[], None]:
    """What a router does that compares all loads for each request."""

    def work() -> None:
        for _ in range(PICKS):
            min(loads, key=loads.__getitem__)

    return work


def run(options: argparse.Namespace) -> Report:
    """Times everything in rounds."""
    rng = random.Random(1)
    prompts = [[rng.randrange(100_000) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]
    rings = {count: HashRing(names(count)) for count in (FEW, MANY)}
    loads = {count: {name: rng.randrange(1, 9) for name in names(count)} for count in (FEW, MANY)}
    pools = {count: dispatcher(count) for count in (FEW, MANY)}
    idle = dict.fromkeys(names(MANY), 0)
    keys = [balancer.affinity_key(prompt, 200) for prompt in prompts]
    beginnings = [prefixes.marks(prompt) for prompt in prompts]
    memory = PrefixMemory(65536)
    for index, marks in enumerate(beginnings):
        memory.served(marks, f"node{index % MANY}:8000")

    def plan(**more: Any) -> None:
        balancer.split(keys, 8, idle, rings[MANY].walk, rng, **more)

    def plan_all() -> None:
        made = [balancer.affinity_key(prompt, 200) for prompt in prompts]
        known = [memory.holders(prefixes.marks(prompt)) for prompt in prompts]
        balancer.split(made, 8, idle, rings[MANY].walk, rng, holders=known)

    def build(count: int) -> Callable[[], None]:
        return lambda: next(HashRing(names(count)).walk("key")) and None

    subjects: dict[str, tuple[Callable[[], Any], int]] = {}
    for count in (FEW, MANY):
        subjects[f"pick one of {count:,}"] = _picks(rings[count], loads[count]), PICKS
        subjects[f"lease on one of {count:,}, and give it back"] = _leases(pools[count]), PICKS
        subjects[f"the least loaded of {count:,}, all looked at"] = _everybody_looked_at(loads[count]), PICKS
    subjects[f"plan {PROMPTS:,} prompts over {MANY:,}"] = plan, 1
    subjects["the same, prompts' beginnings known"] = lambda: plan(holders=list(map(memory.holders, beginnings))), 1
    subjects[f"the same, with hashing {PROMPT_TOKENS} tokens a prompt"] = plan_all, 1
    subjects[f"build the ring of {MANY:,}"] = build(MANY), 1
    if importlib.util.find_spec("uhashring") is not None:
        from uhashring import HashRing as Peer

        subjects[f"build the ring of {MANY:,}: uhashring"] = lambda: Peer(names(MANY)), 1
        peer = Peer(names(MANY))
        asks = [f"session:{number}" for number in range(PICKS)]
        subjects[f"first of the ring of {MANY:,}: uhashring"] = lambda: list(map(peer.get_node, asks)), PICKS
        subjects[f"first of the ring of {MANY:,}"] = (
            lambda: [next(rings[MANY].walk(ask)) for ask in asks],
            PICKS,
        )
    timed = interleave(
        {name: lambda work=work, count=count: per_call(work, count) for name, (work, count) in subjects.items()},
        options.rounds,
        title="routing",
    )
    rows: list[list[Any]] = []
    for name, seconds in timed.items():
        target = TARGETS.get(name)
        reached = "" if target is None else "yes" if statistics.median(seconds) <= target else "no"
        spread = Spread.of(value * 1e6 for value in seconds)
        rows.append([name, spread.text(1), "" if target is None else f"{target * 1e6:,.0f}", reached])
    held = _ring_bytes()
    notes = [
        f"The ring of {MANY:,} holds {held / 1e6:.1f} MB, {held / MANY / 160:.0f} bytes a point.",
        "A pick is the balancer's choice alone; a lease is all that a request needs: who may take it, which of them, "
        "the breaker's permit, the books, and the way back.",
    ]
    return Report(
        [Table("Routing decisions", ["what", "µs", "target, µs", "reached"], rows, notes)],
        {"seconds": {name: Spread.of(values) for name, values in timed.items()}, "ring_bytes": held},
    )


def _ring_bytes() -> int:
    tracemalloc.start()
    try:
        ring = HashRing(names(MANY))
        next(ring.walk("key"))
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
