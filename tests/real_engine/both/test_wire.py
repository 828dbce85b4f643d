"""The bodies that are sent are the ones that the installed vLLM's own classes, and our engine's, take."""

from __future__ import annotations

from typing import Any

import pytest
import vllm
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo

from trl_pool.weights.engine import GlooInitInfo, GlooUpdateInfo, GlooWeightTransferEngine
from trl_pool.weights.wire import init_info, update_info

METADATA = [("a", "bfloat16", [2, 3]), ("b", "float32", [])]


def bodies(backend: str, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    common: dict[str, Any] = {"vllm_version": vllm.__version__, "buffer_size_bytes": 12345}
    return init_info(backend, "h", 7, 1, 2, **common, **kwargs), update_info(backend, METADATA, **common)


def test_vllms_nccl_engine_takes_them_and_packs() -> None:
    init, update = bodies("nccl")
    engine: Any = object.__new__(NCCLWeightTransferEngine)
    parsed = (engine.parse_init_info(init), engine.parse_update_info(update))
    assert isinstance(parsed[0], NCCLWeightTransferInitInfo)
    assert isinstance(parsed[1], NCCLWeightTransferUpdateInfo)
    assert parsed[1].names == ["a", "b"]
    # Wherever this vLLM has the agreement, it is there, once.
    holders = [info for info in parsed if getattr(info, "packed", False)]
    assert [info.packed_buffer_size_bytes for info in holders] == [12345]


def test_gloo_engine_takes_them() -> None:
    init, update = bodies("gloo", timeout_seconds=3.0)
    engine: Any = object.__new__(GlooWeightTransferEngine)
    assert engine.parse_init_info(init) == GlooInitInfo("h", 7, 1, 2, 12345, 3.0)
    assert engine.parse_update_info(update) == GlooUpdateInfo(["a", "b"], ["bfloat16", "float32"], [[2, 3], []])


@pytest.mark.parametrize("change", [{"rank_offset": 0}, {"rank_offset": 2}, {"timeout_seconds": 0}, {"nonesuch": 1}])
def test_gloo_engine_refuses_what_cannot_be(change: dict[str, Any]) -> None:
    engine: Any = object.__new__(GlooWeightTransferEngine)
    with pytest.raises(ValueError, match=r"\w"):
        engine.parse_init_info({**bodies("gloo")[0], **change})


def test_gloo_engine_refuses_lists_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="1 names, 2 dtype_names"):
        GlooUpdateInfo(["a"], ["int8", "int8"], [[1]])
