"""Weight updates of the `vllm` dialect whose tensors somebody else sends: a trainer behind the gateway.

The trainer speaks to one server and means all of them: its calls go to every backend, all or nothing, and each backend
is told rank offsets of its own, so that one broadcast of the trainer's feeds them all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ..backend import Backend
from ..config import PoolConfig
from ..errors import AttemptError, ControlError, ControlResult, NoBackendAvailableError, WeightSyncError
from ..identity import weight_version
from .coordinator import Update, WeightCoordinator, require_all

logger = logging.getLogger(__name__)

Results = dict[str, ControlResult]


class RelayedUpdates:
    """Passes a trainer's weight calls on to every backend, and keeps the books.

    Args:
        books ([`WeightCoordinator`]): Who takes part and which version everybody holds.
        config ([`PoolConfig`]): Time-outs.
        world_sizes (`Callable`): Asks backends for their world sizes: sizes by name, and what went wrong by URL.
    """

    def __init__(self, books: WeightCoordinator, config: PoolConfig, *, world_sizes: Callable[..., Any]) -> None:
        self._books, self._config, self._world_sizes = books, config, world_sizes
        self._frozen: list[Backend] = []  # paused with their requests kept
        books.on_expiry(self._thaw)

    async def everywhere(self, path: str, body: bytes | None, *, timeout: float | None = None) -> Results:
        """One call to every backend, at once and exactly once."""
        whom = self._everybody()
        return await self._books.broadcast(path, dict.fromkeys((b.name for b in whom), body), whom, timeout=timeout)

    def _everybody(self) -> list[Backend]:
        whom = self._books.everybody()
        if not whom:
            raise NoBackendAvailableError({})
        return whom

    # The group

    async def init(self, init_info: Mapping[str, Any]) -> Results:
        """Lets every backend join the trainer's group, at consecutive offsets.

        Args:
            init_info (`Mapping[str, Any]`): The trainer's; its `rank_offset` is the first backend's.

        Raises:
            [`ControlError`]: when a backend does not tell its world size, or the group has another size.
        """
        books, whom = self._books, self._everybody()
        async with books.turn:
            books.abandon("its update group was replaced")
            sizes, unknown = await self._world_sizes(whom)
            if unknown:
                raise WeightSyncError("A backend did not tell its world size", unknown)
            first = int(init_info.get("rank_offset", 1))
            expected = first + sum(sizes[b.name] for b in whom)
            told = init_info.get("world_size", expected)
            if told != expected:
                raise ControlError(
                    f"The group has world_size {told}, but {first} trainer ranks and the backends' workers are "
                    f"{expected}; ask GET /get_world_size and call again",
                    {b.url: f"has {sizes[b.name]}" for b in whom},
                )
            bodies: dict[str, bytes] = {}
            for backend in whom:
                bodies[backend.name] = msgspec.json.encode({"init_info": {**init_info, "rank_offset": first}})
                first += sizes[backend.name]
            results = await books.broadcast("/init_weight_transfer_engine", bodies, whom)
            books.regroup(whom if all(result.ok for result in results.values()) else ())
        return results

    # An update

    async def start(self, body: bytes | None) -> Results:
        """Begins an update: gate, drain (not where the trainer has frozen the requests), start."""
        books = self._books
        frozen = set(self._frozen) >= {b for b in books.everybody() if b.working}
        async with books.alone("a weight update waits for requests that are out", wait=not frozen):
            if books.update is not None:
                books.abandon("another one was started")
            update = books.begin("gateway")
            books.extend()
            ill = [b for b in update.members.values() if b.sync.half]
            try:
                if ill:  # as in a joint update: bring the last one to its end, and a whole one without tensors
                    empty: dict[str, bytes | None] = {b.name: b"{}" for b in ill}
                    for path in ("/finish_weight_update", "/start_weight_update", "/finish_weight_update"):
                        await books.broadcast(path, empty, ill)
                for backend in update.members.values():
                    backend.sync.half = True
                results = await self.everywhere("/start_weight_update", body or b"{}")
                books.drop(update, results)
            except BaseException as error:
                books.abandon(f"{type(error).__name__} at its start")
                raise
        return results

    async def update(self, body: bytes, names: list[str]) -> Results:
        """Passes on what the trainer is about to send; returns when every backend has received it."""
        books = self._books
        update = self._under_way()
        books.extend()
        for name in names:
            books.sent(name)
        try:
            # As long as there is news of the trainer; without any, the update expires.
            results = await self.everywhere("/update_weights", body, timeout=self._config.update_idle_timeout)
            books.drop(update, results)
        except BaseException as error:
            books.abandon(f"{type(error).__name__} in the middle of it")
            raise
        update.names.update(names)
        books.extend()
        return results

    async def finish(self, body: Mapping[str, Any]) -> Results:
        """Ends the update: finish, caches, publish."""
        books = self._books
        async with books.turn:
            update = self._under_way()
            version = str(body.get("weight_version") or books.version_of(books.number + 1))
            keepers = {b.name for b in update.members.values() if b.identity is not None and b.identity.keeps_version}
            named, plain = msgspec.json.encode({**body, "weight_version": version}), msgspec.json.encode(dict(body))
            try:
                books.drop_restarted(update)
                bodies = {name: named if name in keepers else plain for name in update.members}
                results = await books.broadcast("/finish_weight_update", bodies, update.members.values())
                books.drop(update, results)
                for backend in update.members.values():
                    backend.sync.half = False
                # Frozen requests hold what they have computed with the old weights; they compute it anew.
                reset = "/reset_prefix_cache?reset_running_requests=true"
                books.drop(update, await books.broadcast(reset, {}, update.members.values()))
                books.drop_restarted(update)
            except BaseException as error:
                books.abandon(f"{type(error).__name__} at its end")
                raise
            for name in keepers:
                update.members[name].health.model_version = version
            books.publish(update, version)
        return results

    def _under_way(self) -> Update:
        update = self._books.update
        if update is None:
            raise WeightSyncError(
                "No weight update is under way (it may have been abandoned); call /start_weight_update first",
                self._books.everybody_says(),
            )
        return update

    # What a trainer does around it

    async def pause(self, query: str, *, keep: bool) -> Results:
        """Pauses every backend; with `keep` their requests freeze, and are not waited for."""
        results = await self.everywhere(f"/pause?{query}" if query else "/pause", None)
        if keep:
            self._frozen = [b for b in self._books.everybody() if results.get(b.name) and results[b.name].ok]
            for backend in self._frozen:
                backend.frozen = True
        return results

    async def resume(self) -> Results:
        """Lets every backend go on."""
        frozen, self._frozen = self._frozen, []
        for backend in frozen:
            backend.frozen = False
        return await self.everywhere("/resume", None)

    async def _thaw(self) -> None:
        """The trainer has vanished in mid-update: its frozen requests must not go on with mixed weights."""
        frozen, self._frozen = self._frozen, []
        for backend in frozen:
            backend.frozen = False
        if frozen:
            logger.warning("Aborting requests that were frozen on %s", ", ".join(b.url for b in frozen))
            await self._books.broadcast("/pause?mode=abort", {}, frozen)
            await self._books.broadcast("/resume", {}, frozen)

    async def reset_caches(self, query: str) -> Results:
        """Resets prefix caches. In mid-update they are reset at its end anyway."""
        return await self.everywhere(f"/reset_prefix_cache?{query}" if query else "/reset_prefix_cache", None)

    async def shut_down(self) -> Results:
        """Lets every backend leave the group; until it is made anew there are no updates."""
        self._books.abandon("its update group was shut down")
        results = await self.everywhere("/shutdown_weight_transfer_engine", None)
        if any(result.ok for result in results.values()):
            self._books.regroup(())
        return results

    async def rename(self, body: bytes, version: str) -> Results:
        """Gives the weights that are out another version, on every backend and in the books."""
        results = await self.everywhere("/update_weight_version", body)
        if all(result.ok for result in results.values()):
            self._books.rename(version)
            for backend in self._books.everybody():
                backend.health.model_version = version
        return results

    async def versions(self) -> dict[str, str | None]:
        """What every backend that is up says of its weights, per URL.

        Raises:
            [`ControlError`]: when one does not say.
        """
        results: dict[str, ControlResult] = {}
        found: dict[str, str | None] = {}
        for backend in self._books.reachable():
            try:
                version = await weight_version(backend.exchange, timeout=self._config.health_timeout)
            except AttemptError as error:
                results[backend.url] = ControlResult(backend.url, False, str(error), error.status)
            else:
                found[backend.url] = version
                results[backend.url] = ControlResult(backend.url, True, f"has {version!r}", 200)
        require_all("GET /weight_info", results)
        if not found:
            raise NoBackendAvailableError(self._books.everybody_says())
        return found
