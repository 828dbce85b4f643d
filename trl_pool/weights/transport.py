"""The seam between announcing a tensor to the servers and moving it there."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from .stream import BufferPacker


@dataclass(frozen=True)
class GroupMember:
    """One server's update group, as the trainer has to join it.

    On the `trl` dialect every server has a group of its own, whose rendezvous is on the server.

    Args:
        backend (`str`): Name of the backend.
        host (`str`): Where its rendezvous is.
        port (`int`): On which port.
        world_size (`int`): The server's workers and the trainer.
        rank (`int`): The trainer's, the last one.
    """

    backend: str
    host: str
    port: int
    world_size: int
    rank: int


class TransportError(RuntimeError):
    """A tensor did not reach some backends, or their groups could not be joined.

    Args:
        failed (`Mapping[str, str]`): What went wrong, per name of a backend.
    """

    def __init__(self, failed: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
        self.failed = dict(failed)


class WeightTransport(Protocol):
    """Moves tensors into groups. The methods block; the pool calls them on a worker thread, one at a time.

    What concerns some backends only is raised as [`TransportError`]; the update goes on without them. Anything else
    ends it.
    """

    def device_uuid(self, device: Any) -> str:
        """Identifies the trainer's device, which must not be one of the server's."""

    def open(self, members: Sequence[GroupMember], device: Any) -> None:
        """Joins every member's group, in the place of an earlier one with it; groups with others stay. The servers
        have been told and are joining."""

    def broadcast(self, tensor: Any, backends: Sequence[str]) -> None:
        """Sends a tensor to the groups of these backends, each of which has been told to receive it."""

    def close(self) -> None:
        """Leaves all groups."""


@runtime_checkable
class AheadTransport(WeightTransport, Protocol):
    """A transport that can make up for a tensor that was announced and does not come. With any other one a tensor is
    announced when it is there."""

    def fill(self, dtype: str, shape: Sequence[int], backends: Sequence[str]) -> None:
        """Sends a tensor of no meaning to the groups of these backends: their workers wait for one of this dtype
        (`"bfloat16"`) and shape. Whoever gets it holds no weights that may be used."""

    def give_up(self, backends: Sequence[str]) -> None:
        """Leaves the groups of these backends, with whom nothing works any more; safe, and of effect, while another
        thread is in a broadcast."""


class JointGroup(Protocol):
    """The trainer's end of one update group over all servers; it is rank 0. Its methods block."""

    def broadcast(self, buffer: Any) -> None:
        """Sends a packed buffer to everybody and returns when it may be freed."""

    def abort(self) -> None:
        """Tells whoever waits in the group that it is over; safe while another thread is in a broadcast."""

    def close(self) -> None:
        """Leaves the group."""


class JointTransport(Protocol):
    """Makes such groups."""

    name: str
    """What the servers call it: the `backend` of their `--weight-transfer-config`."""

    needs_group: bool
    """Whether tensors move at all."""

    def packer(
        self, metadata: Sequence[tuple[str, str, list[int]]], buffer_size_bytes: int, device: Any
    ) -> BufferPacker:
        """What makes buffers of tensors, as the servers' engine reads them."""

    def open(self, listener: socket.socket, world_size: int, device: Any, timeout: float) -> JointGroup | None:
        """Is the rendezvous until all servers' workers are there, or `timeout` seconds. Takes the listener over."""


class ControlOnlyTransport:
    """Moves nothing. Right where no tensors have to move (simulated servers, mocked transports), and where somebody
    else moves them (a gateway's client). With real servers it would leave workers waiting for ever."""

    def device_uuid(self, device: Any) -> str:
        return "trl-pool"

    def open(self, members: Sequence[GroupMember], device: Any) -> None:
        """Nothing to join."""

    def broadcast(self, tensor: Any, backends: Sequence[str]) -> None:
        """Nothing to send."""

    def fill(self, dtype: str, shape: Sequence[int], backends: Sequence[str]) -> None:
        """Nothing to send either."""

    def give_up(self, backends: Sequence[str]) -> None:
        """Nothing to leave."""

    def close(self) -> None:
        """Nothing to leave."""


class _Nothing:
    """Counts tensors, and packs none."""

    def __init__(self, metadata: Sequence[tuple[str, str, list[int]]]) -> None:
        self._expected = [name for name, _, _ in metadata]
        self._taken = 0

    def add(self, name: str, tensor: Any) -> None:
        """Checks that it is this tensor's turn."""
        expected = self._expected[self._taken] if self._taken < len(self._expected) else "no further tensor"
        if name != expected:
            raise ValueError(f"tensor {self._taken} is {name!r}, announced was {expected!r}")
        self._taken += 1

    def flush(self) -> None:
        """Checks that all were there."""
        if self._taken < len(self._expected):
            raise ValueError(f"{self._taken} tensors came, {len(self._expected)} were announced")


class ControlOnlyJoint:
    """The same for one joint group: servers that count announcements and take no tensors."""

    name = "gloo"  # whose announcements it makes
    needs_group = False

    def packer(self, metadata: Sequence[tuple[str, str, list[int]]], buffer_size_bytes: int, device: Any) -> _Nothing:
        return _Nothing(metadata)

    def open(self, listener: socket.socket, world_size: int, device: Any, timeout: float) -> None:
        """Nothing to join."""
        listener.close()
