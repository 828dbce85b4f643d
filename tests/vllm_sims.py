"""Simulated `vllm serve` processes for tests, and the calls that tests make on them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx

from trl_pool import VLLMClientPool
from trl_pool.sim import SimProcess
from trl_pool.sim.app import SimApp, create_app
from trl_pool.sim.engine import Weights, generate, tokenize
from trl_pool.sim.faults import Fault
from trl_pool.sim.sampling import Sampling

COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/inference/v1/generate"
RENDER = CHAT + "/render"
USER = {"role": "user", "content": "Hi"}
MODEL = "sim-model"
SHORT_SECONDS = 0.2  # long enough for an answer on a busy machine, when waiting to see that there is none

Answer = httpx.Response


class Apps(httpx.AsyncBaseTransport):
    """Simulated `vllm serve` in this process, by host name: enough where no connection has to break."""

    def __init__(self, **traits: dict[str, Any]) -> None:
        self.apps: dict[str, SimApp] = {}
        self.down: set[str] = set()
        self.requests: list[httpx.Request] = []
        for host, options in traits.items():
            self.start(host, **options)

    def start(self, host: str, **options: Any) -> None:
        """A server at this host, in place of the one before it."""
        self.apps[host] = create_app(**{"dialect": "vllm", **options})
        self.down.discard(host)

    @property
    def urls(self) -> list[str]:
        return [f"http://{host}:8000" for host in self.apps]

    def faults(self, host: str, kind: str, **fields: Any) -> None:
        """Switch a fault on, as `SimProcess.faults` does."""
        self.apps[host].faults.add(Fault(kind=kind, **fields))  # type: ignore[arg-type]

    def release(self, host: str, pool: VLLMClientPool) -> None:
        """No faults any more, and what hung because of one is answered; on the loop of the pool that asked."""
        self.apps[host].faults.clear()
        pool._portal.call(self.apps[host].gate.release)

    def asked(self, path: str) -> list[httpx.Request]:
        """The requests to a path."""
        return [request for request in self.requests if request.url.path == path]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if request.url.host in self.down:
            raise httpx.ConnectError("[Errno 111] Connection refused")
        app = httpx.ASGITransport(app=self.apps[request.url.host], raise_app_exceptions=False)
        return await app.handle_async_request(request)


Aside = Callable[..., Future[Answer]]


@contextmanager
def started(**traits: dict[str, Any]) -> Iterator[dict[str, SimProcess]]:
    """One server for each set of traits, all started at once."""
    sims = {name: SimProcess(dialect="vllm", **options) for name, options in traits.items()}
    try:
        for sim in sims.values():
            sim.wait_ready()
        yield sims
    finally:
        for sim in sims.values():
            sim.stop()


def post(sim: SimProcess, path: str, body: Any = None, timeout: float = 10.0, **arguments: Any) -> Answer:
    """One POST on a connection of its own."""
    with httpx.Client(trust_env=False, verify=False, timeout=timeout) as client:
        return client.post(sim.url + path, json=body, **arguments)


def get(sim: SimProcess, path: str, timeout: float = 10.0, **arguments: Any) -> Answer:
    """One GET on a connection of its own."""
    with httpx.Client(trust_env=False, verify=False, timeout=timeout) as client:
        return client.get(sim.url + path, **arguments)


def complete(sim: SimProcess, prompt: Any = "Hello", **fields: Any) -> dict[str, Any]:
    """The answer to `/v1/completions`, with token ids."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 6, "return_token_ids": True, **fields}
    answer: dict[str, Any] = post(sim, COMPLETIONS, body).raise_for_status().json()
    return answer


def tokens(sim: SimProcess, prompt: Any = "Hello", **fields: Any) -> list[list[int]]:
    """The token ids that it samples."""
    return [choice["token_ids"] for choice in complete(sim, prompt, **fields)["choices"]]


def expected(*prompts: str, weights: Weights | None = None, **fields: Any) -> list[list[int]]:
    """The token ids that the engine gives, whatever the dialect."""
    sampling = Sampling.checked({"max_tokens": 6, "logprobs": None, **fields})
    return generate([tokenize(p) for p in prompts], sampling, weights or Weights.checkpoint()).completion_ids


def events(answer: Answer) -> list[Any]:
    """The events of a stream; it must end with `[DONE]`."""
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def error(answer: Answer) -> tuple[int, str, str | None]:
    """Status, type and param of an OpenAI error, whose code must be the status."""
    found = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["code"] == answer.status_code
    assert found["message"]
    return answer.status_code, found["type"], found["param"]


@contextmanager
def aside_calls() -> Iterator[Aside]:
    """`send(call, …)`: makes a call in another thread and gives its future."""
    with ThreadPoolExecutor(8) as pool:
        yield pool.submit


def unspoilt(sim: SimProcess) -> SimProcess:
    """The server as it is after its start: started anew if a test has left something in it."""
    sim.clear_faults()
    state = sim.state()
    spoiled = (
        *("paused", "adapters", "communicator", "updating", "running", "waiting", "in_flight", "dead_worker"),
        *(
            ()
            if state["whole"] and state["weight_version"] == "default" and not state["weights"]["updates"]
            else ("pid",)
        ),
    )
    if any(state.get(name, True) for name in spoiled):
        sim.restart()
    sim.forget()
    return sim


class Tensor:
    """As much of a tensor as goes along with an announcement."""

    def __init__(self, *shape: int, dtype: str = "torch.bfloat16") -> None:
        self.shape, self.dtype = shape or (2, 3), dtype


class Parameter(Tensor):
    """As much of a parameter as is read."""

    @property
    def data(self) -> Tensor:
        return Tensor(*self.shape, dtype=self.dtype)


class Model:
    """A model of some parameters, which counts how often it was walked through."""

    def __init__(self, *names: str) -> None:
        self.names, self.walks = names or ("a", "b", "c"), 0

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        self.walks += 1
        yield from ((name, Parameter(3, 2)) for name in self.names)


class Walk:
    """Parameters to be read once: it knows on which thread that happened, and whether to the end."""

    def __init__(self, *names: str, raises_at: int | None = None, then: Callable[[int], Any] | None = None) -> None:
        self.names = names or ("a", "b", "c")
        self.metadata = [(name, "bfloat16", [2, 3]) for name in self.names]
        self.threads: set[int] = set()
        self.begun = self.read = 0
        self.ended = False
        self._raises_at, self._then = raises_at, then

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.begun += 1
        for place, name in enumerate(self.names):
            self.threads.add(threading.get_ident())
            if place == self._raises_at:
                raise ZeroDivisionError("a gather failed")
            if self._then is not None:
                self._then(place)
            yield name, Tensor()
            self.read += 1
        self.ended = True

    @property
    def whole(self) -> bool:
        """Whether it was read once, on this thread, to its end."""
        return (self.begun, self.ended, self.threads) == (1, True, {threading.get_ident()})


def told(sim: SimProcess) -> str:
    """The version of the weights that it says it has."""
    found: str = get(sim, "/weight_info").raise_for_status().json()["weight_version"]
    return found


CONTROL = frozenset(
    {"init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"}
    | {"reset_prefix_cache", "pause", "resume"}
)


def control_calls(sim: SimProcess) -> list[str]:
    """The control calls that a server has had, in order."""
    return [r["endpoint"] for r in sim.state()["requests"] if r["endpoint"] in CONTROL]
