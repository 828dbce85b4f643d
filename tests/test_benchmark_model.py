"""The model behind the benchmark of step times, against what can be worked out by hand."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.benchmarks.engine_model import BLOCK_TOKENS, Clock, Engine, Prompt, Request, Server, hashes
from tests.benchmarks.policies import POLICIES, Policy
from tests.benchmarks.workloads import Fleet, Outcome, hot_batch, hot_requests, steps, turns_apart, turns_together

ENGINE = Engine(max_num_seqs=4, step_seconds=1.0, sequence_seconds=0.5, prefill_seconds=0.0, cache_blocks=1000)
"""A step takes a second, and half a second more with each sequence."""

PREFILLS = Engine(max_num_seqs=4, step_seconds=1.0, sequence_seconds=0.0, prefill_seconds=0.125, cache_blocks=1000)


class Bench:
    """One server, and when its requests were answered."""

    def __init__(self, engine: Engine) -> None:
        self.clock = Clock()
        self.server = Server(engine, self.clock, "n0:8000")
        self.ends: list[float] = []

    def send(
        self,
        lengths: Sequence[Sequence[int]],
        *,
        prompts: Sequence[Prompt] | None = None,
        at: float = 0.0,
        answers: list[list[int]] | None = None,
    ) -> None:
        place = len(self.ends)
        self.ends.append(-1.0)

        def done(request: Request) -> None:
            assert self.ends[place] == -1.0, "answered once"
            self.ends[place] = self.clock.now

        asked = list(prompts or [Prompt(10) for _ in lengths])
        request = Request(asked, [list(few) for few in lengths], done, answers)
        self.clock.at(at, lambda: self.server.submit(request))

    def run(self) -> list[float]:
        self.clock.run()
        return self.ends


def ids(start: int, blocks: int) -> list[int]:
    return list(range(start, start + blocks * BLOCK_TOKENS))


def prompt(tokens: list[int]) -> Prompt:
    return Prompt(len(tokens), tokens)


# Decoding


@pytest.mark.parametrize(
    ("lengths", "seconds"),
    [
        ([[10]], 10 * 1.5),
        ([[10, 10, 10, 10]], 10 * 3.0),
        ([[10], [10], [10], [10]], 10 * 3.0),
        ([[10] * 8], 2 * 10 * 3.0),
        ([[10] * 4, [10] * 2], 10 * 3.0 + 10 * 2.0),
        ([[4, 10]], 4 * 2.0 + 6 * 1.5),
        ([[2, 4, 6]], 2 * 2.5 + 2 * 2.0 + 2 * 1.5),
        # The fifth starts when the first ends, and is the last.
        ([[2, 10, 10, 10], [20]], 2 * 3.0 + 8 * 3.0 + 12 * 1.5),
        ([[1]], 1.5),
    ],
)
def test_the_time_of_a_batch_is_exactly_what_its_steps_take(lengths: list[list[int]], seconds: float) -> None:
    bench = Bench(ENGINE)
    for few in lengths:
        bench.send([few])
    assert max(bench.run()) == pytest.approx(seconds)
    assert bench.server.made_tokens == sum(map(sum, lengths))
    assert bench.server.busy_seconds == pytest.approx(seconds)
    assert bench.server.queue() == (0, 0)


def test_a_request_is_answered_when_its_longest_completion_has_ended() -> None:
    bench = Bench(ENGINE)
    bench.send([[2, 8]])
    bench.send([[4]])
    assert bench.run() == pytest.approx([2 * 2.5 + 2 * 2.0 + 4 * 1.5, 2 * 2.5 + 2 * 2.0])


def test_who_comes_later_slows_down_those_that_run() -> None:
    bench = Bench(ENGINE)
    bench.send([[10]])
    bench.send([[10]], at=6.0)  # after four tokens of the first
    assert bench.run() == pytest.approx([6.0 + 6 * 2.0, 6.0 + 6 * 2.0 + 4 * 1.5])


@pytest.mark.parametrize("slowness", [0.5, 2.0, 3.7])
def test_a_server_half_as_fast_takes_twice_as_long_for_everything(slowness: float) -> None:
    def seconds(engine: Engine) -> float:
        bench = Bench(engine)
        bench.send([[3, 7], [5, 5], [9, 1]])
        return max(bench.run())

    usual = Engine(max_num_seqs=4, prefill_seconds=0.01)
    slow = Engine(max_num_seqs=4, prefill_seconds=0.01, slowness=slowness)
    assert seconds(slow) == pytest.approx(slowness * seconds(usual))


def test_queues_are_told_as_they_are() -> None:
    bench = Bench(ENGINE)
    bench.send([[10] * 6])
    found: list[Any] = []
    for at in (1.0, 31.0, 60.0):
        bench.clock.at(at, lambda: found.append(bench.server.queue()))
    bench.run()
    assert found == [(4, 2), (2, 0), (0, 0)]


@given(
    lengths=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=12),
    arrivals=st.lists(st.floats(0, 50), min_size=12, max_size=12),
)
def test_every_request_is_answered_no_sooner_than_it_could_be(lengths: list[list[int]], arrivals: list[float]) -> None:
    bench = Bench(ENGINE)
    for few, at in zip(lengths, arrivals, strict=False):
        bench.send([few], at=at)
    for end, few, at in zip(bench.run(), lengths, arrivals, strict=False):
        assert end >= at + max(few) * ENGINE.step(1) - 1e-4
    assert bench.server.made_tokens == sum(map(sum, lengths))
    assert bench.server.busy_seconds >= bench.server.made_tokens / ENGINE.best_rate - 1e-4


# Prefill and cache


def test_prompts_are_prefilled_one_after_the_other_once_for_all_their_completions() -> None:
    bench = Bench(PREFILLS)
    bench.send([[4, 4], [4]], prompts=[Prompt(80), Prompt(40)])
    assert bench.run() == pytest.approx([120 / 8 + 4.0])
    assert (bench.server.asked_tokens, bench.server.cached_tokens) == (120, 0)


def test_a_prefill_holds_up_those_that_run() -> None:
    bench = Bench(PREFILLS)
    bench.send([[10]], prompts=[Prompt(8)])
    bench.send([[2]], prompts=[Prompt(40)], at=4.0)
    assert bench.run() == pytest.approx([1.0 + 10.0 + 5.0, 4.0 + 5.0 + 2.0])


def test_what_is_cached_is_not_prefilled_whole_blocks_from_the_beginning() -> None:
    bench = Bench(PREFILLS)
    first = ids(0, 4)
    bench.send([[1]], prompts=[prompt(first)])
    bench.send([[1]], prompts=[prompt(first + ids(1000, 1))], at=100.0)
    bench.send([[1]], prompts=[prompt(first[: 2 * BLOCK_TOKENS] + ids(2000, 2))], at=200.0)
    bench.send([[1]], prompts=[prompt(ids(3000, 1) + first)], at=300.0)
    bench.send([[1]], prompts=[prompt(first[:40])], at=400.0)
    uncached = [64, 16, 32, 80, 8]
    assert bench.run() == pytest.approx([100.0 * i + count / 8 + 1.0 for i, count in enumerate(uncached)])
    assert bench.server.asked_tokens - bench.server.cached_tokens == sum(uncached)


def test_the_next_turn_finds_the_answer_as_well() -> None:
    bench = Bench(PREFILLS)
    first, answer = ids(0, 2), ids(500, 2)
    bench.send([[32]], prompts=[prompt(first)], answers=[answer])
    bench.send([[1]], prompts=[prompt([*first, *answer, 7, 8])], at=100.0)
    assert bench.run()[1] == pytest.approx(100.0 + 2 / 8 + 1.0)


def test_a_full_cache_gives_up_what_was_not_used_for_longest() -> None:
    bench = Bench(
        Engine(max_num_seqs=4, step_seconds=1.0, sequence_seconds=0.0, prefill_seconds=0.125, cache_blocks=4)
    )
    a, b, c = (prompt(ids(start, 2)) for start in (0, 1000, 2000))
    for place, one in enumerate([a, b, a, c, a, b]):
        bench.send([[1]], prompts=[one], at=100.0 * place)
    # a is found twice: b had to go for c.
    assert bench.run() == pytest.approx([100.0 * i + u / 8 + 1.0 for i, u in enumerate([32, 32, 0, 32, 0, 32])])
    bench.server.clear_cache()
    bench.send([[1]], prompts=[a], at=1000.0)
    assert bench.run()[-1] == pytest.approx(1000.0 + 32 / 8 + 1.0)


def test_blocks_are_known_by_all_before_them() -> None:
    assert hashes(ids(0, 3))[:2] == hashes(ids(0, 2) + ids(700, 1))[:2]
    assert set(hashes(ids(0, 2))).isdisjoint(hashes(ids(16, 2)))
    assert len(hashes(ids(0, 2)[:31])) == 1


# Stalls


def test_a_stall_adds_its_time_to_all_that_run() -> None:
    bench = Bench(ENGINE)
    bench.send([[10]])
    bench.send([[4]])
    bench.clock.at(3.0, lambda: bench.server.stall(60.0))
    assert bench.run() == pytest.approx([60.0 + 4 * 2.0 + 6 * 1.5, 60.0 + 4 * 2.0])


def test_a_stall_of_an_idle_server_is_over_when_it_is_over() -> None:
    for at, late in ((10.0, 50.0), (59.0, 1.0), (70.0, 0.0)):
        bench = Bench(ENGINE)
        bench.clock.at(0.0, lambda bench=bench: bench.server.stall(60.0))  # type: ignore[misc]
        bench.send([[10]], at=at)
        assert bench.run() == pytest.approx([at + late + 15.0])


# Policies


class Watched(Fleet):
    """A fleet that notes what its servers are given."""

    def __init__(self, policy: type[Policy], engines: Sequence[Engine], seed: int) -> None:
        super().__init__(policy, engines, seed)
        self.given: Counter[int] = Counter()
        for server in self.servers:
            server.submit = self._noted(server.submit)  # type: ignore[method-assign]

    def _noted(self, submit: Callable[[Request], None]) -> Callable[[Request], None]:
        def note(request: Request) -> None:
            self.given.update(request.indices)
            submit(request)

        return note


SLOWNESS = st.lists(st.sampled_from([0.5, 1.0, 1.0, 1.0, 2.0, 5.0]), min_size=1, max_size=4)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40)
@given(
    slowness=SLOWNESS,
    max_num_seqs=st.sampled_from([1, 3, 8]),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=120),
    n=st.integers(1, 8),
    prompt_tokens=st.sampled_from([1, 300]),
    stall=st.sampled_from([0.0, 0.0, 5.0]),
    seed=st.integers(0, 9),
)
def test_every_policy_serves_every_prompt_once_and_none_is_faster_than_the_bound(
    name: str,
    slowness: list[float],
    max_num_seqs: int,
    lengths: list[int],
    n: int,
    prompt_tokens: int,
    stall: float,
    seed: int,
) -> None:
    fleet = Watched(POLICIES[name], [Engine(max_num_seqs=max_num_seqs, slowness=one) for one in slowness], seed)
    batch = [lengths[start : start + n] for start in range(0, len(lengths) - n + 1, n)] or [lengths[:1] * n]
    prompts = [Prompt(prompt_tokens, key=str(index)) for index in range(len(batch))]
    for _ in range(2):  # the second step knows more
        began, ended = fleet.clock.now, list[float]()
        fleet.given.clear()
        fleet.clock.at(began + 0.1, lambda: fleet.servers[0].stall(stall))
        fleet.policy.batch(prompts, batch, lambda: ended.append(fleet.clock.now))  # noqa: B023
        fleet.clock.run()
        assert len(ended) == 1
        assert fleet.given == Counter(range(len(batch)))
        assert ended[0] - began >= fleet.bound(prompts, batch) * (1 - 1e-6)
        assert set(fleet.policy.loads.values()) == {0}
    assert sum(server.made_tokens for server in fleet.servers) == 2 * sum(map(sum, batch))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    "play",
    [
        lambda policy: turns_together(policy, 1, engines=[Engine()] * 3, conversations=6),
        lambda policy: turns_apart(policy, 1, engines=[Engine()] * 3, conversations=6),
        lambda policy: hot_batch(policy, 1, engines=[Engine()] * 3, prompts=12),
        lambda policy: hot_requests(policy, 1, engines=[Engine()] * 2, prompts=200),
        lambda policy: steps(policy, 1, engines=[Engine(max_num_seqs=4)] * 3, prompts=12, count=2, stall_seconds=3.0),
    ],
    ids=["together", "apart", "hot batch", "hot requests", "steps"],
)
def test_a_workload_comes_to_its_end_and_again_to_the_same(name: str, play: Callable[[type[Policy]], Outcome]) -> None:
    outcome = play(POLICIES[name])
    assert all(seconds > 0 for seconds in outcome.seconds)
    assert 0 <= outcome.hits <= 1
    assert play(POLICIES[name]) == outcome


def test_equal_work_on_equal_servers_takes_exactly_as_long_as_it_must() -> None:
    engines = [Engine(max_num_seqs=8)] * 4
    for name in ("contiguous chunks", "round-robin", "least in flight", "trl_pool"):
        fleet = Watched(POLICIES[name], engines, 1)
        prompts, batch = [Prompt(10, key=str(i)) for i in range(32)], [[100]] * 32
        ended: list[float] = []
        fleet.policy.batch(prompts, batch, lambda ended=ended: ended.append(fleet.clock.now))  # type: ignore[misc]  # noqa: B023
        fleet.clock.run()
        assert ended == [pytest.approx(fleet.bound(prompts, batch))], name


def test_events_happen_in_their_order_and_none_in_the_past() -> None:
    clock, seen = Clock(), list[tuple[str, float]]()
    for name, at in (("c", 3.0), ("a", 1.0), ("b", 1.0)):
        clock.at(at, lambda name=name: seen.append((name, clock())))  # type: ignore[misc]
    clock.at(2.0, lambda: clock.at(0.5, lambda: seen.append(("late", clock()))))
    clock.run()
    assert seen == [("a", 1.0), ("b", 1.0), ("late", 2.0), ("c", 3.0)]
    assert all(low <= high for (_, low), (_, high) in itertools.pairwise(seen))
