"""The circuit breaker, through its events."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trl_pool.breaker import TRANSITIONS, BreakerState, CircuitBreaker, Permit, Verdict

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
SUCCESS, FAILURE, NEUTRAL = Verdict.SUCCESS, Verdict.FAILURE, Verdict.NEUTRAL
THRESHOLD, COOLDOWN, MAX_COOLDOWN = 3, 30.0, 75.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(threshold=THRESHOLD, cooldown=COOLDOWN, max_cooldown=MAX_COOLDOWN, clock=clock)


def give(breaker: CircuitBreaker, verdict: Verdict, times: int = 1, **more: object) -> None:
    for _ in range(times):
        breaker.release(breaker.acquire(), verdict, **more)  # type: ignore[arg-type]


def eject(breaker: CircuitBreaker) -> None:
    give(breaker, FAILURE, 1 if breaker.state is HALF_OPEN else THRESHOLD)
    assert breaker.state is OPEN


def bring_back(breaker: CircuitBreaker, clock: Clock) -> None:
    clock.now += breaker.seconds_until_trial()
    give(breaker, SUCCESS)
    assert breaker.state is CLOSED


def test_it_starts_closed_and_allows_any_number_of_requests(breaker: CircuitBreaker) -> None:
    assert breaker.state is CLOSED
    for _ in range(100):
        breaker.acquire()
    assert breaker.allows()


def test_consecutive_failures_up_to_the_threshold_eject(breaker: CircuitBreaker) -> None:
    give(breaker, FAILURE, THRESHOLD - 1)
    assert (breaker.state, breaker.allows(), breaker.consecutive_failures) == (CLOSED, True, THRESHOLD - 1)
    give(breaker, FAILURE)
    assert (breaker.state, breaker.allows(), breaker.ejections) == (OPEN, False, 1)


def test_a_success_begins_the_count_of_failures_anew(breaker: CircuitBreaker) -> None:
    give(breaker, FAILURE, THRESHOLD - 1)
    give(breaker, SUCCESS)
    assert breaker.consecutive_failures == 0
    give(breaker, FAILURE, THRESHOLD - 1)
    assert breaker.state is CLOSED


def test_a_neutral_result_neither_counts_nor_begins_the_count_anew(breaker: CircuitBreaker) -> None:
    give(breaker, FAILURE, THRESHOLD - 1)
    give(breaker, NEUTRAL, 10)
    assert (breaker.state, breaker.consecutive_failures) == (CLOSED, THRESHOLD - 1)
    give(breaker, FAILURE)
    assert breaker.state is OPEN


def test_an_open_breaker_gives_no_permit_until_the_cooldown_is_over(breaker: CircuitBreaker, clock: Clock) -> None:
    eject(breaker)
    clock.now += COOLDOWN - 0.5
    assert (breaker.state, breaker.seconds_until_trial()) == (OPEN, 0.5)
    with pytest.raises(RuntimeError, match=r"^breaker gives no permit: ejected for 0 s after 3 failures$"):
        breaker.acquire()
    clock.now += 0.5
    assert (breaker.state, breaker.seconds_until_trial(), breaker.allows()) == (HALF_OPEN, 0.0, True)


def test_a_half_open_breaker_lets_one_request_try(breaker: CircuitBreaker, clock: Clock) -> None:
    eject(breaker)
    clock.now += COOLDOWN
    breaker.acquire()
    assert not breaker.allows()
    with pytest.raises(RuntimeError, match="half-open, its trial request is out"):
        breaker.acquire()


def test_a_successful_trial_closes_it(breaker: CircuitBreaker, clock: Clock) -> None:
    eject(breaker)
    clock.now += COOLDOWN
    trial = breaker.acquire()
    breaker.release(trial, SUCCESS)
    assert (breaker.state, breaker.allows(), breaker.consecutive_failures) == (CLOSED, True, 0)
    give(breaker, FAILURE, THRESHOLD - 1)
    assert breaker.state is CLOSED


def test_a_neutral_trial_gives_the_next_request_the_chance(breaker: CircuitBreaker, clock: Clock) -> None:
    eject(breaker)
    clock.now += COOLDOWN
    breaker.release(breaker.acquire(), NEUTRAL)
    assert (breaker.state, breaker.allows()) == (HALF_OPEN, True)
    breaker.acquire()
    assert not breaker.allows()


def test_one_failed_trial_ejects_again_and_the_kth_time_in_a_row_k_times_as_long_up_to_the_cap(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    lengths = []
    for _ in range(5):
        eject(breaker)
        lengths.append(breaker.seconds_until_trial())
        clock.now += breaker.seconds_until_trial()
    assert lengths == [30.0, 60.0, 75.0, 75.0, 75.0]
    assert breaker.ejections == 5


def test_a_first_cooldown_above_the_cap_is_kept(clock: Clock) -> None:
    breaker = CircuitBreaker(threshold=1, cooldown=600.0, max_cooldown=300.0, clock=clock)
    for _ in range(2):
        give(breaker, FAILURE)
        assert breaker.seconds_until_trial() == 600.0
        clock.now += 600.0


def test_ejections_in_a_row_add_up_across_short_recoveries(breaker: CircuitBreaker, clock: Clock) -> None:
    eject(breaker)
    bring_back(breaker, clock)
    clock.now += MAX_COOLDOWN
    give(breaker, SUCCESS)
    eject(breaker)
    assert breaker.seconds_until_trial() == 2 * COOLDOWN


def test_a_long_time_of_success_forgets_earlier_ejections(breaker: CircuitBreaker, clock: Clock) -> None:
    eject(breaker)
    bring_back(breaker, clock)
    clock.now += MAX_COOLDOWN + 1
    give(breaker, SUCCESS)
    eject(breaker)
    assert (breaker.seconds_until_trial(), breaker.ejections) == (COOLDOWN, 2)


def test_the_success_that_ends_an_ejection_does_not_forget_it(breaker: CircuitBreaker, clock: Clock) -> None:
    clock.now += MAX_COOLDOWN + 1
    for number in (1, 2):
        eject(breaker)
        assert breaker.seconds_until_trial() == number * COOLDOWN
        bring_back(breaker, clock)


def test_results_of_requests_sent_before_an_ejection_change_nothing_after_it(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    late = [breaker.acquire() for _ in range(6)]
    eject(breaker)
    for verdict in Verdict:
        breaker.release(late.pop(), verdict)
    assert (breaker.state, breaker.seconds_until_trial(), breaker.ejections) == (OPEN, COOLDOWN, 1)
    clock.now += COOLDOWN
    breaker.acquire()
    for verdict in Verdict:
        breaker.release(late.pop(), verdict)
    assert breaker.state is HALF_OPEN
    assert not breaker.allows()


def test_a_trial_that_ends_after_the_breaker_was_closed_by_another_changes_nothing(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    eject(breaker)
    clock.now += COOLDOWN
    first, second = breaker.acquire(), breaker.acquire(force=True)
    breaker.release(first, SUCCESS)
    breaker.release(second, FAILURE)
    assert (breaker.state, breaker.consecutive_failures) == (CLOSED, 0)


def test_force_gives_a_permit_of_an_open_breaker_whose_success_closes_it(breaker: CircuitBreaker) -> None:
    eject(breaker)
    forced = breaker.acquire(force=True)
    assert (breaker.state, breaker.allows()) == (HALF_OPEN, False)
    breaker.release(forced, SUCCESS)
    assert breaker.state is CLOSED


def test_force_that_fails_ejects_again_and_for_longer(breaker: CircuitBreaker) -> None:
    eject(breaker)
    breaker.release(breaker.acquire(force=True), FAILURE)
    assert (breaker.state, breaker.seconds_until_trial()) == (OPEN, 2 * COOLDOWN)


def test_all_forced_permits_of_a_half_open_breaker_have_to_come_back_before_the_next(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    eject(breaker)
    clock.now += COOLDOWN
    permits = [breaker.acquire(), breaker.acquire(force=True), breaker.acquire(force=True)]
    for permit in permits:
        assert not breaker.allows()
        breaker.release(permit, NEUTRAL)
    assert breaker.allows()


def test_force_changes_nothing_about_a_closed_breaker(breaker: CircuitBreaker) -> None:
    breaker.acquire(force=True)
    assert (breaker.state, breaker.allows()) == (CLOSED, True)


def test_a_restarted_server_is_tried_at_once(breaker: CircuitBreaker) -> None:
    eject(breaker)
    breaker.server_restarted()
    assert (breaker.state, breaker.allows(), breaker.seconds_until_trial()) == (HALF_OPEN, True, 0.0)


def test_a_restart_changes_nothing_about_a_breaker_that_is_not_open(breaker: CircuitBreaker, clock: Clock) -> None:
    give(breaker, FAILURE, THRESHOLD - 1)
    breaker.server_restarted()
    assert (breaker.state, breaker.consecutive_failures) == (CLOSED, THRESHOLD - 1)
    eject_now = breaker.acquire()
    breaker.release(eject_now, FAILURE)
    clock.now += COOLDOWN
    trial = breaker.acquire()
    breaker.server_restarted()
    assert not breaker.allows()
    breaker.release(trial, SUCCESS)
    assert breaker.state is CLOSED


def test_one_failure_is_enough_of_a_backend_that_was_suspect(breaker: CircuitBreaker) -> None:
    give(breaker, FAILURE, trip=True)
    assert breaker.state is OPEN


@pytest.mark.parametrize("verdict", [SUCCESS, NEUTRAL])
def test_a_suspect_that_does_not_fail_is_not_ejected(breaker: CircuitBreaker, verdict: Verdict) -> None:
    give(breaker, verdict, trip=True)
    assert breaker.state is CLOSED


def test_a_verdict_that_comes_later_than_its_permit_counts_like_any_other(breaker: CircuitBreaker) -> None:
    give(breaker, NEUTRAL, 5)
    for _ in range(THRESHOLD):
        assert breaker.state is CLOSED
        breaker.record(FAILURE, reason="server error: 500")
    assert breaker.describe() == "ejected for 30 s after 3 failures (server error: 500)"


def test_a_failure_recorded_while_open_does_not_prolong_the_ejection(breaker: CircuitBreaker, clock: Clock) -> None:
    eject(breaker)
    clock.now += 10
    breaker.record(FAILURE)
    assert (breaker.seconds_until_trial(), breaker.ejections) == (COOLDOWN - 10, 1)


def test_looking_at_a_breaker_does_not_change_what_a_verdict_does(clock: Clock) -> None:
    ejections = []
    for looks in (False, True):
        breaker = CircuitBreaker(threshold=1, cooldown=COOLDOWN, max_cooldown=MAX_COOLDOWN, clock=clock)
        give(breaker, FAILURE)
        clock.now += COOLDOWN
        if looks:
            breaker.describe()
        breaker.record(FAILURE)
        ejections.append(breaker.ejections)
    assert ejections[0] == ejections[1]


def test_it_describes_itself_in_words(breaker: CircuitBreaker, clock: Clock) -> None:
    assert repr(breaker) == "<CircuitBreaker closed>"
    give(breaker, FAILURE, reason="timed out")
    assert breaker.describe() == "closed, 1 failures in a row"
    give(breaker, FAILURE, 2, reason="timed out")
    clock.now += 18
    assert breaker.describe() == "ejected for 12 s after 3 failures (timed out)"
    clock.now += 12
    assert breaker.describe() == "half-open"
    trial = breaker.acquire()
    assert breaker.describe() == "half-open, its trial request is out"
    breaker.release(trial, FAILURE, reason="refused")
    assert breaker.describe() == "ejected for 60 s after a failure (refused)"


def test_the_table_leads_from_every_state_to_every_other_and_names_no_way_past_the_trial() -> None:
    ways = {(source, target) for (source, _), target in TRANSITIONS.items()}
    assert ways == {(CLOSED, OPEN), (OPEN, HALF_OPEN), (HALF_OPEN, CLOSED), (HALF_OPEN, OPEN)}


class BreakerMachine(RuleBasedStateMachine):
    """The breaker against a model that knows only: the state, when an ejection ends, the failures in a row, and
    which of the permits that are out were given in the present state."""

    @initialize(threshold=st.integers(1, 4), cooldown=st.sampled_from([1.0, 10.0]), factor=st.integers(1, 4))
    def begin(self, threshold: int, cooldown: float, factor: int) -> None:
        self.clock = Clock()
        self.threshold, self.cooldown, self.cap = threshold, cooldown, cooldown * factor
        self.breaker = CircuitBreaker(threshold=threshold, cooldown=cooldown, max_cooldown=self.cap, clock=self.clock)
        self.state = CLOSED
        self.failures = 0
        self.ejections = 0
        self.ends = 0.0
        self.current: list[Permit] = []
        self.late: list[Permit] = []

    def enter(self, state: BreakerState) -> None:
        self.state = state
        self.late += self.current
        self.current = []
        if state is OPEN:
            self.ejections += 1
            self.ends = self.clock.now + self.breaker.seconds_until_trial()
        if state is not HALF_OPEN:
            self.failures = 0

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 7.0, 10.0, 50.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        if self.state is OPEN and self.clock.now >= self.ends:
            self.enter(HALF_OPEN)

    @rule(force=st.booleans())
    def acquire(self, force: bool) -> None:
        allowed = self.state is CLOSED or (self.state is HALF_OPEN and not self.current)
        if not allowed and not force:
            with pytest.raises(RuntimeError, match="gives no permit"):
                self.breaker.acquire()
            return
        permit = self.breaker.acquire(force=force)
        if self.state is OPEN:
            self.enter(HALF_OPEN)
        self.current.append(permit)

    @precondition(lambda self: self.current)
    @rule(which=st.integers(0, 50), verdict=st.sampled_from(Verdict), trip=st.booleans())
    def release(self, which: int, verdict: Verdict, trip: bool) -> None:
        permit = self.current.pop(which % len(self.current))
        self.breaker.release(permit, verdict, trip=trip)
        self.counts(verdict, trip)

    @precondition(lambda self: self.late)
    @rule(which=st.integers(0, 50), verdict=st.sampled_from(Verdict), trip=st.booleans())
    def release_late(self, which: int, verdict: Verdict, trip: bool) -> None:
        self.breaker.release(self.late.pop(which % len(self.late)), verdict, trip=trip)

    @rule(verdict=st.sampled_from(Verdict))
    def record(self, verdict: Verdict) -> None:
        self.breaker.record(verdict)
        self.counts(verdict, trip=False)

    @rule()
    def restart(self) -> None:
        self.breaker.server_restarted()
        if self.state is OPEN:
            self.enter(HALF_OPEN)

    def counts(self, verdict: Verdict, trip: bool) -> None:
        if verdict is SUCCESS:
            self.failures = 0
            if self.state is HALF_OPEN:
                self.enter(CLOSED)
        elif verdict is FAILURE and self.state is not OPEN:
            self.failures += 1
            if trip or self.state is HALF_OPEN or self.failures >= self.threshold:
                self.enter(OPEN)

    @invariant()
    def agrees_with_the_model(self) -> None:
        breaker = self.breaker
        assert breaker.state is self.state
        assert breaker.ejections == self.ejections
        if self.state is OPEN:
            assert not breaker.allows()
            assert 0 < breaker.seconds_until_trial() == self.ends - self.clock.now <= self.cap
        elif self.state is CLOSED:
            assert breaker.allows()
            assert breaker.consecutive_failures == self.failures
        else:
            # Neither two trials at once nor, when all have come back, none ever again.
            assert breaker.allows() == (not self.current)
            assert breaker.seconds_until_trial() == 0


TestBreakerAgainstItsModel = BreakerMachine.TestCase
TestBreakerAgainstItsModel.settings = settings(max_examples=60, stateful_step_count=40)
