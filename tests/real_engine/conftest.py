"""What the tests of both environments share: which of them run here, and the tiny model."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import version
from pathlib import Path

import pytest

from .tiny_model import make_tiny_model

HERE = Path(__file__).parent
REQUIRED = os.environ.get("TRL_POOL_REAL_ENGINE") == "required"
ENGINES_INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("trl", "vllm", "torch"))
FOLDERS = {"legacy", "modern", "both"}


def folders_to_run() -> set[str]:
    """Which tests the installed TRL can run; none without the engines."""
    if not ENGINES_INSTALLED:
        return set()
    major, minor = version("trl").split(".")[:2]
    # With 1.11 its servers and its client went over to vLLM's own protocol.
    return {"both", "modern" if (int(major), int(minor)) >= (1, 11) else "legacy"}


collect_ignore = sorted(FOLDERS - folders_to_run())


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
