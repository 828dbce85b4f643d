"""Logprobs of large answers, fast: a step's answer holds a million numbers, and where it is decoded decides what the
whole client costs.

Three things make it so:

1. No Python object is made that nobody asked for, and no Python code runs per token. msgspec reads what is needed and
   skips the rest; what has to be built of it is built by iterators that run in C.
2. The cyclic garbage collector looks at the half million lists of an answer once, not again and again while they are
   being made ([`at_a_stretch`]). This alone is three quarters of the time of decoding.
3. What is needed for one completion only is made and dropped completion by completion, so that the memory for it is
   used again, and is in the processor's cache.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple, ParamSpec, TypeVar

import msgspec
import numpy as np

P = ParamSpec("P")
T = TypeVar("T")

_COLLECTS_INSIDE_CALLS = sys.version_info < (3, 12)

_QUOTED_PREFIX = b'"token_id:'
_PREFIX_LENGTH = len(_QUOTED_PREFIX) - 1


def at_a_stretch(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls a function with no garbage collection in the middle of it.

    Python 3.12 and later call every function implemented in C that way: there the collector runs between instructions
    only. Before, it ran whenever 700 objects had been made, and went through all young ones again and again.

    The collector is the whole process's. So this is for functions in C, which keep the interpreter's lock, or that
    take a millisecond: hardly any other thread can run while it is off. Where it was off before it stays off.
    """
    if not (_COLLECTS_INSIDE_CALLS and gc.isenabled()):
        return function(*args, **kwargs)
    try:
        gc.disable()
        return function(*args, **kwargs)
    finally:
        gc.enable()


class CompletionLogprobs(msgspec.Struct, gc=False):
    """Of a completion: parallel lists, read by [`ranked`] only."""

    tokens: msgspec.Raw
    token_logprobs: msgspec.Raw
    top_logprobs: msgspec.Raw = msgspec.Raw(b"null")


Top = dict[int, float | None]

_decode_tokens = msgspec.json.Decoder(list[int], strict=False).decode
_decode_values = msgspec.json.Decoder(list[float | None]).decode
_decode_tops = msgspec.json.Decoder(list[Top | None] | None).decode


class _Flat(NamedTuple):
    """A completion's logprobs and their tokens, all positions behind one another, and where each position ends;
    `None` when every position has one."""

    values: list[Any]
    ids: list[int]
    ends: list[int] | None

    def positions(self, column: list[Any]) -> Iterator[list[Any]]:
        if self.ends is None:
            return map(list, zip(column, strict=False))
        return map(column.__getitem__, map(slice, chain((0,), self.ends), self.ends))


def ranked(
    completions: Sequence[tuple[Sequence[int], CompletionLogprobs]],
) -> tuple[list[list[list[float | None]]], list[list[list[int]]]]:
    """Logprobs and their token ids, `[completion][token][k]`, by falling probability. The sampled token is always
    among them, first among equals.

    Args:
        completions (`Sequence[tuple[Sequence[int], CompletionLogprobs]]`): Token ids of each, and their logprobs.

    Raises:
        `ValueError`: when they differ in length, or name tokens otherwise than by `token_id:`.
    """
    flats = [at_a_stretch(_flat, token_ids, logprobs) for token_ids, logprobs in completions]
    values = at_a_stretch(list, map(list, [flat.positions(flat.values) for flat in flats]))
    ids = at_a_stretch(list, map(list, [flat.positions(flat.ids) for flat in flats]))
    return values, ids


def _flat(token_ids: Sequence[int], logprobs: CompletionLogprobs) -> _Flat:
    tokens = _decode_tokens(_bare(logprobs.tokens, len(token_ids)))
    values = _decode_values(logprobs.token_logprobs)
    tops = _tops(logprobs.top_logprobs) or [None] * len(tokens)
    if not len(token_ids) == len(tokens) == len(values) == len(tops):
        raise ValueError("a completion and its logprobs differ in length")
    if None in tops:
        return _position_by_position(tokens, values, tops)
    found: list[Top] = tops  # type: ignore[assignment]
    lengths = list(map(len, found))
    ids = list(chain.from_iterable(found))
    if max(lengths, default=1) == 1 and ids == tokens:  # only the sampled ones, as with logprobs=0
        return _Flat(list(chain.from_iterable(map(dict.values, found))), ids, None)
    # vLLM names the sampled token first, wherever it ranks, and then the most probable ones.
    if list(map(next, map(iter, found))) == tokens:
        with contextlib.suppress(OverflowError):  # an id beyond 64 bits
            flat = _sorted(found, lengths, ids)
            if flat is not None:
                return flat
    return _position_by_position(tokens, values, found)


def _tops(raw: msgspec.Raw) -> list[Top | None] | None:
    text = bytes(raw)
    bare = text.replace(_QUOTED_PREFIX, b'"')
    tops: list[Top | None] | None = _decode_tops(bare)
    _require_prefixes(text, bare, sum(map(len, filter(None, tops or ()))))
    return tops


def _bare(raw: msgspec.Raw, count: int) -> bytes:
    """JSON of tokens without what stands before their ids, so that msgspec reads the ids as numbers."""
    text = bytes(raw)
    bare = text.replace(_QUOTED_PREFIX, b'"')
    _require_prefixes(text, bare, count)
    return bare


def _require_prefixes(text: bytes, bare: bytes, count: int) -> None:
    if len(text) - len(bare) != _PREFIX_LENGTH * count:
        raise ValueError("tokens of logprobs are no token ids, or not as many as there are tokens")


def _sorted(tops: Sequence[Top], lengths: Sequence[int], ids: Sequence[int]) -> _Flat | None:
    """Every position sorted, all positions at once: a row each, filled up with what sorts last. `None` if there is a
    null among the logprobs."""
    count = len(ids)
    values = np.fromiter(chain.from_iterable(map(dict.values, tops)), np.float64, count)
    if np.isnan(values).any():  # JSON has no NaN: numpy reads a null as one
        return None
    filled = np.arange(max(lengths)) < np.array(lengths)[:, None]
    falling = np.full(filled.shape, np.inf)
    falling[filled] = -values
    row_ids = np.zeros(filled.shape, np.int64)
    row_ids[filled] = np.fromiter(ids, np.int64, count)
    order = np.argsort(falling, axis=1, kind="stable")
    return _Flat(
        (-np.take_along_axis(falling, order, axis=1)[filled]).tolist(),
        np.take_along_axis(row_ids, order, axis=1)[filled].tolist(),
        np.cumsum(lengths).tolist(),
    )


def _position_by_position(
    tokens: Sequence[int], values: Sequence[float | None], tops: Sequence[Mapping[int, float | None] | None]
) -> _Flat:
    """For answers of any other kind: without the most probable tokens, or with the sampled one in another place."""
    pairs = [rank(*position) for position in zip(tokens, values, tops, strict=True)]
    return _Flat(
        [value for position in pairs for _, value in position],
        [token for position in pairs for token, _ in position],
        list(accumulate(map(len, pairs))),
    )


def rank(token: int, logprob: float | None, top: Mapping[int, float | None] | None) -> list[tuple[int, float | None]]:
    """Tokens and logprobs of one position, by falling probability."""
    return sorted({token: logprob, **(top or {})}.items(), key=_descending)


def _descending(pair: tuple[int, float | None]) -> float:
    return math.inf if pair[1] is None else -pair[1]
