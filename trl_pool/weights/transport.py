"""The seam between announcing a tensor to the servers and moving it there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


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


class WeightTransport(Protocol):
    """Moves tensors into groups. The methods block; the pool calls them on a worker thread, one at a time."""

    def device_uuid(self, device: Any) -> str:
        """Identifies the trainer's device, which must not be one of the server's."""

    def open(self, members: Sequence[GroupMember], device: Any) -> None:
        """Joins every member's group. The servers have been told and are joining."""

    def broadcast(self, tensor: Any, backends: Sequence[str]) -> None:
        """Sends a tensor to the groups of these backends, each of which has been told to receive it."""

    def close(self) -> None:
        """Leaves all groups."""


class ControlOnlyTransport:
    """Moves nothing. Right where no tensors have to move (simulated servers, mocked transports), and where somebody
    else moves them (a gateway's client). With real servers it would leave workers waiting for ever."""

    def device_uuid(self, device: Any) -> str:
        return "trl-pool"

    def open(self, members: Sequence[GroupMember], device: Any) -> None:
        """Nothing to join."""

    def broadcast(self, tensor: Any, backends: Sequence[str]) -> None:
        """Nothing to send."""

    def close(self) -> None:
        """Nothing to leave."""
