"""What servers say of the sequences that they run and of those that wait inside them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable

from .backend import Backend
from .errors import AttemptError
from .schedule import Queue

_RUNNING, _WAITING = b"vllm:num_requests_running", b"vllm:num_requests_waiting"
_PATH = "/metrics"


def parse(metrics: bytes) -> tuple[int, int] | None:
    """Sequences that run and that wait, summed over a server's engines; `None` when it says nothing of them.

    Only two of hundreds of lines are read, every second, so they are looked for rather than everything parsed.

    Args:
        metrics (`bytes`): Prometheus' text format, as `vllm serve` answers `GET /metrics`.
    """
    found = [_sum(metrics, name) for name in (_RUNNING, _WAITING)]
    running, waiting = found
    return None if running is None or waiting is None else (running, waiting)


def _sum(metrics: bytes, name: bytes) -> int | None:
    total: float | None = None
    start = 0
    while (start := metrics.find(b"\n" + name, start)) >= 0:
        start += 1 + len(name)
        if metrics[start : start + 1] not in (b"{", b" "):  # a longer name that begins alike
            continue
        end = metrics.find(b"\n", start)
        line = metrics[start : end if end >= 0 else len(metrics)]
        try:
            total = (total or 0.0) + float(line.rpartition(b"}")[2].split()[0])
        except (ValueError, IndexError):
            return None
    return round(total) if total is not None and math.isfinite(total) else None


async def look(backends: Iterable[Backend], *, timeout: float, clock: Callable[[], float]) -> None:
    """Asks servers for their queues, all at once. One that does not say is asked no more.

    Args:
        backends (`Iterable[Backend]`): Whom.
        timeout (`float`): Seconds they have.
        clock (`Callable[[], float]`): Monotonic seconds.
    """

    async def ask(backend: Backend) -> None:
        try:
            answer = await backend.exchange.once("GET", _PATH, timeout=timeout)
        except AttemptError:
            return
        if answer.status >= 500 or answer.status == 429:
            return  # it may say so another time
        told = parse(b"\n" + answer.body) if answer.status == 200 else None
        backend.tells_queue = told is not None
        backend.queue = None if told is None else Queue(*told, clock())

    await asyncio.gather(*(ask(backend) for backend in backends if backend.tells_queue is not False))
