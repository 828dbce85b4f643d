"""Arguments are checked before anything is sent. The tables are what real servers did: TRL 1.10 with vLLM 0.27.1,
`--max_model_len 256`, a vocabulary of 512; what is marked `KILLS` was never answered, nor was anything after it."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_pool import PoolConfig
from trl_pool.dialects.base import Endpoint, Job
from trl_pool.dialects.trl_requests import ChatRequest, GenerateRequest, SequenceLogprobsRequest
from trl_pool.errors import InvalidRequestError
from trl_pool.validation import chat_job, generate_job, parse, score_job

CONFIG = PoolConfig(max_model_len=256, vocab_size=512)
NAN, INF = math.nan, math.inf
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
USER = [{"role": "user", "content": "a"}]


def generate(config: PoolConfig = CONFIG, **fields: Any) -> Job:
    return generate_job(parse(GenerateRequest, {"prompts": [[5, 6, 7]], **fields}), config)


def with_kwargs(config: PoolConfig = CONFIG, **kwargs: Any) -> Job:
    return generate(config, max_tokens=4, generation_kwargs=kwargs)


def chat(config: PoolConfig = CONFIG, **fields: Any) -> Job:
    return chat_job(parse(ChatRequest, {"messages": [USER], **fields}), config)


def score(config: PoolConfig = CONFIG, **fields: Any) -> Job:
    body = {"sequences": [[5, 6, 7, 8, 9]], "prompt_lengths": [2], "top_logprobs": 5, **fields}
    return score_job(parse(SequenceLogprobsRequest, body), config)


def fault_of(call: Any, *args: Any, **fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        call(*args, **fields)
    error: InvalidRequestError = caught.value
    for detail in error.details:
        assert set(detail) == {"type", "loc", "msg"}
        assert detail["loc"][0] == "body"
        assert isinstance(detail["msg"], str)
    json.dumps(error.details)
    return error


# Parsing


@pytest.mark.parametrize("as_json", [False, True])
def test_a_missing_and_a_mistyped_field_are_reported_as_fastapi_does(as_json: bool) -> None:
    values: Any = {"n": "two", "temperature": [1]}
    error = fault_of(parse, GenerateRequest, json.dumps(values).encode() if as_json else values)
    found = {(detail["type"], tuple(detail["loc"])): detail["msg"] for detail in error.details}
    assert set(found) == {
        ("int_parsing", ("body", "n")),
        ("float_type", ("body", "temperature")),
        ("missing", ("body", "prompts")),
    }
    assert found["missing", ("body", "prompts")] == "Field required"
    assert str(error).startswith("invalid arguments: ")
    assert "prompts: Field required" in str(error)


@pytest.mark.parametrize("body", [b"", b'{"prompts":', b"[]", b"null", b'"text"', b"\xff"])
def test_a_body_that_is_no_json_object_is_reported_as_a_whole(body: bytes) -> None:
    assert fault_of(parse, GenerateRequest, body).details[0]["loc"] == ["body"]


def test_places_deep_in_a_body_are_named() -> None:
    error = fault_of(parse, ChatRequest, {"messages": [USER, [3]]})
    assert error.details == [
        {"type": "dict_type", "loc": ["body", "messages", 1, 0], "msg": "Input should be a valid dictionary"}
    ]
    assert str(error) == "invalid arguments: messages.1.0: Input should be a valid dictionary"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompts": ["a", [1]]},
        {"prompts": [1, 2]},
        {"prompts": "text"},
        {"prompts": None},
        {"prompts": [[1.5]]},
        {"max_tokens": None},
        {"structured_outputs_regex": 5},
        {"generation_kwargs": None},
        {"generation_kwargs": []},
        {"images": ["base64"]},
    ],
)
def test_what_the_server_answers_with_422_never_reaches_it(fields: dict[str, Any]) -> None:
    fault_of(generate, **fields)


def test_the_coercions_are_the_servers() -> None:
    job = generate(prompts=[[5, "6", 7.0, True]], n="2", temperature="0.5", max_tokens=8.0)
    assert job.units == [[5, 6, 7, 1]]
    assert (job.n, job.fields["temperature"], job.fields["max_tokens"]) == (2, 0.5, 8)


# Sampling parameters

# name, refused values, accepted values up to the border
NUMBERS: list[tuple[str, list[Any], list[Any]]] = [
    ("n", [0, -1, 16385, 20000], [1, 2, 16384]),
    ("max_tokens", [0, -1, -(2**40)], [1, 10**12, 2**63 - 1]),
    ("temperature", [-1, -0.001, 2.1, NAN, INF, -INF], [0, 1e-4, 1, 2]),
    ("top_p", [0, -0.1, 1.0001, 1.5, NAN], [1e-6, 0.5, 1]),
    ("min_p", [-0.1, 1.0001, 2, NAN], [0, 0.5, 1]),
    ("top_k", [-2, -100], [-1, 0, 1, 100_000, 2**40]),
    ("repetition_penalty", [0, -1, NAN, INF], [1e-30, 1, 1e30]),
    ("logprobs", [-1, -2, 21], [None, 0, 1, 20]),
]
IN_KWARGS: list[tuple[str, list[Any], list[Any]]] = [
    *NUMBERS[:1],
    *NUMBERS[2:],
    ("max_tokens", [0, "4", 4.5, True], [None, 1, 4]),
    ("min_tokens", [-1, 5, 9, 2.0, None], [0, 3, 4]),
    ("presence_penalty", [-2.1, 3, "x", None, True, NAN], [-2, 0, 2]),
    ("frequency_penalty", [-3, 2.1, "x", None, NAN], [-2, 0.5, 2]),
    ("seed", ["a", 1.5, True, 2**64, -(2**63) - 1], [None, -5, -1, 0, -(2**63), 2**63 - 1]),
    ("prompt_logprobs", [-1, 21, "5", 2.5, True], [None, 0, 3, 20]),
    ("n", ["2", 2.0, True, None], [3]),
    ("temperature", ["hot", None, True], [1]),
    ("top_p", ["0.9", None], [1]),
    ("top_k", [5.0, "5", None], [5]),
    ("logprobs", ["5", 2.5], [5]),
]


def cases(table: list[tuple[str, list[Any], list[Any]]], column: int) -> list[tuple[str, Any]]:
    return [(row[0], value) for row in table for value in row[column]]  # type: ignore[attr-defined]


@pytest.mark.parametrize("call", [generate, chat])
@pytest.mark.parametrize(("name", "value"), cases(NUMBERS, 1))
def test_an_argument_that_vllm_refuses_is_refused_by_name(call: Any, name: str, value: Any) -> None:
    error = fault_of(call, **{name: value})
    assert [detail["loc"] for detail in error.details] == [["body", name]]
    assert str(error).startswith(f"{name}: ")


@pytest.mark.parametrize("call", [generate, chat])
@pytest.mark.parametrize(("name", "value"), cases(NUMBERS, 2))
def test_an_argument_up_to_the_border_is_accepted_and_sent_as_it_is(call: Any, name: str, value: Any) -> None:
    assert call(**{name: value}).fields[name] == value


@pytest.mark.parametrize(("name", "value"), cases(IN_KWARGS, 1))
def test_a_generation_kwarg_that_vllm_refuses_is_refused_by_name(name: str, value: Any) -> None:
    error = fault_of(with_kwargs, **{name: value})
    assert str(error).startswith(f"{name}: ")
    assert repr(value) in str(error) or name in ("min_tokens", "logprobs", "prompt_logprobs")


@pytest.mark.parametrize(("name", "value"), cases(IN_KWARGS, 2))
def test_a_generation_kwarg_up_to_the_border_is_accepted_and_sent_as_it_is(name: str, value: Any) -> None:
    job = with_kwargs(**{name: value})
    assert job.fields["generation_kwargs"] == {name: value}


def test_every_fault_is_named_at_once() -> None:
    error = fault_of(generate, n=0, temperature=3, generation_kwargs={"top_q": 1})
    assert [detail["loc"][1:] for detail in error.details] == [
        ["generation_kwargs", "top_q"],
        ["n"],
        ["temperature"],
    ]
    assert str(error).count("; ") == 3  # one of them is the hint's


@pytest.mark.parametrize(
    ("name", "hint"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("stop_tokens_ids", "stop_token_ids"), ("zzz", None)],
)
def test_an_unknown_generation_kwarg_is_refused_with_a_hint(name: str, hint: str | None) -> None:
    message = str(fault_of(with_kwargs, **{name: 1}))
    ending = f"; did you mean {hint!r}?" if hint else ""
    assert message == f"generation_kwargs.{name}: vLLM's SamplingParams has no such parameter{ending}"


@pytest.mark.parametrize("temperature", [0, 1e-6])
def test_several_completions_of_a_greedy_prompt_are_refused(temperature: float) -> None:
    for fields in (
        {"n": 4, "temperature": temperature},
        {"n": 4, "generation_kwargs": {"temperature": temperature}},
        {"temperature": temperature, "generation_kwargs": {"n": 2}},
    ):
        assert "greedy" in str(fault_of(generate, **fields))
    assert generate(n=1, temperature=temperature).n == 1
    assert generate(n=4, temperature=1e-4).n == 4
    assert generate(n=4, temperature=temperature, generation_kwargs={"n": 1}).n == 1


@pytest.mark.parametrize("call", [generate, chat])
def test_generation_kwargs_override_how_many_completions_there_are(call: Any) -> None:
    job = call(n=2, generation_kwargs={"n": 3})
    assert (job.n, job.fields["n"], job.fields["generation_kwargs"]) == (3, 2, {"n": 3})
    assert call(n=2).n == 2


def test_a_wrong_argument_that_generation_kwargs_put_right_is_right() -> None:
    assert generate(temperature=9, generation_kwargs={"temperature": 1.0}).fields["temperature"] == 9


def test_more_logprobs_than_the_servers_return_are_refused_unless_they_return_more() -> None:
    assert "max_logprobs=20" in str(fault_of(generate, logprobs=21))
    for config in (PoolConfig(max_logprobs=21), PoolConfig(max_logprobs=-1)):
        assert generate(config, logprobs=21).fields["logprobs"] == 21
        assert score(config, top_logprobs=21).fields["top_logprobs"] == 21
    assert "max_logprobs=0" in str(fault_of(generate, PoolConfig(max_logprobs=0), logprobs=1))


@pytest.mark.parametrize("field", ["structured_outputs_regex"])
@pytest.mark.parametrize("regex", ["[", "(", "a)", "*a", "a**", "[z-a]", "(?P<x"])
def test_a_broken_regular_expression_is_refused(field: str, regex: str) -> None:
    error = fault_of(generate, **{field: regex})
    assert str(error).startswith(f"{field}: is not a regular expression: ")
    fault_of(chat, **{field: regex})


@pytest.mark.parametrize("regex", [None, "", "a|b", r"\d{3}-\d{4}", r"\p{L}+", "(?<year>a)", r"\z", "(ab?c*){2,5}"])
def test_a_regular_expression_of_the_servers_dialect_is_accepted(regex: str | None) -> None:
    assert generate(structured_outputs_regex=regex).fields["structured_outputs_regex"] == regex


@pytest.mark.parametrize(
    "regex",
    [
        "[a-z&&[^b]]",
        "a{5000000000}",
        pytest.param("(" * 5000 + ")" * 5000, id="deep"),
    ],
)
def test_an_unusual_regular_expression_is_accepted_or_refused_and_breaks_nothing(regex: str) -> None:
    with contextlib.suppress(InvalidRequestError):
        generate(structured_outputs_regex=regex)


@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            name: st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3))
            for name in ("n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs")
        },
    )
)
def test_any_values_at_all_are_accepted_or_refused_and_break_nothing(fields: dict[str, Any]) -> None:
    try:
        job = with_kwargs(**fields)
    except InvalidRequestError:
        return
    assert job.n == fields.get("n", 1)
    assert 1 <= job.n <= 16384
    assert 0 <= fields.get("temperature", 1) <= 2


# Prompts


@pytest.mark.parametrize(
    ("prompts", "indices"),
    [
        ([[]], [0]),
        ([""], [0]),
        ([[5], [], [6], []], [1, 3]),
        (["a", ""], [1]),
    ],
)
def test_an_empty_prompt_is_refused_by_index_because_it_kills(prompts: list[Any], indices: list[int]) -> None:
    error = fault_of(generate, prompts=prompts)
    assert error.indices == indices
    assert f"empty at ind{'ex' if len(indices) == 1 else 'ices'} {', '.join(map(str, indices))};" in str(error)


@pytest.mark.parametrize(("length", "fits"), [(1, True), (255, True), (256, False), (257, False)])
def test_a_prompt_that_leaves_no_room_for_one_token_is_refused_because_it_kills(length: int, fits: bool) -> None:
    prompts = [[5], [5] * length]
    if fits:
        assert generate(prompts=prompts, max_tokens=10**6).units == prompts
    else:
        error = fault_of(generate, prompts=prompts)
        assert error.indices == [1]
        assert "max_model_len=256 at index 1" in str(error)
    assert generate(PoolConfig(), prompts=prompts).units == prompts


def test_text_is_not_measured() -> None:
    assert generate(prompts=["ba " * 1000]).units == ["ba " * 1000]


@pytest.mark.parametrize(("token", "fits"), [(0, True), (511, True), (512, False), (-1, False), (2**31, False)])
def test_a_token_id_outside_the_vocabulary_is_refused_because_it_kills(token: int, fits: bool) -> None:
    prompts = [[1], [2, token], [3]]
    if fits:
        assert generate(prompts=prompts).units == prompts
    else:
        error = fault_of(generate, prompts=prompts)
        assert (error.indices, "0-511 at index 1" in str(error)) == ([1], True)


def test_a_negative_token_id_is_refused_even_when_the_vocabulary_is_unknown() -> None:
    assert fault_of(generate, PoolConfig(), prompts=[[1], [-1]]).indices == [1]
    assert generate(PoolConfig(), prompts=[[10**6]]).units == [[10**6]]


def test_a_long_list_of_wrong_prompts_is_shown_in_part_and_kept_whole() -> None:
    error = fault_of(generate, prompts=[[]] * 100)
    assert error.indices == list(range(100))
    assert "indices 0, 1, 2" in str(error)
    assert "19, …;" in str(error)
    assert "20" not in str(error)


def test_no_prompts_are_no_fault() -> None:
    assert generate(prompts=[]).units == []
    assert chat(messages=[]).units == []
    assert score(sequences=[], prompt_lengths=[]).units == []


def test_images_belong_to_prompts_one_list_each() -> None:
    error = fault_of(generate, prompts=["a", "b"], images=[[PNG]])
    assert str(error) == "images: 1 image lists for 2 prompts; give one per prompt"
    assert generate(prompts=["a", "b"], images=[[PNG, PNG], None]).images == [[PNG, PNG], None]
    assert generate(prompts=["a", "b"], images=[]).images is None
    assert generate(prompts=["a", "b"]).images is None


# Conversations


@pytest.mark.parametrize(
    ("conversation", "fault"),
    [
        ([], "conversation 1 is empty"),
        ([{"content": "a"}], "conversation 1 has a message 0 without a role"),
        ([*USER, {"role": "user"}], "conversation 1 has a message 1 without content"),
        ([{}], "conversation 1 has a message 0 without a role"),
    ],
)
def test_a_message_without_role_or_content_is_refused_because_it_kills(conversation: Any, fault: str) -> None:
    error = fault_of(chat, messages=[USER, conversation])
    assert fault in str(error)
    assert error.indices == [1]


@pytest.mark.parametrize(
    "conversation",
    [
        [{"role": "wizard", "content": "ba"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": [{"type": "text", "text": "ba"}]}],
        [*USER, {"role": "assistant", "content": "b"}],
        [
            *USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "2"},
        ],
    ],
)
def test_a_conversation_that_the_server_takes_is_accepted(conversation: Any) -> None:
    assert chat(messages=[conversation]).units == [conversation]


def test_tools_and_template_arguments_are_sent_along() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    job = chat(tools=tools, chat_template_kwargs={"enable_thinking": False})
    assert (job.endpoint, job.images) == (Endpoint.CHAT, None)
    assert job.fields["tools"] == tools
    assert job.fields["chat_template_kwargs"] == {"enable_thinking": False}


# Scoring


@pytest.mark.parametrize(
    ("fields", "field", "indices"),
    [
        ({"temperature": 0}, "temperature", []),
        ({"temperature": -1}, "temperature", []),
        ({"temperature": NAN}, "temperature", []),
        ({"temperature": INF}, "temperature", []),
        ({"prompt_lengths": [2, 2]}, "prompt_lengths", []),
        ({"prompt_lengths": []}, "prompt_lengths", []),
        ({"prompt_lengths": [6]}, "prompt_lengths", [0]),
        ({"prompt_lengths": [-1]}, "prompt_lengths", [0]),
        ({"sequences": [[1, 2], [1, 2]], "prompt_lengths": [1, 3]}, "prompt_lengths", [1]),
        ({"response_format": "xml"}, "response_format", []),
        ({"top_logprobs": -1}, "top_logprobs", []),
        ({"top_logprobs": 21}, "top_logprobs", []),
        ({"sequences": [[]], "prompt_lengths": [0]}, "sequences", [0]),
        ({"sequences": [[1, 512]]}, "sequences", [0]),
        ({"sequences": [[1, -1]]}, "sequences", [0]),
        ({"sequences": [[5] * 9, [5] * 256], "prompt_lengths": [1, 1]}, "sequences", [1]),
    ],
)
def test_a_scoring_call_that_fails_or_kills_is_refused(fields: Any, field: str, indices: list[int]) -> None:
    error = fault_of(score, **fields)
    assert error.details[0]["loc"] == ["body", field]
    assert error.indices == indices


def test_the_stock_clients_default_of_a_hundred_logprobs_is_refused_with_the_way_out() -> None:
    error = fault_of(
        lambda: score_job(parse(SequenceLogprobsRequest, {"sequences": [[5]], "prompt_lengths": [0]}), CONFIG)
    )
    assert "100 is more than the servers return (max_logprobs=20); raise the pool's max_logprobs only if" in str(error)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_lengths": [0]},
        {"prompt_lengths": [5]},
        {"sequences": [[5]], "prompt_lengths": [0]},
        {"sequences": [[5] * 255]},
        {"top_logprobs": 0},
        {"top_logprobs": 20},
        {"response_format": "binary"},
        {"temperature": 2},
        {"temperature": 0.01},
    ],
)
def test_a_scoring_call_up_to_the_border_is_accepted(fields: Any) -> None:
    job = score(**fields)
    assert job.units == [
        (fields.get("sequences", [[5, 6, 7, 8, 9]])[0], fields.get("prompt_lengths", [2])[0]),
    ]
    assert set(job.fields) == {"top_logprobs", "temperature", "response_format"}
    assert job.n == 1


# What a job is


def test_a_generate_job_holds_everything_the_server_reads() -> None:
    job = generate(prompts=["a", "b"], n=2, top_k=0, structured_outputs_regex="a+", generation_kwargs={"seed": 1})
    assert (job.endpoint, job.units, job.n, job.raw, job.body) == (Endpoint.GENERATE, ["a", "b"], 2, False, None)
    assert job.fields == {
        "n": 2,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "max_tokens": 16,
        "logprobs": 0,
        "structured_outputs_regex": "a+",
        "generation_kwargs": {"seed": 1},
    }


def test_a_raw_job_keeps_the_body_it_came_in() -> None:
    body = b'{"prompts":["a"]}'
    job = generate_job(parse(GenerateRequest, body), CONFIG, raw=True, body=body)
    assert (job.raw, job.body) == (True, body)


# Poison

KILLS, FAILS = "kills", "is answered with a bare 500"
LOOK_AHEAD = "(?=a)b"

POISON: list[tuple[str, Any, dict[str, Any]]] = [
    (KILLS, generate, {"max_tokens": 2**70}),
    (KILLS, generate, {"structured_outputs_regex": LOOK_AHEAD}),
    (KILLS, chat, {"messages": [[{"role": "user", "content": 5}]]}),
    (KILLS, chat, {"tools": ["zzz"]}),
    (KILLS, chat, {"chat_template_kwargs": {"messages": 1}}),
    (KILLS, with_kwargs, {"allowed_token_ids": []}),
    (KILLS, with_kwargs, {"allowed_token_ids": [512]}),
    (KILLS, with_kwargs, {"allowed_token_ids": [-1]}),
    (KILLS, with_kwargs, {"logit_bias": {"7": 5.0}}),
    (KILLS, with_kwargs, {"bad_words": [3]}),
    (KILLS, with_kwargs, {"bad_words": [" "]}),
    (KILLS, with_kwargs, {"min_tokens": 2, "stop_token_ids": [100_000]}),
    (KILLS, with_kwargs, {"logprob_token_ids": [100_000], "logprobs": None}),
    (KILLS, with_kwargs, {"thinking_token_budget": 5}),
    (KILLS, with_kwargs, {"ignore_eos": 1}),
    (KILLS, with_kwargs, {"skip_special_tokens": "no"}),
    (KILLS, with_kwargs, {"extra_args": "x"}),
    (KILLS, with_kwargs, {"structured_outputs": "nonsense"}),
    (KILLS, with_kwargs, {"structured_outputs": {"regex": "["}}),
    (KILLS, with_kwargs, {"structured_outputs": {"regex": LOOK_AHEAD}}),
    (KILLS, with_kwargs, {"structured_outputs": {"regex": r"(a)\1"}}),
    (FAILS, with_kwargs, {"structured_outputs": {}}),
    (FAILS, with_kwargs, {"structured_outputs": {"foo": 1}}),
    (FAILS, with_kwargs, {"structured_outputs": {"regex": "a", "choice": ["a"]}}),
    (FAILS, with_kwargs, {"stop_token_ids": ["a"]}),
    (FAILS, with_kwargs, {"stop_token_ids": [3.0]}),
    (FAILS, with_kwargs, {"stop_token_ids": 3}),
    (FAILS, with_kwargs, {"bad_words": [""]}),
    (FAILS, with_kwargs, {"bad_words": "ba"}),
    (FAILS, with_kwargs, {"stop": ""}),
    (FAILS, with_kwargs, {"stop": [""]}),
    (FAILS, with_kwargs, {"stop": [1]}),
    (FAILS, with_kwargs, {"detokenize": False, "stop": ["a"]}),
    (FAILS, chat, {"messages": [[{"role": "user", "content": [{"text": "ba"}]}]]}),
    (FAILS, score, {"temperature": 2.1}),
    (KILLS, generate, {"prompts": ["\ud800"]}),
    (KILLS, chat, {"messages": [[{"role": "user", "content": "\ud800"}]]}),
    (KILLS, chat, {"messages": [[{"role": "user", "content": [{"type": "zzz", "zzz": 1}]}]]}),
    (KILLS, chat, {"messages": [[{"role": "assistant", "content": "x", "tool_calls": "zz"}]]}),
    (
        KILLS,
        chat,
        {"messages": [[{"role": "assistant", "content": "x", "tool_calls": [{"function": {"arguments": "{nope"}}]}]]},
    ),
    (KILLS, with_kwargs, {"logprob_token_ids": [1, 2], "logprobs": 0}),
    (KILLS, with_kwargs, {"structured_outputs": {"choice": []}}),
    (KILLS, with_kwargs, {"structured_outputs": {"json": "{nope"}}),
    (KILLS, with_kwargs, {"structured_outputs": {"json": ""}}),
    (KILLS, with_kwargs, {"structured_outputs": {"json_object": False}}),
    (FAILS, with_kwargs, {"stream_interval": 0}),
    (FAILS, generate, {"images": [["!!!"]]}),
]


def ids(rows: list[tuple[str, Any, dict[str, Any]]]) -> list[str]:
    return [f"{ascii(fields)[:90]}-{does}" for does, _, fields in rows]


@pytest.mark.parametrize(("does", "call", "fields"), POISON, ids=ids(POISON))
def test_poison_is_refused_by_name(does: str, call: Any, fields: dict[str, Any]) -> None:
    error = fault_of(call, **fields)
    assert error.details[0]["loc"][1] in {*fields, "structured_outputs"}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"stop": "a"},
        {"stop": ["a", "b"]},
        {"stop": None},
        {"detokenize": False},
        {"stop_token_ids": [3]},
        {"stop_token_ids": []},
        {"allowed_token_ids": [7, 511]},
        {"allowed_token_ids": None},
        {"logprob_token_ids": [1, 2], "logprobs": None},
        {"bad_words": ["ba"]},
        {"ignore_eos": True},
        {"skip_special_tokens": False},
        {"flat_logprobs": True},
        {"extra_args": {"a": 1}},
        {"output_kind": 1},
        {"stream_interval": 5},
        {"repetition_detection": {"max_pattern_size": 3, "min_count": 2}},
        {"structured_outputs": None},
        {"structured_outputs": {"choice": ["ba", "be"]}},
        {"structured_outputs": {"json": {"type": "object"}, "disable_any_whitespace": True}},
        {"structured_outputs": {"regex": r"[(?=]\(?\\1"}},
    ],
    ids=ascii,
)
def test_generation_kwargs_that_the_server_takes_are_accepted(kwargs: dict[str, Any]) -> None:
    assert with_kwargs(**kwargs).fields["generation_kwargs"] == kwargs


@pytest.mark.parametrize(
    "regex", ["(?=a)b", "(?!a)b", "a(?<=a)b", "a(?<!a)b", r"(a)\1", "(?P<x>a)(?P=x)", "(a)?(?(1)b|c)", r"\\(?=a)"]
)
def test_a_pattern_that_is_not_regular_is_refused_because_it_kills(regex: str) -> None:
    assert "look-around" in str(fault_of(generate, structured_outputs_regex=regex))


def test_a_look_ahead_between_escaped_and_bare_brackets_is_refused() -> None:
    fault_of(generate, structured_outputs_regex=r"\[(?=a)b]")


@pytest.mark.parametrize(
    ("call", "fields"),
    [
        (generate, {"max_tokens": 10**400}),
        (with_kwargs, {"seed": 10**400}),
        (with_kwargs, {"logprobs": 10**400}),
        (with_kwargs, {"repetition_penalty": 10**400}),
    ],
)
def test_an_integer_beyond_all_floats_is_refused(call: Any, fields: dict[str, Any]) -> None:
    fault_of(call, **fields)


def test_a_seed_that_the_server_takes_is_accepted() -> None:
    assert with_kwargs(seed=2**63).fields["generation_kwargs"] == {"seed": 2**63}
