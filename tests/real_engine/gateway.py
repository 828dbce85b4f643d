"""`python -m trl_pool.server` as a child process."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import requests

from trl_pool.sim.process import hold_port

from .servers import HOST


@contextlib.contextmanager
def running_gateway(urls: Sequence[str], *options: str) -> Iterator[str]:
    """Its URL, once it is ready.

    Args:
        urls (`Sequence[str]`): The backends.
        options (`str`): Further words of its command line.
    """
    held = hold_port(HOST)
    assert held is not None, "these tests run on Linux"
    port = str(held.getsockname()[1])
    command = [sys.executable, "-m", "trl_pool.server", "--host", HOST, "--port", port, "--log-level", "warning"]
    process = subprocess.Popen([*command, "--backends", ",".join(urls), *options])
    url = f"http://{HOST}:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{url}/readyz", timeout=5).status_code == 200:
                    break
            assert time.monotonic() < deadline, "the gateway did not become ready"
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)
        held.close()
