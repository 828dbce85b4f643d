"""The books of weight updates: who takes part, who was told what, which version everybody holds; and the gate.

The two ways in which tensors travel (`separate` groups, one `joint` group) keep their books here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from ..backend import Backend
from ..config import PoolConfig
from ..dispatch import Dispatcher
from ..errors import AttemptError, ControlError, ControlResult, Outcome, RequestRejectedError, WeightSyncError
from ..exchange import judge
from ..facts import Health
from ..leases import Lane

logger = logging.getLogger(__name__)

RESTARTED = "it was restarted during the update"
_LAST_MESSAGE_FAILED = "False"
"""`/reset_prefix_cache/` answers 200 whatever happened; a failure shows only at the end of its message."""


@dataclass
class Update:
    """An update under way."""

    members: dict[str, Backend]
    incarnations: dict[str, int]
    complete: set[str]  # those that lacked nothing before it
    owner: object
    names: set[str] = field(default_factory=set)
    dropped: dict[str, ControlResult] = field(default_factory=dict)

    def restarted(self) -> list[str]:
        """Members whose process is not the one that it was at the beginning."""
        return [name for name, backend in self.members.items() if backend.incarnation != self.incarnations[name]]


class WeightCoordinator:
    """Broadcasts control calls and keeps the count of weight versions.

    Args:
        dispatcher ([`Dispatcher`]): Its gate is closed during an update.
        config ([`PoolConfig`]): Time-outs.
        clock (`Callable[[], float]`): Monotonic seconds.
        all_or_nothing (`bool`, *optional*, defaults to `False`):
            Whether one failure ends an update. A gateway's client moves the tensors itself and stops at the first
            error; the pool goes on with the servers that are left.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        config: PoolConfig,
        *,
        clock: Callable[[], float],
        all_or_nothing: bool = False,
    ) -> None:
        self._dispatcher, self._config, self._clock = dispatcher, config, clock
        self._all_or_nothing = all_or_nothing
        self.run_id = uuid.uuid4().hex[:8]
        self.number = 0
        self._update: Update | None = None
        self._names: dict[int, str] = {}  # versions that their sender has given a name
        self._expired: list[Callable[[], Awaitable[None]]] = []
        self._tasks: set[asyncio.Future[None]] = set()
        self._ever_sent: set[str] = set()  # names of parameters, in this update and before
        self._group: dict[str, int] = {}  # name: incarnation that has the communicator
        self.turn = asyncio.Lock()
        """One control call at a time."""
        self._expiry: asyncio.TimerHandle | None = None
        self.broken: str | None = None
        """All or nothing: why the last update failed, until the group is made anew. A stock client sends a call again
        that was answered 502; it must not find the rest of the fleet ready to go on."""

    def __repr__(self) -> str:
        update = f", updating {sorted(self._update.members)}" if self._update else ""
        return f"<WeightCoordinator {self.version}, group {sorted(self._group)}{update}>"

    def version_of(self, number: int) -> str:
        """`<run id>:<n>`: no other run's versions read the same. The present one may have a name of its sender's."""
        return self._names.get(number) or f"{self.run_id}:{number}"

    def rename(self, name: str) -> None:
        """The version that is out now gets a name of its sender's."""
        self._names = {self.number: name}

    @property
    def version(self) -> str:
        """The version that is out now."""
        return self.version_of(self.number)

    @property
    def group(self) -> list[str]:
        """Names of the backends that have a communicator."""
        return list(self._group)

    @property
    def owner(self) -> object | None:
        """Who has an update under way; `None` when nobody has."""
        return self._update.owner if self._update else None

    @property
    def updating(self) -> bool:
        return self._update is not None

    @property
    def update(self) -> Update | None:
        """The update under way."""
        return self._update

    @property
    def all_or_nothing(self) -> bool:
        """Whether one failure ends an update."""
        return self._all_or_nothing

    @property
    def grouping(self) -> dict[str, int]:
        """Who has a communicator, and which incarnation of theirs has it."""
        return dict(self._group)

    def everybody_says(self) -> dict[str, str]:
        """Per URL, why a backend is not eligible, or that it is."""
        reasons = self._dispatcher.reasons()
        return {url: reasons.get(url, "is eligible") for url in self._urls()}

    def on_expiry(self, clean_up: Callable[[], Awaitable[None]]) -> None:
        """Adds what has to be done when an update was abandoned because nobody went on with it."""
        self._expired.append(clean_up)

    def regroup(self, members: Iterable[Backend]) -> None:
        """From now on these have a communicator."""
        self.broken = None
        self._group = {b.name: b.incarnation for b in members}

    def ungroup(self, name: str) -> None:
        """This one has no communicator any more."""
        self._group.pop(name, None)

    def same_process(self, backend: Backend) -> None:
        """It was only its connection that broke: it has its communicator still."""
        if self._group.get(backend.name) == backend.certain:
            self._group[backend.name] = backend.incarnation

    def sent(self, name: str) -> None:
        """A parameter of that name belongs to a whole update."""
        self._ever_sent.add(name)

    # Control calls

    async def broadcast(
        self,
        path: str,
        bodies: Mapping[str, bytes | None],
        backends: Iterable[Backend],
        *,
        timeout: float | None = None,
    ) -> dict[str, ControlResult]:
        """Sends one control call to several backends at once, exactly once each, and waits for every outcome.

        Args:
            path (`str`): Where to.
            bodies (`Mapping[str, bytes | None]`): Body per backend name.
            backends (`Iterable[Backend]`): To whom.
            timeout (`float`, *optional*): Seconds for each, `control_timeout` by default.

        Returns:
            `dict[str, ControlResult]`: Per name.
        """
        whom = list(backends)
        results = await asyncio.gather(*(self.call(b, path, bodies.get(b.name), timeout=timeout) for b in whom))
        return {b.name: result for b, result in zip(whom, results, strict=True)}

    async def call(
        self, backend: Backend, path: str, body: bytes | None, *, timeout: float | None = None
    ) -> ControlResult:
        """One control call to one backend; it never raises for what the backend does."""
        try:
            answer = await backend.control(path, body, timeout=timeout)
            judge(backend.url, answer)
        except AttemptError as error:
            if error.refused:
                backend.gone(error.detail)
            message = f"{error.outcome.value}: {error.detail}"
            if error.outcome is Outcome.TIMED_OUT:
                message += "; it takes part in nothing until that call returns or the server is restarted"
            return ControlResult(backend.url, False, message, error.status)
        except RequestRejectedError as error:
            return ControlResult(backend.url, False, str(error), error.status)
        try:
            decoded = msgspec.json.decode(answer.body)
        except ValueError:
            decoded, message = {}, answer.body[:200].decode("utf-8", "replace")
        else:
            decoded = decoded if isinstance(decoded, dict) else {}
            message = str(decoded.get("message", ""))
        failed = path.startswith("/reset_prefix_cache") and (
            message.endswith(_LAST_MESSAGE_FAILED) or decoded.get("success") is False
        )
        if failed and not message:
            message = "the prefix cache was not reset (success: false)"
        return ControlResult(backend.url, not failed, message, answer.status)

    @contextlib.asynccontextmanager
    async def alone(
        self, reason: str, *, wait: bool = True, undrained: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncIterator[None]:
        """One control call at a time, with the gate closed and nothing out; opens again what it closed.

        Args:
            reason (`str`): What is told to work that waits meanwhile.
            wait (`bool`, *optional*, defaults to `True`): Whether requests that are out are waited for.
            undrained (`Callable`, *optional*): What to do when requests do not end within `drain_timeout`, instead of
                giving up.
        """
        async with self.turn:
            if self._update is not None:
                yield
                return
            self._dispatcher.close_gate(reason, drain=True)
            try:
                try:
                    if wait:
                        await self._drain(reason)
                except WeightSyncError:
                    if undrained is None:
                        raise
                    await undrained()
                self._dispatcher.close_gate(reason)
                yield
            finally:
                if self._update is None:
                    self._dispatcher.open_gate()

    async def _drain(self, reason: str) -> None:
        """Waits for what is out. A `trl` server serves nothing else meanwhile, and mixes up replies if it is asked.
        Scoring that nobody waits for any more keeps its server busy, too, until that counts as stuck."""

        def idle() -> bool | None:
            return None if self._out() or self._dispatcher.under_way else True

        try:
            await self._dispatcher.until(idle, timeout=self._config.drain_timeout)
        except TimeoutError:
            busy = {b.url: f"is still working ({b.inflight} requests waited for)" for b in self._out()}
            busy = busy or {"the pool": f"has {len(self._dispatcher.under_way)} calls under way"}
            raise WeightSyncError(
                f"{reason}: not started, requests did not end within drain_timeout={self._config.drain_timeout:g} s",
                busy,
            ) from None

    def _out(self) -> list[Backend]:
        return [
            b
            for b in self._dispatcher.backends.values()
            if b.inflight or (b.stuck is None and b.holds_lane(Lane.SCORE))
        ]

    def reachable(self) -> list[Backend]:
        """Backends that a control call can reach: up or busy, not stuck in an earlier call, not on their way out."""
        return [b for b in self.everybody() if b.health.state is not Health.DOWN and not b.stuck]

    async def somebody(self) -> None:
        """Waits, up to `backend_wait_seconds`, until at least `min_backends` can be reached: a fleet that is away for
        a moment need not end the run."""
        enough = max(1, self._config.min_backends)
        with contextlib.suppress(TimeoutError):
            await self._dispatcher.until(
                lambda: True if len(self.reachable()) >= enough else None, timeout=self._config.backend_wait_seconds
            )

    def everybody(self) -> list[Backend]:
        """All backends that are not on their way out, or another model's."""
        return [b for b in self._dispatcher.backends.values() if not b.draining and b.refusal is None]

    # Updates

    def begin(self, owner: object) -> Update:
        """Begins an update with everybody who has a communicator; from here to its end they are out of sync.

        Raises:
            [`WeightSyncError`]: when there is nobody, or (all or nothing) somebody has lost their communicator.
        """
        self.check_whole()
        members = {b.name: b for b in self.grouped()}
        if self._all_or_nothing and members:
            lost = [b.url for b in self.everybody() if b.name not in members]
            if lost:
                raise WeightSyncError(
                    "Not every server is in the weight update group; make it anew (init_communicator, or "
                    "init_weight_transfer_engine)",
                    dict.fromkeys(lost, "was restarted, cannot be reached, or joined later"),
                )
        if not members:
            away = self._group and not self.reachable()
            raise WeightSyncError(
                "No server can be reached for a weight update; start one"
                if away
                else "No server takes part in weight updates; call init_communicator first",
                self._dispatcher.reasons() or dict.fromkeys(self._urls(), "has no communicator"),
            )
        left_out = [b.url for b in self._dispatcher.backends.values() if b.name not in members]
        if left_out:
            logger.warning("Weight update v%d leaves out %s", self.number + 1, ", ".join(left_out))
        complete = {b.name for b in members.values() if b.sync.held == self.number}
        incarnations = {b.name: b.incarnation for b in members.values()}
        self._update = update = Update(members, incarnations, complete, owner)
        self._dispatcher.close_gate(f"weight update v{self.number + 1} is under way")
        for backend in members.values():
            backend.sync.lost(f"update v{self.number + 1} did not reach its end")
        return update

    def check_whole(self) -> None:
        """Refuses to go on with a fleet in which an update has failed, where that ends it.

        Raises:
            [`WeightSyncError`]: saying so.
        """
        if self.broken is not None:
            raise WeightSyncError(
                f"{self.broken}; make the weight update group anew (init_communicator, or "
                "init_weight_transfer_engine) and send every parameter",
                self.everybody_says(),
            )

    def grouped(self) -> list[Backend]:
        """Those that have a communicator still: a server that came back from the dead has lost it."""
        return [b for b in self.reachable() if self._group.get(b.name) == b.incarnation and b.doubt is None]

    def drop_restarted(self, update: Update) -> None:
        """A server that was gone meanwhile has lost what it was sent."""
        gone = update.restarted()
        self.drop(update, {name: ControlResult(update.members[name].url, False, RESTARTED) for name in gone})

    def drop(self, update: Update, results: Mapping[str, ControlResult]) -> None:
        """Leaves out of an update whoever failed in it.

        Raises:
            [`WeightSyncError`]: when fewer than `min_backends` are left (all or nothing: when anybody failed).
        """
        failed = {name: result for name, result in results.items() if not result.ok}
        for name, result in failed.items():
            update.dropped[result.url] = result
            update.members.pop(name).sync.lost(f"update v{self.number + 1} failed: {result.message}")
            self._group.pop(name, None)
            logger.warning("%s drops out of weight update v%d: %s", result.url, self.number + 1, result.message)
        if failed and (self._all_or_nothing or len(update.members) < self._config.min_backends):
            self.abandon("another backend failed in it")
            if self._all_or_nothing:
                self._group = {}
                self.broken = f"Weight update v{self.number + 1} failed on {', '.join(r.url for r in failed.values())}"
            raise WeightSyncError(
                f"Weight update v{self.number + 1} ended after {len(update.names)} parameters; no backend that "
                "took part serves until a whole update has reached it",
                {**{r.url: r for r in results.values()}, **update.dropped},
            )

    def holders(self) -> list[Backend]:
        """Backends whose caches matter outside an update."""
        if self._all_or_nothing:
            return self.everybody()
        return [b for b in self.reachable() if b.sync.held == self.number]

    def publish(self, update: Update, name: str | None = None) -> None:
        """The new version is out. A backend that had missed something holds it only if it was sent all there is.

        Args:
            update ([`Update`]): Whose.
            name (`str`, *optional*): What its sender calls it; `<run id>:<n>` otherwise.
        """
        self._cancel_expiry()
        self._update = None
        self.number += 1
        if name is not None:
            self.rename(name)
        whole = update.names >= self._ever_sent
        reached = [b for b in update.members.values() if whole or b.name in update.complete]
        for backend in update.members.values():
            if backend in reached:
                backend.sync.reached(self.number)
            else:
                backend.sync.lost(
                    f"update v{self.number} carried {len(update.names)} of the {len(self._ever_sent)} parameters that "
                    "it may have missed"
                )
        self._dispatcher.open_gate()
        logger.info("Weights %s: %d parameters on %d backends", self.version, len(update.names), len(reached))
        if len(reached) < self._config.min_backends:
            raise WeightSyncError(
                f"Weight update v{self.number} was not whole; send every parameter", self._dispatcher.reasons()
            )

    def abandon(self, why: str) -> None:
        """Ends an update without publishing it: its members stay out of sync."""
        self._cancel_expiry()
        if self._update is None:
            return
        for backend in self._update.members.values():
            backend.sync.lost(f"update v{self.number + 1} was abandoned: {why}")
        self._update = None
        self._dispatcher.open_gate()

    def extend(self) -> None:
        """Puts the moment off at which the update counts as abandoned."""
        self._cancel_expiry()
        self._expiry = asyncio.get_running_loop().call_later(self._config.update_idle_timeout, self._expire)

    def _expire(self) -> None:
        idle = self._config.update_idle_timeout
        if self.turn.locked():
            self.extend()  # a control call is out: somebody is there
            return
        logger.error("Weight update v%d: no control call for %g s, abandoned", self.number + 1, idle)
        self.abandon(f"no control call for {idle:g} s")
        for clean_up in self._expired:
            task = asyncio.ensure_future(clean_up())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _cancel_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def forget(self, backend: Backend) -> None:
        """Lets a backend that left the pool out of everything."""
        self._group.pop(backend.name, None)
        if self._update is not None:
            self._update.members.pop(backend.name, None)

    def _urls(self) -> list[str]:
        return [b.url for b in self._dispatcher.backends.values()]

    def close(self) -> None:
        """Stops the clock of an unfinished update."""
        self._cancel_expiry()


def require_all(what: str, results: Mapping[str, ControlResult]) -> None:
    """Raises unless every backend succeeded.

    Raises:
        [`ControlError`]: with every backend's result.
    """
    if any(not result.ok for result in results.values()):
        raise ControlError(f"{what} failed", {result.url: result for result in results.values()})
