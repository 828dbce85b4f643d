"""From SIGTERM to the end of the process: not ready, then not accepting, then not waiting any longer."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import httpx
import pytest
from conftest import eventually, received
from test_server_process import BODIES, FORMS, GatewayProcess, children_of, http, status

from trl_pool.sim import SimProcess

Fleet = Callable[[int], list[SimProcess]]
Background = Callable[..., Future[Any]]

ENDED = (0, -signal.SIGTERM)
"""uvicorn restores the signal's own effect when it has ended in order."""


def post(gateway: GatewayProcess, endpoint: str) -> httpx.Response:
    with http(gateway.url) as client:
        return client.post(f"/{endpoint}/", json=BODIES.get(endpoint))


def connect(gateway: GatewayProcess, data: bytes) -> socket.socket:
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    client = socket.create_connection((host, int(port)), timeout=20)
    client.sendall(data)
    return client


@pytest.mark.parametrize("form", FORMS)
def test_a_request_under_way_is_finished(form: str, fleet: Fleet, background: Background) -> None:
    """First the gateway is alive and not ready and serves whoever still comes; then it takes no connection; and when
    the last request is answered the process ends and leaves nobody behind."""
    sims = fleet(2)
    with GatewayProcess(form, sims, health_interval=0.2, shutdown_settle_seconds=1, shutdown_timeout=30) as gateway:
        gateway.ready()
        for sim in sims:
            sim.faults("hang", endpoints=["generate"])
        running = background(post, gateway, "generate")
        eventually(lambda: sum(received(sims)))
        gateway.terminate()
        eventually(lambda: status(f"{gateway.url}/readyz") == 503)
        assert status(f"{gateway.url}/livez") == 200
        assert post(gateway, "chat").status_code == 200
        eventually(lambda: status(f"{gateway.url}/livez") is None)
        assert not running.done()
        assert gateway.child.poll() is None
        left = children_of(gateway.child.pid)
        for sim in sims:
            sim.clear_faults()
        assert running.result().status_code == 200
        assert gateway.wait() in ENDED
        assert "Traceback" not in gateway.log
        assert not any(os.path.exists(f"/proc/{pid}") for pid in left)


def test_while_it_drains_it_says_so(fleet: Fleet) -> None:
    with GatewayProcess("module", fleet(1), shutdown_settle_seconds=20) as gateway:
        gateway.ready()
        gateway.terminate()
        with http(gateway.url) as client:
            answer = eventually(lambda: (a := client.get("/readyz")).status_code == 503 and a)
            assert answer.json() == {"detail": "draining"}
            assert answer.headers["retry-after"] == "1"
            # A second SIGTERM skips the time to settle; an idle connection holds nobody up.
            gateway.terminate()
            assert gateway.wait(10) in ENDED


@pytest.mark.parametrize("form", FORMS)
def test_when_the_time_is_up_requests_are_answered_503(form: str, fleet: Fleet, background: Background) -> None:
    """In JSON, control calls as well."""
    sims = fleet(2)
    settings = {"health_interval": 0.2, "shutdown_settle_seconds": 0.1, "shutdown_timeout": 0.5}
    with GatewayProcess(form, sims, **settings) as gateway:
        gateway.ready()
        endpoints = ("generate", "get_sequence_logprobs", "reset_prefix_cache")
        running = []
        for endpoint in endpoints:  # a control call waits for the others, and so it is last
            for sim in sims:
                sim.faults("hang", endpoints=[endpoint])
            running.append(background(post, gateway, endpoint))
            if endpoint != "reset_prefix_cache":
                eventually(lambda: sum(received(sims, endpoint)))  # noqa: B023
        with http(gateway.url) as client:
            eventually(lambda: client.get("/pool/stats").json()["gate"])
        gateway.terminate()
        for answer in running:
            assert answer.result().status_code == 503
            assert "shutting down" in answer.result().json()["detail"]
            assert answer.result().headers["retry-after"] == "1"
        assert gateway.wait(10) in ENDED
        assert "Traceback" not in gateway.log


def test_no_client_can_hold_it_up(fleet: Fleet) -> None:
    """Neither one that never ends its request nor one that never reads its answer."""
    (sim,) = fleet(1)
    settings = {"health_interval": 0.2, "shutdown_settle_seconds": 0.1, "shutdown_timeout": 0.5}
    with GatewayProcess("module", [sim], **settings) as gateway:
        gateway.ready()
        half = connect(gateway, b'POST /generate/ HTTP/1.1\r\nHost: g\r\nContent-Length: 99\r\n\r\n{"pro')
        body = json.dumps({"prompts": [[1]] * 100, "max_tokens": 1000, "generation_kwargs": {"ignore_eos": True}})
        head = f"POST /generate/ HTTP/1.1\r\nHost: g\r\nContent-Length: {len(body)}\r\n\r\n"
        with half, connect(gateway, (head + body).encode()):
            eventually(lambda: sim.state()["endpoints"]["generate"]["answered"])
            started = time.monotonic()
            gateway.terminate()
            gateway.wait(20)
            assert time.monotonic() - started < 10
        assert "Traceback" not in gateway.log


def test_ctrl_c_ends_it(fleet: Fleet) -> None:
    with GatewayProcess("module", fleet(1)) as gateway:
        gateway.ready()
        gateway.child.send_signal(signal.SIGINT)
        assert gateway.wait(10) in (0, -signal.SIGINT, 130)
