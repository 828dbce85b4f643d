"""Asks a workload of pools over more and more of the servers, and takes the time.

One pool at a time: a `trl vllm-serve` that works for one pool answers no probe of another, which would take it for
hung and give it less to do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

from ..config import PoolConfig
from ..errors import ConfigurationError
from ..fleet import PoolStatistics
from ..pool import AsyncVLLMClientPool
from ..provenance import RolloutReport
from .metrics import CacheCount, CacheReader
from .workload import WORDS, Prompt, Workload, from_dataset, kind_of


class Bar(Protocol):
    """What is needed of a tqdm bar."""

    def update(self, n: float | None = 1) -> bool | None: ...

    def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None: ...

    def reset(self, total: float | None = None) -> None: ...


@dataclass(frozen=True)
class Part:
    """What one server did in one step.

    Args:
        prompts (`int`): Prompts that it answered, each turn counted.
        completions (`int`): Completions.
        tokens (`int`): Their tokens.
        requests (`int`): HTTP requests that it was sent.
        answered (`int`): Those that it answered.
        request_seconds (`float`): How long these took, added up.
        failures (`int`): Those that failed.
        failovers (`int`): Prompts taken from it and sent elsewhere.
        cache ([`CacheCount`] or `None`): What its prefix cache counted, where it tells.
        call_seconds (`tuple[float, ...]`): Of the calls of one prompt that it served.
    """

    prompts: int = 0
    completions: int = 0
    tokens: int = 0
    requests: int = 0
    answered: int = 0
    request_seconds: float = 0.0
    failures: int = 0
    failovers: int = 0
    cache: CacheCount | None = None
    call_seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Step:
    """One measured step.

    Args:
        servers (`int`): Servers in the pool.
        number (`int`): Which step, from 0.
        seconds (`float`): From its first request to its last answer.
        parts (`dict[str, Part]`): Per server's URL.
        call_seconds (`tuple[float, ...]`): How long each call took.
    """

    servers: int
    number: int
    seconds: float
    parts: dict[str, Part]
    call_seconds: tuple[float, ...]


@dataclass
class _Tally:
    """Counts answers while a step is under way."""

    prompts: dict[str, int] = field(default_factory=dict)
    completions: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    calls: list[tuple[str | None, float]] = field(default_factory=list)

    def add(self, report: RolloutReport, answer: dict[str, Any], n: int, seconds: float) -> None:
        urls = [prompt.backend or "" for prompt in report.prompts]
        for index, url in enumerate(urls):
            completions = answer["completion_ids"][index * n : (index + 1) * n]
            self.prompts[url] = self.prompts.get(url, 0) + 1
            self.completions[url] = self.completions.get(url, 0) + len(completions)
            self.tokens[url] = self.tokens.get(url, 0) + sum(map(len, completions))
        self.calls.append((urls[0] if len(urls) == 1 else None, seconds))


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        workload ([`Workload`]): A step's work.
        steps (`int`, *optional*, defaults to `5`): Steps that count.
        warm_up (`int`, *optional*, defaults to `1`): Steps before them.
        counts (`tuple[int, ...]`, *optional*):
            How many of the servers take part, in turn; all of them without it.
        compare (`bool`, *optional*, defaults to `False`): Whether `counts` are 1, 2, … and all.
        dataset (`list`, *optional*): Prompts to take instead of made-up ones.
        reset_caches (`bool`, *optional*, defaults to `False`):
            Whether prefix caches are emptied before every step, as after a weight update.
    """

    workload: Workload
    steps: int = 5
    warm_up: int = 1
    counts: tuple[int, ...] | None = None
    compare: bool = False
    dataset: Sequence[Prompt] | None = None
    reset_caches: bool = False

    def resolved(self, servers: int) -> tuple[int, ...]:
        """How many servers take part, in turn.

        Raises:
            [`ConfigurationError`]: when there are not so many.
        """
        if self.counts is None:
            return tuple(range(1, servers + 1)) if self.compare else (servers,)
        wrong = [count for count in self.counts if not 1 <= count <= servers]
        if wrong:
            raise ConfigurationError(f"--servers {wrong[0]}: there are {servers}; allowed: 1-{servers}")
        return tuple(sorted(set(self.counts)))


class Bench:
    """A benchmark of some servers. What it has measured is in `steps` at any time, also when it was broken off.

    Args:
        urls (`Sequence[str]`): The servers, or a gateway before them.
        plan ([`Plan`]): What is measured.
        config ([`PoolConfig`], *optional*): The pools' settings.
        connection_timeout (`float`, *optional*, defaults to `10.0`): Seconds to wait for the servers to be up.
        bar ([`Bar`], *optional*): Told of prompts that are done.
        inner_bars (`bool`, *optional*, defaults to `False`): Whether each call of many prompts shows one of its own.
        transport (`httpx.AsyncBaseTransport`, *optional*): Instead of sockets.
        clock (`Callable[[], float]`, *optional*): Monotonic seconds.
    """

    def __init__(
        self,
        urls: Sequence[str],
        plan: Plan,
        *,
        config: PoolConfig | None = None,
        connection_timeout: float = 10.0,
        bar: Bar | None = None,
        inner_bars: bool = False,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.urls = list(urls)
        self.plan = plan
        self.steps: list[Step] = []
        self.dialect = ""
        self.model: str | None = None
        self._config = config or PoolConfig()
        self._connection_timeout, self._transport, self._clock = connection_timeout, transport, clock
        self._bar, self._inner_bars = bar, inner_bars
        self._vocabulary: list[int] = []

    async def run(self) -> None:
        """Measures everything.

        Raises:
            [`ConfigurationError`]: when the workload does not fit the servers.
            [`PoolError`]: what the pool raises; the steps before it are kept.
        """
        async with self._pool(self.urls) as pool:
            self.urls = [backend.url for backend in pool.statistics().backends]  # those behind a gateway
            counts = self.plan.resolved(len(self.urls))
            self.dialect, self.model = pool.dialect.name, pool.model
            self._require_fit(pool)
        workload = self.plan.workload
        rounds = self.plan.warm_up + self.plan.steps
        if self._bar is not None:
            self._bar.reset(len(counts) * rounds * workload.prompts * workload.turns)
        async with CacheReader(self._config, self._transport) as reader:
            for count in counts:
                async with self._pool(self.urls[:count]) as pool:
                    if not self._vocabulary and self.plan.dataset is None:
                        self._vocabulary = await self._learn(pool)
                    for number in range(rounds):
                        self._show(count, number)
                        step = await self._step(pool, reader, count, number)
                        if number >= self.plan.warm_up:
                            self.steps.append(step)

    def _pool(self, urls: Sequence[str]) -> AsyncVLLMClientPool:
        # What is measured on so many servers must not begin with fewer.
        config = self._config.model_copy(update={"min_backends": len(urls)})
        return AsyncVLLMClientPool(
            urls, connection_timeout=self._connection_timeout, config=config, transport=self._transport
        )

    def _require_fit(self, pool: AsyncVLLMClientPool) -> None:
        limit, longest = pool.limits().max_model_len, self.plan.workload.longest
        if limit is None:
            raise ConfigurationError(
                f"{self.urls[0]} is a `trl vllm-serve`, which hangs for good at a prompt that is too long for it and "
                "does not say how long that is: give its --max_model_len as --max-model-len"
            )
        if self.plan.dataset is None and longest > limit:
            raise ConfigurationError(
                f"the longest prompt with its completion has {longest} tokens and the servers take {limit}: lower "
                "--prompt-tokens, --shared-prefix, --max-tokens or --turns"
            )

    async def _learn(self, pool: AsyncVLLMClientPool) -> list[int]:
        """Token ids to make prompts of: those that common words have."""
        limit = pool.limits().max_model_len or len(WORDS)
        text = WORDS[: max(1, limit - 8)]  # a token has at least a byte; some tokenizers put a token before all
        answer = await pool.generate([text], max_tokens=1)
        return sorted(set(answer["prompt_ids"][0][1:])) or [0]

    def _show(self, count: int, number: int) -> None:
        if self._bar is not None:
            name = "warm-up" if number < self.plan.warm_up else f"step {number - self.plan.warm_up + 1}"
            self._bar.set_description(f"{count} server{'s' * (count > 1)}, {name}")

    async def _step(self, pool: AsyncVLLMClientPool, reader: CacheReader, count: int, number: int) -> Step:
        workload, urls = self.plan.workload, self.urls[:count]
        if self.plan.dataset is None:
            prompts = workload.synthetic(self._vocabulary, number, salt=count)
        else:
            prompts = from_dataset(self.plan.dataset, workload.prompts, number)
        lengths = workload.lengths(number)
        if self.plan.reset_caches:
            await pool.reset_prefix_cache()
        tally = _Tally()
        caches, before = await reader.read(urls), pool.statistics()
        started = self._clock()
        if workload.concurrency is None:
            await self._together(pool, prompts, number, tally)
        else:
            await self._apart(pool, prompts, lengths, number, tally)
        seconds = self._clock() - started
        after = pool.statistics()
        counted = {
            url: now.since(then) if now is not None and (then := caches[url]) is not None else None
            for url, now in (await reader.read(urls)).items()
        }
        parts = _parts(before, after, tally, counted)
        return Step(count, number - self.plan.warm_up, seconds, parts, tuple(seconds for _, seconds in tally.calls))

    async def _together(self, pool: AsyncVLLMClientPool, prompts: list[Prompt], number: int, tally: _Tally) -> None:
        """All prompts in one call, turn after turn."""
        workload = self.plan.workload
        for turn in range(workload.turns):
            answer = await self._ask(pool, prompts, workload.max_tokens, tally)
            prompts = [
                workload.grown(ids, answer["completion_ids"][index * workload.n], (number, index, turn))
                for index, ids in enumerate(answer["prompt_ids"])
            ]

    async def _apart(
        self, pool: AsyncVLLMClientPool, prompts: list[Prompt], lengths: list[int], number: int, tally: _Tally
    ) -> None:
        """So many conversations at once, each prompt in a call of its own."""
        workload = self.plan.workload

        async def converse(waiting: Iterator[int]) -> None:
            for index in waiting:
                prompt = prompts[index]
                for turn in range(workload.turns):
                    answer = await self._ask(pool, [prompt], lengths[index], tally)
                    prompt = workload.grown(
                        answer["prompt_ids"][0], answer["completion_ids"][0], (number, index, turn)
                    )

        waiting = iter(range(len(prompts)))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(workload.concurrency or 1, len(prompts))):
                    group.create_task(converse(waiting))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _ask(
        self, pool: AsyncVLLMClientPool, prompts: list[Prompt], max_tokens: int, tally: _Tally
    ) -> dict[str, Any]:
        workload = self.plan.workload
        method: Any = pool.chat if kind_of(prompts[0]) == "messages" else pool.generate
        started = self._clock()
        answer: dict[str, Any] = await method(
            prompts,
            n=workload.n,
            max_tokens=max_tokens,
            generation_kwargs={} if workload.until_eos else {"ignore_eos": True},
            progress=self._inner_bars and len(prompts) > 1,
        )
        # Of this call, whatever others are out: no other task has run since the pool wrote it.
        report = pool.last_report
        assert report is not None
        tally.add(report, answer, workload.n, self._clock() - started)
        if self._bar is not None:
            self._bar.update(len(prompts))
        return answer


def _parts(
    before: PoolStatistics, after: PoolStatistics, tally: _Tally, caches: dict[str, CacheCount | None]
) -> dict[str, Part]:
    """Per server the difference between two moments, and what was answered between them."""
    then = {backend.url: backend for backend in before.backends}
    parts = {}
    for now in after.backends:
        url, was = now.url, then[now.url]
        parts[url] = Part(
            prompts=tally.prompts.get(url, 0),
            completions=tally.completions.get(url, 0),
            tokens=tally.tokens.get(url, 0),
            requests=now.requests - was.requests,
            answered=now.answered - was.answered,
            request_seconds=(now.latency or 0.0) * now.answered - (was.latency or 0.0) * was.answered,
            failures=now.failures - was.failures,
            failovers=now.failovers - was.failovers,
            cache=caches.get(url),
            call_seconds=tuple(seconds for served_by, seconds in tally.calls if served_by == url),
        )
    return parts
