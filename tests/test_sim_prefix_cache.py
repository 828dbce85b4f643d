"""What a simulated `vllm serve` says about its prefix cache."""

from __future__ import annotations

from typing import Any

import pytest
from vllm_sims import Apps

from trl_pool import VLLMClientPool
from trl_pool.sim.prefix_cache import BLOCK_TOKENS, PrefixCache


@pytest.mark.parametrize(
    ("prompts", "hits"),
    [
        ([range(64)], 0),
        ([range(64), range(64)], 48),  # the last token is computed anew, and so is its block
        ([range(65), range(65)], 64),
        ([range(64), [*range(32), *range(100, 133)]], 32),
        ([range(15), range(15)], 0),
        ([range(64), range(1, 65)], 0),  # equal tokens elsewhere are others
    ],
)
def test_whole_blocks_from_the_start_are_found_again(prompts: Any, hits: int) -> None:
    cache = PrefixCache()
    for prompt in prompts:
        cache.look_up(list(prompt))
    assert (cache.queries, cache.hits) == (sum(map(len, prompts)), hits)


def test_each_completion_of_a_prompt_looks_for_itself() -> None:
    cache = PrefixCache()
    cache.look_up(range(64), n=4)
    assert (cache.queries, cache.hits) == (4 * 64, 3 * 48)


def test_an_adapters_prompts_are_its_own() -> None:
    cache = PrefixCache()
    for salt in ("", "adapter"):
        cache.look_up(range(64), salt=salt)
    assert cache.hits == 0


def test_the_least_recently_used_blocks_make_room() -> None:
    cache = PrefixCache(capacity=2)
    one, two, three = (list(range(start, start + BLOCK_TOKENS + 1)) for start in (0, 100, 200))
    for prompt in (one, two, one, three):
        cache.look_up(prompt)
    assert cache.hits == BLOCK_TOKENS
    cache.look_up(one)
    assert cache.hits == 2 * BLOCK_TOKENS
    cache.look_up(two)
    assert cache.hits == 2 * BLOCK_TOKENS


def test_a_server_tells_its_counts_and_forgets_blocks_but_no_counts_on_reset() -> None:
    apps = Apps(one={})
    cache = apps.apps["one"].worker.prefix_cache  # type: ignore[union-attr]
    with VLLMClientPool(apps.urls, transport=apps) as pool:
        pool.generate([list(range(33))], n=2, max_tokens=1)
        pool.reset_prefix_cache()
        pool.generate([list(range(33))], max_tokens=1)
    assert (cache.queries, cache.hits) == (99, 32)
    assert 'vllm:prefix_cache_hits_total{engine="0",model_name="m"} 32.0\n' in cache.metrics("m")
