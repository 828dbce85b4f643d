"""What is installed only if it was asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_EXTRAS = {
    "server": frozenset({"fastapi", "starlette", "uvicorn"}),
    "bench": frozenset({"tabulate"}),
}


@contextlib.contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Around imports of what an extra installs.

    Args:
        extra (`str`): Its name in `pip install "trl-pool[…]"`.
        what (`str`): Who needs it, for the message.

    Raises:
        `ModuleNotFoundError`: saying how to install what is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRAS[extra]:
            raise
        raise ModuleNotFoundError(
            f'{what} needs {error.name}, which is not installed; pip install "trl-pool[{extra}]"', name=error.name
        ) from None


def needs_server_extra(what: str) -> contextlib.AbstractContextManager[None]:
    """Around imports of what the `server` extra installs; see [`needs_extra`]."""
    return needs_extra("server", what)
