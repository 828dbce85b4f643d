"""Fixtures of the real-engine tests: the tiny model, and two real servers that serve it."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import pytest

from .servers import START_SECONDS, TrlServer
from .tiny_model import make_tiny_model

ServerPair: TypeAlias = tuple[TrlServer, TrlServer]

HERE = Path(__file__).parent
REQUIRED = os.environ.get("TRL_POOL_REAL_ENGINE") == "required"
ENGINES_INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("trl", "vllm", "torch"))

# A run over all tests, in an environment without the engines, leaves these out.
collect_ignore_glob = [] if ENGINES_INSTALLED or REQUIRED else ["test_*.py"]


def pytest_configure() -> None:
    """Refuses an environment without the engines, if they were asked for."""
    if REQUIRED and not ENGINES_INSTALLED:
        raise pytest.UsageError("TRL, vLLM or torch is missing here; make the environment with setup_env.sh")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test of this folder `real_engine`; limits that it does not set itself are in pytest.ini."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.real_engine)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the tiny checkpoint, made once per run."""
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def two_servers(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerPair]:
    """Two warm servers of one model, for all tests of the run. To break them, ask for `mortal_servers`."""
    log_dir = tmp_path_factory.mktemp("logs")
    pair = (TrlServer(model_dir, log_dir), TrlServer(model_dir, log_dir))
    # A cancelled CI job is sent SIGTERM; taken as an interrupt, it lets this fixture end the servers.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for server in pair:
            server.start()
        _make_ready(pair)
        yield pair
    finally:
        for server in pair:
            server.kill()
        signal.signal(signal.SIGTERM, previous)


@pytest.fixture
def mortal_servers(two_servers: ServerPair) -> Iterator[ServerPair]:
    """The same two, for a test that kills, pauses or poisons them; what it broke is started anew after it."""
    yield two_servers
    for server in two_servers:
        server.resume()
    with ThreadPoolExecutor(len(two_servers)) as executor:
        well = list(executor.map(TrlServer.answers, two_servers))
    broken = [server for server, answers in zip(two_servers, well, strict=True) if not answers]
    for server in broken:
        server.kill()
        # On its old port: pools that outlive the test know it by that.
        server.start()
    _make_ready(broken)


def _make_ready(servers: Sequence[TrlServer]) -> None:
    """Waits for all of them at once: started together they need hardly longer than one."""
    if not servers:
        return
    with ThreadPoolExecutor(len(servers)) as executor:
        list(executor.map(lambda server: server.wait_ready(START_SECONDS).warm_up(), servers))
