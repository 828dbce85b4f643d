"""`python -m trl_pool.bench --backends URL,URL`: is my fourth server worth it?"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .._version import __version__
from ..errors import BackendsUnreachableError, ConfigurationError, InvalidRequestError, PoolError, RequestRejectedError
from ..extras import needs_extra
from .command_line import PROGRAM, read
from .figures import FleetFigures, figures
from .measure import Bench

with needs_extra("bench", "A benchmark's table"):
    from .tables import as_json, text


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints tables, and returns the exit status: 2 for wrong settings, 1 when the servers cannot be reached
    or give up, 130 after Ctrl-C. What was measured before that is printed all the same."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        command = read(argv)
    except ConfigurationError as error:
        return _complain(2, str(error))
    bars = sys.stderr.isatty() and not command.quiet
    with tqdm(total=0, unit="prompt", disable=not bars, dynamic_ncols=True, leave=False) as bar:
        bench = Bench(
            command.urls,
            command.plan,
            config=command.config,
            connection_timeout=command.wait_seconds,
            bar=bar,
            inner_bars=bars,
        )
        status, why = _run(bench)
    found = figures(bench.steps)
    if found:
        if status:
            print("Measured before it ended:", end="\n\n")
        print(heading(bench), text(found), sep="\n\n", flush=True)
        if command.json is not None:
            try:
                write(command.json, bench, found, complete=not status)
            except OSError as error:
                return _complain(status or 2, f"--json {command.json}: {error}")
    return _complain(status, why) if status else 0


def _run(bench: Bench) -> tuple[int, str]:
    """Exit status, and what to say of it."""
    try:
        asyncio.run(bench.run())
    except KeyboardInterrupt:
        return 130, "interrupted"
    except (ConfigurationError, InvalidRequestError) as error:
        return 2, str(error)
    except RequestRejectedError as error:
        return 2, f"{error}; ask for something else"
    except BackendsUnreachableError as error:
        return 1, f"{error}; start what is missing, leave it out of --backends, or --wait longer"
    except PoolError as error:
        return 1, str(error)
    return 0, ""


def _complain(status: int, why: str) -> int:
    print(f"{PROGRAM}: {why}", file=sys.stderr)
    return status


def heading(bench: Bench) -> str:
    """What was asked of whom."""
    work = bench.plan.workload
    kind = "vllm serve" if bench.dialect == "vllm" else "trl vllm-serve"
    if bench.plan.dataset is None:
        shared = f"{work.shared_prefix} shared and " if work.shared_prefix else ""
        prompts = f"{work.prompts} prompts of {shared}{work.prompt_tokens} tokens"
    else:
        prompts = f"{work.prompts} of {len(bench.plan.dataset)} prompts"
    lengths = f"{'up to ' if work.until_eos or work.length_sigma else ''}{work.max_tokens} tokens"
    turns = f" in {work.turns} turns" if work.turns > 1 else ""
    together = "all in one call" if work.concurrency is None else f"{work.concurrency} calls of one prompt at once"
    caches = ", caches emptied before each" if bench.plan.reset_caches else ""
    model = f", {bench.model}" if bench.model else ""
    return (
        f"{kind}{model}. A step: {prompts}, {work.n} completion{'s' * (work.n > 1)} of {lengths}{turns}, {together}"
        f"{caches}. Seed {work.seed}.{_repeated(bench)}"
    )


def _repeated(bench: Bench) -> str:
    """A warning where prompts of a dataset were sent again."""
    plan = bench.plan
    if plan.dataset is None or plan.reset_caches:
        return ""
    sent = (plan.warm_up + plan.steps) * plan.workload.prompts * len({step.servers for step in bench.steps})
    if sent <= len(plan.dataset):
        return ""
    return f"\n{sent} prompts were sent: some came again, and may have been in a cache (--reset-caches empties them)."


def write(path: Path, bench: Bench, found: Sequence[FleetFigures], *, complete: bool) -> None:
    """Writes all figures as JSON."""
    plan: dict[str, Any] = {field.name: getattr(bench.plan, field.name) for field in dataclasses.fields(bench.plan)}
    plan["workload"] = dataclasses.asdict(bench.plan.workload)
    plan["dataset"] = None if bench.plan.dataset is None else len(bench.plan.dataset)
    about = {
        "trl_pool": __version__,
        "python": platform.python_version(),
        "dialect": bench.dialect,
        "model": bench.model,
        "backends": bench.urls,
        "complete": complete,
    }
    path.write_text(json.dumps(as_json(found, about=about, plan=plan), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
