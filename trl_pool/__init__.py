"""Spread the rollouts of a TRL training over many vLLM servers.

[`VLLMClientPool`] stands where TRL's `VLLMClient` stands; [`AsyncVLLMClientPool`] is the same for asyncio;
`python -m trl_pool.server` is the gateway around it.
"""

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
    WeightSyncError,
)
from .fleet import PoolStatistics
from .pool import AsyncVLLMClientPool

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
    "UnknownBackendError",
    "VLLMClientPool",
    "WeightSyncError",
    "__version__",
]
