"""Weight updates of the `trl` dialect: every server is the master of an update group of its own.

An update has no beginning and no end there: it reaches from the first `update_named_param` to `reset_prefix_cache`,
whose answer is the fence. In between the gate is closed, and every backend that was told anything is out of sync.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from ..backend import Backend
from ..errors import ControlResult
from .coordinator import Update, WeightCoordinator
from .transport import GroupMember, TransportError, WeightTransport
from .worker import DaemonWorker

_INIT, _ANNOUNCE = "/init_communicator/", "/update_named_param/"
_RESET, _CLOSE = "/reset_prefix_cache/", "/close_communicator/"


class SeparateGroups:
    """Announces tensors to `trl` servers, and lets a transport move them.

    Args:
        books ([`WeightCoordinator`]): Who takes part and which version everybody holds.
        timeout (`float`): Seconds that the transport may take for one tensor, or to join.
    """

    def __init__(self, books: WeightCoordinator, *, timeout: float) -> None:
        self._books, self._timeout = books, timeout
        self._worker = DaemonWorker("trl-pool-weights")
        self.transport: WeightTransport | None = None

    async def open(
        self, bodies: Mapping[str, bytes], members: Iterable[Backend], *, fresh: bool, beside: bool = False
    ) -> dict[str, ControlResult]:
        """Tells servers to join their update groups.

        Args:
            bodies (`Mapping[str, bytes]`): Body per backend name.
            members (`Iterable[Backend]`): Whom.
            fresh (`bool`): Whether to close an earlier communicator first: a worker that has one dies of a second,
                after the 200.
            beside (`bool`, *optional*, defaults to `False`): Whether those that have a communicator keep it.
        """
        whom = list(members)
        books = self._books
        async with books.alone("a weight update group is being made"):
            books.abandon("its communicator was replaced")
            bad: dict[str, ControlResult] = {}
            if fresh:
                closed = await books.broadcast(_CLOSE, {}, whom)
                whom = [b for b in whom if closed[b.name].ok]
                bad = {name: result for name, result in closed.items() if not result.ok}
            results = {**bad, **await books.broadcast(_INIT, bodies, whom)}
            joined = [b for b in whom if results[b.name].ok]
            if books.all_or_nothing and len(joined) < len(results):
                joined = []  # a client that is told of a failure begins from the beginning
            books.regroup([*(books.grouped() if beside else ()), *joined])
        return results

    async def join(self, transport: WeightTransport, members: list[GroupMember], device: Any) -> dict[str, str]:
        """Lets the transport join the groups of servers that were told to.

        Returns:
            `dict[str, str]`: What went wrong, per name of a backend that it could not join. Those take no part.
        """
        self.transport = transport
        failed: dict[str, str] = {}
        try:
            await self._move(transport.open, members, device)
        except TransportError as error:
            failed = error.failed
        except TimeoutError as error:
            failed = {member.backend: str(error) for member in members}
        for name in failed:
            self._books.ungroup(name)
        return failed

    async def close(self) -> dict[str, ControlResult]:
        """Closes every communicator; an update that was under way is abandoned."""
        books = self._books
        async with books.turn:
            books.abandon("the communicator was closed")
            results = await books.broadcast(_CLOSE, {}, books.everybody() if books.all_or_nothing else books.grouped())
            books.regroup(())
            if self.transport is not None:
                await self._move(self.transport.close)
        self._worker.close()
        return results

    async def announce(
        self, name: str, body: bytes, *, tensor: Any = None, owner: object = None
    ) -> dict[str, ControlResult]:
        """Announces one tensor to everybody in the update, begins the update if need be, and moves the tensor.

        Raises:
            [`WeightSyncError`]: when the update cannot go on; its members are out of sync then.
        """
        books = self._books
        async with books.alone("a weight update waits for requests that are out"):
            update = books.update or books.begin(owner)
            try:
                return await self._announce(update, name, body, tensor)
            except BaseException as error:
                # Somebody was told of a tensor that may never come: whoever took part holds mixed weights.
                books.abandon(f"{type(error).__name__} in the middle of it")
                raise

    async def _announce(self, update: Update, name: str, body: bytes, tensor: Any) -> dict[str, ControlResult]:
        books = self._books
        books.extend()
        books.sent(name)
        books.drop_restarted(update)
        whom = list(update.members.values())
        results = await books.broadcast(_ANNOUNCE, {b.name: body for b in whom}, whom)
        books.drop(update, results)
        if self.transport is not None:
            urls = {name: backend.url for name, backend in update.members.items()}
            try:
                await self._move(self.transport.broadcast, tensor, list(urls))
            except TransportError as error:
                books.drop(
                    update, {name: ControlResult(urls[name], False, reason) for name, reason in error.failed.items()}
                )
        update.names.add(name)
        books.extend()
        return results

    async def reset_caches(self) -> dict[str, ControlResult]:
        """Resets prefix caches; after an update that is its fence and end, and publishes the new version.

        Raises:
            [`WeightSyncError`]: when no backend confirmed it after an update.
        """
        books = self._books
        async with books.alone("prefix caches are being reset"):
            update = books.update
            if update is None:
                books.check_whole()
                return await books.broadcast(_RESET, {}, books.holders())
            try:
                books.drop_restarted(update)
                results = await books.broadcast(_RESET, {}, update.members.values())
                books.drop(update, results)
                books.drop_restarted(update)
            except BaseException as error:
                books.abandon(f"{type(error).__name__} at its end")
                raise
            books.publish(update)
            return results

    async def _move(self, function: Any, *args: Any) -> None:
        """Runs a blocking call of the transport on a daemon thread, which is left behind if it does not return."""
        try:
            async with asyncio.timeout(self._timeout):
                await self._worker.run(function, *args)
        except TimeoutError:
            self._worker = DaemonWorker("trl-pool-weights")
            raise TimeoutError(f"the weight transport did not return within {self._timeout:g} s") from None
