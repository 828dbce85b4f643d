"""Spread the rollouts of a TRL training over many vLLM servers.

[`VLLMClientPool`] stands where TRL's `VLLMClient` stands; [`AsyncVLLMClientPool`] is the same for asyncio;
`python -m trl_pool.server` is the gateway around it. [`patch_trl`] and `python -m trl_pool.run` put it into TRL's
trainers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .client import VLLMClientPool
from .config import PoolConfig
from .errors import (
    BackendMismatchError,
    BackendsUnreachableError,
    ConfigurationError,
    ControlError,
    ForkedProcessError,
    InvalidRequestError,
    NoBackendAvailableError,
    OverloadedError,
    PoolClosedError,
    PoolError,
    RequestRejectedError,
    RolloutError,
    RolloutTimeoutError,
    UnknownBackendError,
    UnsupportedTRLError,
    WeightSyncError,
)
from .fleet import PoolStatistics
from .pool import AsyncVLLMClientPool

if TYPE_CHECKING:
    from .integrations import TrlPatch, patch_trl, unpatch_trl

__all__ = [
    "AsyncVLLMClientPool",
    "BackendMismatchError",
    "BackendsUnreachableError",
    "ConfigurationError",
    "ControlError",
    "ForkedProcessError",
    "InvalidRequestError",
    "NoBackendAvailableError",
    "OverloadedError",
    "PoolClosedError",
    "PoolConfig",
    "PoolError",
    "PoolStatistics",
    "RequestRejectedError",
    "RolloutError",
    "RolloutTimeoutError",
    "TrlPatch",
    "UnknownBackendError",
    "UnsupportedTRLError",
    "VLLMClientPool",
    "WeightSyncError",
    "__version__",
    "patch_trl",
    "unpatch_trl",
]

# Imported when they are asked for: the core does not need them.
_INTEGRATIONS = frozenset({"TrlPatch", "patch_trl", "unpatch_trl"})


def __getattr__(name: str) -> Any:
    if name not in _INTEGRATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import integrations

    return getattr(integrations, name)
