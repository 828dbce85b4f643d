"""One unit's answer, the same whatever the wire looked like, and how answers become the call's result."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple


class GenerateAnswer(NamedTuple):
    """One prompt's answer; the lists have `n` items, one per completion."""

    prompt_ids: Any
    completion_ids: list[Any]
    logprobs: list[Any] | None
    logprob_token_ids: list[Any] | None


class ScoreAnswer(NamedTuple):
    """One sequence's answer. From the binary format its parts are arrays of shape `(completion length, k)`."""

    logprobs: Any
    logprob_token_ids: Any
    actual_logprobs: Any = None
    actual_token_ids: Any = None


def merge_generated(answers: Sequence[GenerateAnswer]) -> dict[str, Any]:
    """Generated answers as TRL's client returns them: completions prompt-major, one flat list."""
    # One server answers null for all prompts or for none.
    with_logprobs = all(answer.logprobs is not None for answer in answers)
    flat = chain.from_iterable
    return {
        "prompt_ids": [answer.prompt_ids for answer in answers],
        "completion_ids": list(flat(answer.completion_ids for answer in answers)),
        "logprobs": list(flat(a.logprobs or () for a in answers)) if with_logprobs else None,
        "logprob_token_ids": list(flat(a.logprob_token_ids or () for a in answers)) if with_logprobs else None,
    }


def slices(items: Sequence[Any] | None, n: int, count: int = 0) -> list[Any]:
    """Every n items as a list of their own; `count` times `None` where there are none at all."""
    if items is None:
        return [None] * count
    return [list(items[start : start + n]) for start in range(0, len(items), n)]


def expect(what: str, found: int, expected: int) -> None:
    """Raises `ValueError` unless an answer has as many entries as were asked for."""
    if found != expected:
        raise ValueError(f"{found} entries in {what} where {expected} were asked for")
