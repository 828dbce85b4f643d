"""Logprobs are decoded fast, and to the same lists as by TRL's own client, which goes position by position."""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_pool.dialects.base import Endpoint, Job
from trl_pool.dialects.logprobs import CompletionLogprobs, at_a_stretch, ranked
from trl_pool.dialects.vllm import VllmDialect

IDS = st.one_of(st.integers(0, 20), st.integers(0, 2**31), st.sampled_from([-1, 2**63, 2**70]))
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, -0.5, -1.0, -9999.0]),  # ties, and vLLM's -inf
    st.floats(-50, 1, allow_nan=False, width=32),
)
NULLS = st.one_of(VALUES, st.none())


@st.composite
def completions(draw: st.DrawFn, values: st.SearchStrategy[Any] = NULLS) -> dict[str, Any]:
    """A completion of any kind: as vLLM writes it, or with anything missing or in another place."""
    kind = draw(st.sampled_from(["sampled only", "vLLM's", "empty", "anything"]))
    tokens = draw(st.lists(IDS, max_size=6))
    tops: list[dict[int, Any] | None] = []
    for token in tokens:
        others = {other: draw(values) for other in draw(st.lists(IDS, max_size=4, unique=True))}
        if kind == "sampled only":
            tops.append({token: draw(values)})
        elif kind == "vLLM's":  # the sampled one first
            tops.append({token: draw(values), **others})
        elif kind == "empty":
            tops.append(draw(st.sampled_from([None, {}])))
        else:
            tops.append(draw(st.sampled_from([None, {}, others, {token: draw(values)}, {**others, token: -1.0}])))
    logprobs: dict[str, Any] = {
        "text_offset": [0 for _ in tokens],
        "token_logprobs": [draw(values) for _ in tokens],
        "tokens": [f"token_id:{token}" for token in tokens],
        "top_logprobs": [top and {f"token_id:{token}": value for token, value in top.items()} for top in tops],
    }
    if kind in ("empty", "anything") and draw(st.booleans()):
        missing: Any = draw(st.sampled_from([None, "left out"]))
        logprobs["top_logprobs"] = missing
        if missing:
            del logprobs["top_logprobs"]
    # The tokens of the logprobs may be others than those of the completion: the logprobs' own count.
    return {"token_ids": draw(st.sampled_from([tokens, [7 for _ in tokens]])), "logprobs": logprobs}


def as_trl(logprobs: dict[str, Any]) -> tuple[list[list[Any]], list[list[int]]]:
    """What TRL's client makes of a choice: written down from its behaviour, nulls last where it would raise."""
    values, ids = [], []
    tops = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True):
        items = sorted({token: value, **(top or {})}.items(), key=lambda item: (item[1] is None, -(item[1] or 0.0)))
        ids.append([int(name.removeprefix("token_id:")) for name, _ in items])
        values.append([value for _, value in items])
    return values, ids


def read(completion: dict[str, Any], separators: tuple[str, str] = (",", ":")) -> tuple[list[int], CompletionLogprobs]:
    text = json.dumps(completion["logprobs"], separators=separators)
    return completion["token_ids"], msgspec.json.decode(text, type=CompletionLogprobs)


def exact(value: Any) -> str:
    """Tells -0.0 from 0.0, and an int from a float or from anything that only looks like one."""
    return repr(value)


@given(found=st.lists(completions(), max_size=4), separators=st.sampled_from([(",", ":"), (", ", ": ")]))
def test_logprobs_of_any_answer_are_those_of_trls_client(
    found: list[dict[str, Any]], separators: tuple[str, str]
) -> None:
    values, ids = ranked([read(completion, separators) for completion in found])
    expected = [as_trl(completion["logprobs"]) for completion in found]
    assert exact(values) == exact([value for value, _ in expected])
    assert exact(ids) == exact([token for _, token in expected])


def test_a_null_among_the_most_probable_stays_a_null() -> None:
    completion = whole()
    completion["logprobs"]["top_logprobs"][1] = {"token_id:6": None, "token_id:9": -3.0}
    assert ranked([read(completion)]) == ([[[-0.5, -1.0], [-3.0, None]]], [[[8, 5], [9, 6]]])


@given(found=completions(VALUES).filter(lambda completion: completion["token_ids"]))
def test_the_whole_answer_of_a_server_is_decoded_to_the_lists_of_trls_client(found: dict[str, Any]) -> None:
    fields = {"n": 1, "logprobs": 0, "generation_kwargs": {}}
    job = Job(Endpoint.GENERATE, [[3, 4]], fields, 1)
    body = {"choices": [{"index": 0, "prompt_token_ids": [3, 4], "finish_reason": "length", **found}]}
    dialect = VllmDialect()
    merged = dialect.merge(job, dialect.decode(job, [0], json.dumps(body).encode()))
    values, ids = as_trl(found["logprobs"])
    assert exact(merged) == exact(
        {
            "prompt_ids": [[3, 4]],
            "completion_ids": [found["token_ids"]],
            "logprobs": [values],
            "logprob_token_ids": [ids],
        }
    )


def whole() -> dict[str, Any]:
    return {
        "token_ids": [5, 6],
        "logprobs": {
            "tokens": ["token_id:5", "token_id:6"],
            "token_logprobs": [-1.0, -2.0],
            "top_logprobs": [{"token_id:5": -1.0, "token_id:8": -0.5}, {"token_id:6": -2.0}],
        },
    }


@pytest.mark.parametrize("field", ["tokens", "token_logprobs", "top_logprobs"])
@pytest.mark.parametrize("change", ["one too few", "one too many", "no list", "of another kind"])
def test_logprobs_that_do_not_belong_together_are_refused(field: str, change: str) -> None:
    completion = whole()
    assert ranked([read(completion)]) == ([[[-0.5, -1.0], [-2.0]]], [[[8, 5], [6]]])
    items = completion["logprobs"][field]
    completion["logprobs"][field] = {
        "one too few": items[:-1],
        "one too many": [*items, items[0]],
        "no list": "text",
        "of another kind": [[], []],
    }[change]
    with pytest.raises(ValueError):  # noqa: PT011 - msgspec's words or ours
        ranked([read(completion)])


@pytest.mark.parametrize("name", ["five", "5", "token_id:", "token_id:x", "token_id:1.5", "token:5"])
def test_tokens_that_are_no_token_ids_are_refused(name: str) -> None:
    """A server that was not asked for token ids, or does not know the parameter, answers with text."""
    for damage in ("tokens", "top_logprobs"):
        completion = whole()
        if damage == "tokens":
            completion["logprobs"]["tokens"][1] = name
        else:
            completion["logprobs"]["top_logprobs"][1] = {name: -2.0}
        with pytest.raises(ValueError):  # noqa: PT011
            ranked([read(completion)])


def test_text_that_reads_like_a_token_id_changes_nothing() -> None:
    """A completion's text is the model's to choose; only the logprobs' own bytes are rewritten."""
    text = 'say "token_id:5": 1 and {"token_id:6":2}'
    found = {"index": 0, "text": text, "prompt_token_ids": [1], "finish_reason": "stop", **whole()}
    found["stop_reason"] = '"token_id:'
    job = Job(Endpoint.GENERATE, [[1]], {"n": 1, "generation_kwargs": {}}, 1)
    [answer] = VllmDialect().decode(job, [0], json.dumps({"choices": [found]}).encode())
    assert answer.logprob_token_ids == [[[8, 5], [6]]]


# The collector


def test_large_lists_are_made_with_no_collection_in_the_middle() -> None:
    text = b"[" + b",".join([b"[1]"] * 50_000) + b"]"
    decode = msgspec.json.Decoder(list[list[int]]).decode
    collections: list[str] = []

    def watch(phase: str, _: dict[str, int]) -> None:
        collections.append(phase)

    gc.collect()
    gc.callbacks.append(watch)
    try:
        found = at_a_stretch(decode, text)
        at_once = len(collections)
        again = decode(text)
        plainly = len(collections)
    finally:
        gc.callbacks.remove(watch)
    assert found == again
    assert at_once == 0
    assert plainly > 0 or sys.version_info >= (3, 12)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool) -> None:
    """After an error as well."""
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        assert at_a_stretch(int, "7") == 7
        assert gc.isenabled() is enabled
        with pytest.raises(ValueError, match="seven"):
            at_a_stretch(int, "seven")
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()
