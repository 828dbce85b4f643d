"""The gateway: the pool behind HTTP, with the endpoints of a single `trl vllm-serve`.

`uvicorn trl_pool.server:app` makes the application from the environment when it asks for it, not before: importing
this package reads nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..extras import needs_server_extra

with needs_server_extra("The gateway"):
    from .application import create_app
from .settings import GatewaySettings

if TYPE_CHECKING:
    from fastapi import FastAPI

    app: FastAPI

# `app` is left out: a star import would read the environment.
__all__ = ["GatewaySettings", "create_app"]


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .lifecycle import app_from_environment

    globals()["app"] = app_from_environment()
    return globals()["app"]
