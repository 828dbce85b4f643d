"""Weight updates of the `trl` dialect: every server is the master of an update group of its own.

An update has no beginning and no end there: it reaches from the first `update_named_param` to `reset_prefix_cache`,
whose answer is the fence. In between the gate is closed, and every backend that was told anything is out of sync.

Tensors come one at a time ([`SeparateGroups.announce`]), or in a run whose names are known beforehand, so that their
announcements can go ahead of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..backend import Backend
from ..errors import ControlResult, WeightSyncError
from .ahead import AHEAD, Run
from .coordinator import RESTARTED, Update, WeightCoordinator
from .packing import Metadata
from .transport import AheadTransport, GroupMember, TransportError, WeightTransport
from .worker import DaemonWorker

logger = logging.getLogger(__name__)

_INIT, _ANNOUNCE = "/init_communicator/", "/update_named_param/"
_RESET, _CLOSE = "/reset_prefix_cache/", "/close_communicator/"
_WATCH_SECONDS = 0.5
_GRACE_SECONDS = 10.0


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
        self._run: Run | None = None
        self._settling: asyncio.Task[None] | None = None
        books.on_expiry(self._expired)

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
            await self._settled()
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
            await self._settled()
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
            await self._undisturbed()
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
        await self._send(update, tensor)
        update.names.add(name)
        books.extend()
        return results

    async def _send(self, update: Update, tensor: Any, run: Run | None = None) -> None:
        """Moves a tensor to everybody in the update; who cannot be reached drops out of it."""
        if self.transport is None:
            return
        urls = {name: backend.url for name, backend in update.members.items()}
        try:
            if run is None:
                await self._move(self.transport.broadcast, tensor, list(urls))
            else:
                await self._watched(run, tensor, list(urls))
        except TransportError as error:
            given_up = run.abandoned if run is not None else ()
            lost = {
                name: ControlResult(urls[name], False, RESTARTED if name in given_up else reason)
                for name, reason in error.failed.items()
            }
            # Who was removed from the pool meanwhile is in the update no more.
            self._books.drop(update, {name: result for name, result in lost.items() if name in update.members})

    # Tensors whose names are known beforehand

    async def open_run(self, metadata: Metadata, *, owner: object = None) -> Run:
        """Names tensors that [`send`] will be given in this order, begins the update if need be, and announces the
        first of them.

        Raises:
            [`WeightSyncError`]: when there is nobody to send them to, or others are being sent.
        """
        books = self._books
        async with books.alone("a weight update waits for requests that are out"):
            await self._undisturbed()
            update = books.update or books.begin(owner)
            try:
                books.extend()
                books.drop_restarted(update)
                self._run = run = Run(update, metadata, lambda backend, body: books.call(backend, _ANNOUNCE, body))
                run.announcements.allow(self._ahead)
            except BaseException as error:  # metadata that makes no sense, for one
                books.abandon(f"{type(error).__name__} at its announcement")
                raise
            return run

    @property
    def _ahead(self) -> int:
        return AHEAD if isinstance(self.transport, AheadTransport) else 0

    async def send(self, run: Run, name: str, tensor: Any) -> None:
        """Moves the next tensor of a run to everybody in the update, and returns when it may be changed or freed.

        Raises:
            [`WeightSyncError`]: when the update cannot go on; its members are out of sync then.
            `ValueError`: when it is another tensor's turn; the same.
        """
        books = self._books
        async with books.turn:
            update = self._under_way(run)
            try:
                index = run.take(name, tensor)
                books.extend()
                books.sent(name)
                run.announcements.allow(index + 1 + self._ahead)
                await run.announcements.answered(index, list(update.members))
                books.drop_restarted(update)
                books.drop(update, run.failures(index))
                self._let_go(run)
                await self._send(update, tensor, run)
                self._let_go(run)
            except BaseException as error:
                books.abandon(f"{type(error).__name__} in the middle of it")
                self._halt(hopeless=isinstance(error, TimeoutError))
                raise
            update.names.add(name)
            books.extend()

    async def end_run(self, run: Run) -> None:
        """Ends a run whose tensors have all been sent; the update goes on.

        Raises:
            [`WeightSyncError`]: when its update was abandoned.
            `ValueError`: when tensors are missing.
        """
        async with self._books.turn:
            self._under_way(run)
            run.check_end()
            self._run = None
            await run.announcements.stop(0)  # only of those who dropped out something may be on its way still

    async def abandon(self, why: str) -> None:
        """Ends the update without publishing it; returns when no worker waits for a tensor of it any more."""
        self._books.abandon(why)
        await self._settled()

    def _under_way(self, run: Run) -> Update:
        if self._run is not run or self._books.update is not run.update:
            raise WeightSyncError(
                "There is no weight update under way (it may have been abandoned)", self._books.everybody_says()
            )
        return run.update

    async def _undisturbed(self) -> None:
        """Another tensor now would come between those of a run."""
        if self._run is not None and self._books.update is self._run.update:
            raise WeightSyncError("Parameters are being sent already; end that first", self._books.everybody_says())
        await self._settled()

    async def _watched(self, run: Run, tensor: Any, names: Sequence[str]) -> None:
        """Moves a tensor of a run. Who is found dead meanwhile is not waited for: with announcements ahead, a server
        may have died since the last one that it has answered."""
        transport = self.transport
        assert transport is not None

        def send() -> None:
            run.sent += 1
            transport.broadcast(tensor, names)

        moving = asyncio.ensure_future(self._move(send))
        try:
            while not (await asyncio.wait({moving}, timeout=_WATCH_SECONDS))[0]:
                self._give_up(run, run.update.restarted())
        except BaseException:
            moving.cancel()
            raise
        moving.result()

    def _let_go(self, run: Run) -> None:
        """Whoever is no longer in the update and waits for tensors waits in vain."""
        out = [name for name in run.announcements.told if name not in run.update.members]
        for name in out:
            run.announcements.leave_out(name)
        self._give_up(run, run.owed(out))

    def _give_up(self, run: Run, names: Iterable[str]) -> None:
        """Leaves groups in which nothing works any more, on a thread: with NCCL that takes a while."""
        names = [name for name in names if name not in run.abandoned]
        if not names or not isinstance(self.transport, AheadTransport):
            return
        run.abandoned.update(names)
        for name in names:
            self._books.ungroup(name)
        task = asyncio.ensure_future(DaemonWorker("trl-pool-give-up").run_last(self.transport.give_up, names))
        task.add_done_callback(_log_failure)

    def _halt(self, *, hopeless: bool = False) -> None:
        """Ends the run, if there is one, with its update abandoned.

        Args:
            hopeless (`bool`, *optional*, defaults to `False`): Whether the transport hangs.
        """
        run, self._run = self._run, None
        if run is not None:
            self._settling = asyncio.create_task(self._settle(run, hopeless), name="trl-pool-settle")
            self._settling.add_done_callback(_log_failure)

    async def _settled(self) -> None:
        """Halts what is abandoned, and waits until nobody waits for its tensors any more."""
        if self._run is not None and self._books.update is not self._run.update:
            self._halt()
        if self._settling is not None:
            await asyncio.wait({self._settling})  # how it ended is in the log; whoever waits goes on

    async def _expired(self) -> None:
        await self._settled()

    async def _settle(self, run: Run, hopeless: bool) -> None:
        """Sends something in the place of every tensor that was announced and will not come. The alternative is to
        leave the groups: a worker that loses its group in mid-broadcast dies of it, or hangs."""
        await run.announcements.stop(min(_GRACE_SECONDS, self._timeout))
        self._let_go(run)
        transport = self.transport
        if not isinstance(transport, AheadTransport):
            return
        members = list(run.update.members)
        lost: set[str] = set()

        def fill() -> None:
            owed = run.owed(members)
            for index in range(run.sent, max(owed.values(), default=0)):
                _, dtype, shape = run.tensors[index]
                names = [name for name, end in owed.items() if end > index and name not in lost]
                try:
                    transport.fill(dtype, shape, names)
                except TransportError as error:
                    lost.update(error.failed)

        try:
            if hopeless:
                lost.update(run.owed(members))
            elif run.owed(members):
                await self._move(fill)
        except Exception as error:
            logger.warning("Tensors that were announced could not be made up for: %s", error)
            lost.update(run.owed(members))
        self._give_up(run, lost)

    async def reset_caches(self) -> dict[str, ControlResult]:
        """Resets prefix caches; after an update that is its fence and end, and publishes the new version.

        Raises:
            [`WeightSyncError`]: when no backend confirmed it after an update.
        """
        books = self._books
        async with books.alone("prefix caches are being reset"):
            update = books.update
            if update is not None and self._run is not None:
                books.abandon("it was to end before all of its tensors had come")
            await self._settled()
            if update is not None and books.update is None:
                raise WeightSyncError(
                    "The weight update ended before all of its tensors had come", books.everybody_says()
                )
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


def _log_failure(task: asyncio.Future[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.debug("Leaving a weight update group: %s", task.exception())
