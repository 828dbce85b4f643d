"""Two real `trl vllm-serve`, which take weights over gloo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from ..pushing import Fingerprint, checkpoint, push_to_trl
from ..running import mend, running
from ..servers import TrlServer

ServerPair: TypeAlias = tuple[TrlServer, TrlServer]


@pytest.fixture(scope="session")
def two_servers(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerPair]:
    """Two warm servers of one model, for all tests of the run. To change or break them, ask for `mortal_servers`."""
    log_dir = tmp_path_factory.mktemp("logs")
    environment = {"TRL_POOL_CPU_STAND_IN": "1"}
    pair = (
        TrlServer(model_dir, log_dir, environment=environment),
        TrlServer(model_dir, log_dir, environment=environment),
    )
    with running(pair):
        yield pair


@pytest.fixture
def mortal_servers(two_servers: ServerPair, model_dir: Path) -> Iterator[ServerPair]:
    """The same two, for a test that kills, pauses, poisons or updates them. After it, what it broke is started anew,
    and the weights are the checkpoint's again."""
    before = Fingerprint(two_servers[0])
    yield two_servers
    mend(two_servers, well=lambda server: True)
    for server in two_servers:
        if not before.matches(server):
            push_to_trl(server, checkpoint(model_dir))
            assert before.matches(server), f"{server} could not be given its weights back"
