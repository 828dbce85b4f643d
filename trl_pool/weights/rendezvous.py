"""Where the members of an update group meet: the listening socket, and the address that others reach us under."""

from __future__ import annotations

import re
import socket
import time


def listen(host: str, port: int = 0) -> socket.socket:
    """Opens the socket that a group's members will meet at.

    Whoever makes the group opens it *before* it tells the servers where to come: a port that is taken is an error here
    and now then, not a worker that waits for minutes or joins somebody else's group.

    Args:
        host (`str`): Address of this machine that the servers are told.
        port (`int`, *optional*, defaults to `0`): 0 for any free one; `getsockname()[1]` tells which.

    Returns:
        `socket.socket`: Listening, for [`~trl_pool.weights.gloo.open_group`] or
        [`~trl_pool.weights.nccl.open_group`], which take it over; who changes his mind closes it.

    Raises:
        `OSError`: naming host and port, when the port is taken or the address is none of this machine's.
    """
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        # The last group's connections may linger on the port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        if listener is not None:
            listener.close()
        raise OSError(
            error.errno,
            f"cannot listen on {host}:{port} for a weight update group ({error.strerror or error}); "
            "use another group_port, or an address that this machine has",
        ) from error
    return listener


def local_address(host: str, port: int) -> str | None:
    """Which of this machine's addresses faces a host: the one that its peers there can reach, too.

    Args:
        host (`str`): The other side, or an address of this machine.
        port (`int`): Any; nothing is sent.

    Returns:
        `str` or `None`: `None` for a wildcard such as `0.0.0.0`, which faces everywhere.

    Raises:
        `OSError`: when the host is unknown or there is no way to it.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    if address[0] in ("0.0.0.0", "::"):
        return None
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def failure(error: BaseException, what: str, started: float, timeout: float) -> OSError:
    """What a `RuntimeError` of torch means: too late, or somebody is gone.

    Args:
        error (`BaseException`): Torch's.
        what (`str`): What was tried, for the message.
        started (`float`): Monotonic time at which it began.
        timeout (`float`): Seconds that it had.

    Returns:
        `TimeoutError` or `ConnectionError`: to be raised from `error`.
    """
    # Without the place in the C++ source before it, and the stack or the advice behind it.
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    detail = re.sub(r"^\[[^\]]*\.cc:\d+\] ", "", first_line).split(" This is typically")[0][:300]
    if time.monotonic() - started >= 0.95 * timeout:
        return TimeoutError(f"{what} took longer than {timeout:g} s: {detail}")
    return ConnectionError(f"{what} failed: {detail}")
