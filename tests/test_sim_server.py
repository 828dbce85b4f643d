"""The simulated server over real sockets, in a process of its own: every trait and every fault."""

from __future__ import annotations

import base64
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import numpy as np
import pytest

from trl_pool.sim import SimProcess
from trl_pool.sim.engine import Weights, detokenize, generate, score, tokenize
from trl_pool.sim.ledger import prompt_key
from trl_pool.sim.sampling import Sampling

USER = {"role": "user", "content": "Hi"}
SHORT_SECONDS = 0.2  # long enough for an answer on a busy machine, when waiting to see that there is none


# One server for each set of traits, all started at once.
TRAITS: dict[str, dict[str, Any]] = {
    "plain": {"max_model_len": 64},
    "other": {"weights": "another"},
    "slow": {"latency_ms": 400},
    "odd": {
        "model_version": "v7",
        "tensor_parallel_size": 2,
        "data_parallel_size": 3,
        "prefill_ms_per_token": 10,
        "decode_ms_per_token": 20,
        "timeout_keep_alive": 0.1,
        "max_logprobs": 20,
        "vocab_size": 512,
    },
}


@pytest.fixture(scope="module")
def fleet() -> Iterator[dict[str, SimProcess]]:
    with ExitStack() as stack:
        sims = {name: SimProcess(**traits) for name, traits in TRAITS.items()}
        for sim in sims.values():
            stack.callback(sim.stop)
        for sim in sims.values():
            sim.wait_ready()
        yield sims


@pytest.fixture
def sim(fleet: dict[str, SimProcess]) -> Iterator[SimProcess]:
    """A server as it is after its start."""
    sim = fleet["plain"]
    sim.forget()
    yield sim
    state = sim.state()
    lost = state["poisoned"] or state["dead_worker"] or state["weights"]["updates"] or state["communicator"]
    sim.clear_faults()
    if lost or sim.state()["in_flight"]:
        sim.restart()


@pytest.fixture
def slow(fleet: dict[str, SimProcess]) -> SimProcess:
    """A server that needs 0.4 seconds for each request."""
    fleet["slow"].forget()
    return fleet["slow"]


@pytest.fixture
def odd(fleet: dict[str, SimProcess]) -> SimProcess:
    """A server with all the other options."""
    return fleet["odd"]


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False, verify=False, timeout=10.0) as client:
        yield client


@pytest.fixture
def aside() -> Iterator[Callable[..., Future[httpx.Response]]]:
    """Sends a request from another thread, on a connection of its own."""
    with ThreadPoolExecutor(8) as pool:

        def send(method: str, url: str, timeout: float = 10.0, **arguments: Any) -> Future[httpx.Response]:
            def run() -> httpx.Response:
                with httpx.Client(trust_env=False, verify=False, timeout=timeout) as client:
                    return client.request(method, url, **arguments)

            return pool.submit(run)

        yield send


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came true"


def ask(http: httpx.Client, sim: SimProcess, path: str = "/generate/", **body: Any) -> httpx.Response:
    return http.post(sim.url + path, json=body or {"prompts": ["x"]})


def is_silent(http: httpx.Client, sim: SimProcess, path: str = "/health/") -> bool:
    try:
        http.get(sim.url + path, timeout=SHORT_SECONDS)
    except httpx.ReadTimeout:
        return True
    return False


# The dialect.


def test_health_and_world_size_are_the_constants_of_the_real_server(http: httpx.Client, sim: SimProcess) -> None:
    health = http.get(sim.url + "/health/")
    assert (health.status_code, health.text) == (200, '{"status":"ok"}')
    assert http.get(sim.url + "/get_world_size/").json() == {"world_size": 1}
    assert health.headers["server"] == "trl-pool-sim"


def test_options_show_in_health_and_world_size(http: httpx.Client, odd: SimProcess) -> None:
    assert http.get(odd.url + "/health/").json() == {"status": "ok", "model_version": "v7"}
    assert http.get(odd.url + "/get_world_size/").json() == {"world_size": 6}


@pytest.mark.parametrize("path", ["/health", "/get_world_size"])
def test_paths_without_a_slash_redirect(http: httpx.Client, sim: SimProcess, path: str) -> None:
    response = http.get(sim.url + path)
    assert response.status_code == 307
    assert response.headers["location"] == f"{sim.url}{path}/"
    assert response.headers["server"] == "trl-pool-sim"
    assert http.post(sim.url + "/generate", json={"prompts": ["x"]}, follow_redirects=True).status_code == 200


def test_generate_answers_what_the_engine_gives(http: httpx.Client, sim: SimProcess) -> None:
    texts = ["Hello", "Tschüß"]
    answer = ask(http, sim, prompts=texts, n=2, max_tokens=5, logprobs=2, generation_kwargs={"seed": 3}).json()
    expected = generate(
        [tokenize(text) for text in texts],
        Sampling(n=2, max_tokens=5, logprobs=2, seed=3),
        Weights.checkpoint(),
        max_model_len=64,
    )
    assert answer["prompt_ids"] == expected.prompt_ids
    assert answer["completion_ids"] == expected.completion_ids
    assert answer["logprobs"] == expected.logprobs
    assert answer["logprob_token_ids"] == expected.logprob_token_ids
    as_ids = ask(http, sim, prompts=expected.prompt_ids, n=2, max_tokens=5, logprobs=2, generation_kwargs={"seed": 3})
    assert as_ids.json() == answer


def test_generation_kwargs_override_the_fields(http: httpx.Client, sim: SimProcess) -> None:
    body: dict[str, Any] = {
        "prompts": ["a"],
        "n": 1,
        "generation_kwargs": {"n": 3, "logprobs": None, "ignore_eos": True},
    }
    answer = ask(http, sim, **body).json()
    assert [len(c) for c in answer["completion_ids"]] == [16] * 3
    assert answer["logprobs"] is answer["logprob_token_ids"] is None


def test_chat_renders_the_conversation(http: httpx.Client, sim: SimProcess) -> None:
    answer = ask(http, sim, "/chat/", messages=[[USER], [USER, {"role": "assistant", "content": "?"}]], n=2).json()
    assert detokenize(answer["prompt_ids"][0]) == "<|user|>Hi<|end|>\n<|assistant|>"
    assert len(answer["completion_ids"]) == len(answer["logprobs"]) == 4


def test_no_prompts_are_answered_with_empty_lists(http: httpx.Client, sim: SimProcess) -> None:
    empty: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "logprob_token_ids": []}
    assert ask(http, sim, prompts=[]).json() == empty
    assert ask(http, sim, "/chat/", messages=[]).json() == empty


def test_scores_in_json_show_the_unset_fields(http: httpx.Client, sim: SimProcess) -> None:
    body = {"sequences": [[1, 2, 3], [4, 5]], "prompt_lengths": [1, 2], "top_logprobs": 2}
    answer = ask(http, sim, "/get_sequence_logprobs/", **body).json()
    logprobs, ids = score([1, 2, 3], 1, Weights.checkpoint()).lists(2)
    assert (answer.pop("logprobs"), answer.pop("logprob_token_ids")) == ([logprobs, []], [ids, []])
    assert set(answer.values()) == {None}
    assert len(answer) == 6


def test_scores_in_binary_are_arrays(http: httpx.Client, sim: SimProcess) -> None:
    body = {"sequences": [[1, 2, 3], [4, 5]], "prompt_lengths": [1, 2], "response_format": "binary"}
    answer = ask(http, sim, "/get_sequence_logprobs/", **body).json()
    assert answer["shape"] == [2, 2, 100]
    assert answer["completion_lengths"] == [2, 0]
    assert answer["logprobs"] is answer["logprob_token_ids"] is None
    logprobs = np.frombuffer(base64.b64decode(answer["logprobs_b64"]), np.float32).reshape(2, 2, 100)
    expected, _ = score([1, 2, 3], 1, Weights.checkpoint()).lists(100)
    assert logprobs[0].tolist() == [row[:100] for row in expected]
    assert np.isneginf(logprobs[1]).all()


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("/generate/", {"prompts": "x"}, "prompts"),
        ("/generate/", {"prompts": ["x"], "n": "two"}, "n"),
        ("/chat/", {"prompts": ["x"]}, "messages"),
        ("/get_sequence_logprobs/", {"sequences": [[1]]}, "prompt_lengths"),
        ("/init_communicator/", {"host": "h"}, "port"),
        ("/update_named_param/", {"name": "w", "dtype": "d"}, "shape"),
    ],
)
def test_bad_bodies_get_fastapis_422(
    http: httpx.Client, sim: SimProcess, path: str, body: dict[str, Any], where: str
) -> None:
    response = ask(http, sim, path, **body)
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"][:2] == ["body", where]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate/", {"prompts": ["x"], "n": 0}),
        ("/generate/", {"prompts": ["x"], "generation_kwargs": {"sede": 1}}),
        ("/generate/", {"prompts": ["x"], "images": [None, None]}),
        ("/generate/", {"prompts": ["x"], "images": [["no base64"]]}),
        ("/chat/", {"messages": [[{"role": "user"}]]}),
        ("/chat/", {"messages": [[USER]], "max_tokens": 0}),
        ("/get_sequence_logprobs/", {"sequences": [[1]], "prompt_lengths": []}),
        ("/get_sequence_logprobs/", {"sequences": [[1]], "prompt_lengths": [2]}),
        ("/get_sequence_logprobs/", {"sequences": [[1] * 65], "prompt_lengths": [2]}),
        ("/get_sequence_logprobs/", {"sequences": [[1]], "prompt_lengths": [0], "temperature": -1}),
    ],
)
def test_what_raises_in_the_real_server_is_a_bare_500_on_a_closed_connection(
    http: httpx.Client, sim: SimProcess, path: str, body: dict[str, Any]
) -> None:
    response = ask(http, sim, path, **body)
    assert (response.status_code, response.text) == (500, "Internal Server Error")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    eventually(lambda: sim.state()["connections"] == 0)
    assert ask(http, sim).status_code == 200


def test_the_control_calls_have_the_real_messages(http: httpx.Client, sim: SimProcess) -> None:
    group = {"host": "0.0.0.0", "port": 51216, "world_size": 2, "client_device_uuid": "42"}
    update = {"name": "w", "dtype": "torch.bfloat16", "shape": [2, 3]}
    before = sim.state()["weights"]
    calls: list[tuple[str, dict[str, Any]]] = [
        ("/close_communicator/", {}),
        ("/init_communicator/", group),
        ("/update_named_param/", update),
        ("/reset_prefix_cache/", {}),
    ]
    messages = [ask(http, sim, path, **body).json()["message"] for path, body in calls]
    assert messages == [
        "Request received, closing communicator",
        "Request received, initializing communicator",
        "Request received, updating named parameter",
        "Request received, resetting prefix cache status: True",
    ]
    state = sim.state()
    assert state["communicator"] is True
    assert state["weights"]["updates"] == before["updates"] + 1
    assert state["weights"]["digest"] == Weights.checkpoint().updated("w", "torch.bfloat16", [2, 3]).digest
    assert ask(http, sim, prompts=["x"]).json() != ask(http, sim, prompts=["y"]).json()


def test_a_restart_brings_back_the_first_weights_on_the_same_port(http: httpx.Client, sim: SimProcess) -> None:
    url, first = sim.url, ask(http, sim).json()
    ask(http, sim, "/init_communicator/", host="h", port=1, world_size=2, client_device_uuid="")
    ask(http, sim, "/update_named_param/", name="w", dtype="torch.float32", shape=[1])
    updated = ask(http, sim).json()
    sim.kill()
    with pytest.raises(httpx.ConnectError):
        ask(http, sim)
    sim.restart()
    assert sim.url == url
    assert ask(http, sim).json() == first != updated
    assert sim.state()["communicator"] is False


def test_servers_started_with_other_weights_give_other_tokens(
    http: httpx.Client, sim: SimProcess, fleet: dict[str, SimProcess]
) -> None:
    assert ask(http, sim).json() == ask(http, fleet["odd"]).json()
    assert ask(http, sim).json() != ask(http, fleet["other"]).json()


# One request at a time.


def test_while_a_request_is_generated_nothing_else_is_answered(
    http: httpx.Client, slow: SimProcess, aside: Callable[..., Future[httpx.Response]]
) -> None:
    started = time.monotonic()
    generating = aside("POST", slow.url + "/generate/", json={"prompts": ["a"]})
    eventually(lambda: slow.state()["in_flight"] == 1)
    chatting = aside("POST", slow.url + "/chat/", json={"messages": [[USER]]})
    eventually(lambda: slow.state()["in_flight"] == 2)
    assert is_silent(http, slow)
    assert is_silent(http, slow, "/no_such_path")
    assert slow.state()["endpoints"]["health"]["in_flight"] == 1  # a request once received is not forgotten
    assert generating.result().status_code == chatting.result().status_code == 200
    assert time.monotonic() - started >= 0.8  # one after the other
    assert slow.state()["max_in_flight"] == 2
    assert http.get(slow.url + "/health/").status_code == 200


def test_a_client_that_leaves_does_not_stop_its_request(http: httpx.Client, slow: SimProcess) -> None:
    with pytest.raises(httpx.ReadTimeout):
        http.post(slow.url + "/generate/", json={"prompts": ["a"]}, timeout=0.1)
    assert slow.state()["in_flight"] == 1
    started = time.monotonic()
    assert http.get(slow.url + "/health/").status_code == 200
    assert time.monotonic() - started > 0.1
    assert slow.state()["in_flight"] == 0


def test_scoring_leaves_health_alone_and_is_done_one_batch_after_the_other(
    http: httpx.Client, slow: SimProcess, aside: Callable[..., Future[httpx.Response]]
) -> None:
    body = {"sequences": [[1, 2]], "prompt_lengths": [1]}
    started = time.monotonic()
    scoring = [aside("POST", slow.url + "/get_sequence_logprobs/", json=body) for _ in range(2)]
    eventually(lambda: slow.state()["in_flight"] == 2)
    assert http.get(slow.url + "/health/").status_code == 200
    assert not all(one.done() for one in scoring)
    assert [one.result().status_code for one in scoring] == [200, 200]
    assert time.monotonic() - started >= 0.8
    assert slow.state()["mixed"] == 0


@pytest.mark.parametrize("generate_first", [True, False])
def test_generating_and_scoring_at_a_time_spoils_both(
    slow: SimProcess, aside: Callable[..., Future[httpx.Response]], generate_first: bool
) -> None:
    requests = [
        ("/generate/", {"prompts": ["a", "b"], "n": 2}),
        ("/get_sequence_logprobs/", {"sequences": [[1, 2]], "prompt_lengths": [1]}),
    ]
    (path, body), (later_path, later_body) = requests if generate_first else requests[::-1]
    answers = {path: aside("POST", slow.url + path, json=body)}
    eventually(lambda: slow.state()["in_flight"] == 1)
    answers[later_path] = aside("POST", slow.url + later_path, json=later_body)
    assert len(answers["/generate/"].result().json()["completion_ids"]) == 1
    assert answers["/get_sequence_logprobs/"].result().status_code == 500
    assert slow.state()["mixed"] == 1


def test_scoring_after_an_abandoned_generate_is_not_mixed_up(http: httpx.Client, slow: SimProcess) -> None:
    """The real server takes the scoring request when the generate is over."""
    with pytest.raises(httpx.ReadTimeout):
        http.post(slow.url + "/generate/", json={"prompts": ["a"]}, timeout=0.1)
    body = {"sequences": [[1, 2]], "prompt_lengths": [1]}
    assert http.post(slow.url + "/get_sequence_logprobs/", json=body).status_code == 200
    assert slow.state()["mixed"] == 0


def test_latency_follows_the_prompts_and_the_longest_completion(http: httpx.Client, odd: SimProcess) -> None:
    started = time.monotonic()
    ask(http, odd, prompts=["abcde", "abcde"], max_tokens=8, generation_kwargs={"ignore_eos": True})
    assert time.monotonic() - started >= 10 * 0.010 + 8 * 0.020


# Requests that cost the server.


@pytest.mark.parametrize("prompt", ["x" * 64, []])
def test_a_poison_prompt_hangs_the_server_until_it_is_restarted(
    http: httpx.Client, sim: SimProcess, prompt: str | list[int]
) -> None:
    with pytest.raises(httpx.ReadTimeout):
        http.post(sim.url + "/generate/", json={"prompts": [prompt]}, timeout=SHORT_SECONDS)
    assert is_silent(http, sim)
    state = sim.state()
    assert state["poisoned"]
    assert state["endpoints"]["generate"] == {"received": 1, "answered": 0, "in_flight": 1, "max_in_flight": 1}
    sim.clear_faults()
    assert is_silent(http, sim)
    sim.restart()
    assert ask(http, sim, prompts=["x" * 63]).status_code == 200


@pytest.mark.parametrize("twice", [True, False])
def test_a_wrong_order_of_control_calls_kills_the_worker_after_a_200(
    http: httpx.Client, sim: SimProcess, twice: bool
) -> None:
    group = {"host": "h", "port": 1, "world_size": 2, "client_device_uuid": ""}
    update = {"name": "w", "dtype": "torch.float32", "shape": [1]}
    calls = [("/init_communicator/", group)] * 2 if twice else [("/update_named_param/", update)]
    assert {ask(http, sim, path, **body).status_code for path, body in calls} == {200}
    assert sim.state()["dead_worker"]
    assert http.get(sim.url + "/health/").status_code == 200  # when idle it proves little
    with pytest.raises(httpx.ReadTimeout):
        http.post(sim.url + "/reset_prefix_cache/", timeout=SHORT_SECONDS)
    assert is_silent(http, sim)  # now the event loop waits for the worker


def test_closing_first_makes_a_second_init_safe(http: httpx.Client, sim: SimProcess) -> None:
    group = {"host": "h", "port": 1, "world_size": 2, "client_device_uuid": ""}
    for path in ("/close_communicator/", "/init_communicator/") * 2:
        ask(http, sim, path, **(group if "init" in path else {}))
    assert not sim.state()["dead_worker"]


def test_scoring_with_more_logprobs_than_allowed_kills_the_worker(http: httpx.Client, odd: SimProcess) -> None:
    body: dict[str, Any] = {"sequences": [[1, 2]], "prompt_lengths": [1], "top_logprobs": 20}
    assert ask(http, odd, "/get_sequence_logprobs/", **body).status_code == 200
    body["top_logprobs"] = 21
    with pytest.raises(httpx.ReadTimeout):
        http.post(odd.url + "/get_sequence_logprobs/", json=body, timeout=SHORT_SECONDS)
    assert http.get(odd.url + "/health/").status_code == 200
    with pytest.raises(httpx.ReadTimeout):
        http.post(odd.url + "/generate/", json={"prompts": ["x"]}, timeout=SHORT_SECONDS)
    odd.restart()


@pytest.mark.parametrize("body", [{"logprobs": 21}, {"structured_outputs_regex": "("}, {"prompts": [[512]]}])
def test_what_the_worker_dies_of_is_poison_as_well(http: httpx.Client, odd: SimProcess, body: dict[str, Any]) -> None:
    with pytest.raises(httpx.ReadTimeout):
        http.post(odd.url + "/generate/", json={"prompts": ["x"], **body}, timeout=SHORT_SECONDS)
    assert odd.state()["poisoned"]
    odd.restart()
    accepted: dict[str, Any] = {"logprobs": 20, "structured_outputs_regex": "()", "prompts": [[511]]}
    assert ask(http, odd, **accepted).status_code == 200


# Faults.


def test_hang_holds_requests_until_faults_are_cleared(
    sim: SimProcess, http: httpx.Client, aside: Callable[..., Future[httpx.Response]]
) -> None:
    expected = ask(http, sim).json()
    sim.faults("hang", endpoints=["generate"], times=1)
    hung = aside("POST", sim.url + "/generate/", json={"prompts": ["x"]})
    eventually(lambda: sim.state()["in_flight"] == 1)
    assert ask(http, sim).json() == expected
    assert not hung.done()
    sim.clear_faults()
    assert hung.result().json() == expected


def test_a_request_that_hung_is_dropped_if_its_client_has_gone(sim: SimProcess, http: httpx.Client) -> None:
    sim.faults("hang")
    with pytest.raises(httpx.ReadTimeout):
        http.post(sim.url + "/generate/", json={"prompts": ["x"]}, timeout=0.1)
    eventually(lambda: sim.state()["connections"] == 0)
    sim.clear_faults()
    eventually(lambda: sim.state()["in_flight"] == 0)
    assert sim.state()["endpoints"]["generate"]["answered"] == 0


def test_a_dead_worker_hides_behind_a_healthy_server(sim: SimProcess, http: httpx.Client) -> None:
    sim.faults("dead_worker")
    for path, body in [
        ("/generate/", {"prompts": ["x"]}),
        ("/chat/", {"messages": [[USER]]}),
        ("/get_sequence_logprobs/", {"sequences": [[1, 2]], "prompt_lengths": [1]}),
    ]:
        with pytest.raises(httpx.ReadTimeout):
            http.post(sim.url + path, json=body, timeout=0.1)
    assert http.get(sim.url + "/health/").json() == {"status": "ok"}
    assert http.get(sim.url + "/get_world_size/").json() == {"world_size": 1}


def test_slow_answers_late_and_keeps_the_server_busy(
    sim: SimProcess, http: httpx.Client, aside: Callable[..., Future[httpx.Response]]
) -> None:
    sim.faults("slow", seconds=0.4, times=1)
    started = time.monotonic()
    slow = aside("POST", sim.url + "/generate/", json={"prompts": ["x"]})
    eventually(lambda: sim.state()["in_flight"] == 1)
    assert is_silent(http, sim)
    assert slow.result().status_code == 200
    assert time.monotonic() - started >= 0.4


def test_status_is_answered_as_fastapi_would(sim: SimProcess, http: httpx.Client) -> None:
    sim.faults("status", status=503, retry_after=0.5, times=1)
    sim.faults("status", status=404, times=1)
    sim.faults("status", times=1)
    answers = [ask(http, sim) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [503, 404, 500, 200]
    assert answers[0].json() == {"detail": "Service Unavailable"}
    assert answers[0].headers["retry-after"] == "0.5"
    assert answers[1].json() == {"detail": "Not Found"}
    assert answers[2].text == "Internal Server Error"
    assert "retry-after" not in answers[1].headers


def test_busy_is_429_with_retry_after(sim: SimProcess, http: httpx.Client) -> None:
    sim.faults("busy", times=1)
    sim.faults("busy", retry_after=7)
    answers = [ask(http, sim) for _ in range(2)]
    assert [(a.status_code, a.headers["retry-after"]) for a in answers] == [(429, "1"), (429, "7")]
    assert http.get(sim.url + "/health/").status_code == 200  # health only if named
    sim.clear_faults()
    assert ask(http, sim).status_code == 200


@pytest.mark.parametrize("after_bytes", [None, 0, 20])
def test_reset_breaks_the_connection_in_the_middle_of_the_body(sim: SimProcess, after_bytes: int | None) -> None:
    whole = httpx.post(sim.url + "/generate/", json={"prompts": ["x"]}, trust_env=False).content
    sim.faults("reset", times=1, after_bytes=after_bytes)
    received = raw_post(sim, b'{"prompts": ["x"]}')
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert body == whole[: len(whole) // 2 if after_bytes is None else after_bytes]


def test_reset_can_come_before_any_byte(sim: SimProcess, http: httpx.Client) -> None:
    sim.faults("reset", times=1, after_bytes=-1)
    assert raw_post(sim, b'{"prompts": ["x"]}') == b""
    sim.faults("reset", times=1, after_bytes=-1)
    with pytest.raises(httpx.ReadError):
        ask(http, sim)
    assert ask(http, sim).status_code == 200


def raw_post(sim: SimProcess, body: bytes) -> bytes:
    """Everything that arrives until the connection is reset."""
    head = f"POST /generate/ HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    received = b""
    with socket.create_connection((sim.host, sim.port), timeout=10) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        try:
            while part := connection.recv(65536):
                received += part
        except ConnectionResetError:
            return received
    raise AssertionError(f"closed in good order after {received!r}")


@pytest.mark.parametrize("kind", ["cut_json", "invalid_json"])
def test_broken_json_comes_in_a_complete_response(sim: SimProcess, http: httpx.Client, kind: str) -> None:
    sim.faults(kind, times=1)
    response = ask(http, sim)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        response.json()
    assert ask(http, sim).json()


def test_wrong_count_leaves_one_completion_out(sim: SimProcess, http: httpx.Client) -> None:
    right = ask(http, sim, prompts=["x", "y"], n=2).json()
    sim.faults("wrong_count")
    wrong = ask(http, sim, prompts=["x", "y"], n=2).json()
    assert wrong.pop("prompt_ids") == right.pop("prompt_ids")
    assert wrong == {name: values[:-1] for name, values in right.items()}
    body: dict[str, Any] = {"sequences": [[1, 2], [3, 4]], "prompt_lengths": [1, 1]}
    scores = ask(http, sim, "/get_sequence_logprobs/", **body).json()
    assert len(scores["logprobs"]) == len(scores["logprob_token_ids"]) == 1


def test_false_reset_says_so_in_the_message(sim: SimProcess, http: httpx.Client) -> None:
    sim.faults("false_reset")
    response = http.post(sim.url + "/reset_prefix_cache/")
    assert response.json() == {"message": "Request received, resetting prefix cache status: False"}


def test_refuse_closes_the_port_and_every_connection_for_a_while(
    sim: SimProcess, http: httpx.Client, aside: Callable[..., Future[httpx.Response]]
) -> None:
    sim.faults("hang", times=1)
    hung = aside("POST", sim.url + "/generate/", json={"prompts": ["x"]})
    eventually(lambda: sim.state()["in_flight"] == 1)
    started = time.monotonic()
    sim.faults("refuse", seconds=0.4)
    with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
        hung.result()
    with pytest.raises(httpx.ConnectError):
        ask(http, sim)
    eventually(lambda: bool(sim.state()["listening"]))
    assert time.monotonic() - started >= 0.4
    assert ask(http, sim).status_code == 200


def test_refuse_without_a_time_lasts_until_faults_are_cleared(sim: SimProcess, http: httpx.Client) -> None:
    for _ in range(2):
        sim.faults("refuse")
        sim.faults("refuse")
        with pytest.raises(httpx.ConnectError):
            ask(http, sim)
        sim.clear_faults()
        assert ask(http, sim).status_code == 200


def test_drop_idle_closes_idle_connections_only(
    sim: SimProcess, http: httpx.Client, aside: Callable[..., Future[httpx.Response]]
) -> None:
    ask(http, sim)
    sim.faults("hang", times=1)
    hung = aside("POST", sim.url + "/generate/", json={"prompts": ["x"]})
    eventually(lambda: sim.state()["in_flight"] == 1)
    assert sim.state()["connections"] == 2
    assert sim.faults("drop_idle") == {"dropped": 1}
    eventually(lambda: sim.state()["connections"] == 1)
    sim.clear_faults()
    assert hung.result().status_code == 200


def test_idle_connections_are_closed_after_the_keep_alive_time(http: httpx.Client, odd: SimProcess) -> None:
    http.get(odd.url + "/health/")
    eventually(lambda: odd.state()["connections"] == 0)
    assert http.get(odd.url + "/health/").status_code == 200


def test_faults_that_the_server_does_not_know_are_refused(sim: SimProcess) -> None:
    with pytest.raises(ValueError, match="explode"):
        sim.faults("explode")
    with pytest.raises(ValueError, match="unknown endpoints"):
        sim.faults("hang", endpoints=["generat"])
    assert sim.state()["faults"] == []


# What it remembers.


def test_the_state_tells_who_asked_for_what(sim: SimProcess, http: httpx.Client) -> None:
    ask(http, sim, prompts=["a", [1, 2]][:1], n=2)
    http.post(
        sim.url + "/generate/",
        json={"prompts": [[1, 2], [3]]},
        headers={"user-agent": "me", "x-request-id": "r1"},
    )
    http.post(sim.url + "/chat/", content=b"not json")
    one, two, three = sim.state()["requests"]
    assert (one["endpoint"], one["prompt_keys"], one["n"], one["status"]) == ("generate", ["a"], 2, 200)
    assert two["prompt_keys"] == [prompt_key([1, 2]), prompt_key([3])]
    assert (two["user_agent"], two["x_request_id"]) == ("me", "r1")
    assert (three["endpoint"], three["prompts"], three["status"]) == ("chat", 0, 422)
    assert one["seconds"] <= two["seconds"] <= three["seconds"]
    sim.forget()
    assert sim.state()["requests"] == []
