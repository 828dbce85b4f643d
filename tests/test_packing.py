"""Which tensors share a buffer; what torch makes of it is tested in real_engine/both."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_pool.weights.packing import DTYPE_SIZES, Piece, chunk_nbytes, chunks

ROWS = st.lists(
    st.tuples(
        st.text("abc.", min_size=1, max_size=8),
        st.sampled_from(sorted(DTYPE_SIZES)),
        st.lists(st.integers(0, 9), max_size=3),
    ),
    max_size=20,
)


@given(ROWS, st.integers(1, 2000))
def test_every_tensor_is_in_one_buffer_in_order(rows: list[tuple[str, str, list[int]]], size: int) -> None:
    pieces = [piece for chunk in chunks(rows, size) for piece in chunk]
    assert [(p.name, p.dtype_name, list(p.shape)) for p in pieces] == rows
    assert [p.nbytes for p in pieces] == [math.prod(shape) * DTYPE_SIZES[dtype] for _, dtype, shape in rows]


@given(ROWS, st.integers(1, 2000))
def test_buffers_are_cut_by_the_tensor_that_exceeds_the_size_and_by_no_other(
    rows: list[tuple[str, str, list[int]]], size: int
) -> None:
    found = chunks(rows, size)
    assert all(found)
    for chunk in found:
        assert chunk_nbytes(chunk[:-1]) <= size
    for chunk in found[:-1]:
        assert chunk_nbytes(chunk) > size


@given(ROWS, st.integers(1, 2000))
def test_rule_does_not_look_ahead(rows: list[tuple[str, str, list[int]]], size: int) -> None:
    """What is cut off stays the same whatever comes later, so both sides can cut while they go."""
    for chunk, longer in zip(chunks(rows, size)[:-1], chunks([*rows, ("z", "float64", [9, 9])], size), strict=False):
        assert chunk == longer


def test_tensor_larger_than_the_size_has_a_buffer_with_those_before_it() -> None:
    rows = [("a", "bfloat16", [4]), ("b", "float32", [100]), ("c", "int8", [])]
    assert chunks(rows, 64) == [
        [Piece("a", "bfloat16", (4,), 8), Piece("b", "float32", (100,), 400)],
        [Piece("c", "int8", (), 1)],
    ]


def test_exactly_full_buffer_is_not_cut() -> None:
    """vLLM cuts when the size is exceeded, not when it is reached."""
    assert [len(chunk) for chunk in chunks([("x", "uint8", [8])] * 3, 16)] == [3]
    assert [len(chunk) for chunk in chunks([("x", "uint8", [8])] * 4, 15)] == [2, 2]


def test_nothing_makes_no_buffer() -> None:
    assert chunks([], 1) == []


@pytest.mark.parametrize(
    ("row", "size", "message"),
    [
        (("w", "torch.bfloat16", [1]), 1, "w has the unknown dtype 'torch.bfloat16'"),
        (("w", "bfloat16", [2, -1]), 1, "w has a negative extent"),
        (("w", "bfloat16", [1]), 0, "buffer_size_bytes"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(row: tuple[str, str, list[int]], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chunks([row], size)
