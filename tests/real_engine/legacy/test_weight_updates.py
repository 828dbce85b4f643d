"""Weight updates over two real `trl vllm-serve`, whose tensors are announced ahead."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trl_pool import NoBackendAvailableError, PoolConfig, VLLMClientPool

from ..pushing import SEQUENCES, metadata, random_model, reference_scores, worst_difference
from ..servers import TrlServer, quiet_ports

TOLERANCE = 0.02
DEADLINE = 20.0
"""Seconds within which an update that loses a server must have ended."""

Pair = tuple[TrlServer, TrlServer]
Walk = Iterator[tuple[str, Any]]


@pytest.fixture
def pool(mortal_servers: Pair) -> Iterator[VLLMClientPool]:
    """A pool over both with short time-outs."""
    config = PoolConfig(control_timeout=30, health_interval=0.5)
    urls = [server.url for server in mortal_servers]
    with VLLMClientPool(urls, connection_timeout=60, config=config, group_port=quiet_ports(2)) as pool:
        pool.init_communicator("cpu")
        yield pool


def differences(servers: Any, model: Any) -> list[float]:
    expected = reference_scores(model)
    return [worst_difference(server.scores(SEQUENCES), expected) for server in servers]


def parameters(model: Any, then: Callable[[int], None]) -> Walk:
    """The model's; `then(n)` is called before the n-th is given."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        then(index)
        yield name, parameter.data


def test_an_update_reaches_both_servers_announced_ahead_or_not(
    mortal_servers: Pair, model_dir: Path, pool: VLLMClientPool
) -> None:
    for seed in (11, 12):
        model = random_model(model_dir, seed)
        started = time.monotonic()
        pool.update_named_params(metadata(model), parameters(model, lambda index: None))
        ahead = time.monotonic() - started
        assert max(differences(mortal_servers, model)) < TOLERANCE
        model = random_model(model_dir, seed + 10)
        started = time.monotonic()
        for name, parameter in model.named_parameters():
            pool.update_named_param(name, parameter.data)
        pool.reset_prefix_cache()
        single = time.monotonic() - started
        assert max(differences(mortal_servers, model)) < TOLERANCE
        print(f"{len(metadata(model))} tensors: {ahead:.2f} s ahead, {single:.2f} s one by one")
    assert [backend.weight_version for backend in pool.statistics().backends] == [4, 4]


def test_an_iterator_that_raises_leaves_both_workers_able_to_take_the_next_update(
    mortal_servers: Pair, model_dir: Path, pool: VLLMClientPool
) -> None:
    def then(index: int) -> None:
        if index == 5:
            raise ZeroDivisionError("a gather failed")

    model = random_model(model_dir, 21)
    with pytest.raises(ZeroDivisionError):
        pool.update_named_params(metadata(model), parameters(model, then))
    with pytest.raises(NoBackendAvailableError, match="abandoned"):
        pool.generate(["x"], max_tokens=1)
    group = pool._pool.weights.group
    assert len(group) == 2
    pool.update_model_params(model)
    pool.reset_prefix_cache()
    assert pool._pool.weights.group == group, "nobody had to join anew"
    assert max(differences(mortal_servers, model)) < TOLERANCE


def test_a_server_that_dies_with_tensors_announced_costs_neither_a_hang_nor_the_other(
    mortal_servers: Pair, model_dir: Path, pool: VLLMClientPool
) -> None:
    def then(index: int) -> None:
        if index == 5:
            mortal_servers[1].kill()

    model = random_model(model_dir, 31)
    started = time.monotonic()
    pool.update_named_params(metadata(model), parameters(model, then))
    assert time.monotonic() - started < DEADLINE
    assert [backend.weight_version for backend in pool.statistics().backends] == [1, None]
    assert max(differences(mortal_servers[:1], model)) < TOLERANCE
    print(f"{time.monotonic() - started:.2f} s with a server that died; {pool.statistics().backends[1].reason}")
