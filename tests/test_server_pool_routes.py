"""Looking at the pool and changing it over HTTP, while it serves."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import httpx
import pytest
import uvicorn
from conftest import ask, eventually, received
from starlette.types import Receive, Scope, Send
from test_server_process import BODIES, Gateway, gateways, http

from trl_pool.sim import SimProcess
from trl_pool.sim.app import SimApp, create_app

Fleet = Callable[[int], list[SimProcess]]
Start = Callable[..., Gateway]
Background = Callable[..., Future[Any]]

gateway = pytest.fixture(gateways)

PROMPTS = [f"Question {i}" for i in range(8)]


def delete(gateway: Gateway, name: str, **query: Any) -> httpx.Response:
    return gateway.client.delete(f"/pool/backends/{name}", params=query)


# Looking


def test_backends_and_statistics_show_what_has_happened(fleet: Fleet, gateway: Start) -> None:
    sims = fleet(2)
    started = gateway(sims)
    started.post("generate", {"prompts": PROMPTS, "n": 2})
    backends = started.backends()
    assert [(b["name"], b["url"]) for b in backends] == [(sim.name, sim.url) for sim in sims]
    for backend in backends:
        assert backend["eligible"] is True
        assert backend["reason"] == ""
        assert (backend["health"], backend["breaker"], backend["draining"]) == ("up", "closed", False)
        assert (backend["inflight"], backend["load"]) == (0, 0)
        assert (backend["requests"], backend["prompts"], backend["failures"]) == (1, 4, 0)
        assert backend["latency"] > 0
    stats = started.client.get("/pool/stats").json()
    assert stats["backends"] == backends
    assert (stats["waiting"], stats["gate"]) == (0, None)
    assert stats["weight_version"].endswith(":0")


def test_what_is_under_way_shows(fleet: Fleet, gateway: Start, background: Background) -> None:
    (sim,) = fleet(1)
    started = gateway([sim])
    sim.faults("hang", endpoints=["generate"])
    answer = background(started.post, "generate", {"prompts": PROMPTS, "n": 2})
    eventually(lambda: started.inflight() == 1)
    assert started.backend(sim)["load"] == 16
    sim.clear_faults()
    assert answer.result().status_code == 200
    assert started.backend(sim)["load"] == 0


def test_the_process_lives_whatever_its_backends_do(gateway: Start) -> None:
    """It is not ready, for the reasons that it gives."""
    started = gateway(["127.0.0.1:1"])
    assert started.client.get("/livez").json() == {"status": "ok"}
    answer = started.client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["backends"] == {"http://127.0.0.1:1": "is down (connection refused)"}
    assert answer.headers["retry-after"] == "1"


def test_it_is_ready_with_one_backend_of_two(fleet: Fleet, gateway: Start) -> None:
    answer = gateway([*fleet(1), "127.0.0.1:1"]).client.get("/readyz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


# Adding


def test_an_added_backend_serves(fleet: Fleet, gateway: Start) -> None:
    """However its address is written; its answer is its name."""
    sims = fleet(2)
    started = gateway(sims[:1])
    answer = started.client.post("/pool/backends", json={"url": f" {sims[1].url}/ "})
    assert (answer.status_code, answer.json()) == (201, {"name": sims[1].name})
    served = started.post("generate", {"prompts": PROMPTS}).headers["x-backend"]
    assert set(served.split(", ")) == {sim.name for sim in sims}


def test_a_backend_that_is_not_up_yet_may_be_added(fleet: Fleet, gateway: Start) -> None:
    """It joins when it comes up."""
    sims = fleet(2)
    sims[1].kill()
    started = gateway(sims[:1])
    assert started.client.post("/pool/backends", json={"url": sims[1].url}).status_code == 201
    assert started.backend(sims[1])["reason"] == "is down (connection refused)"
    sims[1].restart()
    eventually(lambda: started.backend(sims[1])["eligible"])


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        ('{"url": "127.0.0.1:1/"}', 409, "backend http://127.0.0.1:1 is in the pool already"),
        ('{"url": "ftp://n1:21"}', 422, "allowed: http:// or https://"),
        ('{"url": ""}', 422, "no host"),
        ('{"url": "http://n1:1,http://n2:1"}', 422, "backend address"),
        ('{"url": "http://me:hunter2@n1:1"}', 422, "user name or password"),
        ('{"url": 5}', 422, "string_type"),
        ("{}", 422, "missing"),
        ("{", 400, "json_invalid"),
    ],
)
def test_an_address_that_cannot_be_added_is_refused(content: str, status: int, words: str, lone: Gateway) -> None:
    answer = lone.client.post("/pool/backends", content=content)
    assert answer.status_code == status
    assert words in str(answer.json()["detail"])
    assert "hunter2" not in answer.text
    assert len(lone.backends()) == 1


@pytest.fixture(scope="module")
def lone() -> Iterator[Gateway]:
    """A gateway whose one backend does not exist."""
    started = Gateway(["127.0.0.1:1"], health_interval=30)
    yield started
    started.close()


# Draining and removing


def test_a_drained_backend_finishes_and_gets_nothing_new(fleet: Fleet, gateway: Start, background: Background) -> None:
    """The answer comes at once; what is still out shows."""
    sims = fleet(2)
    started = gateway(sims)
    sims[1].faults("hang", endpoints=["generate"])
    running = background(started.post, "generate", {"prompts": PROMPTS})
    eventually(lambda: started.backend(sims[1])["inflight"] == 1)
    answer = started.client.post(f"/pool/backends/{sims[1].name}/drain")
    assert answer.status_code == 202
    assert (answer.json()["draining"], answer.json()["inflight"]) == (True, 1)
    assert started.post("generate", {"prompts": PROMPTS}).headers["x-backend"] == sims[0].name
    sims[1].clear_faults()
    assert set(running.result().headers["x-backend"].split(", ")) == {sim.name for sim in sims}
    assert started.backend(sims[1])["inflight"] == 0
    assert started.client.post(f"/pool/backends/{sims[1].name}/drain").status_code == 202  # again


def test_a_removed_backend_finishes_first(fleet: Fleet, gateway: Start, background: Background) -> None:
    sims = fleet(2)
    started = gateway(sims)
    sims[1].faults("hang", endpoints=["generate"])
    running = background(started.post, "generate", {"prompts": PROMPTS})
    eventually(lambda: started.backend(sims[1])["inflight"] == 1)
    removal = background(delete, started, sims[1].name)
    eventually(lambda: started.backend(sims[1])["draining"])
    assert not removal.done()
    sims[1].clear_faults()
    assert set(running.result().headers["x-backend"].split(", ")) == {sim.name for sim in sims}
    assert (removal.result().status_code, removal.result().json()) == (200, {"removed": sims[1].name})
    assert [b["name"] for b in started.backends()] == [sims[0].name]


@pytest.mark.parametrize("query", [{"drain": "false"}, {"timeout": 0.2}])
def test_a_backend_removed_in_the_middle_of_requests_costs_none_of_them(
    query: dict[str, Any], fleet: Fleet, gateway: Start, background: Background
) -> None:
    """They are broken off, at once or when their time is up, and served elsewhere."""
    sims = fleet(2)
    started = gateway(sims)
    sims[1].faults("hang", endpoints=["generate"])
    running = background(started.post, "generate", {"prompts": PROMPTS})
    eventually(lambda: started.backend(sims[1])["inflight"] == 1)
    assert delete(started, sims[1].name, **query).status_code == 200
    answer = running.result()
    assert answer.headers["x-backend"] == sims[0].name
    assert answer.json() == ask(sims[0], "generate", prompts=PROMPTS)


def test_backends_come_and_go_under_load(fleet: Fleet, gateway: Start, background: Background) -> None:
    """And no request fails."""
    sims = fleet(3)
    started = gateway(sims)
    expected = ask(sims[0], "generate", prompts=PROMPTS)
    done = False

    def client() -> int:
        count = 0
        with http(started.url) as own:
            while not done:
                answer = own.post("/generate/", json={"prompts": PROMPTS})
                assert (answer.status_code, answer.json()) == (200, expected)
                count += 1
        return count

    clients = [background(client) for _ in range(4)]
    for sim, drain in ((sims[0], "false"), (sims[1], "true"), (sims[2], "false"), (sims[0], "true")):
        assert delete(started, sim.name, drain=drain).status_code == 200
        before = sum(received(sims))
        eventually(lambda: sum(received(sims)) > before + 8)  # noqa: B023
        assert started.client.post("/pool/backends", json={"url": sim.url}).status_code == 201
    done = True
    assert all(one.result() for one in clients)
    assert started.inflight() == 0


def test_a_removed_backend_may_come_back(fleet: Fleet, gateway: Start) -> None:
    """Also without its slash or by its whole address; after the last is gone there is nobody."""
    (sim,) = fleet(1)
    started = gateway([sim])
    for name in (sim.name, sim.url, f"{sim.name}/", f"{sim.url}/"):
        assert (name, delete(started, name).status_code) == (name, 200)
        assert started.backends() == []
        answer = started.post("generate")
        assert (answer.status_code, answer.json()["backends"]) == (503, {})
        assert started.client.get("/health/").status_code == 503
        assert started.client.post("/pool/backends", json={"url": sim.url}).status_code == 201
        assert started.post("generate").status_code == 200


def test_an_unknown_backend_is_a_404_that_names_those_there_are(lone: Gateway) -> None:
    for answer in (delete(lone, "n9:1"), lone.client.post("/pool/backends/n9:1/drain")):
        assert (answer.status_code, answer.json()) == (404, {"detail": "no backend 'n9:1'; there are: 127.0.0.1:1"})


@pytest.mark.parametrize("query", [{"drain": "perhaps"}, {"timeout": "soon"}, {"timeout": 0}, {"timeout": "nan"}])
def test_a_malformed_query_is_a_422_and_removes_nobody(query: dict[str, Any], lone: Gateway) -> None:
    answer = delete(lone, "127.0.0.1:1", **query)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"][0] == "query"
    assert len(lone.backends()) == 1


# Behind a prefix


class Prefixed:
    """A simulated server as a reverse proxy shows it: below a path, and nowhere else."""

    def __init__(self, sim: SimApp, prefix: str) -> None:
        self.sim, self.prefix = sim, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        inside = scope["path"].startswith(f"{self.prefix}/")
        path = scope["path"].removeprefix(self.prefix) if inside else "/outside"
        await self.sim({**scope, "path": path, "raw_path": path.encode()}, receive, send)


@pytest.fixture
def prefixed() -> Iterator[str]:
    """`http://127.0.0.1:port/vllm/a`."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    app: Any = Prefixed(create_app(), "/vllm/a")
    server = uvicorn.Server(uvicorn.Config(app, loop="asyncio", log_config=None, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    eventually(lambda: server.started)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/vllm/a"
    server.should_exit = True
    thread.join(20)
    listener.close()


def test_a_backend_behind_a_path_prefix_is_a_backend_like_others(prefixed: str, fleet: Fleet, gateway: Start) -> None:
    (sim,) = fleet(1)
    name = prefixed.removeprefix("http://")
    started = gateway([f"{prefixed}/"])
    answer = started.post("generate")
    assert answer.headers["x-backend"] == name
    assert answer.json() == ask(sim, "generate", **BODIES["generate"])
    assert started.client.get("/health/").headers["x-forwarded-for"] == "127.0.0.1"
    assert started.client.get("/get_world_size/").json() == {"world_size": 1}
    for endpoint in ("init_communicator", "update_named_param", "reset_prefix_cache", "close_communicator"):
        answer = started.client.post(f"/{endpoint}", json=BODIES.get(endpoint))
        assert (endpoint, answer.status_code, list(answer.json()["results"])) == (endpoint, 200, [prefixed])
    for slash in ("", "/"):
        assert started.client.post(f"/pool/backends/{name}/drain{slash}").json()["name"] == name
        assert delete(started, f"{name}{slash}").json()["removed"].strip("/") == name
        assert started.client.post("/pool/backends", json={"url": prefixed}).json() == {"name": name}
