"""What `vllm serve` tells at `/metrics`: how many prompt tokens it looked for in its prefix cache, and found.

Of Prometheus' text format two counters are wanted, so a dozen lines read it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from ..config import PoolConfig

_NAMES = ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits")  # the latter are among the former; both in tokens
_MOST_SECONDS = 5.0


@dataclass(frozen=True)
class CacheCount:
    """Prompt tokens that a server looked for in its prefix cache, and found there. Each completion of a prompt looks
    for itself."""

    queries: float = 0.0
    hits: float = 0.0

    def __add__(self, other: CacheCount) -> CacheCount:
        return CacheCount(self.queries + other.queries, self.hits + other.hits)

    def since(self, before: CacheCount) -> CacheCount | None:
        """What was counted between; `None` when the server was started anew meanwhile."""
        if self.queries < before.queries or self.hits < before.hits:
            return None
        return CacheCount(self.queries - before.queries, self.hits - before.hits)

    @property
    def rate(self) -> float | None:
        """The part that was found."""
        return self.hits / self.queries if self.queries else None


def counters(text: str) -> dict[str, float]:
    """Every sample of Prometheus' text format by name, those that differ in labels only added up. Lines that are no
    sample are passed over."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        head, _, tail = line.rpartition("}") if "{" in line else line.partition(" ")
        name = line.partition("{")[0].strip() if "{" in line else head
        try:
            value = float(tail.split()[0])
        except (IndexError, ValueError):
            continue
        if math.isfinite(value):
            found[name] = found.get(name, 0.0) + value
    return found


def cache_count(text: str) -> CacheCount | None:
    """The prefix cache's counters; `None` where the text has none."""
    found = counters(text)
    # With the suffix that OpenMetrics wants, and as older clients of Prometheus wrote it.
    values = [found.get(f"{name}_total", found.get(name)) for name in _NAMES]
    queries, hits = values
    return None if queries is None or hits is None else CacheCount(queries, hits)


class CacheReader:
    """Reads the counters of servers; as a context manager it closes its connections at the end.

    Args:
        config ([`PoolConfig`]): The API key and whether proxies are obeyed.
        transport (`httpx.AsyncBaseTransport`, *optional*): Instead of sockets.
    """

    def __init__(self, config: PoolConfig, transport: httpx.AsyncBaseTransport | None = None) -> None:
        key = config.backend_api_key
        self._client = httpx.AsyncClient(
            transport=transport,
            trust_env=config.trust_env,
            timeout=_MOST_SECONDS,
            headers={"authorization": f"Bearer {key.get_secret_value()}"} if key else None,
        )
        self._silent: set[str] = set()

    async def __aenter__(self) -> CacheReader:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._client.aclose()

    async def read(self, urls: Sequence[str]) -> dict[str, CacheCount | None]:
        """The counters of each server now; `None` of one that does not tell, which is not asked again."""
        return dict(zip(urls, await asyncio.gather(*map(self._one, urls)), strict=True))

    async def _one(self, url: str) -> CacheCount | None:
        if url in self._silent:
            return None
        try:
            answer = await self._client.get(f"{url}/metrics", follow_redirects=True)
        except httpx.HTTPError:
            return None  # the next time it may be less busy
        found = cache_count(answer.text) if answer.status_code == 200 else None
        if found is None:
            self._silent.add(url)
        return found
