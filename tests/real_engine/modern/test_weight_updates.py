"""Weight updates over two real `vllm serve`, and what is left of one that a server's death has broken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trl_pool import PoolConfig, VLLMClientPool, WeightSyncError

from ..pushing import SEQUENCES, metadata, random_model, reference_scores, weight_version, worst_difference
from ..servers import VllmServer

TOLERANCE = 0.02
DEADLINE = 20.0
"""Seconds within which a broken update must have ended."""

Pair = tuple[VllmServer, VllmServer]


@pytest.fixture
def pool_over() -> Iterator[Callable[..., VLLMClientPool]]:
    """`pool_over(servers)`: a pool with short time-outs and small buffers, closed after the test."""
    pools = []

    def make(servers: Any, **settings: Any) -> VLLMClientPool:
        config = PoolConfig(**{"control_timeout": 10, "health_interval": 0.5, "weight_buffer_mb": 1, **settings})
        pool = VLLMClientPool([server.url for server in servers], connection_timeout=60, config=config)
        pools.append(pool)
        pool.init_communicator("cpu")
        return pool

    yield make
    for pool in pools:
        pool.close()


def differences(servers: Any, model: Any) -> list[float]:
    expected = reference_scores(model)
    return [worst_difference(server.scores(SEQUENCES), expected) for server in servers]


def test_an_update_reaches_both_servers_and_costs_hardly_more_than_one(
    mortal_vllm_servers: Pair, model_dir: Path, pool_over: Callable[..., VLLMClientPool]
) -> None:
    seconds = {}
    for count, seed in ((1, 11), (2, 12)):
        servers = mortal_vllm_servers[:count]
        pool = pool_over(servers)
        pool.update_model_params(random_model(model_dir, seed))  # the first one also warms up
        model = random_model(model_dir, seed + 10)
        started = time.monotonic()
        pool.update_model_params(model)
        seconds[count] = time.monotonic() - started
        found = differences(servers, model)
        versions = {weight_version(server) for server in servers}
        assert versions == {pool.statistics().weight_version}
        assert max(found) < TOLERANCE
        print(f"{count} servers: {seconds[count]:.2f} s, worst differences {found}, version {versions}")
        pool.close()


def test_weights_sent_in_pieces_are_one_version(
    mortal_vllm_servers: Pair, model_dir: Path, pool_over: Callable[..., VLLMClientPool]
) -> None:
    pool, model = pool_over(mortal_vllm_servers), random_model(model_dir, 31)
    before = pool.statistics().weight_version
    with pool.weight_update():
        for name, parameter in model.named_parameters():
            pool.update_named_param(name, parameter.data)
        with pytest.raises(WeightSyncError, match="inside weight_update"):
            pool.generate(["x"], max_tokens=1)
    assert pool.statistics().weight_version == before.replace(":0", ":1")
    assert max(differences(mortal_vllm_servers, model)) < TOLERANCE
    pool.generate(SEQUENCES, max_tokens=2)
    assert pool.last_report is not None
    assert {prompt.weight_version for prompt in pool.last_report.prompts} == {1}


def test_a_block_that_raises_publishes_nothing_and_the_next_whole_update_heals(
    mortal_vllm_servers: Pair, model_dir: Path, pool_over: Callable[..., VLLMClientPool]
) -> None:
    pool, model = pool_over(mortal_vllm_servers), random_model(model_dir, 41)

    def mistaken() -> None:
        with pool.weight_update():
            name, parameter = next(iter(model.named_parameters()))
            pool.update_named_param(name, parameter.data)
            raise KeyError("the trainer's own mistake")

    with pytest.raises(KeyError):
        mistaken()
    assert not any(backend.eligible for backend in pool.statistics().backends)
    pool.update_model_params(model)
    assert max(differences(mortal_vllm_servers, model)) < TOLERANCE


@pytest.mark.parametrize("tensors_before", [3, 20])
def test_a_server_that_dies_in_mid_update_costs_neither_a_hang_nor_the_survivor(
    mortal_vllm_servers: Pair, model_dir: Path, pool_over: Callable[..., VLLMClientPool], tensors_before: int
) -> None:
    """SIGKILL from inside the parameter iterator: it is read to its end all the same, the error names both servers,
    and the next update goes to the survivor."""
    survivor, victim = mortal_vllm_servers
    pool = pool_over(mortal_vllm_servers)
    pool.update_model_params(random_model(model_dir, 51))
    model = random_model(model_dir, 52)
    read = []

    def parameters() -> Iterator[tuple[str, Any]]:
        for position, (name, parameter) in enumerate(model.named_parameters()):
            if position == tensors_before:
                victim.kill()
            read.append(name)
            yield name, parameter.data

    started = time.monotonic()
    with pytest.raises(WeightSyncError) as caught:
        pool.update_named_params(metadata(model), parameters())
    seconds = time.monotonic() - started
    print(f"{seconds:.1f} s: {caught.value}")
    assert seconds < DEADLINE
    assert read == [name for name, _ in model.named_parameters()]
    assert set(caught.value.results) == {survivor.url, victim.url}
    assert not any(backend.eligible for backend in pool.statistics().backends)

    started = time.monotonic()
    pool.update_model_params(model)
    print(f"over the survivor in {time.monotonic() - started:.1f} s")
    assert max(differences([survivor], model)) < TOLERANCE
    pool.generate(SEQUENCES, max_tokens=2)
    assert pool.last_report is not None
    assert {prompt.backend for prompt in pool.last_report.prompts} == {survivor.url}


def test_a_model_is_sent_again_over_the_servers_that_are_left(
    mortal_vllm_servers: Pair, model_dir: Path, pool_over: Callable[..., VLLMClientPool]
) -> None:
    survivor, victim = mortal_vllm_servers
    pool, model = pool_over(mortal_vllm_servers), random_model(model_dir, 61)
    named = type(model).named_parameters
    passes = []

    class Watched:
        def named_parameters(self) -> Iterator[tuple[str, Any]]:
            passes.append(0)
            for name, parameter in named(model):
                passes[-1] += 1
                if len(passes) == 2 and passes[-1] == 5:  # the first pass only reads names and shapes
                    victim.kill()
                yield name, parameter

    started = time.monotonic()
    pool.update_model_params(Watched())
    print(f"{time.monotonic() - started:.1f} s, tensors read per pass {passes}")
    assert len(passes) == 3
    assert max(differences([survivor], model)) < TOLERANCE


def test_a_server_that_comes_back_serves_after_a_whole_update_and_not_before(
    mortal_vllm_servers: Pair, model_dir: Path, pool_over: Callable[..., VLLMClientPool]
) -> None:
    """It is healthy at once, with the checkpoint's weights."""
    survivor, returned = mortal_vllm_servers
    pool = pool_over(mortal_vllm_servers)
    pool.update_model_params(random_model(model_dir, 71))
    returned.kill()
    returned.start()
    returned.wait_ready()

    def state() -> Any:
        return next(b for b in pool.statistics().backends if b.url == returned.url)

    deadline = time.monotonic() + 20
    while state().health != "up":
        assert time.monotonic() < deadline
    assert "out of sync" in state().reason
    pool.generate(SEQUENCES, max_tokens=2)
    assert pool.last_report is not None
    assert {prompt.backend for prompt in pool.last_report.prompts} == {survivor.url}
    model = random_model(model_dir, 72)
    pool.update_model_params(model)
    assert max(differences(mortal_vllm_servers, model)) < TOLERANCE
    pool.generate(SEQUENCES, max_tokens=2)
    assert {prompt.backend for prompt in pool.last_report.prompts} == {survivor.url, returned.url}
