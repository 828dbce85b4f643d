"""Update groups over gloo: every dtype travels, and every way to lose a member is an error in time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch
import torch.distributed

from trl_pool.weights.gloo import GlooGroup, join_stateless_group, open_group
from trl_pool.weights.packing import DTYPE_SIZES
from trl_pool.weights.rendezvous import listen
from trl_pool.weights.stand_in import StandInCommunicator

HOST = "127.0.0.1"
NBYTES = 20_000_000
spawn = multiprocessing.get_context("spawn")


def open_all(world_size: int, timeout: float = 30.0) -> list[GlooGroup]:
    """All members of one group, in this process."""
    listener = listen(HOST)
    port = int(listener.getsockname()[1])
    with ThreadPoolExecutor(world_size) as executor:
        others = [
            executor.submit(open_group, HOST, port, rank, world_size, master=False, timeout=timeout)
            for rank in range(1, world_size)
        ]
        first = open_group(HOST, port, 0, world_size, master=True, timeout=timeout, listener=listener)
        return [first, *(other.result() for other in others)]


def all_broadcast(groups: list[GlooGroup], tensors: list[torch.Tensor], src: int) -> None:
    with ThreadPoolExecutor(len(groups)) as executor:
        list(executor.map(lambda pair: pair[0].broadcast(pair[1], src), zip(groups, tensors, strict=True)))


def receive(port: int, rank: int, timeout: float, result: Any) -> None:
    """A member in a process of its own: one broadcast that works, then on to the end."""
    group = open_group(HOST, port, rank, 3, master=False, timeout=timeout)
    buffer = torch.zeros(NBYTES, dtype=torch.uint8)
    group.broadcast(buffer, 0)
    result.put((rank, "joined", os.getpid(), ""))
    started = time.monotonic()
    try:
        while True:
            group.broadcast(buffer, 0)
            started = time.monotonic()
    except OSError as error:
        result.put((rank, type(error).__name__, time.monotonic() - started, str(error)))


@pytest.fixture
def members() -> Iterator[Callable[[float], tuple[GlooGroup, list[BaseProcess], Any]]]:
    """Starts a group of three: the trainer here, ranks 1 and 2 in processes."""
    processes: list[BaseProcess] = []

    def start(timeout: float) -> tuple[GlooGroup, list[BaseProcess], Any]:
        listener = listen(HOST)
        port = int(listener.getsockname()[1])
        result = spawn.Queue()
        processes.extend(spawn.Process(target=receive, args=(port, rank, timeout, result)) for rank in (1, 2))
        for process in processes:
            process.start()
        # The time is for processes that import torch first, too.
        group = open_group(HOST, port, 0, 3, master=True, timeout=90, listener=listener)
        group.timeout = timeout
        group.broadcast(torch.ones(NBYTES, dtype=torch.uint8), 0)
        assert {result.get(timeout=30)[:2] for _ in range(2)} == {(1, "joined"), (2, "joined")}
        return group, processes, result

    yield start
    for process in processes:
        process.kill()
        process.join()


def broadcast_until_error(group: GlooGroup) -> tuple[OSError, float]:
    buffer = torch.ones(NBYTES, dtype=torch.uint8)
    started = time.monotonic()
    try:
        for _ in range(1000):
            group.broadcast(buffer, 0)
            started = time.monotonic()
    except OSError as error:
        return error, time.monotonic() - started
    pytest.fail("nobody noticed")


@pytest.mark.parametrize("victim", [1, 2])
def test_killed_member_is_an_error_in_time_for_trainer_and_survivor(members: Any, victim: int) -> None:
    """Mostly at once; where gloo does not notice it, when the time is up. The error is kept, and keeps nobody."""
    timeout = 5.0
    group, processes, result = members(timeout)
    threading.Timer(0.2, processes[victim - 1].kill).start()
    error, seconds = broadcast_until_error(group)
    rank, kind, waited, message = result.get(timeout=2 * timeout)
    print(f"trainer after {seconds:.2f} s: {error}; rank {rank} after {waited:.2f} s: {kind} {message}")
    assert rank == 3 - victim
    assert max(seconds, waited) < timeout + 2
    # Whoever noticed it told the other.
    assert abs(seconds - waited) < 2
    assert group.closed
    with pytest.raises(ConnectionError, match="cannot be used any more"):
        group.broadcast(torch.zeros(1), 0)


def test_member_that_hangs_is_a_timeout(members: Any) -> None:
    """SIGSTOP: the connections stay open, as with a machine that vanished."""
    timeout = 3.0
    group, processes, _ = members(timeout)
    os.kill(processes[1].pid, signal.SIGSTOP)
    error, seconds = broadcast_until_error(group)
    print(f"after {seconds:.2f} s: {error}")
    assert type(error) is TimeoutError
    assert timeout - 0.5 < seconds < timeout + 2


def test_abort_ends_the_broadcast_of_another_thread_and_of_the_other_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the trainer does when it hears in another way that a server is gone: nobody waits for the time-out."""
    groups = open_all(3, timeout=60)
    errors: list[BaseException] = []
    waiting = threading.Barrier(3, timeout=30)
    real_wait = GlooGroup._wait

    def noted_wait(group: GlooGroup, *args: Any) -> None:
        waiting.wait()
        real_wait(group, *args)

    monkeypatch.setattr(GlooGroup, "_wait", noted_wait)

    def wait(group: GlooGroup) -> None:
        try:
            group.broadcast(torch.zeros(NBYTES), 2)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=wait, args=(group,)) for group in groups[:2]]
    for thread in threads:
        thread.start()
    waiting.wait()
    started = time.monotonic()
    groups[0].abort()
    for thread in threads:
        thread.join(10)
    seconds = time.monotonic() - started
    print(f"after {seconds:.2f} s: {errors}")
    assert sorted(str(error).rpartition(": ")[2] for error in errors) == [
        "another member gave up",
        "the group was aborted",
    ]
    assert seconds < 3
    groups[2].close()


def test_last_buffer_arrives_though_the_master_leaves_at_once() -> None:
    for _ in range(5):
        groups = open_all(3)
        received = [torch.zeros(NBYTES, dtype=torch.uint8) for _ in groups[1:]]
        with ThreadPoolExecutor(2) as executor:
            calls = [executor.submit(g.broadcast, t, 0) for g, t in zip(groups[1:], received, strict=True)]
            groups[0].broadcast(torch.ones(NBYTES, dtype=torch.uint8), 0)
            groups[0].close()
            for call in calls:
                call.result()
        assert all(tensor.all() for tensor in received)
        for group in groups[1:]:
            group.close()


def test_every_dtype_travels_from_any_rank() -> None:
    groups = open_all(3)
    for number, name in enumerate(DTYPE_SIZES):
        sent = torch.randint(0, 2, (3, 16), dtype=torch.uint8).view(getattr(torch, name))
        src = number % 3
        tensors = [sent if rank == src else torch.zeros_like(sent) for rank in range(3)]
        all_broadcast(groups, tensors, src)
        for tensor in tensors:
            assert torch.equal(tensor.view(torch.uint8), sent.view(torch.uint8))
    scalars = [torch.tensor(2.5), torch.tensor(0.0), torch.tensor(0.0)]
    all_broadcast(groups, scalars, 0)
    assert scalars == [2.5, 2.5, 2.5]
    for group in groups:
        group.close()
        group.close()


def test_trainers_own_group_is_not_disturbed() -> None:
    """A default group, if there is one, stays the default and works; if there is none, there is none afterwards."""
    groups = open_all(2)
    assert not torch.distributed.is_initialized()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        default = torch.distributed.group.WORLD
        groups += open_all(2)
        all_broadcast(groups[2:], [torch.ones(4), torch.zeros(4)], 0)
        assert torch.distributed.group.WORLD is default
        value = torch.ones(1)
        torch.distributed.all_reduce(value)
        assert value == 1
    finally:
        torch.distributed.destroy_process_group()
    all_broadcast(groups[:2], [torch.ones(4), torch.zeros(4)], 0)


def test_time_of_joining_is_not_the_time_of_a_broadcast() -> None:
    """A member that came late leaves the others their whole time for each operation."""
    listener = listen(HOST)
    port = int(listener.getsockname()[1])
    with ThreadPoolExecutor(2) as executor:
        first = executor.submit(open_group, HOST, port, 0, 2, master=True, timeout=4, listener=listener)
        threading.Event().wait(3)
        second = executor.submit(open_group, HOST, port, 1, 2, master=False, timeout=4)
        groups = [first.result(), second.result()]
        tensors = [torch.ones(4), torch.zeros(4)]
        receiving = executor.submit(groups[1].broadcast, tensors[1], 0)
        threading.Event().wait(2.5)
        groups[0].broadcast(tensors[0], 0)
        receiving.result()
    assert torch.equal(*tensors)


def test_taken_port_is_an_error_that_names_it() -> None:
    with listen(HOST) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=f"{HOST}:{port}"):
            open_group(HOST, port, 0, 2, master=True, timeout=5)


def test_member_that_does_not_come_is_a_timeout() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="as rank 0 of 2 took longer than 2 s"):
        open_group(HOST, 0, 0, 2, master=True, timeout=2)
    assert time.monotonic() - started < 6


def test_master_that_does_not_come_is_a_timeout() -> None:
    with listen(HOST) as unused:
        port = unused.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(OSError, match=f"{HOST}:{port} as rank 1 of 2"):
        open_group(HOST, port, 1, 2, master=False, timeout=2)
    assert time.monotonic() - started < 10


def test_interfaces_are_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    groups = open_all(2)
    all_broadcast(groups, [torch.ones(4), torch.zeros(4)], 0)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonesuch")
    with pytest.raises(OSError, match="GLOO_SOCKET_IFNAME=nonesuch"):
        open_group(HOST, 0, 0, 2, master=True, timeout=2)


def test_tensor_that_is_a_view_with_gaps_is_refused() -> None:
    groups = open_all(2)
    with pytest.raises(ValueError, match="contiguous"):
        groups[0].broadcast(torch.ones(4, 4)[:, :2], 0)
    assert not groups[0].closed


def test_stand_in_and_trainer_meet_over_vllms_store() -> None:
    """What TRL's worker does with its communicator, against the trainer's side: the tensor, then the barrier."""
    from vllm.distributed.utils import StatelessProcessGroup

    with listen(HOST) as unused:
        port = int(unused.getsockname()[1])
    weight = torch.zeros(3, 5, dtype=torch.bfloat16)

    def worker() -> None:
        group = StatelessProcessGroup.create(host="0.0.0.0", port=port, rank=0, world_size=2)
        communicator = StandInCommunicator(group, device=torch.device("cpu"))
        communicator.broadcast(weight, src=1)
        communicator.group.barrier()

    thread = threading.Thread(target=worker)
    thread.start()
    group = join_stateless_group(HOST, port, 1, 2, timeout=20)
    sent = torch.randn(3, 5).bfloat16()
    group.broadcast(sent, src=1)
    group.barrier()
    thread.join()
    assert torch.equal(weight, sent)
    # The worker, and its store with it, is gone.
    with pytest.raises(OSError, match=r"barrier"):
        group.barrier()
    assert group.closed
