"""What servers say of their queues."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from dispatching import fleet_of
from hypothesis import given
from hypothesis import strategies as st

from trl_pool.queues import look, parse
from trl_pool.schedule import Queue

REAL = b"""# HELP python_info Python platform information
# TYPE python_info gauge
python_info{implementation="CPython",major="3",minor="11",patchlevel="2",version="3.11.2"} 1.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="/tmp/a}b {c} model"} 6.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="/tmp/a}b {c} model"} 4.0
# HELP vllm:num_requests_waiting_by_reason Number of waiting requests by reason.
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="/tmp/a}b {c} model",reason="capacity"} 3.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="/tmp/a}b {c} model",reason="deferred"} 1.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="/tmp/a}b {c} model"} 0.12
# HELP vllm:prefix_cache_queries_total Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="/tmp/a}b {c} model"} 1600.0
"""
"""An excerpt of what vLLM 0.31 answers, with a model of an unpleasant name."""

RUNNING, WAITING = b"vllm:num_requests_running", b"vllm:num_requests_waiting"


def test_the_two_gauges_are_found_among_all_the_others() -> None:
    assert parse(REAL) == (6, 4)


def test_several_engines_are_added_up() -> None:
    lines = [
        b'%s{engine="%d",model_name="m"} %d.0' % (name, i, i + 1) for name in (RUNNING, WAITING) for i in range(3)
    ]
    assert parse(b"\n" + b"\n".join(lines)) == (6, 6)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"", None),
        (b"not found", None),
        (b"\n" + RUNNING + b" 1.0\n", None),
        (b"\n" + WAITING + b" 1.0\n", None),
        (b"\n" + RUNNING + b" 1.0\n" + WAITING + b" 2", (1, 2)),
        (b"\n" + RUNNING + b" 1.0 1395066363000\n" + WAITING + b" 2 1395066363000\n", (1, 2)),
        (b"\n" + RUNNING + b" 1e+03\n" + WAITING + b" 0\n", (1000, 0)),
        (b"\n" + RUNNING + b" 1.0\n" + WAITING + b'_by_reason{reason="capacity"} 7.0\n', None),
        (b"\n" + RUNNING + b"\n" + WAITING + b" 1\n", None),
        (b"\n" + RUNNING + b" \n" + WAITING + b" 1\n", None),
        (b"\n" + RUNNING + b" many\n" + WAITING + b" 1\n", None),
        (b"\n" + RUNNING + b" NaN\n" + WAITING + b" 1\n", None),
        (b"\n" + RUNNING + b" 1\n" + WAITING + b" NaN\n", None),
        (b"\n" + RUNNING + b" +Inf\n" + WAITING + b" 1\n", None),
        (b"\n" + RUNNING + b'{engine="0"} NaN\n' + RUNNING + b'{engine="1"} 2\n' + WAITING + b" 1\n", None),
    ],
)
def test_a_server_that_does_not_say_clearly_says_nothing(text: bytes, found: tuple[int, int] | None) -> None:
    assert parse(text) == found


@given(text=st.binary(max_size=200), cut=st.integers(0, len(REAL)))
def test_no_answer_raises(text: bytes, cut: int) -> None:
    for metrics in (text, REAL[:cut] + text, b"\n" + RUNNING + b" " + text + b"\n" + WAITING + text):
        found = parse(metrics)
        assert found is None or all(isinstance(count, int) for count in found)


def test_a_server_that_tells_its_queue_is_asked_again_and_one_that_does_not_is_not() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        if request.url.host == "down":
            raise httpx.ConnectError("refused")
        body = {"tells": REAL[len(b"# HELP") :], "first": REAL[REAL.index(RUNNING + b"{") :], "nan": b"\n"}
        return httpx.Response(404 if request.url.host == "none" else 200, content=body.get(request.url.host, b""))

    async def run() -> None:
        dispatcher = fleet_of("tells", "first", "none", "empty", "nan", "down", answer=answer)
        backends = list(dispatcher.backends.values())
        for at in (10.0, 20.0):
            await look(backends, timeout=1.0, clock=lambda at=at: at)  # type: ignore[misc]
        tells, first, *others, down = backends
        assert (tells.tells_queue, tells.queue) == (True, Queue(6, 4, 20.0))
        assert first.tells_queue is True, "a first line counts as well"
        assert [(b.tells_queue, b.queue) for b in others] == [(False, None)] * 3
        assert (down.tells_queue, down.queue) == (None, None), "one that did not answer may tell it later"

    asyncio.run(run())
    assert sorted(asked) == sorted(["tells", "first", "down"] * 2 + ["none", "empty", "nan"])


@pytest.mark.parametrize("text", [b"vllm:num_requests_running NaN\nvllm:num_requests_waiting 1\n", b"\xff\n"])
def test_one_server_that_talks_nonsense_does_not_keep_the_others_from_being_asked(text: bytes) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=text if request.url.host == "bad" else REAL)

    async def run() -> None:
        dispatcher = fleet_of("bad", "good", answer=answer)
        bad, good = dispatcher.backends.values()
        await look([bad, good], timeout=1.0, clock=lambda: 1.0)
        assert (bad.queue, good.queue) == (None, Queue(6, 4, 1.0))

    asyncio.run(run())
