"""One client under measurement, in a process of its own: a line on its standard input is a call, and a line on its
standard output what the call cost.

Both clients find the same modules loaded, TRL's and so torch where they are installed: the collector's work depends on
how much a process holds, and a trainer holds all of these.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m tests.benchmarks.client_subject", description=__doc__)
    options.add_argument("--client", choices=("pool", "trl"), required=True)
    options.add_argument("--urls", required=True)
    options.add_argument("--prompts", type=Path, required=True, help="JSON file of token-id prompts")
    options.add_argument("--tokens", type=int, required=True)
    options.add_argument("--logprobs", type=int, required=True)
    given = options.parse_args()
    prompts = json.loads(given.prompts.read_text())
    replies, sys.stdout = sys.stdout, sys.stderr  # libraries that print do not garble the replies
    client = _client(given.client, given.urls)

    def call() -> dict[str, Any]:
        answer: dict[str, Any] = client.generate(prompts, max_tokens=given.tokens, logprobs=given.logprobs)
        return answer

    first = _memory(call)
    print(json.dumps({"trl": "trl" in sys.modules, **first}), file=replies, flush=True)
    for _ in sys.stdin:
        print(json.dumps(_cost(call)), file=replies, flush=True)
    if given.client == "pool":
        client.close()


def _client(name: str, urls: str) -> Any:
    try:
        from trl.generation.vllm_client import VLLMClient
    except ImportError:
        VLLMClient = None  # the pool can be measured without it
    from trl_pool import VLLMClientPool

    return VLLMClientPool(urls, connection_timeout=30) if name == "pool" else VLLMClient(urls, connection_timeout=30)


def _cost(call: Callable[[], dict[str, Any]]) -> dict[str, float]:
    """CPU seconds of all threads, and seconds, of a call, of the collector's look at the young objects that it leaves
    behind, and of their end."""
    gc.collect()
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    answer = call()
    gc.collect(1)
    del answer
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    return {"cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "wall": seconds}


def _memory(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Peak of the process's first call above what it held before, in bytes, and what it was answered, as a hash."""
    status = Path("/proc/self/status")
    gc.collect()
    peak: int | None = None
    if status.exists():
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = _kib(status, "VmRSS")
        answer = call()
        peak = (_kib(status, "VmHWM") - before) * 1024
    else:
        answer = call()
    # Text of the nested lists: equal only if every number and every nesting is.
    digest = hashlib.sha256()
    for key in sorted(answer):
        digest.update(f"{key}:".encode())
        for item in answer[key] or ():
            digest.update(repr(item).encode())
    return {"peak": peak, "digest": digest.hexdigest(), "completions": len(answer["completion_ids"])}


def _kib(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field + ":"))


if __name__ == "__main__":
    main()
