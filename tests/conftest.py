"""Simulated fleets, pools with short time-outs, and a way to wait for state."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, settings

from trl_pool import PoolConfig, VLLMClientPool
from trl_pool.sim import SimFleet, SimProcess, start_fleet

# How long an example takes says how busy the machine is, and nothing about the code.
settings.register_profile("trl_pool", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("trl_pool")

_NO_SETTINGS = ("session_id", "transport", "weight_transport", "group_port", "connection_timeout", "api_key")

QUICK: dict[str, Any] = {
    "health_interval": 0.2,
    "health_timeout": 0.5,
    "connect_timeout": 2.0,
    "request_timeout": 20.0,
    "total_timeout": 30.0,
    "control_timeout": 5.0,
    "drain_timeout": 10.0,
    "backend_wait_seconds": 5.0,
    "backoff_seconds": 0.01,
}
"""Settings under which seconds become tenths."""


def quick(**settings: Any) -> PoolConfig:
    """A configuration with short time-outs."""
    return PoolConfig(**{**QUICK, **settings})


def eventually(holds: Callable[[], Any], timeout: float = 10.0) -> Any:
    """Polls until `holds()` gives something true, and returns that; what it raises is not hidden."""
    deadline = time.monotonic() + timeout
    while True:
        found = holds()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.01)


def ask(sim: SimProcess, endpoint: str, **body: Any) -> Any:
    """What one server answers by itself."""
    with httpx.Client(trust_env=False, timeout=20) as client:
        return client.post(f"{sim.url}/{endpoint}/", json=body).raise_for_status().json()


def received(sims: Sequence[SimProcess], endpoint: str = "generate") -> list[int]:
    """How many requests each server has had at an endpoint."""
    return [sim.state()["endpoints"][endpoint]["received"] for sim in sims]


class Tensor:
    """As much of a tensor as an announcement needs."""

    dtype = "torch.float32"

    def __init__(self, *shape: int) -> None:
        self.shape = shape or (2, 3)


def _made_new(sims: Sequence[SimProcess], first_weights: bool) -> None:
    """Every server without faults, counts and communicator. A start takes half a second of a core, so only what
    cannot be had otherwise is started anew."""
    states = []
    for sim in sims:
        if sim.running:
            sim.clear_faults()
            if sim.state()["communicator"]:
                ask(sim, "close_communicator")
        states.append(sim.state() if sim.running else None)

    def spoiled(state: Any) -> bool:
        return not state or state["poisoned"] or state["dead_worker"] or state["in_flight"] or state["mixed"]

    alike = not any(map(spoiled, states)) and len({state["weights"]["digest"] for state in states if state}) == 1
    anew = []
    for sim, state in zip(sims, states, strict=True):
        if spoiled(state) or (state["weights"]["updates"] and (first_weights or not alike)):
            anew.append(sim.restart(wait=False))
        else:
            sim.forget()
    for sim in anew:
        sim.wait_ready()


@pytest.fixture(scope="session")
def _sims() -> Iterator[SimFleet]:
    with SimFleet() as sims:
        yield sims


@pytest.fixture
def fleet(_sims: SimFleet) -> Callable[..., list[SimProcess]]:
    """`fleet(n)`: n simulated servers, shared by all tests and made new for each. With `first_weights=False` they
    may have weights of an earlier test, all the same."""

    def give(n: int, first_weights: bool = True) -> list[SimProcess]:
        if len(_sims) < n:
            _sims.extend(start_fleet(n - len(_sims)))
        _made_new(_sims[:n], first_weights)
        return list(_sims[:n])

    return give


def _vllm_made_new(sims: Sequence[SimProcess], first_weights: bool) -> None:
    """The same for servers of the `vllm` dialect."""
    states = []
    for sim in sims:
        if sim.running:
            sim.clear_faults()
        states.append(sim.state() if sim.running else None)
    spoilt = ("paused", "adapters", "running", "waiting", "in_flight", "dead_worker")

    def weights(state: Any) -> Any:
        return None if state is None else (state["weights"]["digest"], state["weight_version"])

    alike = len(set(map(weights, states))) == 1
    anew = []
    for sim, state in zip(sims, states, strict=True):
        spoiled = state is None or not state["whole"] or any(state[name] for name in spoilt)
        updated = state is not None and state["weight_version"] != "default"
        if spoiled or (updated and (first_weights or not alike)):
            anew.append(sim.restart(wait=False))
        else:
            sim.forget()
    for sim in anew:
        sim.wait_ready()


@pytest.fixture(scope="session")
def _vllm_sims() -> Iterator[SimFleet]:
    with SimFleet() as sims:
        yield sims


@pytest.fixture
def vllm_fleet(_vllm_sims: SimFleet) -> Callable[..., list[SimProcess]]:
    """`vllm_fleet(n)`: n simulated `vllm serve`, as `fleet` gives `trl` servers."""

    def give(n: int, first_weights: bool = True) -> list[SimProcess]:
        if len(_vllm_sims) < n:
            _vllm_sims.extend(start_fleet(n - len(_vllm_sims), dialect="vllm", trust_request_chat_template=True))
        _vllm_made_new(_vllm_sims[:n], first_weights)
        return list(_vllm_sims[:n])

    return give


@pytest.fixture
def make_pool() -> Iterator[Callable[..., VLLMClientPool]]:
    """`make_pool(sims, **settings)`: a pool over them, closed after the test. Constructor arguments of the pool
    that are no settings go by their names as well."""
    pools = []

    def make(sims: Sequence[SimProcess | str], **settings: Any) -> VLLMClientPool:
        arguments = {name: settings.pop(name) for name in _NO_SETTINGS if name in settings}
        urls = [sim if isinstance(sim, str) else sim.url for sim in sims]
        pool = VLLMClientPool(urls, config=quick(**settings), **{"connection_timeout": 10, **arguments})
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture
def background() -> Iterator[Callable[..., Future[Any]]]:
    """`background(function, *args, **kwargs)`: calls it in another thread and gives its future."""
    with ThreadPoolExecutor(max_workers=32) as threads:
        yield threads.submit
