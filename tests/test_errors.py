"""The error tree and its words."""

from __future__ import annotations

import inspect
import re

import pytest
import requests

import trl_pool
from trl_pool import errors
from trl_pool.errors import (
    Attempt,
    AttemptError,
    BackendsUnreachableError,
    ControlError,
    ControlResult,
    InvalidRequestError,
    NoBackendAvailableError,
    Outcome,
    OverloadedError,
    PoolError,
    RequestRejectedError,
    RolloutError,
    RolloutTimeoutError,
    UnknownBackendError,
    WeightSyncError,
)

TIMED_OUT = Attempt("http://n1:8000", Outcome.TIMED_OUT, "no answer within 900.0 s", 64, 900.04)
REFUSED = Attempt("http://n2:8000", Outcome.UNREACHED, "connection refused", 16, 0.012)

FOREIGN = {
    "ValueError": ValueError,
    "RuntimeError": RuntimeError,
    "KeyError": KeyError,
    "ImportError": ImportError,
    "requests.ConnectionError": requests.ConnectionError,
    "requests.Timeout": requests.Timeout,
}


def drawn_tree() -> list[tuple[str, str, str | None]]:
    """Every line of the docstring's tree as (class, parent, foreign parent)."""
    drawing = (errors.__doc__ or "").split("```")[1].strip().splitlines()
    assert drawing[0] == "PoolError"
    above: list[str] = ["PoolError"]
    found = []
    for line in drawing[1:]:
        match = re.fullmatch(r"((?:│   |    )*)[├└]── (\w+) +(?:\(([\w.]+)\))?.*", line)
        assert match, line
        depth = len(match[1]) // 4 + 1
        del above[depth:]
        found.append((match[2], above[-1], match[3]))
        above.append(match[2])
    return found


@pytest.mark.parametrize(("name", "parent", "foreign"), drawn_tree())
def test_the_classes_inherit_as_the_docstring_draws(name: str, parent: str, foreign: str | None) -> None:
    bases = [getattr(errors, parent), *([FOREIGN[foreign]] if foreign else [])]
    assert getattr(errors, name).__bases__ == tuple(bases)


def test_the_docstring_draws_every_error_there_is() -> None:
    there_is = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, BaseException) and value.__module__ == errors.__name__
    }
    assert there_is == {name for name, _, _ in drawn_tree()} | {"PoolError"}


def test_every_error_a_caller_may_meet_is_exported_at_the_top() -> None:
    exported = {name for name in trl_pool.__all__ if name.endswith("Error")}
    assert exported <= {name for name, _, _ in drawn_tree()} | {"PoolError"}
    missing = {name for name, _, _ in drawn_tree()} - exported
    assert missing <= {"AttemptError", "DuplicateBackendError"}


def test_every_error_says_what_it_means_in_its_docstring() -> None:
    for name, _, _ in drawn_tree():
        assert (getattr(errors, name).__doc__ or "").strip().endswith((".", "`.")), name


@pytest.mark.parametrize(
    ("error", "caught_as"),
    [
        (RolloutError({0: [REFUSED]}), requests.ConnectionError),
        (RolloutTimeoutError({0: [TIMED_OUT]}), requests.Timeout),
        (RolloutTimeoutError({0: [TIMED_OUT]}), requests.ConnectionError),
        (BackendsUnreachableError({}), requests.ConnectionError),
        (InvalidRequestError("x"), ValueError),
        (WeightSyncError("x", {}), RuntimeError),
        (RequestRejectedError("http://n1:8000", 400, b"", ""), PoolError),
    ],
)
def test_a_script_that_catches_the_mirrored_clients_errors_catches_these(
    error: Exception, caught_as: type[Exception]
) -> None:
    with pytest.raises(caught_as):
        raise error
    assert isinstance(error, PoolError)


def test_the_rollout_error_names_ranges_attempts_and_what_to_do() -> None:
    failed = {i: [TIMED_OUT, REFUSED] for i in (0, 1, 2, 5)}
    failed |= {7: [REFUSED], 8: []}
    error = RolloutError(failed, completed=[3, 4, 6], result={"x": 1}, reason="two backends each")
    assert str(error) == (
        "6 of 9 prompts could not be served (two backends each): "
        "prompts 0-2, 5: http://n1:8000 timed out after 900.0 s: no answer within 900.0 s, "
        "then http://n2:8000 not reached after 0.0 s: connection refused; "
        "prompts 7: http://n2:8000 not reached after 0.0 s: connection refused; "
        "prompts 8: never sent. "
        "The 3 answers that arrived are in `.result`, their indices in `.completed`."
    )
    assert (error.completed, error.result, error.reason) == ([3, 4, 6], {"x": 1}, "two backends each")
    assert error.failed[0] == (TIMED_OUT, REFUSED)


def test_the_message_about_two_hundred_prompts_is_short() -> None:
    assert len(str(RolloutError({i: [TIMED_OUT] for i in range(200)}))) < 300


def test_every_attempt_is_listed_once_in_the_order_of_the_prompts() -> None:
    error = RolloutError({2: [TIMED_OUT], 3: [TIMED_OUT, REFUSED], 9: [REFUSED]})
    assert error.attempts == [TIMED_OUT, REFUSED]


@pytest.mark.parametrize(
    ("attempts", "timed_out"), [([], False), ([TIMED_OUT], True), ([TIMED_OUT, REFUSED], False), ([REFUSED], False)]
)
def test_only_attempts_that_all_ended_by_their_deadline_are_a_time_out(
    attempts: list[Attempt], timed_out: bool
) -> None:
    assert RolloutError({0: attempts}).timed_out is timed_out


def test_nobody_available_says_why_per_backend() -> None:
    error = NoBackendAvailableError(
        {
            "http://n1:8000": "ejected for 12 s after 3 failures (timed out)",
            "http://n2:8000": "holds weights v7, needs v9",
        },
        retry_after=12.0,
    )
    assert str(error) == (
        "No backend available: http://n1:8000 ejected for 12 s after 3 failures (timed out); "
        "http://n2:8000 holds weights v7, needs v9"
    )
    assert error.retry_after == 12.0
    assert list(error.reasons) == ["http://n1:8000", "http://n2:8000"]


def test_a_pool_without_backends_says_that() -> None:
    assert str(NoBackendAvailableError({})) == "No backend available: the pool has no backends"


def test_unreachable_servers_can_be_announced_in_other_words() -> None:
    error = BackendsUnreachableError({"http://n1:8000": "is down"}, headline="1 of 2 servers up after 60 s")
    assert str(error) == "1 of 2 servers up after 60 s: http://n1:8000 is down"


def test_a_rejected_request_reads_as_the_mirrored_clients_error_and_keeps_the_answer() -> None:
    error = RequestRejectedError("http://n1:8000", 422, b'{"detail":"\xff"}', "application/json")
    assert str(error).startswith('Request failed: 422, {"detail":"\ufffd"}')
    assert str(error).endswith("(answered by http://n1:8000)")
    assert (error.status, error.body, error.content_type) == (422, b'{"detail":"\xff"}', "application/json")


def test_an_invalid_request_always_has_details_in_the_form_of_a_422() -> None:
    assert InvalidRequestError("n: too large").details == [
        {"type": "value_error", "loc": ["body"], "msg": "n: too large"}
    ]
    error = InvalidRequestError("x", details=[{"type": "t", "loc": ["body", "n"], "msg": "m"}], indices=(1, 2))
    assert error.details == [{"type": "t", "loc": ["body", "n"], "msg": "m"}]
    assert error.indices == [1, 2]


def test_a_control_error_has_one_result_per_backend_in_its_words() -> None:
    done = ControlResult("http://n1:8000", True, "Request received", 200)
    error = ControlError("reset_prefix_cache failed", {"http://n1:8000": done, "http://n2:8000": "not reached"})
    assert str(error) == "reset_prefix_cache failed: http://n1:8000 succeeded; http://n2:8000 not reached"
    assert error.results == {
        "http://n1:8000": done,
        "http://n2:8000": ControlResult("http://n2:8000", False, "not reached"),
    }


def test_an_unknown_backend_reads_without_the_quotes_of_a_key_error() -> None:
    assert str(UnknownBackendError("no backend 'n9'; there are: n1:8000")) == "no backend 'n9'; there are: n1:8000"


def test_a_failed_attempt_carries_all_that_its_consequences_need() -> None:
    error = AttemptError("http://n1:8000", Outcome.BUSY, "503, later", status=503, retry_after=7.0)
    assert str(error) == "http://n1:8000 busy: 503, later"
    assert (error.outcome, error.status, error.retry_after, error.refused) == (Outcome.BUSY, 503, 7.0, False)


def test_an_overload_says_when_to_come_back() -> None:
    assert OverloadedError("full").retry_after == 1.0
    assert OverloadedError("full", retry_after=9.0).retry_after == 9.0
