"""Slots: what a call of one-conversation requests takes of a server, and what it leaves to others."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from conftest import eventually, received

from trl_pool import VLLMClientPool
from trl_pool.sim import SimProcess

Fleet = Callable[..., list[SimProcess]]
MakePool = Callable[..., VLLMClientPool]
Background = Callable[..., Future[Any]]


def chats(count: int, of: str = "chat") -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": f"{of} {i}"}] for i in range(count)]


def test_the_conversations_of_a_call_share_one_slot_and_are_out_together(
    vllm_fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = vllm_fleet(2)
    pool = make_pool(sims, max_inflight_per_backend=1)
    for sim in sims:
        sim.faults("hang", endpoints=["chat_completions"])
    call = background(pool.chat, chats(24))
    eventually(lambda: [sim.state()["in_flight"] for sim in sims] == [12, 12])
    for sim in sims:
        sim.clear_faults()
    assert len(call.result()["prompt_ids"]) == 24


def test_a_server_has_at_most_max_concurrent_requests_of_a_call(
    vllm_fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = vllm_fleet(2)
    pool = make_pool(sims)
    for sim in sims:
        sim.faults("slow", seconds=0.02)
    pool.chat(chats(24), max_concurrent_requests=3)
    assert [sim.state()["max_in_flight"] for sim in sims] == [3, 3]
    assert received(sims, "chat_completions") == [12, 12]


def test_another_call_waits_for_a_slot_of_its_own_and_gets_it_when_the_last_of_them_has_ended(
    vllm_fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = vllm_fleet(1)
    pool = make_pool(sims, max_inflight_per_backend=1)
    sims[0].faults("hang", endpoints=["chat_completions"])
    first = background(pool.chat, chats(6, "first"))
    eventually(lambda: sims[0].state()["in_flight"] == 6)
    others = [background(pool.generate, ["a"]), background(pool.chat, chats(3, "second"))]
    eventually(lambda: pool.statistics().waiting == 2)
    assert received(sims, "completions") == [0]
    sims[0].clear_faults()
    assert len(first.result()["prompt_ids"]) == 6
    assert [len(other.result()["prompt_ids"]) for other in others] == [1, 3]
    ended = [r["endpoint"] for r in sims[0].state()["requests"]]
    assert [name for name in ended if name in ("completions", "chat_completions")] == [
        *["chat_completions"] * 6,
        "completions",
        *["chat_completions"] * 3,
    ]


def test_calls_with_slots_of_their_own_run_beside_each_other(
    vllm_fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = vllm_fleet(1)
    pool = make_pool(sims, max_inflight_per_backend=2)
    sims[0].faults("hang", endpoints=["chat_completions"])
    calls = [background(pool.chat, chats(4, name)) for name in ("first", "second", "third")]
    eventually(lambda: sims[0].state()["in_flight"] == 8 and pool.statistics().waiting == 1)
    sims[0].clear_faults()
    assert [len(call.result()["prompt_ids"]) for call in calls] == [4, 4, 4]
