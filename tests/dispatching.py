"""Backends and a dispatcher without sockets, for tests of what goes where."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import httpx
from conftest import quick

from trl_pool.addresses import BackendAddress
from trl_pool.backend import Backend
from trl_pool.dialects.vllm import VllmDialect
from trl_pool.dispatch import Dispatcher
from trl_pool.exchange import Exchange
from trl_pool.identity import Identity


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def fleet_of(
    *hosts: str,
    max_num_seqs: int | None = 8,
    clock: Callable[[], float] | None = None,
    answer: Callable[[httpx.Request], httpx.Response] = lambda request: httpx.Response(404),
    **settings: Any,
) -> Dispatcher:
    """A dispatcher with backends of these hosts that are up.

    Args:
        hosts (`str`): Their host names; the backends' names have a port.
        max_num_seqs (`int`, *optional*, defaults to `8`): Sequences that each says it runs at once.
        clock (`Callable[[], float]`, *optional*): Seconds.
        answer (`Callable[[httpx.Request], httpx.Response]`, *optional*): What they answer.
        **settings (`Any`): Of the `PoolConfig`.
    """
    clock = clock or Clock()
    config = quick(**settings)
    dispatcher = Dispatcher(config, clock=clock, rng=random.Random(1))
    for host in hosts:
        address = BackendAddress.parse(f"http://{host}:8000")
        backend = Backend(
            address,
            dialect=VllmDialect(),
            config=config,
            exchange=Exchange(address, config, transport=httpx.MockTransport(answer), user_agent="test"),
            clock=clock,
            required_weights=lambda: 0,
            changed=dispatcher.changed,
            restarted=lambda backend: dispatcher.memory.forget(backend.name),
            tally=dispatcher.tally,
        )
        backend.recognise(Identity("vllm", max_num_seqs=max_num_seqs), backend.dialect)
        backend.health.answered()
        dispatcher.add(backend)
    return dispatcher
