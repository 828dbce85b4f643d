"""The gateway's routes: every one of them, with and without slash, and answers as a single server gives them."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import eventually
from test_server_process import BODIES, CONVERSATION, Gateway, gateways, http

from trl_pool._version import __version__
from trl_pool.sim import SimProcess

Fleet = Callable[[int], list[SimProcess]]
Start = Callable[..., Gateway]

gateway = pytest.fixture(gateways)

GETS = ("health", "get_world_size", "livez", "readyz", "pool/backends", "pool/stats")
POSTS = ("generate", "chat", "get_sequence_logprobs")
CONTROL = ("init_communicator", "update_named_param", "reset_prefix_cache", "close_communicator")

PROMPTS = [f"Question {i}: what is {i} times {i % 7}?" for i in range(12)]
SCORED = {"sequences": [list(range(10, 11 + i)) for i in range(7)], "prompt_lengths": [0, 1, 1, 2, 5, 3, 6]}
CONVERSATIONS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
# The smallest picture there is: one grey pixel.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
TOOLS = [{"type": "function", "function": {"name": "look"}}]

SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "one prompt": ("generate", {"prompts": ["Hello"]}),
    "prompts": ("generate", {"prompts": PROMPTS, "n": 3, "max_tokens": 7}),
    "token ids": ("generate", {"prompts": [[1, 2, 3], [4], [5, 6], [7]], "logprobs": 3, "temperature": 0.7}),
    "no logprobs": ("generate", {"prompts": PROMPTS, "logprobs": None}),
    "n in generation_kwargs": (
        "generate",
        {"prompts": PROMPTS, "n": 1, "generation_kwargs": {"n": 2, "seed": 7, "logprobs": 2}},
    ),
    "images": ("generate", {"prompts": PROMPTS[:3], "images": [[PNG], None, [PNG, PNG]]}),
    "empty list of images": ("generate", {"prompts": PROMPTS[:3], "images": []}),
    "numbers as text": ("generate", {"prompts": PROMPTS, "n": "2", "temperature": "0.5", "max_tokens": 4.0}),
    "fields that nobody knows": ("generate", {"prompts": PROMPTS, "of_the_future": 1}),
    "no prompts": ("generate", {"prompts": []}),
    "chat": ("chat", {"messages": CONVERSATIONS, "n": 2, "max_tokens": 5}),
    "chat with tools": (
        "chat",
        {"messages": CONVERSATIONS[:4], "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}},
    ),
    "chat in parts": ("chat", {"messages": [[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]]}),
    "no conversations": ("chat", {"messages": []}),
    "scores": ("get_sequence_logprobs", {**SCORED, "top_logprobs": 4}),
    "scores at a temperature": ("get_sequence_logprobs", {**SCORED, "top_logprobs": 1, "temperature": 0.5}),
    "binary scores": ("get_sequence_logprobs", {**SCORED, "top_logprobs": 4, "response_format": "binary"}),
    "no scores": ("get_sequence_logprobs", {"sequences": [], "prompt_lengths": [], "top_logprobs": 4}),
    "no binary scores": (
        "get_sequence_logprobs",
        {"sequences": [], "prompt_lengths": [], "top_logprobs": 4, "response_format": "binary"},
    ),
    "nothing completed to score": (
        "get_sequence_logprobs",
        {"sequences": [[1], [2, 3]], "prompt_lengths": [1, 2], "top_logprobs": 4, "response_format": "binary"},
    ),
}


def direct(sim: SimProcess, endpoint: str, body: Any) -> httpx.Response:
    """What the server itself answers."""
    with http(sim.url) as client:
        return client.post(f"/{endpoint}/", json=body)


# Paths


@pytest.mark.parametrize("slash", ["", "/"])
def test_every_path_answers_with_and_without_slash(slash: str, fleet: Fleet, gateway: Start) -> None:
    """At once, with no redirect."""
    (sim,) = fleet(1)
    with http(gateway([sim]).url, follow_redirects=False) as client:
        for path in GETS:
            assert client.get(f"/{path}{slash}").status_code == 200, path
        for path in (*POSTS, *CONTROL):  # in this order they make a whole weight update
            assert client.post(f"/{path}{slash}", json=BODIES.get(path)).status_code == 200, path
        assert client.post(f"/pool/backends{slash}", json={"url": "127.0.0.1:1"}).status_code == 201
        assert client.post(f"/pool/backends/127.0.0.1:1/drain{slash}").status_code == 202
        assert client.delete(f"/pool/backends/127.0.0.1:1{slash}").status_code == 200


@pytest.mark.parametrize("path", ["/", "/nothing", "/generate/more", "/v1/nothing", "/pool", "//generate/"])
def test_an_unknown_path_is_a_404_in_json(path: str, gateway: Start) -> None:
    answer = httpx.get(gateway(["127.0.0.1:1"]).url + path, trust_env=False)
    assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})
    assert answer.headers["x-request-id"]


def test_the_documentation_is_served(gateway: Start) -> None:
    """With every documented path, and the bodies that they take."""
    client = gateway(["127.0.0.1:1"]).client
    assert "swagger" in client.get("/docs").text.lower()
    described = client.get("/openapi.json").json()
    assert described["info"]["version"] == __version__
    assert {f"/{path}/" for path in (*GETS[:2], *POSTS, *CONTROL)} <= described["paths"].keys()
    assert {f"/{path}" for path in GETS[2:]} <= described["paths"].keys()
    for path in BODIES:
        operation = described["paths"][f"/{path}/"]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        assert set(schema["required"]) <= BODIES[path].keys() <= schema["properties"].keys()
        assert operation["description"]


# Answers


@pytest.mark.parametrize("n", [1, 3])
def test_answers_are_those_of_a_single_server(n: int, fleet: Fleet, gateway: Start) -> None:
    """Whatever is asked, over one server and over three: the same keys and values, lists in the same order."""
    sims = fleet(3)
    started = gateway(sims[:n])
    for name, (endpoint, body) in SAME.items():
        expected = direct(sims[0], endpoint, body)
        answer = started.post(endpoint, body)
        assert (expected.status_code, answer.status_code) == (200, 200), f"{name}: {answer.text}"
        assert answer.json() == expected.json(), name
        assert answer.headers["content-type"] == "application/json"


def test_a_batch_is_spread_and_x_backend_names_who_served(fleet: Fleet, gateway: Start) -> None:
    sims = fleet(3)
    answer = gateway(sims).post("generate", {"prompts": PROMPTS})
    assert set(answer.headers["x-backend"].split(", ")) == {sim.name for sim in sims}
    requests = [sim.state()["requests"] for sim in sims]
    assert [[r["prompts"] for r in of_sim if r["endpoint"] == "generate"] for of_sim in requests] == [[4]] * 3


def test_binary_scores_are_packed_again_with_padding(fleet: Fleet, gateway: Start) -> None:
    """Servers pad to the longest completion among their own; the gateway to the longest of all, with -inf and 0."""
    sims = fleet(3)
    body = {**SCORED, "top_logprobs": 4, "response_format": "binary"}
    answer = gateway(sims).post("get_sequence_logprobs", body)
    assert ", " in answer.headers["x-backend"]
    fields = answer.json()
    lengths = [len(s) - p for s, p in zip(SCORED["sequences"], SCORED["prompt_lengths"], strict=True)]
    assert fields["completion_lengths"] == lengths
    assert fields["shape"] == [7, max(lengths), 4]
    logprobs = np.frombuffer(base64.b64decode(fields["logprobs_b64"]), np.float32).reshape(fields["shape"])
    token_ids = np.frombuffer(base64.b64decode(fields["token_ids_b64"]), np.int32).reshape(fields["shape"])
    for row, length in enumerate(lengths):
        assert np.isneginf(logprobs[row, length:]).all()
        assert not token_ids[row, length:].any()
    assert fields["logprobs_b64"] == direct(sims[0], "get_sequence_logprobs", body).json()["logprobs_b64"]


def test_a_backends_session_stays_with_it(fleet: Fleet, gateway: Start) -> None:
    """Whatever the prompts, and as a whole; other sessions go elsewhere."""
    started = gateway(fleet(3), sticky_header="X-Episode")
    served = [started.post("generate", {"prompts": PROMPTS[i:]}, x_episode="7").headers["x-backend"] for i in range(8)]
    assert len(set(served)) == 1
    assert ", " not in served[0]
    chatted = started.post("chat", {"messages": [CONVERSATION]}, X_EPISODE="7")
    assert chatted.headers["x-backend"] == served[0]
    homes = {started.post("generate", x_episode=str(i)).headers["x-backend"] for i in range(20)}
    assert len(homes) == 3


def test_the_header_of_another_name_is_no_session(fleet: Fleet, gateway: Start) -> None:
    started = gateway(fleet(3), sticky_header="x-episode")
    answer = started.post("generate", {"prompts": PROMPTS}, x_session_id="7")
    assert ", " in answer.headers["x-backend"]


def test_batches_are_not_split_if_so_set(fleet: Fleet, gateway: Start) -> None:
    """A request goes as a whole to the backend of its first prompt, over which equal prefixes meet."""
    started = gateway(fleet(3), split_batches=False)
    for prompt in PROMPTS[:4]:
        served = {
            started.post("generate", {"prompts": [prompt, *others]}).headers["x-backend"]
            for others in ([], PROMPTS, PROMPTS[6:])
        }
        assert len(served) == 1
        assert ", " not in served.pop()


def test_equal_prefixes_meet_on_one_backend(fleet: Fleet, gateway: Start) -> None:
    started = gateway(fleet(3), prompt_sticky_prefix_chars=10)
    served = {started.post("generate", {"prompts": [f"The prefix{i}"]}).headers["x-backend"] for i in range(6)}
    assert len(served) == 1


# Request ids


def test_a_request_id_is_kept_and_passed_on(fleet: Fleet, gateway: Start) -> None:
    (sim,) = fleet(1)
    answer = gateway([sim]).post("generate", X_Request_Id="step-17/a b")
    assert answer.headers.get_list("x-request-id") == ["step-17/a b"]
    assert [r["x_request_id"] for r in sim.state()["requests"] if r["endpoint"] == "generate"] == ["step-17/a b"]


def test_a_request_without_an_id_gets_one(fleet: Fleet, gateway: Start) -> None:
    (sim,) = fleet(1)
    started = gateway([sim])
    ids = [started.post("generate").headers["x-request-id"] for _ in range(3)]
    assert len(set(ids)) == 3
    assert [r["x_request_id"] for r in sim.state()["requests"] if r["endpoint"] == "generate"] == ids


@pytest.mark.parametrize("value", [b"", b"x" * 129, b"caf\xc3\xa9", b"a\tb"])
def test_an_id_that_is_no_token_is_replaced(value: bytes, gateway: Start) -> None:
    started = gateway(["127.0.0.1:1"])
    answer = started.client.get("/livez", headers={b"x-request-id": value})
    assert answer.headers["x-request-id"].encode("latin-1") != value
    assert len(answer.headers["x-request-id"]) == 16


def test_every_answer_has_an_id(fleet: Fleet, gateway: Start) -> None:
    """Errors, too."""
    started = gateway(fleet(1))
    answers = [
        started.client.get("/nothing", headers={"x-request-id": "a"}),
        started.client.get("/generate/", headers={"x-request-id": "a"}),
        started.client.post("/generate/", content=b"{", headers={"x-request-id": "a"}),
        started.client.get("/health/", headers={"x-request-id": "a"}),
    ]
    assert [answer.status_code for answer in answers] == [404, 405, 400, 200]
    assert [answer.headers["x-request-id"] for answer in answers] == ["a"] * 4


# Health and world size


def test_health_counts_the_eligible_and_names_the_others(fleet: Fleet, gateway: Start) -> None:
    sims = fleet(2)
    started = gateway(sims)
    assert started.client.get("/health/").json() == {"status": "ok", "eligible": 2, "not_eligible": {}}
    sims[1].kill()
    answer = eventually(lambda: (a := started.client.get("/health/")).json()["eligible"] == 1 and a)
    assert answer.status_code == 200
    assert answer.json()["not_eligible"] == {sims[1].url: "is down (connection refused)"}
    sims[0].kill()
    answer = eventually(lambda: (a := started.client.get("/health/")).status_code == 503 and a)
    assert answer.json()["backends"] == {sim.url: "is down (connection refused)" for sim in sims}
    assert "No backend available" in answer.json()["detail"]
    assert int(answer.headers["retry-after"]) >= 1


def test_a_single_backends_address_is_told_as_the_stock_client_reads_it(fleet: Fleet, gateway: Start) -> None:
    """`X-Forwarded-For` of the health answer is its rendezvous host: with several servers none would be right."""
    sims = fleet(2)
    started = gateway([f"http://localhost:{sims[0].port}"])
    assert started.client.get("/health/").headers["x-forwarded-for"] in ("127.0.0.1", "::1")
    assert "x-forwarded-for" not in gateway(sims).client.get("/health/").headers
    started.client.post("/pool/backends", json={"url": sims[1].url})
    assert "x-forwarded-for" not in started.client.get("/health/").headers


def test_world_size_is_that_of_one_backend(gateway: Start) -> None:
    """And a conflict that names them when they differ."""
    with (
        SimProcess(tensor_parallel_size=2) as two,
        SimProcess(tensor_parallel_size=2) as too,
        SimProcess(data_parallel_size=3) as three,
    ):
        assert gateway([two, too]).client.get("/get_world_size/").json() == {"world_size": 2}
        answer = gateway([two, three]).client.get("/get_world_size/")
        assert answer.status_code == 409
        results = answer.json()["results"]
        assert {url: result["message"] for url, result in results.items()} == {two.url: "has 2", three.url: "has 3"}
        assert two.url in answer.json()["detail"]
        assert three.url in answer.json()["detail"]


def test_world_size_is_that_of_the_backends_that_answer(fleet: Fleet, gateway: Start) -> None:
    """A server that died a moment ago is no reason not to say."""
    sims = fleet(2)
    started = gateway(sims, health_interval=60)
    sims[1].kill()
    answer = started.client.get("/get_world_size/")
    assert (answer.status_code, answer.json()) == (200, {"world_size": 1})


def test_only_the_required_model_version_serves(gateway: Start) -> None:
    with SimProcess(model_version="v1") as old, SimProcess(model_version="v2") as new:
        started = gateway([old, new], required_model_version="v2")
        assert started.post("generate", {"prompts": PROMPTS}).headers["x-backend"] == new.name
        reason = started.client.get("/health/").json()["not_eligible"][old.url]
        assert reason == "reports model version 'v1', required is 'v2'"
        none = gateway([old], required_model_version="v2").post("generate")
        assert none.status_code == 503
        assert none.json()["backends"] == {old.url: reason}


@pytest.mark.parametrize("host", ["::1", "localhost"])
def test_backends_by_ipv6_and_by_name(host: str, gateway: Start) -> None:
    with SimProcess(host=host) as sim:
        shown = f"[{host}]" if ":" in host else host
        started = gateway([f"http://{shown}:{sim.port}/"])
        assert started.post("generate").headers["x-backend"] == f"{shown}:{sim.port}"
        assert started.client.delete(f"/pool/backends/{shown}:{sim.port}").status_code == 200
