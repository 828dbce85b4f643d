"""The sums that are kept of leases, whatever becomes of them in whatever order."""

from __future__ import annotations

import pytest
from dispatching import fleet_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from trl_pool.breaker import Verdict
from trl_pool.leases import Lane, Lease
from trl_pool.schedule import Queue

LANES = st.sampled_from(list(Lane))
WEIGHTS = st.integers(0, 40)


class Owner:
    """A call."""


OWNERS = [Owner(), Owner(), None]


class Books(RuleBasedStateMachine):
    """Two backends of one pool; the model is the list of leases that are out."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.dispatcher = fleet_of("n0", "n1")
        self.backends = list(self.dispatcher.backends.values())
        self.out: list[Lease] = []
        self.weights: dict[Lease, int] = {}

    @rule(
        target=leases,
        which=st.integers(0, 1),
        lane=LANES,
        weight=WEIGHTS,
        owner=st.integers(0, 2),
        shares=st.booleans(),
    )
    def take(self, which: int, lane: Lane, weight: int, owner: int, shares: bool) -> Lease:
        lease = self.backends[which].take(lane, weight, owner=OWNERS[owner], shares_slot=shares, force=True)
        self.out.append(lease)
        self.weights[lease] = weight
        return lease

    @rule(lease=leases, weight=WEIGHTS)
    def reweigh(self, lease: Lease, weight: int) -> None:
        lease.backend.reweigh(lease, weight)
        self.weights[lease] = weight

    @rule(lease=consumes(leases), verdict=st.sampled_from(list(Verdict)), again=st.booleans())
    def release(self, lease: Lease, verdict: Verdict, again: bool) -> None:
        lease.backend.release(lease, verdict)
        self.out.remove(lease)
        if again:
            lease.backend.release_unused(lease)
            lease.backend.reweigh(lease, 7)

    @invariant()
    def every_sum_is_that_of_the_leases(self) -> None:
        for backend in self.backends:
            mine = [lease for lease in self.out if lease.backend is backend]
            assert backend.inflight == len(mine)
            assert backend.load == sum(self.weights[lease] for lease in mine)
            slots = {id(lease.owner) if lease.shares_slot else id(lease) for lease in mine}
            assert backend.slots_taken == len(slots)
            for owner in OWNERS:
                assert backend.leased_to(owner) == sum(lease.owner is owner for lease in mine)
            for lane in Lane:
                assert backend.holds_lane(lane) == any(lease.lane is lane for lease in mine)
        assert self.dispatcher.tally.total == sum(self.weights[lease] for lease in self.out)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=40, stateful_step_count=30)


@given(owners=st.lists(st.tuples(st.integers(0, 1), st.booleans()), max_size=12), limit=st.integers(1, 4))
def test_a_call_that_shares_its_slot_may_go_on_where_others_find_none(
    owners: list[tuple[int, bool]], limit: int
) -> None:
    dispatcher = fleet_of("n0", max_inflight_per_backend=limit)
    (backend,) = dispatcher.backends.values()
    sharing = set()
    for which, shares in owners:
        owner = OWNERS[which]
        sharer = owner if shares else None
        blocked = backend.why_blocked(Lane.GENERATE, sharer)
        assert (blocked is None) == (backend.slots_taken < limit or (shares and which in sharing))
        if blocked is None:
            backend.take(Lane.GENERATE, 1, owner=owner, shares_slot=shares)
            sharing |= {which} if shares else set()
    assert backend.slots_taken <= limit


# What a server said of its queue, and what has become of it since


@pytest.mark.parametrize("verdict", [Verdict.NEUTRAL, Verdict.FAILURE])
def test_what_nobody_waits_for_is_in_no_queue(verdict: Verdict) -> None:
    (backend,) = fleet_of("n0").backends.values()
    backend.queue = Queue(4, 2, at=99.0)
    lease = backend.take(Lane.GENERATE, 8)
    assert backend.queue.changed == 8
    backend.reweigh(lease, 3)
    assert backend.queue.changed == 3
    backend.release(lease, verdict)
    assert backend.queue.changed == 0
    backend.release(lease, verdict)
    backend.reweigh(lease, 5)
    assert backend.queue.changed == 0, "it is over"


@pytest.mark.parametrize("lengths", [[7, 7, 7], []], ids=["of known lengths", "of lengths nobody knows"])
def test_what_is_answered_has_left_the_queue(lengths: list[int]) -> None:
    (backend,) = fleet_of("n0").backends.values()
    backend.queue = Queue(4, 2, at=99.0)
    lease = backend.take(Lane.GENERATE, 3)
    backend.served(lease, 1, lengths)
    backend.release(lease, Verdict.SUCCESS)
    assert backend.queue.changed == 0
