"""The pool's own dispatcher and backends, up and without sockets."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import httpx

from trl_pool.addresses import BackendAddress
from trl_pool.backend import Backend
from trl_pool.config import PoolConfig
from trl_pool.dialects.vllm import VllmDialect
from trl_pool.dispatch import Dispatcher
from trl_pool.exchange import Exchange
from trl_pool.identity import Identity


def dispatcher_over(
    servers: Mapping[str, int | None], config: PoolConfig, clock: Callable[[], float], rng: random.Random
) -> Dispatcher:
    """A dispatcher with backends that are up.

    Args:
        servers (`Mapping[str, int | None]`): Sequences that each says it runs at once, per `host:port`.
        config ([`PoolConfig`]): Settings.
        clock (`Callable[[], float]`): Seconds.
        rng (`random.Random`): For ties.
    """
    dispatcher = Dispatcher(config, clock=clock, rng=rng)
    transport = httpx.MockTransport(lambda request: httpx.Response(200))
    for name, max_num_seqs in servers.items():
        address = BackendAddress.parse(f"http://{name}")
        backend = Backend(
            address,
            dialect=VllmDialect(),
            config=config,
            exchange=Exchange(address, config, transport=transport, user_agent="benchmark", clock=clock),
            clock=clock,
            required_weights=lambda: 0,
            changed=dispatcher.changed,
            tally=dispatcher.tally,
        )
        backend.recognise(Identity("vllm", max_num_seqs=max_num_seqs), backend.dialect)
        backend.health.answered()
        dispatcher.add(backend)
    return dispatcher
