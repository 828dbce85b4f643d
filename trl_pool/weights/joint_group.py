"""The update group of the `vllm` dialect: all servers in one, the trainer being rank 0 and the rendezvous."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anyio.to_thread
import msgspec

from ..backend import Backend
from ..config import PoolConfig
from ..errors import ControlResult, WeightSyncError
from ..identity import Identity
from . import wire
from .coordinator import Update, WeightCoordinator
from .rendezvous import listen, local_address
from .transport import JointGroup, JointTransport
from .worker import DaemonWorker

logger = logging.getLogger(__name__)

_INIT, _SHUTDOWN = "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine"
_GRACE_SECONDS = 0.5
_JOIN_SHARE = 0.8  # of the time for a group to come together: what servers get of it
_PORTS = 1000  # tried for a rendezvous

Sizes = Callable[[Sequence[Backend]], Any]


class UpdateGroup:
    """Makes the group, again whenever its members change, and leaves it.

    Args:
        books ([`WeightCoordinator`]): Who takes part and which version everybody holds.
        config ([`PoolConfig`]): Time-outs and buffer size.
        group_port (`int`): First port of the rendezvous; each further group takes a later one.
        world_sizes (`Callable`): Asks backends for their world sizes: sizes by name, and what went wrong by URL.
    """

    def __init__(self, books: WeightCoordinator, config: PoolConfig, *, group_port: int, world_sizes: Sizes) -> None:
        self._books, self._config = books, config
        self._first_port = self._port = group_port
        self._world_sizes = world_sizes
        self._worker = DaemonWorker("trl-pool-weights")
        self._transport: JointTransport | None = None
        self._device: Any = None
        self._group: JointGroup | None = None
        self._size = 0  # backends in it

    def __repr__(self) -> str:
        return f"<{type(self).__name__} over {self._books.group}, group {self._group!r}>"

    async def init(self, transport: JointTransport, device: Any) -> None:
        """Makes the group with every server that is up.

        Raises:
            [`WeightSyncError`]: when fewer than `min_backends` take part.
        """
        self._transport, self._device = transport, device
        async with self._books.alone("a weight update group is being made"):
            self._books.abandon("its update group was replaced")
            await self._regroup()

    async def _leave(self) -> None:
        group, self._group = self._group, None
        members = [b for b in self._books.grouped() if b.identity is not None and b.identity.frees_groups]
        self._books.regroup(())
        if members:
            await self._books.broadcast(_SHUTDOWN, {}, members, timeout=self._join_seconds)
        if group is not None:
            try:
                async with asyncio.timeout(self._config.control_timeout):
                    await self._worker.run(group.close)
            except TimeoutError:
                self._give_up_worker()
            except Exception as error:
                logger.debug("Closing the update group: %s", error)

    def _give_up_worker(self) -> None:
        """Its thread hangs in a collective; it is a daemon, and nobody waits for it."""
        self._worker = DaemonWorker("trl-pool-weights")

    def _candidates(self) -> list[Backend]:
        return [b for b in self._books.reachable() if b.identity is not None]

    async def _reconcile(self) -> None:
        """Makes the group anew if it is not exactly that of the servers that can be reached now."""
        if self._transport is None:
            raise WeightSyncError(
                "There is no weight update group; call init_communicator first", self._books.everybody_says()
            )
        now = {b.name: b.incarnation for b in self._candidates()}
        # The books forget whoever dropped out or was removed; in the group they are until it is made anew.
        whole = self._size == len(now) and (self._group is not None or not self._transport.needs_group)
        if now != self._books.grouping or not whole:
            await self._regroup()

    async def _regroup(self, update: Update | None = None) -> None:
        """Makes a group, without those that fail to join it.

        Args:
            update ([`Update`], *optional*): Of whose members; of everybody who can be reached without it.
        """
        assert self._transport is not None
        await self._leave()
        failed: dict[str, ControlResult | str] = {}
        for _ in range(3):
            candidates = self._candidates() if update is None else update.members.values()
            members = [b for b in candidates if b.url not in failed]
            sizes, unknown = await self._world_sizes(members)
            failed.update(unknown)
            members = [b for b in members if b.name in sizes]
            if len(members) < self._config.min_backends or not members:
                break
            results = await self._join(members, sizes)
            failed.update({result.url: result for result in results.values() if not result.ok})
            if all(result.ok for result in results.values()):
                self._books.regroup(members)
                self._size = len(members)
                for url, reason in failed.items():
                    logger.warning("%s is not in the weight update group: %s", url, reason)
                if update is not None:
                    out = [b for b in update.members.values() if b.url in failed]
                    self._books.drop(update, {b.name: ControlResult(b.url, False, str(failed[b.url])) for b in out})
                return
            await self._leave()
        raise WeightSyncError(
            f"No weight update group of at least min_backends={self._config.min_backends} servers came together",
            failed or self._books.everybody_says(),
        )

    async def _join(self, members: Sequence[Backend], sizes: Mapping[str, int]) -> dict[str, ControlResult]:
        """Everybody joins at once: the servers' calls return when the trainer has joined, and the other way round."""
        transport = self._transport
        assert transport is not None
        world_size = 1 + sum(sizes[b.name] for b in members)
        host = self._config.update_group_host or _own_address(members)
        try:
            listener = await anyio.to_thread.run_sync(self._listen, host)
        except OSError as problem:
            raise WeightSyncError(
                f"No rendezvous for a weight update group: {problem}; check update_group_host and group_port",
                {b.url: "was not asked to join" for b in members},
            ) from problem
        port = int(listener.getsockname()[1])
        bodies: dict[str, bytes] = {}
        offset = 1
        for backend in members:
            identity = backend.identity or Identity("vllm")
            info = wire.init_info(
                transport.name,
                host,
                port,
                offset,
                world_size,
                vllm_version=identity.version,
                buffer_size_bytes=self._buffer_bytes,
                # The caller may take its time between two tensors; and whoever waits for others in vain has to have
                # said so before we stop waiting for him.
                timeout_seconds=self._config.update_idle_timeout,
                join_timeout_seconds=_JOIN_SHARE * self._join_seconds,
            )
            bodies[backend.name] = msgspec.json.encode({"init_info": info})
            offset += sizes[backend.name]
        joining = asyncio.ensure_future(
            self._worker.run(transport.open, listener, world_size, self._device, self._config.control_timeout)
        )
        calls = asyncio.ensure_future(
            self._books.broadcast(_INIT, bodies, members, timeout=self._join_seconds + _GRACE_SECONDS)
        )
        error: BaseException | None = None
        done, _ = await asyncio.wait({joining, calls}, timeout=self._join_seconds + 2 * _GRACE_SECONDS)
        results = await calls
        if joining in done or joining.done():
            error = joining.exception()
            if error is None:
                self._group = joining.result()
        else:
            joining.cancel()
            self._give_up_worker()
            error = TimeoutError(f"the group did not come together within {self._join_seconds:g} s")
        if error is not None:
            reason = f"the trainer could not join the group at port {port}: {error}"
            if all(result.ok for result in results.values()):  # nobody else's fault
                raise WeightSyncError(
                    "The weight update group did not come together", {r.url: reason for r in results.values()}
                )
            # Those that were ready are asked again, without the others.
            results = {
                name: r if r.ok else ControlResult(r.url, False, f"{r.message}; {reason}", r.status)
                for name, r in results.items()
            }
        return results

    @property
    def _join_seconds(self) -> float:
        return min(60.0, self._config.control_timeout)

    @property
    def _buffer_bytes(self) -> int:
        return self._config.weight_buffer_mb * 2**20

    def _listen(self, host: str) -> socket.socket:
        """The rendezvous, open before anybody is told of it; on a new port for every group, since the last one's
        sockets may linger."""
        while True:
            port, self._port = self._port, self._port + 1
            try:
                return listen(host, port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or port >= self._first_port + _PORTS:
                    raise

    async def _close_ranks(self, update: Update) -> None:
        """Makes the group anew if somebody who is in it has dropped out of the update: a broadcast would wait for
        them."""
        if self._group is not None and self._size > len(update.members):
            await self._regroup(update)


def _own_address(backends: Sequence[Backend]) -> str:
    """The address of this machine that every backend can reach: one that faces a backend on another machine, if any
    is. (The members of a group connect to each other, too, so one address serves for all.)"""
    found = None
    for backend in backends:
        if backend.exchange.has_sockets:
            address = local_address(backend.address.host, backend.address.port)
            if address is not None and not ipaddress.ip_address(address).is_loopback:
                return address
            found = found or address
    return found or "127.0.0.1"
