"""The application of one simulated server."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import FastAPI

from trl_pool.sim.config import SimConfig
from trl_pool.sim.faults import FaultBook
from trl_pool.sim.gate import Gate
from trl_pool.sim.ledger import Ledger
from trl_pool.sim.traits import ALL_TRAITS
from trl_pool.sim.trl_routes import add_trl_routes
from trl_pool.sim.turns import AllAtOnce, OneAtATime, Turns
from trl_pool.sim.vllm_routes import add_vllm_routes
from trl_pool.sim.vllm_worker import VLLMWorker
from trl_pool.sim.worker import Worker


class SimApp(FastAPI):
    """A simulated server's application, with what it is made of within reach of the `/sim/` routes.

    Args:
        config (`SimConfig`):
            The server's traits.
    """

    def __init__(self, config: SimConfig) -> None:
        super().__init__(title="trl_pool.sim")
        traits = ALL_TRAITS[config.dialect]
        self.worker: Worker | VLLMWorker
        turns: Turns
        if config.dialect == "trl":
            self.worker = Worker(config, time.monotonic, asyncio.sleep)
            turns = OneAtATime(self.worker, traits.threaded)
            add_trl_routes(self, self.worker)
        else:
            self.worker = VLLMWorker(config, time.monotonic, asyncio.sleep)
            turns = AllAtOnce(self.worker)
            add_vllm_routes(self, self.worker)
        self.died = self.worker.died if isinstance(self.worker, VLLMWorker) else asyncio.Event()
        self.ledger = Ledger(time.monotonic, traits)
        self.faults = FaultBook()
        # The gate goes around everything: while the event loop is taken not even a 404 is answered.
        self.gate = Gate(self.build_middleware_stack(), self.worker, self.ledger, self.faults, traits, turns)
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
