"""What the pool remembers of the prompts that it has sent."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_pool.balancer import CHARS_PER_TOKEN, conversation_text
from trl_pool.prefixes import PrefixMemory, depths, marks

IDS = st.integers(0, 2)
"""Few, so that beginnings meet."""

NAMES = [f"n{i}" for i in range(20)]


def ids_of(parts: Sequence[int]) -> list[int]:
    """32 tokens for each part: two parts make a depth."""
    return [part for part in parts for _ in range(32)]


def text_of(parts: Sequence[int]) -> str:
    return "".join(str(part) * 32 * CHARS_PER_TOKEN for part in parts)


def conversation_of(parts: Sequence[int]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": str(part) * 100} for part in parts]


def covered(unit: Any, depth: int) -> Any:
    """What a prompt's mark of a depth covers."""
    if isinstance(unit, list) and unit and isinstance(unit[0], dict):
        unit = conversation_text(unit)
    return unit[: depth * (CHARS_PER_TOKEN if isinstance(unit, str) else 1)]


# Depths


@given(length=st.integers(0, 40_000))
def test_depths_rise_and_never_exceed_the_prompt(length: int) -> None:
    found = list(depths(length))
    assert all(0 < low < high for low, high in pairwise(found))
    assert all(depth <= length for depth in found)
    assert not found or length - found[-1] < max(64, found[-1])


@pytest.mark.parametrize(
    ("length", "count"), [(63, 0), (64, 1), (1023, 15), (1024, 16), (1279, 16), (1280, 17), (8192, 44), (100_000, 44)]
)
def test_a_prompt_of_any_length_has_few_depths_fine_ones_first(length: int, count: int) -> None:
    if length > 8192:
        assert count < len(list(depths(length))) < 500
    else:
        assert len(list(depths(length))) == count


# Marks


@pytest.mark.parametrize("make", [ids_of, text_of, conversation_of], ids=lambda make: make.__name__)
@given(
    shared=st.lists(IDS, max_size=40),
    a=st.lists(IDS, max_size=12),
    b=st.lists(IDS, max_size=12),
)
def test_marks_are_equal_exactly_as_far_as_what_they_cover_is(
    make: Any, shared: list[int], a: list[int], b: list[int]
) -> None:
    one, other = make(shared + a), make(shared + b)
    ours, theirs = marks(one), marks(other)
    for count, depth in enumerate(depths(64 * 128), start=1):
        if count > min(len(ours), len(theirs)):
            break
        assert (ours[:count] == theirs[:count]) == (covered(one, depth) == covered(other, depth))
        # Each covers all before it, so that one of them is enough.
        assert (ours[count - 1] == theirs[count - 1]) == (ours[:count] == theirs[:count])


@given(ids=st.lists(st.integers(0, 200_000), min_size=64, max_size=300))
def test_every_token_counts(ids: list[int]) -> None:
    for place in (0, 31, 63):
        changed = [*ids[:place], ids[place] + 1, *ids[place + 1 :]]
        assert set(marks(ids)).isdisjoint(marks(changed))
    assert len(marks(ids)) == len(ids) // 64


@given(parts=st.lists(IDS, min_size=8, max_size=12), more=st.lists(IDS, max_size=4))
def test_the_next_turn_of_a_conversation_begins_with_the_marks_of_the_one_before(
    parts: list[int], more: list[int]
) -> None:
    before = marks(conversation_of(parts))
    assert before
    assert marks(conversation_of(parts + more))[: len(before)] == before


@pytest.mark.parametrize(
    "garbage",
    [
        None,
        5,
        3.5,
        True,
        "",
        [],
        {},
        {"role": "user"},
        [{}, 5],
        [{"role": "user", "content": "x" * 1000}, "text"],
        [[1, 2]] * 100,
        [None, {"a": 1}] * 100,
        [{"a"}] * 100,
        object(),
    ],
    ids=lambda garbage: repr(garbage)[:20],
)
def test_garbage_has_no_marks_and_is_somebody_elses_to_refuse(garbage: Any) -> None:
    assert marks(garbage) == []


# Memory


def chains(count: int) -> list[list[int]]:
    """Prompts that share their first two marks, and then no more."""
    return [[1, 2, 100 + i, 200 + i] for i in range(count)]


def test_the_longest_beginning_that_anybody_has_decides() -> None:
    memory = PrefixMemory(100)
    one, other = chains(2)
    memory.served(one, "a")
    memory.served(other, "b")
    assert memory.holders(one) == ["a"]
    assert memory.holders([*other, 7, 8]) == ["b"]
    assert memory.holders([1, 2, 300]) == ["a", "b"]
    assert memory.holders([1, 5]) == ["a", "b"]
    assert memory.holders([5, 1][:1]) == memory.holders([]) == ()


def test_whoever_served_a_beginning_again_is_known_once() -> None:
    memory = PrefixMemory(100)
    for name in ("a", "b", "a", "a"):
        memory.served([1, 2], name)
    assert memory.holders([1, 2]) == ["a", "b"]
    assert (len(memory), repr(memory)) == (2, "<PrefixMemory 2 of 100 beginnings>")


def test_who_did_not_serve_a_prompt_after_all_is_not_taken_for_who_has_it() -> None:
    memory = PrefixMemory(100)
    one, other = chains(2)
    memory.served(one, "a")
    memory.served(other, "a")
    memory.missed(one, "a")
    memory.served(one, "b")
    assert memory.holders([*one, 7]) == ["b"]
    assert memory.holders(other) == ["a"]
    for missed in (one, [5], []):
        memory.missed(missed, "b")
    assert memory.holders(one) == ["a", "b"], "a shorter beginning they both have"


@given(
    entries=st.integers(0, 12),
    prompts=st.lists(st.tuples(st.lists(st.integers(0, 30), max_size=6), st.sampled_from(NAMES)), max_size=60),
)
def test_it_never_remembers_more_than_it_may_and_forgets_first_what_was_not_met_for_longest(
    entries: int, prompts: list[tuple[list[int], str]]
) -> None:
    memory = PrefixMemory(entries)
    recent: list[int] = []
    for found, name in prompts:
        memory.served(found, name)
        for mark in found:
            recent = [one for one in recent if one != mark] + [mark]
            recent = recent[max(0, len(recent) - entries) :]
        assert len(memory) == len(recent) <= entries
    for mark in range(31):
        assert bool(memory.holders([mark])) == (mark in recent)


def test_a_beginning_that_more_than_sixteen_have_tells_nobody_apart() -> None:
    memory = PrefixMemory(100)
    for count, name in enumerate(NAMES, start=1):
        memory.served([1], name)
        memory.served([1, 50 + count], name)
        assert memory.holders([1]) == (NAMES[:count] if count <= 16 else ())
    assert memory.holders([1, 53]) == [NAMES[2]], "a longer one still does"
    assert memory.holders([1, 99]) == ()


def test_one_of_many_that_loses_its_cache_does_not_make_the_others_special() -> None:
    memory = PrefixMemory(100)
    for name in NAMES:
        memory.served([1], name)
    for name in NAMES[:5]:
        memory.forget(name)
    assert memory.holders([1]) == ()


@given(prompts=st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=4), st.sampled_from(NAMES[:4])), max_size=30))
def test_a_backend_that_is_forgotten_holds_nothing_and_the_others_what_they_had(
    prompts: list[tuple[list[int], str]],
) -> None:
    memory, without = PrefixMemory(1000), PrefixMemory(1000)
    for found, name in prompts:
        memory.served(found, name)
        if name != "n0":
            without.served(found, name)
    memory.forget("n0")
    memory.forget("nobody")
    assert [memory.holders([mark]) for mark in range(10)] == [without.holders([mark]) for mark in range(10)]
    assert len(memory) == len(without)
    memory.clear()
    assert len(memory) == 0
    assert memory.holders([1, 2]) == ()


def test_a_backend_is_forgotten_once_however_often_it_is_said_to_be_gone() -> None:
    memory = PrefixMemory(100)
    memory.served([1, 2], "a")
    memory.served([1], "b")
    for _ in range(3):
        memory.forget("a")
    assert (list(memory.holders([1, 2])), len(memory)) == (["b"], 1)
    memory.served([1, 2], "a")
    assert list(memory.holders([1, 2])) == ["a"]
    memory.clear()
    memory.forget("a")
    assert len(memory) == 0
