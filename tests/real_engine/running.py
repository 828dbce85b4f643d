"""Keeps servers up for a run of tests, and mends what a test has broken."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from .servers import START_SECONDS, Server

AnyServer = TypeVar("AnyServer", bound=Server)


@contextlib.contextmanager
def running(servers: Sequence[Server]) -> Iterator[None]:
    """Has the servers up and warm inside the block, and ends them after it."""
    # A cancelled CI job is sent SIGTERM; taken as an interrupt, it lets a fixture end its servers.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for server in servers:
            server.start()
        make_ready(servers)
        yield
    finally:
        for server in servers:
            server.close()
        signal.signal(signal.SIGTERM, previous)


def make_ready(servers: Sequence[Server]) -> None:
    """Waits for all of them at once: started together they need hardly longer than one."""
    if not servers:
        return
    with ThreadPoolExecutor(len(servers)) as executor:
        list(executor.map(lambda server: server.wait_ready(START_SECONDS).warm_up(), servers))


def mend(servers: Sequence[AnyServer], well: Callable[[AnyServer], bool]) -> None:
    """Starts those anew that are not well, on their old ports: pools that outlive a test know them by that."""
    for server in servers:
        server.resume()
    with ThreadPoolExecutor(len(servers)) as executor:
        states = list(executor.map(lambda server: server.answers() and well(server), servers))
    broken = [server for server, is_well in zip(servers, states, strict=True) if not is_well]
    for server in broken:
        server.kill()
        server.start()
    make_ready(broken)
