"""Weight updates of `vllm serve` that fail: nothing is published, nobody serves mixed weights, nothing hangs."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from conftest import eventually, quick, received
from vllm_sims import Apps, Model, Tensor, Walk, tokens, told

from trl_pool import AsyncVLLMClientPool, NoBackendAvailableError, VLLMClientPool, WeightSyncError
from trl_pool.sim import SimProcess

Fleet = Callable[..., list[SimProcess]]
MakePool = Callable[..., VLLMClientPool]
Background = Callable[..., Future[Any]]

PROMPTS = [f"prompt {i}" for i in range(8)]


@pytest.fixture
def apps() -> Apps:
    """Two servers in this process."""
    return Apps(a={}, b={})


@pytest.fixture
def pool_of() -> Iterator[Callable[..., VLLMClientPool]]:
    """`pool_of(apps, **settings)`: a pool over servers in this process with an update group, closed after the test."""
    pools = []

    def make(apps: Apps, weight_transport: Any = None, **settings: Any) -> VLLMClientPool:
        settings = {"sync_retries": 0, **settings}
        pool = VLLMClientPool(apps.urls, config=quick(**settings), transport=apps, weight_transport=weight_transport)
        pools.append(pool)
        pool.init_communicator()
        return pool

    yield make
    for pool in pools:
        pool.close()


PoolOf = Callable[..., VLLMClientPool]


def versions(pool: VLLMClientPool) -> list[int | None]:
    return [b.weight_version for b in pool.statistics().backends]


def reasons(pool: VLLMClientPool) -> list[str]:
    return [b.reason for b in pool.statistics().backends]


def number(pool: VLLMClientPool) -> int:
    return int(pool.statistics().weight_version.rpartition(":")[2])


def push(pool: VLLMClientPool, *names: str) -> None:
    walk = Walk(*names)
    pool.update_named_params(walk.metadata, iter(walk))


def calls(apps: Apps, host: str, *paths: str) -> list[str]:
    """The calls that a server has had of these, in order."""
    made = [r.url.path.removeprefix("/") for r in apps.requests if r.url.host == host]
    return [path for path in made if path in paths]


def nobody_serves(pool: VLLMClientPool, apps: Apps) -> None:
    """At once, and no server is asked."""
    asked = len(apps.asked("/v1/completions"))
    started = time.monotonic()
    with pytest.raises(NoBackendAvailableError, match="out of sync"):
        pool.generate(PROMPTS)
    assert time.monotonic() - started < 2, "waiting cannot help here"
    assert len(apps.asked("/v1/completions")) == asked
    assert pool.statistics().gate is None


def heals(pool: VLLMClientPool, apps: Apps) -> None:
    """The next whole update reaches everybody, whole, and they serve."""
    pool.update_model_params(Model())
    assert versions(pool) == [number(pool)] * len(apps.apps)
    states = [app.worker.state() for app in apps.apps.values()]
    assert {(state["whole"], state["updating"], state["weight_version"]) for state in states} == {
        (True, False, pool.statistics().weight_version)
    }
    assert len({state["weights"]["digest"] for state in states}) == 1
    assert len(pool.generate(PROMPTS)["prompt_ids"]) == 8


# A server fails


@pytest.mark.parametrize(
    ("endpoint", "kind"),
    [
        ("start_weight_update", "status"),
        ("finish_weight_update", "status"),
        ("reset_prefix_cache", "status"),
        ("reset_prefix_cache", "false_reset"),
        ("weight_info", "status"),
        ("start_weight_update", "hang"),
        ("finish_weight_update", "hang"),
        ("reset_prefix_cache", "hang"),
        ("weight_info", "hang"),
    ],
)
def test_a_server_that_fails_at_either_end_of_an_update_drops_out_and_the_other_goes_on(
    apps: Apps, pool_of: PoolOf, endpoint: str, kind: str
) -> None:
    pool, walk = pool_of(apps, control_timeout=1 if kind == "hang" else 5), Walk()
    apps.faults("b", kind, endpoints=(endpoint,), times=1)
    pool.update_named_params(walk.metadata, walk)
    assert walk.whole
    assert (number(pool), versions(pool)) == (1, [1, None])
    assert len(pool.generate(PROMPTS)["prompt_ids"]) == 8
    assert calls(apps, "b", "v1/completions") == []
    apps.release("b", pool)
    eventually(lambda: "stuck" not in reasons(pool)[1])
    assert "update v1 failed" in reasons(pool)[1]
    heals(pool, apps)


@pytest.mark.parametrize("endpoint", ["start_weight_update", "finish_weight_update"])
@pytest.mark.parametrize("method", ["update_named_params", "update_named_param", "update_model_params", "block"])
def test_an_update_that_reaches_nobody_is_an_error_that_names_each_backend(
    apps: Apps, pool_of: PoolOf, endpoint: str, method: str
) -> None:
    pool, walk = pool_of(apps), Walk()

    def block() -> None:
        with pool.weight_update():
            push(pool)

    update = {
        "update_named_params": lambda: pool.update_named_params(walk.metadata, walk),
        "update_named_param": lambda: pool.update_named_param("a", Tensor()),
        "update_model_params": lambda: pool.update_model_params(Model()),
        "block": block,
    }
    for host in apps.apps:
        apps.faults(host, "status", endpoints=(endpoint,), times=1)
    with pytest.raises(WeightSyncError, match="v1") as caught:
        update[method]()
    assert method != "update_named_params" or walk.whole
    assert {url: result.status for url, result in caught.value.results.items()} == dict.fromkeys(apps.urls, 500)
    assert all(url in str(caught.value) for url in apps.urls)
    assert (number(pool), versions(pool)) == (0, [None, None])
    nobody_serves(pool, apps)
    heals(pool, apps)


@pytest.mark.parametrize("names", [3, 40])
def test_a_server_that_fails_to_receive_ends_the_update_for_all_and_the_parameters_are_read_to_their_end(
    apps: Apps, pool_of: PoolOf, names: int
) -> None:
    pool, walk = pool_of(apps), Walk(*(f"w{i}" for i in range(names)))
    apps.faults("b", "status", endpoints=("update_weights",), times=1)
    with pytest.raises(WeightSyncError, match=r"serves again after the next whole update") as caught:
        pool.update_named_params(walk.metadata, walk)
    assert walk.whole
    said = {url: str(result) for url, result in caught.value.results.items()}
    assert said["http://a:8000"] == "took a part of it"
    assert "500" in said["http://b:8000"]
    assert (number(pool), versions(pool)) == (0, [None, None])
    nobody_serves(pool, apps)
    heals_named(pool, apps, walk)


def heals_named(pool: VLLMClientPool, apps: Apps, walk: Walk) -> None:
    """A whole update is one of every name that was ever sent."""
    again = Walk(*walk.names)
    pool.update_named_params(again.metadata, again)
    assert versions(pool) == [number(pool)] * 2
    assert all(app.worker.state()["whole"] for app in apps.apps.values())
    assert len(pool.generate(PROMPTS)["prompt_ids"]) == 8


def test_whoever_was_left_half_updated_is_healed_with_an_empty_update_before_the_next(
    apps: Apps, pool_of: PoolOf
) -> None:
    pool = pool_of(apps)
    apps.faults("b", "status", endpoints=("update_weights",), times=1)
    with pytest.raises(WeightSyncError):
        push(pool)
    apps.requests.clear()
    push(pool)
    start, finish = "start_weight_update", "finish_weight_update"
    for host in apps.apps:
        assert calls(apps, host, start, finish, "update_weights") == [
            *(finish, start, finish),
            *(start, "update_weights", finish),
        ]
    apps.requests.clear()
    push(pool)
    assert calls(apps, "a", start, finish) == [start, finish], "once is enough"


def test_a_survivor_of_a_failed_update_gives_other_tokens_until_it_is_healed(
    vllm_fleet: Fleet, make_pool: MakePool
) -> None:
    """What the simulated server makes visible: without healing, the next update would leave it torn."""
    sims = vllm_fleet(2)
    pool = make_pool(sims, sync_retries=0)
    pool.init_communicator()
    before = tokens(sims[1])
    for sim in sims:
        sim.faults("status", status=500, endpoints=["finish_weight_update"], times=1)
    with pytest.raises(WeightSyncError):
        push(pool)
    assert tokens(sims[1]) != before
    push(pool)
    assert tokens(sims[0]) == tokens(sims[1]) != before
    assert all(sim.state()["whole"] for sim in sims)
    assert [told(sim) for sim in sims] == [pool.statistics().weight_version] * 2


# It is repeated


@pytest.mark.parametrize("endpoint", ["start_weight_update", "update_weights", "finish_weight_update"])
def test_the_update_of_a_whole_model_is_repeated_over_those_that_are_left(
    apps: Apps, pool_of: PoolOf, endpoint: str
) -> None:
    pool, model = pool_of(apps, sync_retries=2), Model()
    for host in apps.apps:
        apps.faults(host, "status", endpoints=(endpoint,), times=1)
    pool.update_model_params(model)
    assert (number(pool), versions(pool)) == (1, [1, 1])
    assert model.walks == 3, "once for the metadata, twice for the tensors"
    heals(pool, apps)


def test_repetitions_are_bounded_and_the_last_error_is_raised(apps: Apps, pool_of: PoolOf) -> None:
    pool, model = pool_of(apps, sync_retries=2), Model()
    apps.faults("a", "status", endpoints=("update_weights",))
    with pytest.raises(WeightSyncError, match="500"):
        pool.update_model_params(model)
    assert model.walks == 4
    assert number(pool) == 0


def test_a_server_that_dies_in_the_middle_of_an_update_does_not_keep_the_others_from_the_next_try(
    vllm_fleet: Fleet, make_pool: MakePool
) -> None:
    sims = vllm_fleet(2)
    pool = make_pool(sims)
    pool.init_communicator()

    class Killing(Model):
        def named_parameters(self) -> Any:
            for place, pair in enumerate(super().named_parameters()):
                if self.walks == 2 and place == 1:
                    sims[1].kill()
                    eventually(lambda: pool.statistics().backends[1].health == "down")
                yield pair

    model = Killing()
    started = time.monotonic()
    pool.update_model_params(model)
    assert time.monotonic() - started < 15
    assert (number(pool), versions(pool)) == (1, [1, None])
    assert pool.generate(PROMPTS)["completion_ids"] == tokens(
        sims[0], PROMPTS, max_tokens=16, temperature=1.0, top_k=0
    )
    sims[1].restart()
    eventually(lambda: pool.statistics().backends[1].health == "up")
    assert "out of sync" in reasons(pool)[1]
    pool.update_model_params(Model())
    assert versions(pool) == [2, 2]


def test_a_server_that_restarts_in_the_middle_of_an_update_is_not_published(
    vllm_fleet: Fleet, make_pool: MakePool
) -> None:
    sims = vllm_fleet(2)
    pool = make_pool(sims)
    pool.init_communicator()
    with pool.weight_update():
        push(pool)
        sims[1].restart()
        eventually(lambda: pool._pool._dispatcher.backends[sims[1].name].incarnation > 0)
    assert (number(pool), versions(pool)) == (1, [1, None])
    assert told(sims[1]) == "default"
    pool.generate(PROMPTS)
    assert received(sims, "completions") == [1, 0]


# The caller fails


def test_an_iterator_that_raises_raises_its_own_error_and_publishes_nothing(apps: Apps, pool_of: PoolOf) -> None:
    pool, walk = pool_of(apps), Walk(raises_at=2)
    with pytest.raises(ZeroDivisionError, match="a gather failed"):
        pool.update_named_params(walk.metadata, walk)
    assert (walk.begun, walk.read) == (1, 2)
    assert (number(pool), versions(pool)) == (0, [None, None])
    assert "ZeroDivisionError" in reasons(pool)[0]
    nobody_serves(pool, apps)
    heals(pool, apps)


WRONG = {
    "another name": (("a", "x", "c"), "tensor 1 is 'x', announced was 'b'"),
    "one too many": (("a", "b", "c", "d"), "announced was 'no further tensor'"),
    "one too few": (("a", "b"), "2 tensors came, 3 were announced"),
    "none at all": ((), "0 tensors came, 3 were announced"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_tensors_that_differ_from_their_metadata_are_read_to_their_end_and_publish_nothing(
    apps: Apps, pool_of: PoolOf, wrong: str
) -> None:
    names, said = WRONG[wrong]
    pool = pool_of(apps)
    walk = Walk(*names)
    if not names:
        walk.names = ()
    with pytest.raises(ValueError, match=said):
        pool.update_named_params(Walk().metadata, walk)
    assert walk.whole or not names
    assert (number(pool), versions(pool), pool.statistics().gate) == (0, [None, None], None)
    nobody_serves(pool, apps)
    heals(pool, apps)


def test_metadata_that_make_no_sense_do_not_keep_the_parameters_from_being_read(apps: Apps, pool_of: PoolOf) -> None:
    pool, walk = pool_of(apps), Walk()
    with pytest.raises(ValueError, match="unpack"):
        pool.update_named_params([("a",)], walk)  # type: ignore[list-item]
    assert walk.whole
    assert pool.statistics().gate is None
    heals(pool, apps)


def test_a_block_that_raises_publishes_nothing_and_leaves_all_out_of_sync(apps: Apps, pool_of: PoolOf) -> None:
    pool = pool_of(apps)

    def block() -> None:
        with pool.weight_update():
            push(pool, "a")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    assert (number(pool), versions(pool)) == (0, [None, None])
    assert "ZeroDivisionError in its block" in reasons(pool)[0]
    nobody_serves(pool, apps)
    heals(pool, apps)


def test_a_failure_in_a_block_that_is_caught_there_still_fails_the_block(apps: Apps, pool_of: PoolOf) -> None:
    pool = pool_of(apps)
    apps.faults("b", "status", endpoints=("update_weights",), times=1)

    def block() -> None:
        with pool.weight_update():
            for name in "ab":
                with pytest.raises(WeightSyncError):
                    push(pool, name)

    with pytest.raises(WeightSyncError, match="no weight update under way"):
        block()
    assert number(pool) == 0
    nobody_serves(pool, apps)
    heals(pool, apps)


def test_an_update_inside_another_threads_update_is_an_error_and_hurts_neither(
    apps: Apps, pool_of: PoolOf, background: Background
) -> None:
    pool, walk = pool_of(apps), Walk()
    with pool.weight_update():
        other = background(pool.weight_update().__enter__)
        assert "inside another one" in str(other.exception())
        pool.update_named_params(walk.metadata, walk)
    assert versions(pool) == [1, 1]


def test_errors_can_be_put_off_until_the_caches_are_reset(apps: Apps, pool_of: PoolOf) -> None:
    """A trainer's own walk over its parameters, which may be collectives, comes to its end."""
    pool, walk, more = pool_of(apps), Walk(), Walk()
    apps.faults("a", "status", endpoints=("update_weights",), times=1)
    with pool.deferred_update_errors():
        pool.update_named_params(walk.metadata, walk)
        asked = len(apps.requests)
        pool.update_named_params(more.metadata, more)
        pool.update_named_param("a", Tensor())
        assert [r for r in apps.requests[asked:] if r.method == "POST"] == []
        with pytest.raises(WeightSyncError, match="500"):
            pool.reset_prefix_cache()
    assert walk.whole
    assert more.whole
    assert number(pool) == 0
    heals(pool, apps)


def test_errors_that_were_put_off_are_raised_at_the_end_at_the_latest(apps: Apps, pool_of: PoolOf) -> None:
    pool = pool_of(apps)
    apps.faults("a", "status", endpoints=("update_weights",), times=1)
    with pytest.raises(WeightSyncError, match="500"), pool.deferred_update_errors():
        push(pool)
    with pool.deferred_update_errors():
        pool.update_model_params(Model())
    assert versions(pool) == [1, 1]
    apps.faults("a", "status", endpoints=("update_weights",), times=1)
    with pytest.raises(WeightSyncError, match="500"):
        push(pool)


# Deadlines


def test_a_server_that_never_confirms_is_named_and_takes_part_in_nothing_until_it_returns(
    apps: Apps, pool_of: PoolOf
) -> None:
    pool, walk = pool_of(apps, control_timeout=0.4), Walk()
    apps.faults("b", "hang", endpoints=("update_weights",), times=1)
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"not everybody confirmed within 0.4 s") as caught:
        pool.update_named_params(walk.metadata, walk)
    assert time.monotonic() - started < 5
    assert walk.whole
    said = {url: str(result) for url, result in caught.value.results.items()}
    assert said["http://a:8000"] == "took a part of it"
    assert "has not returned from the update" in said["http://b:8000"]
    assert reasons(pool)[1] == "is stuck: /update_weights has not returned"
    apps.requests.clear()
    push(pool)
    assert versions(pool) == [1, None]
    assert calls(apps, "b", "init_weight_transfer_engine", "start_weight_update", "finish_weight_update") == []
    assert pool.get_world_size() == 1
    apps.release("b", pool)
    eventually(lambda: "out of sync" in reasons(pool)[1])
    heals(pool, apps)


def test_an_update_that_nobody_goes_on_with_expires_with_its_servers_out_of_sync(
    apps: Apps, pool_of: PoolOf, background: Background
) -> None:
    pool = pool_of(apps, update_idle_timeout=0.3)
    block = pool.weight_update()
    background(block.__enter__).result()
    assert pool.statistics().gate is not None
    eventually(lambda: pool.statistics().gate is None)
    assert all("was abandoned: no control call for 0.3 s" in reason for reason in reasons(pool))
    nobody_serves(pool, apps)
    with pytest.raises(WeightSyncError, match="may have been abandoned"):
        block.__exit__(None, None, None)
    heals(pool, apps)


# Frozen requests


def long_rollout(pool: VLLMClientPool, background: Background, sim: SimProcess) -> Future[Any]:
    """A generation that is still running when an update begins."""
    rollout = background(pool.generate, PROMPTS[:1], max_tokens=8, generation_kwargs={"ignore_eos": True})
    eventually(lambda: sim.state()["running"])
    return rollout


@pytest.mark.parametrize("how", ["fails", "expires"])
def test_frozen_requests_never_go_on_with_mixed_weights(
    vllm_fleet: Fleet, make_pool: MakePool, background: Background, how: str
) -> None:
    """They are served anew where the weights are whole. On some servers going on would even be the end of them."""
    with SimProcess(dialect="vllm", decode_ms_per_token=100, unfinished_update="fatal") as slow:
        pool = make_pool([slow], drain_timeout=0.1, sync_retries=0, update_idle_timeout=0.4)
        pool.init_communicator()
        rollout = long_rollout(pool, background, slow)
        if how == "fails":
            slow.faults("status", status=500, endpoints=["update_weights"], times=1)
            with pytest.raises(WeightSyncError, match="500"):
                push(pool)
        else:
            block = pool.weight_update()
            block.__enter__()
            eventually(lambda: pool.statistics().gate is None)
            with pytest.raises(WeightSyncError):
                block.__exit__(None, None, None)
        eventually(lambda: not slow.state()["paused"])
        if how == "fails":
            with pytest.raises(NoBackendAvailableError, match="out of sync"):
                rollout.result()
        else:
            assert isinstance(rollout.exception(), NoBackendAvailableError)
        assert slow.running
        push(pool)
        assert len(pool.generate(PROMPTS)["prompt_ids"]) == 8


# With a real group behind it


class Group:
    """A trainer's end of a group of that many servers, which hangs if not all of them listen."""

    def __init__(self, joint: Joint, world_size: int) -> None:
        self.joint, self.world_size = joint, world_size
        self.over = threading.Event()
        self.closed = False

    def broadcast(self, buffer: Any) -> None:
        if self.joint.broken or self.world_size - 1 > self.joint.listening():
            self.over.wait(20)
            raise ConnectionError("the group is over")
        self.joint.sent.append((threading.current_thread().name, buffer, self.world_size))

    def abort(self) -> None:
        self.over.set()

    def close(self) -> None:
        self.over.set()
        self.closed = True


class Packer:
    """One buffer for each tensor."""

    def add(self, name: str, tensor: Any) -> Any:
        return name

    def flush(self) -> None:
        return None


class Joint:
    """A joint transport that knows which servers have been told to receive."""

    name = "gloo"
    needs_group = True

    def __init__(self, apps: Apps) -> None:
        self.apps = apps
        self.groups: list[Group] = []
        self.sent: list[tuple[str, Any, int]] = []
        self.broken = False
        self.unable = 0

    def listening(self) -> int:
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:
            asked = {r.url.host for r in self.apps.asked("/update_weights")} - self.apps.down
            if len(asked) == len(self.apps.apps):
                break
            time.sleep(0.01)
        return len(asked)

    def packer(self, metadata: Sequence[Any], buffer_size_bytes: int, device: Any) -> Packer:
        return Packer()

    def open(self, listener: socket.socket, world_size: int, device: Any, timeout: float) -> Group:
        listener.close()
        if self.unable == world_size:
            raise TimeoutError(f"only some of {world_size - 1} servers came")
        self.groups.append(Group(self, world_size))
        return self.groups[-1]


def test_buffers_are_sent_once_for_all_servers_on_a_thread_of_their_own(apps: Apps, pool_of: PoolOf) -> None:
    joint = Joint(apps)
    pool, walk = pool_of(apps, joint), Walk()
    pool.update_named_params(walk.metadata, walk)
    assert joint.sent == [("trl-pool-weights", name, 3) for name in walk.names]
    assert versions(pool) == [1, 1]


def test_a_server_that_cannot_start_is_taken_out_of_the_group_before_anything_is_sent(
    apps: Apps, pool_of: PoolOf
) -> None:
    """In it, it would be waited for."""
    joint = Joint(apps)
    pool = pool_of(apps, joint)
    apps.faults("b", "status", endpoints=("start_weight_update",), times=1)
    joint.listening = lambda: 1  # type: ignore[method-assign]
    push(pool)
    assert versions(pool) == [1, None]
    assert {size for _, _, size in joint.sent} == {2}
    assert [group.closed for group in joint.groups] == [True, False]


def test_a_server_that_was_removed_is_taken_out_of_the_group(apps: Apps, pool_of: PoolOf) -> None:
    joint = Joint(apps)
    pool = pool_of(apps, joint)
    pool.remove_backend("b:8000")
    joint.listening = lambda: 1  # type: ignore[method-assign]
    push(pool)
    assert {size for _, _, size in joint.sent} == {2}


def test_a_server_that_drops_out_at_the_end_and_is_gone_is_taken_out_of_the_group(apps: Apps, pool_of: PoolOf) -> None:
    joint = Joint(apps)
    pool = pool_of(apps, joint, control_timeout=1)
    apps.faults("b", "hang", endpoints=("finish_weight_update",), times=1)
    push(pool)
    assert versions(pool) == [1, None]
    joint.listening = lambda: 1  # type: ignore[method-assign]
    push(pool)
    assert {size for _, _, size in joint.sent} == {3, 2}
    apps.release("b", pool)


def test_those_that_were_ready_make_a_group_without_the_one_that_was_not(apps: Apps, pool_of: PoolOf) -> None:
    joint = Joint(apps)
    joint.unable = 3
    apps.faults("b", "status", endpoints=("init_weight_transfer_engine",), times=1)
    pool = pool_of(apps, joint)
    assert pool._pool.weights.group == ["a:8000"]
    joint.listening = lambda: 2  # type: ignore[method-assign]
    joint.unable = 0
    push(pool)
    assert versions(pool) == [1, 1]


def test_a_trainer_that_cannot_join_is_the_fault_of_no_server(apps: Apps, pool_of: PoolOf) -> None:
    joint = Joint(apps)
    joint.unable = 3
    with pytest.raises(WeightSyncError, match=r"did not come together.*only some of 2 servers came"):
        pool_of(apps, joint)


def test_a_broadcast_that_hangs_ends_within_its_deadline_and_the_next_update_has_a_new_group(
    apps: Apps, pool_of: PoolOf
) -> None:
    joint = Joint(apps)
    pool, walk = pool_of(apps, joint, control_timeout=0.5), Walk(*(f"w{i}" for i in range(20)))
    joint.broken = True
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"no buffer arrived for 0\.5 s"):
        pool.update_named_params(walk.metadata, walk)
    assert time.monotonic() - started < 6
    assert walk.whole
    assert joint.groups[0].over.is_set()
    joint.broken = False
    heals_named(pool, apps, walk)
    assert len(joint.groups) == 2
    assert joint.groups[0].closed


# The asynchronous twin


@pytest.mark.parametrize("how", ["receive", "finish", "few", "raises", "start", "block"])
def test_the_asynchronous_class_fails_in_the_same_ways(apps: Apps, how: str) -> None:
    walk = Walk(*(("a", "b") if how == "few" else ()), raises_at=1 if how == "raises" else None)
    endpoint = {"receive": "update_weights", "finish": "finish_weight_update", "start": "start_weight_update"}

    async def main() -> None:
        config = quick(sync_retries=0)
        async with AsyncVLLMClientPool(apps.urls, config=config, transport=apps) as pool:
            await pool.init_communicator()
            for host in apps.apps:
                if how in endpoint:
                    apps.faults(host, "status", endpoints=(endpoint[how],), times=1)
            error = {"few": ValueError, "raises": ZeroDivisionError, "block": ZeroDivisionError}

            async def block() -> None:
                async with pool.weight_update():
                    await pool.update_named_params(walk.metadata, walk)
                    raise ZeroDivisionError

            with pytest.raises(error.get(how, WeightSyncError)) as caught:
                await (block() if how == "block" else pool.update_named_params(Walk().metadata, walk))
            if how in endpoint:
                assert isinstance(caught.value, WeightSyncError)
                assert any(result.status == 500 for result in caught.value.results.values())
            assert how == "raises" or walk.whole
            assert [b.weight_version for b in pool.statistics().backends] == [None, None]
            assert pool.statistics().gate is None
            with pytest.raises(NoBackendAvailableError, match="out of sync"):
                await pool.generate(PROMPTS)
            await pool.update_model_params(Model())
            assert [b.weight_version for b in pool.statistics().backends] == [1, 1]
            assert all(app.worker.state()["whole"] for app in apps.apps.values())

    asyncio.run(main())


def test_an_update_that_is_cancelled_publishes_nothing_and_the_next_one_heals(apps: Apps) -> None:
    async def main() -> None:
        config = quick(control_timeout=0.5)
        async with AsyncVLLMClientPool(apps.urls, config=config, transport=apps) as pool:
            await pool.init_communicator()
            apps.faults("b", "hang", endpoints=("update_weights",), times=1)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await pool.update_model_params(Model())
            assert pool.statistics().gate is None
            with pytest.raises(NoBackendAvailableError, match=r"out of sync|stuck"):
                await pool.generate(PROMPTS)
            apps.apps["b"].gate.release()
            await asyncio.to_thread(eventually, lambda: not pool._dispatcher.backends["b:8000"].stuck)
            await pool.update_model_params(Model())
            assert [b.weight_version for b in pool.statistics().backends] == [1, 1]

    asyncio.run(main())
