"""The gateway's settings: the pool's, with a gateway's defaults, and its own."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from ..addresses import parse_backends
from ..config import PoolConfig, Seconds


def _urls(value: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    return tuple(address.url for address in parse_backends(value))


NOT_FOR_GATEWAYS = frozenset(
    {"progress", "min_backends", "weight_transport", "weight_buffer_mb", "update_group_host", "sync_retries"}
)
"""Settings of a pool in a trainer that mean nothing to a gateway."""


class GatewaySettings(PoolConfig):
    """Everything that can be set on a gateway, by environment variable (upper case) or option (`--lower-case`).

    Args:
        backends (`tuple[str, ...]` or `str`): Addresses of the servers, comma-separated as a string. Required.
        request_timeout (`float`, *optional*, defaults to `90.0`): Seconds one attempt on one backend may take.
        total_timeout (`float`, *optional*, defaults to `300.0`): Seconds a request may take altogether.
        backend_wait_seconds (`float`, *optional*, defaults to `0.0`):
            A gateway answers 503 at once when nobody is eligible; its clients wait better than it does.
        max_queue (`int`, *optional*, defaults to `1024`): Requests that may wait for a slot; more are answered 429.
        queue_timeout (`float`, *optional*, defaults to `30.0`): Seconds one may wait before it is answered 429.
        max_body_mb (`float`, *optional*, defaults to `20.0`): Largest request body in MB (10⁶ bytes).
        sticky_header (`str`, *optional*, defaults to `"x-session-id"`): Header that names the session.
        shutdown_settle_seconds (`float`, *optional*, defaults to `1.0`):
            Seconds between SIGTERM, when `/readyz` turns to 503, and the end of accepting connections.
        shutdown_timeout (`float`, *optional*, defaults to `100.0`):
            Seconds after that in which requests may end; the rest is answered 503.

    The others are those of [`PoolConfig`].
    """

    backends: Annotated[tuple[str, ...], BeforeValidator(_urls), Field(description="URL[,URL...]")]
    request_timeout: Seconds = 90.0
    total_timeout: Seconds = 300.0
    backend_wait_seconds: float = Field(0.0, ge=0, allow_inf_nan=False)
    max_queue: int | None = Field(1024, ge=0)
    queue_timeout: float | None = Field(30.0, ge=0, allow_inf_nan=False)
    max_body_mb: float = Field(20.0, gt=0, allow_inf_nan=False)
    sticky_header: str = Field("x-session-id", pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")
    shutdown_settle_seconds: float = Field(1.0, ge=0, allow_inf_nan=False)
    shutdown_timeout: Seconds = 100.0

    @property
    def max_body_bytes(self) -> int:
        """`max_body_mb` in bytes."""
        return int(self.max_body_mb * 1_000_000)
