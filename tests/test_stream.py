"""Tensors go from one thread to another a few buffers at a time, and neither waits for ever for the other."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ClassVar

import pytest
from conftest import eventually

from trl_pool.weights.stream import TensorStream

Background = Callable[..., "Future[Any]"]


class Buffer:
    """A buffer whose life can be watched."""

    alive: ClassVar[weakref.WeakSet[Buffer]] = weakref.WeakSet()

    def __init__(self, names: list[str]) -> None:
        self.names, self.nbytes = names, 10 * len(names)
        Buffer.alive.add(self)


class Packer:
    """Makes a buffer of every two tensors."""

    def __init__(self, raises_at: str | None = None) -> None:
        self._names: list[str] = []
        self._raises_at = raises_at

    def add(self, name: str, tensor: Any) -> Buffer | None:
        if name == self._raises_at:
            raise ValueError(f"{name} was not announced")
        self._names.append(name)
        return self.flush() if len(self._names) == 2 else None

    def flush(self) -> Buffer | None:
        names, self._names = self._names, []
        return Buffer(names) if names else None


def put_all(stream: TensorStream, *names: str) -> None:
    for name in names:
        stream.put(name, object())
    stream.end()


def test_buffers_arrive_in_order_and_are_counted(background: Background) -> None:
    stream = TensorStream(Packer())
    sending = background(lambda: [buffer.names for buffer in stream.buffers()])
    put_all(stream, *"abcde")
    assert sending.result(5) == [["a", "b"], ["c", "d"], ["e"]]
    assert (stream.tensors, stream.bytes, stream.failure) == (5, 50, None)
    assert repr(stream) == "<TensorStream ended, 5 tensors in, 50 bytes sent>"


def test_a_stream_of_nothing_ends() -> None:
    stream = TensorStream(Packer())
    stream.end()
    assert list(stream.buffers()) == []


def test_the_caller_waits_while_too_much_is_on_its_way_and_at_most_three_buffers_exist(
    background: Background,
) -> None:
    """One is sent, one waits, one is being filled; a model has any number."""
    Buffer.alive.clear()
    stream, go_on = TensorStream(Packer()), threading.Semaphore(0)
    most = 0

    def send() -> None:
        nonlocal most
        for buffer in stream.buffers():
            go_on.acquire()
            most = max(most, len(Buffer.alive))
            del buffer

    sending, putting = background(send), background(put_all, stream, *map(str, range(40)))
    for sent in range(20):
        # Two are away from the caller and a third is in its hands, with room for none of the next.
        eventually(lambda sent=sent: stream.tensors == min(40, 2 * sent + 6))
        go_on.release()
    sending.result(5)
    putting.result(5)
    assert most == 3
    assert stream.bytes == 400


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_after_a_failure_the_caller_is_let_go_and_what_it_puts_in_is_dropped(
    background: Background, when: str
) -> None:
    stream = TensorStream(Packer())
    if when == "before":
        stream.fail("a server died")
        put_all(stream, *"abcdefgh")
    else:  # nobody takes anything, so it waits
        putting = background(put_all, stream, *"abcdefgh")
        eventually(lambda: stream.tensors == 4)
        assert not putting.done()
        stream.fail("a server died")
        putting.result(5)
    assert list(stream.buffers()) == []
    assert stream.failure == "a server died"
    assert repr(stream).startswith("<TensorStream failed")


def test_after_a_failure_the_sender_is_let_go(background: Background) -> None:
    stream = TensorStream(Packer())
    sending = background(lambda: list(stream.buffers()))
    stream.put("a", object())
    assert not sending.done()
    stream.fail(ConnectionError("the group is over"))
    assert sending.result(5) == []


def test_the_first_failure_counts() -> None:
    stream = TensorStream(Packer())
    stream.fail("first")
    stream.fail("second")
    assert stream.failure == "first"


def test_a_tensor_that_was_not_announced_is_the_callers_error_and_fails_the_stream_at_once(
    background: Background,
) -> None:
    """The servers would wait for the rest of what was announced."""
    stream = TensorStream(Packer(raises_at="c"))
    sending = background(lambda: list(stream.buffers()))
    stream.put("a", object())
    with pytest.raises(ValueError, match="c was not announced"):
        stream.put("c", object())
    assert sending.result(5) == []
    assert isinstance(stream.failure, ValueError)
    put_all(stream, *"de")
    assert stream.tensors == 2


def test_it_is_stuck_while_a_buffer_is_under_way_and_not_while_it_waits_for_the_caller(
    background: Background,
) -> None:
    now = 0.0
    stream, go_on = TensorStream(Packer(), clock=lambda: now), threading.Semaphore(0)

    def send() -> None:
        for _ in stream.buffers():
            go_on.acquire()

    sending = background(send)
    now = 100.0
    assert stream.seconds_stuck() == 0
    stream.put("a", object())
    stream.put("b", object())
    eventually(lambda: stream._sending)
    now = 107.0
    assert stream.seconds_stuck() == 7.0
    go_on.release()
    eventually(lambda: not stream._sending)
    assert stream.seconds_stuck() == 0
    stream.end()
    sending.result(5)
