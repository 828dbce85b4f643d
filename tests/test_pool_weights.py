"""A weight update reaches every server whole, or the server serves nothing."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
import pytest
from conftest import Tensor, ask, eventually, quick, received

from trl_pool import (
    AsyncVLLMClientPool,
    BackendMismatchError,
    ControlError,
    NoBackendAvailableError,
    VLLMClientPool,
    WeightSyncError,
)
from trl_pool.sim import SimProcess
from trl_pool.weights import GroupMember
from trl_pool.weights.transport import TransportError

Fleet = Callable[[int], list[SimProcess]]
MakePool = Callable[..., VLLMClientPool]
Background = Callable[..., Future[Any]]

PROMPTS = [f"prompt {i}" for i in range(12)]


@pytest.fixture
def fleet(fleet: Callable[..., list[SimProcess]]) -> Fleet:
    """Nothing here depends on which weights the servers have at first, as long as they are the same."""
    return partial(fleet, first_weights=False)


def control_calls(sim: SimProcess) -> list[str]:
    """The requests that a server has had, in order, probes left out."""
    return [r["endpoint"] for r in sim.state()["requests"] if r["endpoint"] != "health"]


def versions(pool: VLLMClientPool) -> list[int | None]:
    return [b.weight_version for b in pool.statistics().backends]


def reasons(pool: VLLMClientPool) -> list[str]:
    return [b.reason for b in pool.statistics().backends]


def number(pool: VLLMClientPool) -> int:
    return int(pool.statistics().weight_version.rpartition(":")[2])


def update(pool: VLLMClientPool, *names: str) -> None:
    for name in names or ("layer.weight",):
        pool.update_named_param(name, Tensor(4, 2))
    pool.reset_prefix_cache()


class Recorded:
    """A weight transport that moves nothing, remembers what it was told, and raises at the n-th tensor."""

    def __init__(self, raises_at: int = 0) -> None:
        self.members: list[GroupMember] = []
        self.sent: list[tuple[Any, list[str]]] = []
        self.closed = 0
        self.raises_at = raises_at

    def device_uuid(self, device: Any) -> str:
        return f"uuid of {device}"

    def open(self, members: Sequence[GroupMember], device: Any) -> None:
        self.members = list(members)

    def broadcast(self, tensor: Any, backends: Sequence[str]) -> None:
        self.sent.append((tensor, list(backends)))
        if len(self.sent) == self.raises_at:
            raise RuntimeError("unhandled system error")

    def close(self) -> None:
        self.closed += 1


class Servers:
    """A mocked fleet that answers every control call and remembers the bodies."""

    def __init__(self, world_size: int = 1) -> None:
        self.world_size = world_size
        self.bodies: list[tuple[str, str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health/":
            return httpx.Response(200, json={"status": "ok"})
        if request.url.path == "/get_world_size/":
            return httpx.Response(200, json={"world_size": self.world_size})
        body = json.loads(request.content) if request.content else None
        self.bodies.append((request.url.netloc.decode(), request.url.path, body))
        return httpx.Response(200, json={"message": "status: True"})

    def at(self, path: str) -> dict[str, Any]:
        return {netloc: body for netloc, seen, body in self.bodies if seen == path}


# The course of an update


def test_every_server_sees_the_calls_of_an_update_in_order(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(3)
    pool = make_pool(sims)
    pool.init_communicator()
    update(pool, "a", "b")
    pool.close_communicator()
    for sim in sims:
        assert control_calls(sim) == [
            "get_world_size",
            "close_communicator",
            "init_communicator",
            "update_named_param",
            "update_named_param",
            "reset_prefix_cache",
            "close_communicator",
        ]
        assert not sim.state()["communicator"]


def test_after_an_update_all_servers_hold_the_same_new_weights_and_serve(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(3)
    pool = make_pool(sims)
    before = pool.generate(PROMPTS)
    pool.init_communicator()
    for expected_number in (1, 2):
        update(pool, "a", "b")
        assert len({sim.state()["weights"]["digest"] for sim in sims}) == 1
        assert versions(pool) == [expected_number] * 3
        assert number(pool) == expected_number
        assert pool.statistics().gate is None
        after = pool.generate(PROMPTS)
        assert after == ask(sims[0], "generate", prompts=PROMPTS)
        assert after["completion_ids"] != before["completion_ids"]
        before = after


def test_two_runs_never_share_a_version(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(1)
    assert make_pool(sims).statistics().weight_version != make_pool(sims).statistics().weight_version


def test_a_whole_model_is_sent_parameter_by_parameter(fleet: Fleet, make_pool: MakePool) -> None:
    class Parameter:
        def __init__(self) -> None:
            self.data = Tensor(3, 3)

    class Model:
        def named_parameters(self) -> list[tuple[str, Parameter]]:
            return [("a", Parameter()), ("b", Parameter()), ("c", Parameter())]

    sims = fleet(2)
    transport = Recorded()
    pool = make_pool(sims, weight_transport=transport)
    pool.init_communicator("cuda:1")
    pool.update_model_params(Model())
    pool.reset_prefix_cache()
    assert received(sims, "update_named_param") == [3, 3]
    assert [backends for _, backends in transport.sent] == [[sim.name for sim in sims]] * 3
    assert all(isinstance(tensor, Tensor) for tensor, _ in transport.sent)


def test_servers_on_one_host_get_ports_of_their_own(make_pool: MakePool) -> None:
    servers, transport = Servers(world_size=2), Recorded()
    urls = ["http://10.0.0.1:8000", "http://10.0.0.1:8001", "http://10.0.0.2:8000"]
    pool = make_pool(urls, transport=httpx.MockTransport(servers), weight_transport=transport, group_port=40000)
    pool.init_communicator("cuda:0")
    bodies = servers.at("/init_communicator/")
    assert {netloc: body["port"] for netloc, body in bodies.items()} == {
        "10.0.0.1:8000": 40000,
        "10.0.0.1:8001": 40001,
        "10.0.0.2:8000": 40000,
    }
    for body in bodies.values():
        assert (body["host"], body["world_size"], body["client_device_uuid"]) == ("0.0.0.0", 3, "uuid of cuda:0")
    assert [(m.host, m.port, m.world_size, m.rank) for m in transport.members] == [
        ("10.0.0.1", 40000, 3, 2),
        ("10.0.0.1", 40001, 3, 2),
        ("10.0.0.2", 40000, 3, 2),
    ]
    pool.update_named_param("layer.weight", Tensor(4, 2))
    assert (
        list(servers.at("/update_named_param/").values())
        == [{"name": "layer.weight", "dtype": "torch.float32", "shape": [4, 2]}] * 3
    )


def test_a_parameter_is_announced_to_all_servers_at_once(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(3)
    pool = make_pool(sims)
    pool.init_communicator()
    for sim in sims:
        sim.faults("slow", seconds=0.4, endpoints=["update_named_param"])
    started = time.monotonic()
    pool.update_named_param("a", Tensor())
    assert time.monotonic() - started < 0.8
    pool.reset_prefix_cache()


def test_a_generation_of_the_same_thread_ends_an_update(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.init_communicator()
    pool.update_named_param("a", Tensor())
    assert number(pool) == 0
    assert pool.generate(PROMPTS) == ask(sims[0], "generate", prompts=PROMPTS)
    assert number(pool) == 1
    assert control_calls(sims[0])[-3:-1] == ["reset_prefix_cache", "generate"]


def test_a_generation_of_another_thread_waits_for_the_end_of_an_update(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.init_communicator()
    pool.update_named_param("a", Tensor())
    assert "weight update v1 is under way" in str(pool.statistics().gate)
    assert "weight update v1 is under way" in repr(pool)
    rollout = background(pool.generate, PROMPTS)
    eventually(lambda: pool.statistics().waiting == 1)
    pool.update_named_param("b", Tensor())
    assert not rollout.done()
    assert received(sims) == [0, 0]
    pool.reset_prefix_cache()
    assert rollout.result() == ask(sims[0], "generate", prompts=PROMPTS)


def test_an_update_begins_when_the_requests_that_are_out_have_ended(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.init_communicator()
    before = ask(sims[0], "generate", prompts=PROMPTS)
    for sim in sims:
        sim.faults("slow", seconds=0.4, endpoints=["generate"])
    rollout = background(pool.generate, PROMPTS)
    eventually(lambda: all(sim.state()["in_flight"] for sim in sims))
    pool.update_named_param("a", Tensor())
    assert rollout.done()
    assert rollout.result() == before
    pool.reset_prefix_cache()


def test_an_update_that_cannot_begin_in_time_is_an_error_and_changes_nothing(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = fleet(2)
    pool = make_pool(sims, drain_timeout=0.2)
    pool.init_communicator()
    sims[0].faults("slow", seconds=0.8, endpoints=["generate"])
    rollout = background(pool.generate, PROMPTS)
    eventually(lambda: sims[0].state()["in_flight"])
    with pytest.raises(WeightSyncError, match="drain_timeout") as caught:
        pool.update_named_param("a", Tensor())
    assert list(caught.value.results) == [sims[0].url]
    assert len(rollout.result()["prompt_ids"]) == 12
    assert (pool.statistics().gate, versions(pool)) == (None, [0, 0])
    assert received(sims, "update_named_param") == [0, 0]


def test_resetting_the_caches_without_an_update_reaches_all_and_tells_of_failures(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.reset_prefix_cache()
    assert received(sims, "reset_prefix_cache") == [1, 1]
    assert number(pool) == 0
    sims[1].faults("false_reset", times=1)
    with pytest.raises(ControlError, match="False") as caught:
        pool.reset_prefix_cache()
    assert str(caught.value.results[sims[0].url]) == "succeeded"
    pool.generate(PROMPTS)


# Servers that fail in it


@pytest.mark.parametrize(
    ("endpoint", "fault"),
    [
        ("update_named_param", {"kind": "status", "status": 500}),
        ("update_named_param", {"kind": "reset", "after_bytes": -1}),
        ("reset_prefix_cache", {"kind": "status", "status": 503}),
        ("reset_prefix_cache", {"kind": "false_reset"}),
        ("update_named_param", {"kind": "hang"}),
        ("reset_prefix_cache", {"kind": "dead_worker"}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["kind"],
)
def test_a_server_that_fails_in_an_update_drops_out_and_the_others_go_on(
    fleet: Fleet, make_pool: MakePool, endpoint: str, fault: dict[str, Any]
) -> None:
    sims = fleet(2)
    pool = make_pool(sims, control_timeout=0.3)
    pool.init_communicator()
    sims[1].faults(**fault, endpoints=[endpoint])
    update(pool, "a", "b")
    assert versions(pool) == [1, None]
    assert received(sims, "update_named_param")[1] == (1 if endpoint == "update_named_param" else 2)
    assert pool.generate(PROMPTS) == ask(sims[0], "generate", prompts=PROMPTS)
    assert received(sims)[1] == 0
    assert "out of sync" in reasons(pool)[1] or "is stuck" in reasons(pool)[1]


def test_a_server_whose_control_call_does_not_return_takes_part_in_nothing_until_it_does(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(2)
    pool = make_pool(sims, control_timeout=0.3)
    pool.init_communicator()
    sims[1].faults("hang", endpoints=["update_named_param"])
    update(pool)
    assert reasons(pool)[1] == "is stuck: /update_named_param/ has not returned"
    pool.init_communicator()
    assert received(sims, "init_communicator") == [2, 1]
    sims[1].clear_faults()
    eventually(lambda: "out of sync" in reasons(pool)[1])
    pool.init_communicator()
    update(pool)
    assert versions(pool) == [2, 2]


def test_with_too_few_servers_left_an_update_fails_and_nobody_serves_before_a_whole_one(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(2)
    pool = make_pool(sims, min_backends=2, backend_wait_seconds=30)
    pool.init_communicator()
    pool.update_named_param("a", Tensor())
    sims[1].faults("status", status=500, endpoints=["update_named_param"], times=1)
    with pytest.raises(WeightSyncError, match="v1 ended after 1 parameters") as caught:
        pool.update_named_param("b", Tensor())
    assert str(caught.value.results[sims[0].url]) == "succeeded"
    assert "500" in str(caught.value.results[sims[1].url])
    assert pool.statistics().gate is None
    assert number(pool) == 0
    started = time.monotonic()
    with pytest.raises(NoBackendAvailableError, match="out of sync"):
        pool.generate(PROMPTS)
    assert time.monotonic() - started < 1, "waiting cannot help here"
    pool.init_communicator()
    update(pool, "a", "b")
    assert versions(pool) == [1, 1]
    assert len(pool.generate(PROMPTS)["prompt_ids"]) == 12


def test_a_transport_that_fails_leaves_everybody_out_of_sync(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims, weight_transport=Recorded(raises_at=2))
    pool.init_communicator()
    pool.update_named_param("a", Tensor())
    with pytest.raises(Exception, match="unhandled system error"):
        pool.update_named_param("b", Tensor())
    assert pool.statistics().gate is None
    with pytest.raises(NoBackendAvailableError, match="out of sync"):
        pool.generate(PROMPTS)
    assert received(sims) == [0, 0]


class Failing(Recorded):
    """A transport that cannot reach some backends, when it joins or from the n-th tensor on."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.lost: dict[str, str] = {}
        self.at = at

    def open(self, members: Sequence[GroupMember], device: Any) -> None:
        super().open(members, device)
        self._lose(0, [member.backend for member in members])

    def broadcast(self, tensor: Any, backends: Sequence[str]) -> None:
        super().broadcast(tensor, backends)
        self._lose(len(self.sent), backends)

    def _lose(self, count: int, backends: Sequence[str]) -> None:
        lost = {name: reason for name, reason in self.lost.items() if name in backends}
        if lost and count >= self.at:
            raise TransportError(lost)


def test_a_server_that_the_transport_cannot_reach_drops_out_and_the_others_go_on(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(3)
    transport = Failing(at=2)
    pool = make_pool(sims, weight_transport=transport)
    pool.init_communicator()
    transport.lost = {sims[1].name: "connection closed by peer"}
    update(pool, "a", "b", "c")
    assert [set(backends) - {sims[1].name} == set(backends) for _, backends in transport.sent] == [False, False, True]
    assert versions(pool) == [1, None, 1]
    assert "connection closed by peer" in reasons(pool)[1]
    assert pool.generate(PROMPTS) == ask(sims[0], "generate", prompts=PROMPTS)
    assert received(sims)[1] == 0
    transport.lost = {}
    update(pool, "a", "b", "c")
    assert versions(pool) == [2, 2, 2]
    assert received(sims, "init_communicator") == [1, 2, 1]


def test_a_server_whose_group_cannot_be_joined_takes_no_part_and_the_others_do(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(2)
    transport = Failing(at=0)
    transport.lost = {sims[1].name: "no rendezvous"}
    pool = make_pool(sims, weight_transport=transport)
    pool.init_communicator()
    assert pool._pool.weights.group == [sims[0].name]
    update(pool)
    assert versions(pool)[0] == 1
    assert received(sims, "update_named_param") == [1, 0]


def test_an_update_that_is_broken_off_publishes_nothing(fleet: Fleet) -> None:
    sims = fleet(2)

    async def main() -> None:
        async with AsyncVLLMClientPool([sim.url for sim in sims], config=quick()) as pool:
            await pool.init_communicator()
            await pool.update_named_param("a", Tensor())
            sims[1].faults("hang", endpoints=["update_named_param"])
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await pool.update_named_param("b", Tensor())
            sims[1].clear_faults()
            with pytest.raises(NoBackendAvailableError, match="out of sync"):
                await pool.generate(PROMPTS)
            assert pool.statistics().gate is None

    asyncio.run(main())
    assert received(sims) == [0, 0]


def test_an_abandoned_update_opens_the_gate_with_its_servers_out_of_sync(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = fleet(2)
    pool = make_pool(sims, update_idle_timeout=0.3)
    pool.init_communicator()
    background(pool.update_named_param, "a", Tensor()).result()
    assert pool.statistics().gate is not None
    eventually(lambda: pool.statistics().gate is None)
    assert all("was abandoned: no control call for 0.3 s" in reason for reason in reasons(pool))
    with pytest.raises(NoBackendAvailableError, match="abandoned"):
        pool.generate(PROMPTS)
    update(pool, "a")
    assert versions(pool) == [1, 1]
    assert len(pool.generate(PROMPTS)["prompt_ids"]) == 12


def test_without_a_communicator_there_is_no_update(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    with pytest.raises(WeightSyncError, match="init_communicator"):
        pool.update_named_param("a", Tensor())
    assert received(sims, "update_named_param") == [0, 0]
    assert len(pool.generate(PROMPTS)["prompt_ids"]) == 12


# The fence


def test_a_server_that_restarted_after_an_update_takes_no_request_until_a_whole_one_has_reached_it(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(3)
    pool = make_pool(sims)
    pool.init_communicator()
    update(pool)
    sims[2].kill()
    eventually(lambda: pool.statistics().backends[2].health == "down")
    sims[2].restart()
    eventually(lambda: pool.statistics().backends[2].health == "up")
    assert "out of sync" in reasons(pool)[2]
    fresh = ask(sims[0], "generate", prompts=PROMPTS)
    for _ in range(3):
        assert pool.generate(PROMPTS) == fresh
    assert received(sims[2:]) == [0]
    update(pool)  # it has no communicator, so it is given one first
    assert received(sims, "init_communicator") == [1, 1, 1]
    assert versions(pool) == [2, 2, 2]
    pool.generate(PROMPTS)
    assert received(sims[2:]) == [1]


def test_an_update_that_lacks_a_name_of_an_earlier_one_is_no_whole_one_for_a_server_that_missed_that(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.init_communicator()
    update(pool, "a", "b")
    sims[1].kill()
    eventually(lambda: pool.statistics().backends[1].health == "down")
    sims[1].restart()
    eventually(lambda: pool.statistics().backends[1].health == "up")
    pool.init_communicator()
    update(pool, "a")
    assert versions(pool) == [2, None]
    update(pool, "b", "a")
    assert versions(pool) == [3, 3]


def test_a_server_that_restarts_in_the_middle_of_an_update_is_not_published(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.init_communicator()
    pool.update_named_param("a", Tensor())
    sims[1].kill()
    eventually(lambda: pool.statistics().backends[1].health == "down")
    sims[1].restart()
    eventually(lambda: pool.statistics().backends[1].health == "up")
    pool.reset_prefix_cache()
    assert versions(pool) == [1, None]
    assert pool.generate(PROMPTS) == ask(sims[0], "generate", prompts=PROMPTS)


def test_a_restart_between_two_probes_is_noticed(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims, health_interval=30)
    pool.init_communicator()
    update(pool)
    sims[1].kill()
    sims[1].restart()
    eventually(lambda: "out of sync" in reasons(pool)[1])
    assert pool.generate(PROMPTS) == ask(sims[0], "generate", prompts=PROMPTS)


def test_a_restart_before_the_first_update_is_no_reason_to_wait(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    sims[1].kill()
    eventually(lambda: pool.statistics().backends[1].health == "down")
    sims[1].restart()
    eventually(lambda: pool.statistics().backends[1].eligible)
    pool.generate(PROMPTS)
    assert received(sims) == [1, 1]


def test_a_server_that_is_added_after_an_update_waits_for_the_next(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims[:1])
    pool.init_communicator()
    update(pool)
    pool.add_backend(sims[1].url)
    assert "joined after the last update" in reasons(pool)[1]
    pool.generate(PROMPTS)
    assert received(sims) == [1, 0]
    pool.init_communicator()
    update(pool)
    pool.generate(PROMPTS)
    assert received(sims) == [2, 1]


def test_a_server_that_is_added_during_an_update_waits_for_the_next(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims[:1])
    pool.init_communicator()
    pool.update_named_param("a", Tensor())
    pool.add_backend(sims[1].url)
    pool.reset_prefix_cache()
    pool.generate(PROMPTS)
    assert received(sims) == [1, 0]


def test_only_servers_of_the_required_model_version_serve_until_the_first_update(
    fleet: Fleet, make_pool: MakePool
) -> None:
    with SimProcess(model_version="step-7") as versioned:
        sims = [*fleet(1), versioned]
        pool = make_pool(sims, required_model_version="step-7")
        assert [b.model_version for b in pool.statistics().backends] == [None, "step-7"]
        pool.generate(PROMPTS)
        assert received(sims) == [0, 1]
        assert reasons(pool) == ["reports model version None, required is 'step-7'", ""]
        pool.init_communicator()
        update(pool)
        pool.generate(PROMPTS)
        assert received(sims) == [1, 2]


def test_rollouts_that_go_on_through_updates_and_deaths_never_see_stale_weights(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    """Whatever another thread's call returns was sampled from a version that was in force while it ran."""
    sims = fleet(3)
    pool = make_pool(sims)
    pool.init_communicator()
    ended = False

    def roll_out() -> list[tuple[int, list[Any], int]]:
        seen = []
        while not ended:
            before = number(pool)
            seen.append((before, pool.generate(PROMPTS)["completion_ids"], number(pool)))
        return seen

    published = [ask(sims[0], "generate", prompts=PROMPTS)["completion_ids"]]
    rollouts = background(roll_out)
    try:
        for step in range(4):
            if step == 2:
                sims[2].kill()
                sims[2].restart(wait=False)
            update(pool, "a", "b")
            # Asked directly, beside the rollouts: their simulated answers do not depend on each other.
            published.append(ask(sims[0], "generate", prompts=PROMPTS)["completion_ids"])
    finally:
        ended = True
    for before, completions, after in rollouts.result():
        for i, completion in enumerate(completions):
            assert before <= [version[i] for version in published].index(completion) <= after
    assert versions(pool)[:2] == [4, 4]


def test_a_call_that_is_between_two_rounds_of_fail_over_is_out_as_well(
    fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    """One server would have answered it from one version of the weights."""
    sims = fleet(2)
    pool = make_pool(sims, backoff_seconds=1.0)
    pool.init_communicator()
    before = ask(sims[0], "generate", prompts=PROMPTS)
    sims[1].faults("status", status=502, endpoints=["generate"], times=1)
    rollout = background(pool.generate, PROMPTS)
    eventually(lambda: pool.statistics().backends[1].failures)
    update(pool)
    assert rollout.result() in (before, ask(sims[0], "generate", prompts=PROMPTS))


# Groups


def test_a_server_that_died_unnoticed_is_left_out_of_the_group(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims, health_interval=30)
    sims[1].kill()
    pool.init_communicator()
    update(pool)
    assert versions(pool)[0] == 1
    assert pool.generate(PROMPTS) == ask(sims[0], "generate", prompts=PROMPTS)


@pytest.mark.parametrize("endpoint", ["get_world_size", "close_communicator", "init_communicator"])
def test_a_server_that_fails_when_the_group_is_made_is_taken_into_the_next_update(
    fleet: Fleet, make_pool: MakePool, endpoint: str
) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    sims[1].faults("status", status=500, endpoints=[endpoint], times=1)
    pool.init_communicator()
    assert pool._pool.weights.group == [sims[0].name]
    update(pool)
    assert versions(pool) == [1, 1]
    assert received(sims, "update_named_param") == [1, 1]


def test_a_group_of_too_few_servers_is_an_error(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims, min_backends=2)
    sims[1].faults("status", status=500, endpoints=["init_communicator"], times=1)
    with pytest.raises(WeightSyncError, match="500") as caught:
        pool.init_communicator()
    assert "500" in str(caught.value.results[sims[1].url])


def test_a_communicator_can_be_made_anew(fleet: Fleet, make_pool: MakePool) -> None:
    """A worker that has one dies of a second, so the first is closed before."""
    sims = fleet(2)
    pool = make_pool(sims)
    for _ in range(3):
        pool.init_communicator()
    update(pool)
    assert not any(sim.state()["dead_worker"] for sim in sims)
    assert versions(pool) == [1, 1]


def test_closing_the_communicators_passes_over_the_dead_and_tells_of_errors(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(3)
    transport = Recorded()
    pool = make_pool(sims, weight_transport=transport)
    pool.init_communicator()
    sims[0].kill()
    pool.close_communicator()
    assert transport.closed >= 1
    assert [sim.state()["communicator"] for sim in sims[1:]] == [False, False]
    pool.close_communicator()
    pool.init_communicator()
    sims[1].faults("status", status=500, endpoints=["close_communicator"], times=1)
    with pytest.raises(ControlError, match="500"):
        pool.close_communicator()


def test_closing_the_pool_closes_the_communicators(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    with make_pool(sims) as pool:
        pool.init_communicator()
        assert all(sim.state()["communicator"] for sim in sims)
    assert not any(sim.state()["communicator"] for sim in sims)


def test_the_world_size_is_one_servers_and_all_have_to_agree(fleet: Fleet, make_pool: MakePool) -> None:
    with SimProcess(tensor_parallel_size=2, data_parallel_size=2) as big:
        sims = fleet(1)
        assert make_pool([big]).get_world_size() == 4
        with pytest.raises(BackendMismatchError, match="has 4"):
            make_pool([*sims, big]).get_world_size()
        transport = Recorded()
        make_pool([*sims, big], weight_transport=transport).init_communicator()
        assert [(m.world_size, m.rank) for m in transport.members] == [(2, 1), (5, 4)]


def test_a_real_server_is_not_told_of_tensors_that_would_never_come(make_pool: MakePool) -> None:
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = b'{"status":"ok"}' if self.path == "/health/" else b'{"world_size":1}'
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, daemon=True).start()
        pool = make_pool([f"http://127.0.0.1:{server.server_port}"])
        with pytest.raises(WeightSyncError, match="torch"):
            pool.init_communicator()
        pool.close()
        server.shutdown()
    assert set(asked) == {"/health/"}
