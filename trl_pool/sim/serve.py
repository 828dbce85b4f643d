"""Runs one simulated server: two ports in one event loop, until a signal or the end of the parent."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

from trl_pool.sim.app import create_app
from trl_pool.sim.config import SimConfig
from trl_pool.sim.control import create_control_app
from trl_pool.sim.door import Door

# The control port's clients are tests and examples, which ask now and then: their connections are kept.
_CONTROL_KEEP_ALIVE_SECONDS = 600.0
# A server whose engine dies still answers those who wait for it.
_LAST_ANSWERS_SECONDS = 0.1


@dataclass(frozen=True)
class ServeOptions:
    """Where and how to serve.

    Args:
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address of both ports.
        port (`int`, *optional*, defaults to `8000`):
            The dialect's port; 0 for any free one.
        control_port (`int`, *optional*, defaults to `0`):
            The `/sim/` routes' port; 0 for any free one.
        keep_alive_seconds (`float`, *optional*, defaults to `5.0`):
            Idle connections to the dialect's port are closed after this time. 5 is uvicorn's default.
        start_delay_seconds (`float`, *optional*, defaults to `0.0`):
            Time between the start of the process and its listening: a model takes its time to load.
        watch_stdin (`bool`, *optional*, defaults to `False`):
            End when standard input ends, as it does when the parent dies.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    control_port: int = 0
    keep_alive_seconds: float = 5.0
    start_delay_seconds: float = 0.0
    watch_stdin: bool = False


async def serve(config: SimConfig, options: ServeOptions, announce: Callable[[str], None] = print) -> None:
    """Serve until SIGTERM, SIGINT, the engine's death or, if so wished, the end of standard input.

    Args:
        config (`SimConfig`):
            The server's traits.
        options (`ServeOptions`):
            Where and how to serve.
        announce (`Callable[[str], None]`, *optional*, defaults to `print`):
            Gets one line of JSON once both ports listen: `url`, `control_url` and `pid`.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if options.watch_stdin:
        loop.add_reader(sys.stdin.fileno(), lambda: None if os.read(sys.stdin.fileno(), 1024) else stop.set())
    sim = create_app(config)
    door = Door(sim, options.host, options.port, options.keep_alive_seconds)
    routes = create_control_app(sim, door)
    control = Door(routes, options.host, options.control_port, _CONTROL_KEEP_ALIVE_SECONDS)
    starting = asyncio.create_task(_open(door, control, options.start_delay_seconds, announce))
    stopped = asyncio.create_task(stop.wait())
    died = asyncio.create_task(sim.died.wait())
    await asyncio.wait({starting, stopped, died}, return_when=asyncio.FIRST_COMPLETED)
    if starting.done():
        starting.result()  # raises if a port could not be opened
    await asyncio.wait({stopped, died}, return_when=asyncio.FIRST_COMPLETED)
    if died.done():
        await asyncio.sleep(_LAST_ANSWERS_SECONDS)
    # Requests may hang for good here, by design: nobody waits for them, and their end is no news.
    logging.getLogger("uvicorn.error").disabled = True
    starting.cancel()
    door.close()
    control.close()


async def _open(door: Door, control: Door, delay_seconds: float, announce: Callable[[str], None]) -> None:
    await asyncio.sleep(delay_seconds)
    await control.open()
    await door.open()
    announce(json.dumps({"url": door.url, "control_url": control.url, "pid": os.getpid()}))
