"""What is installed only if it was asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_SERVER_EXTRA = frozenset({"fastapi", "starlette", "uvicorn"})


@contextlib.contextmanager
def needs_server_extra(what: str) -> Iterator[None]:
    """Around imports of what the `server` extra installs.

    Args:
        what (`str`): Who needs it, for the message.

    Raises:
        `ModuleNotFoundError`: saying how to install what is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _SERVER_EXTRA:
            raise
        raise ModuleNotFoundError(
            f'{what} needs {error.name}, which is not installed; pip install "trl-pool[server]"', name=error.name
        ) from None
