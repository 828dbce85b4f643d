"""What the gateway costs beside its peers."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .gateway_peers import LARGE_PATH, PEERS, Fleet, programs, start_backends, start_peer
from .report import Report, Spread, Table
from .rounds import column, interleave

SUMMARY = "the gateway beside HAProxy, nginx and other routers, measured with wrk"

DELAY_SECONDS = 0.02
CONNECTIONS = 16
LARGE_CONNECTIONS = 4

CASES = {
    "A /v1/completions": "the server answers at once: what a request costs in CPU time",
    "A /generate/": "the same for a `trl vllm-serve`",
    "B /v1/completions": f"the server takes {DELAY_SECONDS * 1e3:.0f} ms: what a request waits longer",
    "20 MB": f"answers of 20 MB, at once, over {LARGE_CONNECTIONS} connections",
}

# Of what a case is measured, what is wanted of the gateway: figure, words, and whether it is reached.
TARGETS: dict[str, list[tuple[str, str, Callable[[float], bool]]]] = {
    "A /v1/completions": [("ratio", "≥ 0.08 of direct", lambda x: x >= 0.08)],
    "A /generate/": [("ratio", "≥ 0.08 of direct", lambda x: x >= 0.08)],
    "B /v1/completions": [
        ("ratio", "≥ 0.92 of direct", lambda x: x >= 0.92),
        ("added p50", "≤ 1.5 ms added at p50", lambda x: x <= 1.5),
        ("added p99", "≤ 6 ms added at p99", lambda x: x <= 6.0),
    ],
    "20 MB": [("ratio", "≥ 0.8 of direct", lambda x: x >= 0.8)],
}

_OPTIONAL = ("litellm",)


def add_options(group: argparse._ArgumentGroup) -> None:
    """Seconds, peers, cases."""
    group.add_argument(
        "--gateway-seconds", type=int, default=1, help="seconds of wrk per measurement (default: %(default)s)"
    )
    group.add_argument(
        "--gateway-bin", type=Path, action="append", default=[], metavar="FOLDER", help="where else to look for peers"
    )
    group.add_argument(
        "--gateway-peers", default=",".join(p for p in PEERS if p not in _OPTIONAL), help="(%(default)s)"
    )
    group.add_argument("--gateway-cases", default=",".join(CASES), help="(%(default)s)")


def run(options: argparse.Namespace) -> Report:
    """Measures every case with every peer that is installed."""
    report = Report()
    with tempfile.TemporaryDirectory() as name, programs(Path(name), options.gateway_bin) as running:
        missing = [what for what in ("nginx", "wrk") if running.find(what) is None]
        if missing:
            report.tables.append(Table("Gateway", [], [], [f"not measured: {', '.join(missing)} is not installed"]))
            return report
        Path(name).chmod(0o755)  # nginx reads as nobody when it was started as root
        _write_answers(Path(name))
        fleets = start_backends(running, DELAY_SECONDS)
        started: dict[tuple[tuple[str, str], bool, str], str | None] = {}
        for number, case in enumerate(options.gateway_cases.split(",")):
            fleet = fleets[case]
            urls: dict[str, str] = {"direct": fleet.urls[0]}
            skipped = []
            for peer in options.gateway_peers.split(","):
                key = (fleet.urls, fleet.path.startswith("/v1/"), peer)
                if key not in started:
                    started[key] = start_peer(peer, fleet, running, str(number))
                url = started[key]
                if url is None:
                    skipped.append(peer)
                else:
                    urls[peer] = url
            wrk = str(running.find("wrk"))
            results = interleave(
                {name: _measurement(wrk, url, fleet, options.gateway_seconds) for name, url in urls.items()},
                options.rounds,
                title=case,
            )
            table, data = _table(case, results, skipped)
            report.tables.append(table)
            report.data[case] = data
    report.figures["gateway"] = lambda figure: _draw(figure, report.data)
    return report


def _measurement(wrk: str, url: str, fleet: Fleet, seconds: int) -> Callable[[], dict[str, float]]:
    script = Path(__file__).with_name("gateway_post.lua")
    large = fleet.path == LARGE_PATH
    connections = LARGE_CONNECTIONS if large else CONNECTIONS
    command = [wrk, "-t1", f"-c{connections}", f"-d{seconds}", "--timeout", "30", "-s", str(script), url]

    def measure() -> dict[str, float]:
        environment = {**os.environ, "GATEWAY_PATH": fleet.path}
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
        figures: dict[str, float] = json.loads(output.stdout.splitlines()[-1])
        return figures

    return measure


def _table(
    case: str, results: Mapping[str, list[dict[str, float]]], skipped: list[str]
) -> tuple[Table, dict[str, dict[str, Any]]]:
    def of(name: str, key: str) -> Spread:
        return Spread.of(column(results, name, key))

    direct = {key: of("direct", key) for key in ("rate", "p50", "p99")}
    data: dict[str, dict[str, Any]] = {}
    rows = []
    for name in results:
        added = {
            key: Spread.of(a - b for a, b in zip(of(name, key).values, direct[key].values, strict=True))
            for key in ("p50", "p99")
        }
        data[name] = {
            "rate": of(name, "rate"),
            "ratio": of(name, "rate") / direct["rate"],
            "p50": of(name, "p50"),
            "p99": of(name, "p99"),
            "added p50": added["p50"],
            "added p99": added["p99"],
            "errors": sum(column(results, name, "errors")),
        }
        figures = data[name]
        rows.append(
            [
                name,
                figures["rate"].text(0),
                figures["ratio"].text(3),
                *(figures[key].text(2) for key in ("p50", "p99", "added p50", "added p99")),
                f"{figures['errors']:.0f}",
            ]
        )
    notes = []
    for figure, words, reached in TARGETS[case]:
        if "trl_pool" in data:
            found = data["trl_pool"][figure].median
            notes.append(f"Target {words}: {found:.3g}, {'reached' if reached(found) else 'NOT reached'}.")
    if skipped:
        notes.append(f"Not measured, since not installed or without such an endpoint: {', '.join(skipped)}.")
    columns = ["", "requests/s", "of direct", "p50 ms", "p99 ms", "added at p50", "added at p99", "errors"]
    return Table(f"{case}: {CASES[case]}", columns, rows, notes), data


def _draw(figure: Any, data: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    panels = figure.subplots(1, len(data), squeeze=False)[0]
    for axes, (case, found) in zip(panels, data.items(), strict=True):
        names = [name for name in found if name != "direct"][::-1]
        values = [found[name]["ratio"].median for name in names]
        colours = ["tab:orange" if name == "trl_pool" else "tab:blue" for name in names]
        axes.barh(names, values, color=colours)
        axes.set_title(case, fontsize=9)
        axes.set_xlabel("of direct", fontsize=8)
        axes.tick_params(labelsize=8)


def _write_answers(folder: Path) -> None:
    """Answers as servers give them: token ids and logprobs."""
    rng = random.Random(0)

    def completion(tokens: int) -> dict[str, Any]:
        ids = [rng.randrange(1000, 150_000) for _ in range(tokens)]
        logprobs = {
            "tokens": [f"token_id:{token}" for token in ids],
            "token_logprobs": [-rng.random() for _ in ids],
        }
        return {"index": 0, "text": "", "finish_reason": "length", "token_ids": ids, "logprobs": logprobs}

    def answer(tokens: int) -> dict[str, Any]:
        return {"id": "cmpl-1", "object": "text_completion", "model": "m", "choices": [completion(tokens)]}

    ids = [rng.randrange(1000, 150_000) for _ in range(1350)]
    generated = {
        "prompt_ids": [[1, 2, 3]],
        "completion_ids": [ids],
        "logprobs": [[[-rng.random()] for _ in ids]],
        "logprob_token_ids": [[[token] for token in ids]],
    }
    for name, value in (("answer", answer(1140)), ("large", answer(455_000)), ("generated", generated)):
        (folder / f"{name}.json").write_text(json.dumps(value, separators=(",", ":")))
