"""Who gets which prompts of a batch, and when."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from dispatching import Clock
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_pool.pace import Pace
from trl_pool.schedule import SURPLUS, Queue, Schedule, Standing, room

# Room


@pytest.mark.parametrize(
    ("queue", "left"),
    [
        (Queue(0, 0, 0.0), 10),
        (Queue(8, 0, 0.0), 2),
        (Queue(8, 2, 0.0), 0),
        (Queue(8, 5, 0.0), -3),
        (Queue(4, 0, 0.0), 6),
        (Queue(4, 1, 0.0), 0),  # it runs no more than four: its memory is full
        (Queue(4, 0, 0.0, changed=5), 1),
        (Queue(8, 2, 0.0, changed=-4), 4),
    ],
)
def test_a_server_gets_what_keeps_it_full_and_a_quarter_waiting(queue: Queue, left: int) -> None:
    assert room(queue, max_num_seqs=8, load=99, occupancy=0.5) == left


@pytest.mark.parametrize(("occupancy", "left"), [(None, 7), (1.0, 7), (0.5, 17), (0.0, 7)])
def test_of_a_server_that_says_nothing_it_is_guessed_how_much_of_what_is_out_runs(
    occupancy: float | None, left: int
) -> None:
    assert room(None, max_num_seqs=8, load=3, occupancy=occupancy) == left


@pytest.mark.parametrize(
    ("at", "left"),
    # Sent at 10, answered at 20, a token a second: completions ended at 20, 15 and 11.
    [(9.0, 3), (10.5, 3), (12.0, 2), (15.5, 1), (20.5, 0)],
)
def test_an_answers_completions_that_ended_before_the_server_was_asked_are_not_taken_off_again(
    at: float, left: int
) -> None:
    queue = Queue(8, 2, at)
    queue.answered(10.0, 20.0, [10, 5, 1])
    assert queue.changed == -left


@given(
    sent=st.floats(0, 100),
    took=st.floats(0, 100),
    at=st.floats(0, 200),
    lengths=st.lists(st.integers(0, 50), max_size=8),
)
def test_no_more_is_taken_off_than_was_answered(sent: float, took: float, at: float, lengths: list[int]) -> None:
    queue = Queue(8, 2, at)
    queue.answered(sent, sent + took, lengths)
    assert -len(lengths) <= queue.changed <= 0
    if lengths and at < sent:
        assert queue.changed == -len(lengths)


# Handing out


class Books:
    """A schedule whose backends' standing is written down by hand."""

    def __init__(
        self, homes: Mapping[str, list[int]], weight: int = 1, pace: Pace | None = None, **standing: Standing
    ) -> None:
        self.clock, self.pace = Clock(), pace or Pace()
        self.present = standing or {name: Standing(0, None) for name in homes}
        self.loads = {name: its.load for name, its in self.present.items()}
        self.schedule = Schedule(
            homes,
            weight,
            pace=self.pace,
            standing=lambda: self.present,
            load=lambda name: self.loads.get(name, 0),
            clock=self.clock,
        )


def paced(spread: float = 1.0, **seconds: float) -> Pace:
    """What is known after pieces that took so long, the longest completion being `spread` times a usual one's."""
    pace = Pace()
    for _ in range(200):
        for name, value in seconds.items():
            pace.observe_piece(name, value, [100])
    if spread > 1:
        pace.observe_piece("somebody", 1.0, [int(100 * spread)])
    return pace


def test_a_backend_gets_its_own_share_first_in_its_order() -> None:
    schedule = Books({"a": [3, 1, 4], "b": [5]}).schedule
    assert [schedule.share(name) for name in "abc"] == [3, 1, 0]
    assert schedule.take("a", 2) == [3, 1]
    assert schedule.take("a", 9, reserve=99) == [4], "its own is reserved for nobody"
    assert (schedule.held, repr(schedule)) == (1, "<Schedule 1 prompts held: {'b': 1}>")


def test_whoever_has_used_up_its_share_takes_the_last_of_the_one_that_has_most_left() -> None:
    books = Books(
        {"a": [0, 1, 2], "b": [3, 4, 5, 6, 7]}, a=Standing(2, 99.9), b=Standing(2, 99.9), c=Standing(2, 99.9)
    )
    assert books.schedule.take("c", 2) == [7, 6]
    assert books.schedule.take("c", 2) == [2, 1], "after that a and b have as much left, and the first one is as good"


@pytest.mark.parametrize(
    ("reserve", "taken"),
    # Both have four out, and b has eight left: half of them make it even.
    [(0, [9, 8, 7, 6]), (4, [9, 8]), (8, []), (99, [])],
)
def test_no_more_is_taken_than_makes_both_even_and_what_is_reserved_is_left(reserve: int, taken: list[int]) -> None:
    books = Books({"b": list(range(2, 10))}, a=Standing(4, 99.9), b=Standing(4, 99.9))
    assert books.schedule.take("a", 9, reserve=reserve) == taken


@pytest.mark.parametrize("what", ["idle", "gone", "ejected", "slow"])
def test_all_may_be_taken_of_one_that_does_nothing_or_is_gone_or_slow(what: str) -> None:
    standing = {"a": Standing(4, 99.9), "b": Standing(0 if what == "idle" else 4, 99.9)}
    pace = paced(a=1.0, b=100.0, spread=3.0) if what == "slow" else None
    if what == "gone":
        del standing["b"]
    books = Books({"b": [0, 1, 2]}, pace=pace, **standing)
    if what == "ejected":
        del books.present["b"]  # which still has its work out
    assert books.schedule.take("a", 9, reserve=99) == [2, 1, 0]
    assert books.schedule.held == 0
    assert books.schedule.take("a", 9) == []


def test_a_slow_backend_does_not_take_the_last_prompts() -> None:
    # What is left, 40 prompts, takes the other a second each with four at a time: 10 s. A piece on b takes 30 s.
    pace = paced(a=1.0, b=30.0)
    books = Books(
        {"a": list(range(20)), "b": list(range(20, 40))}, pace=pace, a=Standing(4, 99.9), b=Standing(4, 99.9)
    )
    assert books.schedule.take("b", 4) == []
    assert books.schedule.held == 40
    # Of 400 it has its part: they take the other 100 s.
    many = Books(
        {"a": list(range(200)), "b": list(range(200, 400))}, pace=pace, a=Standing(4, 99.9), b=Standing(4, 99.9)
    )
    assert many.schedule.take("b", 4) == [200, 201, 202, 203]


@pytest.mark.parametrize("seconds", [1.0, 1.24])
def test_a_backend_much_like_the_quickest_is_never_called_slow(seconds: float) -> None:
    books = Books(
        {"a": [0], "b": [1]}, pace=paced(a=1.0, b=seconds, spread=50.0), a=Standing(4, 99.9), b=Standing(4, 99.9)
    )
    assert books.schedule.take("b", 1) == [1]


def test_a_backend_that_has_not_answered_for_long_is_slower_than_it_ever_was() -> None:
    pace = paced(a=1.0, b=1.0, spread=2.0)
    books = Books({"a": [0, 1], "b": [2, 3]}, pace=pace, a=Standing(4, 99.0), b=Standing(4, 40.0))
    assert books.schedule.take("b", 1) == []
    assert books.schedule.take("a", 9) == [0, 1]
    assert books.schedule.take("a", 9) == [3, 2]


def test_a_stall_that_is_over_is_forgotten_with_the_next_comparison() -> None:
    books = Books({"a": [0, 1], "b": [2, 3]}, pace=paced(a=1.0, b=1.0), a=Standing(4, 99.0), b=Standing(4, 40.0))
    assert books.schedule.take("b", 1) == []
    books.present["b"] = Standing(4, 99.9)
    assert books.schedule.take("b", 1) == [], "a comparison holds for a moment"
    books.clock.now += 0.3
    assert books.schedule.take("b", 1) == [2]


def test_the_only_backend_that_is_known_is_not_slow_nor_is_one_without_anybody_else_at_work() -> None:
    alone = Books({"a": [0]}, pace=paced(a=100.0), a=Standing(4, 99.9))
    assert alone.schedule.take("a", 1) == [0]
    idle = Books({"a": [0]}, pace=paced(a=100.0, b=1.0), a=Standing(4, 99.0), b=Standing(0, None))
    assert idle.schedule.take("a", 1) == [0]


def test_pieces_that_took_no_time_at_all_break_nothing() -> None:
    books = Books({"a": [0], "b": [1]}, pace=paced(a=0.0, b=0.0), a=Standing(4, None), b=Standing(4, None))
    assert (books.schedule.take("a", 1), books.schedule.take("b", 1)) == ([0], [1])


def test_what_is_dropped_nobody_gets_any_more() -> None:
    schedule = Books({"a": [0, 1], "b": [2]}).schedule
    schedule.take("a", 1)
    assert sorted(schedule.drop()) == [1, 2]
    assert (schedule.held, schedule.take("a", 9), schedule.take("b", 9), schedule.drop()) == (0, [], [], [])


NAMES = ["a", "b", "c", "d"]


@given(
    homes=st.lists(st.sampled_from(NAMES), max_size=60),
    takes=st.lists(
        st.tuples(st.sampled_from([*NAMES, "e"]), st.integers(1, 9), st.integers(0, 70), st.floats(0, 1)), max_size=80
    ),
    loads=st.dictionaries(st.sampled_from([*NAMES, "e"]), st.integers(0, 40)),
    weight=st.integers(1, 16),
    seconds=st.dictionaries(st.sampled_from([*NAMES, "e"]), st.floats(0, 100)),
    drops=st.booleans(),
)
def test_every_prompt_is_handed_out_once_whatever_the_order(
    homes: list[str],
    takes: list[tuple[str, int, int, float]],
    loads: dict[str, int],
    weight: int,
    seconds: dict[str, float],
    drops: bool,
) -> None:
    shares = {name: [i for i, home in enumerate(homes) if home == name] for name in NAMES}
    pace = Pace()
    for name, value in seconds.items():
        pace.observe_piece(name, value, [10])
    books = Books(
        shares, weight, pace, **{name: Standing(load, 50.0 if load else None) for name, load in loads.items()}
    )
    taken: list[int] = []
    for name, count, reserve, passed in takes:
        books.clock.now += passed
        piece = books.schedule.take(name, count, reserve=reserve)
        assert len(piece) <= count
        taken += piece
        assert books.schedule.held == len(homes) - len(taken) == sum(map(books.schedule.share, NAMES))
    if drops:
        taken += books.schedule.drop()
        assert sorted(taken) == list(range(len(homes)))
    assert len(set(taken)) == len(taken)


# No dead end


@dataclass
class Model:
    """A server: how long a completion takes, how many run at once, and what disturbs it.

    Args:
        seconds (`float`): Per completion.
        max_num_seqs (`int`): At once.
        gone (`tuple[float, float]`): From when until when it takes part in nothing; what is out is lost and comes
            back to the batch's caller, who serves it elsewhere.
        stall (`tuple[float, float]`): When it stops answering, and for how long.
        others (`int`): Completions of other calls, which stay.
    """

    seconds: float
    max_num_seqs: int
    gone: tuple[float, float]
    stall: tuple[float, float]
    others: int
    load: int = 0
    out: dict[int, float] = field(default_factory=dict)


MODELS = st.builds(
    Model,
    seconds=st.sampled_from([0.01, 0.1, 1.0, 5.0, 60.0]),
    max_num_seqs=st.sampled_from([1, 4, 8, 64]),
    gone=st.tuples(st.sampled_from([0.0, 1.0, 7.0, 1e9]), st.sampled_from([5.0, 1e9])),
    stall=st.tuples(st.floats(0, 20), st.sampled_from([0.0, 0.0, 30.0, 300.0])),
    others=st.sampled_from([0, 0, 3, 100]),
)


@settings(max_examples=150)
@given(
    models=st.lists(MODELS, min_size=1, max_size=5),
    homes=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    weight=st.sampled_from([1, 4, 16, 100]),
    reserve=st.sampled_from([0, 1, 16, 1000]),
    seed=st.integers(0, 99),
)
def test_there_is_always_somebody_who_may_take_the_next(
    models: list[Model], homes: list[int], weight: int, reserve: int, seed: int
) -> None:
    """Whatever servers do: as long as prompts are held, either something is out, or one that is there takes some at
    its next look, or everybody is gone. As the pool does it, a server with anything out takes what it has room for,
    and an idle one takes one prompt in any case."""
    models[0].gone = (1e9, 1e9)  # one that is there: otherwise nobody can end it
    rng, clock, pace = random.Random(seed), Clock(0.0), Pace()
    servers = {f"n{i}": model for i, model in enumerate(models)}

    def here(model: Model) -> bool:
        return not model.gone[0] <= clock.now < model.gone[1]

    def load(name: str) -> int:
        return servers[name].load + servers[name].others if here(servers[name]) else 0

    def standing() -> dict[str, Standing]:
        return {n: Standing(load(n), min(m.out.values(), default=None)) for n, m in servers.items() if here(m)}

    shares: dict[str, list[int]] = {}
    for index, home in enumerate(homes):
        shares.setdefault(f"n{home % len(models)}", []).append(index)
    schedule = Schedule(shares, weight, pace=pace, standing=standing, load=load, clock=clock)
    served: Counter[int] = Counter()
    ends: list[tuple[float, int, str, list[int]]] = []
    pieces = idle_looks = 0
    while schedule.held or ends:
        for name in rng.sample(sorted(servers), len(servers)):
            model = servers[name]
            while here(model):
                free = int(model.max_num_seqs * (1 + SURPLUS)) - load(name)
                if free < weight and load(name):
                    break
                piece = schedule.take(name, max(1, min(8, free) // weight), reserve=reserve)
                if not piece:
                    break
                pieces += 1
                model.load += len(piece) * weight
                model.out[pieces] = clock.now
                took = model.seconds * rng.uniform(0.1, 3.0)
                end = clock.now + took
                begin, seconds = model.stall
                if begin < end and clock.now < begin + seconds:
                    end = max(end, begin) + seconds
                heapq.heappush(ends, (end, pieces, name, piece))
        if not ends:
            # Only others' load can stand in the way, and it stays in this model: it goes away now, as it would.
            idle_looks += 1
            assert idle_looks < 20, "held for ever"
            for model in servers.values():
                model.others = 0
            clock.now += 1.0
            continue
        idle_looks = 0
        clock.now, number, name, piece = heapq.heappop(ends)
        model = servers[name]
        model.load -= len(piece) * weight
        sent = model.out.pop(number)
        served.update(piece)
        pace.observe_piece(name, clock.now - sent, [rng.randrange(1, 100) for _ in range(min(weight, 8))])
    assert served == Counter(range(len(homes)))
