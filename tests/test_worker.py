"""Calls that may never return run on a thread that keeps nobody."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import Any

import pytest
from conftest import eventually

from trl_pool.weights.worker import DaemonWorker


def named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_calls_run_one_after_the_other_on_one_daemon_thread_of_that_name() -> None:
    seen: list[tuple[int, threading.Thread]] = []

    async def main() -> None:
        worker = DaemonWorker("test-order")
        assert named("test-order") == [], "none before the first call"

        def call(value: int) -> int:
            seen.append((value, threading.current_thread()))
            return 2 * value

        assert await asyncio.gather(*(worker.run(call, i) for i in range(20))) == [2 * i for i in range(20)]
        worker.close()

    asyncio.run(main())
    assert [value for value, _ in seen] == list(range(20))
    (thread,) = {thread for _, thread in seen}
    assert (thread.name, thread.daemon) == ("test-order", True)
    eventually(lambda: not thread.is_alive())


def test_what_a_call_raises_is_raised_and_the_next_one_runs() -> None:
    def fail() -> None:
        raise ConnectionError("the group is over")

    async def main() -> None:
        worker = DaemonWorker("test-failure")
        with pytest.raises(ConnectionError, match="the group is over"):
            await worker.run(fail)
        assert await worker.run(lambda: 7) == 7
        worker.close()
        worker.close()

    asyncio.run(main())


def test_a_call_that_hangs_is_left_behind_and_those_behind_it_are_never_made() -> None:
    hangs, made = threading.Event(), []

    async def main() -> None:
        worker = DaemonWorker("test-hang")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await worker.run(hangs.wait)
        behind = asyncio.ensure_future(worker.run(made.append, "behind"))
        await asyncio.sleep(0)
        behind.cancel()
        worker.close()
        other = DaemonWorker("test-hang")
        assert await other.run(lambda: 7) == 7
        other.close()

    asyncio.run(main())
    (thread,) = eventually(lambda: named("test-hang") if len(named("test-hang")) == 1 else None)
    hangs.set()
    eventually(lambda: not thread.is_alive())
    assert made == []


def test_a_result_that_comes_after_its_loop_has_closed_hurts_nobody() -> None:
    late, begun = threading.Event(), threading.Event()

    def call() -> str:
        begun.set()
        late.wait()
        return "late"

    async def main() -> None:
        task = asyncio.ensure_future(DaemonWorker("test-late").run(call))
        await asyncio.to_thread(begun.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    (thread,) = named("test-late")
    late.set()
    assert thread.is_alive()  # it waits for its next call, as any thread of a worker that nobody has closed


def test_the_last_call_ends_the_thread() -> None:
    async def main() -> Any:
        return await DaemonWorker("test-last").run_last(threading.current_thread)

    thread = asyncio.run(main())
    assert thread.name == "test-last"
    eventually(lambda: not thread.is_alive())


def test_a_hanging_call_does_not_keep_the_process_from_ending() -> None:
    code = """
import asyncio, threading
from trl_pool.weights.worker import DaemonWorker

async def main():
    worker = DaemonWorker("hangs")
    begun = threading.Event()
    task = asyncio.ensure_future(worker.run(lambda: (begun.set(), threading.Event().wait())))
    await asyncio.to_thread(begun.wait)
    task.cancel()

asyncio.run(main())
print("over")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "over\n"
