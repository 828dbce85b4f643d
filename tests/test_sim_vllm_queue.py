"""What a simulated `vllm serve` says of the sequences that it runs, and how many it runs at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import eventually
from vllm_sims import COMPLETIONS, Aside, aside_calls, complete, get, post, started, unspoilt

from trl_pool import VLLMClientPool
from trl_pool.queues import parse
from trl_pool.sim import SimProcess
from trl_pool.sim.config import SimConfig

LONG: dict[str, Any] = {"ignore_eos": True, "max_tokens": 2000}  # ten seconds


@pytest.fixture(scope="module")
def started_sim() -> Iterator[SimProcess]:
    with started(one={"max_num_seqs": 4, "decode_ms_per_token": 5}) as sims:
        yield sims["one"]


@pytest.fixture
def sim(started_sim: SimProcess) -> SimProcess:
    """A server that runs four sequences at once."""
    return unspoilt(started_sim)


@pytest.fixture
def aside() -> Iterator[Aside]:
    with aside_calls() as send:
        yield send


def queue(sim: SimProcess) -> tuple[int, int] | None:
    return parse(get(sim, "/metrics").content)


def test_sequences_that_run_and_wait_are_told_each_completion_counting(sim: SimProcess, aside: Aside) -> None:
    assert queue(sim) == (0, 0)
    calls = [aside(complete, sim, "one", n=3, **LONG)]
    eventually(lambda: queue(sim) == (3, 0))
    calls.append(aside(complete, sim, ["two", "three"], **LONG))
    eventually(lambda: queue(sim) == (3, 2))
    calls.append(aside(complete, sim, "four", **LONG))
    eventually(lambda: queue(sim) == (3, 3))  # in the order in which they came
    assert (
        'vllm:num_requests_waiting_by_reason{engine="0",model_name="sim-model",reason="capacity"} 3.0'
        in get(sim, "/metrics").text.splitlines()
    )
    post(sim, "/abort_requests", {})
    for call in calls:
        call.result()
    assert queue(sim) == (0, 0)


def test_whoever_ends_lets_the_next_in(sim: SimProcess, aside: Aside) -> None:
    first = aside(complete, sim, "one", n=4, ignore_eos=True, max_tokens=100)
    eventually(lambda: queue(sim) == (4, 0))
    rest = [aside(complete, sim, f"prompt {i}", ignore_eos=True, max_tokens=100) for i in range(5)]
    eventually(lambda: queue(sim) == (4, 5))
    first.result()
    eventually(lambda: queue(sim) == (4, 1))
    assert all(len(call.result()["choices"][0]["token_ids"]) == 100 for call in rest)


def test_more_than_it_runs_at_once_runs_by_itself(sim: SimProcess, aside: Aside) -> None:
    large = aside(complete, sim, "large", n=7, **LONG)
    eventually(lambda: queue(sim) == (4, 3))
    small = aside(complete, sim, "small", **LONG)
    eventually(lambda: queue(sim) == (4, 4))
    post(sim, "/abort_requests", {})
    large.result(), small.result()


def test_what_waits_for_room_can_be_frozen_and_goes_on_in_order(sim: SimProcess, aside: Aside) -> None:
    calls = [aside(complete, sim, "one", n=4, ignore_eos=True, max_tokens=60)]
    eventually(lambda: queue(sim) == (4, 0))
    calls.append(aside(complete, sim, "two", ignore_eos=True, max_tokens=60))
    eventually(lambda: queue(sim) == (4, 1))
    post(sim, "/pause?mode=keep").raise_for_status()
    assert queue(sim) == (0, 5)
    post(sim, "/resume").raise_for_status()
    assert queue(sim) == (4, 1)
    assert [len(call.result()["choices"]) for call in calls] == [4, 1]


def test_a_client_that_leaves_makes_room(sim: SimProcess, aside: Aside) -> None:
    body = {"prompt": "one", "n": 4, "model": "sim-model", **LONG}
    gone = aside(post, sim, COMPLETIONS, body, timeout=1.0)
    eventually(lambda: queue(sim) == (4, 0))
    waits = aside(complete, sim, "two", ignore_eos=True, max_tokens=5)
    assert gone.exception() is not None
    assert len(waits.result()["choices"]) == 1


def test_it_tells_how_many_it_runs_and_a_pool_knows(sim: SimProcess) -> None:
    config = get(sim, "/server_info?config_format=json").json()["vllm_config"]
    assert config["scheduler_config"] == {"max_num_seqs": 4}
    with VLLMClientPool(sim.url, connection_timeout=10) as pool:
        (backend,) = pool._pool._dispatcher.backends.values()
        assert backend.max_num_seqs == 4


def test_none_at_once_is_refused() -> None:
    with pytest.raises(ValueError, match="max_num_seqs must be at least 1"):
        SimConfig(max_num_seqs=0)
