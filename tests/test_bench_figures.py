"""Rates, shares, percentiles and speed-ups of measured steps."""

from __future__ import annotations

import pytest

from trl_pool.bench.figures import figures, percentile
from trl_pool.bench.measure import Part, Step
from trl_pool.bench.metrics import CacheCount
from trl_pool.bench.tables import NOTHING, as_json, fleet_rows, notes, server_rows, text


def step(servers: int, seconds: float, *tokens: int, number: int = 0) -> Step:
    """A step in which each server answered ten prompts with so many tokens."""
    parts = {
        f"http://s{i}": Part(prompts=10, completions=20, tokens=some, requests=2, answered=2, request_seconds=1.0)
        for i, some in enumerate(tokens)
    }
    return Step(servers, number, seconds, parts, (seconds,))


def test_speed_up_is_in_units_of_one_server() -> None:
    found = figures([step(1, 8.0, 800), step(2, 5.0, 400, 400), step(4, 4.0, 200, 200, 200, 200)])
    assert [fleet.tokens_per_second for fleet in found] == [100, 160, 200]
    assert [fleet.speed_up for fleet in found] == pytest.approx([1, 1.6, 2])
    assert [fleet.efficiency for fleet in found] == pytest.approx([1, 0.8, 0.5])
    assert found[0].adds is None
    assert [fleet.adds for fleet in found[1:]] == pytest.approx([0.6, 0.2])


def test_without_one_server_the_smallest_fleet_says_what_one_does() -> None:
    found = figures([step(2, 1.0, 50, 50), step(3, 1.0, 40, 40, 40)])
    assert [fleet.speed_up for fleet in found] == pytest.approx([2, 2.4])
    assert found[1].adds == pytest.approx(0.4)
    assert notes(found)[-1] == "One server was not measured: it is taken to do 1/2 of what the first do."


def test_a_single_fleet_is_compared_with_nothing() -> None:
    (fleet,) = figures([step(2, 1.0, 50, 50)])
    assert fleet.speed_up is fleet.efficiency is fleet.adds is None
    assert "speed-up" not in fleet_rows([fleet])[0]
    assert notes([fleet]) == []


def test_rates_are_medians_so_that_one_slow_step_is_not_the_figure() -> None:
    (fleet,) = figures([step(1, seconds, 100, number=i) for i, seconds in enumerate([1.0, 50.0, 2.0])])
    assert (fleet.step_seconds, fleet.step_seconds_low, fleet.step_seconds_high) == (2, 1, 50)
    assert (fleet.prompts_per_second, fleet.completions_per_second, fleet.tokens_per_second) == (5, 10, 50)


def test_shares_add_up_to_one() -> None:
    (fleet,) = figures([step(3, 2.0, 10, 20, 50), step(3, 3.0, 20, 30, 70, number=1)])
    assert [server.token_share for server in fleet.per_server] == pytest.approx([0.15, 0.25, 0.6])
    assert sum(server.share for server in fleet.per_server) == pytest.approx(1)
    assert [server.tokens_per_second for server in fleet.per_server] == pytest.approx([6, 10, 24])
    assert [server.request_seconds for server in fleet.per_server] == [0.5] * 3


@pytest.mark.parametrize(("percent", "value"), [(50, 50), (99, 99), (100, 100), (1, 1), (0, 1)])
def test_a_percentile_is_one_of_the_values(percent: float, value: float) -> None:
    assert percentile([float(v) for v in range(100, 0, -1)], percent) == value
    assert percentile([7.0], percent) == 7.0


def test_the_fleet_has_cache_hits_only_if_all_servers_tell_theirs() -> None:
    def fleet(*counts: CacheCount | None):
        parts = {f"http://s{i}": Part(prompts=1, tokens=1, cache=count) for i, count in enumerate(counts)}
        return figures([Step(2, 0, 1.0, parts, (1.0,))])[0]

    told = fleet(CacheCount(300, 30), CacheCount(100, 50))
    assert told.cache_hits == 0.2
    assert [server.cache_hits for server in told.per_server] == [0.1, 0.5]
    half = fleet(CacheCount(300, 30), None)
    assert half.cache_hits is None
    assert fleet_rows([half])[0]["cache hits"] == NOTHING
    assert [row["cache hits"] for row in server_rows(half)] == ["10 %", NOTHING]


def test_a_column_that_nobody_fills_is_not_shown() -> None:
    shown = text(figures([step(2, 1.0, 50, 50)]))
    assert "cache hits" not in shown
    assert "failures" not in shown
    assert "tokens/s" in shown


def test_servers_that_failed_or_did_nothing_are_named() -> None:
    parts = {"http://s0": Part(prompts=4, tokens=8, failures=2, failovers=3), "http://s1": Part()}
    (fleet,) = figures([Step(2, 0, 1.0, parts, (1.0,))])
    assert notes([fleet]) == [
        "2 servers: http://s1 answered no prompt at all.",
        "2 servers: 2 requests failed, and their time is in the figures.",
    ]
    assert server_rows(fleet)[1]["request, s"] == NOTHING
    assert [row["failures"] for row in server_rows(fleet)] == ["2", NOTHING]


def test_a_further_server_is_judged_in_words() -> None:
    found = figures([step(1, 8.0, 800), step(2, 5.0, 400, 400), step(4, 4.0, 200, 200, 200, 200)])
    assert notes(found) == [
        "2 servers: server 2 (http://s1) adds 0.60 of a server; together they do 1.60 times the work of one.",
        "4 servers: each of 2 more servers adds 0.20 of a server; together they do 2.00 times the work of one.",
    ]


def test_steps_that_overlap_are_said_to_prove_little() -> None:
    def of(*seconds: float) -> list[Step]:
        tokens = (400, 400) if len(seconds) == 2 else (800,)
        return [step(len(tokens), time, *tokens, number=number) for number, time in enumerate(seconds)]

    (clear,) = notes(figures([*of(8.0), *of(4.0, 5.0)]))
    (doubtful,) = notes(figures([*of(4.5), *of(4.0, 5.0)]))
    assert "overlap" not in clear
    assert doubtful.endswith("Steps of 1 and 2 overlap: more of them (--steps) say it surer.")


def test_json_has_what_the_tables_have() -> None:
    found = figures([step(1, 8.0, 800), step(2, 5.0, 400, 400)])
    value = as_json(found, about={"model": "m"})
    assert value["about"] == {"model": "m"}
    assert [fleet["speed_up"] for fleet in value["fleets"]] == [fleet.speed_up for fleet in found]
    assert [server["url"] for server in value["fleets"][1]["per_server"]] == ["http://s0", "http://s1"]
    assert value["notes"] == notes(found)
