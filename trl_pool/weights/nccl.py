"""Update groups over NCCL, through vLLM's own communicator: tensors travel from GPU to GPU.

Both shapes of group come from here. With plain `vllm serve` the trainer is rank 0 and the rendezvous, and one group
spans all servers; with a `trl vllm-serve` the server's first worker is, and the trainer has the last rank.
"""

from __future__ import annotations

import math
import socket
import time
from typing import TYPE_CHECKING, Any, Final

from .rendezvous import failure, listen

if TYPE_CHECKING:
    import torch

_POLL_SECONDS: Final = 0.001


class NcclGroup:
    """A process's membership in an update group, from [`open_group`].

    NCCL itself waits for a dead peer for ever. Here every broadcast is watched from the CPU: after `timeout` seconds
    the communicator is aborted, which frees the GPU too, and the group has to be built anew.

    Args:
        communicator (`PyNcclCommunicator`): vLLM's.
        stateless (`StatelessProcessGroup`): vLLM's, with the store of the rendezvous.
        device (`torch.device`): Where the tensors are.
        timeout (`float`): Seconds for one broadcast, and for one barrier.
    """

    def __init__(self, communicator: Any, stateless: Any, device: torch.device, timeout: float) -> None:
        import torch

        self._communicator: Any = communicator
        self._stateless: Any = stateless
        self.device = device
        self.rank: int = stateless.rank
        self.world_size: int = stateless.world_size
        self.timeout = timeout
        # Of its own, so that waiting for the broadcast is not waiting for the trainer's kernels.
        self._stream: Any = torch.cuda.Stream(device)

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return f"<NcclGroup rank {self.rank} of {self.world_size} on {self.device}{state}>"

    @property
    def closed(self) -> bool:
        """Whether it was closed, by [`close`] or by an error."""
        return self._communicator is None

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """Sends a tensor to all members, or receives it in place, and waits until that is done.

        Args:
            tensor (`torch.Tensor`): Contiguous, on the group's device, of the same size and dtype at all members.
            src (`int`): Rank that sends.

        Raises:
            `ValueError`: for a tensor that cannot be sent; nothing was sent then.
            `ConnectionError`: when NCCL reports an error or the group is closed.
            `TimeoutError`: after `timeout` seconds.
        """
        import torch

        if tensor.device != self.device or not tensor.is_contiguous():
            # NCCL reads on from the first element: of a view it would send the neighbours.
            raise ValueError(
                f"this group sends contiguous tensors on {self.device}, got one on {tensor.device} "
                f"with strides {tensor.stride()} and shape {list(tensor.shape)}"
            )
        communicator = self._communicator
        if communicator is None:
            raise ConnectionError(f"{self!r} cannot be used any more")
        what = f"A broadcast of {tensor.nbytes} bytes from rank {src}"
        started = time.monotonic()
        try:
            # Set per thread, and the thread that sends is not the one that trains.
            with torch.cuda.device(self.device):
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
                communicator.broadcast(tensor, src=src, stream=self._stream)
                done = torch.cuda.Event()
                done.record(self._stream)
                while not done.query():
                    if time.monotonic() - started > self.timeout:
                        raise TimeoutError(f"{what} took longer than {self.timeout:g} s")
                    time.sleep(_POLL_SECONDS)
        except TimeoutError:
            self.close()
            raise
        except RuntimeError as error:
            self.close()
            raise failure(error, what, started, self.timeout) from error

    def barrier(self) -> None:
        """Waits until all members have come here. A `trl` server's worker does after each tensor.

        Raises:
            `ConnectionError`: when a peer is gone or the group is closed.
            `TimeoutError`: after `timeout` seconds.
        """
        stateless = self._stateless
        if stateless is None:
            raise ConnectionError(f"{self!r} cannot be used any more")
        started = time.monotonic()
        try:
            stateless.barrier(timeout=self.timeout)
        except RuntimeError as error:
            self.close()
            raise failure(error.__cause__ or error, "The barrier after a tensor", started, self.timeout) from error

    def abort(self) -> None:
        """The same as [`close`]: NCCL has no other way to leave."""
        self.close()

    def close(self) -> None:
        """Aborts the communicator and leaves the group; a second time does nothing. It takes at most the 5 s that
        vLLM gives the abort, also when a broadcast is under way, which ends with an error then."""
        communicator, self._communicator = self._communicator, None
        self._stateless = None
        if communicator is not None:
            communicator.destroy()


def open_group(
    host: str,
    port: int,
    rank: int,
    world_size: int,
    *,
    device: torch.device | str | int,
    timeout: float,
    listener: socket.socket | None = None,
) -> NcclGroup:
    """Joins an update group; returns when all its members have. Rank 0 is the rendezvous.

    The time is kept only while the members meet. After that NCCL connects them, with no limit: call this on a thread
    that can be left behind, and watch the servers' answers meanwhile.

    Args:
        host (`str`): Address of rank 0.
        port (`int`): Of the rendezvous there.
        rank (`int`): Ours: 0 before plain `vllm serve`, `world_size - 1` before a `trl vllm-serve`.
        world_size (`int`): How many members there are.
        device (`torch.device`, `str` or `int`): The trainer's GPU; no server may use the same one.
        timeout (`float`): Seconds for the members to meet, and for each broadcast and barrier later.
        listener (`socket.socket`, *optional*):
            For rank 0: from [`~trl_pool.weights.rendezvous.listen`], made before the others were told to come. It is
            taken over, whatever happens. Without one the port is opened here.

    Raises:
        `ValueError`: for a device that is no GPU.
        `OSError`: naming the port, when rank 0 cannot listen on it.
        `ConnectionError`: when a member went away, or there is no NCCL here.
        `TimeoutError`: when the group was not complete in time.
    """
    try:
        target = _cuda_device(device)
        if rank == 0 and listener is None:
            listener = listen(host, port)
    except BaseException:
        if listener is not None:
            listener.close()
        raise
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup

    if listener is not None:
        port = int(listener.getsockname()[1])
    started = time.monotonic()
    what = f"Joining the weight update group at {host}:{port} as rank {rank} of {world_size}"
    try:
        stateless = StatelessProcessGroup.create(
            host=host,
            port=port,
            rank=rank,
            world_size=world_size,
            store_timeout=math.ceil(timeout),
            listen_socket=listener,
        )
        communicator = PyNcclCommunicator(stateless, device=target)
    except RuntimeError as error:
        raise failure(error, what, started, timeout) from error
    if communicator.disabled:
        # vLLM makes one that silently sends nothing.
        raise ConnectionError(f"{what} failed: vLLM found no NCCL library here, or VLLM_DISABLE_PYNCCL is set")
    return NcclGroup(communicator, stateless, target, timeout)


def _cuda_device(device: torch.device | str | int) -> torch.device:
    import torch

    target = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if target.type != "cuda":
        raise ValueError(f"NCCL moves tensors between GPUs, got the device {target}; use the gloo transport")
    if target.index is None:
        target = torch.device("cuda", torch.cuda.current_device())
    return target
