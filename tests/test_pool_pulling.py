"""Batches larger than the servers can run at once, on simulated `vllm serve` with real sockets."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from conftest import eventually, quick, received
from vllm_sims import USER, Walk, started, tokens, unspoilt

from trl_pool import AsyncVLLMClientPool, RequestRejectedError, RolloutTimeoutError, VLLMClientPool
from trl_pool.sim import SimProcess

MakePool = Callable[..., VLLMClientPool]
Background = Callable[..., Future[Any]]

TRAITS: dict[str, dict[str, Any]] = {
    **{name: {"max_num_seqs": 4, "decode_ms_per_token": 3} for name in ("a", "b", "c")},
    "slow": {"max_num_seqs": 4, "decode_ms_per_token": 40},
}
PROMPTS = [f"prompt {i}" for i in range(60)]
FIELDS: dict[str, Any] = {"max_tokens": 8}


@pytest.fixture(scope="module")
def started_sims() -> Iterator[dict[str, SimProcess]]:
    with started(**TRAITS) as sims:
        yield sims


@pytest.fixture
def sims(started_sims: dict[str, SimProcess]) -> dict[str, SimProcess]:
    """Servers that run four sequences at once."""
    return {name: unspoilt(sim if sim.running else sim.restart()) for name, sim in started_sims.items()}


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queues are looked at ten times a second."""
    monkeypatch.setattr("trl_pool.pulling.LOOK_SECONDS", 0.1)


def arrived(*sims: SimProcess, endpoint: str = "completions") -> Counter[str]:
    """How often each prompt has reached a server."""
    requests = [request for sim in sims for request in sim.state()["requests"]]
    return Counter(key for r in requests if r["endpoint"] == endpoint for key in r["prompt_keys"])


def served(pool: VLLMClientPool) -> list[int]:
    return [backend.prompts for backend in pool.statistics().backends]


def is_idle(pool: VLLMClientPool) -> bool:
    found = pool.statistics()
    return found.waiting == 0 and all((b.inflight, b.load) == (0, 0) for b in found.backends)


@pytest.mark.parametrize("n", [1, 3])
def test_a_batch_is_served_whole_every_prompt_once_and_in_order(
    sims: dict[str, SimProcess], make_pool: MakePool, n: int
) -> None:
    fleet = [sims["a"], sims["b"], sims["c"]]
    pool = make_pool(fleet)
    answer = pool.generate(PROMPTS, n=n, **FIELDS)
    assert arrived(*fleet) == Counter(PROMPTS)
    assert all(len(request["prompt_keys"]) * n <= 8 for sim in fleet for request in sim.state()["requests"])
    assert all(count >= 10 for count in served(pool))
    assert sum(served(pool)) == 60
    assert is_idle(pool)
    assert answer == make_pool([sims["a"]]).generate(PROMPTS, n=n, **FIELDS)


def test_a_batch_that_fits_goes_in_one_request_to_each(sims: dict[str, SimProcess], make_pool: MakePool) -> None:
    fleet = [sims["a"], sims["b"]]
    pool = make_pool(fleet)
    pool.generate(PROMPTS[:10], **FIELDS)
    assert received(fleet, "completions") == [1, 1]
    pool.generate(PROMPTS[:11], **FIELDS)
    assert sum(received(fleet, "completions")) > 4


def test_conversations_are_pulled_as_well_each_in_a_request_of_its_own(
    sims: dict[str, SimProcess], make_pool: MakePool
) -> None:
    fleet = [sims["a"], sims["b"]]
    pool = make_pool(fleet)
    conversations = [[{**USER, "content": f"Hello {i}"}] for i in range(40)]
    answer = pool.chat(conversations, n=2, **FIELDS)
    assert set(arrived(*fleet, endpoint="chat_completions").values()) == {1}
    assert sum(received(fleet, "chat_completions")) == 40
    assert all(received(fleet, "chat_completions"))
    assert answer == make_pool([sims["c"]]).chat(conversations, n=2, **FIELDS)


def test_a_server_that_is_slower_gets_fewer_prompts(sims: dict[str, SimProcess], make_pool: MakePool) -> None:
    pool = make_pool([sims["a"], sims["slow"]])
    pool.generate(PROMPTS, **FIELDS)
    fast, slow = served(pool)
    assert 1 <= slow <= 20 < fast


def test_a_server_known_to_be_slow_is_left_out_of_what_the_others_end_sooner(
    sims: dict[str, SimProcess], make_pool: MakePool
) -> None:
    fleet = [sims["a"], sims["slow"]]
    pool = make_pool(fleet)
    pool.generate(PROMPTS, **FIELDS)
    before = received(fleet, "completions")
    assert len(pool.generate(PROMPTS[:12], **FIELDS)["completion_ids"]) == 12
    after = received(fleet, "completions")
    assert after[0] > before[0]
    assert after[1] == before[1]


def test_who_took_a_prompt_that_was_held_for_another_is_known_to_have_its_beginning(
    sims: dict[str, SimProcess], make_pool: MakePool
) -> None:
    pool = make_pool([sims["a"], sims["slow"]])
    prompts = [[number] * 64 for number in range(40)]
    pool.generate(prompts, max_tokens=4)  # type: ignore[arg-type]
    assert pool.last_report is not None
    places = [prompt.backend for prompt in pool.last_report.prompts]
    assert 20 < places.count(sims["a"].url) < 40, "some were taken over"
    for prompt, place in zip(prompts, places, strict=True):
        pool.generate([prompt], max_tokens=1)  # type: ignore[arg-type]
        assert pool.last_report.prompts[0].backend == place


@pytest.mark.usefixtures("quick_looks")
def test_servers_tell_their_queues_and_are_asked_while_a_batch_lasts(
    sims: dict[str, SimProcess], make_pool: MakePool, background: Background
) -> None:
    fleet = [sims["a"], sims["slow"]]
    pool = make_pool(fleet)
    for sim in fleet:
        sim.faults("hang", endpoints=["completions"])
    call = background(pool.generate, PROMPTS, **FIELDS)
    eventually(lambda: all(count >= 2 for count in received(fleet, "metrics")))
    # They say that nothing runs there, as what hangs has not come so far; they are given more.
    eventually(lambda: pool.statistics().backends[0].load > 5)
    for sim in fleet:
        sim.clear_faults()
    assert len(call.result()["completion_ids"]) == 60


@pytest.mark.usefixtures("quick_looks")
@pytest.mark.parametrize("fault", [{"kind": "status", "status": 404}, {"kind": "hang"}], ids=str)
def test_servers_that_never_tell_their_queue_serve_just_as_well(
    sims: dict[str, SimProcess], make_pool: MakePool, background: Background, fault: dict[str, Any]
) -> None:
    fleet = [sims["a"], sims["slow"]]
    pool = make_pool(fleet)
    for sim in fleet:
        sim.faults(endpoints=["metrics"], **fault)
    sims["slow"].faults("slow", seconds=0.5, endpoints=["completions"], times=1)
    call = background(pool.generate, PROMPTS, **FIELDS)
    eventually(lambda: all(received(fleet, "metrics")))
    assert len(call.result()["completion_ids"]) == 60
    assert arrived(*fleet) == Counter(PROMPTS)


# Servers that go and come


def test_a_server_killed_in_the_middle_loses_nothing_and_what_it_held_goes_to_others(
    sims: dict[str, SimProcess], make_pool: MakePool, background: Background
) -> None:
    fleet = [sims["a"], sims["b"], sims["c"]]
    pool = make_pool(fleet)
    for sim in fleet:
        sim.faults("slow", seconds=0.1, endpoints=["completions"])
    call = background(pool.generate, PROMPTS, **FIELDS)
    eventually(lambda: received([sims["b"]], "completions")[0] >= 2)
    before = arrived(sims["b"])
    sims["b"].kill()
    answer = call.result()
    assert len(before) < 20, "it held some of its share"
    assert all(count == 1 for prompt, count in arrived(sims["a"], sims["c"]).items() if prompt not in before)
    assert is_idle(pool)
    assert answer == make_pool([sims["a"]]).generate(PROMPTS, **FIELDS)


def test_a_server_that_comes_back_in_the_middle_takes_part_again(
    sims: dict[str, SimProcess], make_pool: MakePool, background: Background
) -> None:
    fleet = [sims["a"], sims["slow"]]
    pool = make_pool(fleet)
    pool.generate(PROMPTS[:2], **FIELDS)
    sims["a"].kill()
    eventually(lambda: not pool.statistics().backends[0].eligible)
    call = background(pool.generate, PROMPTS, **FIELDS)
    eventually(lambda: arrived(sims["slow"]))
    sims["a"].restart()
    assert len(call.result()["completion_ids"]) == 60
    assert len(arrived(sims["a"])) > 10


def test_a_server_that_is_removed_in_the_middle_ends_what_it_has_and_gets_no_more(
    sims: dict[str, SimProcess], make_pool: MakePool, background: Background
) -> None:
    fleet = [sims["a"], sims["b"]]
    pool = make_pool(fleet)
    for sim in fleet:
        sim.faults("slow", seconds=0.3, endpoints=["completions"])
    call = background(pool.generate, PROMPTS, **FIELDS)
    eventually(lambda: all(received(fleet, "completions")))
    pool.remove_backend(fleet[1].url)
    had = len(arrived(fleet[1]))
    for sim in fleet:
        sim.clear_faults()
    assert len(call.result()["completion_ids"]) == 60
    assert (len(arrived(fleet[1])), arrived(*fleet)) == (had, Counter(PROMPTS))
    assert had < 30


# What ends a call, or comes between


def test_an_update_that_begins_in_the_middle_waits_for_the_whole_batch(
    sims: dict[str, SimProcess], make_pool: MakePool, background: Background
) -> None:
    fleet = [sims["a"], sims["b"]]
    pool = make_pool(fleet)
    pool.init_communicator()
    expected = tokens(sims["a"], PROMPTS, max_tokens=8, temperature=1.0, top_k=0)
    for sim in fleet:
        sim.forget()
        sim.faults("slow", seconds=0.1, endpoints=["completions"])
    call = background(pool.generate, PROMPTS, **FIELDS)
    eventually(lambda: all(received(fleet, "completions")))
    walk = Walk()
    update = background(pool.update_named_params, walk.metadata, iter(walk))
    eventually(lambda: pool.statistics().gate)
    assert len(arrived(*fleet)) < 60, "some of them nobody has been given so far"
    late = background(pool.generate, ["late"], **FIELDS)
    update.result()
    assert call.done(), "the batch came first"
    assert call.result()["completion_ids"] == expected
    assert late.result()["completion_ids"] == tokens(sims["a"], ["late"], max_tokens=8, temperature=1.0, top_k=0)
    paths = [request["endpoint"] for request in sims["a"].state()["requests"]]
    assert "completions" not in paths[paths.index("start_weight_update") : paths.index("finish_weight_update")]


def test_at_the_end_of_its_time_a_call_raises_with_what_was_answered(
    sims: dict[str, SimProcess], make_pool: MakePool
) -> None:
    pool = make_pool([sims["a"], sims["b"]], total_timeout=0.8)
    sims["b"].faults("hang", endpoints=["completions"])
    sims["a"].faults("slow", seconds=0.15, endpoints=["completions"])
    with pytest.raises(RolloutTimeoutError, match="total_timeout") as caught:
        pool.generate([f"prompt {i}" for i in range(200)], **FIELDS)
    error = caught.value
    assert 0 < len(error.completed) < 150
    assert sorted([*error.completed, *error.failed]) == list(range(200))
    expected = tokens(sims["a"], [f"prompt {i}" for i in error.completed[:3]], max_tokens=8, temperature=1.0, top_k=0)
    assert error.result is not None
    assert error.result["completion_ids"][:3] == expected
    assert any(not attempts for attempts in error.failed.values()), "some were never sent"
    assert is_idle(pool)


def test_a_call_that_is_cancelled_leaves_nothing_behind(sims: dict[str, SimProcess]) -> None:
    async def run() -> None:
        async with AsyncVLLMClientPool(
            [sims["a"].url, sims["b"].url], config=quick(max_inflight_per_backend=1)
        ) as pool:
            await pool.check_server(10)
            sims["b"].faults("hang", endpoints=["completions"])
            for delay in (0, 1, 2, 50):
                call = asyncio.create_task(pool.generate(PROMPTS, **FIELDS))
                for _ in range(delay):
                    await asyncio.sleep(0.002)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                statistics = pool.statistics()
                assert [(b.inflight, b.load) for b in statistics.backends] == [(0, 0)] * 2
                assert statistics.waiting == 0
            sims["b"].clear_faults()
            assert len((await pool.generate(PROMPTS, **FIELDS))["completion_ids"]) == 60

    asyncio.run(run())


def test_a_request_that_is_refused_ends_the_call_at_once(sims: dict[str, SimProcess], make_pool: MakePool) -> None:
    fleet = [sims["a"], sims["b"]]
    pool = make_pool(fleet)
    with pytest.raises(RequestRejectedError, match="maximum context length"):
        pool.generate([*PROMPTS, "x" * 5000], **FIELDS)
    assert is_idle(pool)


def test_other_calls_are_served_beside_a_batch_and_batches_beside_each_other(
    sims: dict[str, SimProcess], make_pool: MakePool, background: Background
) -> None:
    fleet = [sims["a"], sims["b"], sims["c"]]
    pool = make_pool(fleet, max_inflight_per_backend=2)
    others = [[f"{i} of call {k}" for i in range(40)] for k in range(3)]
    calls = [background(pool.generate, prompts, **FIELDS) for prompts in others]
    singles = [background(pool.generate, [f"single {i}"], **FIELDS) for i in range(12)]
    assert all(len(single.result()["completion_ids"]) == 1 for single in singles)
    for call, prompts in zip(calls, others, strict=True):
        assert call.result() == make_pool([sims["a"]]).generate(prompts, **FIELDS)
    assert is_idle(pool)
