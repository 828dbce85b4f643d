"""Weight updates of the `vllm` dialect: one update group over all servers, one broadcast whatever their number.

The trainer is rank 0 and the rendezvous; the servers' workers follow at consecutive rank offsets. An update begins
with `/start_weight_update` and ends with `/finish_weight_update`; what comes in between is one weight version.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec

from ..backend import Backend
from ..errors import AttemptError, ControlResult, Outcome, WeightSyncError
from ..identity import weight_version
from . import wire
from .coordinator import Update
from .joint_group import UpdateGroup
from .packing import Metadata
from .stream import TensorStream
from .worker import DaemonWorker

logger = logging.getLogger(__name__)

_START, _UPDATE, _FINISH = "/start_weight_update", "/update_weights", "/finish_weight_update"
# Whoever else uses the servers must not make the reset fail: running requests compute anew what it takes from them.
_RESET = "/reset_prefix_cache?reset_running_requests=true"
_RENAME = "/update_weight_version"
_WATCH_SECONDS = 0.5


class JointUpdates(UpdateGroup):
    """Streams tensors into the group, and sees to it that nobody waits for ever; arguments as [`UpdateGroup`]."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watch: asyncio.Task[dict[str, ControlResult]] | None = None
        self._paused: list[Backend] = []
        self._books.on_expiry(self._thaw)

    async def close(self) -> None:
        """Leaves the group, and lets servers that can give up their side; others keep it until the next one."""
        await self.abort("the communicator was closed")
        await self._leave()
        self._worker.close()

    async def start(self, owner: object) -> None:
        """Begins an update with everybody who can be reached: gate, drain, membership, healing, start.

        Raises:
            [`WeightSyncError`]: when it could not begin; nobody holds anything new then.
        """
        books = self._books
        async with books.alone("a weight update waits for requests that are out", undrained=self._pause):
            if books.update is not None:
                raise WeightSyncError("A weight update is under way already; end it first", books.everybody_says())
            try:
                await books.somebody()
                await self._reconcile()
                update = books.begin(owner)
                books.extend()
                await self._heal(update)
                for backend in update.members.values():
                    backend.sync.half = True
                books.drop(update, await books.broadcast(_START, _empty(update), update.members.values()))
                await self._close_ranks(update)
            except BaseException as error:
                await self.abort(f"{type(error).__name__} at its start")
                raise

    async def _pause(self) -> None:
        """Freezes requests that did not end in time. They go on after the update, with the new weights."""
        working = [b for b in self._books.reachable() if b.working]
        logger.warning("Pausing %s: requests did not end within drain_timeout", ", ".join(b.url for b in working))
        results = await self._books.broadcast("/pause?mode=keep", {}, working)
        self._paused = [b for b in working if results[b.name].ok]
        for backend in self._paused:
            backend.frozen = True
        if len(self._paused) < len(working):
            failed = {r.url: r for r in results.values() if not r.ok}
            await self._thaw()
            raise WeightSyncError("Requests did not end within drain_timeout, and could not be paused", failed)

    async def _thaw(self) -> None:
        """Lets frozen requests go on where the weights are whole. Where they are not, the requests are given up, and
        served anew by whoever may: going on they would mix weights, or end a server whose layers are still apart."""
        frozen, self._paused = self._paused, []
        for backend in frozen:
            backend.frozen = False
        mixed = [b for b in frozen if b.sync.held is None]
        for backend in mixed:
            backend.break_off_requests(Outcome.BUSY, "a weight update failed on it")
        await self._books.broadcast("/pause?mode=abort", {}, mixed)
        await self._books.broadcast("/resume", {}, frozen)

    async def _heal(self, update: Update) -> None:
        """A server whose last update did not reach its end has a layerwise reload half done: it is brought to its
        end, and a whole one without tensors follows."""
        ill = [b for b in update.members.values() if b.sync.half]
        if not ill:
            return
        logger.warning("Healing %s after an update that did not end", ", ".join(b.url for b in ill))
        await self._books.broadcast(_FINISH, _empty(update), ill)  # an error when none was active
        self._books.drop(update, await self._books.broadcast(_START, _empty(update), ill))
        ill = [b for b in ill if b.name in update.members]
        self._books.drop(update, await self._books.broadcast(_FINISH, _empty(update), ill))
        for backend in ill:
            backend.sync.half = False

    async def open_stream(self, metadata: Metadata) -> TensorStream:
        """Announces tensors to everybody in the update and lets them flow.

        Args:
            metadata (`Iterable[tuple[str, str, Sequence[int]]]`): `(name, dtype name, shape)` per tensor, in order.

        Raises:
            [`WeightSyncError`]: when there is no update to take them.
        """
        books = self._books
        update = self._under_way()
        books.extend()
        books.drop_restarted(update)
        await self._close_ranks(update)
        announced = [(name, dtype, list(shape)) for name, dtype, shape in metadata]
        assert self._transport is not None
        stream = TensorStream(self._transport.packer(announced, self._buffer_bytes, self._device))
        for name, _, _ in announced:
            books.sent(name)
        bodies = {}
        for backend in update.members.values():
            version = None if backend.identity is None else backend.identity.version
            info = wire.update_info(
                self._transport.name, announced, vllm_version=version, buffer_size_bytes=self._buffer_bytes
            )
            bodies[backend.name] = msgspec.json.encode({"update_info": info})
        self._watch = asyncio.create_task(self._carry(update, stream, bodies))
        update.names.update(name for name, _, _ in announced)
        return stream

    async def close_stream(self, stream: TensorStream) -> None:
        """Waits until every tensor has arrived.

        Raises:
            [`WeightSyncError`]: naming each backend's outcome; those that took part are out of sync.
        """
        watch, self._watch = self._watch, None
        if watch is None:  # it was closed before
            return
        try:
            results = await watch
        except BaseException:
            await self.abort("its end was not waited for")
            raise
        update = self._books.update
        if stream.failure is None and update is not None:
            self._books.extend()
            return
        # Everybody who was in the broadcast may hold a part of it.
        await self.abort(f"tensors did not arrive: {stream.failure}")
        await self._leave()
        raise WeightSyncError(
            f"Weight update v{self._books.number + 1} failed after {stream.bytes} bytes ({stream.failure}); whoever "
            "took part serves again after the next whole update",
            {result.url: result for result in results.values()},
        )

    async def _carry(
        self, update: Update, stream: TensorStream, bodies: Mapping[str, bytes]
    ) -> dict[str, ControlResult]:
        """The servers' calls and the trainer's sending at the same time; the first that fails ends them all."""
        books, limit = self._books, self._config.control_timeout
        group = self._group

        def send() -> None:
            for buffer in stream.buffers():
                if group is not None:
                    group.broadcast(buffer)

        members = list(update.members.values())
        by_task = {
            asyncio.create_task(books.call(b, _UPDATE, bodies[b.name], timeout=float("inf"))): b.name for b in members
        }
        sending = asyncio.ensure_future(self._worker.run(send))
        results: dict[str, ControlResult] = {}
        pending: set[asyncio.Future[Any]] = {sending, *by_task}
        loop = asyncio.get_running_loop()
        sent_at: float | None = None
        seen = 0
        try:
            while pending and stream.failure is None:
                done, pending = await asyncio.wait(
                    pending, timeout=_WATCH_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    if task is sending:
                        sent_at = loop.time()
                        if sending.exception() is not None:
                            stream.fail(f"the broadcast failed: {sending.exception()}")
                        continue
                    name = by_task[cast(asyncio.Task[ControlResult], task)]
                    results[name] = task.result()
                    if not results[name].ok:
                        stream.fail(f"{results[name].url} {results[name].message}")
                if stream.seconds_stuck() > limit:
                    stream.fail(f"no buffer arrived for {limit:g} s")
                if sent_at is not None and loop.time() - sent_at > limit:
                    stream.fail(f"not everybody confirmed within {limit:g} s")
                restarted = [b.url for b in members if b.incarnation != update.incarnations.get(b.name)]
                if restarted:
                    stream.fail(f"{', '.join(restarted)} was lost or restarted")
                if books.update is not update:
                    stream.fail("the update was abandoned")
                elif stream.tensors != seen:
                    seen = stream.tensors
                    books.extend()
        except BaseException as error:
            stream.fail(error)
            raise
        finally:
            if stream.failure is not None:
                await self._break_up(sending, by_task, members, results)
        return results

    async def _break_up(
        self,
        sending: asyncio.Future[None],
        calls: Mapping[asyncio.Task[ControlResult], str],
        members: Sequence[Backend],
        results: dict[str, ControlResult],
    ) -> None:
        """Frees the survivors of a failed broadcast, as far as that is possible, and collects what they say."""
        grace = min(10.0, self._config.control_timeout)
        if self._group is not None:
            # Not every death breaks a connection of everybody's: those who wait for the dead are told.
            telling = asyncio.ensure_future(DaemonWorker("trl-pool-abort").run_last(self._group.abort))
            await asyncio.wait({telling}, timeout=grace)
        await asyncio.wait({sending}, timeout=grace)
        if sending.done():
            sending.exception()  # it has been told in its own words
        else:
            sending.cancel()
            self._give_up_worker()
            self._group = None
        waiting = {task for task in calls if not task.done()}
        if waiting:
            await asyncio.wait(waiting, timeout=grace)
        for task, name in calls.items():
            backend = next(b for b in members if b.name == name)
            if task.done() and not task.cancelled():
                results[name] = task.result()
            else:
                task.cancel()
                results[name] = ControlResult(
                    backend.url,
                    False,
                    "has not returned from the update; it takes part in nothing until it does or is restarted",
                )
            if results[name].ok:
                results[name] = ControlResult(backend.url, False, "took a part of it")
        await asyncio.gather(*calls, return_exceptions=True)

    async def finish(self) -> None:
        """Ends the update: finish, caches, check, publish.

        Raises:
            [`WeightSyncError`]: when fewer than `min_backends` confirmed it.
        """
        books = self._books
        async with books.turn:
            update = self._under_way()
            version = books.version_of(books.number + 1)
            keepers = {b.name for b in update.members.values() if b.identity is not None and b.identity.keeps_version}
            try:
                books.drop_restarted(update)
                named = msgspec.json.encode({"weight_version": version})
                bodies = {name: named if name in keepers else b"{}" for name in update.members}
                books.drop(update, await books.broadcast(_FINISH, bodies, update.members.values()))
                for backend in update.members.values():
                    backend.sync.half = False
                books.drop(update, await books.broadcast(_RESET, {}, update.members.values()))
                books.drop(update, await self._unconfirmed(update, keepers, version))
                books.drop_restarted(update)
            except BaseException as error:
                await self.abort(f"{type(error).__name__} at its end")
                raise
            for backend in update.members.values():
                if backend.name in keepers:
                    backend.health.model_version = version
            try:
                books.publish(update)
            finally:
                await self._thaw()

    async def _unconfirmed(self, update: Update, keepers: set[str], version: str) -> dict[str, ControlResult]:
        """Servers that report another version than the one they were just given."""

        async def ask(backend: Backend) -> ControlResult:
            try:
                told = await weight_version(backend.exchange, timeout=self._config.control_timeout)
            except AttemptError as error:
                return ControlResult(backend.url, False, f"did not say its weight version: {error.detail}")
            said = f"reports weights {told!r} after the update to {version!r}"
            return ControlResult(backend.url, told == version, "" if told == version else said)

        whom = [b for b in update.members.values() if b.name in keepers]
        results = await asyncio.gather(*map(ask, whom))
        return {b.name: result for b, result in zip(whom, results, strict=True)}

    async def abort(self, why: str) -> None:
        """Ends the update without publishing it; whoever took part is out of sync."""
        update, version = self._books.update, self._books.version_of(self._books.number + 1)
        self._books.abandon(why)
        await self._thaw()
        if update is not None:
            await asyncio.gather(*(self._mark(b, version) for b in update.members.values() if b.sync.half))

    async def _mark(self, backend: Backend, version: str) -> None:
        """Lets a server whose weights are mixed say so to others who ask for their version: it goes on to report the
        last whole one otherwise."""
        if backend.identity is not None and backend.identity.keeps_version and not backend.stuck:
            body = msgspec.json.encode({"new_version": f"{version} incomplete"})
            with contextlib.suppress(AttemptError):
                await backend.exchange.once("POST", _RENAME, body, timeout=self._config.health_timeout)

    def _under_way(self) -> Update:
        update = self._books.update
        if update is None:
            raise WeightSyncError(
                "There is no weight update under way (it may have been abandoned)", self._books.everybody_says()
            )
        return update

    async def reset_caches(self) -> dict[str, ControlResult]:
        """Resets prefix caches outside an update."""
        async with self._books.alone("prefix caches are being reset"):
            return await self._books.broadcast(_RESET, {}, self._books.holders())


def _empty(update: Update) -> dict[str, bytes | None]:
    return dict.fromkeys(update.members, b"{}")
