"""The class that stands in the place of TRL's `VLLMClient`."""

from __future__ import annotations

import base64
import contextlib
import gc
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from conftest import ask, eventually, quick, received
from pytest_httpx import HTTPXMock

import trl_pool
from trl_pool import (
    AsyncVLLMClientPool,
    BackendsUnreachableError,
    ConfigurationError,
    PoolClosedError,
    PoolConfig,
    RolloutError,
    RolloutTimeoutError,
    VLLMClientPool,
)
from trl_pool.sim import SimProcess

Fleet = Callable[[int], list[SimProcess]]
MakePool = Callable[..., VLLMClientPool]
Background = Callable[..., Future[Any]]

REQUIRED = inspect.Parameter.empty

SAMPLING = {
    "n": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "max_tokens": 16,
    "logprobs": 0,
    "structured_outputs_regex": None,
    "generation_kwargs": None,
}

# TRL 1.10, trl/generation/vllm_client.py: the methods of VLLMClient, their parameters in order and the defaults.
MIRRORED: dict[str, dict[str, Any]] = {
    "__init__": {
        "base_url": None,
        "host": "0.0.0.0",
        "server_port": 8000,
        "group_port": 51216,
        "connection_timeout": 0.0,
    },
    "check_server": {"total_timeout": 0.0, "retry_interval": 2.0},
    "generate": {"prompts": REQUIRED, "images": None, **SAMPLING},
    "chat": {
        "messages": REQUIRED,
        **SAMPLING,
        "chat_template_kwargs": None,
        "tools": None,
        "chat_template": None,
        "max_concurrent_requests": 64,
    },
    "get_sequence_logprobs": {
        "sequences": REQUIRED,
        "prompt_lengths": REQUIRED,
        "top_logprobs": 100,
        "temperature": 1.0,
        "use_binary": True,
        "chunk_size": 0,
        "max_concurrent_requests": 4,
    },
    "init_communicator": {"device": 0},
    "update_named_param": {"name": REQUIRED, "weights": REQUIRED},
    "update_named_params": {"metadata": REQUIRED, "named_params": REQUIRED},
    "weight_update": {},
    "image_features": {"images": REQUIRED, "max_concurrent_requests": 64},
    "get_server_info": {},
    "update_model_params": {"model": REQUIRED},
    "reset_prefix_cache": {},
    "close_communicator": {},
}


@pytest.mark.parametrize("kind", [VLLMClientPool, AsyncVLLMClientPool])
@pytest.mark.parametrize("method", MIRRORED)
def test_every_method_takes_what_trls_takes_in_its_order_and_more_by_keyword_only(kind: type, method: str) -> None:
    parameters = list(inspect.signature(getattr(kind, method)).parameters.values())[1:]
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == list(MIRRORED[method].items())
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not REQUIRED for p in parameters[len(positional) :])


@pytest.mark.parametrize(
    ("error", "mirrored"),
    [
        (trl_pool.BackendsUnreachableError, requests.ConnectionError),
        (trl_pool.NoBackendAvailableError, requests.ConnectionError),
        (trl_pool.RolloutError, requests.ConnectionError),
        (trl_pool.RolloutTimeoutError, requests.Timeout),
        (trl_pool.RolloutTimeoutError, requests.ConnectionError),
        (trl_pool.InvalidRequestError, ValueError),
        (trl_pool.ConfigurationError, ValueError),
        (trl_pool.PoolClosedError, RuntimeError),
        (trl_pool.ForkedProcessError, RuntimeError),
        (trl_pool.ControlError, RuntimeError),
        (trl_pool.WeightSyncError, RuntimeError),
        (trl_pool.UnknownBackendError, KeyError),
    ],
)
def test_what_trls_client_raises_catches_ours(error: type, mirrored: type) -> None:
    assert issubclass(error, mirrored)
    assert issubclass(error, trl_pool.PoolError)


# Construction


def healthy(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json={"status": "ok"})


@pytest.mark.parametrize(
    ("arguments", "urls"),
    [
        ({"base_url": "http://n1:8000"}, ["http://n1:8000"]),
        ({"base_url": "http://n1:8000/"}, ["http://n1:8000"]),
        ({"base_url": "n1:8000"}, ["http://n1:8000"]),
        ({"base_url": "http://n1:8000, http://n2:8000/,"}, ["http://n1:8000", "http://n2:8000"]),
        ({"base_url": ["http://n1:8000", "https://n2/vllm/"]}, ["http://n1:8000", "https://n2:443/vllm"]),
        ({"base_url": dict.fromkeys(["http://n1:8000", "http://n2:8000"])}, ["http://n1:8000", "http://n2:8000"]),
        ({"base_url": "http://[::1]:8000"}, ["http://[::1]:8000"]),
        ({"host": "10.0.0.1"}, ["http://10.0.0.1:8000"]),
        ({"host": "10.0.0.1", "server_port": 9000}, ["http://10.0.0.1:9000"]),
        ({"server_port": 9000}, ["http://0.0.0.0:9000"]),
        ({"host": "::1"}, ["http://[::1]:8000"]),
        ({}, ["http://0.0.0.0:8000"]),
    ],
    ids=str,
)
def test_servers_are_given_in_any_of_these_ways(arguments: dict[str, Any], urls: list[str]) -> None:
    with VLLMClientPool(**arguments, transport=httpx.MockTransport(healthy)) as pool:
        assert [b.url for b in pool.statistics().backends] == urls
        assert pool.base_url == ",".join(urls)


def test_without_an_address_backends_names_the_servers_and_the_settings_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BACKENDS", "http://n1:8000,http://n2:8000")
    monkeypatch.setenv("MAX_INFLIGHT_PER_BACKEND", "nonsense")
    with pytest.raises(ConfigurationError, match="MAX_INFLIGHT_PER_BACKEND='nonsense'"):
        VLLMClientPool(transport=httpx.MockTransport(healthy))
    monkeypatch.setenv("MAX_INFLIGHT_PER_BACKEND", "3")
    with VLLMClientPool(transport=httpx.MockTransport(healthy)) as pool:
        assert pool.base_url == "http://n1:8000,http://n2:8000"
    for arguments in ({"base_url": "http://n3:8000"}, {"server_port": 8003}):
        with VLLMClientPool(**arguments, transport=httpx.MockTransport(healthy)) as pool:  # type: ignore[arg-type]
            assert len(pool.statistics().backends) == 1


@pytest.mark.parametrize(
    ("base_url", "what"),
    [
        ("", "no backend address"),
        ([], "no backend address"),
        ("ftp://n1", "scheme 'ftp'"),
        ("http://n1:8000,http://n1:8000/", "listed twice"),
        ("http://n1:notaport", "notaport"),
        ("http://me:secret@n1:8000", "user name or password"),
        ("http://n1:8000?x=1", "query"),
    ],
)
def test_addresses_that_make_no_sense_are_refused(base_url: Any, what: str) -> None:
    with pytest.raises(ConfigurationError, match=what) as caught:
        VLLMClientPool(base_url)
    assert isinstance(caught.value, ValueError)
    assert "secret" not in str(caught.value)


def test_a_constructor_that_fails_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    for _ in range(3):
        with pytest.raises(ConfigurationError):
            VLLMClientPool("ftp://n1")
        with pytest.raises(BackendsUnreachableError):
            VLLMClientPool("http://127.0.0.1:1")
    assert threading.active_count() == before


def test_unknown_settings_and_values_out_of_range_are_refused() -> None:
    for settings in ({"cooldown": 3}, {"max_attempts": 0}, {"virtual_nodes": 10}, {"total_timeout": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            PoolConfig(**settings)  # type: ignore[arg-type]


# Waiting for servers


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def unavailable() -> Iterator[str]:
    """A server, or a proxy in front of one, that answers 503 for ever."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("kind", ["nobody", "silent", "unavailable", "unknown host"])
@pytest.mark.parametrize("timeout", [0.0, 0.7])
def test_the_connection_timeout_holds_whatever_the_server_does(
    request: pytest.FixtureRequest, kind: str, timeout: float
) -> None:
    others = {"nobody": "http://127.0.0.1:1", "unknown host": "http://no-such-host.invalid:8000"}
    url = others.get(kind) or request.getfixturevalue(kind)
    started = time.monotonic()
    with pytest.raises(requests.ConnectionError, match="0 of 1 vLLM servers reached") as caught:
        VLLMClientPool(url, connection_timeout=timeout, config=quick(health_timeout=0.5))
    seconds = time.monotonic() - started
    assert timeout <= seconds < max(timeout, 0.5) + 0.4
    assert url in str(caught.value)


def test_it_waits_for_all_servers_until_the_time_is_up_and_names_the_missing(
    fleet: Fleet, silent: str, unavailable: str, caplog: pytest.LogCaptureFixture
) -> None:
    sims = fleet(1)
    started = time.monotonic()
    urls = [sims[0].url, silent, unavailable]
    with VLLMClientPool(urls, connection_timeout=0.8, config=quick()) as pool:
        assert 0.8 <= time.monotonic() - started < 2
        assert [b.eligible for b in pool.statistics().backends] == [True, False, False]
        for url in urls[1:]:
            assert f"Starting without {url}" in caplog.text
        assert len(pool.generate(["a", "b"])["prompt_ids"]) == 2
    with pytest.raises(BackendsUnreachableError, match="min_backends=2") as caught:
        VLLMClientPool(urls, connection_timeout=0.3, config=quick(min_backends=2))
    assert list(caught.value.reasons) == urls[1:]


def test_it_goes_on_as_soon_as_all_servers_are_up(fleet: Fleet) -> None:
    sims = fleet(2)
    sims[1].restart(wait=False)
    started = time.monotonic()
    with VLLMClientPool([sim.url for sim in sims], connection_timeout=20, config=quick()) as pool:
        assert time.monotonic() - started < 10
        assert all(b.eligible for b in pool.statistics().backends)


def test_a_missing_server_joins_when_it_comes(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    sims[1].kill()
    pool = make_pool(sims, connection_timeout=0)
    pool.generate(["a", "b"])
    sims[1].restart()
    eventually(lambda: all(b.eligible for b in pool.statistics().backends))
    pool.generate(["a", "b"])
    assert received(sims) == [2, 1]


def test_check_server_can_be_called_again(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(1)
    pool = make_pool(sims)
    pool.check_server()
    sims[0].kill()
    eventually(lambda: not pool.statistics().backends[0].eligible)
    with pytest.raises(requests.ConnectionError):
        pool.check_server(0.2, 0.1)
    sims[0].restart(wait=False)
    pool.check_server(10, retry_interval=0.05)


# The end


USES: dict[str, Callable[[VLLMClientPool], Any]] = {
    "generate": lambda pool: pool.generate(["a"]),
    "chat": lambda pool: pool.chat([[{"role": "user", "content": "a"}]]),
    "get_sequence_logprobs": lambda pool: pool.get_sequence_logprobs([[1]], [0], top_logprobs=1),
    "check_server": lambda pool: pool.check_server(),
    "get_world_size": lambda pool: pool.get_world_size(),
    "init_communicator": lambda pool: pool.init_communicator(),
    "reset_prefix_cache": lambda pool: pool.reset_prefix_cache(),
    "close_communicator": lambda pool: pool.close_communicator(),
    "add_backend": lambda pool: pool.add_backend("http://n2:8000"),
    "drain_backend": lambda pool: pool.drain_backend("n1:8000"),
    "remove_backend": lambda pool: pool.remove_backend("n1:8000"),
    "statistics": lambda pool: pool.statistics(),
    "with": lambda pool: pool.__enter__().generate(["a"]),
}


@pytest.mark.parametrize("use", USES)
def test_after_close_every_use_is_a_clear_error(use: str) -> None:
    pool = VLLMClientPool("http://n1:8000", transport=httpx.MockTransport(healthy))
    pool.close()
    pool.close()
    assert repr(pool) == "<VLLMClientPool closed>"
    with pytest.raises(PoolClosedError, match="VLLMClientPool is closed; make a new one"):
        USES[use](pool)


def test_the_context_manager_closes_whatever_happened(fleet: Fleet) -> None:
    sims = fleet(1)
    before = threading.active_count()
    with contextlib.suppress(ZeroDivisionError), VLLMClientPool(sims[0].url) as pool:
        pool.generate(["a"])
        raise ZeroDivisionError
    assert repr(pool) == "<VLLMClientPool closed>"
    assert threading.active_count() == before
    eventually(lambda: sims[0].state()["connections"] == 0)


def test_close_ends_the_calls_of_other_threads_with_a_clear_error(fleet: Fleet, background: Background) -> None:
    sims = fleet(1)
    sims[0].faults("hang", endpoints=["generate"])
    pool = VLLMClientPool(sims[0].url, config=quick(max_inflight_per_backend=1))
    calls = [background(pool.generate, [f"prompt {i}"]) for i in range(3)]
    eventually(lambda: pool.statistics().waiting == 2 and pool.statistics().backends[0].inflight == 1)
    started = time.monotonic()
    pool.close()
    assert [type(call.exception()) for call in calls] == [PoolClosedError] * 3
    assert time.monotonic() - started < 2


def test_a_pool_that_nobody_holds_any_more_is_closed(fleet: Fleet) -> None:
    sims = fleet(1)
    before = threading.active_count()
    pool = VLLMClientPool(sims[0].url)
    del pool
    gc.collect()
    eventually(lambda: threading.active_count() == before)


def test_a_pool_that_is_collected_in_its_own_thread_is_closed() -> None:
    """Garbage in a cycle is collected in whichever thread comes along."""
    before = threading.active_count()
    collect = threading.Event()

    def handler(request: httpx.Request) -> httpx.Response:
        if collect.is_set():
            gc.collect()
        return healthy(request)

    gc.disable()
    try:
        pool = VLLMClientPool("http://n1:8000", transport=httpx.MockTransport(handler), config=quick())
        cycle: list[Any] = [pool]
        cycle.append(cycle)
        del pool, cycle
        collect.set()
        eventually(lambda: threading.active_count() == before)
    finally:
        gc.enable()


def script(body: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process that runs a script; it prints its marks and reads a line where it waits."""
    code = "import os, signal, sys, time\nfrom trl_pool import *\n" + inspect.cleandoc(body)
    root = str(Path(trl_pool.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )


def test_at_exit_communicators_are_closed_in_parallel_and_in_bounded_time(fleet: Fleet) -> None:
    """With one server dead and one that does not answer."""
    sims = fleet(3)
    process = script(
        """
        pool = VLLMClientPool(sys.argv[1:], config=PoolConfig(health_interval=60))
        pool.init_communicator()
        print("ready")
        input()
        """,
        *(sim.url for sim in sims),
    )
    with process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        assert [sim.state()["communicator"] for sim in sims] == [True] * 3
        sims[0].kill()
        sims[1].faults("hang", endpoints=["close_communicator"])
        started = time.monotonic()
        process.stdin.write("\n")
        process.stdin.flush()
        eventually(lambda: not sims[2].state()["communicator"], timeout=3)
        output = process.stdout.read()
        assert process.wait() == 0
        assert time.monotonic() - started < 8
        assert "Traceback" not in output
    agents = [r["user_agent"] for r in sims[2].state()["requests"] if r["endpoint"] == "close_communicator"]
    assert len(agents) == 2
    assert all(agent.startswith("trl_pool/") for agent in agents)


def test_a_pool_that_is_not_closed_does_not_keep_the_process_alive(fleet: Fleet) -> None:
    sims = fleet(1)
    with script("pool = VLLMClientPool(sys.argv[1])\npool.generate(['a'])", sims[0].url) as process:
        output, _ = process.communicate(timeout=10)
    assert (process.returncode, output) == (0, "")


def test_a_forked_child_can_neither_use_nor_close_the_pool_of_its_parent(fleet: Fleet) -> None:
    sims = fleet(1)
    process = script(
        """
        pool = VLLMClientPool(sys.argv[1])
        pool.init_communicator()
        child = os.fork()
        if child == 0:
            for use in (lambda: pool.generate(["a"]), pool.check_server, lambda: pool.add_backend("n2")):
                try:
                    use()
                except ForkedProcessError as error:
                    print("refused" if "forked child" in str(error) else error)
            repr(pool)
            pool.close()
            pool.__del__()
            sys.exit(3)  # its exit handlers run
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print(len(pool.generate(["a"])["prompt_ids"]))
        print("waiting")
        input()
        pool.close()
        """,
        sims[0].url,
    )
    with process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(6)]
        assert lines == ["refused\n"] * 3 + ["3\n", "1\n", "waiting\n"]
        assert sims[0].state()["communicator"], "the child has closed it"
        assert received(sims, "close_communicator") == [1]
        output, _ = process.communicate("\n", timeout=10)
        assert (process.returncode, output) == (0, "")
    assert not sims[0].state()["communicator"]


def test_ctrl_c_ends_a_call_at_once_and_the_pool_stays_usable(fleet: Fleet) -> None:
    sims = fleet(1)
    sims[0].faults("slow", seconds=1.5, times=1)
    process = script(
        """
        pool = VLLMClientPool(sys.argv[1])
        try:
            pool.generate(["a"])
        except KeyboardInterrupt:
            print("interrupted", pool.statistics().backends[0].inflight)
        print(len(pool.generate(["a"])["prompt_ids"]))
        """,
        sims[0].url,
    )
    with process:
        assert process.stdout is not None
        eventually(lambda: sims[0].state()["in_flight"])
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline().startswith("interrupted ")
        assert time.monotonic() - started < 1
        assert process.stdout.readline() == "1\n"


def test_ctrl_c_that_nobody_catches_ends_the_process_within_a_second(fleet: Fleet) -> None:
    sims = fleet(1)
    sims[0].faults("hang", endpoints=["generate"])
    with script("VLLMClientPool(sys.argv[1]).generate(['a'])", sims[0].url) as process:
        eventually(lambda: sims[0].state()["in_flight"])
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(5)
        assert time.monotonic() - started < 1.5
    assert process.returncode != 0


# Without servers


class Recorder:
    """A mocked server that remembers bodies and answers every prompt with one token."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return healthy(request)
        body = json.loads(request.content)
        self.bodies.append(body)
        units = body.get("prompts") or body.get("messages")
        answer = {"prompt_ids": [[1]] * len(units), "completion_ids": [[2]] * len(units)}
        return httpx.Response(200, json={**answer, "logprobs": None, "logprob_token_ids": None})


PNG = b"\x89PNG\r\n\x1a\n"


class Image:
    """As much of a PIL image as is needed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def save(self, file: Any, format: str) -> None:
        assert format == "PNG"
        file.write(PNG + self.name.encode())


def png(name: str) -> str:
    return base64.b64encode(PNG + name.encode()).decode()


def test_a_script_can_be_tested_with_a_mocked_transport() -> None:
    server = Recorder()
    with VLLMClientPool("http://n1:8000", transport=httpx.MockTransport(server)) as pool:
        result = pool.generate(["a", "b"], max_tokens=1, logprobs=None)
    assert result == {
        "prompt_ids": [[1], [1]],
        "completion_ids": [[2], [2]],
        "logprobs": None,
        "logprob_token_ids": None,
    }


def test_a_body_is_what_trls_client_sends() -> None:
    server = Recorder()
    with VLLMClientPool("http://n1:8000", transport=httpx.MockTransport(server)) as pool:
        pool.generate(["a"])
        pool.chat([[{"role": "user", "content": "a"}]], tools=[{"name": "f"}], chat_template_kwargs={"x": 1})
    sampling = {**SAMPLING, "generation_kwargs": {}}
    assert server.bodies == [
        {"prompts": ["a"], "images": None, **sampling},
        {
            "messages": [[{"role": "user", "content": "a"}]],
            **sampling,
            "chat_template_kwargs": {"x": 1},
            "tools": [{"name": "f"}],
        },
    ]


def test_a_script_can_be_tested_with_pytest_httpx(httpx_mock: HTTPXMock) -> None:
    httpx_mock.add_response(url="http://n1:8000/health/", json={"status": "ok"}, is_reusable=True)
    httpx_mock.add_response(
        url="http://n1:8000/generate/",
        json={"prompt_ids": [[1]], "completion_ids": [[2]], "logprobs": None, "logprob_token_ids": None},
    )
    with VLLMClientPool("http://n1:8000") as pool:
        assert pool.generate(["a"], logprobs=None)["completion_ids"] == [[2]]
    assert json.loads(httpx_mock.get_requests(method="POST")[0].content)["prompts"] == ["a"]


def test_images_travel_as_png_with_their_prompts() -> None:
    server = Recorder()
    prompts = [f"prompt {i}" for i in range(4)]
    images = [[Image("0a"), Image("0b")], None, [Image("2")], []]
    urls = ["http://n1:8000", "http://n2:8000"]
    with VLLMClientPool(urls, transport=httpx.MockTransport(server)) as pool:
        pool.generate(prompts, images)
        with pytest.raises(ValueError, match="one per prompt"):
            pool.generate(prompts, images[:3])
    sent = {p: i for body in server.bodies for p, i in zip(body["prompts"], body["images"], strict=True)}
    assert sent == {"prompt 0": [png("0a"), png("0b")], "prompt 1": None, "prompt 2": [png("2")], "prompt 3": []}


def test_images_in_conversations_travel_as_png_and_the_callers_stay_images() -> None:
    server = Recorder()
    image = Image("x")
    parts = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": "What is it?"}]
    with VLLMClientPool("http://n1:8000", transport=httpx.MockTransport(server)) as pool:
        pool.chat([[{"role": "user", "content": parts}]])
    assert server.bodies[0]["messages"][0][0]["content"][0] == {"type": "image_pil", "image_pil": png("x")}
    assert parts[0]["image_pil"] is image


def test_a_chat_template_is_refused_as_by_trls_client() -> None:
    with (
        VLLMClientPool("http://n1:8000", transport=httpx.MockTransport(healthy)) as pool,
        pytest.raises(NotImplementedError, match="chat template"),
    ):
        pool.chat([[{"role": "user", "content": "a"}]], chat_template="{{ messages }}")


def test_messages_without_a_role_or_a_content_are_refused_by_index() -> None:
    with VLLMClientPool("http://n1:8000", transport=httpx.MockTransport(healthy)) as pool:
        good = {"role": "user", "content": "a"}
        for bad in ([], [{"role": "user"}], [good, {"content": "a"}]):
            with pytest.raises(ValueError, match="conversation 1"):
                pool.chat([[good], bad])


def test_what_is_no_json_cannot_be_sent_and_says_so() -> None:
    with VLLMClientPool("http://n1:8000", transport=httpx.MockTransport(Recorder())) as pool:
        with pytest.raises((TypeError, ValueError)):
            pool.generate(["a"], generation_kwargs={"extra_args": {"x": object()}})
        assert pool.statistics().backends[0].inflight == 0
        assert len(pool.generate(["a"])["prompt_ids"]) == 1


def test_many_threads_share_a_pool(fleet: Fleet, make_pool: MakePool, background: Background) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    calls = [background(pool.generate, [f"thread {i}", "shared"]) for i in range(24)]
    for i, call in enumerate(calls):
        assert call.result() == ask(sims[0], "generate", prompts=[f"thread {i}", "shared"])


def test_errors_of_a_mocked_transport_are_those_of_a_server() -> None:
    def broken(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return healthy(request)
        raise httpx.ReadTimeout("too slow", request=request)

    urls = ["http://n1:8000", "http://n2:8000", "http://n3:8000"]
    with VLLMClientPool(urls, transport=httpx.MockTransport(broken), config=quick()) as pool:
        with pytest.raises(RolloutError, match="timed out") as caught:
            pool.generate(["a"])
        assert len(caught.value.attempts) == 2, "a prompt that has cost two servers goes to no third"
        assert not isinstance(caught.value, RolloutTimeoutError)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda pool: pool.chat([{"role": "user", "content": "hi"}]), "needs a list around it"),
        (lambda pool: pool.chat(["hi"]), "item 0 is a str"),
        (lambda pool: pool.chat([["hi"]]), "conversation 0 has a str"),
        (lambda pool: pool.chat([[{"role": "user", "content": [None]}]]), "no dictionary"),
        (lambda pool: pool.generate(["a"], images=["picture"]), "one list of images per prompt"),
    ],
)
def test_arguments_of_the_wrong_shape_are_named(call: Callable[[Any], Any], what: str) -> None:
    with (
        VLLMClientPool("http://n1:8000", transport=httpx.MockTransport(healthy)) as pool,
        pytest.raises(trl_pool.InvalidRequestError, match=what),
    ):
        call(pool)
