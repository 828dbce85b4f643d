"""What probes say of a server, and which weights it holds."""

from __future__ import annotations

import pytest

from trl_pool.facts import Health, HealthFact, SyncFact

REASON = "health probe not answered within 2 s"


@pytest.fixture(params=[True, False], ids=["silence-means-suspect", "silence-means-down"])
def fact(request: pytest.FixtureRequest) -> HealthFact:
    return HealthFact(silent_means_suspect=request.param)


def test_nothing_is_known_before_the_first_probe(fact: HealthFact) -> None:
    assert (fact.state, fact.reason, fact.usable) == (Health.UNKNOWN, "not probed yet", False)


def test_an_answer_makes_a_server_usable(fact: HealthFact) -> None:
    assert fact.answered("step-7") is False
    assert (fact.state, fact.reason, fact.usable, fact.model_version) == (Health.UP, "", True, "step-7")


def test_the_model_version_is_that_of_the_latest_answer(fact: HealthFact) -> None:
    fact.answered("step-7")
    fact.answered()
    assert fact.model_version is None


def test_busy_is_not_down(fact: HealthFact) -> None:
    fact.answered()
    fact.silent(busy=True, lagged=False, reason=REASON)
    assert (fact.state, fact.reason) == (Health.UP, "")


def test_a_probe_that_expired_while_our_own_loop_lagged_is_void(fact: HealthFact) -> None:
    fact.answered()
    fact.silent(busy=False, lagged=True, reason=REASON)
    assert (fact.state, fact.reason) == (Health.UP, "")


def test_a_void_probe_leaves_an_unknown_server_unknown(fact: HealthFact) -> None:
    fact.silent(busy=False, lagged=True, reason=REASON)
    fact.silent(busy=True, lagged=False, reason=REASON)
    assert (fact.state, fact.reason) == (Health.UNKNOWN, "not probed yet")


def test_a_server_that_has_never_answered_is_not_usable_however_it_fails_to(fact: HealthFact) -> None:
    fact.silent(busy=False, lagged=False, reason=REASON)
    assert (fact.state, fact.reason, fact.usable) == (Health.UNKNOWN, REASON, False)
    fact.unreachable("ConnectTimeout")
    assert (fact.state, fact.reason, fact.usable) == (Health.UNKNOWN, "ConnectTimeout", False)
    fact.unreachable("ConnectTimeout")
    assert (fact.state, fact.usable) == (Health.DOWN, False)


def test_a_silent_idle_server_may_be_busy_for_somebody_else_where_work_silences_probes() -> None:
    fact = HealthFact(silent_means_suspect=True)
    fact.answered()
    for _ in range(3):
        fact.silent(busy=False, lagged=False, reason=REASON)
        assert (fact.state, fact.reason, fact.usable) == (Health.SUSPECT, REASON, True)


def test_an_idle_server_silent_twice_is_down_where_work_does_not_silence_probes() -> None:
    fact = HealthFact(silent_means_suspect=False)
    fact.answered()
    fact.silent(busy=False, lagged=False, reason=REASON)
    assert (fact.state, fact.usable) == (Health.SUSPECT, True)
    fact.silent(busy=False, lagged=False, reason=REASON)
    assert (fact.state, fact.reason, fact.usable) == (Health.DOWN, REASON, False)


def test_an_answer_of_any_kind_clears_suspicion() -> None:
    for clear in (HealthFact.answered, HealthFact.served):
        fact = HealthFact(silent_means_suspect=True)
        fact.answered()
        fact.silent(busy=False, lagged=False, reason=REASON)
        assert fact.state is Health.SUSPECT
        assert not clear(fact)
        assert (fact.state, fact.reason) == (Health.UP, "")


def test_a_refused_connection_is_down_at_once(fact: HealthFact) -> None:
    fact.answered()
    fact.refused("connection refused")
    assert (fact.state, fact.reason, fact.usable) == (Health.DOWN, "connection refused", False)


def test_a_health_answer_other_than_200_is_down_at_once(fact: HealthFact) -> None:
    fact.answered()
    fact.wrong("health probe answered 503")
    assert (fact.state, fact.reason) == (Health.DOWN, "health probe answered 503")


def test_the_second_unreachable_probe_in_a_row_means_down(fact: HealthFact) -> None:
    fact.answered()
    fact.unreachable("ConnectTimeout")
    assert (fact.state, fact.reason, fact.unreached) == (Health.SUSPECT, "ConnectTimeout", 1)
    fact.unreachable("ConnectTimeout again")
    assert (fact.state, fact.reason, fact.unreached) == (Health.DOWN, "ConnectTimeout again", 2)


@pytest.mark.parametrize("between", [HealthFact.answered, HealthFact.served])
def test_an_answer_between_two_unreachable_probes_makes_them_two_first_ones(fact: HealthFact, between) -> None:  # type: ignore[no-untyped-def]
    fact.answered()
    fact.unreachable("ConnectTimeout")
    between(fact)
    fact.unreachable("ConnectTimeout")
    assert (fact.state, fact.unreached) == (Health.SUSPECT, 1)


def test_an_accepted_connection_between_two_unreachable_probes_makes_two_first_ones(fact: HealthFact) -> None:
    fact.answered()
    fact.unreachable("ConnectTimeout")
    fact.silent(busy=True, lagged=False, reason=REASON)
    fact.unreachable("ConnectTimeout")
    assert fact.state is Health.SUSPECT


def test_down_stays_down_until_a_probe_is_answered(fact: HealthFact) -> None:
    fact.refused("connection refused")
    fact.silent(busy=False, lagged=False, reason=REASON)
    assert (fact.state, fact.reason) == (Health.DOWN, "connection refused")
    fact.served()
    assert fact.state is Health.DOWN
    fact.unreachable("ConnectTimeout")
    assert fact.state is Health.DOWN


@pytest.mark.parametrize("how", ["refused", "wrong", "unreachable twice"])
def test_the_answer_that_brings_a_server_back_says_so_once(fact: HealthFact, how: str) -> None:
    fact.answered()
    for _ in range(2):
        getattr(fact, how.split()[0])("gone")
    assert fact.state is Health.DOWN
    assert fact.answered() is True
    assert (fact.state, fact.unreached) == (Health.UP, 0)
    assert fact.answered() is False


def test_servers_hold_the_version_they_loaded_until_told_otherwise() -> None:
    assert SyncFact().why_stale(0) is None


def test_only_the_required_version_may_serve() -> None:
    fact = SyncFact()
    assert fact.why_stale(1) == "holds weights v0, needs v1"
    fact.reached(1)
    assert fact.why_stale(1) is None
    assert fact.why_stale(2) == "holds weights v1, needs v2"
    assert fact.why_stale(0) == "holds weights v1, needs v0"


def test_lost_weights_are_wrong_for_every_version_until_a_whole_update() -> None:
    fact = SyncFact()
    fact.lost("it restarted")
    for version in (0, 1, 9):
        assert fact.why_stale(version) == f"out of sync (it restarted), needs weights v{version}"
    fact.reached(9)
    assert (fact.held, fact.reason, fact.why_stale(9)) == (9, "", None)
