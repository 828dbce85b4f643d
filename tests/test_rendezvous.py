"""Where groups meet."""

from __future__ import annotations

import errno
import socket
import time

import pytest

from trl_pool.weights.rendezvous import failure, listen, local_address


def test_port_is_open_at_once() -> None:
    with listen("127.0.0.1") as listener, socket.create_connection(listener.getsockname(), 5):
        assert listener.getsockname()[1] > 0


def test_taken_port_is_an_error_that_names_it() -> None:
    with listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=rf"127\.0\.0\.1:{port}") as caught:
            listen("127.0.0.1", port)
        assert caught.value.errno == errno.EADDRINUSE


def test_address_of_another_machine_is_refused() -> None:
    # From the range that is reserved for documentation.
    with pytest.raises(OSError, match=r"203\.0\.113\.7:0"):
        listen("203.0.113.7")


def test_port_can_be_taken_again_after_use() -> None:
    """A group that follows another may use its port, though connections of the first linger."""
    with listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port), 5)
        server, _ = listener.accept()
    # The side that closes first keeps the port in TIME_WAIT.
    server.close()
    client.close()
    listen("127.0.0.1", port).close()


def test_loopback_is_faced_from_loopback() -> None:
    assert local_address("127.0.0.1", 80) == "127.0.0.1"
    assert local_address("localhost", 80) in ("127.0.0.1", "::1")


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::"])
def test_wildcard_faces_nowhere_in_particular(wildcard: str) -> None:
    assert local_address(wildcard, 80) is None


def test_failures_tell_lateness_from_loss() -> None:
    """And leave out torch's source lines, stacks and advice."""
    torchs = RuntimeError("[/src/pair.cc:553] Read error [10.0.0.2]:4711: gone. This is typically caused by x\nstack")
    lost = failure(torchs, "A broadcast", time.monotonic(), 30)
    assert type(lost) is ConnectionError
    assert str(lost) == "A broadcast failed: Read error [10.0.0.2]:4711: gone."
    late = failure(RuntimeError("Operation timed out!"), "A broadcast", time.monotonic() - 30, 30)
    assert type(late) is TimeoutError
    assert str(late) == "A broadcast took longer than 30 s: Operation timed out!"
    assert str(failure(RuntimeError(""), "It", time.monotonic(), 30)) == "It failed: RuntimeError"
