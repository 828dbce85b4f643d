"""What vLLM loads with the package: the engine's registration, and the stand-in where it was asked for."""

from __future__ import annotations

import logging
from importlib.metadata import entry_points

import pytest
import torch
from vllm.distributed.device_communicators import pynccl
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers import utils

from trl_pool.weights import plugin, stand_in
from trl_pool.weights.engine import GlooWeightTransferEngine


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test replaces in vLLM is put back."""
    monkeypatch.setattr(pynccl, "PyNcclCommunicator", pynccl.PyNcclCommunicator)
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", utils.dispatch_cpu_unquantized_gemm)
    monkeypatch.delenv(stand_in.VARIABLE, raising=False)


def test_installed_package_is_a_plugin_of_vllm() -> None:
    (found,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "trl_pool"]
    assert found.load() is plugin.register


def test_engine_is_registered_once_and_whole() -> None:
    plugin.register()
    plugin.register()
    assert WeightTransferEngineFactory._registry["gloo"]() is GlooWeightTransferEngine
    assert not GlooWeightTransferEngine.__abstractmethods__


def test_stand_in_is_off_unless_asked_for() -> None:
    before = pynccl.PyNcclCommunicator, utils.dispatch_cpu_unquantized_gemm
    plugin.register()
    assert (pynccl.PyNcclCommunicator, utils.dispatch_cpu_unquantized_gemm) == before


def test_stand_in_replaces_both(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(stand_in.VARIABLE, "1")
    plugin.register()
    assert pynccl.PyNcclCommunicator is stand_in.StandInCommunicator
    layer = torch.nn.Linear(2, 2)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert layer.weight.numel() == 4
    assert layer.cpu_linear is torch.nn.functional.linear
    assert "gloo stands in for NCCL" in caplog.text


def test_stand_in_is_refused_beside_cuda(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    before = pynccl.PyNcclCommunicator
    monkeypatch.setenv(stand_in.VARIABLE, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plugin.register()
    assert pynccl.PyNcclCommunicator is before
    assert [r.levelno for r in caplog.records if "is refused: there is CUDA here" in r.getMessage()] == [logging.ERROR]


def test_plugin_never_keeps_vllm_from_starting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> bool:
        raise ImportError("vLLM has moved it")

    monkeypatch.setenv(stand_in.VARIABLE, "1")
    monkeypatch.setattr(stand_in, "install", broken)
    plugin.register()
    assert "vLLM goes on without it" in caplog.text
