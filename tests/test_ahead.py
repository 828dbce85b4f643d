"""A few announcements go ahead of their tensors, in order, and nobody is left waiting for what was announced."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import httpx
import pytest
from conftest import Tensor, ask, eventually, received

from trl_pool import NoBackendAvailableError, PoolClosedError, VLLMClientPool, WeightSyncError
from trl_pool.sim import SimProcess
from trl_pool.weights import GroupMember
from trl_pool.weights.ahead import AHEAD
from trl_pool.weights.transport import AheadTransport, TransportError, WeightTransport

Fleet = Callable[[int], list[SimProcess]]
MakePool = Callable[..., VLLMClientPool]
Background = Callable[..., Future[Any]]

TENSORS = 12
NAMES = [f"layer.{i}" for i in range(TENSORS)]
METADATA = [(name, "float32", [2, 3]) for name in NAMES]
ANNOUNCE = "/update_named_param/"


@pytest.fixture
def fleet(fleet: Callable[..., list[SimProcess]]) -> Fleet:
    """Nothing here depends on which weights the servers have at first, as long as they are the same."""
    return partial(fleet, first_weights=False)


class Recorded:
    """A weight transport that moves nothing, and calls `then(n)` in the broadcast of the n-th tensor."""

    def __init__(self, then: Callable[[int], None] = lambda index: None) -> None:
        self.sent: list[list[str]] = []
        self.filled: list[tuple[str, list[int], list[str]]] = []
        self.given_up: set[str] = set()
        self.let_go = threading.Event()
        self.then = then

    def device_uuid(self, device: Any) -> str:
        return "uuid"

    def open(self, members: Sequence[GroupMember], device: Any) -> None:
        self.given_up.clear()

    def broadcast(self, tensor: Any, backends: Sequence[str]) -> None:
        self.sent.append(list(backends))
        self.then(len(self.sent) - 1)

    def fill(self, dtype: str, shape: Sequence[int], backends: Sequence[str]) -> None:
        self.filled.append((dtype, list(shape), list(backends)))

    def give_up(self, backends: Sequence[str]) -> None:
        self.given_up.update(backends)
        self.let_go.set()

    def close(self) -> None:
        pass

    def tensors_of(self, name: str) -> int:
        """How many tensors that backend was sent."""
        return sum(name in backends for backends in self.sent)

    def fills_of(self, name: str) -> int:
        """How many tensors of no meaning that backend was sent."""
        return sum(name in backends for _, _, backends in self.filled)


class NothingAhead:
    """The same without what announcements ahead need."""

    def __init__(self, then: Callable[[int], None]) -> None:
        inner = Recorded(then)
        self.device_uuid, self.open, self.broadcast = inner.device_uuid, inner.open, inner.broadcast
        self.close = inner.close


class Servers:
    """A mocked fleet that remembers what each server was told of, and answers 500 to a name at a host."""

    def __init__(self, fails: tuple[str, str] | None = None) -> None:
        self.told: dict[str, list[str]] = {}
        self.resets: list[str] = []
        self.fails = fails

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path, host = request.url.path, request.url.host
        if path in ("/health/", "/get_world_size/"):
            return httpx.Response(200, json={"status": "ok"} if path == "/health/" else {"world_size": 1})
        if path == ANNOUNCE:
            body = json.loads(request.content)
            assert (body["dtype"], body["shape"]) == ("torch.float32", [2, 3])
            self.told.setdefault(host, []).append(body["name"])
            if (host, body["name"]) == self.fails:
                return httpx.Response(500, text="no memory")
        if path == "/reset_prefix_cache/":
            self.resets.append(host)
        return httpx.Response(200, json={"message": "status: True"})


def walk(then: Callable[[int], Any] = lambda index: None) -> Iterator[tuple[str, Tensor]]:
    """The parameters; `then(n)` is called before the n-th is given."""
    for index, name in enumerate(NAMES):
        then(index)
        yield name, Tensor()


def fails_at(place: int) -> Callable[[int], None]:
    def then(index: int) -> None:
        if index == place:
            raise ZeroDivisionError("a gather failed")

    return then


def versions(pool: VLLMClientPool) -> list[int | None]:
    return [b.weight_version for b in pool.statistics().backends]


def mocked(make_pool: MakePool, servers: Servers, transport: WeightTransport, **settings: Any) -> VLLMClientPool:
    """A pool over three mocked servers, n0 to n2, with a group each."""
    pool = make_pool(
        [f"http://n{i}:8000" for i in range(3)],
        transport=httpx.MockTransport(servers),
        weight_transport=transport,
        **settings,
    )
    pool.init_communicator()
    return pool


# Ahead, but not too far


def test_a_few_tensors_are_announced_while_one_travels_and_no_more(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(3)
    ahead: list[int] = []

    def then(index: int) -> None:
        told = eventually(lambda: [n >= min(index + 1 + AHEAD, TENSORS) for n in counts()] == [True] * 3 and counts())
        ahead.extend(n - index - 1 for n in told)

    def counts() -> list[int]:
        return received(sims, "update_named_param")

    pool = make_pool(sims, weight_transport=Recorded(then))
    pool.init_communicator()
    pool.update_named_params(METADATA, walk())
    assert max(ahead) == AHEAD
    assert versions(pool) == [1, 1, 1]


def test_each_server_is_told_of_all_tensors_in_their_order(make_pool: MakePool) -> None:
    servers, transport = Servers(), Recorded()
    pool = mocked(make_pool, servers, transport)
    for _ in range(2):
        pool.update_named_params(METADATA, walk())
    assert servers.told == {f"n{i}": NAMES * 2 for i in range(3)}
    assert transport.sent == [["n0:8000", "n1:8000", "n2:8000"]] * 2 * TENSORS
    assert transport.filled == []


def test_a_server_has_never_two_announcements_to_answer(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.init_communicator()
    sims[1].faults("slow", seconds=0.02, endpoints=["update_named_param"])
    pool.update_named_params(METADATA, walk())
    for sim in sims:
        counted = sim.state()["endpoints"]["update_named_param"]
        assert (counted["received"], counted["max_in_flight"]) == (TENSORS, 1)


def test_a_slow_server_does_not_hold_up_what_others_are_told(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    transport = Recorded()
    pool = make_pool(sims, weight_transport=transport)
    pool.init_communicator()
    sims[1].faults("hang", endpoints=["update_named_param"], times=1)

    def then(index: int) -> None:
        if index == 0:
            eventually(lambda: received(sims, "update_named_param") == [AHEAD, 1])
            sims[1].clear_faults()

    pool.update_named_params(METADATA, walk(then))
    assert versions(pool) == [1, 1]


def test_a_transport_that_cannot_make_up_for_tensors_has_none_announced_ahead(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(2)
    seen: list[list[int]] = []
    transport = NothingAhead(lambda index: seen.append(received(sims, "update_named_param")))
    assert not isinstance(transport, AheadTransport)
    pool = make_pool(sims, weight_transport=transport)
    pool.init_communicator()
    pool.update_named_params(METADATA, walk())
    assert seen == [[n + 1, n + 1] for n in range(TENSORS)]
    assert versions(pool) == [1, 1]


def test_a_model_goes_the_same_way_and_the_reset_of_the_caches_ends_its_update(make_pool: MakePool) -> None:
    class Parameter:
        data = Tensor()

    class Model:
        def named_parameters(self) -> list[tuple[str, Parameter]]:
            return [(name, Parameter()) for name in NAMES]

    servers, transport = Servers(), Recorded()
    transport.then = lambda index: eventually(
        lambda: all(len(told) >= min(index + 1 + AHEAD, TENSORS) for told in servers.told.values())
    )
    pool = mocked(make_pool, servers, transport)
    pool.update_model_params(Model())
    assert servers.told == {f"n{i}": NAMES for i in range(3)}
    assert servers.resets == []
    pool.reset_prefix_cache()
    assert versions(pool) == [1, 1, 1]


def test_several_runs_in_one_block_are_one_version(make_pool: MakePool) -> None:
    servers = Servers()
    pool = mocked(make_pool, servers, Recorded())
    with pool.weight_update():
        pool.update_named_params(METADATA, walk())
        pool.update_named_param("one more", Tensor())
        pool.update_named_params(METADATA, walk())
    assert servers.told["n0"] == [*NAMES, "one more", *NAMES]
    assert versions(pool) == [1, 1, 1]


# Servers that fail


@pytest.mark.parametrize("place", [0, 5, TENSORS - 1])
def test_a_server_that_fails_in_an_announcement_takes_the_tensors_before_it_and_drops_out(
    make_pool: MakePool, place: int
) -> None:
    servers, transport = Servers(fails=("n1", NAMES[place])), Recorded()
    pool = mocked(make_pool, servers, transport)
    pool.update_named_params(METADATA, walk())
    assert [transport.tensors_of(f"n{i}:8000") for i in range(3)] == [TENSORS, place, TENSORS]
    assert servers.told["n1"] == NAMES[: place + 1]
    assert versions(pool) == [1, None, 1]
    assert "500" in pool.statistics().backends[1].reason
    assert (transport.filled, transport.given_up) == ([], set())
    servers.fails = None
    pool.update_named_params(METADATA, walk())
    assert versions(pool) == [2, 2, 2]


def test_a_server_that_dies_while_a_tensor_travels_is_given_up_and_the_others_go_on(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(3)
    transport = Recorded()
    dead = sims[1].name

    def then(index: int) -> None:
        if index == 3:
            sims[1].kill()
            assert transport.let_go.wait(10), "a broadcast to the dead waits as long as it may"
            raise TransportError({dead: "connection closed"})

    transport.then = then
    pool = make_pool(sims, weight_transport=transport, control_timeout=30)
    pool.init_communicator()
    pool.update_named_params(METADATA, walk())
    assert transport.given_up == {dead}
    assert transport.tensors_of(dead) == 4
    assert [transport.tensors_of(sim.name) for sim in (sims[0], sims[2])] == [TENSORS, TENSORS]
    assert versions(pool) == [1, None, 1]
    assert transport.filled == []


def test_a_server_that_the_transport_loses_is_told_of_nothing_more(make_pool: MakePool) -> None:
    servers, transport = Servers(), Recorded()

    def then(index: int) -> None:
        if index == 2:
            raise TransportError({"n2:8000": "connection closed by peer"})

    transport.then = then
    pool = mocked(make_pool, servers, transport)
    pool.update_named_params(METADATA, walk())
    assert versions(pool) == [1, 1, None]
    assert "connection closed by peer" in pool.statistics().backends[2].reason
    assert len(servers.told["n2"]) <= 3 + AHEAD
    assert transport.tensors_of("n2:8000") == 3
    eventually(lambda: transport.given_up == {"n2:8000"})


def test_with_too_few_servers_left_nobody_is_left_waiting(make_pool: MakePool) -> None:
    servers, transport = Servers(fails=("n1", NAMES[5])), Recorded()
    pool = mocked(make_pool, servers, transport, min_backends=3)
    steps: list[int] = []
    with pytest.raises(WeightSyncError, match="v1 ended after 5 parameters"):
        pool.update_named_params(METADATA, walk(steps.append))
    assert steps == list(range(TENSORS)), "the iterator is read to its end"
    assert versions(pool) == [None, None, None]
    for i in (0, 2):
        assert len(servers.told[f"n{i}"]) == 5 + transport.fills_of(f"n{i}:8000")
    assert transport.fills_of("n1:8000") == 0
    assert pool.statistics().gate is None


def test_a_transport_that_hangs_costs_the_update_and_its_groups_are_given_up(make_pool: MakePool) -> None:
    servers, transport = Servers(), Recorded()
    transport.then = lambda index: None if index < 2 else transport.let_go.wait(10) and None
    pool = mocked(make_pool, servers, transport, control_timeout=0.3)
    with pytest.raises(TimeoutError, match="did not return within"):
        pool.update_named_params(METADATA, walk())
    eventually(lambda: transport.given_up == {"n0:8000", "n1:8000", "n2:8000"})
    assert versions(pool) == [None, None, None]


# Tensors that do not come


def test_an_iterator_that_raises_leaves_no_worker_waiting_and_the_next_update_is_whole(make_pool: MakePool) -> None:
    servers, transport = Servers(), Recorded()
    pool = mocked(make_pool, servers, transport)
    with pytest.raises(ZeroDivisionError):
        pool.update_named_params(METADATA, walk(fails_at(4)))
    for i in range(3):
        told = len(servers.told[f"n{i}"])
        assert told >= 4
        assert transport.tensors_of(f"n{i}:8000") + transport.fills_of(f"n{i}:8000") == told
    assert transport.filled
    assert all((dtype, shape) == ("float32", [2, 3]) for dtype, shape, _ in transport.filled)
    assert transport.given_up == set()
    with pytest.raises(NoBackendAvailableError, match="was abandoned: ZeroDivisionError"):
        pool.generate(["Hi"])
    servers.told.clear()
    pool.update_named_params(METADATA, walk())
    assert servers.told == {f"n{i}": NAMES for i in range(3)}
    assert versions(pool) == [1, 1, 1]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ([("layer.0", Tensor()), ("layer.7", Tensor())], "Tensor 1 differs from the metadata: layer.7 float32"),
        ([("layer.0", Tensor(2, 4))], r"Tensor 0 differs from the metadata: layer.0 float32 \[2, 4\] came"),
        ([(name, Tensor()) for name in NAMES[:9]], "layer.9 was announced and never came"),
        ([(name, Tensor()) for name in [*NAMES, "more"]], "more was not announced"),
    ],
    ids=["another name", "another shape", "too few", "too many"],
)
def test_tensors_that_are_not_those_of_the_metadata_are_an_error_and_publish_nothing(
    make_pool: MakePool, named: list[tuple[str, Tensor]], message: str
) -> None:
    servers, transport = Servers(), Recorded()
    pool = mocked(make_pool, servers, transport)
    steps = iter(named)
    with pytest.raises(ValueError, match=message):
        pool.update_named_params(METADATA, steps)
    assert list(steps) == []
    assert versions(pool) == [None, None, None]
    for i in range(3):
        assert len(servers.told[f"n{i}"]) == len(transport.sent) + transport.fills_of(f"n{i}:8000")
    pool.update_named_params(METADATA, walk())
    assert versions(pool) == [1, 1, 1]


def test_a_run_that_nobody_goes_on_with_is_abandoned_and_made_up_for(make_pool: MakePool) -> None:
    servers, transport = Servers(), Recorded()
    pool = mocked(make_pool, servers, transport, update_idle_timeout=0.3)

    def then(index: int) -> None:
        if index == 3:
            eventually(lambda: pool.statistics().gate is None)

    with pytest.raises(WeightSyncError, match="it may have been abandoned"):
        pool.update_named_params(METADATA, walk(then))
    assert [transport.fills_of(f"n{i}:8000") for i in range(3)] == [AHEAD] * 3
    assert len(transport.sent) == 3
    assert "no control call for 0.3 s" in pool.statistics().backends[0].reason


def test_nobody_sends_a_tensor_between_those_of_a_run(make_pool: MakePool, background: Background) -> None:
    servers = Servers()
    pool = mocked(make_pool, servers, Recorded())

    def then(index: int) -> None:
        if index == 2:
            with pytest.raises(WeightSyncError, match="being sent already"):
                background(pool.update_named_param, "other", Tensor()).result()
            with pytest.raises(WeightSyncError, match="being sent already"):
                background(pool.update_named_params, METADATA, walk()).result()

    pool.update_named_params(METADATA, walk(then))
    assert servers.told["n0"] == NAMES
    assert versions(pool) == [1, 1, 1]


def test_a_run_whose_end_is_asked_for_in_its_middle_publishes_nothing(make_pool: MakePool) -> None:
    servers, transport = Servers(), Recorded()
    pool = mocked(make_pool, servers, transport)

    def then(index: int) -> None:
        if index == 2:
            pool.generate(["Hi"])

    with pytest.raises(WeightSyncError, match="before all of its tensors had come"):
        pool.update_named_params(METADATA, walk(then))
    assert versions(pool) == [None, None, None]
    assert servers.resets == []


def test_a_group_that_is_made_anew_in_the_middle_of_a_run_waits_until_nobody_waits_for_tensors(
    make_pool: MakePool,
) -> None:
    servers, transport = Servers(), Recorded()
    pool = mocked(make_pool, servers, transport)

    def then(index: int) -> None:
        if index == 2:
            pool.init_communicator()
            assert transport.fills_of("n0:8000") == len(servers.told["n0"]) - 2

    with pytest.raises(WeightSyncError, match="it may have been abandoned"):
        pool.update_named_params(METADATA, walk(then))
    pool.update_named_params(METADATA, walk())
    assert versions(pool) == [1, 1, 1]


def test_a_server_that_is_removed_in_the_middle_of_a_run_costs_the_others_nothing(
    fleet: Fleet, make_pool: MakePool
) -> None:
    sims = fleet(2)
    transport = Recorded()
    pool = make_pool(sims, weight_transport=transport)
    pool.init_communicator()
    fresh = ask(sims[0], "generate", prompts=["Hi"])

    def then(index: int) -> None:
        if index == 4:
            pool.remove_backend(sims[1].name, drain=False)

    pool.update_named_params(METADATA, walk(then))
    assert versions(pool) == [1]
    assert [transport.tensors_of(sim.name) for sim in sims] == [TENSORS, 4]
    assert pool.generate(["Hi"])["completion_ids"] != fresh["completion_ids"]


def test_a_pool_that_is_closed_in_the_middle_of_a_run_leaves_nobody_waiting(
    make_pool: MakePool, background: Background
) -> None:
    servers, transport = Servers(), Recorded()
    pool = mocked(make_pool, servers, transport)

    def then(index: int) -> None:
        if index == 3:
            background(pool.close).result()

    steps = walk(then)
    with pytest.raises(PoolClosedError):
        pool.update_named_params(METADATA, steps)
    assert list(steps) == []
    for i in range(3):
        assert len(servers.told[f"n{i}"]) == 3 + transport.fills_of(f"n{i}:8000")


@pytest.mark.parametrize("metadata", [[("a", None, [2])], [("a", "float32")], [("a", "float32", ["two"])]], ids=str)
def test_metadata_that_makes_no_sense_leaves_no_update_behind(make_pool: MakePool, metadata: Any) -> None:
    servers, transport = Servers(), Recorded()
    pool = mocked(make_pool, servers, transport)
    with pytest.raises((AttributeError, TypeError, ValueError)):
        pool.update_named_params(metadata, iter([("a", Tensor())]))
    assert pool.statistics().gate is None
    assert (versions(pool), servers.told) == ([None] * 3, {})
    pool.update_named_params(METADATA, walk())
    assert versions(pool) == [1, 1, 1]
