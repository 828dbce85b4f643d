"""Simulated servers as child processes: they start together, come back on their port, and are never left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from trl_pool.sim import SimFleet, SimProcess, start_fleet
from trl_pool.sim.__main__ import main


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came true"


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_fleet_starts_together_and_leaves_nobody_behind() -> None:
    with start_fleet(2) as fleet:
        assert isinstance(fleet, SimFleet)
        assert len({sim.port for sim in fleet}) == 2
        assert fleet.urls == [f"http://{sim.name}" for sim in fleet]
        pids = [sim.pid for sim in fleet]
        assert all(sim.running for sim in fleet)
    assert not any(sim.running for sim in fleet)
    assert not any(lives(pid) for pid in pids if pid)


def test_a_server_stops_within_a_second_even_with_requests_that_hang() -> None:
    with SimProcess(max_model_len=8) as sim, ThreadPoolExecutor() as pool:
        body = {"prompts": ["far too long for it"]}
        hung = [pool.submit(httpx.post, sim.url + "/generate/", json=body, timeout=30) for _ in range(2)]
        eventually(lambda: sim.state()["in_flight"] == 2)
        pid = sim.pid
        assert pid is not None
        started = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        for one in hung:
            with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
                one.result()
        eventually(lambda: not sim.running)
        assert time.monotonic() - started < 1.0
        assert sim.log == ""


def test_its_repr_tells_its_condition() -> None:
    sim = SimProcess(start_delay=0.2)
    try:
        assert repr(sim) == f"<SimProcess {sim.name}: pid {sim.pid}, starting>"
        sim.wait_ready()
        assert repr(sim) == f"<SimProcess {sim.name}: pid {sim.pid}, ready>"
        sim.kill()
        assert repr(sim) == f"<SimProcess {sim.name}: not running>"
        with pytest.raises(RuntimeError, match="not running"):
            sim.state()
    finally:
        sim.stop()
    sim.stop()


def test_a_start_may_be_delayed() -> None:
    """Its address is known before it listens."""
    started = time.monotonic()
    sim = SimProcess(start_delay=0.5)
    try:
        with pytest.raises(httpx.ConnectError):
            httpx.get(sim.url + "/health/")
        with pytest.raises(TimeoutError, match="not ready after"):
            sim.wait_ready(timeout=0.01)
        sim.wait_ready()
        assert time.monotonic() - started >= 0.5
        assert httpx.get(sim.url + "/health/").status_code == 200
    finally:
        sim.stop()


def test_a_restart_may_change_options_and_need_not_wait() -> None:
    with SimProcess(model_version="a") as sim:
        url = sim.url
        sim.restart(wait=False, model_version="b")
        sim.wait_ready()
        assert sim.url == url
        assert httpx.get(url + "/health/").json()["model_version"] == "b"


def test_options_that_do_not_exist_are_told_with_the_childs_words() -> None:
    sim = SimProcess(no_such_option=1)
    with pytest.raises(RuntimeError, match="no-such-option"), sim:
        pass
    assert not sim.running


def test_impossible_options_are_told_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--max-model-len", "0"])
    assert "max_model_len must be at least 1" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        main(["--port", str(taken.getsockname()[1])])
    assert "Address already in use" in capsys.readouterr().err


def test_servers_end_with_the_process_that_started_them() -> None:
    """Even if that is killed and can do nothing about it."""
    script = (
        "import os, signal\n"
        "from trl_pool.sim import SimProcess\n"
        "sim = SimProcess().wait_ready()\n"
        "print(sim.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=False)
    assert run.returncode == -signal.SIGKILL
    eventually(lambda: not lives(int(run.stdout)))


def test_servers_that_nobody_stopped_are_stopped_at_exit() -> None:
    script = "from trl_pool.sim import SimProcess\nsim = SimProcess().wait_ready()\nprint(sim.pid)\n"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert not lives(int(run.stdout))
