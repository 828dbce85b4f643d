"""What makes a `trl vllm-serve` take weights on a machine without CUDA: gloo in NCCL's place. For tests and trials.

TRL's worker knows one communicator, `PyNcclCommunicator`, and vLLM's CPU linear layers pack their weights at load, so
that nothing can be loaded into them later. Both are replaced here, in a process that asked for it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from .gloo import group_over

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

VARIABLE: Final = "TRL_POOL_CPU_STAND_IN"

_TIMEOUT_SECONDS: Final = 600.0
"""As the pool's `update_idle_timeout`: a worker may be told of a tensor before the trainer has it."""


class StandInCommunicator:
    """Has of vLLM's `PyNcclCommunicator` what TRL's worker uses.

    Args:
        group (`StatelessProcessGroup`): vLLM's; TRL's worker calls `.group.barrier()`.
        device (`torch.device`): The worker's.
        library_path (`str`, *optional*): NCCL's; there is none.
    """

    disabled = False

    def __init__(self, group: Any, device: Any, library_path: str | None = None) -> None:
        self.group = group
        self.device = device
        self.rank: int = group.rank
        self.world_size: int = group.world_size
        self._gloo = group_over(group, timeout=_TIMEOUT_SECONDS)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        """Receives a tensor in place, or sends it."""
        self._gloo.broadcast(tensor, src)


def asked_for(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `TRL_POOL_CPU_STAND_IN=1` is set."""
    return environment.get(VARIABLE, "").strip().lower() in ("1", "true", "yes", "on")


def install() -> bool:
    """Replaces the two in this process, unless it has CUDA; says in the log what it did.

    Returns:
        `bool`: Whether it did.
    """
    import torch

    if torch.cuda.is_available():
        logger.error(
            "%s=1 is refused: there is CUDA here, so weights travel over NCCL. Unset it; it is for machines without.",
            VARIABLE,
        )
        return False
    from vllm.distributed.device_communicators import pynccl
    from vllm.model_executor.layers import utils

    pynccl.PyNcclCommunicator = StandInCommunicator  # type: ignore[misc,unused-ignore]
    utils.dispatch_cpu_unquantized_gemm = _plain_linear  # type: ignore[assignment,unused-ignore]
    logger.warning("%s=1: gloo stands in for NCCL, and linear layers are not packed. Not for production.", VARIABLE)
    return True


def _plain_linear(layer: Any, remove_weight: bool) -> None:
    """Leaves the weight where it is, so that it can be loaded again."""
    import torch

    layer.cpu_linear = torch.nn.functional.linear
