"""Which sampling parameters the simulated server refuses, and what it makes of the others."""

from __future__ import annotations

import math

import pytest

from trl_pool.sim.sampling import InvalidSampling, Sampling


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 0},
        {"n": "2"},
        {"n": 2.0},
        {"n": 20_000},
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"min_tokens": 17},
        {"temperature": -1.0},
        {"temperature": 2.1},
        {"temperature": math.nan},
        {"temperature": None},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"top_k": 1.5},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"presence_penalty": 3},
        {"frequency_penalty": -3},
        {"logprobs": -2},
        {"prompt_logprobs": -2},
        {"n": 2, "temperature": 0.0},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop_token_ids": ["a"]},
        {"bad_words": [""]},
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a", "json": {}}},
        {"structured_outputs": {"rexeg": "a"}},
        {"sede": 1},
        {"guided_decoding": None},
    ],
)
def test_parameters_that_vllm_refuses_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidSampling):
        Sampling.checked(fields)


def test_parameters_become_what_vllm_makes_of_them() -> None:
    assert Sampling.checked({"temperature": 0.001}).temperature == 0.01
    assert Sampling.checked({"top_k": -1}).top_k == 0
    assert Sampling.checked({"seed": -1}).seed == Sampling.checked({"seed": None}).seed == 0
    assert Sampling.checked({"max_tokens": None}).max_tokens is None
    greedy = Sampling.checked({"temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.5})
    assert greedy.greedy
    assert greedy == Sampling(temperature=0.0, logprobs=None)
    lenient = {"stop": "a", "stop_token_ids": [5], "structured_outputs": {"regex": "a"}, "logit_bias": {"5": 1}}
    assert Sampling.checked(lenient).stop_token_ids == {5}


def test_a_regex_that_is_none_passes_here_and_kills_the_worker() -> None:
    assert Sampling.checked({"structured_outputs": {"regex": "("}}).poison
    assert not Sampling.checked({"structured_outputs": {"regex": ""}}).poison
    assert not Sampling.checked({}).poison
