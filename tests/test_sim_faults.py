"""Faults as values, and the book that holds them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from trl_pool.sim.faults import ENDPOINTS, Fault, FaultBook


def test_a_fault_happens_as_often_as_it_says_and_then_the_next() -> None:
    book = FaultBook()
    book.add(Fault(kind="busy", times=2))
    book.add(Fault(kind="hang", endpoints=("chat",)))
    assert repr(book) == "<FaultBook: busy x2, hang>"
    kinds = [
        fault and fault.kind for fault in map(book.take, ["generate", "health", "chat", "chat", "generate", "chat"])
    ]
    assert kinds == ["busy", None, "busy", "hang", None, "hang"]
    assert book.listing() == [{"kind": "hang", "endpoints": ("chat",), "times": None}]
    book.clear()
    assert book.take("chat") is None
    assert repr(book) == "<FaultBook: none>"


def test_faults_concern_everything_but_health_unless_named() -> None:
    def concerned(**fields: object) -> set[str]:
        fault = Fault.model_validate(fields)
        return {name for name in ENDPOINTS if fault.concerns(name)}

    assert concerned(kind="hang") == set(ENDPOINTS) - {"health"}
    assert concerned(kind="hang", endpoints=["health"]) == {"health"}
    assert concerned(kind="dead_worker") == {"generate", "chat", "get_sequence_logprobs", "reset_prefix_cache"}
    assert concerned(kind="false_reset") == {"reset_prefix_cache"}


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "explode"},
        {"kind": "hang", "endpoints": ["generat"]},
        {"kind": "hang", "times": 0},
        {"kind": "slow", "seconds": -1},
        {"kind": "status", "status": 200},
        {"kind": "refuse", "times": 1},
        {"kind": "hang", "second": 1},
    ],
)
def test_faults_that_make_no_sense_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Fault.model_validate(fields)


def test_faults_of_the_whole_server_are_not_for_the_book() -> None:
    with pytest.raises(ValueError, match="no request"):
        FaultBook().add(Fault(kind="refuse"))
