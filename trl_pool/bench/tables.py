"""Figures for the eye, in tables that a README takes as well, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from .figures import FleetFigures

NOTHING = "–"


def fleet_rows(fleets: Sequence[FleetFigures]) -> list[dict[str, str]]:
    """A row per number of servers."""
    rows = []
    for fleet in fleets:
        spread = f" ({_seconds(fleet.step_seconds_low)} – {_seconds(fleet.step_seconds_high)})"
        row = {
            "servers": str(fleet.servers),
            "step, s": _seconds(fleet.step_seconds) + (spread if fleet.steps > 1 else ""),
            "prompts/s": _rate(fleet.prompts_per_second),
            "tokens/s": _rate(fleet.tokens_per_second),
            "call p50, s": _seconds(fleet.call_p50),
            "call p99, s": _seconds(fleet.call_p99),
            "cache hits": _percent(fleet.cache_hits),
        }
        if fleet.speed_up is not None:
            row["speed-up"] = f"{fleet.speed_up:.2f}"
            row["efficiency"] = _percent(fleet.efficiency)
            row["each adds"] = NOTHING if fleet.adds is None else f"{fleet.adds:.2f} servers"
        rows.append(row)
    return rows


def server_rows(fleet: FleetFigures) -> list[dict[str, str]]:
    """A row per server."""
    return [
        {
            "server": server.url,
            "prompts": str(server.prompts),
            "share": _percent(server.share),
            "tokens/s": _rate(server.tokens_per_second),
            "tokens": _percent(server.token_share),
            "requests": str(server.requests),
            "request, s": _seconds(server.request_seconds),
            "call p50, s": _seconds(server.call_p50),
            "call p99, s": _seconds(server.call_p99),
            "cache hits": _percent(server.cache_hits),
            "failures": str(server.failures or NOTHING),
            "moved away": str(server.failovers or NOTHING),
        }
        for server in fleet.per_server
    ]


def notes(fleets: Sequence[FleetFigures]) -> list[str]:
    """What the figures say about the servers, and what speaks against them."""
    found = []
    for before, fleet in zip([None, *fleets], fleets, strict=False):
        if fleet.adds is not None and before is not None:
            new = fleet.per_server[before.servers :]
            what = f"server {fleet.servers} ({new[-1].url})" if len(new) == 1 else f"each of {len(new)} more servers"
            doubt = ""
            if (
                fleet.step_seconds_low <= before.step_seconds_high
                and before.step_seconds_low <= fleet.step_seconds_high
            ):
                doubt = f" Steps of {before.servers} and {fleet.servers} overlap: more of them (--steps) say it surer."
            found.append(
                f"{fleet.servers} servers: {what} adds {fleet.adds:.2f} of a server; together they do "
                f"{fleet.speed_up:.2f} times the work of one.{doubt}"
            )
        idle = [server.url for server in fleet.per_server if not server.prompts]
        if idle:
            found.append(f"{fleet.servers} servers: {', '.join(idle)} answered no prompt at all.")
        failures = sum(server.failures for server in fleet.per_server)
        if failures:
            found.append(f"{fleet.servers} servers: {failures} requests failed, and their time is in the figures.")
    if fleets and fleets[0].speed_up is not None and fleets[0].servers > 1:
        found.append(f"One server was not measured: it is taken to do 1/{fleets[0].servers} of what the first do.")
    return found


def text(fleets: Sequence[FleetFigures]) -> str:
    """All of it: fleets, the servers of the largest, notes."""
    if not fleets:
        return "nothing was measured"
    largest = fleets[-1]
    each = [f"Each of the {largest.servers}:"] if len(fleets) > 1 else []
    return "\n\n".join([_table(fleet_rows(fleets)), *each, _table(server_rows(largest)), *notes(fleets)])


def as_json(fleets: Sequence[FleetFigures], **about: Any) -> dict[str, Any]:
    """All of it as JSON values."""
    return {**about, "fleets": [dataclasses.asdict(fleet) for fleet in fleets], "notes": notes(fleets)}


def _table(rows: Sequence[dict[str, str]]) -> str:
    columns = [name for name in rows[0] if any(row.get(name, NOTHING) != NOTHING for row in rows)]
    cells = [[row.get(name, NOTHING) for name in columns] for row in rows]
    align = ["left" if name == "server" else "right" for name in columns]
    return str(tabulate(cells, headers=columns, tablefmt="github", disable_numparse=True, colalign=align))


def _seconds(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.0f} %"
