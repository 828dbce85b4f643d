"""How a simulated `vllm serve` takes part in an update group: by word of mouth, or for real over gloo."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from trl_pool.sim.engine import digest_of
from trl_pool.sim.parameters import Announced, WorkerError

T = TypeVar("T")

_RENDEZVOUS = ("master_address", "master_port", "rank_offset", "world_size")
_PACKING = ("packed", "packed_buffer_size_bytes", "packed_num_buffers")
_GLOO = ("packed_buffer_size_bytes", "timeout_seconds", "join_timeout_seconds")
_NOT_INITIALIZED = "weight transfer is not initialized: init_weight_transfer_engine must come first"
_PACKED_IN_INIT = (0, 28)
"""From this vLLM on, packing is agreed on when the group is made; before, with each update."""


class Receiver(Protocol):
    """A server's membership in update groups. Errors of the real worker are `WorkerError`s."""

    @property
    def joined(self) -> bool:
        """Whether there is a group."""

    async def join(self, info: Mapping[str, Any]) -> None:
        """Join a group, in place of an earlier one. Returns when all members have joined."""

    async def receive(self, info: Mapping[str, Any], take: Callable[[Announced, str | None], None]) -> None:
        """Receive tensors, and hand over each with what stands for its bytes."""

    def leave(self) -> None:
        """Leave the group, if there is one."""


class ControlReceiver:
    """Moves nothing: the announcement is all there is. It takes what vLLM's NCCL engine and this package's gloo engine
    take.

    Args:
        vllm_version (`tuple[int, ...]`):
            Decides which fields are known.
    """

    def __init__(self, vllm_version: tuple[int, ...]) -> None:
        self._packing = _PACKING if vllm_version >= _PACKED_IN_INIT else ()
        self._update_packing = () if self._packing else _PACKING
        self.joined = False

    async def join(self, info: Mapping[str, Any]) -> None:
        self.joined = False
        require_fields("init_info", info, _RENDEZVOUS, (*self._packing, *_GLOO))
        self.joined = True

    async def receive(self, info: Mapping[str, Any], take: Callable[[Announced, str | None], None]) -> None:
        tensors = announced(info, self._update_packing)
        if not self.joined:
            raise WorkerError(_NOT_INITIALIZED)
        for tensor in tensors:
            take(tensor, None)

    def leave(self) -> None:
        self.joined = False


class GlooReceiver:
    """Takes part in gloo broadcasts, as the weight transfer engine `gloo` of this package does. Needs torch.

    Args:
        ranks (`int`):
            How many of the group's ranks are this server's.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._groups: list[Any] = []
        self._buffer_size_bytes = 0

    @property
    def joined(self) -> bool:
        return bool(self._groups)

    async def join(self, info: Mapping[str, Any]) -> None:
        from trl_pool.weights.gloo import open_group
        from trl_pool.weights.packing import DEFAULT_BUFFER_SIZE_BYTES

        self.leave()
        require_fields("init_info", info, _RENDEZVOUS, _GLOO)
        self._buffer_size_bytes = info.get("packed_buffer_size_bytes", DEFAULT_BUFFER_SIZE_BYTES)

        def open_rank(rank: int) -> Any:
            return open_group(
                info["master_address"],
                info["master_port"],
                info["rank_offset"] + rank,
                info["world_size"],
                master=False,
                timeout=info.get("join_timeout_seconds") or info.get("timeout_seconds", 300.0),
            )

        opening = [_on_a_daemon_thread(partial(open_rank, rank)) for rank in range(self._ranks)]
        try:
            self._groups = await asyncio.gather(*opening)
        except WorkerError:
            for one in opening:
                one.add_done_callback(_close_late)
            raise
        for group in self._groups:
            group.timeout = info.get("timeout_seconds", 300.0)

    async def receive(self, info: Mapping[str, Any], take: Callable[[Announced, str | None], None]) -> None:
        tensors = announced(info, ())
        if not self._groups:
            raise WorkerError(_NOT_INITIALIZED)
        loop = asyncio.get_running_loop()

        def arrived(tensor: Announced, content: str) -> None:
            loop.call_soon_threadsafe(take, tensor, content)

        ranks = [
            _on_a_daemon_thread(partial(self._receive_in, group, tensors, None if rank else arrived))
            for rank, group in enumerate(self._groups)
        ]
        try:
            await asyncio.gather(*ranks)
        except WorkerError:
            self.leave()  # the others wait for us, or for what they would have had through us
            raise

    def leave(self) -> None:
        groups, self._groups = self._groups, []
        for group in groups:
            group.close()

    def _receive_in(
        self, group: Any, tensors: Sequence[Announced], tell: Callable[[Announced, str], None] | None
    ) -> None:
        import torch

        from trl_pool.weights.packing import chunk_nbytes, chunks

        ahead = iter(tensors)
        for chunk in chunks(((t.name, t.dtype, t.shape) for t in tensors), self._buffer_size_bytes):
            buffer = torch.empty(chunk_nbytes(chunk), dtype=torch.uint8)
            group.broadcast(buffer, src=0)
            raw, offset = buffer.numpy().tobytes(), 0
            for piece in chunk:
                tensor, part = next(ahead), raw[offset : offset + piece.nbytes]
                offset += piece.nbytes
                if tell is not None:
                    tell(tensor, digest_of(f"{tensor.dtype} {tensor.shape} ".encode() + part))


def announced(info: Mapping[str, Any], optional: Sequence[str]) -> list[Announced]:
    """The tensors of an `update_info`.

    Raises:
        WorkerError: If it is ill-formed.
    """
    require_fields("update_info", info, ("names", "dtype_names", "shapes"), optional)
    rows = info["names"], info["dtype_names"], info["shapes"]
    if len({len(row) for row in rows}) > 1:
        raise WorkerError("names, dtype_names and shapes must be of the same length")
    return [Announced(name, dtype, tuple(shape)) for name, dtype, shape in zip(*rows, strict=True)]


def require_fields(what: str, info: object, needed: Sequence[str], optional: Sequence[str]) -> None:
    """Raise `WorkerError` unless `info` has all that is needed and nothing unknown."""
    if not isinstance(info, Mapping):
        raise WorkerError(f"invalid {what}: not an object")
    missing = [name for name in needed if info.get(name) is None]
    unknown = sorted(set(info) - {*needed, *optional})
    if missing or unknown:
        raise WorkerError(f"invalid {what}: missing {missing}, unknown {unknown}")


def _on_a_daemon_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """The result of a call that may block for ever: a daemon's end is waited for by nobody."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def run() -> None:
        result, problem = None, None
        try:
            result = call()
        except Exception as error:
            problem = WorkerError(str(error))
        try:
            loop.call_soon_threadsafe(settle, result, problem)
        except RuntimeError:
            return  # the loop has closed: the server ends

    threading.Thread(target=run, daemon=True, name="update group").start()
    return future


def _close_late(opened: asyncio.Future[Any]) -> None:
    """Leave a group that is of no use, since another of our ranks could not join it."""
    if not opened.cancelled() and opened.exception() is None:
        opened.result().close()
