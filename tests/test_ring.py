"""The consistent-hash ring."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_pool.ring import HashRing, stable_hash

NAMES = st.lists(st.text("abcdefghij0123456789.:-", min_size=1, max_size=12), min_size=1, max_size=12, unique=True)
KEYS = [f"key {i}" for i in range(2000)]


def owners(ring: HashRing) -> dict[str, str]:
    return {key: next(ring.walk(key)) for key in KEYS}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0xE4A6A0577479B2B4),
        ("a", 0x40F89E395B66422F),
        ("http://n1:8000", 0x5EE8DDC7D7907D25),
        ("ü", 0x55F19DF5C1392F37),
        ("n1:8000#0", 0x20D826FB3EC1677C),
    ],
)
def test_hashes_are_those_of_every_other_machine_and_release(text: str, expected: int) -> None:
    assert stable_hash(text) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("", [3, 2, 1, 4, 0]),
        ("alpha", [0, 3, 2, 4, 1]),
        ("beta", [0, 2, 4, 3, 1]),
        ("gamma", [0, 3, 1, 2, 4]),
        ("session:1", [3, 4, 2, 1, 0]),
    ],
)
def test_walks_are_those_of_every_other_machine_and_release(key: str, expected: list[int]) -> None:
    ring = HashRing([f"n{i}:8000" for i in range(5)])
    assert list(ring.walk(key)) == [f"n{i}:8000" for i in expected]


def test_another_process_with_another_hash_seed_walks_the_same_way() -> None:
    program = (
        "from trl_pool.ring import HashRing\n"
        "ring = HashRing({'one', 'two', 'three', 'four'})\n"
        "print([list(ring.walk(f'key {i}')) for i in range(50)])"
    )
    ring = HashRing(["one", "two", "three", "four"])
    here = str([list(ring.walk(f"key {i}")) for i in range(50)])
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        result = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == here


def test_the_order_in_which_names_came_does_not_matter() -> None:
    names = [f"n{i}" for i in range(7)]
    forwards, backwards = HashRing(names), HashRing(reversed(names))
    assert all(list(forwards.walk(key)) == list(backwards.walk(key)) for key in KEYS[:200])


@given(names=NAMES, gone=st.integers(0, 100))
@settings(max_examples=15)
def test_when_a_backend_goes_exactly_its_keys_move_each_to_its_second_choice(names: list[str], gone: int) -> None:
    ring = HashRing(names, virtual_nodes=150)
    lost = names[gone % len(names)]
    before = {key: list(ring.walk(key)) for key in KEYS[:400]}
    ring.remove(lost)
    for key, order in before.items():
        assert list(ring.walk(key)) == [name for name in order if name != lost]


@given(names=NAMES, new=st.text("xyz", min_size=1, max_size=8))
@settings(max_examples=15)
def test_when_a_backend_comes_its_share_moves_to_it_and_nothing_else_moves(names: list[str], new: str) -> None:
    ring = HashRing(names, virtual_nodes=150)
    before = owners(ring)
    ring.add(new)
    after = owners(ring)
    moved = [key for key in KEYS if after[key] != before[key]]
    assert {after[key] for key in moved} <= {new}
    # Five standard deviations: of 150 arcs per name, and of 2000 keys thrown at them.
    share = 1 / (len(names) + 1)
    deviation = (share * (1 - share) * (1 / (150 * (len(names) + 1)) + 1 / len(KEYS))) ** 0.5
    assert abs(len(moved) / len(KEYS) - share) <= 5 * deviation


@pytest.mark.parametrize("count", range(1, 17))
def test_a_new_server_takes_little_more_than_its_share_of_the_keys(count: int) -> None:
    ring = HashRing(f"node{i}:8000" for i in range(count))
    before = owners(ring)
    ring.add("new:8000")
    moved = sum(owner != before[key] for key, owner in owners(ring).items())
    assert 0 < moved <= (1 / (count + 1) + 0.05) * len(KEYS)


@given(names=NAMES, key=st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=30)
def test_a_walk_meets_every_name_exactly_once(names: list[str], key: str) -> None:
    ring = HashRing(names, virtual_nodes=150)
    order = list(ring.walk(key))
    assert len(order) == len(names)
    assert set(order) == set(names)


@pytest.mark.parametrize("virtual_nodes", [150, 160, 500])
@pytest.mark.parametrize("count", [2, 8, 32])
def test_keys_spread_evenly_over_backends(count: int, virtual_nodes: int) -> None:
    ring = HashRing([f"http://node{i}:8000" for i in range(count)], virtual_nodes=virtual_nodes)
    keys = 500 * count
    got = Counter(next(ring.walk(f"prompt {i}")) for i in range(keys))
    assert len(got) == count
    # Four standard deviations of a share: of its arcs, and of 500 keys thrown at them.
    tolerance = 4 * (1 / virtual_nodes + 1 / 500) ** 0.5
    assert max(got.values()) <= (1 + tolerance) * 500
    assert min(got.values()) >= (1 - tolerance) * 500


def test_a_backend_stands_on_the_ring_once_however_often_it_is_added() -> None:
    ring, same = HashRing(["a", "b"]), HashRing(["a", "b"])
    ring.add("a")
    assert repr(ring) == repr(same) == "<HashRing 2 names × 160 points>"
    ring.remove("a")
    assert list(ring.walk("key")) == ["b"]
    assert (len(ring), "a" in ring, "b" in ring) == (1, False, True)


def test_a_backend_that_comes_back_gets_exactly_its_old_keys() -> None:
    ring = HashRing(["a", "b", "c"])
    before = owners(ring)
    ring.remove("b")
    ring.add("b")
    assert owners(ring) == before


def test_an_empty_ring_offers_nobody_and_an_unknown_name_is_ignored() -> None:
    ring = HashRing()
    ring.remove("nobody")
    assert list(ring.walk("key")) == []
    assert len(ring) == 0
