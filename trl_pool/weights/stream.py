"""Tensors on their way from the caller's thread to the daemon thread that sends them, a few buffers at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol


class BufferPacker(Protocol):
    """Makes buffers of tensors; `packing.Packer` is one."""

    def add(self, name: str, tensor: Any) -> Any | None: ...

    def flush(self) -> Any | None: ...


class TensorStream:
    """Hands buffers from one thread to another, and never blocks the first one for good.

    The caller's thread puts tensors in; a parameter iterator that it reads may be a collective over the ranks of the
    training, so it has to come to its end whatever happens: once the stream has failed, what is put in is dropped. The
    daemon thread takes buffers out. At most one waits while one is being sent and one is being filled, so three
    exist at a time.

    Args:
        packer (`BufferPacker`): Copies tensors into buffers.
        clock (`Callable[[], float]`, *optional*): Monotonic seconds.
    """

    def __init__(self, packer: BufferPacker, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._packer, self._clock = packer, clock
        self._changed = threading.Condition()
        self._ready: Any | None = None
        self._ended = False
        self._failure: BaseException | str | None = None
        self._sending = False
        self._moved = clock()
        self.tensors = 0
        self.bytes = 0

    def __repr__(self) -> str:
        state = "failed" if self._failure else "ended" if self._ended else "open"
        return f"<TensorStream {state}, {self.tensors} tensors in, {self.bytes} bytes sent>"

    @property
    def failure(self) -> BaseException | str | None:
        """What ended it before its end."""
        return self._failure

    # The caller's thread

    def put(self, name: str, tensor: Any) -> None:
        """Takes one tensor, which may be freed or changed afterwards; waits while too much is on its way.

        Raises:
            `ValueError`: when it is not the tensor that was announced for this place. The stream has failed then.
        """
        if self._failure is not None:
            return
        self.tensors += 1
        self._hand_over(lambda: self._packer.add(name, tensor))

    def end(self) -> None:
        """There are no more tensors.

        Raises:
            `ValueError`: when fewer came than were announced. The stream has failed then.
        """
        if self._failure is None:
            self._hand_over(self._packer.flush)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _hand_over(self, pack: Callable[[], Any | None]) -> None:
        try:
            buffer = pack()
        except BaseException as error:
            self.fail(error)  # at once: servers wait for what will not come
            raise
        if buffer is None:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._ready is None or self._failure is not None)
            if self._failure is None:
                self._ready = buffer
                self._moved = self._clock()
                self._changed.notify_all()

    # Any thread

    def fail(self, failure: BaseException | str) -> None:
        """Ends it; whoever waits goes on. The first failure counts."""
        with self._changed:
            if self._failure is None:
                self._failure = failure
            self._ready = None
            self._changed.notify_all()

    def seconds_stuck(self) -> float:
        """Seconds for which a buffer has been under way without arriving; 0 while the stream waits for the caller."""
        with self._changed:
            return self._clock() - self._moved if self._sending or self._ready is not None else 0.0

    # The daemon thread

    def buffers(self) -> Iterator[Any]:
        """The buffers, one at a time, until the end or a failure. Asked for the next, the last one has been sent."""
        while True:
            with self._changed:
                self._sending = False
                self._changed.wait_for(lambda: self._ready is not None or self._ended or self._failure is not None)
                buffer, self._ready = self._ready, None
                if buffer is None or self._failure is not None:
                    return
                self._sending, self._moved = True, self._clock()
                self._changed.notify_all()
            yield buffer
            self.bytes += int(getattr(buffer, "nbytes", 0))
            del buffer
