"""Calls written for TRL's `VLLMClient` fit the pool, whatever version they were written for.

The table was read from TRL's sources; `tests/real_engine` compares behaviour.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from trl_pool import VLLMClientPool
from trl_pool.integrations.trainer_client import TrainerClient

Signature = dict[str, Any]

REQUIRED = inspect.Parameter.empty

SAMPLING: Signature = {
    "n": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "max_tokens": 16,
    "logprobs": 0,
    "structured_outputs_regex": None,
    "generation_kwargs": None,
}
CHAT: Signature = {
    "messages": REQUIRED,
    **SAMPLING,
    "chat_template_kwargs": None,
    "tools": None,
    "chat_template": None,
}

TRL_1_0: dict[str, Signature] = {
    "__init__": {
        "base_url": None,
        "host": "0.0.0.0",
        "server_port": 8000,
        "group_port": 51216,
        "connection_timeout": 0.0,
    },
    "check_server": {"total_timeout": 0.0, "retry_interval": 2.0},
    "generate": {"prompts": REQUIRED, "images": None, **SAMPLING},
    "chat": CHAT,
    "init_communicator": {"device": 0},
    "update_named_param": {"name": REQUIRED, "weights": REQUIRED},
    "update_model_params": {"model": REQUIRED},
    "reset_prefix_cache": {},
    "close_communicator": {},
}
TRL_1_10: dict[str, Signature] = {
    **TRL_1_0,
    "get_sequence_logprobs": {
        "sequences": REQUIRED,
        "prompt_lengths": REQUIRED,
        "top_logprobs": 100,
        "temperature": 1.0,
        "use_binary": True,
        "chunk_size": 0,
        "max_concurrent_requests": 4,
    },
}
TRL_1_11: dict[str, Signature] = {
    **TRL_1_10,
    "generate": {"prompts": REQUIRED, "features": None, **SAMPLING},
    "chat": {**CHAT, "max_concurrent_requests": 64},
    "get_sequence_logprobs": {
        "sequences": REQUIRED,
        "prompt_lengths": REQUIRED,
        "top_logprobs": 100,
        "temperature": 1.0,
        "chunk_size": 0,
        "max_concurrent_requests": 4,
    },
    "get_world_size": {},
    "image_features": {"images": REQUIRED, "max_concurrent_requests": 64},
    "weight_update": {},
    "update_named_params": {"metadata": REQUIRED, "named_params": REQUIRED},
}
TRL_1_16: dict[str, Signature] = {**TRL_1_11, "get_server_info": {}}

VERSIONS = {"1.0": TRL_1_0, "1.10": TRL_1_10, "1.11": TRL_1_11, "1.16": TRL_1_16}

EVERY_METHOD = [
    pytest.param(method, signature, id=f"{version} {method}")
    for version, methods in VERSIONS.items()
    for method, signature in methods.items()
]

# The second argument of `generate` was renamed; what is in it tells the pool which one is meant.
RENAMED = {"features": "images"}

# How many leading parameters mean the same by position in every version. Behind them 1.11 dropped one.
POSITIONAL = {"get_sequence_logprobs": 4}

CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    # The documentation of the class.
    ("generate", (["Hello, AI!", "Tell me a joke"],), {}),
    ("generate", (["Hello, AI!", "Tell me a joke"],), {"n": 4, "max_tokens": 32}),
    ("update_model_params", ("model",), {}),
    ("init_communicator", (), {"device": "cuda"}),
    # GRPO and what is built like it.
    ("check_server", (240.0,), {}),
    ("update_named_param", ("lm_head.weight", "tensor"), {}),
    ("update_named_params", ([("lm_head.weight", "bfloat16", [2, 2])], iter([])), {}),
    ("image_features", ([["image"], None],), {}),
    ("generate", (), {"prompts": [[1, 2]], "features": None, **SAMPLING}),
    ("generate", (), {"prompts": [[1, 2]], "images": None, **SAMPLING}),
    # Online DPO.
    ("chat", (), {"messages": [[]], "n": 2, "top_k": -1, "generation_kwargs": None}),
    # The distillations.
    (
        "get_sequence_logprobs",
        (),
        {"sequences": [[1, 2]], "prompt_lengths": [1], "top_logprobs": 1, "temperature": 1.0},
    ),
    # TRL 1.0's OpenEnv helpers.
    ("chat", (), {"messages": [[]], "chat_template_kwargs": {}, "tools": None, "chat_template": None}),
]


def parameters_of(method: str) -> dict[str, inspect.Parameter]:
    function: Callable[..., Any] = getattr(VLLMClientPool, method)
    return dict(list(inspect.signature(function).parameters.items())[1:])


@pytest.mark.parametrize(("method", "theirs"), EVERY_METHOD)
def test_every_parameter_is_taken_by_name_and_has_the_same_default(method: str, theirs: Signature) -> None:
    ours = parameters_of(method)
    inspect.signature(getattr(VLLMClientPool, method)).bind(None, **dict.fromkeys(theirs, "given"))
    assert {name: ours[name].default for name in theirs} == theirs


@pytest.mark.parametrize(("method", "theirs"), EVERY_METHOD)
def test_every_parameter_is_optional_that_was_optional(method: str, theirs: Signature) -> None:
    required = {name: "given" for name, default in theirs.items() if default is REQUIRED}
    inspect.signature(getattr(VLLMClientPool, method)).bind(None, **required)


@pytest.mark.parametrize(("method", "theirs"), EVERY_METHOD)
def test_arguments_given_by_position_arrive_where_they_did(method: str, theirs: Signature) -> None:
    names = list(theirs)[: POSITIONAL.get(method)]
    bound = inspect.signature(getattr(VLLMClientPool, method)).bind(None, *names)
    arrived = dict(list(bound.arguments.items())[1:])
    assert arrived == {RENAMED.get(name, name): name for name in names}


@pytest.mark.parametrize(
    ("method", "arguments", "named"),
    CALLS,
    ids=[f"{i} {call[0]}" for i, call in enumerate(CALLS)],
)
def test_the_calls_that_trl_and_its_documentation_make_fit(
    method: str, arguments: tuple[Any, ...], named: dict[str, Any]
) -> None:
    inspect.signature(getattr(VLLMClientPool, method)).bind(None, *arguments, **named)


@pytest.mark.parametrize(
    "method", ["update_named_param", "update_named_params", "weight_update", "reset_prefix_cache"]
)
def test_what_the_patch_puts_before_the_pool_takes_the_same_arguments(method: str) -> None:
    ours = inspect.signature(getattr(TrainerClient, method)).parameters
    assert list(ours) == list(inspect.signature(getattr(VLLMClientPool, method)).parameters)


def test_the_patched_class_is_made_with_the_arguments_of_trls() -> None:
    ours = list(inspect.signature(TrainerClient.__init__).parameters.items())[1:]
    assert [name for name, _ in ours][:5] == list(TRL_1_16["__init__"])
    defaults = {name: parameter.default for name, parameter in ours[:5]}
    # None stands for 51216: whether it was given tells who the client is for.
    assert defaults == {**TRL_1_16["__init__"], "group_port": None}
