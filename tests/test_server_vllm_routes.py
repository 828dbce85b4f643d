"""The gateway over `vllm serve`: its endpoints, answers as a single server gives them, and what it refuses."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import eventually
from test_server_process import BODIES, Gateway, gateways, http
from vllm_sims import CHAT, COMPLETIONS, GENERATE, MODEL, RENDER, USER, expected, post, started, tokens, unspoilt

from trl_pool import VLLMClientPool
from trl_pool.sim import SimProcess
from trl_pool.sim.traits import VLLM

Fleet = Callable[[int], list[SimProcess]]
Start = Callable[..., Gateway]

gateway = pytest.fixture(gateways)

TRAITS: dict[str, dict[str, Any]] = {name: {"tensor_parallel_size": 2} for name in ("a", "b")}

PROMPTS = [f"Question {i}: what is {i} times {i % 7}?" for i in range(7)]
INIT = {"master_address": "127.0.0.1", "master_port": 51216, "rank_offset": 1, "world_size": 5}
INFO = {"names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[2]]}
JSON = {"content-type": "application/json"}

ANSWERED: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hello", "max_tokens": 4},
    CHAT: {"messages": [USER], "max_tokens": 4},
    RENDER: {"messages": [USER], "model": MODEL},
    GENERATE: {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 4}},
}
# In this order they are a whole weight update, with everything that goes around it.
CHANGING: dict[str, Any] = {
    "/init_weight_transfer_engine": {"init_info": INIT},
    "/pause": None,
    "/start_weight_update": {},
    "/update_weights": {"update_info": INFO},
    "/finish_weight_update": None,
    "/resume": None,
    "/reset_prefix_cache": None,
    "/update_weight_version": {"new_version": "v1"},
    "/abort_requests": {},
}
ASKED = ("/v1/models", "/server_info", "/version", "/is_paused", "/weight_info", "/get_world_size", "/health")
ADAPTERS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_SCORES = ("logprobs", "logprob_token_ids")
HIDDEN = ("/metrics", "/load", "/ping", "/tokenize", "/sleep", "/collective_rpc", "/server/metrics", "/v1/metrics")


class Recording(httpx.AsyncHTTPTransport):
    """Sockets, and what was sent over them. No connection is kept: whoever is given a transport leaves it open."""

    def __init__(self) -> None:
        super().__init__(limits=httpx.Limits(max_keepalive_connections=0))
        self.sent: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.sent.append(request)
        return await super().handle_async_request(request)

    def to(self, path: str) -> list[httpx.Request]:
        return [request for request in self.sent if request.url.path == path]


@pytest.fixture(scope="module")
def _vllm() -> Iterator[list[SimProcess]]:
    with started(**TRAITS) as sims:
        yield list(sims.values())


@pytest.fixture
def sims(_vllm: list[SimProcess]) -> list[SimProcess]:
    for sim in _vllm:
        if not sim.running:
            sim.restart(wait=False)
    return [unspoilt(sim.wait_ready()) for sim in _vllm]


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    """Where an adapter lies."""
    (tmp_path / "adapter_config.json").write_text("{}")
    return str(tmp_path)


def received(sims: list[SimProcess], *endpoints: str) -> list[int]:
    """Requests that each server has had at these endpoints, or at all that change something or work."""
    asked = endpoints or tuple(
        {*VLLM.endpoints} - {"health", "version", "models", "server_info", "weight_info", "other"}
    )
    return [sum(sim.state()["endpoints"][name]["received"] for name in asked) for sim in sims]


def same(answer: httpx.Response) -> dict[str, Any]:
    """A body without what is new in every answer."""
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return {name: value for name, value in body.items() if name not in ("id", "created", "request_id")}


# Paths


@pytest.mark.parametrize("slash", ["", "/"])
def test_every_endpoint_answers_with_and_without_slash(
    slash: str, sims: list[SimProcess], gateway: Start, adapter: str
) -> None:
    """At once, with no redirect."""
    with http(gateway(sims).url, follow_redirects=False) as client:
        for path in ASKED:
            assert client.get(path + slash).status_code == 200, path
        for path, body in {**ANSWERED, **CHANGING}.items():
            answer = client.post(path + slash, json=body)
            assert (path, answer.status_code) == (path, 200), answer.text
        for path in ADAPTERS:
            answer = client.post(path + slash, json={"lora_name": "tuned", "lora_path": adapter})
            assert (path, answer.status_code) == (path, 200), answer.text


def test_an_endpoint_that_the_servers_lack_is_a_502_with_their_404s(sims: list[SimProcess], gateway: Start) -> None:
    """`/shutdown_weight_transfer_engine` came with vLLM 0.32."""
    for slash in ("", "/"):
        answer = gateway(sims).client.post(f"/shutdown_weight_transfer_engine{slash}")
        assert answer.status_code == 502
        assert {url: r["status"] for url, r in answer.json()["results"].items()} == {sim.url: 404 for sim in sims}


def test_metrics_and_the_like_are_not_exposed(sims: list[SimProcess], gateway: Start) -> None:
    client = gateway(sims).client
    for path in HIDDEN:
        assert [client.request(method, path).status_code for method in ("GET", "POST")] == [404, 404], path
    assert received(sims) == [0, 0]
    assert received(sims, "other") == [1, 1]  # the probe that asks who it is


def test_a_wrong_method_is_a_405(sims: list[SimProcess], gateway: Start) -> None:
    client = gateway(sims).client
    wrong = [("GET", path) for path in (*ANSWERED, *CHANGING, *ADAPTERS)] + [("POST", path) for path in ASKED]
    for method, path in wrong:
        assert (path, client.request(method, path).status_code) == (path, 405)


def test_the_documentation_names_every_endpoint(gateway: Start) -> None:
    paths = gateway(["127.0.0.1:1"]).client.get("/openapi.json").json()["paths"]
    ours = {*ANSWERED, *CHANGING, *ADAPTERS, *ASKED[:5], "/shutdown_weight_transfer_engine"} - {"/reset_prefix_cache"}
    assert ours <= paths.keys()
    assert not {f"{path}/" for path in ours} & paths.keys()


# Dialects


def test_endpoints_of_vllm_serve_are_a_404_over_trl_servers(fleet: Fleet, gateway: Start) -> None:
    """With the reason, and what to use."""
    client = gateway(fleet(1)).client
    calls = [("GET", path, None) for path in ASKED[:5]]
    calls += [("POST", path, body) for path, body in {**ANSWERED, **CHANGING}.items() if path != "/reset_prefix_cache"]
    calls += [("POST", path, {"lora_name": "x"}) for path in ADAPTERS]
    for method, path, body in calls:
        answer = client.request(method, path, json=body)
        assert (path, answer.status_code) == (path, 404)
        assert answer.json()["detail"].startswith(f"{path} is an endpoint of `vllm serve`, and the backends are `trl")


def test_weight_endpoints_of_trl_servers_are_a_404_over_vllm_serve(sims: list[SimProcess], gateway: Start) -> None:
    started = gateway(sims)
    for endpoint in ("init_communicator", "update_named_param", "close_communicator"):
        answer = started.client.post(f"/{endpoint}/", json=BODIES.get(endpoint))
        assert (endpoint, answer.status_code) == (endpoint, 404)
        assert "is an endpoint of `trl vllm-serve`, and the backends are `vllm serve`" in answer.json()["detail"]
    assert received(sims) == [0, 0]


def test_backends_that_have_not_said_who_they_are_make_a_503_and_not_a_404(gateway: Start) -> None:
    """Nobody knows yet that the endpoint is the wrong one."""
    client = gateway(["127.0.0.1:1"]).client
    calls = [("GET", path, None) for path in ASKED[:5]]
    calls += [("POST", path, body) for path, body in {**ANSWERED, **CHANGING}.items() if path != "/reset_prefix_cache"]
    for method, path, body in calls:
        answer = client.request(method, path, json=body)
        assert (path, answer.status_code) == (path, 503)
        assert answer.json()["backends"] == {"http://127.0.0.1:1": "is down (connection refused)"}


# One backend's word


def test_what_all_backends_agree_on_one_is_asked(sims: list[SimProcess], gateway: Start) -> None:
    """Its answer passes through; another is asked when it has just died."""
    client = gateway(sims, health_interval=60).client
    with http(sims[1].url) as direct:
        for path in ("/version", "/server_info", "/server_info?config_format=json"):
            assert client.get(path).content == direct.get(path).content
        (ours,), (theirs,) = (one.get("/v1/models").json()["data"] for one in (client, direct))
        assert ours["id"] == theirs["id"] == MODEL
        sims[0].kill()
        assert client.get("/version").json() == {"version": "0.31.0"}
        assert client.get("/server_info", params={"config_format": "nonsense"}).status_code == 400


def test_world_size_is_the_sum(sims: list[SimProcess], gateway: Start) -> None:
    started = gateway(sims)
    for path in ("/get_world_size", "/get_world_size/"):
        assert started.client.get(path).json() == {"world_size": 4}
    assert gateway(sims[:1]).client.get("/get_world_size").json() == {"world_size": 2}


# Completions

COMPLETED: dict[str, dict[str, Any]] = {
    "a text": {"prompt": "Hello"},
    "texts": {"prompt": PROMPTS, "max_tokens": 5},
    "one text in a list": {"prompt": ["Hello"]},
    "token ids": {"prompt": [1, 2, 3]},
    "lists of token ids": {"prompt": [[1, 2, 3], [4], [5, 6]], "return_token_ids": True},
    "several completions": {"prompt": PROMPTS, "n": 3, "temperature": 0.7},
    "several completions of one": {"prompt": "Hello", "n": 3},
    "a number as text": {"prompt": PROMPTS, "n": "2"},
    "logprobs": {"prompt": PROMPTS, "logprobs": 3, "return_tokens_as_token_ids": True, "model": MODEL},
    "scores": {"prompt": [[1, 2, 3], [4, 5]], "prompt_logprobs": 2, "max_tokens": 1},
    "fields that nobody knows": {"prompt": PROMPTS, "of_the_future": 1},
    "stream set to false": {"prompt": PROMPTS, "stream": False},
}


@pytest.mark.parametrize("name", COMPLETED)
def test_completions_are_those_of_a_single_server(name: str, sims: list[SimProcess], gateway: Start) -> None:
    """Choices numbered through, token counts added up, everything else as it came."""
    body = COMPLETED[name]
    theirs = post(sims[0], COMPLETIONS, body)
    answer = gateway(sims).client.post(COMPLETIONS, json=body)
    assert same(answer) == same(theirs)
    several = isinstance(body["prompt"], list) and len(body["prompt"]) > 1 and not isinstance(body["prompt"][0], int)
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.headers["x-backend"].split(", ")) == (2 if several else 1)
    assert set(answer.headers["x-backend"].split(", ")) <= {sim.name for sim in sims}


def test_counts_of_details_are_added_up_as_well() -> None:
    from trl_pool.dialects.vllm import _raw_merge

    def answer(prompt: int, cached: int | None) -> dict[str, Any]:
        details = None if cached is None else {"cached_tokens": cached, "audio_tokens": None}
        usage = {"prompt_tokens": prompt, "prompt_tokens_details": details}
        return {"choices": [{"index": 0}], "rest": {"id": "x", "usage": usage}}

    merged = _raw_merge([answer(3, 1), answer(4, 2)])
    details = {"cached_tokens": 3, "audio_tokens": None}
    assert merged["usage"] == {"prompt_tokens": 7, "prompt_tokens_details": details}
    assert _raw_merge([answer(3, None), answer(4, None)])["usage"]["prompt_tokens_details"] is None


def test_a_request_that_is_not_split_is_passed_on_as_bytes(sims: list[SimProcess], gateway: Start) -> None:
    """Both ways: whatever its JSON looks like."""
    transport = Recording()
    client = gateway(sims, transport=transport).client
    for path, body in {**ANSWERED, COMPLETIONS: {"prompt": ["Hello"], "max_tokens": 4}}.items():
        content = json.dumps(body, indent=3).encode()
        answer = client.post(path, content=content, headers=JSON)
        assert (path, answer.status_code) == (path, 200)
        (sent,) = transport.to(path)
        assert sent.content == content
        assert answer.headers["x-backend"] == f"{sent.url.host}:{sent.url.port}"
        assert same(answer) == same(post(sims[0], path, body))


@pytest.mark.parametrize("path", [CHAT, RENDER, GENERATE])
def test_what_cannot_be_split_goes_to_one_backend(path: str, sims: list[SimProcess], gateway: Start) -> None:
    """With its n completions, its tools, its images."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with_image = [{"role": "user", "content": [picture, {"type": "text", "text": "?"}]}]
    bodies: dict[str, list[dict[str, Any]]] = {
        CHAT: [
            {"messages": [USER], "n": 3, "logprobs": True, "top_logprobs": 2, "return_token_ids": True},
            {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
            {"messages": with_image, "max_tokens": 3},
        ],
        RENDER: [{"messages": with_image, "model": MODEL}],
        GENERATE: [{"token_ids": [1, 2], "sampling_params": {"n": 2, "logprobs": 1, "output_kind": 2}}],
    }
    client = gateway(sims).client
    for body in bodies[path]:
        assert same(client.post(path, json=body)) == same(post(sims[0], path, body))
    assert sum(received(sims)) == 2 * len(bodies[path])


def test_the_request_id_goes_on_and_comes_back(sims: list[SimProcess], gateway: Start) -> None:
    client = gateway(sims).client
    for path, body in {**ANSWERED, COMPLETIONS: {"prompt": PROMPTS}}.items():
        answer = client.post(path, json=body, headers={"x-request-id": f"7{path}"})
        assert answer.headers.get_list("x-request-id") == [f"7{path}"]
    seen = [request["x_request_id"] for sim in sims for request in sim.state()["requests"]]
    assert [seen.count(f"7{path}") for path in ANSWERED] == [2, 1, 1, 1]


def test_a_session_stays_with_one_backend(sims: list[SimProcess], gateway: Start) -> None:
    """As a whole, whatever is asked; other sessions go elsewhere."""
    client = gateway(sims).client
    for session in ("1", "2", "3"):
        calls = [(COMPLETIONS, {"prompt": PROMPTS}), *ANSWERED.items(), (CHAT, {**ANSWERED[CHAT], "stream": True})]
        homes = {
            client.post(p, json=body, headers={"x-session-id": session}).headers["x-backend"] for p, body in calls
        }
        assert len(homes) == 1
        assert ", " not in homes.pop()
    served = {
        client.post(CHAT, json=ANSWERED[CHAT], headers={"x-session-id": str(i)}).headers["x-backend"]
        for i in range(16)
    }
    assert len(served) == 2


def test_when_a_backend_dies_the_other_serves(sims: list[SimProcess], gateway: Start) -> None:
    """Completions of several prompts, and what is passed on whole."""
    started = gateway(sims)
    expected = {path: same(post(sims[0], path, body)) for path, body in ANSWERED.items()}
    many = same(post(sims[0], COMPLETIONS, {"prompt": PROMPTS}))
    for sim in sims:
        sim.faults("reset", endpoints=["completions", "chat_completions", "render", "generate"], times=2)
    sims[1].clear_faults()
    assert same(started.client.post(COMPLETIONS, json={"prompt": PROMPTS})) == many
    for path, body in ANSWERED.items():
        assert same(started.client.post(path, json=body)) == expected[path]
    sims[0].kill()
    answer = started.client.post(COMPLETIONS, json={"prompt": PROMPTS})
    assert answer.headers["x-backend"] == sims[1].name
    assert same(answer) == many


# What is refused


@pytest.mark.parametrize("path", ANSWERED)
def test_a_backends_4xx_passes_through_unchanged(path: str, sims: list[SimProcess], gateway: Start) -> None:
    """It is sent to nobody else, and counts against nobody."""
    started = gateway(sims)
    body = {**ANSWERED[path], "model": "no-such-model"}
    answer, theirs = started.client.post(path, json=body), post(sims[0], path, body)
    assert (answer.status_code, answer.content) == (theirs.status_code, theirs.content) == (404, answer.content)
    assert answer.headers["content-type"] == theirs.headers["content-type"]
    assert answer.headers["x-backend"] in {sim.name for sim in sims}
    assert sum(received(sims)) == 2  # one was the test's own
    assert [(b["ejections"], b["eligible"], b["breaker"]) for b in started.backends()] == [(0, True, "closed")] * 2


STRANGE: list[tuple[str, dict[str, Any]]] = [
    *((COMPLETIONS, {"prompt": prompt}) for prompt in (None, "", [], 5, {"a": 1}, [None], [1.5, 2], [{"a": 1}, "b"])),
    *((COMPLETIONS, {"prompt": prompt}) for prompt in (["a", 5], [[1], "b"], [["a"], [1]], [True, False], [[], [1]])),
    *((COMPLETIONS, {"prompt": PROMPTS, "n": n}) for n in (0, -1, "x", 1.5, [1], None)),
    (COMPLETIONS, {}),
    *((CHAT, {"messages": messages}) for messages in (None, [], "x", [1], [{}], [{"role": 5}], {"a": 1})),
    *((GENERATE, {"token_ids": ids, "sampling_params": {}}) for ids in (None, [], "x", [None], [{}], [[1]])),
    (GENERATE, {"token_ids": [1], "sampling_params": 5}),
]


@pytest.mark.parametrize("stream", [False, True])
def test_a_body_that_makes_no_sense_gets_the_servers_own_answer(
    stream: bool, sims: list[SimProcess], gateway: Start
) -> None:
    """The gateway has no opinion of its own on what a server may refuse."""
    started = gateway(sims)
    for path, strange in STRANGE:
        if stream and path == GENERATE:
            continue
        body = {**strange, **({"stream": True} if stream else {})}
        theirs, answer = post(sims[0], path, body), started.client.post(path, json=body)
        assert (strange, answer.status_code) == (strange, theirs.status_code), answer.text
        if theirs.status_code != 200:
            assert set(answer.json()["error"]) == set(theirs.json()["error"])
    assert [backend["failures"] for backend in started.backends()] == [0, 0]


def test_what_is_no_json_object_or_too_large_reaches_no_backend(sims: list[SimProcess], gateway: Start) -> None:
    """400, 422 and 413, with the reason."""
    started = gateway(sims, max_body_mb=0.001)
    for path in (*ANSWERED, *CHANGING, *ADAPTERS):
        if path in ("/pause", "/resume", "/reset_prefix_cache"):  # their body is of no interest
            continue
        for content, status in ((b"x" * 2000, 413), (b"{", 400), (b"\xff", 400), (b"[]", 422), (b'"x"', 422)):
            answer = started.client.post(path, content=content, headers=JSON)
            assert (path, content[:9], answer.status_code) == (path, content[:9], status)
            assert answer.json()["detail"]
    assert received(sims) == [0, 0]


SENSELESS: list[tuple[str, dict[str, Any]]] = [
    *(("/init_weight_transfer_engine", body) for body in ({}, {"init_info": 5}, {"init_info": None})),
    *(("/init_weight_transfer_engine", {"init_info": {**INIT, "rank_offset": x}}) for x in ("x", None, [1], 0, 1.5)),
    *(("/init_weight_transfer_engine", {"init_info": {**INIT, "world_size": x}}) for x in ("x", [5], -1)),
    *(("/update_weights", body) for body in ({}, {"update_info": 5}, {"update_info": None})),
    *(("/update_weights", {"update_info": {**INFO, "names": x}}) for x in (5, None, "a", {"a": 1}, [1])),
    *(("/v1/load_lora_adapter", body) for body in ({}, {"lora_name": ""}, {"lora_name": 5})),
    ("/v1/unload_lora_adapter", {"lora_name": None}),
    *(("/update_weight_version", body) for body in ({}, {"new_version": 5})),
]


def test_control_calls_that_make_no_sense_are_a_422_and_reach_no_backend(
    sims: list[SimProcess], gateway: Start
) -> None:
    started = gateway(sims)
    for path, body in SENSELESS:
        answer = started.client.post(path, json=body)
        assert (path, body, answer.status_code) == (path, body, 422), answer.text
        assert answer.json()["detail"]
    assert received(sims) == [0, 0]


# Keys


@pytest.mark.parametrize("stream", [False, True])
def test_a_clients_key_is_passed_on_where_the_gateway_has_none(
    stream: bool, sims: list[SimProcess], gateway: Start
) -> None:
    """And where it has one, that one goes out, and the client's does not."""
    body = {"prompt": PROMPTS, "stream": stream}
    for own, seen in ((None, "Bearer client-secret"), ("own-secret", "Bearer own-secret")):
        transport = Recording()
        client = gateway(sims, transport=transport, backend_api_key=own).client
        answer = client.post(COMPLETIONS, json=body, headers={"authorization": "Bearer client-secret"})
        assert answer.status_code == 200
        assert {request.headers["authorization"] for request in transport.to(COMPLETIONS)} == {seen}
        assert client.get("/v1/models", headers={"authorization": "Bearer client-secret"}).status_code == 200
        assert transport.to("/v1/models")[-1].headers["authorization"] == seen
        probes = {request.headers.get("authorization") for request in transport.to("/health")}
        assert probes <= {None if own is None else seen}


def test_keys_appear_in_no_answer_and_no_log(
    sims: list[SimProcess], gateway: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    started = gateway(sims, backend_api_key="own-secret")
    sims[0].faults("reset", times=3)
    headers = {"authorization": "Bearer client-secret"}
    answers = [started.client.post(path, json=body, headers=headers) for path, body in ANSWERED.items()]
    answers += [started.client.get(path, headers=headers) for path in (*ASKED, "/pool/stats", "/pool/backends")]
    answers += [started.client.post(path, json={}, headers=headers) for path in CHANGING]
    everything = caplog.text + repr(started.settings) + "".join(f"{answer.headers}{answer.text}" for answer in answers)
    assert "own-secret" not in everything
    assert "client-secret" not in everything


def test_servers_with_a_key_serve_a_gateway_that_has_it(gateway: Start) -> None:
    """Whatever key its client has, or none."""
    with SimProcess(dialect="vllm", api_key="key") as sim:
        client = gateway([sim], backend_api_key="key").client
        for headers in ({}, {"authorization": "Bearer other"}):
            answer = client.post(COMPLETIONS, json=ANSWERED[COMPLETIONS], headers=headers)
            assert answer.status_code == 200
        without = gateway([sim]).client.post(COMPLETIONS, json=ANSWERED[COMPLETIONS])
        assert without.status_code == 503
        assert "set api_key= or BACKEND_API_KEY" in without.text


# Adapters


def test_an_adapter_is_loaded_everywhere_and_again_before_a_server_that_comes_back_serves(
    sims: list[SimProcess], gateway: Start, adapter: str
) -> None:
    started = gateway(sims)
    load = {"lora_name": "tuned", "lora_path": adapter}
    answer = started.client.post("/v1/load_lora_adapter", json=load)
    assert answer.status_code == 200
    assert {url: result["ok"] for url, result in answer.json()["results"].items()} == {sim.url: True for sim in sims}
    assert [list(sim.state()["adapters"]) for sim in sims] == [["tuned"]] * 2
    body = {"prompt": PROMPTS, "model": "tuned"}
    tuned = same(started.client.post(COMPLETIONS, json=body))
    assert (tuned["model"], len(tuned["choices"])) == ("tuned", len(PROMPTS))
    sims[0].kill()
    eventually(lambda: started.backend(sims[0])["health"] == "down")
    sims[0].restart()
    eventually(lambda: started.backend(sims[0])["eligible"])
    assert list(sims[0].state()["adapters"]) == ["tuned"]
    answer = started.client.post(COMPLETIONS, json=body)
    assert len(answer.headers["x-backend"].split(", ")) == 2
    assert same(answer)["choices"] == tuned["choices"]


def test_a_server_that_cannot_load_an_adapter_again_does_not_serve(
    sims: list[SimProcess], gateway: Start, adapter: str
) -> None:
    """Nor one that answers an error to it. An adapter that was unloaded is loaded nowhere."""
    started = gateway(sims)
    started.client.post("/v1/load_lora_adapter", json={"lora_name": "tuned", "lora_path": adapter})
    sims[0].kill()
    eventually(lambda: started.backend(sims[0])["health"] == "down")
    config = Path(adapter) / "adapter_config.json"
    config.unlink()
    sims[0].restart()
    eventually(lambda: "could not load adapter 'tuned' again" in started.backend(sims[0])["reason"])
    served = started.client.post(COMPLETIONS, json={"prompt": PROMPTS, "model": "tuned"})
    assert served.headers["x-backend"] == sims[1].name
    config.write_text("{}")
    eventually(lambda: started.backend(sims[0])["eligible"])
    assert started.client.post("/v1/unload_lora_adapter", json={"lora_name": "tuned"}).status_code == 200
    assert [sim.state()["adapters"] for sim in sims] == [{}, {}]
    sims[0].kill()
    eventually(lambda: started.backend(sims[0])["health"] == "down")
    sims[0].restart()
    eventually(lambda: started.backend(sims[0])["eligible"])
    assert sims[0].state()["adapters"] == {}


def test_an_adapter_that_one_backend_refuses_is_a_502(sims: list[SimProcess], gateway: Start, adapter: str) -> None:
    """With a result for each, and not sent again."""
    started = gateway(sims)
    sims[1].faults("status", status=500, endpoints=["load_lora_adapter"], times=1)
    answer = started.client.post("/v1/load_lora_adapter", json={"lora_name": "tuned", "lora_path": adapter})
    assert answer.status_code == 502
    results = answer.json()["results"]
    assert [(results[sim.url]["ok"], results[sim.url]["status"]) for sim in sims] == [(True, 200), (False, 500)]
    assert received(sims, "load_lora_adapter") == [1, 1]


# The endpoints of `trl vllm-serve` over `vllm serve`


def test_the_endpoints_of_trl_servers_are_translated(sims: list[SimProcess], gateway: Start, fleet: Fleet) -> None:
    """To the tokens and logprobs that a `trl` server would have answered."""
    (trl,) = fleet(1)
    started = gateway(sims)
    bodies = {
        "generate": {"prompts": PROMPTS, "n": 2, "max_tokens": 4, "logprobs": 2},
        "chat": {"messages": [[USER], [{"role": "user", "content": "Hello"}]], "max_tokens": 4},
        "get_sequence_logprobs": {"sequences": [[1, 2, 3, 4], [5, 6]], "prompt_lengths": [2, 1], "top_logprobs": 3},
    }
    for endpoint, body in bodies.items():
        answer = started.post(endpoint, body)
        assert answer.status_code == 200, answer.text
        assert len(answer.headers["x-backend"].split(", ")) == 2
        with http(trl.url) as direct:
            theirs = direct.post(f"/{endpoint}/", json=body).json()
        ours = answer.json()
        if endpoint == "get_sequence_logprobs":
            # A `trl` server adds the actual token to the most probable ones where it is none of them.
            theirs = {name: [[top[:3] for top in rows] for rows in theirs[name]] for name in _SCORES}
        assert {name: ours[name] for name in theirs} == theirs


def test_binary_scores_are_refused_by_name(sims: list[SimProcess], gateway: Start) -> None:
    started = gateway(sims)
    answer = started.post("get_sequence_logprobs", {**BODIES["get_sequence_logprobs"], "response_format": "binary"})
    assert answer.status_code == 422
    assert "response_format: must be 'json' where the backends are `vllm serve`" in answer.text
    assert received(sims) == [0, 0]


# A pool over a gateway


def test_a_pool_given_the_gateways_address_talks_to_the_servers(sims: list[SimProcess], gateway: Start) -> None:
    """Directly: the gateway sees none of its requests."""
    started = gateway(sims)
    with VLLMClientPool(started.url, connection_timeout=10) as pool:
        assert {backend.url for backend in pool.statistics().backends} == {sim.url for sim in sims}
        assert pool.get_world_size() == 4
        assert pool.generate(PROMPTS, max_tokens=6)["completion_ids"] == expected(*PROMPTS)
    assert [backend["requests"] for backend in started.backends()] == [0, 0]
    assert received(sims, "completions") == [1, 1]
    assert tokens(sims[0]) == expected("Hello")
