"""Simulated servers as child processes, for tests, examples and load tests.

```python
with start_fleet(3, decode_ms_per_token=1) as fleet:
    fleet[1].faults("busy", retry_after=0.5, times=2)
    ...
    fleet[0].kill()
```
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import httpx

_ROOT = Path(__file__).resolve().parents[2]
_STOP_SECONDS = 2.0
_living: weakref.WeakSet[SimProcess] = weakref.WeakSet()


class SimProcess:
    """One simulated server in a process of its own, started at once and ready after `wait_ready()`.

    As a context manager it is ready inside and stopped afterwards. It also ends when this process does,
    however that ends.

    Args:
        port (`int`, *optional*, defaults to `0`):
            0 for any free port. The port stays the same over restarts.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on.
        **options (`Any`):
            The other options of `python -m trl_pool.sim`, underscores for hyphens: `max_model_len=64`.
    """

    def __init__(self, port: int = 0, host: str = "127.0.0.1", **options: Any) -> None:
        self.host = host
        self._options = options
        # Bound here as well and never listened on, so that nobody else takes the port while the server is
        # dead. Only Linux lets two sockets do that; elsewhere the child finds a port by itself.
        self._held = hold_port(host, port)
        self._port = self._held.getsockname()[1] if self._held else port
        self._child: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._control_url: str | None = None
        self._http = httpx.Client(trust_env=False, timeout=10.0, verify=False)
        self._start()

    def __repr__(self) -> str:
        child = self._child
        if child is None:
            return f"<SimProcess {self.host}:{self._port}: not running>"
        condition = "ready" if self._control_url else "starting"
        return f"<SimProcess {self.host}:{self._port}: pid {child.pid}, {condition}>"

    def __enter__(self) -> SimProcess:
        """Wait until it is ready."""
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop it."""
        self.stop()

    @property
    def port(self) -> int:
        """Port of the dialect's routes."""
        if self._port == 0:
            self.wait_ready()
        return self._port

    @property
    def url(self) -> str:
        """Base URL of the dialect's routes, without a trailing slash."""
        return f"http://{self.name}"

    @property
    def name(self) -> str:
        """`host:port`."""
        return f"{self.host}:{self.port}"

    @property
    def control_url(self) -> str:
        """Base URL of the `/sim/` routes, without a trailing slash. Another one after a restart."""
        self.wait_ready()
        assert self._control_url is not None
        return self._control_url

    @property
    def pid(self) -> int | None:
        """Process id, `None` while there is no process."""
        return None if self._child is None else self._child.pid

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._child is not None and self._child.poll() is None

    @property
    def log(self) -> str:
        """What the process has written to standard error since its start."""
        if self._log is None:
            return ""
        return os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace")

    def wait_ready(self, timeout: float = 30.0) -> SimProcess:
        """Wait until the server listens.

        Args:
            timeout (`float`, *optional*, defaults to `30.0`):
                Seconds.

        Returns:
            `SimProcess`: Itself.

        Raises:
            RuntimeError: If the process ended instead, or is not running; with its standard error.
            TimeoutError: If it takes longer.
        """
        if self._control_url is not None:
            return self
        child = self._child
        if child is None or child.stdout is None:
            raise RuntimeError(f"the simulated server {self.host}:{self._port} is not running; restart() it")
        deadline = time.monotonic() + timeout
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"the simulated server is not ready after {timeout} s: {self.log}")
            part = os.read(child.stdout.fileno(), 4096)
            if not part:
                raise RuntimeError(f"the simulated server ended with status {child.wait()}: {self.log}")
            line += part
        told = json.loads(line)
        self._port = int(told["url"].rpartition(":")[2])
        self._control_url = told["control_url"]
        return self

    def kill(self) -> None:
        """End the process with SIGKILL, at once and in the middle of whatever it does."""
        self._end(signal.SIGKILL)

    def restart(self, wait: bool = True, **options: Any) -> SimProcess:
        """Start it again on the same port, killing it first if it lives. It has its first weights again.

        Args:
            wait (`bool`, *optional*, defaults to `True`):
                Return when it is ready.
            **options (`Any`):
                Options that differ from now on.
        """
        self.kill()
        self._options = {**self._options, **options}
        self._start()
        return self.wait_ready() if wait else self

    def stop(self) -> None:
        """End the process with SIGTERM and give its port back. Safe to call again."""
        self._end(signal.SIGTERM)
        self._http.close()
        if self._held is not None:
            self._held.close()
        _living.discard(self)

    def faults(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Switch a fault on: the arguments of `trl_pool.sim.faults.Fault`.

        Returns:
            `dict[str, Any]`: The server's answer.

        Raises:
            ValueError: If the server does not know such a fault.
        """
        response = self._http.post(f"{self.control_url}/sim/faults", json={"kind": kind, **fields})
        if response.status_code == 422:
            raise ValueError(response.text)
        answer: dict[str, Any] = response.raise_for_status().json()
        return answer

    def clear_faults(self) -> None:
        """Switch all faults off; requests that hung because of one are answered now."""
        self._http.delete(f"{self.control_url}/sim/faults").raise_for_status()

    def state(self) -> dict[str, Any]:
        """What has happened so far: see `GET /sim/state`."""
        answer: dict[str, Any] = self._http.get(f"{self.control_url}/sim/state").raise_for_status().json()
        return answer

    def forget(self) -> None:
        """Set the counters to zero and forget the remembered requests. Weights and faults stay."""
        self._http.delete(f"{self.control_url}/sim/state").raise_for_status()

    def _start(self) -> None:
        command = [sys.executable, "-m", "trl_pool.sim", "--watch-stdin"]
        for name, value in {"host": self.host, "port": self._port, **self._options}.items():
            flag = f"--{name.replace('_', '-')}"
            if value is True:
                command.append(flag)
            elif value is not None and value is not False:
                command += [flag, str(value)]
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # never written to: it ends when this process does
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # a Ctrl-C meant for the tests is not meant for it
        )
        _living.add(self)

    def _end(self, number: signal.Signals) -> None:
        child, self._child, self._control_url = self._child, None, None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)
        try:
            child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        for stream in (child.stdin, child.stdout, self._log):
            if stream is not None:
                stream.close()
        self._log = None


class SimFleet(list[SimProcess]):
    """Several simulated servers; as a context manager they are stopped at its end."""

    @property
    def urls(self) -> list[str]:
        """Their base URLs."""
        return [sim.url for sim in self]

    def stop(self) -> None:
        """Stop them all."""
        for sim in self:
            sim.stop()

    def __enter__(self) -> SimFleet:
        """They are ready already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop them all."""
        self.stop()


def start_fleet(n: int, **options: Any) -> SimFleet:
    """Start n simulated servers at the same time and wait until all are ready.

    Args:
        n (`int`):
            How many.
        **options (`Any`):
            For each of them, see `SimProcess`.

    Returns:
        `SimFleet`: A list of them that is also a context manager.
    """
    fleet = SimFleet()
    try:
        for _ in range(n):
            fleet.append(SimProcess(**options))
        for sim in fleet:
            sim.wait_ready()
    except BaseException:
        fleet.stop()
        raise
    return fleet


def hold_port(host: str, port: int = 0) -> socket.socket | None:
    """Keeps a port for a child process that will listen on it, until the socket is closed.

    A port that was only found free is anybody's until the child listens: outgoing connections take theirs from the
    same range, even the one that asks whether the child is up.

    Args:
        host (`str`): Address that the child will listen on.
        port (`int`, *optional*, defaults to `0`): 0 for any free one; `getsockname()[1]` tells which.

    Returns:
        `socket.socket` or `None`: A bound socket that does not listen; `None` where the system lets nobody listen
        beside it (not Linux).
    """
    if sys.platform != "linux":
        return None
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    held = socket.socket(family, kind, protocol)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(address)
    except BaseException:
        held.close()
        raise
    return held


@atexit.register
def _stop_living() -> None:
    for sim in list(_living):
        sim.stop()
