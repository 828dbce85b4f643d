"""Two real `vllm serve`, which take weights over gloo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from ..pushing import CHECKPOINT_VERSION, Fingerprint, Group, checkpoint, heal, weight_version
from ..running import mend, running
from ..servers import VllmServer

VllmServerPair: TypeAlias = tuple[VllmServer, VllmServer]


@pytest.fixture(scope="session")
def two_vllm_servers(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServerPair]:
    """Two warm servers of one model, for all tests of the run. To change or break them, ask for
    `mortal_vllm_servers`."""
    log_dir = tmp_path_factory.mktemp("logs")
    pair = (VllmServer(model_dir, log_dir), VllmServer(model_dir, log_dir))
    with running(pair):
        yield pair


@pytest.fixture
def mortal_vllm_servers(two_vllm_servers: VllmServerPair, model_dir: Path) -> Iterator[VllmServerPair]:
    """The same two, for a test that kills, pauses or updates them. After it, what it broke is started anew, and the
    weights, with their version, are the checkpoint's again."""
    before = Fingerprint(two_vllm_servers[0])
    yield two_vllm_servers
    mend(two_vllm_servers, well=heal)
    if not all(weight_version(s) == CHECKPOINT_VERSION and before.matches(s) for s in two_vllm_servers):
        with Group(two_vllm_servers) as group:
            group.push(checkpoint(model_dir), CHECKPOINT_VERSION)
        for server in two_vllm_servers:
            assert before.matches(server), f"{server} could not be given its weights back"
