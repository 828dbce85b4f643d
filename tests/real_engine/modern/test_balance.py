"""Batches larger than two real `vllm serve` can run, and conversations that come back to their cache."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from trl_pool import VLLMClientPool
from trl_pool.pace import Pace

from ..comparing import assert_same_rollouts
from ..servers import MAX_MODEL_LEN, VllmServer

PAIR = tuple[VllmServer, VllmServer]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8, "logprobs": 5}


@pytest.fixture
def pool(two_vllm_servers: PAIR) -> Iterator[VLLMClientPool]:
    with VLLMClientPool([server.url for server in two_vllm_servers], connection_timeout=30) as client:
        yield client


def test_a_batch_larger_than_the_servers_can_run_is_pulled_and_comes_back_whole(
    two_vllm_servers: PAIR, pool: VLLMClientPool
) -> None:
    backends = list(pool._pool._dispatcher.backends.values())
    assert [b.identity.max_num_seqs for b in backends if b.identity] == [b.max_num_seqs for b in backends]
    count = int(1.5 * sum(b.max_num_seqs for b in backends))
    prompts = [[5, 6, 7 + i % 400, 9, 10 + i // 400] for i in range(count)]
    answer = pool.generate(prompts, **GREEDY)
    told = [b.tells_queue for b in backends]
    requests = [b.requests for b in pool.statistics().backends]
    served = [b.prompts for b in pool.statistics().backends]
    print(f"{count} prompts, {requests} requests, {served} prompts per server, queues told: {told}")
    assert sum(served) == count
    assert min(served) > count // 4
    assert min(requests) > 10, "in many small requests"
    with VLLMClientPool(two_vllm_servers[0].url, connection_timeout=30) as alone:
        print(assert_same_rollouts(answer, alone.generate(prompts, **GREEDY), top=5))


def test_servers_tell_how_many_sequences_run_and_wait(pool: VLLMClientPool) -> None:
    backend = next(iter(pool._pool._dispatcher.backends.values()))

    async def look() -> None:
        from trl_pool import queues

        await queues.look([backend], timeout=5, clock=pool._pool._clock)

    pool._call(look)
    assert backend.tells_queue is True
    assert backend.queue is not None
    assert (backend.queue.running, backend.queue.waiting) == (0, 0)


def test_conversations_that_begin_alike_come_back_to_the_server_that_has_them(pool: VLLMClientPool) -> None:
    rng = random.Random(1)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(5, 400) for _ in range(count)]

    system = tokens(MAX_MODEL_LEN // 4)
    prompts = [system + tokens(MAX_MODEL_LEN // 2) for _ in range(6)]
    homes = []
    for _ in range(3):
        rng.shuffle(prompts)
        pool._pool._dispatcher.pace = Pace()  # a busy machine may look like a slow server, which gets less
        answer = pool.generate(prompts, n=1, max_tokens=4)
        assert pool.last_report is not None
        served = [report.backend for report in pool.last_report.prompts]
        homes.append({tuple(p[: MAX_MODEL_LEN // 2]): url for p, url in zip(prompts, served, strict=True)})
        prompts = [p + ids for p, ids in zip(prompts, answer["completion_ids"], strict=True)]
    assert homes[0] == homes[1] == homes[2]
    assert len(set(homes[0].values())) == 2
