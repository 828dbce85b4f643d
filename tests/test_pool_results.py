"""A fleet answers as one server would have, whatever the number of servers, the split and the faults."""

from __future__ import annotations

import asyncio
import base64
import collections
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import ask, quick
from hypothesis import event, given, settings
from hypothesis import strategies as st

from trl_pool import AsyncVLLMClientPool, RolloutError, VLLMClientPool
from trl_pool.errors import Outcome
from trl_pool.sim import SimProcess
from trl_pool.sim.engine import Weights, generate, score, tokenize
from trl_pool.sim.sampling import Sampling

TEXTS = [f"Question {i}: what is {i} times {i + 1}?" for i in range(11)]
IDS = [[1 + i, 2, 3 + 2 * i, 4][: 1 + i % 4] for i in range(9)]
CHATS = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {i} squared?"}]
    for i in range(7)
]


@pytest.mark.parametrize("backends", [1, 2, 4])
@pytest.mark.parametrize(
    "arguments",
    [
        {"prompts": TEXTS},
        {"prompts": IDS},
        {"prompts": TEXTS[:1]},
        {"prompts": [TEXTS[0]] * 6, "n": 2},
        {"prompts": TEXTS, "n": 3, "max_tokens": 5},
        {"prompts": TEXTS, "logprobs": None},
        {"prompts": IDS, "logprobs": 3, "n": 2},
        {"prompts": TEXTS, "temperature": 0.7, "top_p": 0.9, "top_k": 4, "min_p": 0.05, "logprobs": 3},
        {"prompts": TEXTS, "n": 1, "generation_kwargs": {"n": 2, "seed": 7, "min_tokens": 2}},
        {"prompts": []},
    ],
    ids=lambda arguments: ",".join(f"{k}={v!r:.20}" for k, v in arguments.items()),
)
def test_generate_gives_what_one_server_gives(
    fleet: Callable[[int], list[SimProcess]],
    make_pool: Callable[..., VLLMClientPool],
    backends: int,
    arguments: dict[str, Any],
) -> None:
    sims = fleet(4)[:backends]
    assert make_pool(sims).generate(**arguments) == ask(sims[0], "generate", **{"top_k": 0, **arguments})


@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"n": 2, "logprobs": 2},
        {"logprobs": None, "chat_template_kwargs": {"enable_thinking": False}, "tools": [{"name": "look_up"}]},
    ],
    ids=["plain", "n", "tools"],
)
def test_chat_gives_what_one_server_gives(
    fleet: Callable[[int], list[SimProcess]],
    make_pool: Callable[..., VLLMClientPool],
    split: bool,
    arguments: dict[str, Any],
) -> None:
    sims = fleet(3)
    expected = ask(sims[0], "chat", messages=CHATS, top_k=0, **arguments)
    assert make_pool(sims, split_batches=split).chat(CHATS, **arguments) == expected


SEQUENCES = [[*range(5, 7 + i % 5), i] for i in range(13)]
LENGTHS = [i % 3 for i in range(12)] + [len(SEQUENCES[12])]  # the last has no completion at all


def decoded(answer: dict[str, Any]) -> dict[str, Any]:
    """A binary answer as TRL's client turns it into lists."""
    batch, longest, top = answer["shape"]
    lists = {}
    for column, key, kind, width in (
        ("logprobs", "logprobs_b64", np.float32, top),
        ("logprob_token_ids", "token_ids_b64", np.int32, top),
        ("actual_logprobs", "actual_logprobs_b64", np.float32, 1),
        ("actual_token_ids", "actual_token_ids_b64", np.int32, 1),
    ):
        array = np.frombuffer(base64.b64decode(answer[key]), dtype=kind).reshape(batch, longest, width)
        lists[column] = [array[i, :length].tolist() for i, length in enumerate(answer["completion_lengths"])]
    return lists


@pytest.mark.parametrize("chunk_size", [0, 1, 4])
@pytest.mark.parametrize("use_binary", [True, False], ids=["binary", "json"])
def test_scores_are_those_of_one_server(
    fleet: Callable[[int], list[SimProcess]],
    make_pool: Callable[..., VLLMClientPool],
    use_binary: bool,
    chunk_size: int,
) -> None:
    sims = fleet(3)
    answer = ask(
        sims[0],
        "get_sequence_logprobs",
        sequences=SEQUENCES,
        prompt_lengths=LENGTHS,
        top_logprobs=4,
        response_format="binary" if use_binary else "json",
    )
    columns = ("logprobs", "logprob_token_ids")
    expected = decoded(answer) if use_binary else {name: answer[name] for name in columns}
    found = make_pool(sims).get_sequence_logprobs(
        SEQUENCES, LENGTHS, top_logprobs=4, use_binary=use_binary, chunk_size=chunk_size
    )
    assert found == expected


def test_the_callers_conversations_stay_as_they_are(
    fleet: Callable[[int], list[SimProcess]], make_pool: Callable[..., VLLMClientPool]
) -> None:
    before = json.dumps(CHATS)
    make_pool(fleet(2)).chat(CHATS)
    assert json.dumps(CHATS) == before


# The same, with every fault that a request can meet, in one process.

COSTLY = ("reset", "time-out")
COMPARED = ("500", "cut", "count", "stranger")
FREE = ("refused", "unreached", "502")
FAULTS = (*COSTLY, *COMPARED, *FREE, "busy", "unavailable")

WEIGHTS = Weights.checkpoint()


def one_server(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What a server answers to a body that is in order."""
    if path == "/get_sequence_logprobs/":
        top = body["top_logprobs"]
        pairs = [
            score(sequence, length, WEIGHTS).lists(top)
            for sequence, length in zip(body["sequences"], body["prompt_lengths"], strict=True)
        ]
        return {"logprobs": [p for p, _ in pairs], "logprob_token_ids": [i for _, i in pairs]}
    prompts = [tokenize(p) if isinstance(p, str) else p for p in body["prompts"]]
    done = generate(prompts, Sampling(n=body["n"], max_tokens=body["max_tokens"], logprobs=0), WEIGHTS)
    return {name: getattr(done, name) for name in ("prompt_ids", "completion_ids", "logprobs", "logprob_token_ids")}


class Servers(httpx.AsyncBaseTransport):
    """Any number of servers. The k-th request to work, wherever it goes, meets the k-th fault of the script."""

    def __init__(self, script: list[str | None]) -> None:
        self.script = list(script)
        self.answered: collections.Counter[str] = collections.Counter()
        self.met: list[str] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == "/health/":
            return httpx.Response(200, json={"status": "ok"})
        body = json.loads(request.content)
        fault = self.script.pop(0) if self.script else None
        await asyncio.sleep(0)
        if fault is not None:
            self.met.append(fault)
        match fault:
            case "refused":
                raise httpx.ConnectError("[Errno 111] Connection refused")
            case "unreached":
                raise httpx.ConnectTimeout("no route")
            case "reset":
                raise httpx.ReadError("connection reset by peer")
            case "time-out":
                raise httpx.ReadTimeout("")
            case "500":
                return httpx.Response(500, text="Internal Server Error")
            case "502":
                return httpx.Response(502, text="Bad Gateway")
            case "busy":
                return httpx.Response(429, headers={"retry-after": "0"})
            case "unavailable":
                return httpx.Response(503, headers={"retry-after": "0.001"})
        answer = one_server(path, body)
        match fault:
            case "cut":
                return httpx.Response(200, content=json.dumps(answer).encode()[:-9])
            case "count":
                return httpx.Response(200, json={name: values[:-1] for name, values in answer.items()})
            case "stranger":  # well formed, and with one more than was asked for
                return httpx.Response(200, json={name: values + values[-1:] for name, values in answer.items()})
        self.answered.update(json.dumps(unit) for unit in body.get("prompts", body.get("sequences")))
        return httpx.Response(200, json=answer)


@given(
    backends=st.integers(1, 5),
    prompts=st.integers(0, 12),
    n=st.integers(1, 3),
    work=st.sampled_from(["texts", "ids", "scores"]),
    chunk_size=st.integers(0, 3),
    script=st.lists(st.none() | st.sampled_from(FAULTS), max_size=12),
    split=st.booleans(),
    session=st.none() | st.just("s"),
    slots=st.integers(1, 3),
    threshold=st.integers(1, 3),
)
@settings(max_examples=120)
def test_nothing_is_lost_or_doubled_or_misplaced_by_any_plan_and_any_faults(
    backends: int,
    prompts: int,
    n: int,
    work: str,
    chunk_size: int,
    script: list[str | None],
    split: bool,
    session: str | None,
    slots: int,
    threshold: int,
) -> None:
    """Every prompt is answered once, in its place, or named in the error; and named only when the faults were more
    than the rules forgive."""
    servers = Servers(script)
    if work == "scores":
        units: list[Any] = [[1, 2, 3, i] for i in range(prompts)]
    else:
        units = [[i, 7, 7] if work == "ids" else f"prompt {i}" for i in range(prompts)]

    async def call() -> dict[str, Any]:
        config = quick(
            backoff_seconds=0,
            health_interval=0.005,
            split_batches=split,
            max_inflight_per_backend=slots,
            fail_eject_threshold=threshold,
            cooldown_seconds=0.01,
        )
        urls = [f"http://n{i}:8000" for i in range(backends)]
        async with (
            asyncio.timeout(20),
            AsyncVLLMClientPool(urls, config=config, transport=servers, session_id=session) as pool,
        ):
            try:
                if work == "scores":
                    return await pool.get_sequence_logprobs(
                        units, [1] * prompts, top_logprobs=2, use_binary=False, chunk_size=chunk_size
                    )
                return await pool.generate(units, n=n, max_tokens=4)
            finally:
                after = pool.statistics()
                assert after.waiting == 0
                assert all(b.inflight == 0 and b.load == 0 for b in after.backends), repr(pool)

    def expected(indices: list[int]) -> dict[str, Any]:
        chosen = [units[i] for i in indices]
        if work == "scores":
            body = {"sequences": chosen, "prompt_lengths": [1] * len(chosen), "top_logprobs": 2}
            return one_server("/get_sequence_logprobs/", body)
        return one_server("/generate/", {"prompts": chosen, "n": n, "max_tokens": 4})

    everything = list(range(prompts))
    try:
        result, error = asyncio.run(call()), None
    except RolloutError as failure:
        event("some prompts without an answer")
        result, error = None, failure
    if error is None:
        assert result == expected(everything)
        answered = everything
    else:
        assert sorted([*error.failed, *error.completed]) == everything
        assert error.failed
        if error.completed:
            assert error.result == expected(error.completed)
        costs = sum(fault in COSTLY for fault in servers.met)
        compared = sum(fault in COMPARED for fault in servers.met)
        rounds = len(servers.met) - servers.met.count("busy") - servers.met.count("unavailable")
        assert costs >= 2 or compared >= 3 or rounds >= 5, "given up too early"
        for attempts in error.failed.values():
            assert sum(a.outcome in (Outcome.LOST, Outcome.TIMED_OUT) for a in attempts) <= 2
        answered = error.completed
    assert servers.answered == collections.Counter(json.dumps(units[i]) for i in answered)
