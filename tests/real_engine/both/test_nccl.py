"""The NCCL group, as far as it goes without a GPU: its calls are checked against vLLM's signatures."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, create_autospec

import pytest
import torch
from vllm.distributed.device_communicators import pynccl
from vllm.distributed.utils import StatelessProcessGroup

from trl_pool.weights.nccl import NcclGroup, open_group
from trl_pool.weights.rendezvous import listen

HOST = "127.0.0.1"
CUDA = torch.device("cuda", 0)
TENSOR: Any = SimpleNamespace(device=CUDA, is_contiguous=lambda: True, nbytes=8)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the parts of CUDA that are used; `communicator` and `done` are what a test looks at and sets."""
    fake = SimpleNamespace(done=True, stream=MagicMock(name="stream"))

    real = pynccl.PyNcclCommunicator

    def make(group: Any, device: Any) -> Any:
        inspect.signature(real).bind(group, device)
        fake.made_with = (group, device)
        fake.communicator = create_autospec(real, instance=True, disabled=False)
        return fake.communicator

    monkeypatch.setattr(pynccl, "PyNcclCommunicator", make)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: fake.stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda _: None, query=lambda: fake.done))
    monkeypatch.setattr(torch.cuda, "device", lambda _: MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "the trainer's stream")
    return fake


@pytest.fixture(params=[0, 1], ids=["vllm: trainer first", "trl: trainer last"])
def group(request: pytest.FixtureRequest, cuda: SimpleNamespace) -> Iterator[NcclGroup]:
    """A group of two in both dialects' shapes; the other member is vLLM's own rendezvous."""
    rank: int = request.param
    listener = listen(HOST)
    port = int(listener.getsockname()[1])
    sockets = {rank: listener} if rank == 0 else {0: listener}
    other: list[Any] = []

    def meet() -> None:
        other.append(
            StatelessProcessGroup.create(
                host=HOST, port=port, rank=1 - rank, world_size=2, listen_socket=None if rank == 0 else sockets[0]
            )
        )

    thread = threading.Thread(target=meet)
    thread.start()
    found = open_group(HOST, port, rank, 2, device=0, timeout=20, listener=sockets.get(rank))
    thread.join()
    assert (found.rank, found.world_size, found.device) == (rank, 2, CUDA)
    assert cuda.made_with[0].rank == rank
    assert cuda.made_with[1] == CUDA
    found_other = other[0]
    found.other = found_other  # type: ignore[attr-defined]
    yield found
    found.close()


def test_broadcast_goes_out_on_the_groups_own_stream(group: NcclGroup, cuda: SimpleNamespace) -> None:
    """It begins after what the trainer has queued, and the call returns when it is done."""
    group.broadcast(TENSOR, src=group.rank)
    cuda.stream.wait_stream.assert_called_once_with("the trainer's stream")
    cuda.communicator.broadcast.assert_called_once_with(TENSOR, src=group.rank, stream=cuda.stream)


def test_barrier_is_vllms(group: NcclGroup) -> None:
    thread = threading.Thread(target=group.other.barrier)  # type: ignore[attr-defined]
    thread.start()
    group.barrier()
    thread.join()


def test_broadcast_that_never_ends_is_aborted(group: NcclGroup, cuda: SimpleNamespace) -> None:
    group.timeout = 0.2
    cuda.done = False
    with pytest.raises(TimeoutError, match=r"8 bytes from rank 0 took longer than 0\.2 s"):
        group.broadcast(TENSOR, src=0)
    cuda.communicator.destroy.assert_called_once_with()
    with pytest.raises(ConnectionError, match="cannot be used any more"):
        group.broadcast(TENSOR, src=0)


def test_error_of_nccl_closes_the_group(group: NcclGroup, cuda: SimpleNamespace) -> None:
    cuda.communicator.broadcast.side_effect = RuntimeError("NCCL error: remote process exited")
    with pytest.raises(ConnectionError, match="NCCL error: remote process exited"):
        group.broadcast(TENSOR, src=0)
    assert group.closed
    cuda.communicator.destroy.assert_called_once_with()


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2), SimpleNamespace(device=CUDA, is_contiguous=lambda: False, stride=lambda: (1,), shape=(1,))],
)
def test_tensor_elsewhere_or_with_gaps_is_refused(group: NcclGroup, cuda: SimpleNamespace, tensor: Any) -> None:
    with pytest.raises(ValueError, match="contiguous tensors on cuda:0"):
        group.broadcast(tensor, src=0)
    cuda.communicator.broadcast.assert_not_called()


def test_device_that_is_no_gpu_is_refused_and_the_port_given_back() -> None:
    listener = listen(HOST)
    port = listener.getsockname()[1]
    with pytest.raises(ValueError, match="gloo"):
        open_group(HOST, port, 0, 2, device="cpu", timeout=5, listener=listener)
    listen(HOST, port).close()


def test_taken_port_is_an_error_that_names_it() -> None:
    with listen(HOST) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=f"{HOST}:{port}"):
            open_group(HOST, port, 0, 2, device=0, timeout=5)


def test_communicator_without_nccl_is_an_error() -> None:
    """vLLM's own would silently send nothing."""
    listener = listen(HOST)
    port = int(listener.getsockname()[1])
    thread = threading.Thread(
        target=StatelessProcessGroup.create, kwargs={"host": HOST, "port": port, "rank": 1, "world_size": 2}
    )
    thread.start()
    with pytest.raises(ConnectionError, match="no NCCL library"):
        open_group(HOST, port, 0, 2, device=0, timeout=20, listener=listener)
    thread.join()
