"""From measured steps to figures: rates, shares, percentiles, and what each further server adds."""

from __future__ import annotations

import functools
import math
import operator
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .measure import Step
from .metrics import CacheCount


@dataclass(frozen=True)
class ServerFigures:
    """One server's part in what a fleet did.

    Args:
        url (`str`): The server.
        prompts (`int`): Prompts that it answered, each turn counted.
        share (`float`): Its part of all prompts.
        tokens (`int`): Tokens of completions.
        token_share (`float`): Its part of all of them.
        tokens_per_second (`float`): While steps were under way.
        requests (`int`): HTTP requests that it was sent.
        request_seconds (`float` or `None`): Mean time of those that it answered.
        call_p50, call_p99 (`float` or `None`): Seconds of the calls of one prompt that it served.
        failures (`int`): Requests that failed.
        failovers (`int`): Prompts taken from it and sent elsewhere.
        cache_hits (`float` or `None`): Part of the prompts' tokens found in its prefix cache, where it tells.
    """

    url: str
    prompts: int
    share: float
    tokens: int
    token_share: float
    tokens_per_second: float
    requests: int
    request_seconds: float | None
    call_p50: float | None
    call_p99: float | None
    failures: int
    failovers: int
    cache_hits: float | None


@dataclass(frozen=True)
class FleetFigures:
    """What the first so many servers did.

    Args:
        servers (`int`): How many.
        steps (`int`): Steps that were measured.
        step_seconds, step_seconds_low, step_seconds_high (`float`): Median, least and most.
        prompts_per_second, completions_per_second, tokens_per_second (`float`): Medians over the steps.
        calls (`int`): Calls that were timed.
        call_p50, call_p99 (`float`): Their seconds.
        cache_hits (`float` or `None`): Part of the prompts' tokens found in prefix caches; `None` unless all tell.
        speed_up (`float` or `None`):
            Tokens per second, in units of what one server does: of the smallest fleet that was measured, divided by
            its servers. `None` when there is nothing to compare.
        efficiency (`float` or `None`): `speed_up` per server.
        adds (`float` or `None`): What each server adds that the fleet before did not have.
        per_server (`tuple[ServerFigures, ...]`): In the order of the servers.
    """

    servers: int
    steps: int
    step_seconds: float
    step_seconds_low: float
    step_seconds_high: float
    prompts_per_second: float
    completions_per_second: float
    tokens_per_second: float
    calls: int
    call_p50: float
    call_p99: float
    cache_hits: float | None
    speed_up: float | None
    efficiency: float | None
    adds: float | None
    per_server: tuple[ServerFigures, ...]


def figures(steps: Sequence[Step]) -> list[FleetFigures]:
    """Figures of each number of servers, ascending."""
    counts = sorted({step.servers for step in steps})
    groups = {count: [step for step in steps if step.servers == count] for count in counts}
    rates = {count: _rate(group, "tokens") for count, group in groups.items()}
    found = []
    for place, (count, group) in enumerate(groups.items()):
        speed_up = adds = None
        if len(counts) > 1 and rates[counts[0]]:
            one = rates[counts[0]] / counts[0]
            speed_up = rates[count] / one
            if place:
                before = counts[place - 1]
                adds = (rates[count] - rates[before]) / one / (count - before)
        seconds = [step.seconds for step in group]
        calls = [call for step in group for call in step.call_seconds]
        found.append(
            FleetFigures(
                servers=count,
                steps=len(group),
                step_seconds=statistics.median(seconds),
                step_seconds_low=min(seconds),
                step_seconds_high=max(seconds),
                prompts_per_second=_rate(group, "prompts"),
                completions_per_second=_rate(group, "completions"),
                tokens_per_second=rates[count],
                calls=len(calls),
                call_p50=percentile(calls, 50),
                call_p99=percentile(calls, 99),
                cache_hits=_hits(part.cache for step in group for part in step.parts.values()),
                speed_up=speed_up,
                efficiency=None if speed_up is None else speed_up / count,
                adds=adds,
                per_server=_per_server(group),
            )
        )
    return found


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that is not exceeded by so many percent of them (nearest rank)."""
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def _rate(steps: Sequence[Step], what: str) -> float:
    amounts = [sum(int(getattr(part, what)) for part in step.parts.values()) for step in steps]
    return statistics.median(amount / step.seconds for amount, step in zip(amounts, steps, strict=True))


def _hits(counts: Iterable[CacheCount | None]) -> float | None:
    """The part that was found, of all; `None` when one does not tell."""
    told = list(counts)
    known = [count for count in told if count is not None]
    return functools.reduce(operator.add, known, CacheCount()).rate if len(known) == len(told) else None


def _per_server(steps: Sequence[Step]) -> tuple[ServerFigures, ...]:
    seconds = sum(step.seconds for step in steps)
    everything = [part for step in steps for part in step.parts.values()]
    prompts, tokens = sum(part.prompts for part in everything), sum(part.tokens for part in everything)
    found = []
    for url in dict.fromkeys(url for step in steps for url in step.parts):
        parts = [step.parts[url] for step in steps if url in step.parts]
        answered = sum(part.answered for part in parts)
        calls = [call for part in parts for call in part.call_seconds]
        mine, its_tokens = sum(part.prompts for part in parts), sum(part.tokens for part in parts)
        found.append(
            ServerFigures(
                url=url,
                prompts=mine,
                share=mine / prompts if prompts else 0.0,
                tokens=its_tokens,
                token_share=its_tokens / tokens if tokens else 0.0,
                tokens_per_second=its_tokens / seconds,
                requests=sum(part.requests for part in parts),
                request_seconds=sum(part.request_seconds for part in parts) / answered if answered else None,
                call_p50=percentile(calls, 50) if calls else None,
                call_p99=percentile(calls, 99) if calls else None,
                failures=sum(part.failures for part in parts),
                failovers=sum(part.failovers for part in parts),
                cache_hits=_hits(part.cache for part in parts),
            )
        )
    return tuple(found)
