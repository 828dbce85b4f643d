"""The `vllm` dialect: what goes out, and how answers come back into order."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_pool.dialects.base import Endpoint, Job
from trl_pool.dialects.vllm import VllmDialect

DIALECT = VllmDialect()

FIELDS: dict[str, Any] = {
    "n": 2,
    "repetition_penalty": 1.0,
    "temperature": 0.7,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "max_tokens": 16,
    "logprobs": 0,
    "structured_outputs_regex": None,
    "generation_kwargs": {},
}
CHAT_FIELDS = {**FIELDS, "chat_template_kwargs": {}, "tools": None, "chat_template": None}


def job(endpoint: Endpoint = Endpoint.GENERATE, units: Any = ([1, 2], [3]), n: int = 2, **more: Any) -> Job:
    fields = {**(CHAT_FIELDS if endpoint is Endpoint.CHAT else FIELDS), "n": n, **more.pop("fields", {})}
    return Job(endpoint, list(units), fields, n, model="tiny", **more)


def sent(of: Job, indices: list[int]) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(DIALECT.encode(of, indices))
    return body


def choice(index: int, prompt: list[int], tokens: list[int], logprobs: bool = True) -> dict[str, Any]:
    parsed = {
        "tokens": [f"token_id:{t}" for t in tokens],
        "token_logprobs": [-0.5 * t for t in tokens],
        "top_logprobs": [{f"token_id:{t}": -0.5 * t} for t in tokens],
        "text_offset": [0 for _ in tokens],
    }
    return {
        "index": index,
        "text": "x",
        "finish_reason": "length",
        "prompt_token_ids": prompt,
        "token_ids": tokens,
        "logprobs": parsed if logprobs else None,
    }


def completion(*choices: dict[str, Any]) -> bytes:
    return json.dumps({"id": "cmpl-1", "object": "text_completion", "choices": choices}).encode()


def test_servers_are_as_the_protocol_notes_say() -> None:
    assert (DIALECT.name, DIALECT.health_path, DIALECT.world_size_path) == ("vllm", "/health", "/get_world_size")
    assert not any((DIALECT.one_request_at_a_time, DIALECT.silent_while_busy, DIALECT.scoring_is_exclusive))
    assert DIALECT.survives_bad_requests


@pytest.mark.parametrize(
    ("of", "path", "most"),
    [
        (job(), "/v1/completions", None),
        (job(features=[None, {"mm_hashes": {}}]), "/inference/v1/generate", 1),
        (job(Endpoint.CHAT, [[{"role": "user", "content": "a"}]]), "/v1/chat/completions", 1),
        (job(Endpoint.SCORE, [([1, 2], 1)]), "/v1/completions", None),
        (job(Endpoint.RENDER, [[]]), "/v1/chat/completions/render", 1),
    ],
)
def test_every_call_has_its_path_and_its_most_units_per_request(of: Job, path: str, most: int | None) -> None:
    assert (DIALECT.path(of), DIALECT.units_per_request(of)) == (path, most)


def test_a_generate_request_names_the_model_and_asks_for_token_ids() -> None:
    body = sent(job(fields={"structured_outputs_regex": "a+", "generation_kwargs": {"seed": 3, "top_p": 0.5}}), [1])
    assert body == {
        "model": "tiny",
        "prompt": [[3]],
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "n": 2,
        "repetition_penalty": 1.0,
        "temperature": 0.7,
        "top_p": 0.5,
        "top_k": 0,
        "min_p": 0.0,
        "max_tokens": 16,
        "logprobs": 0,
        "structured_outputs": {"regex": "a+"},
        "seed": 3,
    }


def test_a_chat_request_carries_one_conversation_and_splits_logprobs_in_two() -> None:
    conversation = [{"role": "user", "content": "a"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    with_tools = {"logprobs": 3, "tools": tools, "chat_template": "{{x}}", "chat_template_kwargs": {"x": 1}}
    body = sent(job(Endpoint.CHAT, [conversation], fields=with_tools), [0])
    assert body["messages"] == conversation
    assert (body["logprobs"], body["top_logprobs"]) == (True, 3)
    assert (body["tools"], body["tool_choice"]) == (tools, "none")
    assert (body["chat_template"], body["chat_template_kwargs"]) == ("{{x}}", {"x": 1})
    plain = sent(job(Endpoint.CHAT, [conversation], fields={"logprobs": None, "tools": []}), [0])
    assert (plain["logprobs"], plain["top_logprobs"]) == (False, None)
    assert not {"tools", "tool_choice", "chat_template", "chat_template_kwargs"} & plain.keys()


def test_features_travel_one_prompt_a_request_and_all_its_completions_come_back() -> None:
    of = job(features=[{"a": 1}, None])
    body = sent(of, [0])
    assert (body["token_ids"], body["features"], body["model"]) == ([1, 2], {"a": 1}, "tiny")
    assert body["sampling_params"]["output_kind"] == 2
    assert body["request_id"] != sent(of, [0])["request_id"]
    entry = {"token": "token_id:7", "logprob": -0.25, "top_logprobs": []}
    choices = [{"index": i, "token_ids": [7 + i], "logprobs": {"content": [entry]}} for i in (1, 0)]
    [answer] = DIALECT.decode(of, [0], json.dumps({"choices": choices}).encode())
    assert answer == ([1, 2], [[7], [8]], [[[-0.25]], [[-0.25]]], [[[7]], [[7]]])


def test_a_scoring_request_asks_for_prompt_logprobs_and_one_token() -> None:
    of = job(Endpoint.SCORE, [([1, 2, 3], 1)], n=1, fields={"top_logprobs": 5})
    assert sent(of, [0]) == {
        "model": "tiny",
        "prompt": [[1, 2, 3]],
        "max_tokens": 1,
        "temperature": 0.7,
        "prompt_logprobs": 5,
    }


@given(order=st.permutations(range(4)))
def test_choices_are_taken_by_their_index_whatever_order_they_come_in(order: list[int]) -> None:
    choices = [choice(i, [[1, 2], [3]][i // 2], [10 + i]) for i in range(4)]
    answers = DIALECT.decode(job(), [0, 1], completion(*(choices[i] for i in order)))
    merged = DIALECT.merge(job(), answers)
    assert merged == {
        "prompt_ids": [[1, 2], [3]],
        "completion_ids": [[10], [11], [12], [13]],
        "logprobs": [[[-5.0]], [[-5.5]], [[-6.0]], [[-6.5]]],
        "logprob_token_ids": [[[10]], [[11]], [[12]], [[13]]],
    }


def test_logprobs_are_sorted_and_the_sampled_token_is_among_them_wherever_it_ranks() -> None:
    one = choice(0, [1, 2], [9])
    one["logprobs"]["top_logprobs"] = [{"token_id:4": -0.1, "token_id:5": -3.0}]
    one["logprobs"]["token_logprobs"] = [-7.0]
    [answer] = DIALECT.decode(job(n=1, units=[[1, 2]]), [0], completion(one))
    assert answer.logprobs == [[[-0.1, -3.0, -7.0]]]
    assert answer.logprob_token_ids == [[[4, 5, 9]]]


def test_without_logprobs_there_are_none() -> None:
    of = job(n=1, units=["text"])
    answers = DIALECT.decode(of, [0], completion(choice(0, [5], [6], logprobs=False)))
    assert DIALECT.merge(of, answers) == {
        "prompt_ids": [[5]],
        "completion_ids": [[6]],
        "logprobs": None,
        "logprob_token_ids": None,
    }


def test_a_chat_answer_has_its_prompt_beside_the_choices() -> None:
    of = job(Endpoint.CHAT, [[{"role": "user", "content": "a"}]], n=1)
    top = [{"token": "token_id:8", "logprob": -0.1}, {"token": "token_id:9", "logprob": -0.2}]
    content = [{"token": "token_id:9", "logprob": -0.2, "top_logprobs": top}]
    body = {"prompt_token_ids": [1], "choices": [{"index": 0, "token_ids": [9], "logprobs": {"content": content}}]}
    assert DIALECT.decode(of, [0], json.dumps(body).encode()) == [([1], [[9]], [[[-0.1, -0.2]]], [[[8, 9]]])]


def test_scores_are_sorted_by_rank_padded_and_beside_the_actual_tokens() -> None:
    of = job(Endpoint.SCORE, [([1, 2, 3], 1)], n=1, fields={"top_logprobs": 3})
    positions = [
        None,
        {"2": {"logprob": -4.0, "rank": 9}, "7": {"logprob": -0.1, "rank": 1}, "8": {"logprob": -0.9, "rank": 2}},
        {"6": {"logprob": -0.3, "rank": 1}},
    ]
    body = json.dumps({"choices": [{"index": 0, "prompt_logprobs": positions}]}).encode()
    answers = DIALECT.decode(of, [0], body)
    assert DIALECT.merge(of, answers) == {
        "logprobs": [[[-0.1, -0.9, -4.0], [-0.3, -math.inf, -math.inf]]],
        "logprob_token_ids": [[[7, 8, 2], [6, 0, 0]]],
        "actual_logprobs": [[[-4.0], [-math.inf]]],
        "actual_token_ids": [[[2], [3]]],
    }


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"choices": "no"}',
        completion(),
        completion(choice(0, [1, 2], [1])),
        completion(*(choice(i, [9, 9], [1]) for i in range(4))),
        completion(*({**choice(i, [1, 2], [1]), "prompt_token_ids": None} for i in range(4))),
    ],
    ids=["empty", "a list", "no list", "none", "too few", "another request's", "no token ids"],
)
def test_what_is_not_the_answer_to_this_request_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        DIALECT.decode(job(), [0, 1], body)


def test_scores_of_another_sequence_are_refused_by_their_length() -> None:
    of = job(Endpoint.SCORE, [([1, 2, 3], 1)], n=1, fields={"top_logprobs": 3})
    with pytest.raises(ValueError, match="sequence 0"):
        DIALECT.decode(of, [0], json.dumps({"choices": [{"index": 0, "prompt_logprobs": [None]}]}).encode())


def test_a_passed_on_body_is_split_and_put_together_as_one_server_would_have_answered_it() -> None:
    of = Job(Endpoint.GENERATE, ["a", "b"], {"model": "m", "n": 2, "seed": 1}, 2, raw=True)
    assert sent(of, [1]) == {"model": "m", "n": 2, "seed": 1, "prompt": ["b"]}

    def body(name: str, tokens: int) -> bytes:
        choices = [{"index": 1, "text": f"{name}1"}, {"index": 0, "text": f"{name}0"}]
        usage = {"prompt_tokens": tokens, "completion_tokens": 2, "total_tokens": tokens + 2, "details": None}
        return json.dumps({"id": name, "object": "text_completion", "choices": choices, "usage": usage}).encode()

    answers = [*DIALECT.decode(of, [0], body("a", 3)), *DIALECT.decode(of, [1], body("b", 4))]
    assert DIALECT.merge(of, answers) == {
        "id": "a",
        "object": "text_completion",
        "choices": [{"index": i, "text": text} for i, text in enumerate(["a0", "a1", "b0", "b1"])],
        "usage": {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11, "details": None},
    }


def test_a_whole_body_is_passed_on_as_it_came() -> None:
    of = Job(Endpoint.GENERATE, ["a"], {}, 1, raw=True, body=b'{"prompt": ["a"] }')
    assert DIALECT.encode(of, [0]) == b'{"prompt": ["a"] }'


def test_an_aborted_request_is_no_answer() -> None:
    """It is answered 200, with the tokens that it had."""
    whole, aborted = choice(0, [3], [5, 6]), {**choice(1, [3], [5]), "finish_reason": "abort"}
    with pytest.raises(ValueError, match="abort"):
        DIALECT.decode(job(units=[[3]]), [0], completion(whole, aborted))
    chat = {"choices": [{"index": 0, "token_ids": [], "finish_reason": "abort"}], "prompt_token_ids": [1]}
    with pytest.raises(ValueError, match="abort"):
        DIALECT.decode(job(Endpoint.CHAT, [[]], n=1), [0], json.dumps(chat).encode())
