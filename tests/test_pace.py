"""How fast each server is, learnt from what it has answered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_pool.pace import Pace

SEQUENCES = {f"n{i}": 256 for i in range(8)}


def call(pace: Pace, **seconds: float) -> None:
    """A call of equal shares: 1,000 tokens the longest completion, all of them fitting in at once."""
    pace.observe_call({name: (value, 50_000, 1000) for name, value in seconds.items()}, SEQUENCES)


# Shares


def test_servers_that_nothing_is_known_of_get_equal_shares() -> None:
    assert Pace().shares(["n0", "n1"]) == {"n0": 1.0, "n1": 1.0}


@pytest.mark.parametrize(("slowness", "low", "high"), [(2.0, 0.25, 0.55), (1.5, 0.45, 0.75), (0.6, 1.3, 2.4)])
def test_shares_become_such_that_all_end_together(slowness: float, low: float, high: float) -> None:
    """A decode step costs 5 ms, and 0.1 ms more with each of 200 sequences that run; all run at once."""
    pace = Pace()

    def step(factor: float, share: float) -> float:
        return factor * (0.005 + 200 * share * 0.0001)

    for _ in range(12):
        share = pace.shares(["n0"])["n0"]
        seconds = {"n0": 1000 * step(slowness, share), **{f"n{i}": 1000 * step(1.0, 1.0) for i in range(1, 4)}}
        pace.observe_call({name: (value, 10_000, 1000) for name, value in seconds.items()}, SEQUENCES)
    assert low < pace.shares(["n0"])["n0"] < high
    assert seconds["n0"] / seconds["n1"] == pytest.approx(1.0, abs=0.3)
    assert pace.shares(["n1", "n2", "n3"]) == {"n1": 1.0, "n2": 1.0, "n3": 1.0}


@pytest.mark.parametrize(("factor", "noticed"), [(1.2, False), (1 / 1.2, False), (1.3, True), (1 / 1.3, True)])
def test_differences_of_a_quarter_are_noise(factor: float, noticed: bool) -> None:
    pace = Pace()
    for _ in range(3):
        call(pace, n0=10.0 * factor, n1=10.0, n2=10.0)
    assert (pace.shares(["n0"])["n0"] != 1.0) is noticed
    assert pace.shares(["n1", "n2"]) == {"n1": 1.0, "n2": 1.0}


def test_a_share_is_never_corrected_beyond_its_limits() -> None:
    pace = Pace()
    for _ in range(20):
        call(pace, n0=1000.0, n1=10.0, n2=10.0, n3=0.01)
    assert pace.shares(SEQUENCES) == {**dict.fromkeys(SEQUENCES, 1.0), "n0": 0.1, "n3": 4.0}


def test_a_server_that_was_slow_for_a_while_is_found_out() -> None:
    pace = Pace()
    call(pace, n0=30.0, n1=10.0, n2=10.0)
    assert pace.shares(["n0"]) == {"n0": 1.0}, "once may be chance"
    call(pace, n0=30.0, n1=10.0, n2=10.0)
    assert pace.shares(["n0"])["n0"] < 0.5
    for _ in range(30):
        call(pace, n0=10.0, n1=10.0, n2=10.0)
    assert pace.shares(["n0"]) == {"n0": 1.0}


@pytest.mark.parametrize(
    "shares",
    [
        {"n0": (30.0, 1000, 100)},
        {"n0": (0.9, 1000, 100), "n1": (0.1, 1000, 100)},
        {"n0": (30.0, 0, 0), "n1": (10.0, 1000, 100)},
        {},
    ],
    ids=["one backend alone", "too short a call", "nothing made", "nobody"],
)
def test_calls_that_say_nothing_about_speed_teach_nothing(shares: dict[str, tuple[float, int, int]]) -> None:
    pace = Pace()
    pace.observe_call(shares, SEQUENCES)
    assert pace.shares(["n0", "n1"]) == {"n0": 1.0, "n1": 1.0}


def test_time_is_compared_per_step_so_shares_of_any_size_are_comparable() -> None:
    pace = Pace()
    # All as fast as each other: one has a completion three times as long, one three times as many tokens as fit in.
    pace.observe_call({"n0": (30.0, 9000, 3000), "n1": (10.0, 9000, 1000), "n2": (30.0, 768_000, 1000)}, SEQUENCES)
    assert pace.shares(["n0", "n1", "n2"]) == {"n0": 1.0, "n1": 1.0, "n2": 1.0}
    for _ in range(2):
        pace.observe_call({"n0": (30.0, 9000, 3000), "n1": (10.0, 9000, 1000), "n2": (30.0, 9000, 1000)}, SEQUENCES)
    assert pace.shares(["n2"])["n2"] < 0.5


def test_a_server_that_runs_fewer_at_once_is_not_called_slow_for_it() -> None:
    pace = Pace()
    pace.observe_call({"n0": (40.0, 10_000, 10), "n1": (10.0, 10_000, 10)}, {"n0": 64, "n1": 256})
    assert pace.shares(["n0", "n1"]) == {"n0": 1.0, "n1": 1.0}


def test_whoever_stands_in_a_backends_place_begins_anew() -> None:
    pace = Pace()
    call(pace, n0=30.0, n1=10.0, n2=10.0)
    pace.observe_piece("n0", 5.0, [10])
    pace.forget("n0")
    pace.forget("nobody")
    assert pace.shares(["n0"]) == {"n0": 1.0}
    assert pace.piece_seconds("n0") is None


@given(
    calls=st.lists(
        st.dictionaries(
            st.sampled_from(sorted(SEQUENCES)),
            st.tuples(st.floats(0.01, 1000), st.integers(0, 10**6), st.integers(0, 5000)),
        ),
        max_size=20,
    )
)
def test_whatever_is_observed_a_share_is_of_use(calls: list[dict[str, tuple[float, int, int]]]) -> None:
    pace = Pace()
    for shares in calls:
        pace.observe_call(shares, SEQUENCES)
    for share in pace.shares(SEQUENCES).values():
        assert share == 1.0 or 0.1 <= share < 1 / 1.25 or 1.25 < share <= 4.0


# Small requests


def test_the_first_request_of_a_backend_counts_whole_and_later_ones_a_tenth() -> None:
    pace = Pace()
    assert pace.piece_seconds("n0") is None
    pace.observe_piece("n0", 4.0, [10])
    assert pace.piece_seconds("n0") == 4.0
    pace.observe_piece("n0", 8.0, [10])
    assert pace.piece_seconds("n0") == 6.0
    for _ in range(8):
        pace.observe_piece("n0", 6.0, [10])
    pace.observe_piece("n0", 16.0, [10])
    assert pace.piece_seconds("n0") == pytest.approx(7.0)
    assert pace.piece_seconds("n1") is None


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_a_request_of_unknown_lengths_teaches_nothing(lengths: list[int]) -> None:
    pace = Pace()
    pace.observe_piece("n0", 4.0, lengths)
    assert (pace.piece_seconds("n0"), pace.occupancy, pace.spread) == (None, 0.5, 1.0)


def test_occupancy_is_the_share_of_a_request_that_runs_on_average() -> None:
    pace = Pace()
    assert pace.occupancy == 0.5
    for _ in range(1000):
        pace.observe_piece("n0", 1.0, [100, 50, 0, 50])
    assert pace.occupancy == pytest.approx(0.5)
    for _ in range(1000):
        pace.observe_piece("n0", 1.0, [100] * 8)
    assert pace.occupancy == pytest.approx(1.0)


def test_spread_is_the_longest_completion_over_that_of_a_usual_request() -> None:
    pace = Pace()
    assert pace.spread == 1.0
    for _ in range(20):
        pace.observe_piece("n0", 1.0, [100, 20])
    assert pace.spread == pytest.approx(1.0, abs=0.05)
    pace.observe_piece("n0", 10.0, [1000])
    assert 5 < pace.spread < 10
    for _ in range(2000):
        pace.observe_piece("n0", 1.0, [100])
    assert 1.0 <= pace.spread < 1.5, "what was long long ago is forgotten"


def test_the_repr_tells_what_is_known() -> None:
    pace = Pace()
    for _ in range(2):
        call(pace, n0=30.0, n1=10.0, n2=10.0)
    pace.observe_piece("n1", 2.5, [10])
    assert "'n0': 0.4" in repr(pace)
    assert "requests n1 2.5 s" in repr(pace)
