"""Update groups over gloo: tensors travel between CPUs over TCP, with no GPU and no NCCL.

The groups are built on torch's own parts and are nobody's default group: a trainer's `torch.distributed` group, if it
has one, is neither used nor changed.

Which network they use: the interfaces in `GLOO_SOCKET_IFNAME` (names, separated by commas) if it is set, on trainer
and servers each for itself. Otherwise the address that faces the rendezvous, so `master_address` decides. (Gloo by
itself takes what the machine's own name resolves to, on many machines `127.0.1.1`, where no other machine can come.)
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from .rendezvous import failure, listen, local_address

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroupGloo, Store

_PREFIX: Final = "trl_pool/gloo"
"""Of the keys in a store; the two sides must agree on it."""

_WORD: Final = "trl_pool/word"
_GAVE_UP: Final = "gave up"
_LEFT: Final = "left"
_LOOK_SECONDS: Final = 0.2
_LAST_WORDS_SECONDS: Final = 2.0
_EXIT_SECONDS: Final = 2.0


class _Alarm:
    """Rings when a group has no future, here or at another member, and can be heard while a broadcast waits.

    Gloo alone is not enough: it misses deaths in the middle of an operation until the time is up, and a broadcast
    that waits cannot be called off. So a member that fails, or gives up, leaves a word in the store of the rendezvous,
    where the others look for it several times a second.

    Args:
        store (`Store`, *optional*): Of the rendezvous; without one the alarm is only rung from here.
    """

    def __init__(self, store: Store | None) -> None:
        self.reason = ""
        self._rung = threading.Event()
        self._store = store
        if store is not None:
            # On a thread: to a machine that vanished a question takes as long as TCP likes.
            _helper(self._watch, store)
            _watching.add(self)

    def heard(self) -> bool:
        """Whether it was rung."""
        return self._rung.is_set()

    def ring(self, reason: str) -> None:
        """Rings it here; the first reason stays."""
        if not self._rung.is_set():
            self.reason = reason
            self._rung.set()

    def leave_word(self, word: str) -> None:
        """Tells the others. May block as long as TCP likes."""
        if self._store is not None:
            self._store.set(_WORD, word)

    def _watch(self, store: Store) -> None:
        # A store that is gone is somebody leaving without a word.
        with contextlib.suppress(RuntimeError):
            while not self._rung.wait(_LOOK_SECONDS):
                if store.check([_WORD]):
                    if store.get(_WORD) == _GAVE_UP.encode():
                        self.ring("another member gave up")
                    break
        # Whoever left in peace may have sent something that is still on its way.
        self._rung.wait(_LAST_WORDS_SECONDS)
        self.ring("another member has left")


class GlooGroup:
    """A process's membership in an update group, from [`open_group`].

    A dead peer is an error within `timeout` seconds. Often it is one at once, but gloo misses deaths in the middle of
    an operation: who hears of one in another way should call [`abort`]. When one member fails, the others do within a
    second. After an error the group is closed; it has to be built anew.

    Args:
        process_group (`ProcessGroupGloo`): Torch's.
        store (`Store`): Where its members met; has to live as long as the group.
        timeout (`float`): Seconds for one broadcast.
        port (`int`): Of the rendezvous.
        watch (`bool`, *optional*, defaults to `True`): Whether the members tell each other of failures.
    """

    def __init__(
        self, process_group: ProcessGroupGloo, store: Store, timeout: float, port: int, *, watch: bool = True
    ) -> None:
        self._process_group: ProcessGroupGloo | None = process_group
        self._store: Store | None = store
        self._watched = watch
        self._alarm = _Alarm(store if watch else None)
        self.rank: int = process_group.rank()
        self.world_size: int = process_group.size()
        self.timeout = timeout
        self.port = port

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return f"<{type(self).__name__} rank {self.rank} of {self.world_size}, port {self.port}{state}>"

    @property
    def closed(self) -> bool:
        """Whether it was closed, by [`close`], [`abort`] or an error."""
        return self._process_group is None

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """Sends a tensor to all members, or receives it in place; returns when our part of it is done.

        Args:
            tensor (`torch.Tensor`): Contiguous, on the CPU, of any dtype, of the same size at all members.
            src (`int`): Rank that sends.

        Raises:
            `ValueError`: for a tensor that cannot be sent; nothing was sent then.
            `ConnectionError`: when a peer is gone, or the group is closed, also meanwhile.
            `TimeoutError`: after `timeout` seconds.
        """
        import torch

        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(
                f"gloo sends contiguous tensors on the CPU, got one on {tensor.device} "
                f"with strides {tensor.stride()} and shape {list(tensor.shape)}"
            )
        # Another thread may close the group meanwhile.
        process_group = self._process_group
        if process_group is None:
            raise ConnectionError(f"{self!r} cannot be used any more")
        what = f"A broadcast of {tensor.nbytes} bytes from rank {src}"
        work: Any = None
        started = time.monotonic()
        try:
            # As bytes: gloo does not know every dtype.
            work = process_group.broadcast(
                tensor.view(-1).view(torch.uint8), src, timeout=timedelta(seconds=self.timeout)
            )
            self._wait(work, what, started)
        except (RuntimeError, OSError) as error:
            problem = error if isinstance(error, OSError) else failure(error, what, started, self.timeout)
            self.abort()
            # The traceback keeps this frame, and must not keep the connections.
            _bury(process_group, work)
            process_group = work = None
            raise problem from (None if problem is error else error)

    def _wait(self, work: Any, what: str, started: float) -> None:
        while True:
            with contextlib.suppress(RuntimeError):
                work.wait(timedelta(seconds=_LOOK_SECONDS))
                return
            if work.is_completed():
                # For its own error; or it was done in the very moment in which the wait ended.
                work.wait()
                return
            if self._alarm.heard():
                raise ConnectionError(f"{what} was broken off: {self._alarm.reason}")
            if time.monotonic() - started > self.timeout:
                raise TimeoutError(f"{what} took longer than {self.timeout:g} s")

    def close(self) -> None:
        """Leaves the group in peace, after everybody has received everything; a second time does nothing. A broadcast
        of ours that is under way on another thread ends with an error."""
        self._leave("the group was closed", failed=False)

    def abort(self) -> None:
        """Leaves the group and ends it for all members: whoever waits in it fails within a second. Never blocks."""
        self._leave("the group was aborted", failed=True)

    def _leave(self, reason: str, *, failed: bool) -> None:
        process_group, self._process_group = self._process_group, None
        store, self._store = self._store, None
        if process_group is None:
            return
        self._alarm.ring(reason)
        word = _GAVE_UP if failed else _LEFT
        _bury(process_group, store, last_words=(lambda: self._alarm.leave_word(word)) if self._watched else None)


def _bury(*parts: Any, last_words: Callable[[], None] | None = None) -> None:
    """Drops what belonged to a group, on a thread: torch waits for operations under way until their time is up."""

    def run(*held: Any) -> None:
        if last_words is not None:
            with contextlib.suppress(RuntimeError):
                last_words()
                # If the store is ours, it is there until everybody has looked: torch has much to say of lost ones.
                _exiting.wait(_LAST_WORDS_SECONDS)

    _helper(run, *parts)


_exiting = threading.Event()
_helpers: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_watching: weakref.WeakSet[_Alarm] = weakref.WeakSet()


def _helper(target: Callable[..., None], *args: Any) -> None:
    thread = threading.Thread(target=target, args=args, name="trl-pool-gloo", daemon=True)
    _helpers.add(thread)
    thread.start()


@atexit.register
def _end_helpers() -> None:
    """A thread that comes back from torch while the interpreter is being taken down aborts the whole process."""
    _exiting.set()
    for alarm in list(_watching):
        alarm.ring("the process ends")
    deadline = time.monotonic() + _EXIT_SECONDS
    for thread in list(_helpers):
        thread.join(max(0.0, deadline - time.monotonic()))


def open_group(
    host: str,
    port: int,
    rank: int,
    world_size: int,
    *,
    master: bool,
    timeout: float,
    listener: socket.socket | None = None,
) -> GlooGroup:
    """Joins an update group; returns when all its members have.

    Args:
        host (`str`): Address of the member that is master.
        port (`int`): Of the rendezvous there.
        rank (`int`): Ours.
        world_size (`int`): How many members there are.
        master (`bool`): Whether the rendezvous is with us.
        timeout (`float`): Seconds for all of this, and for each broadcast later.
        listener (`socket.socket`, *optional*):
            For the master: from [`~trl_pool.weights.rendezvous.listen`], made before the others were told to come. It
            is taken over, whatever happens. Without one the port is opened here.

    Raises:
        `OSError`: naming the port, when the master cannot listen on it.
        `ConnectionError`: when the master, or a member, went away.
        `TimeoutError`: when the group was not complete in time.
    """
    from torch.distributed import TCPStore

    if master and listener is None:
        listener = listen(host, port)
    if listener is not None:
        port = int(listener.getsockname()[1])
    started = time.monotonic()
    descriptor = listener.detach() if listener is not None else None
    try:
        store = TCPStore(
            host,
            port,
            world_size,
            is_master=master,
            timeout=timedelta(seconds=timeout),
            # The group's own rendezvous waits for everybody, and knows whom it waits for.
            wait_for_workers=False,
            master_listen_fd=descriptor,
        )
    except RuntimeError as error:
        if descriptor is not None:
            socket.close(descriptor)
        raise failure(error, _joining(host, port, rank, world_size), started, timeout) from error
    return GlooGroup(_join(store, host, port, rank, world_size, timeout, started), store, timeout, port)


def _join(
    store: Store, host: str, port: int, rank: int, world_size: int, timeout: float, started: float
) -> ProcessGroupGloo:
    """The group over a store, whose members may come until `timeout` seconds after `started`."""
    from torch.distributed import PrefixStore, ProcessGroupGloo

    options = ProcessGroupGloo._Options()
    options._devices = _devices(host, port)
    options._timeout = timedelta(seconds=max(0.1, timeout - (time.monotonic() - started)))
    try:
        return ProcessGroupGloo(PrefixStore(_PREFIX, store), rank, world_size, options)
    except RuntimeError as error:
        raise failure(error, _joining(host, port, rank, world_size), started, timeout) from error


def _joining(host: str, port: int, rank: int, world_size: int) -> str:
    return f"Joining the weight update group at {host}:{port} as rank {rank} of {world_size}"


def _devices(host: str, port: int) -> list[Any]:
    """Network interfaces, as the head of this module says."""
    from torch.distributed import ProcessGroupGloo

    names = [name.strip() for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name.strip()]
    if names:
        try:
            return [ProcessGroupGloo.create_device(interface=name) for name in names]
        except RuntimeError as error:
            raise OSError(f"GLOO_SOCKET_IFNAME={','.join(names)} cannot be used: {error}") from error
    address = local_address(host, port)
    if address is None:
        return [ProcessGroupGloo.create_default_device()]
    return [ProcessGroupGloo.create_device(hostname=address)]


class StatelessGlooGroup(GlooGroup):
    """A trainer's membership in the group of a `trl vllm-serve` that runs the CPU stand-in: what travels over NCCL
    otherwise travels over gloo, and the barrier after every tensor is vLLM's, over the store."""

    def __init__(self, process_group: ProcessGroupGloo, stateless: Any, timeout: float, port: int) -> None:
        # The store is vLLM's, and the worker's end of it knows of no words.
        super().__init__(process_group, stateless.store, timeout, port, watch=False)
        self._stateless = stateless

    def barrier(self) -> None:
        """Waits until all members have come here. The worker does after each tensor, before it loads it.

        Raises:
            `ConnectionError`: when a peer is gone or the group is closed.
            `TimeoutError`: after `timeout` seconds.
        """
        stateless = self._stateless
        if stateless is None:
            raise ConnectionError(f"{self!r} cannot be used any more")
        started = time.monotonic()
        try:
            stateless.barrier(timeout=self.timeout)
        except RuntimeError as error:
            self.abort()
            raise failure(error.__cause__ or error, "The barrier after a tensor", started, self.timeout) from error

    def _leave(self, reason: str, *, failed: bool) -> None:
        super()._leave(reason, failed=failed)
        self._stateless = None


def join_stateless_group(host: str, port: int, rank: int, world_size: int, *, timeout: float) -> StatelessGlooGroup:
    """Joins the group of a `trl vllm-serve` that runs the CPU stand-in (`TRL_POOL_CPU_STAND_IN=1`).

    Per tensor the worker expects `broadcast(tensor, src=rank)` and then `barrier()`, after `/update_named_param/` has
    announced it.

    Args:
        host (`str`): Of the server, whose worker 0 is the master.
        port (`int`): Of the rendezvous there.
        rank (`int`): The trainer's, the last one.
        world_size (`int`): The server's workers and the trainer.
        timeout (`float`): Seconds for all of this, and for each broadcast and each barrier later.

    Raises:
        `ConnectionError`: when the worker went away.
        `TimeoutError`: when the group was not complete in time.
    """
    from vllm.distributed.utils import StatelessProcessGroup

    started = time.monotonic()
    try:
        stateless = StatelessProcessGroup.create(
            host=host, port=port, rank=rank, world_size=world_size, store_timeout=math.ceil(timeout)
        )
    except RuntimeError as error:
        raise failure(error, _joining(host, port, rank, world_size), started, timeout) from error
    process_group = _join(stateless.store, host, port, rank, world_size, timeout, started)
    return StatelessGlooGroup(process_group, stateless, timeout, port)


def group_over(stateless: Any, *, timeout: float) -> GlooGroup:
    """The worker's side of [`join_stateless_group`], over the `StatelessProcessGroup` that it has been given.

    Args:
        stateless (`StatelessProcessGroup`): vLLM's, with its store.
        timeout (`float`): Seconds for joining, and for each broadcast.

    Raises:
        `ConnectionError` or `TimeoutError`: when the other members do not come.
    """
    store, started = stateless.store, time.monotonic()
    process_group = _join(store, store.host, store.port, stateless.rank, stateless.world_size, timeout, started)
    return GlooGroup(process_group, store, timeout, store.port, watch=False)
