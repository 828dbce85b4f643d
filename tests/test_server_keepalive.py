"""Connections to backends that the backend closes: no request is lost over them, and nobody is charged."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from conftest import eventually, received
from test_server_process import BODIES, Gateway, gateways

from trl_pool.sim import SimProcess, start_fleet

Fleet = Callable[[int], list[SimProcess]]
Start = Callable[..., Gateway]
Background = Callable[..., Future[Any]]

gateway = pytest.fixture(gateways)

KEEP_ALIVE_SECONDS = 0.02
"""So short that many requests cross the news of a closed connection."""


@pytest.fixture
def hasty() -> Iterator[list[SimProcess]]:
    """Two servers that close idle connections long before the gateway does."""
    with start_fleet(2, timeout_keep_alive=KEEP_ALIVE_SECONDS) as sims:
        yield sims


def unharmed(gateway: Gateway) -> bool:
    """Whether nothing was counted against anybody."""
    return all(
        (b["failures"], b["failovers"], b["ejections"], b["health"]) == (0, 0, 0, "up") for b in gateway.backends()
    )


def ask_on(connection: http.client.HTTPConnection) -> int:
    connection.request("POST", "/generate/", json.dumps(BODIES["generate"]))
    answer = connection.getresponse()
    answer.read()
    return answer.status


def test_pauses_around_the_backends_keep_alive_cost_nothing(
    hasty: list[SimProcess], gateway: Start, background: Background
) -> None:
    """A request that crosses the news of a closed connection is sent again to the same backend, uncharged. The
    gateway's own clients keep their connections all the while."""
    started = gateway(hasty)
    rounds = 50

    def client(offset: float) -> list[int]:
        connection = http.client.HTTPConnection(*started.address, timeout=20)
        connection.connect()
        connection.auto_open = 0  # a connection that is lost shows
        statuses = []
        for i in range(rounds):
            statuses.append(ask_on(connection))
            time.sleep(KEEP_ALIVE_SECONDS + offset + (i - rounds / 2) * 0.0003)
        connection.close()
        return statuses

    clients = [background(client, offset) for offset in (-0.005, 0.0, 0.005, 0.01)]
    assert [one.result() for one in clients] == [[200] * rounds] * 4
    assert sum(received(hasty)) == 4 * rounds
    assert unharmed(started)


def test_idle_connections_that_were_dropped_cost_nothing(fleet: Fleet, gateway: Start) -> None:
    """Each request was received exactly once."""
    sims = fleet(2)
    started = gateway(sims, health_interval=60)  # a probe's connection is dropped, too
    for _ in range(10):
        assert started.post("generate", {"prompts": ["a", "b"]}).status_code == 200
        for sim in sims:
            sim.faults("drop_idle")
    assert received(sims) == [10, 10]
    assert [b["requests"] for b in started.backends()] == [10, 10]
    assert unharmed(started)


def test_a_server_that_died_is_no_stale_connection(fleet: Fleet, gateway: Start) -> None:
    """Its prompts go elsewhere, and it is down."""
    sims = fleet(2)
    started = gateway(sims)
    assert started.post("generate", {"prompts": ["a", "b"]}).status_code == 200
    sims[1].kill()
    answer = started.post("generate", {"prompts": ["a", "b"]})
    assert answer.headers["x-backend"] == sims[0].name
    eventually(lambda: started.backend(sims[1])["health"] == "down")
