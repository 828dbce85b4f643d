"""The main job in one minute, with no GPU and no vLLM: a training step over three servers, one of which dies.

    python examples/quickstart.py                                       # simulated servers
    python examples/quickstart.py --backends http://n1:8000,http://n2:8000   # real ones; nothing is killed

Needs the `server` extra: `pip install -e ".[server]"`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx

from trl_pool import PoolConfig, VLLMClientPool
from trl_pool.sim.process import SimProcess, hold_port, start_fleet

PROMPTS = [f"Question {i}: what is {i} + {i * 7 % 13}? Think step by step." for i in range(96)]
SAMPLING = {"n": 8, "max_tokens": 64, "temperature": 1.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", metavar="URL,URL", help="run on these servers instead of simulated ones")
    backends = parser.parse_args().backends
    # The pool reports a lost server as a warning; here it is the point, so it is shown.
    logging.basicConfig(level=logging.WARNING, format="  log: %(name)s: %(message)s")

    if backends:
        run(backends, fleet=[])
    else:
        # 12 ms per token: a step takes about a second, like a small model on one GPU.
        with start_fleet(3, decode_ms_per_token=12) as fleet:
            run([server.url for server in fleet], fleet)
    return 0


def run(backends: str | list[str], fleet: list[SimProcess]) -> None:
    config = PoolConfig(health_interval=0.5, request_timeout=300, total_timeout=600, progress=True)
    with VLLMClientPool(backends, connection_timeout=30, config=config) as client:
        say(f"A step of {len(PROMPTS)} prompts × {SAMPLING['n']} completions over {client.base_url}")
        answer = step(client)
        show(client)

        if fleet:
            victim = fleet[1]
            say(f"The next step, and {victim.url} is killed (SIGKILL) in the middle of it")
            threading.Timer(0.3, victim.kill).start()
            again = step(client)
            same = again["completion_ids"] == answer["completion_ids"]
            print(f"  all {len(PROMPTS)} prompts answered, in order; same tokens as before: {same}")
            show(client)

            say(f"{victim.url} is started again")
            victim.restart()
            wait_until(lambda: all(b.eligible for b in client.statistics().backends))
            before = prompts_served(client, victim.name)
            step(client)
            print(f"  back in use: it served {prompts_served(client, victim.name) - before} prompts of this step")
            show(client)

        urls = [backend.url for backend in client.statistics().backends]

    with gateway(urls) as url:
        say(f"The same servers through the gateway at {url}")
        body = {"prompts": PROMPTS[:12], "n": 2, "max_tokens": 16}
        response = httpx.post(f"{url}/generate/", json=body, timeout=120, trust_env=False).raise_for_status()
        print(f"  POST /generate/  {response.status_code}, {len(response.json()['completion_ids'])} completions,")
        print(f"  served by {response.headers['x-backend']}")
        response = httpx.post(
            f"{url}/generate/", json={"prompts": ["Hi"]}, headers={"x-session-id": "42"}, timeout=120, trust_env=False
        )
        print(f"  with x-session-id: 42 always by {response.raise_for_status().headers['x-backend']}")
        print(f"  GET /health/     {httpx.get(f'{url}/health/', trust_env=False).text}")


def step(client: VLLMClientPool) -> dict[str, list[list[int]]]:
    """One step of rollouts, as a trainer asks for it."""
    started = time.monotonic()
    answer = client.generate(PROMPTS, **SAMPLING)
    assert len(answer["completion_ids"]) == len(PROMPTS) * SAMPLING["n"]
    print(f"  {len(answer['completion_ids'])} completions in {time.monotonic() - started:.2f} s")
    return answer


def show(client: VLLMClientPool) -> None:
    """Who did what so far."""
    backends = client.statistics().backends
    total = sum(backend.prompts for backend in backends) or 1
    width = max(len(backend.url) for backend in backends)
    print(f"\n  {'server':{width}}  prompts  share  in flight  ejections  fail-overs  latency  state")
    for b in backends:
        latency = "-" if b.latency is None else f"{b.latency:.2f} s"
        print(
            f"  {b.url:{width}}  {b.prompts:7}  {b.prompts / total:5.0%}  {b.inflight:9}  {b.ejections:9}  "
            f"{b.failovers:10}  {latency:>7}  {b.reason or b.health}"
        )


def prompts_served(client: VLLMClientPool, name: str) -> int:
    return next(backend.prompts for backend in client.statistics().backends if backend.name == name)


@contextlib.contextmanager
def gateway(backends: list[str]) -> Iterator[str]:
    """`python -m trl_pool.server` as a child process."""
    held = hold_port("127.0.0.1")
    port = held.getsockname()[1] if held else 8080
    command = [sys.executable, "-m", "trl_pool.server", "--host", "127.0.0.1", "--port", str(port)]
    child = subprocess.Popen([*command, "--backends", ",".join(backends), "--log-level", "warning"])
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(f"{url}/readyz"))
        yield url
    finally:
        child.terminate()
        child.wait(timeout=30)
        if held:
            held.close()


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, trust_env=False).status_code == 200
    return False


def wait_until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the servers did not come up in time")
        time.sleep(0.05)


def say(text: str) -> None:
    print(f"\n== {text}")


if __name__ == "__main__":
    sys.exit(main())
