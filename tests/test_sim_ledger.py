"""What the simulated server remembers of its requests."""

from __future__ import annotations

import time

from trl_pool.sim.ledger import REMEMBERED_REQUESTS, Ledger, prompt_key


def test_the_ledger_counts_and_remembers() -> None:
    now = iter(range(100))
    ledger = Ledger(lambda: float(next(now)))
    headers = {"user-agent": "me", "x-request-id": "r1"}
    first = ledger.arrived("generate", headers, {"prompts": ["a", [1, 2]], "n": 3})
    second = ledger.arrived("chat", {}, {"messages": [[{"role": "user", "content": "hi"}]]})
    ledger.arrived("health", {}, None)
    ledger.left(second, 200)
    ledger.left(first, None)
    listing = ledger.listing()
    assert (listing["in_flight"], listing["max_in_flight"]) == (0, 2)
    assert listing["endpoints"]["generate"].received == 1
    assert listing["endpoints"]["generate"].answered == 0
    assert listing["endpoints"]["chat"].answered == 1
    record = listing["requests"][0]
    assert (record.endpoint, record.prompts, record.n, record.seconds) == ("generate", 2, 3, 1.0)
    assert (record.user_agent, record.x_request_id, record.status) == ("me", "r1", None)
    assert record.prompt_keys == ["a", prompt_key([1, 2])]
    ledger.forget()
    assert ledger.listing()["requests"] == []
    assert ledger.listing()["endpoints"]["health"].in_flight == 1


def test_the_ledger_remembers_no_more_than_it_should() -> None:
    ledger = Ledger(time.monotonic)
    for _ in range(REMEMBERED_REQUESTS + 5):
        ledger.left(ledger.arrived("health", {}, None), 200)
    assert len(ledger.listing()["requests"]) == REMEMBERED_REQUESTS
    assert ledger.listing()["endpoints"]["health"].received == REMEMBERED_REQUESTS + 5


def test_prompt_keys_are_short_and_differ() -> None:
    prompts: list[object] = [
        "x",
        "x" * 32,
        "x" * 33,
        "x" * 34,
        [1, 2],
        [12],
        [{"content": "x" * 50}],
        [{"content": "x"}],
    ]
    keys = [prompt_key(prompt) for prompt in prompts]
    assert keys[:2] == ["x", "x" * 32]
    assert len(set(keys)) == len(keys)
    assert all(len(key) <= 32 for key in keys)
