"""Probes of `vllm serve`: busy is not down, silence is, and what its weights are a server has to say itself."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from conftest import Tensor, eventually, received
from vllm_sims import get, post

from trl_pool import NoBackendAvailableError, VLLMClientPool, WeightSyncError
from trl_pool.sim import SimProcess

Fleet = Callable[..., list[SimProcess]]
MakePool = Callable[..., VLLMClientPool]
Background = Callable[..., Future[Any]]

PROMPTS = [f"prompt {i}" for i in range(8)]


def state(pool: VLLMClientPool, sim: SimProcess) -> Any:
    return next(backend for backend in pool.statistics().backends if backend.name == sim.name)


def told(sim: SimProcess) -> str:
    version: str = get(sim, "/weight_info").json()["weight_version"]
    return version


def updated(pool: VLLMClientPool) -> VLLMClientPool:
    """The pool after one update."""
    pool.init_communicator()
    pool.update_named_param("a", Tensor())
    return pool


def test_a_busy_server_answers_probes_and_stays_up(
    vllm_fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = vllm_fleet(2)
    pool = make_pool(sims, health_interval=0.05, health_timeout=0.5, fail_eject_threshold=1)
    for sim in sims:
        sim.faults("hang", endpoints=["completions"])
    call = background(pool.generate, PROMPTS)
    eventually(lambda: all(sim.state()["in_flight"] for sim in sims))
    before = received(sims, "health")
    eventually(lambda: all(now - then > 5 for now, then in zip(received(sims, "health"), before, strict=True)))
    assert [(b.health, b.breaker, b.failures) for b in pool.statistics().backends] == [("up", "closed", 0)] * 2
    for sim in sims:
        sim.clear_faults()
    assert len(call.result()["prompt_ids"]) == 8


def test_one_silent_probe_makes_a_server_suspect_and_a_second_one_down(vllm_fleet: Fleet, make_pool: MakePool) -> None:
    sims = vllm_fleet(2)
    pool = make_pool(sims, health_interval=60, health_timeout=0.4)
    sims[1].faults("hang", endpoints=["health"])
    monitor, backend = pool._pool._monitor, pool._pool._dispatcher.backends[sims[1].name]
    for health, eligible in (("suspect", True), ("down", False)):
        pool._portal.call(monitor.probe_once, [backend])
        assert (state(pool, sims[1]).health, state(pool, sims[1]).eligible) == (health, eligible)
        pool.generate(PROMPTS)
        assert state(pool, sims[1]).requests == 0, "a suspect comes last"
    sims[1].clear_faults()
    pool._portal.call(monitor.probe_once, [backend])
    assert state(pool, sims[1]).eligible


def test_a_server_that_was_down_and_is_the_same_process_serves_again_after_an_update(
    vllm_fleet: Fleet, make_pool: MakePool
) -> None:
    """It says so itself: no new process has that version."""
    sims = vllm_fleet(2, first_weights=False)
    pool = updated(make_pool(sims))
    sims[1].faults("refuse")
    eventually(lambda: state(pool, sims[1]).health == "down")
    sims[1].clear_faults()
    eventually(lambda: state(pool, sims[1]).eligible)
    assert state(pool, sims[1]).weight_version == 1
    pool.generate(PROMPTS)
    assert min(received(sims, "completions")) == 1


def test_a_doubt_is_not_cleared_by_health_alone(vllm_fleet: Fleet, make_pool: MakePool) -> None:
    sims = vllm_fleet(2, first_weights=False)
    pool = updated(make_pool(sims))
    sims[1].faults("status", status=500, endpoints=["weight_info"])
    sims[1].faults("reset", endpoints=["completions"], times=1)
    pool.generate(PROMPTS)
    assert "a connection broke" in state(pool, sims[1]).reason
    before = received(sims[1:], "health")[0]
    eventually(lambda: received(sims[1:], "health")[0] > before + 3)
    assert not state(pool, sims[1]).eligible
    sims[1].clear_faults()
    eventually(lambda: state(pool, sims[1]).eligible)
    assert state(pool, sims[1]).weight_version == 1


def test_a_broken_connection_before_the_first_update_keeps_nobody_from_serving(
    vllm_fleet: Fleet, make_pool: MakePool
) -> None:
    sims = vllm_fleet(2)
    pool = make_pool(sims)
    for _ in range(2):
        sims[1].faults("reset", endpoints=["completions"], times=1)
        pool.generate(PROMPTS)
        eventually(lambda: state(pool, sims[1]).eligible)
    assert state(pool, sims[1]).failures == 2


def test_a_restarted_server_is_out_of_sync_and_serves_again_only_after_a_whole_update(
    vllm_fleet: Fleet, make_pool: MakePool
) -> None:
    sims = vllm_fleet(2, first_weights=False)
    pool = make_pool(sims)
    pool.init_communicator()
    names = ("a", "b")
    pool.update_named_params([(n, "float32", [2]) for n in names], iter([(n, Tensor(2)) for n in names]))
    sims[1].restart()
    reason = eventually(lambda: next((r for r in [state(pool, sims[1]).reason] if "'default'" in r), None))
    assert "reports weights 'default'" in reason
    pool.generate(PROMPTS)
    assert received(sims, "completions") == [1, 0]
    pool.update_named_param("a", Tensor(2))
    assert "update v2 carried 1 of the 2 parameters" in state(pool, sims[1]).reason
    pool.generate(PROMPTS)
    assert received(sims, "completions") == [2, 0]
    pool.update_named_params([(n, "float32", [2]) for n in names], iter([(n, Tensor(2)) for n in names]))
    assert [b.weight_version for b in pool.statistics().backends] == [3, 3]
    pool.generate(PROMPTS)
    assert received(sims, "completions") == [3, 1]


def test_a_restart_before_the_first_update_is_no_reason_to_wait(vllm_fleet: Fleet, make_pool: MakePool) -> None:
    sims = vllm_fleet(2)
    pool = make_pool(sims)
    sims[1].restart()
    eventually(lambda: received(sims[1:], "weight_info")[0] and state(pool, sims[1]).eligible)
    pool.generate(PROMPTS)
    assert received(sims, "completions") == [1, 1]


def test_servers_that_report_different_weights_at_the_start_do_not_serve_before_the_first_update(
    vllm_fleet: Fleet, make_pool: MakePool
) -> None:
    sims = vllm_fleet(2)
    post(sims[1], "/update_weight_version", {"new_version": "somebody's:7"})
    pool = make_pool(sims, backend_wait_seconds=0.2)
    with pytest.raises(NoBackendAvailableError, match=r"differ in that .*none serves before the first weight update"):
        pool.generate(PROMPTS)
    assert [b.reason.partition(",")[0] for b in pool.statistics().backends] == [
        "reports weights 'default'",
        'reports weights "somebody\'s:7"',
    ]
    updated(pool)
    assert len(pool.generate(PROMPTS)["prompt_ids"]) == 8
    assert received(sims, "completions") == [1, 1]


def test_servers_that_report_the_same_weights_of_an_earlier_run_serve(vllm_fleet: Fleet, make_pool: MakePool) -> None:
    sims = vllm_fleet(2)
    for sim in sims:
        post(sim, "/update_weight_version", {"new_version": "run:7"})
    assert len(make_pool(sims).generate(PROMPTS)["prompt_ids"]) == 8


def test_only_servers_whose_weight_info_says_the_required_version_serve_until_the_first_update(
    vllm_fleet: Fleet, make_pool: MakePool
) -> None:
    sims = vllm_fleet(2)
    post(sims[1], "/update_weight_version", {"new_version": "step-7"})
    pool = make_pool(sims, required_model_version="step-7")
    assert [b.reason for b in pool.statistics().backends] == [
        "reports model version 'default', required is 'step-7'",
        "",
    ]
    pool.generate(PROMPTS)
    assert received(sims, "completions") == [0, 1]
    post(sims[0], "/update_weight_version", {"new_version": "step-7"})
    eventually(lambda: state(pool, sims[0]).eligible)
    updated(pool)
    pool.generate(PROMPTS)
    assert received(sims, "completions") == [1, 2]


def test_a_server_before_0_27_1_keeps_no_version_and_is_out_of_sync_after_any_loss(make_pool: MakePool) -> None:
    """Nothing but the standing connection can prove that it is the same process."""
    with SimProcess(dialect="vllm", vllm_version="0.26.0") as old:
        pool = updated(make_pool([old]))
        assert state(pool, old).weight_version == 1
        assert (received([old], "weight_info"), told_nothing(old)) == ([0], True)
        old.faults("refuse")
        eventually(lambda: state(pool, old).health == "down")
        old.clear_faults()
        eventually(lambda: state(pool, old).health == "up")
        assert "its port was closed since the last update" in state(pool, old).reason
        pool.update_named_param("a", Tensor())
        assert state(pool, old).weight_version == 2


def told_nothing(sim: SimProcess) -> bool:
    return get(sim, "/weight_info").status_code == 404


def test_a_server_that_joins_after_an_update_waits_for_the_next(vllm_fleet: Fleet, make_pool: MakePool) -> None:
    sims = vllm_fleet(2, first_weights=False)
    pool = updated(make_pool(sims[:1]))
    pool.add_backend(sims[1].url)
    assert "joined after the last update" in state(pool, sims[1]).reason
    pool.update_named_param("a", Tensor())
    assert told(sims[0]) == told(sims[1]) == pool.statistics().weight_version
    assert [b.weight_version for b in pool.statistics().backends] == [2, 2]


def test_without_development_endpoints_there_is_no_update_and_the_error_says_what_to_start(
    vllm_fleet: Fleet, make_pool: MakePool
) -> None:
    sims = vllm_fleet(2)
    for sim in sims:
        sim.faults("status", status=404, endpoints=["server_info"])
    pool = make_pool(sims)
    with pytest.raises(WeightSyncError, match="VLLM_SERVER_DEV_MODE=1"):
        pool.init_communicator()
    with pytest.raises(RuntimeError, match="VLLM_SERVER_DEV_MODE=1"):
        pool.get_server_info()
    assert len(pool.generate(PROMPTS)["prompt_ids"]) == 8
