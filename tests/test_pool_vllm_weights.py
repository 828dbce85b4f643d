"""A weight update reaches every `vllm serve` whole and as one version, and nobody samples meanwhile."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest
from conftest import eventually, quick, received
from vllm_sims import (
    Apps,
    Model,
    Tensor,
    Walk,
    control_calls,
    tokens,
    told,
)

from trl_pool import AsyncVLLMClientPool, ControlError, RolloutError, VLLMClientPool, WeightSyncError
from trl_pool.sim import SimProcess

Fleet = Callable[..., list[SimProcess]]
MakePool = Callable[..., VLLMClientPool]
Background = Callable[..., Future[Any]]

PROMPTS = [f"prompt {i}" for i in range(8)]

UPDATE = ["start_weight_update", "update_weights", "finish_weight_update", "reset_prefix_cache"]


@pytest.fixture
def fleet(vllm_fleet: Callable[..., list[SimProcess]]) -> Fleet:
    """Nothing here depends on which weights the servers have at first, as long as they are the same."""
    return partial(vllm_fleet, first_weights=False)


def versions(pool: VLLMClientPool) -> list[int | None]:
    return [b.weight_version for b in pool.statistics().backends]


def number(pool: VLLMClientPool) -> int:
    return int(pool.statistics().weight_version.rpartition(":")[2])


def push(pool: VLLMClientPool, *names: str) -> None:
    walk = Walk(*names)
    pool.update_named_params(walk.metadata, iter(walk))


def sampled(sim: SimProcess) -> list[list[int]]:
    """What one server answers by itself to what `pool.generate(PROMPTS)` asks."""
    return tokens(sim, PROMPTS, max_tokens=16, temperature=1.0, top_k=0)


# The course of an update


def test_every_server_sees_the_calls_of_an_update_in_order(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(3)
    pool = make_pool(sims)
    pool.init_communicator()
    push(pool)
    push(pool)
    for sim in sims:
        assert control_calls(sim) == ["init_weight_transfer_engine", *UPDATE, *UPDATE]
        assert sim.state()["requests"][-1]["endpoint"] in ("weight_info", "health")


def test_after_an_update_all_servers_hold_the_same_new_weights_report_their_version_and_serve(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(3)
    pool = make_pool(sims)
    before = pool.generate(PROMPTS)["completion_ids"]
    pool.init_communicator()
    for expected_number in (1, 2):
        push(pool)
        assert len({sim.state()["weights"]["digest"] for sim in sims}) == 1
        assert versions(pool) == [expected_number] * 3
        assert [told(sim) for sim in sims] == [pool.statistics().weight_version] * 3
        assert number(pool) == expected_number
        assert [b.model_version for b in pool.statistics().backends] == [pool.statistics().weight_version] * 3
        assert pool.statistics().gate is None
        after = pool.generate(PROMPTS)["completion_ids"]
        assert after == sampled(sims[0])
        assert after != before
        before = after


def test_a_single_parameter_is_an_update_of_its_own(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.init_communicator()
    pool.update_named_param("a", Tensor(4, 2))
    pool.update_named_param("b", Tensor(4, 2))
    assert number(pool) == 2
    assert control_calls(sims[0])[1:] == [*UPDATE, *UPDATE]


def test_a_whole_model_is_one_update(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool, model = make_pool(sims), Model()
    pool.init_communicator()
    pool.update_model_params(model)
    assert (number(pool), versions(pool)) == (1, [1, 1])
    assert control_calls(sims[0])[1:] == UPDATE
    assert model.walks == 2, "once for the metadata, once for the tensors"


def test_a_block_is_one_update_of_everything_in_it(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.init_communicator()
    with pool.weight_update():
        pool.update_named_param("a", Tensor())
        push(pool, "b", "c")
        pool.update_model_params(Model("d"))
        assert number(pool) == 0
        assert "weight update v1 is under way" in str(pool.statistics().gate)
    assert control_calls(sims[1])[1:] == [UPDATE[0], *[UPDATE[1]] * 3, *UPDATE[2:]]
    assert (number(pool), versions(pool), told(sims[1])) == (1, [1, 1], pool.statistics().weight_version)
    assert pool.generate(PROMPTS)["completion_ids"] == sampled(sims[0])


def test_an_empty_block_is_an_update_of_nothing(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(1)
    pool = make_pool(sims)
    pool.init_communicator()
    before = sampled(sims[0])
    with pool.weight_update():
        pass
    assert (versions(pool), sampled(sims[0])) == ([1], before)


def test_tensors_are_announced_in_the_order_of_the_metadata_with_their_dtypes_and_shapes() -> None:
    apps = Apps(a={}, b={})
    with VLLMClientPool(apps.urls, config=quick(weight_buffer_mb=3), transport=apps) as pool:
        pool.init_communicator()
        pool.update_named_params(
            [("x", "float32", (4, 2)), ("y", "bfloat16", [])],
            iter([("x", Tensor(4, 2, dtype="torch.float32")), ("y", Tensor())]),
        )
    bodies = [json.loads(request.content) for request in apps.asked("/update_weights")]
    assert (
        bodies
        == [{"update_info": {"names": ["x", "y"], "dtype_names": ["float32", "bfloat16"], "shapes": [[4, 2], []]}}] * 2
    )


def test_one_group_spans_all_servers_at_consecutive_offsets_and_each_new_group_has_a_new_port() -> None:
    apps = Apps(a={"tensor_parallel_size": 2}, b={"data_parallel_size": 3}, c={})
    config = quick(update_group_host="127.0.0.1", weight_buffer_mb=3)
    with VLLMClientPool(apps.urls, config=config, transport=apps, group_port=41216) as pool:
        pool.init_communicator()
        pool.init_communicator()
    told_of = {
        host: [
            json.loads(request.content)["init_info"]
            for request in apps.asked("/init_weight_transfer_engine")
            if request.url.host == host
        ]
        for host in "abc"
    }
    assert {host: [info["rank_offset"] for info in infos] for host, infos in told_of.items()} == {
        "a": [1, 1],
        "b": [3, 3],
        "c": [6, 6],
    }
    every = [info for infos in told_of.values() for info in infos]
    assert {(info["world_size"], info["master_address"]) for info in every} == {(7, "127.0.0.1")}
    first, second = ({infos[turn]["master_port"] for infos in told_of.values()} for turn in (0, 1))
    assert len(first) == len(second) == 1
    assert 41216 <= min(first) < min(second)


def test_parameters_are_read_once_to_their_end_on_the_callers_thread(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool, walk = make_pool(sims), Walk(*(f"w{i}" for i in range(50)))
    pool.init_communicator()
    pool.update_named_params(walk.metadata, walk)
    assert walk.whole


def test_without_a_communicator_there_is_no_update_and_nobody_is_told_of_one(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(2)
    pool, walk = make_pool(sims), Walk()
    with pytest.raises(WeightSyncError, match="init_communicator"):
        pool.update_named_params(walk.metadata, walk)
    assert walk.whole, "the other ranks are in its collectives"
    assert [control_calls(sim) for sim in sims] == [[], []]
    assert len(pool.generate(PROMPTS)["prompt_ids"]) == 8


def test_caches_can_be_reset_without_an_update_and_failures_are_told(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.reset_prefix_cache()
    assert received(sims, "reset_prefix_cache") == [1, 1]
    assert number(pool) == 0
    sims[1].faults("false_reset", times=1)
    with pytest.raises(ControlError, match="success: false") as caught:
        pool.reset_prefix_cache()
    assert str(caught.value.results[sims[0].url]) == "succeeded"
    pool.generate(PROMPTS)


# The group


def test_the_group_stays_as_long_as_its_members_do_and_is_made_anew_when_they_change(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(3)
    pool = make_pool(sims[:2])
    pool.init_communicator()
    for _ in range(2):
        push(pool)
    assert received(sims, "init_weight_transfer_engine") == [1, 1, 0]
    pool.add_backend(sims[2].url)
    push(pool)
    assert received(sims, "init_weight_transfer_engine") == [2, 2, 1]
    sims[1].restart()
    eventually(lambda: "'default'" in pool.statistics().backends[1].reason)
    push(pool)
    assert received(sims, "init_weight_transfer_engine") == [3, 1, 2]
    pool.remove_backend(sims[0].name)
    push(pool)
    assert received(sims, "init_weight_transfer_engine") == [3, 2, 3]
    assert versions(pool) == [5, 5]


def test_a_server_that_is_gone_is_left_out_of_the_group(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.init_communicator()
    sims[1].kill()
    eventually(lambda: pool.statistics().backends[1].health == "down")
    push(pool)
    assert [b.eligible for b in pool.statistics().backends] == [True, False]
    assert "needs weights v1" in pool.statistics().backends[1].reason or "needs v1" in repr(pool)
    assert versions(pool)[0] == 1
    assert received(sims[:1], "init_weight_transfer_engine") == [2]


@pytest.mark.parametrize("endpoint", ["get_world_size", "init_weight_transfer_engine"])
def test_a_server_that_fails_when_the_group_is_made_is_taken_into_the_next_update(
    fleet: Fleet, make_pool: MakePool, endpoint: str
) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    sims[1].faults("status", status=500, endpoints=[endpoint], times=1)
    pool.init_communicator()
    assert pool._pool.weights.group == [sims[0].name]
    push(pool)
    assert versions(pool) == [1, 1]


def test_a_group_of_too_few_servers_is_an_error_that_names_the_others(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims, min_backends=2)
    sims[1].faults("status", status=500, endpoints=["init_weight_transfer_engine"], times=1)
    with pytest.raises(WeightSyncError, match="min_backends=2") as caught:
        pool.init_communicator()
    assert "500" in str(caught.value.results[sims[1].url])
    assert len(pool.generate(PROMPTS)["prompt_ids"]) == 8


# The gate


def test_generating_inside_a_block_raises_and_leaves_the_update_as_it_is(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.init_communicator()
    with pool.weight_update():
        push(pool)
        for call in (pool.generate, pool.chat):
            with pytest.raises(WeightSyncError, match=r"Generating inside weight_update\(\)"):
                call([[{"role": "user", "content": "a"}]] if call == pool.chat else PROMPTS)
    assert versions(pool) == [1, 1]
    assert received(sims, "completions") == received(sims, "chat_completions") == [0, 0]
    pool.generate(PROMPTS)


def test_a_block_inside_a_block_raises(fleet: Fleet, make_pool: MakePool) -> None:
    pool = make_pool(fleet(1))
    pool.init_communicator()
    with pool.weight_update():
        with pytest.raises(WeightSyncError, match="inside another one"), pool.weight_update():
            raise AssertionError("it is not entered")
        push(pool)
    assert versions(pool) == [1]


def test_a_generation_of_another_thread_waits_for_the_end_of_an_update(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.init_communicator()
    with pool.weight_update():
        rollout = background(pool.generate, PROMPTS)
        eventually(lambda: pool.statistics().waiting == 1)
        push(pool)
        assert not rollout.done()
        assert received(sims, "completions") == [0, 0]
    assert rollout.result()["completion_ids"] == sampled(sims[0])


def test_an_update_begins_when_the_requests_that_are_out_have_ended(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.init_communicator()
    before = sampled(sims[0])
    for sim in sims:
        sim.faults("slow", seconds=0.3, endpoints=["completions"])
    rollout = background(pool.generate, PROMPTS)
    eventually(lambda: all(sim.state()["in_flight"] for sim in sims))
    push(pool)
    assert rollout.done()
    assert rollout.result()["completion_ids"] == before
    assert not set(control_calls(sims[0])) & {"pause", "resume"}


def test_no_request_arrives_between_start_and_finish_and_no_answer_mixes_versions(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    """Whatever another thread's call returns was sampled from one version, which was in force while it ran."""
    sims = fleet(3)
    pool = make_pool(sims)
    pool.init_communicator()
    ended = threading.Event()

    def roll_out(prompts: list[str]) -> list[tuple[int, list[Any], int]]:
        seen = []
        while not ended.is_set():
            before = number(pool)
            seen.append((before, pool.generate(prompts)["completion_ids"], number(pool)))
        return seen

    def published() -> list[list[int]]:
        return tokens(sims[0], PROMPTS, max_tokens=16, temperature=1.0, top_k=0)

    history = [published()]
    threads = [background(roll_out, PROMPTS[:4]), background(roll_out, PROMPTS[4:])]
    try:
        for step in range(6):
            if step % 2:
                with pool.weight_update():
                    push(pool, "a")
                    push(pool, "b")
            else:
                pool.update_model_params(Model("a", "b"))
            history.append(published())
    finally:
        ended.set()
    assert len({json.dumps(answer) for answer in history}) == 7
    for share, thread in zip((slice(0, 4), slice(4, 8)), threads, strict=True):
        rollouts = thread.result()
        assert rollouts
        for before, answer, after in rollouts:
            assert any(answer == history[version][share] for version in range(before, after + 1))
    for sim in sims:
        updating = False
        for request in sim.state()["requests"]:
            updating = request["endpoint"] == "start_weight_update" or (
                updating and request["endpoint"] != "finish_weight_update"
            )
            assert not (updating and request["endpoint"] == "completions")


def test_requests_that_do_not_end_in_time_are_frozen_and_go_on_after_the_update(
    vllm_fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    with SimProcess(dialect="vllm", decode_ms_per_token=100) as slow:
        other = vllm_fleet(1)[0]
        pool = make_pool([slow, other], drain_timeout=0.2)
        pool.init_communicator()
        rollout = background(pool.generate, PROMPTS, max_tokens=8, generation_kwargs={"ignore_eos": True})
        eventually(lambda: slow.state()["running"] and received([other], "completions") == [1])
        push(pool)
        assert not rollout.done()
        assert versions(pool) == [1, 1]
        calls = [call for call in control_calls(slow) if call != "init_weight_transfer_engine"]
        assert calls == ["pause", *UPDATE, "resume"]
        assert "pause" not in control_calls(other)
        assert [len(ids) for ids in rollout.result()["completion_ids"]] == [8] * 8
        assert not slow.state()["paused"]


def test_an_update_that_cannot_begin_resumes_the_requests_that_it_froze(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    with SimProcess(dialect="vllm", decode_ms_per_token=100) as slow:
        pool = make_pool([slow], drain_timeout=0.2)  # no communicator
        rollout = background(pool.generate, PROMPTS[:1], max_tokens=8, generation_kwargs={"ignore_eos": True})
        eventually(lambda: slow.state()["running"])
        with pytest.raises(WeightSyncError, match="init_communicator"):
            push(pool)
        assert not slow.state()["paused"]
        assert len(rollout.result()["completion_ids"][0]) == 8


def test_a_server_that_cannot_be_paused_fails_the_update_and_everything_goes_on(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = fleet(1)
    pool = make_pool(sims, drain_timeout=0.2)
    pool.init_communicator()
    sims[0].faults("hang", endpoints=["completions"])
    sims[0].faults("status", status=500, endpoints=["pause"])
    rollout = background(pool.generate, PROMPTS)
    eventually(lambda: sims[0].state()["in_flight"])
    with pytest.raises(WeightSyncError, match="could not be paused") as caught:
        push(pool)
    assert "500" in str(caught.value.results[sims[0].url])
    assert (pool.statistics().gate, versions(pool)) == (None, [0])
    sims[0].clear_faults()
    assert len(rollout.result()["prompt_ids"]) == 8
    assert not set(control_calls(sims[0])) & set(UPDATE)


# Who may serve


def test_a_backend_one_version_behind_serves_with_max_staleness_1_and_not_two_behind(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(2)
    strict, lenient = make_pool(sims), make_pool(sims, max_staleness=1)
    del strict
    pool = lenient
    pool.init_communicator()
    push(pool)
    sims[1].faults("refuse")
    eventually(lambda: pool.statistics().backends[1].health == "down")
    push(pool)
    sims[1].clear_faults()
    eventually(lambda: pool.statistics().backends[1].eligible)
    assert versions(pool) == [2, 1]
    pool.generate(PROMPTS)
    assert received(sims, "completions") == [1, 1]
    assert pool.last_report is not None
    assert {prompt.weight_version for prompt in pool.last_report.prompts} == {1, 2}
    sims[1].faults("refuse")
    eventually(lambda: pool.statistics().backends[1].health == "down")
    push(pool)
    sims[1].clear_faults()
    eventually(lambda: pool.statistics().backends[1].health == "up")
    assert "holds weights v1, needs v3" in pool.statistics().backends[1].reason
    pool.generate(PROMPTS)
    assert received(sims, "completions") == [2, 1]


def test_a_backend_one_version_behind_does_not_serve_by_default(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.init_communicator()
    push(pool)
    sims[1].faults("refuse")
    eventually(lambda: pool.statistics().backends[1].health == "down")
    push(pool)
    sims[1].clear_faults()
    eventually(lambda: "holds weights v1, needs v2" in pool.statistics().backends[1].reason)
    pool.generate(PROMPTS)
    assert received(sims, "completions") == [1, 0]


def test_the_last_report_tells_who_served_what_from_which_weights_and_what_failed_before(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    assert pool.last_report is None
    pool.generate(PROMPTS)
    assert pool.last_report is not None
    assert [(p.weight_version, p.attempts) for p in pool.last_report.prompts] == [(0, ())] * 8
    assert {p.backend for p in pool.last_report.prompts} == {sim.url for sim in sims}
    pool.init_communicator()
    push(pool)
    sims[1].faults("status", status=500, endpoints=["completions"], times=1)
    pool.generate(PROMPTS)
    moved = [p for p in pool.last_report.prompts if p.attempts]
    assert len(moved) == 4
    for prompt in moved:
        assert [(a.backend, a.prompts) for a in prompt.attempts] == [(sims[1].url, 4)]
    assert {p.weight_version for p in pool.last_report.prompts} == {1}
    for sim in sims:
        sim.faults("status", status=500, endpoints=["completions"])
    with pytest.raises(RolloutError):
        pool.generate(PROMPTS[:1])
    (unserved,) = pool.last_report.prompts
    assert (unserved.backend, unserved.weight_version, len(unserved.attempts)) == (None, None, 3)


# The asynchronous twin


def test_the_asynchronous_class_makes_the_same_updates(fleet: Fleet) -> None:
    sims = fleet(2)

    async def main() -> None:
        async with AsyncVLLMClientPool([sim.url for sim in sims], connection_timeout=10, config=quick()) as pool:
            await pool.init_communicator()
            walk = Walk()
            await pool.update_named_params(walk.metadata, walk)
            assert walk.whole
            await pool.update_named_param("a", Tensor())
            await pool.update_model_params(Model())
            async with pool.weight_update():
                await pool.update_named_param("a", Tensor())
                await pool.update_named_param("b", Tensor())
                with pytest.raises(WeightSyncError, match="Generating inside"):
                    await pool.generate(PROMPTS)
            assert [b.weight_version for b in pool.statistics().backends] == [4, 4]
            assert {await asyncio.to_thread(told, sim) for sim in sims} == {pool.statistics().weight_version}
            assert len((await pool.generate(PROMPTS))["prompt_ids"]) == 8

    asyncio.run(main())


def test_in_asyncio_a_generation_of_another_task_waits_for_the_end_of_an_update(fleet: Fleet) -> None:
    sims = fleet(2)

    async def main() -> None:
        async with AsyncVLLMClientPool([sim.url for sim in sims], connection_timeout=10, config=quick()) as pool:
            await pool.init_communicator()
            inside, go_on = asyncio.Event(), asyncio.Event()

            async def train() -> None:
                async with pool.weight_update():
                    await pool.update_named_param("a", Tensor())
                    inside.set()
                    await go_on.wait()

            training = asyncio.create_task(train())
            await inside.wait()
            rollout = asyncio.create_task(pool.generate(PROMPTS))
            await asyncio.to_thread(eventually, lambda: pool.statistics().waiting)
            go_on.set()
            await training
            answer = await rollout
            assert pool.last_report is not None
            assert {p.weight_version for p in pool.last_report.prompts} == {1}
            assert answer["completion_ids"] == await asyncio.to_thread(sampled, sims[0])

    asyncio.run(main())


# The end


def test_closing_takes_a_bounded_time_with_a_dead_and_a_hung_server(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(3)
    pool = make_pool(sims)
    pool.init_communicator()
    push(pool)
    sims[0].kill()
    sims[1].faults("hang", endpoints=["health", "reset_prefix_cache"])
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 6
    pool.close()


def test_closing_in_mid_update_ends_it(fleet: Fleet, make_pool: MakePool, background: Background) -> None:
    sims = fleet(2)
    pool = make_pool(sims, control_timeout=1)
    pool.init_communicator()
    sims[1].faults("hang", endpoints=["update_weights"], times=1)
    update = background(push, pool)
    eventually(lambda: received(sims, "update_weights") == [1, 1])
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 8
    assert update.exception(timeout=5) is not None


def test_a_closed_communicator_takes_no_update_until_it_is_made_again(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.init_communicator()
    push(pool)
    pool.close_communicator()
    assert pool._pool.weights.group == []
    pool.init_communicator()
    push(pool)
    assert versions(pool) == [2, 2]
