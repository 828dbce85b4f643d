"""A real server that dies in the middle of a step, and one that is busy for a long time."""

from __future__ import annotations

import threading
import time

import pytest
import requests

from trl_pool import PoolConfig, RolloutError, VLLMClientPool

from ..servers import TrlServer

PROMPTS = [[(11 * i + 5 * j) % 480 + 10 for j in range(6 + i % 7)] for i in range(96)]


def waits_for(condition, seconds: float) -> None:  # type: ignore[no-untyped-def]
    """Returns as soon as the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def generates(server: TrlServer) -> bool:
    """A `trl vllm-serve` that generates answers no probe."""
    try:
        requests.get(f"{server.url}/health/", timeout=0.5)
    except requests.Timeout:
        return True
    return False


def test_step_survives_the_death_of_a_server(mortal_servers: tuple[TrlServer, TrlServer]) -> None:
    """SIGKILL in mid-step: every prompt is answered, in order, the lost ones by the survivor."""
    survivor, victim = mortal_servers
    config = PoolConfig(request_timeout=120, total_timeout=240, health_interval=1.0)
    kwargs = {"ignore_eos": True}
    with VLLMClientPool([s.url for s in mortal_servers], connection_timeout=30, config=config) as pool:

        def kill_when_working() -> None:
            waits_for(lambda: all(b.inflight for b in pool.statistics().backends), 60)
            waits_for(lambda: generates(victim), 60)
            victim.kill()

        killer = threading.Thread(target=kill_when_working)
        killer.start()
        started = time.monotonic()
        answer = pool.generate(PROMPTS, n=4, max_tokens=128, generation_kwargs=kwargs)
        seconds = time.monotonic() - started
        killer.join()
        backends = {backend.url: backend for backend in pool.statistics().backends}
        print(f"{len(answer['completion_ids'])} completions in {seconds:.1f} s; {pool!r}")
        assert answer["prompt_ids"] == PROMPTS
        assert [len(ids) for ids in answer["completion_ids"]] == [128] * (4 * len(PROMPTS))
        assert [len(values) for values in answer["logprobs"]] == [128] * (4 * len(PROMPTS))
        # It was killed while it worked: its share moved, and the other one served everything.
        assert backends[victim.url].failovers >= len(PROMPTS) // 2
        assert backends[victim.url].prompts == 0
        assert backends[survivor.url].prompts == len(PROMPTS)
        waits_for(lambda: not pool.statistics().backends[1].eligible, 30)


def test_probes_of_a_busy_server_eject_nobody(two_servers: tuple[TrlServer, TrlServer]) -> None:
    """A `trl` server answers no probe while it generates; for 20 seconds of that it stays in the pool."""
    config = PoolConfig(health_interval=0.5, health_timeout=0.5, request_timeout=240, total_timeout=400)
    with VLLMClientPool(two_servers[0].url, connection_timeout=30, config=config) as pool:
        kwargs = {"ignore_eos": True}
        count = 32

        seen: set[tuple[str, str, bool]] = set()
        silent = 0
        finished = threading.Event()

        def watch() -> None:
            nonlocal silent
            while not finished.wait(0.25):
                backend = pool.statistics().backends[0]
                seen.add((backend.health, backend.breaker, backend.eligible))
                silent += backend.inflight > 0

        watcher = threading.Thread(target=watch)
        watcher.start()
        # How many prompts make 20 seconds depends on the machine, and on what else it does at the moment.
        while True:
            prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
            started = time.monotonic()
            answer = pool.generate(prompts, n=4, max_tokens=200, generation_kwargs=kwargs, logprobs=None)
            seconds = time.monotonic() - started
            assert len(answer["completion_ids"]) == 4 * len(prompts)
            if seconds >= 20:
                break
            count = int(count * min(26 / seconds, 16)) + 1
        finished.set()
        watcher.join()
        backend = pool.statistics().backends[0]
        print(f"{len(prompts)} prompts × 4 in {seconds:.1f} s, watched {silent} times: {seen}")
        assert seen == {("up", "closed", True)}
        assert (backend.ejections, backend.failures) == (0, 0)


def test_prompt_that_hangs_servers_takes_two_and_is_named(mortal_servers: tuple[TrlServer, TrlServer]) -> None:
    """Without `max_model_len` a poison prompt reaches the servers; the error names it, and the answers survive."""
    config = PoolConfig(request_timeout=8, total_timeout=60, backend_wait_seconds=0, health_interval=1.0)
    prompts = [*PROMPTS[:3], [7] * 300, *PROMPTS[3:6]]
    with VLLMClientPool([s.url for s in mortal_servers], connection_timeout=30, config=config) as pool:
        started = time.monotonic()
        with pytest.raises(RolloutError) as caught:
            pool.generate(prompts, max_tokens=4)
        error = caught.value
        print(f"after {time.monotonic() - started:.1f} s: {error}")
        assert 3 in error.failed
        assert len(error.failed[3]) <= 2
        assert error.result is None or len(error.result["completion_ids"]) == len(error.completed)
        assert sorted([*error.failed, *error.completed]) == list(range(len(prompts)))
