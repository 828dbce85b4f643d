"""What a weight update costs with more servers: control calls alone, and with tensors over gloo."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import requests

from trl_pool import PoolConfig, VLLMClientPool
from trl_pool.sim import start_fleet
from trl_pool.weights.transport import ControlOnlyJoint, ControlOnlyTransport

from .report import Report, Spread, Table
from .rounds import column, interleave
from .weight_servers import Servers

SUMMARY = "weight updates to 1, 2, 4 and 8 servers"

Result = dict[str, float]

_CONNECT_SECONDS = 60.0
_MIB = 2**20


def add_options(group: argparse._ArgumentGroup) -> None:
    """Its command line."""
    add = group.add_argument
    add("--weights-servers", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="numbers of servers")
    add("--weights-tensors", type=int, default=400, metavar="N", help="tensors of the model (default: %(default)s)")
    add("--weights-mb", type=float, default=50.0, metavar="MB", help="its size with gloo (default: %(default)s)")
    add("--weights-answer-ms", type=float, default=10.0, metavar="MS", help="time until the answer to a control call")
    add("--weights-moving-ms", type=float, default=10.0, metavar="MS", help="time a tensor travels, where it does")
    add(
        "--weights-loop-tensors",
        type=int,
        default=20,
        metavar="N",
        help="tensors that the loop over servers is measured with; its time is scaled up (default: %(default)s)",
    )


class Model:
    """Parameters that are walked through once per update.

    Args:
        tensors (`int`): How many.
        tensor (`Any`): Stands for each.
    """

    def __init__(self, tensors: int, tensor: Any) -> None:
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.metadata = [(f"layers.{i}.weight", dtype, list(tensor.shape)) for i in range(tensors)]
        self.walks = 0
        self._tensor = tensor

    def parameters(self) -> Iterator[tuple[str, Any]]:
        """The parameters; counts how often they are walked through."""
        self.walks += 1
        for name, _, _ in self.metadata:
            yield name, self._tensor


class Nothing:
    """A tensor without contents, of about 128 KiB."""

    dtype, shape = "torch.bfloat16", (256, 256)


class Moving(ControlOnlyTransport):
    """Moves nothing, and takes its time.

    Args:
        seconds (`float`): For a tensor.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def broadcast(self, tensor: Any, backends: Sequence[str]) -> None:
        time.sleep(self._seconds)


def run(options: argparse.Namespace) -> Report:
    """Measures."""
    counts = sorted(set(options.weights_servers))
    report = Report()
    report.data["options"] = {key: value for key, value in vars(options).items() if key.startswith("weights")}
    lines: dict[str, tuple[str, list[Spread]]] = {}
    for part in (_control, _ahead, _gloo):
        part(options, counts, report, lines)
    report.figures["weights"] = lambda figure: _draw(figure, counts, lines)
    return report


# Control calls alone


def _control(options: argparse.Namespace, counts: Sequence[int], report: Report, lines: dict[str, Any]) -> None:
    most, seconds = counts[-1], str(options.weights_answer_ms / 1000)
    model = Model(options.weights_tensors, Nothing())
    with contextlib.ExitStack() as stack:
        subjects: dict[str, Callable[[], Result]] = {}
        for dialect, transport in (("trl", ControlOnlyTransport), ("vllm", ControlOnlyJoint)):
            command = ("answer", "-n", str(most), "--dialect", dialect, "--seconds", seconds)
            servers = stack.enter_context(Servers(*command))
            for n in counts:
                pool = _pool(stack, servers.urls[:n], transport())
                subjects[f"{dialect} {n}"] = partial(_update, pool, model)
                if dialect == "trl" and n == most:
                    subjects[f"one by one {n}"] = partial(_one_by_one, pool, model)
            if dialect == "trl":
                subjects["loop"] = partial(_loop, servers.urls, model, options.weights_loop_tensors)
        results = interleave(subjects, options.rounds, warm_up=0, title="control calls")
    times = {name: Spread.of(column(results, name, "seconds")) for name in results}
    cpu = {name: Spread.of(column(results, name, "cpu")) for name in results}
    rows = []
    for label, what in (("trl", "`trl`"), ("one by one", "`trl`, `update_named_param`"), ("vllm", "`vllm`")):
        for n in counts:
            if (name := f"{label} {n}") in times:
                ratio = times[name] / times[f"{label.replace('one by one', 'trl')} {counts[0]}"]
                rows.append((what, n, times[name], ratio, cpu[name]))
    rows.append((f"loop of a peer ({options.weights_loop_tensors} tensors, scaled)", most, times["loop"], "", ""))
    faster = times["loop"] / times[f"trl {most}"]
    report.tables.append(
        Table(
            f"Control calls alone: {options.weights_tensors} tensors, "
            f"answers after {options.weights_answer_ms:g} ms, nothing moved",
            ("dialect", "servers", "update, s", f"of {counts[0]}", "trainer's CPU, s"),
            rows,
            (
                _against("`trl`", times, "trl", counts, 2.0),
                _against("`vllm`", times, "vllm", counts, 1.5),
                f"`trl`, {most} servers against a loop over them: {faster.text()} × as fast; target ≥ 3.",
                "The servers are one process without a web framework; the names are known beforehand except in "
                "`update_named_param`. The loop posts to each server and waits, tensor by tensor, over kept "
                "connections of requests.",
            ),
        )
    )
    report.data["control"] = {"seconds": times, "cpu": cpu, "faster than the loop": faster}
    lines["control calls, trl"] = "-", [times[f"trl {n}"] for n in counts]
    lines["control calls, vllm"] = "-", [times[f"vllm {n}"] for n in counts]


def _loop(urls: Sequence[str], model: Model, tensors: int) -> Result:
    """As a trainer does that was written for one server: for each tensor, for each server, post and wait."""
    tensors = min(tensors, len(model.metadata))
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(requests.Session()) for _ in urls]
        started, cpu = time.perf_counter(), time.process_time()
        for name, dtype, shape in model.metadata[:tensors]:
            body = {"name": name, "dtype": f"torch.{dtype}", "shape": shape}
            for session, url in zip(sessions, urls, strict=True):
                session.post(f"{url}/update_named_param/", json=body, timeout=60).raise_for_status()
        factor = len(model.metadata) / tensors
        return {
            "seconds": (time.perf_counter() - started) * factor,
            "cpu": (time.process_time() - cpu) * factor,
        }


# Announcements ahead


def _ahead(options: argparse.Namespace, counts: Sequence[int], report: Report, lines: dict[str, Any]) -> None:
    """Where moving a tensor takes as long as announcing it, one is done while the other is."""
    most, tensors = counts[-1], max(1, options.weights_tensors // 4)
    model = Model(tensors, Nothing())
    with contextlib.ExitStack() as stack:
        seconds = str(options.weights_answer_ms / 1000)
        servers = stack.enter_context(Servers("answer", "-n", str(most), "--seconds", seconds))
        pool = _pool(stack, servers.urls, Moving(options.weights_moving_ms / 1000))
        subjects = {"ahead": partial(_update, pool, model), "one by one": partial(_one_by_one, pool, model)}
        results = interleave(subjects, options.rounds, warm_up=0, title="announcements ahead")
    times = {name: Spread.of(column(results, name, "seconds")) for name in results}
    per_tensor = {name: Spread.of(1000 * s / tensors for s in spread.values) for name, spread in times.items()}
    rows = (
        ("`update_named_params`: names known beforehand", per_tensor["ahead"], times["ahead"] / times["one by one"]),
        ("`update_named_param`, one after the other", per_tensor["one by one"], "1"),
    )
    report.tables.append(
        Table(
            f"Announcements ahead: `trl`, {most} servers, answers after {options.weights_answer_ms:g} ms, "
            f"tensors that travel for {options.weights_moving_ms:g} ms",
            ("", "ms per tensor", "ratio"),
            rows,
            (f"{tensors} tensors.",),
        )
    )
    report.data["ahead"] = {"seconds": times, "tensors": tensors}


# With tensors


def _gloo(options: argparse.Namespace, counts: Sequence[int], report: Report, lines: dict[str, Any]) -> None:
    wanted = {"trl": ("torch", "vllm"), "vllm": ("torch",)}
    missing = {d: [m for m in modules if find_spec(m) is None] for d, modules in wanted.items()}
    dialects = [dialect for dialect in wanted if not missing[dialect]]
    skipped = [f"`{d}` skipped: {', '.join(m)} not installed." for d, m in missing.items() if m]
    title = f"With gloo: {options.weights_tensors} tensors, {options.weights_mb:g} MB"
    if not dialects:
        report.tables.append(Table(title, ("dialect",), (), skipped))
        return
    import torch

    elements = max(1, round(options.weights_mb * 1e6 / options.weights_tensors / 2))
    model = Model(options.weights_tensors, torch.ones(elements, dtype=torch.bfloat16))
    results: dict[str, list[Result]] = {}
    for dialect in dialects:  # one after the other: sixteen servers with torch are many for a small machine
        with contextlib.ExitStack() as stack:
            if dialect == "trl":
                servers = stack.enter_context(Servers("receive", "-n", str(counts[-1])))
                urls, pids = servers.urls, servers.pids
            else:
                sims = stack.enter_context(start_fleet(counts[-1], dialect="vllm", weight_transfer="gloo"))
                urls, pids = sims.urls, [sim.pid or 0 for sim in sims]
            subjects = {f"{dialect} {n}": partial(_in_new_group, urls[:n], pids[:n], model) for n in counts}
            results |= interleave(subjects, options.rounds, warm_up=0, title=f"gloo, {dialect}")
    figures = {
        key: {name: Spread.of(column(results, name, key)) for name in results}
        for key in ("seconds", "cpu", "server_cpu", "sent", "walks")
    }
    rows = [
        (
            f"`{dialect}`",
            n,
            figures["seconds"][name],
            figures["seconds"][name] / figures["seconds"][f"{dialect} {counts[0]}"],
            figures["cpu"][name],
            figures["server_cpu"][name],
            f"{figures['sent'][name].median / 1e6:.0f}",
            f"{figures['walks'][name].median:.0f}",
        )
        for dialect in dialects
        for n in counts
        if (name := f"{dialect} {n}")
    ]
    notes = [_against(f"`{dialect}`", figures["seconds"], dialect, counts, None) for dialect in dialects]
    notes.append(
        f"Trainer and servers share {os.cpu_count()} cores, so what the servers' side costs (a CPU time per server) "
        "counts in the time as soon as there are more of them than cores. Sent is what the trainer itself writes: the "
        "`vllm` servers of one group pass a broadcast on to each other, a `trl` server has a group of its own."
    )
    head = ("dialect", "servers", "update, s", f"of {counts[0]}", "trainer's CPU, s", "CPU per server, s")
    report.tables.append(Table(title, (*head, "sent, MB", "passes"), rows, (*notes, *skipped)))
    report.data["gloo"] = figures
    for dialect in dialects:
        lines[f"gloo, {dialect}"] = "--", [figures["seconds"][f"{dialect} {n}"] for n in counts]


def _in_new_group(urls: Sequence[str], pids: Sequence[int], model: Model) -> Result:
    """An update whose group was made before the clock starts: servers that are in several at once would be odd."""
    with contextlib.ExitStack() as stack:
        pool = _pool(stack, urls, None)
        before, written = sum(map(_cpu_seconds, pids)), _written()
        found = _update(pool, model)
        server_cpu = (sum(map(_cpu_seconds, pids)) - before) / len(pids)
        return {**found, "server_cpu": server_cpu, "sent": float(_written() - written)}


def _pool(stack: contextlib.ExitStack, urls: Sequence[str], transport: Any) -> VLLMClientPool:
    config = PoolConfig(weight_transport="gloo" if transport is None else "auto")
    pool = stack.enter_context(
        VLLMClientPool(
            urls,
            weight_transport=transport,
            config=config,
            connection_timeout=_CONNECT_SECONDS,
            group_port=_free_ports(len(urls)),
        )
    )
    pool.init_communicator("cpu")
    return pool


def _free_ports(n: int) -> int:
    """The first of n consecutive ports that nobody listens on, below those that systems give to clients."""
    while True:
        first = random.randrange(20000, 30000)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + n):
                    stack.enter_context(socket.create_server(("", port)))
            except OSError:
                continue
            return first


def _update(pool: VLLMClientPool, model: Model) -> Result:
    walks = model.walks
    started, cpu = time.perf_counter(), time.process_time()
    pool.update_named_params(model.metadata, model.parameters())
    return {
        "seconds": time.perf_counter() - started,
        "cpu": time.process_time() - cpu,
        "walks": float(model.walks - walks),
    }


def _one_by_one(pool: VLLMClientPool, model: Model) -> Result:
    started, cpu = time.perf_counter(), time.process_time()
    for name, tensor in model.parameters():
        pool.update_named_param(name, tensor)
    pool.reset_prefix_cache()
    return {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}


def _written() -> int:
    """Bytes that this process has written, as gloo writes to its connections; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def _cpu_seconds(pid: int) -> float:
    """CPU time of another process; 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# To read


def _against(what: str, times: dict[str, Spread], label: str, counts: Sequence[int], target: float | None) -> str:
    ratio = times[f"{label} {counts[-1]}"] / times[f"{label} {counts[0]}"]
    text = f"{what}, {counts[-1]} servers: {ratio.text()} × the time of {counts[0]}"
    if target is None:
        return f"{text}."
    return f"{text}; target ≤ {target:g}: {'reached' if ratio.median <= target else 'not reached'}."


def _draw(figure: Any, counts: Sequence[int], lines: dict[str, tuple[str, list[Spread]]]) -> None:
    axes = figure.subplots()
    for label, (style, spreads) in lines.items():
        middle = [spread.median for spread in spreads]
        (line,) = axes.plot(counts, middle, style, marker="o", label=label)
        axes.fill_between(
            counts, [s.low for s in spreads], [s.high for s in spreads], color=line.get_color(), alpha=0.2
        )
    axes.set(xlabel="servers", ylabel="seconds per update", title="Weight update over servers", ylim=(0, None))
    axes.set_xticks(counts)
    axes.grid(alpha=0.3)
    axes.legend()
