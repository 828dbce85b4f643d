"""vLLM's side of a gloo update group: the weight transfer engine `gloo`, for workers with and without a GPU.

It is imported by vLLM's workers only; [`plugin`] makes it known to them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from .gloo import GlooGroup, open_group
from .packing import DEFAULT_BUFFER_SIZE_BYTES, Packer, chunk_nbytes, chunks, unpack

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_SECONDS: Final = 300.0


@dataclass
class GlooInitInfo(WeightTransferInitInfo):  # type: ignore[misc,unused-ignore]
    """`init_info` of `/init_weight_transfer_engine`.

    Args:
        master_address (`str`): Of the trainer, which is rank 0 and the rendezvous.
        master_port (`int`): Of the rendezvous there.
        rank_offset (`int`): Rank of this server's first worker.
        world_size (`int`): Of the whole group.
        packed_buffer_size_bytes (`int`, *optional*, defaults to 256 MiB): Size at which the trainer cuts buffers.
        timeout_seconds (`float`, *optional*, defaults to 300): For each broadcast, the wait for it included.
        join_timeout_seconds (`float`, *optional*): To join the group; `timeout_seconds` without it.
    """

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    packed_buffer_size_bytes: int = DEFAULT_BUFFER_SIZE_BYTES
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    join_timeout_seconds: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.rank_offset < self.world_size:
            raise ValueError(f"rank_offset {self.rank_offset} is not within a group of {self.world_size}")
        if self.packed_buffer_size_bytes < 1 or self.timeout_seconds <= 0:
            raise ValueError("packed_buffer_size_bytes and timeout_seconds must be above 0")


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc,unused-ignore]
    """`update_info` of `/update_weights`: the tensors, in the order in which they come.

    Args:
        names (`list[str]`): Of the parameters, as the checkpoint has them.
        dtype_names (`list[str]`): `"bfloat16"`.
        shapes (`list[list[int]]`): Of the whole tensors, whatever the server's parallelism.
    """

    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.dtype_names) == len(self.shapes):
            raise ValueError(
                f"{len(self.names)} names, {len(self.dtype_names)} dtype_names and {len(self.shapes)} shapes were "
                "given; there must be one of each per tensor"
            )


class GlooWeightTransferEngine(WeightTransferEngine):  # type: ignore[misc,unused-ignore]
    """Receives whole tensors, packed as [`packing`] says, from rank 0, and loads them as from a checkpoint."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    _group: GlooGroup | None = None
    _buffer_size_bytes = DEFAULT_BUFFER_SIZE_BYTES

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Joins a group, in place of an earlier one."""
        self.shutdown()
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._buffer_size_bytes = init_info.packed_buffer_size_bytes
        self._group = open_group(
            init_info.master_address,
            init_info.master_port,
            rank,
            init_info.world_size,
            master=False,
            timeout=init_info.join_timeout_seconds or init_info.timeout_seconds,
        )
        self._group.timeout = init_info.timeout_seconds

    def start_weight_update(self) -> None:
        """Takes the layers apart, to be loaded anew. Until `finish_weight_update` a request would find no data."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """Puts together what is still apart."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receives and loads the tensors of one call.

        Raises:
            `RuntimeError`: without a group.
            `ConnectionError`, `TimeoutError`: when the trainer, or another server, is gone. The group is closed then
                and the model has mixed weights: it needs a new group and a whole update.
        """
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        if self._group is None:
            raise RuntimeError("There is no weight update group; call /init_weight_transfer_engine first")
        started = time.monotonic()
        rows = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        try:
            with disable_mtp_completeness_check():
                for chunk in chunks(rows, self._buffer_size_bytes):
                    # One buffer each: a layer that is not complete yet keeps views of its earlier parts.
                    buffer = torch.empty(chunk_nbytes(chunk), dtype=torch.uint8)
                    self._group.broadcast(buffer, src=0)
                    self.model.load_weights(unpack(buffer.to(self.device), chunk))
        except BaseException:
            # The others wait for us, or for what they would have had through us.
            self._group.abort()
            self._group = None
            self._put_together()
            raise
        logger.debug("%d tensors in %.2f s", len(update_info.names), time.monotonic() - started)

    def _put_together(self) -> None:
        """After a failure. In layers that are still apart the first request would find no data, and the whole server
        would die of it; so they run with mixed weights, which nobody should ask for, until a whole update comes."""
        try:
            self.finish_weight_update()
        except Exception:
            logger.exception("The layers could not be put together after a failed weight update; restart this server")

    def shutdown(self) -> None:
        """Leaves the group, if there is one."""
        if self._group is not None:
            self._group.close()
            self._group = None

    @staticmethod
    def trainer_send_weights(iterator: Iterable[tuple[str, torch.Tensor]], trainer_args: Mapping[str, Any]) -> None:
        """The other side, for those who move weights with vLLM's API before 0.28.

        Args:
            iterator (`Iterable[tuple[str, torch.Tensor]]`): Names and tensors.
            trainer_args (`Mapping[str, Any]`):
                `group` ([`~trl_pool.weights.gloo.GlooGroup`]), `metadata` as the servers were told, and
                `packed_buffer_size_bytes` as in the `init_info`.
        """
        group: GlooGroup = trainer_args["group"]
        packer = Packer(trainer_args["metadata"], trainer_args["packed_buffer_size_bytes"], device="cpu")
        for name, tensor in iterator:
            if (buffer := packer.add(name, tensor)) is not None:
                group.broadcast(buffer, src=0)
        if (buffer := packer.flush()) is not None:
            group.broadcast(buffer, src=0)
