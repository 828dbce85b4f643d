"""The gateway as a process: both ways to start it serve. Also here: what the other tests of the gateway share."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import httpx
import pytest
import uvicorn
from conftest import eventually

from trl_pool.server import GatewaySettings, create_app
from trl_pool.server.settings import NOT_FOR_GATEWAYS
from trl_pool.sim import SimProcess

FORMS = ("module", "uvicorn")
"""`python -m trl_pool.server` and `uvicorn trl_pool.server:app`."""

LOGGERS = (logging.getLogger("uvicorn.error"), logging.getLogger("trl_pool.server"))

QUICK: dict[str, Any] = {
    "health_interval": 0.1,
    "health_timeout": 1.0,
    "connect_timeout": 2.0,
    "request_timeout": 20.0,
    "total_timeout": 30.0,
    "control_timeout": 5.0,
    "drain_timeout": 10.0,
    "queue_timeout": 20.0,
    "backoff_seconds": 0.01,
    "shutdown_settle_seconds": 0.0,
}
"""Settings under which seconds become tenths."""

SENTENCE = "Once upon a midnight dreary"
CONVERSATION = [{"role": "user", "content": "Who is there?"}]

# A body that every server accepts, per endpoint with a body.
BODIES: dict[str, dict[str, Any]] = {
    "generate": {"prompts": [SENTENCE], "max_tokens": 4},
    "chat": {"messages": [CONVERSATION], "max_tokens": 4},
    "get_sequence_logprobs": {"sequences": [[1, 2, 3, 4]], "prompt_lengths": [2], "top_logprobs": 3},
    "init_communicator": {"host": "0.0.0.0", "port": 51216, "world_size": 2, "client_device_uuid": "0"},
    "update_named_param": {"name": "a", "dtype": "torch.float32", "shape": [2, 3]},
}

Backends = Sequence[SimProcess | str]


def urls(backends: Backends) -> list[str]:
    """Addresses of simulated servers, and others as they are."""
    return [backend if isinstance(backend, str) else backend.url for backend in backends]


def http(url: str, **arguments: Any) -> httpx.Client:
    """A client for a gateway (or a server)."""
    return httpx.Client(base_url=url, trust_env=False, verify=False, timeout=30, **arguments)


class Gateway:
    """A gateway with short time-outs in a thread of this process, on a real socket.

    `client` talks to it. When it is closed nothing may have been logged as an error by uvicorn or the application,
    which is how an exception shows that no handler knew. `transport` takes the place of the sockets to the backends.
    """

    def __init__(
        self, backends: Backends, *, transport: httpx.AsyncBaseTransport | None = None, **settings: Any
    ) -> None:
        self.settings = GatewaySettings(backends=tuple(urls(backends)), **{**QUICK, **settings})
        self.errors: list[str] = []
        # asyncio sets TCP_NODELAY only where the protocol is named; without it every answer takes 40 ms.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen()
        self.address: tuple[str, int] = self._socket.getsockname()
        self.url = "http://{}:{}".format(*self.address)
        self.client = http(self.url)
        # Not uvloop: within this process what it has not closed yet when it ends is found by another test.
        app = create_app(self.settings, transport=transport)
        config = uvicorn.Config(app, loop="asyncio", log_config=None, log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._log = logging.Handler(logging.ERROR)
        self._log.emit = lambda record: self.errors.append(record.getMessage())  # type: ignore[method-assign]
        for logger in LOGGERS:
            logger.addHandler(self._log)
        self._thread.start()
        eventually(lambda: self._server.started)

    def close(self) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(20)
        for logger in LOGGERS:
            logger.removeHandler(self._log)
        self._socket.close()
        assert not self._thread.is_alive(), "the gateway did not end"
        assert self.errors == []

    def post(self, endpoint: str, body: Any = None, **headers: str) -> httpx.Response:
        """Posts a body, or the endpoint's usual one. Underscores in header names become hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post(f"/{endpoint}/", json=BODIES[endpoint] if body is None else body, headers=named)

    def backends(self) -> list[dict[str, Any]]:
        """`GET /pool/backends`."""
        found: list[dict[str, Any]] = self.client.get("/pool/backends").raise_for_status().json()["backends"]
        return found

    def backend(self, sim: SimProcess) -> dict[str, Any]:
        """One of them."""
        return next(backend for backend in self.backends() if backend["name"] == sim.name)

    def inflight(self) -> int:
        """Requests that backends have."""
        return sum(backend["inflight"] for backend in self.backends())


def gateways() -> Iterator[Callable[..., Gateway]]:
    """`gateway(backends, **settings)`: gateways that are closed after the test. Made a fixture where it is used."""
    with contextlib.ExitStack() as stack:

        def start(backends: Backends, **settings: Any) -> Gateway:
            started = Gateway(backends, **settings)
            stack.callback(started.close)
            return started

        yield start


class GatewayProcess:
    """A gateway as a user starts it, with an environment that sets nothing but what is given.

    Args:
        form (`str`): One of `FORMS`.
        backends: Servers' addresses, `None` to set none.
        options: Further words of the command line.
        **settings: Environment variables, in lower case.
    """

    def __init__(
        self, form: str, backends: Backends | str | None, options: Sequence[str] = (), **settings: Any
    ) -> None:
        self._held = socket.socket()  # bound and never listened on: the port is nobody else's
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))
        port = self._held.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        if backends is not None:
            settings["backends"] = backends if isinstance(backends, str) else ",".join(urls(backends))
        script = ["-m", "trl_pool.server"] if form == "module" else ["-m", "uvicorn", "trl_pool.server:app"]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self.child = subprocess.Popen(
            [sys.executable, *script, "--host", "127.0.0.1", "--port", str(port), *options],
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            env=clean_environment(settings),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        self._log.close()
        self._held.close()

    @property
    def log(self) -> str:
        """What it has written to standard error."""
        return os.pread(self._log.fileno(), 1 << 20, 0).decode()

    def ready(self) -> Self:
        """Waits until it is."""

        def is_ready() -> bool:
            assert self.child.poll() is None, self.log
            return status(f"{self.url}/readyz") == 200

        eventually(is_ready, 30)
        return self

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.child.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = 30) -> int:
        """Its exit status."""
        return self.child.wait(timeout)


def clean_environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """This process's environment without any setting of a gateway, and with the given ones."""
    names = {*(name.upper() for name in GatewaySettings.model_fields), "WEB_CONCURRENCY"}
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, **{name.upper(): str(value) for name, value in settings.items()}}


def status(url: str) -> int | None:
    """The status of a GET over a new connection, `None` if there is no answer."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, trust_env=False, timeout=10).status_code
    return None


def children_of(pid: int) -> list[int]:
    """Processes whose parent it is."""
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in listing.stdout.split()]


@pytest.mark.parametrize("form", FORMS)
def test_a_gateway_started_from_the_shell_serves(form: str, fleet: Callable[[int], list[SimProcess]]) -> None:
    sims = fleet(2)
    with GatewayProcess(form, sims, health_interval=0.2) as gateway:
        gateway.ready()
        with http(gateway.url) as client:
            assert client.get("/health/").json()["eligible"] == 2
            answer = client.post("/generate/", json=BODIES["generate"]).raise_for_status().json()
            assert len(answer["completion_ids"]) == 1
        assert "Traceback" not in gateway.log


def test_options_win_over_the_environment(fleet: Callable[[int], list[SimProcess]]) -> None:
    sims = fleet(2)
    options = ["--backends", sims[0].url, "--sticky-header", "x-episode", "--log-level", "warning"]
    with GatewayProcess("module", [sims[1]], options, sticky_header="x-other") as gateway:
        gateway.ready()
        with http(gateway.url) as client:
            (backend,) = client.get("/pool/backends").json()["backends"]
            assert backend["url"] == sims[0].url
        assert gateway.log == ""


def test_help_names_every_setting_and_its_default() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "trl_pool.server", "--help"], capture_output=True, text=True, timeout=30, check=True
    )
    text = " ".join(run.stdout.split())
    for name, field in GatewaySettings.model_fields.items():
        if name in NOT_FOR_GATEWAYS:
            assert f"--{name.replace('_', '-')} " not in text
            continue
        default = "required" if field.is_required() else f"default: {field.default}"
        assert f"--{name.replace('_', '-')} {name.upper()} ({default})" in text
    assert "Many `trl vllm-serve` servers" in text


def test_a_port_that_is_taken_ends_the_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        run = subprocess.run(
            [sys.executable, "-m", "trl_pool.server", "--host", "127.0.0.1", "--port", port],
            env=clean_environment({"backends": "127.0.0.1:1", "connect_timeout": 1}),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert run.returncode not in (0, None)
    assert "address already in use" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_gateway_with_no_server_up_yet_starts_and_says_so(fleet: Callable[[int], list[SimProcess]]) -> None:
    """And begins to serve when one comes up."""
    (sim,) = fleet(1)
    sim.kill()
    with GatewayProcess("module", [sim], health_interval=0.1) as gateway:
        eventually(lambda: status(f"{gateway.url}/livez") == 200, 30)
        answer = httpx.get(f"{gateway.url}/health/", trust_env=False)
        assert answer.status_code == 503
        assert json.loads(answer.text)["backends"] == {sim.url: "is down (connection refused)"}
        sim.restart()
        gateway.ready()
