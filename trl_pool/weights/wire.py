"""What a weight transfer engine is told: the bodies of `/init_weight_transfer_engine` and `/update_weights`."""

from __future__ import annotations

import re
from typing import Any, Final

from .packing import Metadata

GLOO: Final = "gloo"
NCCL: Final = "nccl"

_PACKED_IN_INIT: Final = (0, 28)
"""From this vLLM on, packing is agreed on when the group is made; before, with each update."""


def init_info(
    backend: str,
    master_address: str,
    master_port: int,
    rank_offset: int,
    world_size: int,
    *,
    vllm_version: str | None,
    buffer_size_bytes: int,
    timeout_seconds: float | None = None,
    join_timeout_seconds: float | None = None,
) -> dict[str, Any]:
    """The `init_info` for one server.

    Args:
        backend (`str`): `"gloo"` or `"nccl"`.
        master_address (`str`): The trainer's.
        master_port (`int`): Of the rendezvous there.
        rank_offset (`int`): Rank of the server's first worker.
        world_size (`int`): Of the whole group: the trainer, and all workers of all servers.
        vllm_version (`str` or `None`): The server's, as `/version` tells it; `None` is taken for the newest.
        buffer_size_bytes (`int`): Size at which buffers are cut.
        timeout_seconds (`float`, *optional*): For gloo: how long a worker waits in each broadcast.
        join_timeout_seconds (`float`, *optional*): For gloo: how long it waits for the group to come together.

    Raises:
        `ValueError`: for another backend.
    """
    info: dict[str, Any] = {
        "master_address": master_address,
        "master_port": master_port,
        "rank_offset": rank_offset,
        "world_size": world_size,
    }
    if _known(backend) == GLOO:
        info["packed_buffer_size_bytes"] = buffer_size_bytes
        if timeout_seconds is not None:
            info["timeout_seconds"] = timeout_seconds
        if join_timeout_seconds is not None:
            info["join_timeout_seconds"] = join_timeout_seconds
    elif _packed_in_init(vllm_version):
        info |= {"packed": True, "packed_buffer_size_bytes": buffer_size_bytes}
    return info


def update_info(
    backend: str, metadata: Metadata, *, vllm_version: str | None, buffer_size_bytes: int
) -> dict[str, Any]:
    """The `update_info` of one update, the same for every server.

    Args:
        backend (`str`): `"gloo"` or `"nccl"`.
        metadata (`Iterable[tuple[str, str, Sequence[int]]]`): `(name, dtype name, shape)` of every tensor, in order.
        vllm_version (`str` or `None`): The server's, as `/version` tells it; `None` is taken for the newest.
        buffer_size_bytes (`int`): As in [`init_info`].

    Raises:
        `ValueError`: for another backend.
    """
    rows = list(metadata)
    info: dict[str, Any] = {
        "names": [name for name, _, _ in rows],
        "dtype_names": [dtype_name for _, dtype_name, _ in rows],
        "shapes": [list(shape) for _, _, shape in rows],
    }
    if _known(backend) == NCCL and not _packed_in_init(vllm_version):
        info |= {"packed": True, "packed_buffer_size_bytes": buffer_size_bytes}
    return info


def _known(backend: str) -> str:
    if backend not in (GLOO, NCCL):
        raise ValueError(f"unknown weight transfer backend {backend!r}; there are {GLOO!r} and {NCCL!r}")
    return backend


def _packed_in_init(vllm_version: str | None) -> bool:
    # Also of "0.28.0rc1", "0.31.0+cpu" and "0.30.1.dev7+g0123abc".
    found = re.match(r"v?(\d+)\.(\d+)", vllm_version or "")
    return found is None or (int(found[1]), int(found[2])) >= _PACKED_IN_INIT
