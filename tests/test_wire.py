"""Bodies for the weight transfer engines, before and from vLLM 0.28; vLLM's own classes read them in real_engine."""

from __future__ import annotations

from typing import Any

import pytest

from trl_pool.weights.wire import init_info, update_info

METADATA = [("a.weight", "bfloat16", (2, 3)), ("b", "float32", ())]
TENSORS = {"names": ["a.weight", "b"], "dtype_names": ["bfloat16", "float32"], "shapes": [[2, 3], []]}
RENDEZVOUS = {"master_address": "10.0.0.1", "master_port": 5000, "rank_offset": 3, "world_size": 5}
PACKED = {"packed": True, "packed_buffer_size_bytes": 4096}

OLD = ["0.27.1", "0.27.1+cpu", "v0.9.2", "0.26.0rc3"]
NEW = ["0.28.0", "0.31.0+cpu", "0.28.0rc1", "0.30.1.dev7+g0123abc", "1.0", "dev", "", None]


def both(backend: str, version: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    kwargs: dict[str, Any] = {"vllm_version": version, "buffer_size_bytes": 4096}
    return init_info(backend, "10.0.0.1", 5000, 3, 5, **kwargs), update_info(backend, METADATA, **kwargs)


@pytest.mark.parametrize("version", OLD)
def test_before_vllm_0_28_nccl_packs_as_each_update_says(version: str) -> None:
    assert both("nccl", version) == (RENDEZVOUS, {**TENSORS, **PACKED})


@pytest.mark.parametrize("version", NEW)
def test_from_vllm_0_28_nccl_packs_as_the_group_was_told(version: str | None) -> None:
    assert both("nccl", version) == ({**RENDEZVOUS, **PACKED}, TENSORS)


@pytest.mark.parametrize("version", ["0.27.1", "0.31.0"])
def test_gloo_is_the_same_on_every_vllm(version: str) -> None:
    assert both("gloo", version) == ({**RENDEZVOUS, "packed_buffer_size_bytes": 4096}, TENSORS)


def test_gloo_workers_are_told_how_long_to_wait() -> None:
    info = init_info("gloo", "h", 1, 1, 2, vllm_version=None, buffer_size_bytes=1, timeout_seconds=7.5)
    assert info["timeout_seconds"] == 7.5


def test_metadata_may_be_an_iterator() -> None:
    assert update_info("gloo", iter(METADATA), vllm_version=None, buffer_size_bytes=1) == TENSORS


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'ipc'"):
        both("ipc", None)
