"""The vLLM plug-in where there is no vLLM, and no torch; with them it is tested in real_engine/both."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import tomllib
from pathlib import Path

import pytest

from trl_pool.weights import plugin, stand_in


def test_entry_point_is_the_function() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["trl_pool"].partition(":")
    assert getattr(importlib.import_module(module), name) is plugin.register


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="there is a vLLM here")
def test_without_vllm_it_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert not caplog.records


@pytest.mark.parametrize("name", ["gloo", "nccl", "packing", "rendezvous", "stand_in", "wire"])
def test_moving_weights_needs_torch_only_when_weights_move(name: str) -> None:
    """The modules are imported by the pool, which runs without it."""
    importlib.import_module(f"trl_pool.weights.{name}")


@pytest.mark.parametrize(("value", "expected"), [("1", True), (" true ", True), ("0", False), ("", False)])
def test_stand_in_has_to_be_asked_for(value: str, expected: bool) -> None:
    assert stand_in.asked_for({stand_in.VARIABLE: value}) is expected
    assert not stand_in.asked_for({})
