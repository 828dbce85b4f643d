"""What carries tensors to real servers: gloo or NCCL, for one joint group or for a group per server.

torch is imported here and below, and only when tensors have to move.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .packing import Packer
from .transport import GroupMember, JointGroup, TransportError
from .worker import Lane

JOIN_SECONDS = 60.0
"""Longest wait for a server's worker to come to the rendezvous of its own group."""


class GlooJoint:
    """Joint groups over gloo, for servers with the `gloo` engine."""

    name = "gloo"
    needs_group = True

    def packer(self, metadata: Sequence[tuple[str, str, list[int]]], buffer_size_bytes: int, device: Any) -> Packer:
        return Packer(metadata, buffer_size_bytes, device="cpu")

    def open(self, listener: socket.socket, world_size: int, device: Any, timeout: float) -> JointGroup:
        from .gloo import open_group

        host, port = listener.getsockname()[:2]
        joining = min(timeout, JOIN_SECONDS)
        group = open_group(host, port, 0, world_size, master=True, timeout=joining, listener=listener)
        group.timeout = timeout
        return _Sender(group)


class NcclJoint:
    """Joint groups over vLLM's NCCL communicator."""

    name = "nccl"
    needs_group = True

    def packer(self, metadata: Sequence[tuple[str, str, list[int]]], buffer_size_bytes: int, device: Any) -> Packer:
        return Packer(metadata, buffer_size_bytes, device=_cuda(device))

    def open(self, listener: socket.socket, world_size: int, device: Any, timeout: float) -> JointGroup:
        from .nccl import open_group

        host, port = listener.getsockname()[:2]
        return _Sender(open_group(host, port, 0, world_size, device=_cuda(device), timeout=timeout, listener=listener))


class _Sender:
    """Rank 0 of a group: broadcasts what it is given."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def __repr__(self) -> str:
        return repr(self._group)

    def broadcast(self, buffer: Any) -> None:
        self._group.broadcast(buffer, 0)

    def abort(self) -> None:
        self._group.abort()

    def close(self) -> None:
        self._group.close()


class SeparateTransport:
    """A group per server, the trainer being the last rank of each; the same tensor goes to all of them at once.

    Args:
        backend (`str`): `"gloo"` or `"nccl"`.
        timeout (`float`): Seconds for a broadcast.
    """

    def __init__(self, backend: str, *, timeout: float) -> None:
        self._backend, self._timeout = backend, timeout
        self._groups: dict[str, tuple[Any, int]] = {}
        self._lanes: dict[str, Lane] = {}
        self._device: Any = None

    def device_uuid(self, device: Any) -> str:
        if self._backend == "gloo":
            return "trl-pool"  # no GPU that a worker could have too
        import torch

        return str(torch.cuda.get_device_properties(_cuda(device)).uuid)

    def open(self, members: Sequence[GroupMember], device: Any) -> None:
        self._leave(member.backend for member in members)
        if self._backend == "nccl":
            self._device = _cuda(device)

        def join(member: GroupMember) -> None:
            arguments = (member.host, member.port, member.rank, member.world_size)
            group: Any
            if self._backend == "gloo":
                from .gloo import join_stateless_group

                group = join_stateless_group(*arguments, timeout=min(self._timeout, JOIN_SECONDS))
            else:
                from .nccl import open_group

                group = open_group(*arguments, device=self._device, timeout=min(self._timeout, JOIN_SECONDS))
            self._groups[member.backend] = (group, member.rank)

        self._everywhere({member.backend: _call(join, member) for member in members})

    def broadcast(self, tensor: Any, backends: Sequence[str]) -> None:
        tensor = tensor.detach()
        tensor = tensor.cpu().contiguous() if self._backend == "gloo" else tensor.contiguous()

        def send(name: str) -> None:
            group, rank = self._groups[name]
            group.broadcast(tensor, rank)
            group.barrier()

        self._everywhere({name: _call(send, name) for name in backends})

    def fill(self, dtype: str, shape: Sequence[int], backends: Sequence[str]) -> None:
        import torch

        device = "cpu" if self._backend == "gloo" else self._device
        self.broadcast(torch.zeros(list(shape), dtype=getattr(torch, dtype), device=device), backends)

    def give_up(self, backends: Sequence[str]) -> None:
        for name in backends:
            group, _ = self._groups.get(name, (None, 0))
            if group is not None:
                group.abort()

    def close(self) -> None:
        self._leave(list(self._groups))

    def _leave(self, names: Iterable[str]) -> None:
        for name in names:
            group, _ = self._groups.pop(name, (None, 0))
            lane = self._lanes.pop(name, None)
            if lane is not None:
                lane.close()
            if group is not None:
                group.close()

    def _everywhere(self, calls: dict[str, Callable[[], None]]) -> None:
        """All at once; what fails for some is told for those."""
        futures = {name: self._lanes.setdefault(name, Lane(name)).submit(call) for name, call in calls.items()}
        failed: dict[str, str] = {}
        for name, future in futures.items():
            try:
                future.result()
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
        if failed:
            raise TransportError(failed)


def _call(function: Callable[[Any], None], argument: Any) -> Callable[[], None]:
    return lambda: function(argument)


def _cuda(device: Any) -> Any:
    """A device as torch's: an integer is the index of a GPU."""
    import torch

    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def device_type(device: Any) -> str:
    """`"cuda"`, `"cpu"`, …; an integer is the index of a GPU, as for torch, unless there is none."""
    if isinstance(device, int):
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(getattr(device, "type", device)).partition(":")[0]
