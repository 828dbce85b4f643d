"""A large batch under way: who is given what, without sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from dispatching import Clock, fleet_of
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_pool import NoBackendAvailableError
from trl_pool.backend import Backend
from trl_pool.breaker import Verdict
from trl_pool.dispatch import Dispatcher, Want
from trl_pool.errors import AttemptError, Outcome
from trl_pool.leases import Lane, Lease
from trl_pool.pulling import Pull
from trl_pool.schedule import Queue


class Call:
    """A call of many prompts on servers that run eight sequences at once unless they are told otherwise.

    Args:
        prompts (`int`): How many.
        weight (`int`, *optional*, defaults to `1`): Completions of each.
        **options (`Any`): Of [`fleet_of`].
    """

    def __init__(self, *hosts: str, prompts: int, weight: int = 1, **options: Any) -> None:
        self.clock = Clock()
        self.dispatcher: Dispatcher = fleet_of(*hosts, clock=self.clock, **options)
        self.backends = list(self.dispatcher.backends.values())
        self.prompts, self.weight = prompts, weight
        self.want = Want(Lane.GENERATE, weight, owner=self, shares_slot=True)
        self.given: dict[str, list[list[int]]] = {backend.name: [] for backend in self.backends}
        self.out: list[tuple[Lease, list[int]]] = []

    def begin(self) -> Pull:
        """Plans the batch, and has everybody begin."""
        shards = self.dispatcher.split(self.want, [f"key {i}" for i in range(self.prompts)])
        assert shards is not None
        self.pull = Pull(self.want, shards, dispatcher=self.dispatcher, clock=self.clock, timeout=1.0)
        for lease, _ in shards:
            piece = self.pull.begin(lease)
            if piece:
                self.sent(lease, piece)
        return self.pull

    def sent(self, lease: Lease, piece: list[int]) -> None:
        assert piece
        assert lease in lease.backend._leases
        self.given[lease.backend.name].append(piece)
        self.out.append((lease, piece))

    def fill(self) -> int:
        """Takes as long as anybody has room; how many pieces that were."""
        self.clock.now += 0.3
        count = 0
        while self.pull.schedule.held and (found := self.pull.take()) is not None:
            self.sent(*found)
            count += 1
        return count

    def answer(self, which: int = 0, lengths: list[int] | None = None) -> Backend:
        """One of those that are out is answered."""
        lease, piece = self.out.pop(which)
        found = [10] * len(piece) * self.weight if lengths is None else lengths
        self.pull.answered(lease, found)
        lease.backend.served(lease, len(piece), found)
        lease.backend.release(lease, Verdict.SUCCESS)
        return lease.backend

    def fail(
        self, which: int = 0, outcome: Outcome = Outcome.SERVER_ERROR, retry_after: float | None = None
    ) -> list[int]:
        lease, piece = self.out.pop(which)
        self.pull.ended(lease)
        lease.backend.failed(AttemptError(lease.backend.url, outcome, "test", retry_after=retry_after))
        lease.backend.release(lease, Verdict.NEUTRAL if outcome is Outcome.BUSY else Verdict.FAILURE)
        return piece

    @property
    def loads(self) -> list[int]:
        return [backend.load for backend in self.backends]

    @property
    def served(self) -> list[int]:
        return sorted(index for pieces in self.given.values() for piece in pieces for index in piece)


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Notices of a change need a loop to be looked at in."""

    def run() -> None:
        asyncio.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def test_nobody_is_given_more_than_it_runs_and_a_quarter_and_all_at_once_what_fits() -> None:
    call = Call("a", "b", prompts=40)
    pull = call.begin()
    # A share of twenty does not fit into ten: small pieces, until there is no room.
    call.fill()
    assert call.loads == [10, 10]
    assert [len(piece) for piece in call.given["a:8000"]] == [8, 2]
    assert pull.schedule.held == 20


def test_a_share_that_fits_goes_as_one_request() -> None:
    call = Call("a", "b", prompts=18)
    call.begin()
    assert [len(piece) for (piece,) in call.given.values()] == [9, 9]
    assert call.pull.schedule.held == 0


@in_a_loop
async def test_whoever_answers_gets_more_until_every_prompt_was_given_once() -> None:
    call = Call("a", "b", "c", prompts=100)
    call.begin()
    call.fill()
    # c answers nothing until all others are done.
    while any(lease.backend.name != "c:8000" for lease, _ in call.out):
        call.answer(next(i for i, (lease, _) in enumerate(call.out) if lease.backend.name != "c:8000"))
        call.fill()
    assert call.served == list(range(100))
    assert sum(map(len, call.given["c:8000"])) == 10, "what it had when it stopped; the rest went to the others"


@pytest.mark.parametrize(("weight", "max_num_seqs"), [(16, 4), (3, 8), (100, 1), (8, 8), (9, 8)])
def test_prompts_of_more_completions_than_fit_are_given_one_by_one(weight: int, max_num_seqs: int) -> None:
    async def run() -> None:
        call = Call("a", "b", prompts=9, weight=weight, max_num_seqs=max_num_seqs)
        call.begin()
        call.fill()
        most = max(weight, int(max_num_seqs * 1.25))
        while call.out:
            assert all(0 < load <= most for load in call.loads) or not call.pull.schedule.held
            call.answer()
            call.fill()
        assert call.served == list(range(9))

    asyncio.run(run())


@in_a_loop
async def test_what_a_server_says_of_its_queue_counts_for_as_long_as_it_is_fresh() -> None:
    call = Call("a", "b", prompts=100)
    call.begin()
    call.fill()
    a, b = call.backends
    a.queue = Queue(4, 0, call.clock.now)  # most of what is out waits for nothing any more: room for six
    b.queue = Queue(5, 5, call.clock.now)  # its memory is full
    call.fill()
    assert call.loads == [16, 10]
    call.clock.now += 5
    a.queue.changed = -100
    assert call.fill() == 0, "too old: counted by what is out"


@in_a_loop
async def test_a_server_that_tells_no_queue_is_given_more_as_completions_prove_unequal() -> None:
    call = Call("a", "b", prompts=200)
    call.begin()
    for backend in call.backends:
        backend.tells_queue = False
    for _ in range(200):
        call.dispatcher.pace.observe_piece("other", 1.0, [100, 0, 0, 0])
    call.fill()
    occupancy = call.dispatcher.pace.occupancy
    assert occupancy == pytest.approx(0.25, abs=0.02)
    most = int(10 / occupancy)
    assert all(most - 8 < load <= most for load in call.loads)


@in_a_loop
async def test_a_backend_that_would_be_late_with_anything_gets_nothing_at_all() -> None:
    call = Call("a", "b", prompts=22)
    for _ in range(300):
        call.dispatcher.pace.observe_piece("a:8000", 1.0, [100])
        call.dispatcher.pace.observe_piece("b:8000", 200.0, [100])
    call.begin()
    while call.out:
        call.fill()
        call.answer()
        call.fill()
    assert call.given["b:8000"] == []
    assert call.served == list(range(22))
    assert [(b.inflight, b.slots_taken) for b in call.backends] == [(0, 0)] * 2


@in_a_loop
async def test_what_a_server_held_that_asks_to_be_left_alone_goes_to_the_others() -> None:
    call = Call("a", "b", prompts=200, max_num_seqs=64)
    call.begin()
    call.fill()

    def of(name: str) -> list[int]:
        return [place for place, (lease, _) in enumerate(call.out) if lease.backend.name == name]

    assert call.pull.schedule.share("a:8000") == 20
    call.fail(of("a:8000")[0], Outcome.BUSY, retry_after=1000.0)
    while len(of("a:8000")) > 1:
        call.answer(of("a:8000")[0])
    while of("b:8000"):
        call.answer(of("b:8000")[0])
        call.fill()
    assert call.pull.schedule.held == 0, "a has one request out, and takes no other for a long time"
    assert len(of("a:8000")) == 1


@in_a_loop
async def test_when_only_breakers_stand_in_the_way_the_first_whose_time_is_up_is_tried_and_not_waited_for() -> None:
    call = Call("a", "b", prompts=60, fail_eject_threshold=1, cooldown_seconds=1000.0)
    call.begin()
    call.fill()
    while call.out:
        call.fail()
        call.clock.now += 0.01
    assert [b.breaker.allows() for b in call.backends] == [False, False]
    assert call.fill() == 1, "one at a time"
    (lease, _), *_ = call.out
    call.answer()
    assert lease.backend.breaker.state.value == "closed" or call.fill() >= 1
    assert call.fill() >= 1


@in_a_loop
async def test_it_raises_when_nobody_is_left_to_wait_for_but_not_while_something_is_out() -> None:
    call = Call("a", "b", prompts=60)
    call.begin()
    call.fill()
    for backend in call.backends:
        backend.gone("refused")
    assert call.pull.take() is None
    while call.out:
        call.fail()
    with pytest.raises(NoBackendAvailableError, match="refused"):
        call.pull.take()
    call.backends[1].health.answered()
    assert call.fill() >= 1


@in_a_loop
async def test_a_gate_that_does_not_drain_keeps_prompts_back_and_one_that_does_only_others() -> None:
    call = Call("a", "b", prompts=60)
    call.begin()
    call.dispatcher.close_gate("test", drain=True)
    assert call.fill() == 0, "nobody has said that it is under way"
    call.dispatcher.under_way.add(call)
    assert call.fill() > 0
    while call.out:
        call.answer()
    call.dispatcher.close_gate("test")
    assert call.fill() == 0
    call.dispatcher.open_gate()
    assert call.fill() > 0


@in_a_loop
async def test_a_call_that_is_cancelled_in_the_moment_in_which_it_is_given_a_piece_leaves_no_lease_behind() -> None:
    call = Call("a", "b", prompts=60)
    pull = call.begin()
    call.fill()
    until = call.clock() + 100
    waiting = asyncio.create_task(call.dispatcher.patiently(pull.take, Lane.GENERATE, until=until))
    await asyncio.sleep(0)
    assert call.dispatcher.waiting == 1
    before = sum(b.inflight for b in call.backends)
    call.answer()  # has the waiting looked at, in the next round of the loop
    asyncio.get_running_loop().call_soon(waiting.cancel)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert sum(b.inflight for b in call.backends) == before, "one ended, one was given and nobody knows of it"
    pull.release()
    assert [(b.inflight, b.load, b.slots_taken) for b in call.backends] == [(0, 0, 0)] * 2
    assert call.dispatcher.tally.total == 0
    call.dispatcher.close()


def test_the_pieces_of_a_call_share_one_slot_of_each_server() -> None:
    call = Call("a", "b", prompts=120, max_inflight_per_backend=1, max_num_seqs=32)
    call.begin()
    call.fill()
    assert [b.inflight > 1 for b in call.backends] == [True, True]
    assert [b.slots_taken for b in call.backends] == [1, 1]
    assert call.dispatcher.try_lease(Want(Lane.GENERATE, 1)) is None


@settings(max_examples=60)
@given(
    prompts=st.integers(20, 80),
    weight=st.sampled_from([1, 2, 8, 20]),
    max_num_seqs=st.sampled_from([1, 4, 8, 16]),
    events=st.lists(
        st.tuples(st.sampled_from(["answer", "fail", "busy", "gone", "back"]), st.integers(0, 99)), max_size=60
    ),
)
def test_whatever_servers_do_every_prompt_is_given_once_and_the_books_are_even(
    prompts: int, weight: int, max_num_seqs: int, events: list[tuple[str, int]]
) -> None:
    async def run() -> None:
        call = Call("a", "b", "c", prompts=prompts, weight=weight, max_num_seqs=max_num_seqs, fail_eject_threshold=2)
        call.begin()
        for what, which in events:
            if what == "gone":
                call.backends[which % 3].gone("refused")
            elif what == "back":
                call.backends[which % 3].health.answered()
            elif call.out and what == "answer":
                call.answer(which % len(call.out))
            elif call.out:
                call.fail(which % len(call.out), Outcome.BUSY if what == "busy" else Outcome.SERVER_ERROR, 0.5)
            try:
                call.fill()
            except NoBackendAvailableError:
                assert not call.out
        for backend in call.backends:
            backend.health.answered()
        for _ in range(500):
            call.clock.now += 50.0  # cooldowns end
            call.fill()
            if not call.out:
                break
            call.answer()
        assert not call.out
        assert call.pull.schedule.held == 0
        assert call.served == list(range(prompts))
        assert [(b.inflight, b.load, b.slots_taken) for b in call.backends] == [(0, 0, 0)] * 3
        assert call.dispatcher.tally.total == 0

    asyncio.run(run())


# When nothing else would wake it


def test_with_nothing_out_suspect_backends_are_given_pieces_too() -> None:
    call = Call("a", "b", prompts=64)
    call.begin()
    call.fill()
    while call.out:
        call.answer()
    for backend in call.backends:
        backend.health.silent(busy=False, lagged=False, reason="test")
    assert call.fill() > 0


def test_a_server_that_others_keep_full_has_a_part_for_this_call_all_the_same() -> None:
    call = Call("a", prompts=200, max_num_seqs=64)
    call.begin()
    call.fill()
    while call.out:
        call.answer()
    (backend,) = call.backends
    backend.queue = Queue(64, 1000, call.clock.now)
    backend.take(Lane.GENERATE, 64)
    call.fill()
    assert sum(lease.weight for lease, _ in call.out) == 16
    call.clock.now += 0.3
    assert call.fill() == 0


def test_a_slow_server_takes_what_is_left_when_nobody_else_is_at_work_for_the_call() -> None:
    call = Call("slow", "quick", prompts=40)
    pull = call.begin()
    while call.out:
        call.answer()
    pull.schedule._slow = {"slow:8000": True, "quick:8000": False}
    pull.schedule._looked = call.clock.now + 1000
    call.backends[1].draining = True
    held = pull.schedule.held
    assert held
    call.fill()
    assert pull.schedule.held < held
