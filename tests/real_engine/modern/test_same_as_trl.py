"""The pool and the gateway over two real `vllm serve` give what TRL 1.16's own client gets from one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from trl.generation.vllm_client import VLLMClient

from trl_pool import PoolConfig, RequestRejectedError, VLLMClientPool

from ..comparing import assert_same_rollouts, assert_same_scores
from ..gateway import running_gateway
from ..servers import VllmServer

TEXTS = [f"hello {i} world" for i in range(12)]
IDS = [[5, 6, 7 + i, 9] for i in range(12)]
CHATS = [[{"role": "user", "content": f"hello {i}"}] for i in range(12)]
GREEDY: dict[str, Any] = {"n": 1, "temperature": 0.0, "max_tokens": 12, "logprobs": 5}
SEQUENCES = [[*ids, 11, 12, 13, 14] for ids in IDS]


@pytest.fixture(scope="module")
def stock(two_vllm_servers: tuple[VllmServer, VllmServer]) -> VLLMClient:
    """TRL's own client on the first server alone."""
    return VLLMClient(base_url=two_vllm_servers[0].url, connection_timeout=10)


@pytest.fixture
def pool(two_vllm_servers: tuple[VllmServer, VllmServer]) -> Iterator[VLLMClientPool]:
    """The pool on both."""
    with VLLMClientPool([server.url for server in two_vllm_servers], connection_timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def through_gateway(two_vllm_servers: tuple[VllmServer, VllmServer]) -> Iterator[VLLMClient]:
    """TRL's own client, unchanged, on a gateway in front of both."""
    with running_gateway([server.url for server in two_vllm_servers]) as url:
        yield VLLMClient(base_url=url, connection_timeout=10)


def both_took_part(pool: VLLMClientPool) -> bool:
    return all(backend.prompts > 0 for backend in pool.statistics().backends)


@pytest.mark.parametrize("prompts", [TEXTS, IDS], ids=["strings", "token ids"])
def test_pool_generates_what_one_server_does(pool: VLLMClientPool, stock: VLLMClient, prompts: list[Any]) -> None:
    print(assert_same_rollouts(pool.generate(prompts, **GREEDY), stock.generate(prompts, **GREEDY), top=5))
    assert both_took_part(pool)


def test_pool_chats_as_one_server_does(pool: VLLMClientPool, stock: VLLMClient) -> None:
    print(assert_same_rollouts(pool.chat(CHATS, **GREEDY), stock.chat(CHATS, **GREEDY), top=5))
    assert both_took_part(pool)


@pytest.mark.parametrize("chunk_size", [0, 2])
def test_pool_scores_as_one_server_does(pool: VLLMClientPool, stock: VLLMClient, chunk_size: int) -> None:
    asked: dict[str, Any] = {"prompt_lengths": [4] * 12, "top_logprobs": 512, "chunk_size": chunk_size}
    print(
        assert_same_scores(
            pool.get_sequence_logprobs(SEQUENCES, **asked), stock.get_sequence_logprobs(SEQUENCES, **asked)
        )
    )
    assert both_took_part(pool)


def test_n_completions_stay_together(pool: VLLMClientPool) -> None:
    answer = pool.generate(IDS, n=4, max_tokens=8, temperature=1.0)
    assert answer["prompt_ids"] == IDS
    assert len(answer["completion_ids"]) == len(answer["logprobs"]) == 4 * len(IDS)
    assert all(1 <= len(ids) <= 8 for ids in answer["completion_ids"])


def test_pool_knows_what_the_servers_say_of_themselves(pool: VLLMClientPool, stock: VLLMClient) -> None:
    assert pool.model == stock.model
    assert pool.get_world_size() == 2
    theirs = stock.get_server_info()["model_config"]
    assert pool.get_server_info()["model_config"]["logprobs_mode"] == theirs["logprobs_mode"] == "processed_logprobs"


def test_bad_requests_are_refused_and_cost_no_server(pool: VLLMClientPool) -> None:
    with pytest.raises(ValueError, match="max_model_len=256 at index 1"):
        pool.generate([[5, 6], [7] * 300])
    with pytest.raises(RequestRejectedError, match="400"):
        pool.generate(["a"], temperature=-1.0)
    assert all(backend.eligible and not backend.failures for backend in pool.statistics().backends)


def test_stock_client_gets_the_same_through_the_gateway(through_gateway: VLLMClient, stock: VLLMClient) -> None:
    for prompts in (TEXTS, IDS):
        print(
            assert_same_rollouts(through_gateway.generate(prompts, **GREEDY), stock.generate(prompts, **GREEDY), top=5)
        )
    print(assert_same_rollouts(through_gateway.chat(CHATS, **GREEDY), stock.chat(CHATS, **GREEDY), top=5))
    asked: dict[str, Any] = {"prompt_lengths": [4] * 12, "top_logprobs": 512}
    found = through_gateway.get_sequence_logprobs(SEQUENCES, **asked)
    print(assert_same_scores(found, stock.get_sequence_logprobs(SEQUENCES, **asked)))
    assert through_gateway.get_world_size() == 2
    assert through_gateway.get_server_info()["model_config"] == stock.get_server_info()["model_config"]


def test_streams_pass_through_the_gateway(through_gateway: VLLMClient, stock: VLLMClient) -> None:
    body = {"model": stock.model, "prompt": IDS[0], "max_tokens": 8, "temperature": 0.0, "stream": True}
    texts = []
    for client in (through_gateway, stock):
        response = requests.post(f"{client.base_url}/v1/completions", json=body, stream=True, timeout=60)
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix(b"data: ") for line in response.iter_lines() if line]
        assert events.pop() == b"[DONE]"
        assert len(events) > 1
        texts.append("".join(json.loads(event)["choices"][0]["text"] for event in events))
    assert texts[0] == texts[1]


def test_pool_that_is_given_a_gateway_talks_to_the_servers_behind_it(
    through_gateway: VLLMClient, two_vllm_servers: tuple[VllmServer, VllmServer]
) -> None:
    with VLLMClientPool(through_gateway.base_url, connection_timeout=10, config=PoolConfig()) as client:
        urls = [backend.url for backend in client.statistics().backends]
        assert urls == [server.url for server in two_vllm_servers]
        client.generate(IDS, max_tokens=2)
        assert both_took_part(client)
