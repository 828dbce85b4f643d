"""What the client itself costs: a step's completions from servers that answer at once."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .canned_server import prompts
from .report import Report, Spread, Table
from .rounds import column, interleave

SUMMARY = "CPU time, wall time and memory of the pool beside TRL's own client"

_ROOT = Path(__file__).parents[2]
_GENERATIONS = {"trl": "legacy", "vllm": "modern"}
_STOCK = {"trl": "TRL's VLLMClient (1.0 – 1.10)", "vllm": "TRL's VLLMClient (1.11 and later)"}
_MANY = 8


def add_options(group: argparse._ArgumentGroup) -> None:
    """Where the peers are, and how much is asked."""
    for dialect, generation in _GENERATIONS.items():
        group.add_argument(
            f"--client-trl-{generation}",
            metavar="PYTHON",
            help=f"interpreter of an environment with the TRL that speaks the {dialect} dialect; pool and peer run in "
            "it (default: this one, if its TRL does)",
        )
    group.add_argument("--client-prompts", type=int, default=256, help="prompts of a call (default: %(default)s)")
    group.add_argument("--client-prompt-tokens", type=int, default=512, help="their length (default: %(default)s)")
    group.add_argument("--client-tokens", type=int, default=1024, help="tokens of a completion (default: %(default)s)")
    group.add_argument(
        "--client-logprobs",
        type=int,
        nargs="+",
        default=[0, 5],
        metavar="K",
        help="logprobs asked for beside the sampled token's; 0 is GRPO's (default: 0 5)",
    )


def run(options: argparse.Namespace) -> Report:
    """One table per dialect and number of logprobs."""
    report = Report(data={"tables": []})
    for dialect, generation in _GENERATIONS.items():
        python = getattr(options, f"client_trl_{generation}") or sys.executable
        stock = python != sys.executable or _has_trl(dialect)
        for logprobs in options.client_logprobs:
            report.tables.append(_measure(dialect, logprobs, python, stock, options, report.data["tables"]))
    report.figures["client"] = partial(_draw, report.data["tables"])
    return report


def _has_trl(dialect: str) -> bool:
    """Whether this interpreter's TRL is of the generation that speaks a dialect."""
    if importlib.util.find_spec("trl") is None:
        return False
    from importlib import metadata

    major, minor = map(int, metadata.version("trl").split(".")[:2])
    return ((major, minor) >= (1, 11)) == (dialect == "vllm")


def _measure(
    dialect: str, logprobs: int, python: str, stock: bool, options: argparse.Namespace, data: list[dict[str, Any]]
) -> Table:
    shape = options.client_prompts, options.client_prompt_tokens, options.client_tokens
    names = {"one": "pool, one server", "many": f"pool, {_MANY} servers", "stock": _STOCK[dialect]}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "prompts.json").write_text(json.dumps(prompts(*shape[:2])))
        urls = stack.enter_context(_servers(dialect, logprobs, shape))
        asked = [f"--prompts={folder / 'prompts.json'}", f"--tokens={shape[2]}", f"--logprobs={logprobs}"]
        subjects = {}
        for key, client, served_by in (("one", "pool", urls[:1]), ("many", "pool", urls), ("stock", "trl", urls[:1])):
            if key != "stock" or stock:
                arguments = [f"--client={client}", f"--urls={','.join(served_by)}", *asked]
                subjects[key] = stack.enter_context(_subject(python, arguments))
        first = {key: one.first for key, one in subjects.items()}
        calls: dict[str, Callable[[], dict[str, float]]] = {key: one.call for key, one in subjects.items()}
        results = interleave(calls, options.rounds, title=f"client, {dialect}, logprobs={logprobs}")
    cpu = {key: Spread.of(column(results, key, "cpu")) for key in subjects}
    wall = {key: Spread.of(column(results, key, "wall")) for key in subjects}
    peer = "stock" if stock else "one"
    rows = [
        [
            names[key],
            cpu[key],
            cpu[key] / cpu[peer],
            wall[key],
            *([_mib(first[key]), _ratio(first[key], first[peer])]),
        ]
        for key in subjects
    ]
    many = cpu["many"] / cpu["one"]
    notes = [f"{_MANY} servers cost {many.text()} × one server's CPU time (target: 1.2 at most)."]
    if stock:
        notes.insert(
            0, "Targets against TRL's client, with one server: CPU time 0.5 at most, peak memory 1.0 at most."
        )
        same = len({one["digest"] for one in first.values()}) == 1
        notes.append("All were answered the same, to the last digit." if same else "THE ANSWERS DIFFER.")
    else:
        notes.insert(0, f"No {_STOCK[dialect]}: --client-trl-{_GENERATIONS[dialect]} says where one is.")
    data.append(
        {
            "dialect": dialect,
            "logprobs": logprobs,
            "names": {key: names[key] for key in subjects},
            "cpu_seconds": cpu,
            "wall_seconds": wall,
            "peak_bytes": {key: one["peak"] for key, one in first.items()},
            "many_to_one": many,
        }
    )
    count, _, tokens = shape
    beside = "the peer" if stock else "one server"
    return Table(
        f"client, `{dialect}` dialect, logprobs={logprobs}: {count} completions of {tokens} tokens",
        ["client", "CPU s", f"× {beside}", "wall s", "peak MiB", f"× {beside}"],
        rows,
        notes,
    )


def _mib(first: dict[str, Any]) -> str:
    return "–" if first["peak"] is None else f"{first['peak'] / 2**20:.0f}"


def _ratio(mine: dict[str, Any], its: dict[str, Any]) -> str:
    return "–" if mine["peak"] is None or its["peak"] is None else f"{mine['peak'] / its['peak']:.2f}"


@contextlib.contextmanager
def _servers(dialect: str, logprobs: int, shape: Sequence[int]) -> Iterator[list[str]]:
    """URLs of servers in one process: what is measured is their clients."""
    count, prompt_tokens, tokens = shape
    command = [sys.executable, "-m", f"{__package__}.canned_server", f"--dialect={dialect}", f"--logprobs={logprobs}"]
    command += [f"--servers={_MANY}", f"--prompts={count}", f"--prompt-tokens={prompt_tokens}", f"--tokens={tokens}"]
    with _process(command) as process:
        assert process.stdout is not None
        yield [process.stdout.readline().strip() for _ in range(_MANY)]


class _Subject:
    """A client in a process of its own; see `client_subject`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._first: dict[str, Any] | None = None

    @property
    def first(self) -> dict[str, Any]:
        """What it said of its first call."""
        if self._first is None:
            self._first = self._reply()
        return self._first

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} has ended; it needs the packages that the pool needs")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def call(self) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write("call\n")
        self._process.stdin.flush()
        return self._reply()


@contextlib.contextmanager
def _subject(python: str, arguments: Sequence[str]) -> Iterator[_Subject]:
    with _process([python, "-m", f"{__package__}.client_subject", *arguments], quiet=True) as process:
        yield _Subject(process)


@contextlib.contextmanager
def _process(command: Sequence[str], *, quiet: bool = False) -> Iterator[subprocess.Popen[str]]:
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        command,
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else None,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _draw(data: Sequence[dict[str, Any]], figure: Any) -> None:
    """CPU time per client, one group per dialect and number of logprobs."""
    axes = figure.subplots()
    colours = {"stock": "#b0b0b0", "one": "#1f77b4", "many": "#7fb2d9"}
    labels = {"stock": "TRL's VLLMClient", "one": "pool, one server", "many": f"pool, {_MANY} servers"}
    for place, key in enumerate(colours):
        found = [(x, table["cpu_seconds"][key]) for x, table in enumerate(data) if key in table["cpu_seconds"]]
        if not found:
            continue
        medians = [spread.median for _, spread in found]
        errors = [[s.median - s.low for _, s in found], [s.high - s.median for _, s in found]]
        bars = axes.bar(
            [x + (place - 1) * 0.27 for x, _ in found],
            medians,
            0.27,
            yerr=errors,
            color=colours[key],
            label=labels[key],
        )
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.set_xticks(range(len(data)), [f"{t['dialect']} dialect\nlogprobs={t['logprobs']}" for t in data])
    axes.set_ylabel("CPU seconds per step")
    axes.set_title("Cost of the client itself (lower is better)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
