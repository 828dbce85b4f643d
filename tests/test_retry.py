"""What follows from how an attempt ended."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_pool.breaker import Verdict
from trl_pool.errors import Outcome
from trl_pool.retry import (
    MAX_BACKOFF_SECONDS,
    MAX_COSTS,
    MAX_SERVER_ERRORS,
    RULES,
    PromptsOutstandingError,
    piece_size,
    rounds,
)


def test_every_outcome_has_a_rule() -> None:
    assert set(RULES) == set(Outcome)


def test_the_rules_charge_backends_for_what_is_theirs_alone() -> None:
    charged = {outcome for outcome, rule in RULES.items() if rule.verdict is Verdict.FAILURE}
    assert charged == {Outcome.UNREACHED, Outcome.LOST, Outcome.TIMED_OUT, Outcome.UNAVAILABLE}
    assert {outcome for outcome, rule in RULES.items() if rule.verdict is Verdict.SUCCESS} == {Outcome.OK}


def test_a_request_that_is_wrong_cancelled_or_answered_is_not_sent_again() -> None:
    assert {outcome for outcome, rule in RULES.items() if not rule.again} == {
        Outcome.OK,
        Outcome.REJECTED,
        Outcome.CANCELLED,
    }


def test_what_may_have_cost_the_backend_is_what_was_sent_and_never_answered() -> None:
    assert {outcome for outcome, rule in RULES.items() if rule.costs} == {Outcome.LOST, Outcome.TIMED_OUT}
    assert MAX_COSTS == 2


def test_an_answer_that_shows_no_culprit_is_compared_and_charged_to_nobody_yet() -> None:
    compared = {outcome: rule for outcome, rule in RULES.items() if rule.compare}
    assert set(compared) == {Outcome.SERVER_ERROR, Outcome.BAD_ANSWER}
    assert {rule.verdict for rule in compared.values()} == {Verdict.NEUTRAL}
    assert MAX_SERVER_ERRORS == 3


def run_rounds(attempts: int, backoff_seconds: float, succeed_in: int | None = None) -> tuple[int, list[float]]:
    """How many rounds there were, and the waits between them."""
    waits: list[float] = []
    made = 0

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def go() -> None:
        nonlocal made
        async for attempt in rounds(attempts=attempts, backoff_seconds=backoff_seconds, sleep=sleep):
            with attempt:
                made += 1
                if made != succeed_in:
                    raise PromptsOutstandingError

    try:
        asyncio.run(go())
    except PromptsOutstandingError:
        assert made == attempts
    else:
        assert made == succeed_in
    return made, waits


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_rounds_are_bounded_in_number_with_one_wait_between_two(attempts: int) -> None:
    made, waits = run_rounds(attempts, 0.2)
    assert (made, len(waits)) == (attempts, attempts - 1)


def test_a_round_that_leaves_nothing_is_the_last() -> None:
    made, waits = run_rounds(5, 0.2, succeed_in=3)
    assert (made, len(waits)) == (3, 2)


def test_waits_have_full_jitter_below_a_bound_that_doubles_up_to_ten_seconds() -> None:
    seen = [run_rounds(9, 0.2)[1] for _ in range(60)]
    for number, waits in enumerate(zip(*seen, strict=True)):
        bound = min(0.2 * 2**number, MAX_BACKOFF_SECONDS)
        assert all(0 <= wait <= bound for wait in waits)
        # Of 60 uniform draws one is above half and one below a half, or chance itself is broken (2 ** -60).
        assert max(waits) > bound / 2 > min(waits)


def test_a_hundred_rounds_neither_overflow_nor_wait_longer_than_ten_seconds() -> None:
    made, waits = run_rounds(100, 0.2)
    assert made == 100
    assert 5 < max(waits) <= MAX_BACKOFF_SECONDS


@pytest.mark.parametrize(("backoff", "most"), [(0.0, 0.0), (60.0, MAX_BACKOFF_SECONDS)])
def test_no_backoff_means_no_wait_and_a_huge_one_is_capped(backoff: float, most: float) -> None:
    assert all(0 <= wait <= most for wait in run_rounds(4, backoff)[1])


def test_other_errors_end_the_rounds_at_once() -> None:
    made = 0

    async def sleep(seconds: float) -> None:
        raise AssertionError("no wait after a bug")

    async def go() -> None:
        nonlocal made
        async for attempt in rounds(attempts=5, backoff_seconds=0.2, sleep=sleep):
            with attempt:
                made += 1
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(go())
    assert made == 1


@pytest.mark.parametrize(
    ("failed", "others", "size"),
    [(1, 0, 1), (1, 1, 1), (4, 1, 1), (5, 1, 2), (64, 1, 16), (64, 3, 16), (64, 8, 8), (65, 8, 9), (100, 0, 25)],
)
def test_what_failed_is_sent_again_in_pieces_of(failed: int, others: int, size: int) -> None:
    assert piece_size(failed, others) == size


@given(failed=st.integers(1, 10_000), others=st.integers(0, 300))
def test_the_pieces_are_as_large_as_they_can_be_when_there_are_four_of_them_or_one_per_backend(
    failed: int, others: int
) -> None:
    size = piece_size(failed, others)
    wanted = max(4, others)
    assert size >= 1
    assert size * wanted >= failed
    assert size == 1 or (size - 1) * wanted < failed
    assert size < failed or failed == 1
