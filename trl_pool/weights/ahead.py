"""Announcements that run ahead of their tensors (`trl` dialect).

A server answers an announcement at once, and its worker takes tensors in the order in which they were announced. So
the next ones can be announced while a tensor travels: an update then takes as long as the tensors or the announcements
do, whichever takes longer, and not both. What was announced has to come, though: the worker waits for it, and in a
group of NCCL's for ever. Hence the few that are ahead, and [`Run.owed`].
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final

import msgspec

from ..backend import Backend
from ..errors import ControlResult
from .coordinator import Update
from .packing import Metadata

AHEAD: Final = 4
"""Tensors that a server is told of before their turn: enough to hide an answer that takes as long as four of them."""

Tell = Callable[[Backend, bytes], Awaitable[ControlResult]]


class Announcements:
    """Tells servers of tensors: each in order, one at a time, and none waits for another.

    Args:
        members (`Iterable[Backend]`): Whom.
        bodies (`Sequence[bytes]`): An announcement per tensor.
        tell (`Callable`): Sends one to one server. The first that fails is that server's last.
    """

    def __init__(self, members: Iterable[Backend], bodies: Sequence[bytes], tell: Tell) -> None:
        self._bodies, self._tell = bodies, tell
        self._limit = 0
        self._moved, self._news = asyncio.Event(), asyncio.Event()
        self._left: set[str] = set()
        self.told: dict[str, int] = {}
        """Announcements that each has answered well."""
        self.failures: dict[str, ControlResult] = {}
        """What the one behind them came to, where it failed."""
        self._lanes = {b.name: asyncio.create_task(self._lane(b), name=f"trl-pool-ahead-{b.name}") for b in members}
        self.told.update(dict.fromkeys(self._lanes, 0))

    def __repr__(self) -> str:
        return f"<Announcements {self.told} of {len(self._bodies)}, those before {self._limit} may go>"

    async def _lane(self, backend: Backend) -> None:
        name = backend.name
        try:
            for index, body in enumerate(self._bodies):
                while index >= self._limit and name not in self._left:
                    await self._moved.wait()
                if name in self._left:
                    return
                try:
                    result = await self._tell(backend, body)
                except Exception as error:  # it counts as not told, whatever it was
                    result = ControlResult(backend.url, False, f"could not be told: {type(error).__name__}: {error}")
                if not result.ok:
                    self.failures[name] = result
                    return
                self.told[name] = index + 1
                self._news = _pulse(self._news)
        finally:
            self._news = _pulse(self._news)

    def allow(self, limit: int) -> None:
        """Tensors before this one may be announced now."""
        if limit > self._limit:
            self._limit = limit
            self._moved = _pulse(self._moved)

    async def answered(self, index: int, names: Iterable[str]) -> None:
        """Waits until each of these servers has answered this announcement, or failed in one."""
        whom = list(names)
        while any(self.told[name] <= index and not self._lanes[name].done() for name in whom):
            await self._news.wait()

    def leave_out(self, name: str) -> None:
        """This server is told of nothing more."""
        self._left.add(name)
        self._moved = _pulse(self._moved)

    async def stop(self, seconds: float) -> None:
        """Nobody is told of anything more; what is on its way is waited for, that long."""
        self._left.update(self._lanes)
        self._moved = _pulse(self._moved)
        lanes = list(self._lanes.values())
        _, late = await asyncio.wait(lanes, timeout=seconds)
        for lane in late:
            lane.cancel()
        await asyncio.gather(*lanes, return_exceptions=True)


def _pulse(event: asyncio.Event) -> asyncio.Event:
    """Wakes whoever waits for it now; later ones wait for the next."""
    event.set()
    return asyncio.Event()


class Run:
    """Tensors that were named beforehand, on their way to the members of an update.

    Args:
        update ([`Update`]): Whose.
        metadata (`Iterable[tuple[str, str, Sequence[int]]]`): `(name, dtype name, shape)` per tensor, in order.
        tell (`Callable`): Sends one announcement to one server.
    """

    def __init__(self, update: Update, metadata: Metadata, tell: Tell) -> None:
        self.update = update
        self.tensors = [
            (name, dtype.removeprefix("torch."), [int(size) for size in shape]) for name, dtype, shape in metadata
        ]
        bodies = [msgspec.json.encode({"name": n, "dtype": f"torch.{d}", "shape": s}) for n, d, s in self.tensors]
        self.announcements = Announcements(update.members.values(), bodies, tell)
        self.taken = 0
        """Tensors whose turn has come."""
        self.sent = 0
        """Tensors that were given to the transport; counted on its thread."""
        self.abandoned: set[str] = set()
        """Members whose group was given up."""

    def __repr__(self) -> str:
        return f"<Run {self.sent} of {len(self.tensors)} tensors sent, {self.announcements!r}>"

    def take(self, name: str, tensor: Any) -> int:
        """The place of the tensor whose turn it is, if this is the one.

        Raises:
            `ValueError`: when it is not.
        """
        if self.taken == len(self.tensors):
            raise ValueError(f"{name} was not announced: the metadata ended after {len(self.tensors)} tensors")
        came = name, str(tensor.dtype).removeprefix("torch."), [int(size) for size in tensor.shape]
        expected = self.tensors[self.taken]
        if came != expected:
            raise ValueError(
                f"Tensor {self.taken} differs from the metadata: {' '.join(map(str, came))} came, "
                f"{' '.join(map(str, expected))} was announced"
            )
        self.taken += 1
        return self.taken - 1

    def check_end(self) -> None:
        """Checks that all were there.

        Raises:
            `ValueError`: naming the first that never came.
        """
        if self.taken < len(self.tensors):
            raise ValueError(
                f"{self.tensors[self.taken][0]} was announced and never came: the parameters ended after "
                f"{self.taken} of {len(self.tensors)}"
            )

    def failures(self, index: int) -> dict[str, ControlResult]:
        """Members of the update that failed in the announcement of this tensor. Who failed in a later one takes the
        tensors before it, as if that had not been asked yet."""
        told = self.announcements.told
        return {
            name: result
            for name, result in self.announcements.failures.items()
            if name in self.update.members and told[name] <= index
        }

    def owed(self, names: Iterable[str]) -> dict[str, int]:
        """Up to where these servers wait for tensors, where they wait for any."""
        told = self.announcements.told
        return {name: told[name] for name in names if told[name] > self.sent and name not in self.abandoned}
