"""Pool and gateway give what TRL's own client gets from one real server; TRL's own client works through it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import requests
from trl.generation.vllm_client import VLLMClient

from trl_pool import PoolConfig, VLLMClientPool

from ..comparing import assert_same_rollouts, assert_same_scores
from ..gateway import running_gateway
from ..servers import MAX_MODEL_LEN, TrlServer
from ..tiny_model import VOCAB_SIZE

TEXTS = [f"bada kofi {i} mera tulo, gisa {i * 7}" for i in range(24)]
IDS = [[(7 * i + 3 * j) % 480 + 10 for j in range(5 + i % 11)] for i in range(24)]
CHATS = [[{"role": "user", "content": f"ruke {i} lamo?"}] for i in range(10)]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24, "logprobs": 5}
SCORING: dict[str, Any] = {"sequences": IDS, "prompt_lengths": [2] * len(IDS), "top_logprobs": 8}


@pytest.fixture(scope="module")
def stock(two_servers: tuple[TrlServer, TrlServer]) -> VLLMClient:
    """TRL's own client on the first server alone."""
    return VLLMClient(base_url=two_servers[0].url, connection_timeout=10)


@pytest.fixture
def pool(two_servers: tuple[TrlServer, TrlServer]) -> Iterator[VLLMClientPool]:
    """The pool on both."""
    config = PoolConfig(max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, request_timeout=120, total_timeout=240)
    with VLLMClientPool([server.url for server in two_servers], connection_timeout=30, config=config) as client:
        yield client


@pytest.fixture(scope="module")
def gateway(two_servers: tuple[TrlServer, TrlServer]) -> Iterator[str]:
    """`python -m trl_pool.server` in front of both."""
    with running_gateway([server.url for server in two_servers]) as url:
        yield url


def both_took_part(pool: VLLMClientPool) -> bool:
    return all(backend.prompts > 0 for backend in pool.statistics().backends)


@pytest.mark.parametrize("prompts", [TEXTS, IDS], ids=["strings", "token ids"])
def test_pool_generates_what_one_server_does(pool: VLLMClientPool, stock: VLLMClient, prompts: list[Any]) -> None:
    figures = assert_same_rollouts(pool.generate(prompts, **GREEDY), stock.generate(prompts, **GREEDY), top=5)
    print(figures)
    assert both_took_part(pool)


def test_pool_chats_as_one_server_does(pool: VLLMClientPool, stock: VLLMClient) -> None:
    figures = assert_same_rollouts(pool.chat(CHATS, **GREEDY), stock.chat(CHATS, **GREEDY), top=5)
    print(figures)
    assert both_took_part(pool)


@pytest.mark.parametrize("use_binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("chunk_size", [0, 5])
def test_pool_scores_as_one_server_does(
    pool: VLLMClientPool, stock: VLLMClient, use_binary: bool, chunk_size: int
) -> None:
    arguments = {**SCORING, "use_binary": use_binary, "chunk_size": chunk_size}
    worst = assert_same_scores(pool.get_sequence_logprobs(**arguments), stock.get_sequence_logprobs(**arguments))
    print(f"worst difference {worst:.4f}")
    assert both_took_part(pool)


@pytest.mark.parametrize("logprobs", [0, 3, None])
def test_sampled_answers_have_the_shapes_one_server_gives(
    pool: VLLMClientPool, stock: VLLMClient, logprobs: int | None
) -> None:
    arguments: dict[str, Any] = {"n": 4, "max_tokens": 8, "logprobs": logprobs}
    found, expected = pool.generate(IDS, **arguments), stock.generate(IDS, **arguments)
    assert found["prompt_ids"] == expected["prompt_ids"] == IDS
    assert len(found["completion_ids"]) == len(expected["completion_ids"]) == 4 * len(IDS)
    if logprobs is None:
        assert found["logprobs"] is found["logprob_token_ids"] is expected["logprobs"] is None
        return
    for column in ("logprobs", "logprob_token_ids"):
        assert len(found[column]) == 4 * len(IDS)
        for ids, values in zip(found["completion_ids"], found[column], strict=True):
            assert len(ids) == len(values)
            assert {len(entry) for entry in values} <= {max(1, logprobs), logprobs + 1}


def test_empty_batch_and_world_size_are_what_one_server_says(pool: VLLMClientPool, stock: VLLMClient) -> None:
    assert pool.generate([]) == stock.generate([])
    assert pool.get_world_size() == 1
    pool.reset_prefix_cache()


def test_stock_client_works_through_the_gateway(gateway: str, stock: VLLMClient) -> None:
    through = VLLMClient(base_url=gateway, connection_timeout=30)
    for prompts in (TEXTS, IDS):
        print(assert_same_rollouts(through.generate(prompts, **GREEDY), stock.generate(prompts, **GREEDY), top=5))
    print(assert_same_rollouts(through.chat(CHATS, **GREEDY), stock.chat(CHATS, **GREEDY), top=5))
    for use_binary in (True, False):
        arguments = {**SCORING, "use_binary": use_binary}
        through_gateway = through.get_sequence_logprobs(**arguments)
        assert_same_scores(through_gateway, stock.get_sequence_logprobs(**arguments))
    assert len(through.generate(IDS, n=4, max_tokens=4)["completion_ids"]) == 4 * len(IDS)
    through.reset_prefix_cache()
    assert requests.get(f"{gateway}/get_world_size/", timeout=30).json() == {"world_size": 1}


def test_gateway_spreads_over_both_and_says_so(
    gateway: str, stock: VLLMClient, two_servers: tuple[TrlServer, TrlServer]
) -> None:
    body = {"prompts": IDS, "top_k": 0, **GREEDY}
    response = httpx.post(f"{gateway}/generate", json=body, timeout=120, trust_env=False)
    names = {server.url.removeprefix("http://") for server in two_servers}
    assert set(response.headers["x-backend"].split(", ")) == names
    assert_same_rollouts(response.json(), stock.generate(IDS, **GREEDY), top=5)


BAD_CALLS: dict[str, dict[str, Any]] = {
    # What a real server answers with a bare 500 …
    "n 0": {"n": 0},
    "greedy n 4": {"n": 4, "temperature": 0.0},
    "negative temperature": {"temperature": -1.0},
    "max_tokens 0": {"max_tokens": 0},
    "top_p 0": {"top_p": 0.0},
    "unknown parameter": {"generation_kwargs": {"temprature": 1.0}},
    # … and what it dies of.
    "too many logprobs": {"logprobs": 21},
    "empty prompt": {"prompts": ["bada", ""]},
    "empty token ids": {"prompts": [[5], []]},
    "token beyond the vocabulary": {"prompts": [[5, VOCAB_SIZE]]},
    "no room for a token": {"prompts": [[5] * MAX_MODEL_LEN]},
    "broken regex": {"structured_outputs_regex": "(a"},
}


@pytest.mark.parametrize("arguments", BAD_CALLS.values(), ids=BAD_CALLS)
def test_what_a_server_would_fail_or_die_of_is_refused_unsent(pool: VLLMClientPool, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        pool.generate(**{"prompts": ["bada"], **arguments})
    assert all(backend.requests == 0 for backend in pool.statistics().backends)


def test_default_number_of_scores_is_refused_before_it_kills_a_server(pool: VLLMClientPool) -> None:
    with pytest.raises(ValueError, match="top_logprobs"):
        pool.get_sequence_logprobs([[1, 2, 3]], [1])
    assert len(pool.generate(["bada"])["completion_ids"]) == 1
