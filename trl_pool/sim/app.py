"""The application of one simulated server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from trl_pool.sim.config import SimConfig
from trl_pool.sim.faults import FaultBook
from trl_pool.sim.gate import Gate
from trl_pool.sim.ledger import Ledger
from trl_pool.sim.trl_routes import add_trl_routes
from trl_pool.sim.worker import Worker

_ROUTES: dict[str, Callable[[FastAPI, Worker], None]] = {"trl": add_trl_routes}


class SimApp(FastAPI):
    """A simulated server's application, with what it is made of within reach of the `/sim/` routes.

    Args:
        config (`SimConfig`):
            The server's traits.
    """

    def __init__(self, config: SimConfig) -> None:
        super().__init__(title="trl_pool.sim")
        self.worker = Worker(config, time.monotonic, asyncio.sleep)
        self.ledger = Ledger(time.monotonic)
        self.faults = FaultBook()
        _ROUTES[config.dialect](self, self.worker)
        # The gate goes around everything: while the event loop is taken not even a 404 is answered.
        self.gate = Gate(self.build_middleware_stack(), self.worker, self.ledger, self.faults)
        self.middleware_stack = self.gate


def create_app(config: SimConfig | None = None, **traits: Any) -> SimApp:
    """The ASGI application of one simulated server, without its `/sim/` routes.

    It can be called in-process, through `httpx.ASGITransport`; faults that break connections need a real
    socket.

    Args:
        config (`SimConfig`, *optional*):
            Its traits.
        **traits (`Any`):
            The fields of a `SimConfig`, instead of `config`.
    """
    return SimApp(config or SimConfig(**traits))
