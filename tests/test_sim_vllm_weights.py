"""The simulated `vllm serve` in weight updates: which calls it takes in which order, and what its tokens show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import eventually
from vllm_sims import COMPLETIONS, error, expected, get, post, started, tokens, unspoilt

from trl_pool.sim import SimProcess

TRAITS: dict[str, dict[str, Any]] = {
    "one": {},
    "two": {},
    "old": {"vllm_version": "0.27.1"},
    "fatal": {"unfinished_update": "fatal"},
    "none": {"weight_transfer": "none"},
}
GROUP = {"master_address": "127.0.0.1", "master_port": 51216, "rank_offset": 1, "world_size": 2, "packed": True}
FIRST = {"names": ["a", "b"], "dtype_names": ["bfloat16"] * 2, "shapes": [[2], [3, 4]]}
SECOND = {"names": ["c"], "dtype_names": ["float32"], "shapes": [[1]]}


@pytest.fixture(scope="module")
def fleet() -> Iterator[dict[str, SimProcess]]:
    with started(**TRAITS) as sims:
        yield sims


@pytest.fixture
def sim(fleet: dict[str, SimProcess]) -> SimProcess:
    return unspoilt(fleet["one"])


@pytest.fixture
def other(fleet: dict[str, SimProcess]) -> SimProcess:
    return unspoilt(fleet["two"])


def init(sim: SimProcess, **fields: Any) -> httpx.Response:
    return post(sim, "/init_weight_transfer_engine", {"init_info": {**GROUP, **fields}})


def start(sim: SimProcess) -> httpx.Response:
    return post(sim, "/start_weight_update", {})


def update(sim: SimProcess, info: Any) -> httpx.Response:
    return post(sim, "/update_weights", {"update_info": info})


def finish(sim: SimProcess, version: str | None = None) -> httpx.Response:
    return post(sim, "/finish_weight_update", {} if version is None else {"weight_version": version})


def whole_update(sim: SimProcess, *infos: Any, version: str | None = None) -> None:
    for answer in (start(sim), *(update(sim, info) for info in infos), finish(sim, version)):
        answer.raise_for_status()


def version(sim: SimProcess) -> str:
    found: str = get(sim, "/weight_info").json()["weight_version"]
    return found


def failed(answer: httpx.Response) -> str:
    """The message of a worker's error."""
    assert error(answer) == (500, "InternalServerError", None)
    return str(answer.json()["error"]["message"])


def test_an_update_has_the_real_messages_and_changes_tokens(sim: SimProcess) -> None:
    assert version(sim) == "default"
    messages = [answer.json()["message"] for answer in (init(sim), start(sim), update(sim, FIRST), finish(sim, "v1"))]
    assert messages == [
        "Weight transfer initialized",
        "Weight update started",
        "Weights updated",
        "Weight update finished",
    ]
    assert version(sim) == "v1"
    assert tokens(sim) != expected("Hello")
    state = sim.state()
    assert (state["communicator"], state["updating"], state["whole"]) == (True, False, True)
    assert (state["weights"]["updates"], state["weight_version"]) == (2, "v1")


def test_finish_takes_no_body_as_well_and_then_the_version_stays(sim: SimProcess) -> None:
    init(sim)
    whole_update(sim, FIRST, version="v1")
    start(sim)
    assert post(sim, "/finish_weight_update").status_code == 200
    assert version(sim) == "v1"
    answer = post(sim, "/update_weight_version", {"new_version": "v2"})
    assert answer.json() == {"success": True, "new_version": "v2"}
    assert version(sim) == "v2"


def test_what_stands_for_the_weights_is_what_was_received_and_not_how(sim: SimProcess, other: SimProcess) -> None:
    """A server that missed an update has the others' tokens after the next whole one, and no sooner."""
    for one in (sim, other):
        init(one)
    whole_update(sim, FIRST, SECOND, version="v1")
    assert tokens(sim) != tokens(other)
    for one in (sim, other):
        whole_update(one, *([FIRST, SECOND] if one is sim else [SECOND, FIRST]), version="v2")
    assert tokens(sim) == tokens(other)
    whole_update(sim, FIRST, version="v3")
    whole_update(other, SECOND, version="v3")
    assert tokens(sim) != tokens(other)


def test_updates_without_versions_are_told_apart_by_their_number(sim: SimProcess, other: SimProcess) -> None:
    seen = [tokens(sim)]
    init(sim)
    init(other)
    for _ in range(2):
        whole_update(sim, FIRST)
        whole_update(other, FIRST)
        assert tokens(sim) == tokens(other)
        assert tokens(sim) not in seen
        seen.append(tokens(sim))


def test_an_unfinished_update_leaves_mixed_weights_that_show(sim: SimProcess) -> None:
    init(sim)
    seen = [tokens(sim)]
    for step in (lambda: start(sim), lambda: update(sim, FIRST), lambda: update(sim, SECOND), lambda: finish(sim)):
        step().raise_for_status()
        assert tokens(sim) not in seen
        seen.append(tokens(sim))
        assert sim.state()["whole"] == (len(seen) == 5)


def test_start_and_finish_with_nothing_in_between_change_nothing(sim: SimProcess) -> None:
    init(sim)
    whole_update(sim, FIRST, version="v1")
    before = tokens(sim)
    whole_update(sim)
    assert tokens(sim) == before


def test_calls_out_of_order_are_the_workers_errors(sim: SimProcess) -> None:
    assert "before" in failed(update(sim, FIRST))
    assert "without a matching start_weight_update" in failed(finish(sim))
    start(sim)
    assert "already active" in failed(start(sim))
    assert finish(sim).status_code == 200
    assert tokens(sim) == expected("Hello")


def test_an_update_before_init_fails_and_ends_the_session(sim: SimProcess) -> None:
    start(sim)
    assert "init_weight_transfer_engine" in failed(update(sim, FIRST))
    assert "without a matching" in failed(finish(sim))


def test_a_failed_update_leaves_torn_weights_that_only_an_empty_one_heals(sim: SimProcess) -> None:
    init(sim)
    before = tokens(sim)
    start(sim)
    failed(update(sim, {"names": ["a"]}))
    torn = tokens(sim)
    assert torn != before
    whole_update(sim, FIRST, version="v1")
    assert tokens(sim) not in (torn, before)
    assert not sim.state()["whole"]
    whole_update(sim)
    assert sim.state()["whole"]
    whole_update(sim, FIRST, version="v2")
    assert sim.state()["whole"]
    assert version(sim) == "v2"


@pytest.mark.parametrize(
    "info",
    [
        {},
        {"names": ["a"], "dtype_names": ["bfloat16"]},
        {"names": ["a", "b"], "dtype_names": ["bfloat16"], "shapes": [[1]]},
        {**SECOND, "packed": True},
        "names",
    ],
)
def test_an_ill_formed_update_fails(sim: SimProcess, info: Any) -> None:
    init(sim)
    start(sim)
    failed(update(sim, info))
    assert not sim.state()["updating"]


@pytest.mark.parametrize("fields", [{"x": 1}, {"master_port": None}, {"rank_offset": None}])
def test_an_ill_formed_init_fails_and_leaves_no_group(sim: SimProcess, fields: dict[str, Any]) -> None:
    init(sim)
    failed(init(sim, **fields))
    assert not sim.state()["communicator"]


def test_init_again_takes_the_place_of_a_group(sim: SimProcess) -> None:
    init(sim)
    assert init(sim, master_port=51217).status_code == 200
    whole_update(sim, FIRST)
    assert sim.state()["whole"]


def test_there_may_be_one_update_info_for_each_worker(sim: SimProcess, other: SimProcess) -> None:
    init(sim)
    init(other)
    whole_update(sim, [FIRST, FIRST], version="v1")
    whole_update(other, FIRST, version="v1")
    assert tokens(sim) == tokens(other)


def test_before_0_28_packing_is_told_with_each_update(fleet: dict[str, SimProcess]) -> None:
    old = unspoilt(fleet["old"])
    failed(init(old))
    post(old, "/init_weight_transfer_engine", {"init_info": {n: v for n, v in GROUP.items() if n != "packed"}})
    whole_update(old, {**FIRST, "packed": True}, version="v1")
    assert version(old) == "v1"


def test_a_server_without_weight_transfer_says_so(fleet: dict[str, SimProcess]) -> None:
    sim = fleet["none"]
    for answer in (init(sim), start(sim), update(sim, FIRST), finish(sim)):
        assert "not configured" in failed(answer)
    assert tokens(sim) == expected("Hello")


def test_a_restart_brings_back_the_checkpoint_and_the_first_version(sim: SimProcess) -> None:
    init(sim)
    whole_update(sim, FIRST, version="v1")
    url = sim.url
    sim.restart()
    assert sim.url == url
    assert version(sim) == "default"
    assert tokens(sim) == expected("Hello")
    assert not sim.state()["communicator"]


def test_an_error_of_the_worker_closes_the_connection(sim: SimProcess) -> None:
    """As it does on a real server: the next request on it would be lost."""
    with httpx.Client(trust_env=False, verify=False) as client:
        assert client.post(sim.url + "/finish_weight_update").status_code == 500
        eventually(lambda: sim.state()["connections"] == 0)
        assert client.post(sim.url + "/update_weights", json={}).status_code == 400
        assert sim.state()["connections"] == 1


def test_updates_may_happen_while_it_is_paused(sim: SimProcess) -> None:
    init(sim)
    post(sim, "/pause?mode=keep").raise_for_status()
    whole_update(sim, FIRST, version="v1")
    post(sim, "/resume").raise_for_status()
    assert version(sim) == "v1"


@pytest.mark.parametrize("half_done", [False, True])
def test_where_it_is_fatal_generating_from_unfinished_weights_ends_the_server(
    fleet: dict[str, SimProcess], half_done: bool
) -> None:
    sim = fleet["fatal"].restart()
    init(sim)
    assert start(sim).status_code == 200
    if half_done:
        failed(update(sim, {}))
    assert get(sim, "/health").status_code == 200  # nothing shows before
    assert error(post(sim, COMPLETIONS, {"prompt": "x"})) == (500, "InternalServerError", None)
    eventually(lambda: not sim.running)
    with pytest.raises(httpx.ConnectError):
        get(sim, "/health")
