"""Prometheus' text format, as far as it is needed."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from trl_pool import PoolConfig
from trl_pool.bench.metrics import CacheCount, CacheReader, cache_count, counters

TEXT = """\
# HELP vllm:prefix_cache_queries_total Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="a} {b"} 1.5e+03
vllm:prefix_cache_queries_total{engine="1",model_name="a} {b"} 500.0
# TYPE vllm:prefix_cache_queries_created gauge
vllm:prefix_cache_queries_created{engine="0",model_name="a} {b"} 1.7e+09
vllm:prefix_cache_hits_total{engine="0",model_name="a} {b"} 600.0 1700000000000
vllm:external_prefix_cache_hits_total{engine="0"} 7.0
python_info 1
nothing NaN
no sample
"""


def test_samples_are_added_up_over_their_labels() -> None:
    found = counters(TEXT)
    assert found["vllm:prefix_cache_queries_total"] == 2000
    assert found["python_info"] == 1
    assert "nothing" not in found
    assert "no" not in found


def test_queries_and_hits_are_found_with_and_without_suffix() -> None:
    count = cache_count(TEXT)
    assert count == CacheCount(2000, 600) == cache_count(TEXT.replace("_total", ""))
    assert count.rate == 0.3


@pytest.mark.parametrize("text", ["", "<html>", TEXT.replace("cache_hits", "cache_misses")])
def test_a_text_without_them_tells_nothing(text: str) -> None:
    assert cache_count(text) is None


def test_what_was_counted_between_is_unknown_when_the_counters_fell() -> None:
    assert CacheCount(50, 20).since(CacheCount(40, 15)) == CacheCount(10, 5)
    assert CacheCount(10, 0).since(CacheCount(40, 15)) is None
    assert CacheCount().rate is None


def test_a_server_that_does_not_tell_is_not_asked_again_and_one_that_is_away_is() -> None:
    asked: list[str] = []
    down = {"c"}

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        assert request.headers["authorization"] == "Bearer key"
        if request.url.host in down:
            raise httpx.ConnectError("refused")
        return httpx.Response(404) if request.url.host == "b" else httpx.Response(200, text=TEXT)

    async def main() -> None:
        config = PoolConfig(backend_api_key="key")
        async with CacheReader(config, httpx.MockTransport(answer)) as reader:
            urls = ["http://a", "http://b", "http://c"]
            told = CacheCount(2000, 600)
            assert await reader.read(urls) == {"http://a": told, "http://b": None, "http://c": None}
            down.clear()
            assert await reader.read(urls) == {"http://a": told, "http://b": None, "http://c": told}

    asyncio.run(main())
    assert sorted(asked) == ["a", "a", "b", "c", "c"]
